"""Continue a prompt with a text model that train.py made.

    python sample.py runs/fineweb --prompt "The water cycle"
    python sample.py runs/fineweb --prompt "The" --num-samples 4 --temperature 1 --top-p 0.95 --seed 1
    echo "The water cycle" | python sample.py runs/fineweb --temperature 0 --max-new-tokens 50

The prompt and what follows it go to standard output, a single sample token by token; everything else goes to standard
error. A sample ends with the document it tells, or after --max-new-tokens. An empty prompt begins a new document, and
so does <|endoftext|> anywhere in a prompt; a model trained with --reset-at-document sees nothing before it.

A prompt may be longer than the model's block size. Mamba layers carry a state of fixed size and go on; attention then
meets rotary positions that it was not trained on, which is said once.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import train
from data.prepare import PrepareError, load_tokenizer
from train import GPT, ConfigError, DataError, ModelConfig, Parser, Runtime, TrainConfig, load_model, reason

if TYPE_CHECKING:
    from tiktoken import Encoding

TOKENIZERS = {"gpt2": 50257, "bytes": 257}  # and how many tokens they have; the last is end-of-text
RULE = "-" * 40  # between samples


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def open_tokenizer(name: str) -> Encoding:
    """The tokenizer called `name`; DataError within seconds where its vocabulary is neither cached nor to be had."""
    try:
        return load_tokenizer(name)
    except PrepareError as error:
        raise DataError(str(error)) from None


def choose_tokenizer(name: str | None, model_cfg: ModelConfig, cfg: TrainConfig) -> tuple[str, str]:
    """The tokenizer called `name`, or else the one that the run's data were made with; and a line that says which.

    `meta.json` in the data folder tells; where there is none it is GPT-2's. DataError where it has more tokens than
    the model.
    """
    where = "named by --tokenizer"
    if name is None:
        path = (Path(cfg.data_dir) if cfg.data_dir else train.HERE / "data") / "meta.json"
        try:
            name, where = json.loads(path.read_text(encoding="utf-8"))["tokenizer"], f"named in {path}"
        except (FileNotFoundError, NotADirectoryError):
            name, where = "gpt2", f"assumed: there is no {path}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: does not name a tokenizer ({reason(error)}); give --tokenizer") from None
        if name not in list(TOKENIZERS):
            raise DataError(f"{path}: tokenizer {name!r} is none of {', '.join(TOKENIZERS)}; give --tokenizer")
    if TOKENIZERS[name] > model_cfg.vocab_size:
        raise DataError(f"the tokenizer {name} ({where}) has {TOKENIZERS[name]} tokens, the model only "
                        f"{model_cfg.vocab_size}; give the right one with --tokenizer")
    return name, f"{name}, {where}"


# ---------------------------------------------------------------------------------------------------------------------
# The run


def text_settings(folder: Path) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a text run; DataError where the folder holds no run, or one on ARC tasks."""
    for name in ("config.json", "checkpoint.pt"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no run there (it has no {name}); `python train.py --dataset fineweb` makes one")
    model_cfg, cfg = train.load_config(folder)
    if model_cfg.grid:
        raise DataError(f"{folder}: a run on ARC tasks, not on text; `python solve.py {folder}` answers tasks with it")
    if found := model_cfg.validate():
        raise DataError(f"{folder / 'config.json'}: {'; '.join(found)}")
    return model_cfg, cfg


def described(model: GPT, state: dict[str, Any]) -> str:
    """A line about the model of a checkpoint."""
    size = sum(p.numel() for p in model.parameters())
    kind = "averaged weights" if state.get("ema") else "weights"
    return f"{size:,} parameters, {model.config.pattern}; {kind} of step {state['step']}"


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def keep_likely(logp: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities (B, V) with all but the likeliest tokens of each row at minus infinity.

    top_k: so many of them, and what is as likely as the last (0: all). top_p: of those the fewest that share at least
    this much of the probability, one at least (1: all).
    """
    if top_k:
        logp = logp.masked_fill(logp < logp.topk(min(top_k, logp.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logp.softmax(-1).sort(descending=True, stable=True)
        enough = p.cumsum(-1) - p >= top_p  # the likelier ones alone share that much
        logp = logp.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
    return logp


def chooser(vocabulary: int, temperature: float, top_k: int, top_p: float, seed: int) -> Any:
    """What `GPT.stream` asks for tokens (B,), given log-probabilities (B, V): the likeliest at temperature 0.

    Only the first `vocabulary` tokens are ever chosen: a model's vocabulary may be padded. Draws are made on the CPU,
    so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logp: Tensor) -> Tensor:
        logp = logp[:, :vocabulary]
        if temperature == 0:
            return logp.argmax(-1)
        p = keep_likely(logp.cpu() / temperature, top_k, top_p).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logp.device)

    return choose


def encode_prompt(encoding: Encoding, prompt: str, last_document: bool = False) -> list[int]:
    """Token ids of a prompt, or of its last document; end-of-text, with which a document begins, if it is empty."""
    ids = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    if last_document and encoding.eot_token in ids:
        return ids[len(ids) - 1 - ids[::-1].index(encoding.eot_token) :]
    return ids


