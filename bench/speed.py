"""How fast we are on a CPU: with either table and precision, beside transformers' models of as many parameters.

    python bench/speed.py                     # all parts, fifteen minutes on two cores; needs requirements-dev.txt
    python bench/speed.py nano --busy 1       # the step of the first command, alone and beside one busy process
    python bench/speed.py train memory --shapes 4x1024 1x4096

`train`: a step (forward with the model's own loss, backward, fused AdamW) on random tokens, ours beside GPT-2 and
GraniteMoeHybrid, which gets its best chunk on a CPU, 64. `nano`: a whole step of
`train.py --dataset arc --batch-size 16`, tokens counted with their padding. `answer`: new tokens of greedy decoding
behind a prompt. `memory`: what a step adds to the memory of a process of its own. All that are compared take turns in
one process; printed are medians, and ratios to GraniteMoeHybrid at its best. Each is allowed its best setting: float32
and, where this CPU computes in bfloat16, autocast; pieces on threads, or as many threads as cores in each operator.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from torch import nn  # noqa: E402

import train  # noqa: E402
from data.files import UserError, run_script, write_json  # noqa: E402

CORES = torch.get_num_threads()
SIZES = {"toy": dict(vocab_size=64, d_model=64, n_head=2, d_state=16, headdim=16, pattern="MA"),
         "small": dict(vocab_size=512, d_model=256, n_head=4, d_state=64, headdim=64, pattern="MMAMMMAM")}
PARTS = ("train", "nano", "answer", "memory")


# == MODELS ===========================================================================================================


class Contestant(NamedTuple):
    """One model, table and precision: what is timed, and the tokens it handles."""

    name: str
    tokens: int
    work: Callable[[], Any]
    threads: int = CORES  # of each operator


def gpt2(size: dict[str, Any], length: int) -> nn.Module:
    """transformers' GPT-2, the yardstick for the number of parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=size["vocab_size"], n_positions=length, n_embd=size["d_model"], n_layer=len(size["pattern"]),
        n_head=size["n_head"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa"))


def granite(cfg: train.ModelConfig) -> nn.Module:
    """transformers' GraniteMoeHybrid in the sizes of our model, on its PyTorch code."""
    sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None  # it would take installed kernels on any device
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    kinds = ["attention" if letter == "A" else "mamba" for letter in cfg.pattern]
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, num_hidden_layers=len(kinds), layer_types=kinds,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_head, shared_intermediate_size=cfg.d_ff,
        num_local_experts=0, mamba_n_heads=2 * cfg.d_model // cfg.headdim, mamba_d_head=cfg.headdim,
        mamba_d_state=cfg.d_state, mamba_expand=2, mamba_n_groups=1, mamba_chunk_size=64,
        position_embedding_type="rope", attention_multiplier=(cfg.d_model // cfg.n_head) ** -0.5,
        tie_word_embeddings=True, pad_token_id=None, attn_implementation="sdpa"))