def write(model: GPT, encoding: Encoding, prompt: str, ids: list[int], args: argparse.Namespace,
          runtime: Runtime) -> str:
    """Print the prompt, whose ids the model is given, and its continuations, a single one as it comes.

    Returns two lines about the speed.
    """
    choose = chooser(encoding.n_vocab, args.temperature, args.top_k, args.top_p, args.seed)
    tokens = torch.tensor([ids] * args.num_samples, device=runtime.device)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in tokens]  # hold back parts of a character
    texts, count, start = [prompt] * len(tokens), 0, time.monotonic()
    if len(texts) == 1:
        print(prompt, end="", flush=True)
    with runtime.autocast():
        for rows, new, _ in model.stream(tokens, None, args.max_new_tokens, encoding.eot_token, choose):
            for row, token in zip(rows.tolist(), new.tolist(), strict=True):
                says = b"" if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
                text = decoders[row].decode(says)
                texts[row] += text
                if len(texts) == 1:
                    print(text, end="", flush=True)
            if not count:
                first = time.monotonic()
            count += len(rows)
    seconds, rest = time.monotonic() - first, [d.decode(b"", final=True) for d in decoders]
    if len(texts) == 1:
        print(rest[0], flush=True)
    else:
        print(f"\n{RULE}\n".join(text + end for text, end in zip(texts, rest, strict=True)), flush=True)
    read, later = tokens.numel(), count - len(texts)
    return (f"prompt      {read} tokens in {first - start:.2f} s, {read / (first - start):,.0f} tokens/s\n"
            f"new         {count} tokens" + (f" in {seconds:.2f} s, {later / seconds:,.0f} tokens/s" * (later > 0)))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_tokenizer(parser: Parser) -> None:
    """The flag --tokenizer."""
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), help="of the run's data (default: the one that "
                        "meta.json in their folder names; without such a file gpt2)")


def make_parser() -> Parser:
    """The flags; those about the machine are train.py's."""
    parser = Parser(prog="sample.py", allow_abbrev=False,
                    description="Continue a prompt with a text model that train.py made.")
    parser.add_argument("run", type=Path, help="the folder of a run, for example runs/fineweb")

    def add(name: str, kind: Any, metavar: str, default: Any, text: str) -> None:
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=kind, metavar=metavar, default=default, help=text)

    add("--prompt", str, "TEXT", None, "what to continue; -, or none: standard input without its last line break, if "
        "it is not a terminal; empty: a new document")
    add("--num-samples", int, "N", 1, "continuations, made together")
    add("--max-new-tokens", int, "N", 200, "longest continuation")
    add("--temperature", float, "X", 0.8, "0: always the likeliest token; 1: as the model says; above: bolder")
    add("--top-k", int, "N", 0, "draw among the N likeliest tokens; 0: all")
    add("--top-p", float, "X", 1.0, "draw among the fewest tokens that share this much of the probability; 1: all")
    add("--seed", int, "N", 0, "of the draws")
    add_tokenizer(parser)
    for f in dataclasses.fields(TrainConfig):
        if f.name in ("device", "dtype", "kernels"):
            parser.add_argument(train.flag(f.name), choices=f.metadata["choices"], default=f.default,
                                help=f.metadata["help"])
    return parser


def problems(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the numbers, in the words of the flags."""
    least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
    found = [f"{train.flag(name)} is {getattr(args, name)}; it must be at least {low}"
             for name, low in least.items() if not low <= getattr(args, name) < 1e12]
    return found if 0 < args.top_p <= 1 else [*found, f"--top-p is {args.top_p}; it must be above 0 and at most 1"]


def read_prompt(given: str | None) -> str:
    """The prompt of the command line or of standard input; DataError where that is not UTF-8."""
    if given not in (None, "-"):
        return given
    if given is None and sys.stdin.isatty():
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text ({reason(error)}); convert it") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def sample(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if found := problems(args):
        raise ConfigError("\n".join(found))
    model_cfg, cfg = text_settings(args.run)
    cfg = dataclasses.replace(cfg, device=args.device, dtype=args.dtype, kernels=args.kernels)
    name, which = choose_tokenizer(args.tokenizer, model_cfg, cfg)
    encoding = open_tokenizer(name)
    prompt = read_prompt(args.prompt)
    ids = encode_prompt(encoding, prompt, last_document=model_cfg.document_token >= 0)
    runtime = Runtime.start(cfg)
    model, state = load_model(args.run, model_cfg)
    runtime.kernels.use(model.to(runtime.device))
    say(f"run         {args.run}: {described(model, state)}\ntokenizer   {which}\ndevice      {runtime.describe()}")
    if runtime.kernels.scan is not train.ssd_scan:
        say("            the Triton kernels are compiled the first time, which takes minutes")
    if "A" in model_cfg.pattern and len(ids) + args.max_new_tokens > model_cfg.block_size:
        say(f"note        {len(ids)} + {args.max_new_tokens} tokens go beyond the block size of "
            f"{model_cfg.block_size}: attention was not trained on such positions")
    say(write(model, encoding, prompt, ids, args, runtime))


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 with one line for each problem, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows a question mark
    try:
        sample(args)
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"sample.py: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print(f"sample.py: out of memory ({reason(error)}); lower --num-samples or shorten the prompt", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