def count(model: nn.Module) -> int:
    """Parameters, positions left out (GPT-2's table grows with the length)."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)


def config(size: dict[str, Any], length: int) -> train.ModelConfig:
    """Our model of that size, with as many parameters as GPT-2 of that size."""
    with torch.device("meta"):
        least, more = (count(train.GPT(train.ModelConfig(**size, d_ff=d_ff))) for d_ff in (8, 16))
        d_ff = 8 + 8 * round((count(gpt2(size, 8)) - least) / (more - least))
    return train.ModelConfig(**size, d_ff=d_ff, block_size=length)


def build(kind: str, size: dict[str, Any], length: int) -> nn.Module:
    """`GPT-2`, `GraniteMoeHybrid` or one of ours, with as many parameters each."""
    torch.manual_seed(0)
    if kind == "GPT-2":
        return gpt2(size, length)
    cfg = config(size, length)
    return granite(cfg) if kind == "GraniteMoeHybrid" else train.GPT(cfg)


# == WHAT IS TIMED ====================================================================================================


def runtime(kernels: str, dtype: str, model: nn.Module, rows: int) -> tuple[train.Runtime, int]:
    """What train.py would compute with, and its threads in each operator."""
    torch.set_num_threads(CORES)
    found = train.Runtime.start(train.TrainConfig(device="cpu", dtype=dtype, kernels=kernels), distributed=False)
    model.use(found.ops)
    if kernels != "plain":
        train.fit_to_memory(model, train.Optimizers(model, cfg := train.TrainConfig(batch_size=rows)), cfg, found)
    return found, torch.get_num_threads()


def training_step(kind: str, dtype: str, size: dict[str, Any], rows: int, length: int) -> Contestant:
    """A training step on random tokens."""
    kernels, model = "plain" if kind.endswith("plain") else "auto", build(kind, size, length)
    x = torch.randint(0, size["vocab_size"], (rows, length))
    y = torch.cat([x[:, 1:], torch.full_like(x[:, :1], train.IGNORE_INDEX)], dim=1)  # theirs shifts by itself
    optimizer, threads = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), CORES
    if isinstance(model, train.GPT):
        where, threads = runtime(kernels, dtype, model, rows)

    def step() -> None:
        if not isinstance(model, train.GPT):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(x, labels=x, use_cache=False).loss
            loss.backward()
        else:
            (train.mean_loss.plain if kernels == "plain" else train.mean_loss)(model, [(x, y)], where)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(f"{kind}, {dtype}", x.numel(), step, threads)


def nano_step(kernels: str, dtype: str, rows: int, steps: int = 4) -> Contestant:
    """The first steps of `train.py --dataset arc`, over and over."""
    model_cfg, cfg = train.make_config(dict(dataset="arc", preset="nano", batch_size=rows), has_gpu=False)
    with contextlib.redirect_stdout(None):
        data = train.open_data(model_cfg, cfg, train.Runtime(torch.device("cpu"), torch.float32))
    torch.manual_seed(0)
    model, iterator, batches = train.GPT(model_cfg), iter(data.train), []
    where, threads = runtime(kernels, dtype, model, rows)
    optimizers = train.Optimizers(model, cfg)
    for _ in range(steps):
        (batch,), iterator = train.next_batches(data.train, iterator)
        batches.append(batch)

    def work() -> list[Any]:
        return [train.optimizer_step(model, optimizers, [batch], 1e-3, cfg, where) for batch in batches]

    return Contestant(f"{kernels} table, {dtype}", sum(x.numel() for x, _ in batches), work, threads)


def answering(kind: str, dtype: str, size: dict[str, Any], rows: int, context: int, new: int) -> Contestant:
    """Greedy decoding of `new` tokens behind a prompt of random ones, the prompt's own pass included."""
    model, prompt = build(kind, size, context + new).eval(), torch.randint(0, size["vocab_size"], (rows, context))
    if kind == "ours":
        model.use(train.pick_ops(prompt.device, getattr(torch, dtype), "auto"))

    def work() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if kind == "ours":
                train.generate(model, prompt, torch.full((rows,), context), new)
            else:
                model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, pad_token_id=0)

    return Contestant(f"{kind}, {dtype}", rows * new, work)


# == MEASURING ========================================================================================================


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes beside this one that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def speeds(contestants: list[Contestant], rounds: int, loads: list[int]) -> dict[str, dict[str, float]]:
    """Median tokens per second of each contestant, beside so many busy processes; all take turns, round by round."""
    found: dict[tuple[str, int], list[float]] = {}
    for contestant in contestants:
        torch.set_num_threads(contestant.threads)
        contestant.work()  # warms up
    for _, load in itertools.product(range(rounds), loads):
        with busy(load):
            for contestant in contestants:
                torch.set_num_threads(contestant.threads)
                start = time.perf_counter()
                contestant.work()
                found.setdefault((contestant.name, load), []).append(contestant.tokens / (time.perf_counter() - start))
    return {c.name: {str(load): statistics.median(found[c.name, load]) for load in loads} for c in contestants}


def peak_memory() -> int:
    """The most bytes that this process has held."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def step_memory(kind: str, dtype: str, size: dict[str, Any], rows: int, length: int) -> int:
    """Bytes that a model and three of its steps add to a process of its own."""
    spec = json.dumps([kind, dtype, size, rows, length])
    done = subprocess.run([sys.executable, __file__, "--one", spec], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"memory: {kind} ended with {done.returncode}: {done.stderr[-200:]}")
    return int(done.stdout.split()[-1])


def one_memory(kind: str, dtype: str, size: dict[str, Any], rows: int, length: int) -> int:
    """That process."""
    build(kind, SIZES["toy"], length)  # so that what it imports is not counted
    before, contestant = peak_memory(), training_step(kind, dtype, size, rows, length)
    for _ in range(3):
        contestant.work()
    print(peak_memory() - before)
    return 0


# == COMMAND LINE =====================================================================================================


def show(title: str, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print one comparison, the best of GraniteMoeHybrid as the measure of all; return it for the results."""
    base = max(v["0"] for k, v in found.items() if k.split(",")[0] == next(iter(found)).split(",")[0])
    print(f"\n{title}")
    for name, values in found.items():
        shares = "".join(f"  beside {n}: {v / values['0']:.2f} of it" for n, v in values.items() if n != "0")
        print(f"  {name:<32} {values['0']:>10,.0f} tokens/s  {values['0'] / base:5.2f}x{shares}", flush=True)
    return {"what": title, "tokens_per_second": found}


def compare(args: argparse.Namespace, dtypes: list[str]) -> list[dict[str, Any]]:
    """All parts asked for."""
    size, loads, rows = SIZES[args.size], [0] + [args.busy] * (args.busy > 0), []
    runs = list(itertools.product(("GraniteMoeHybrid", "GPT-2", "ours"), dtypes))
    for b, t in args.shapes if "train" in args.parts else []:
        all_ = [training_step(*run, size, b, t) for run in [*runs, ("ours, plain", dtypes[0])]]
        rows.append(show(f"training, {b} x {t} tokens", speeds(all_, args.rounds, loads)))
    if "nano" in args.parts:
        all_ = [nano_step(kernels, dtype, args.batch_size) for kernels in ("plain", "auto") for dtype in dtypes]
        rows.append(show(f"a step of the first command, {args.batch_size} rows", speeds(all_, args.rounds, loads)))
    for b, t in args.shapes if "answer" in args.parts else []:
        all_ = [answering(*run, size, b, t, 32) for run in runs]
        rows.append(show(f"32 new tokens behind each of {b} x {t}", speeds(all_, args.rounds, loads)))
    for b, t in args.shapes if "memory" in args.parts else []:
        found = {f"{kind}, {dtype}": step_memory(kind, dtype, size, b, t) for kind, dtype in runs}
        base = min(v for name, v in found.items() if name.startswith("GraniteMoeHybrid"))
        print(f"\nmemory of a training step, {b} x {t} tokens")
        print(*(f"  {k:<32} {v / 1e6:>10,.0f} MB        {v / base:5.2f}x" for k, v in found.items()), sep="\n")
        rows.append({"what": f"memory, {b} x {t} tokens", "bytes": found})
    return rows


def shape(text: str) -> list[int]:
    """ROWSxLENGTH, for argparse."""
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text} is not like 4x1024")
    return [int(n) for n in found.groups()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(4, 1024), (1, 4096)], metavar="ROWSxLENGTH")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models that are compared")
    parser.add_argument("--batch-size", type=int, default=16, help="of the first command")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: what this CPU can")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="also beside N busy processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{date.today()}-speed-cpu.json")
    args = parser.parse_args(argv)
    if args.one:
        return one_memory(*json.loads(args.one))
    args.parts = args.parts or PARTS

    def work() -> None:
        native = train.pick_dtype(torch.device("cpu")) == torch.bfloat16
        rows = compare(args, args.dtypes or ["float32"] + ["bfloat16"] * native)
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
        about = {"machine": f"{platform.machine()}, {CORES} cores", "torch": torch.__version__,
                 "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
                 "command": " ".join(["python", "bench/speed.py", *(argv or sys.argv[1:])])}
        write_json(args.out, about | {"rows": rows})
        print(f"\nwritten to {args.out}")

    return run_script("speed.py", work)


if __name__ == "__main__":
    sys.exit(main())
