"""Peak memory of one training step: with and without whole logits, beside GPT-2, and by batch size.

    python bench/memory.py loss                                   # two minutes on two cores; needs requirements-dev.txt
    python bench/memory.py table --dataset fineweb --preset gpt2 --device cuda
    python bench/memory.py table --dataset arc --preset small --batch-sizes 2 8 16 32 --device cuda --limit-gb 12

`loss`: a step (forward, backward, fused AdamW) of a small model with a vocabulary of 50,304, its loss in chunks, as
train.py has it, or from whole logits; the same of transformers' GPT-2 with as many parameters; and the loss alone,
beside torch.nn.functional.linear_cross_entropy where torch has it. `table`: a step of train.py's own, with its
optimizers, for batch after batch until memory runs out, with activations kept and with --remat.

Each line is a process of its own. Memory is what the step adds to what the process held before the model was built
(on a CPU) or all tensors that were held at once (on CUDA).
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import peers  # noqa: E402

STEPS = {"chunks": "ours, loss in chunks", "whole logits": "ours, whole logits", "gpt2": "transformers' GPT-2"}
LOSSES = {"chunks": "loss alone, in chunks (ours)", "linear_cross_entropy": "loss alone, F.linear_cross_entropy",
          "whole logits": "loss alone, whole logits"}


# == the loss =========================================================================================================


def measure_step(kind: str, sizes: dict[str, int], device: str, steps: int) -> dict[str, float]:
    """Bytes and seconds of a step of STEPS[kind], in this process."""
    import torch
    import torch.nn.functional as F

    import train

    runtime = peers.choose_kernels(device)
    size, name = peers.Size(sizes["vocab"], sizes["width"], 4, 64, "MMAM"), "gpt2" if kind == "gpt2" else "hybrid"
    with torch.device("meta"):
        peers.build(name, size, sizes["length"])
    before = peers.peak_memory(device)
    torch.manual_seed(0)
    model = peers.build(name, size, sizes["length"]).to(runtime.device)
    runtime.kernels.use(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randint(0, size.vocab, (sizes["batch"], sizes["length"]), device=runtime.device)
    y = torch.cat([x[:, 1:], torch.full_like(x[:, :1], train.IGNORE_INDEX)], dim=1)

    def loss() -> Any:
        if kind == "gpt2":
            return model(x, labels=x, use_cache=False).loss
        if kind == "chunks":
            return model(x, y)[1]
        return F.cross_entropy(model(x)[0].flatten(0, 1).float(), y.flatten(), ignore_index=train.IGNORE_INDEX)

    losses = []

    def step() -> None:
        with runtime.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())

    step()
    peers.forget_peak(device)
    seconds = statistics.median(peers.clock(step, steps, device))
    return {"parameters": peers.count(model), "bytes": peers.peak_memory(device) - (before if device == "cpu" else 0),
            "seconds": seconds, "first loss": float(losses[0])}


def measure_loss(kind: str, sizes: dict[str, int], device: str, steps: int) -> dict[str, float]:
    """Bytes and seconds of LOSSES[kind] and its gradients alone, in this process; the first loss, to compare."""
    import torch
    import torch.nn.functional as F

    import train

    torch.manual_seed(0)
    tokens, runtime = sizes["batch"] * sizes["length"], peers.choose_kernels(device)
    hidden = torch.randn(tokens, sizes["width"], device=runtime.device, requires_grad=True)
    weight = torch.empty(sizes["vocab"], sizes["width"], device=runtime.device).normal_(std=0.02).requires_grad_()
    y = torch.randint(0, sizes["vocab"], (tokens,), device=runtime.device)

    def loss() -> Any:
        if kind == "chunks":
            return train.CrossEntropy.apply(hidden, weight, y)
        if kind == "linear_cross_entropy":
            return F.linear_cross_entropy(hidden, weight, y, options=torch.nn.LinearCrossEntropyOptions())
        return F.cross_entropy((hidden @ weight.T).float(), y)

    losses, before = [], peers.peak_memory(device)

    def work() -> None:
        hidden.grad = weight.grad = None
        with runtime.autocast():
            value = loss()
        value.backward()
        losses.append(value.detach())

    work()
    peers.forget_peak(device)
    seconds = statistics.median(peers.clock(work, steps, device))
    return {"bytes": peers.peak_memory(device) - (before if device == "cpu" else 0), "seconds": seconds,
            "first loss": float(losses[0])}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `rounds` times; prints and returns medians, the first of each group being ours."""
    import torch

    sizes = dict(vocab=args.vocab, width=args.width, batch=args.batch, length=args.length)
    found, lines = {}, [["", "GB", "against ours", "seconds", "against ours", "first loss"]]
    for part, ways in (("step", STEPS), ("loss", LOSSES)):
        ways = [w for w in ways if w != "linear_cross_entropy" or hasattr(torch.nn, "LinearCrossEntropyOptions")]
        runs: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way in ways:
                spec = dict(part=part, kind=way, sizes=sizes, device=args.device, steps=args.steps)
                runs[way].append(peers.alone(__file__, spec))
                if "error" in runs[way][-1]:
                    raise ValueError(f"{part}, {way}: {runs[way][-1]['error']}")
        rows = {way: {key: statistics.median(r[key] for r in runs[way]) for key in runs[way][0]} for way in ways}
        found[part], ours = rows, rows["chunks"]
        for way, row in rows.items():
            lines.append([(STEPS if part == "step" else LOSSES)[way], f"{row['bytes'] / 1e9:.3f}",
                          f"{row['bytes'] / ours['bytes']:.2f}x", f"{row['seconds']:.3f}",
                          f"{row['seconds'] / ours['seconds']:.2f}x", f"{row['first loss']:.4f}"])
    print(f"{args.batch} x {args.length} tokens, width {args.width}, vocabulary {args.vocab:,}, "
          f"{found['step']['chunks']['parameters']:,.0f} parameters\n\n{peers.show(lines)}")
    return {"sizes": sizes, **found}


# == by batch size ====================================================================================================


def make_batch(model_cfg: Any, cfg: Any, rows: int) -> tuple[Any, Any]:
    """x and y (rows, block_size): random tokens, or rows packed with ARC tasks of random grids, about three a row."""
    import numpy as np
    import torch

    import train

    if cfg.dataset == "fineweb":
        tokens = torch.randint(0, model_cfg.vocab_size, (rows, model_cfg.block_size + 1))
        return tokens[:, :-1], tokens[:, 1:]
    room = (model_cfg.block_size // 3 - 12) // 8  # four pairs of two grids a task
    side = max(1, min(cfg.max_grid, int((math.sqrt(1 + 4 * room) - 1) / 2)))
    rng = np.random.default_rng(0)
    tasks = [train.Task(f"task{i}", [tuple(rng.integers(0, 10, (2, side, side), dtype=np.uint8)) for _ in range(4)])
             for i in range(4 * rows)]
    return next(iter(train.ArcDataLoader(tasks, rows, model_cfg.block_size, packed=True)))


def limit_memory(device: str, gigabytes: float) -> None:
    """Have allocations fail beyond so much; on a CPU beyond what is free, where a system would rather kill."""
    import torch

    import train

    if device == "cuda" and gigabytes:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    limit = gigabytes * 1e9 or 0.9 * train.free_memory()
    if device == "cpu" and sys.platform == "linux" and limit < math.inf:
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(limit), resource.RLIM_INFINITY))


def measure_batches(given: dict[str, Any], remat: bool, batches: list[int], device: str, steps: int,
                    limit_gb: float) -> None:
    """Prints a line of JSON for every batch size, in this process; they ascend, because its peak can only grow."""
    import torch

    import train

    torch.manual_seed(0)
    runtime = peers.choose_kernels(device)
    model_cfg, cfg = train.make_config(given, has_gpu=device == "cuda")
    if cfg.dataset == "arc":
        model_cfg.n_tasks, model_cfg.document_token = 800, train.UNKNOWN_TASK if cfg.packed else -1
    limit_memory(device, limit_gb)
    before = peers.peak_memory(device)
    try:
        model = train.GPT(model_cfg).to(runtime.device)
        model.remat = remat
        runtime.kernels.use(model)
        optimizers = train.Optimizers(model, cfg)
        for rows in batches:
            x, y = make_batch(model_cfg, cfg, rows)

            def step(x=x, y=y) -> None:
                train.accumulate(model, [(x, y)], runtime)
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                optimizers.step(cfg.max_lr)
                model.zero_grad(set_to_none=True)

            step()
            peers.forget_peak(device)
            speed = x.numel() / statistics.median(peers.clock(step, steps, device))
            used = peers.peak_memory(device) - (before if device == "cpu" else 0)
            work = peers.utilisation(peers.count(model), model_cfg.pattern.count("A"), model_cfg.d_model,
                                     model_cfg.block_size, speed)
            peak = peers.nominal_speed(device)
            print(json.dumps({"batch": rows, "gb": used / 1e9, "tokens_per_second": speed,
                              "parameters": peers.count(model), "mfu": peak and work["operations"] / peak}), flush=True)
    except (MemoryError, RuntimeError) as error:
        if not train.out_of_memory(error):
            raise
        print(json.dumps({"error": "out of memory"}), flush=True)


def by_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways to go about activations, each in a process of its own; prints and returns the table."""
    given = {"dataset": args.dataset, "preset": args.preset} | ({"block_size": args.block_size} if args.block_size
                                                                else {})
    rows = []
    for remat in (False, True):
        spec = dict(part="table", given=given, remat=remat, batches=sorted(set(args.batch_sizes)), device=args.device,
                    steps=args.steps, limit_gb=args.limit_gb)
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(spec)], capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if done.returncode:
            found.append({"error": "killed: out of memory?" if done.returncode == -9 else last[:200]})
        for batch, row in zip(spec["batches"], found, strict=False):
            rows.append({"remat": remat, "batch": batch} | row)
            text = row.get("error") or f"{row['gb']:.2f} GB, {row['tokens_per_second']:,.0f} tokens/s"
            print(f"batch {batch:>3}{', --remat' if remat else '':<9}  {text}", flush=True)
    lines = [["batch", "GB", "tokens/s", "MFU", "GB, --remat", "tokens/s, --remat"]]
    for batch in sorted(set(args.batch_sizes)):
        cells = [str(batch)]
        for remat in (False, True):
            row = next((r for r in rows if (r["batch"], r["remat"]) == (batch, remat)), {"error": "not tried"})
            cells += [row["error"], ""] if "error" in row else [f"{row['gb']:.2f}", f"{row['tokens_per_second']:,.0f}"]
            cells += [] if remat else [f"{row['mfu']:.0%}" if row.get("mfu") else ""]
        lines.append(cells)
    print(f"\n{peers.show(lines)}")
    return {"model": given, "limit_gb": args.limit_gb, "rows": rows}


# == the command line =================================================================================================


def make_parser() -> argparse.ArgumentParser:
    """The two commands."""
    parser = peers.Parser(prog="memory.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{loss,table}")
    loss = commands.add_parser("loss", prog="memory.py", help="a step with and without whole logits, beside GPT-2")
    for name, default, text in (("vocab", 50304, "kinds of token"), ("width", 256, "of the model; a multiple of 64"),
                                ("batch", 2, "sequences"), ("length", 1024, "of each, in tokens"),
                                ("rounds", 3, "processes for each way")):
        loss.add_argument(f"--{name}", type=peers.positive, default=default, metavar="N",
                          help=f"{text} (default: {default})")
    table = commands.add_parser("table", prog="memory.py", help="train.py's own step, by batch size")
    table.add_argument("--dataset", choices=("arc", "fineweb"), default="arc", help="whose presets (default: arc)")
    table.add_argument("--preset", default="nano", metavar="NAME", help="train.py's (default: nano)")
    table.add_argument("--block-size", type=peers.positive, metavar="N", help="(default: the preset's)")
    table.add_argument("--batch-sizes", nargs="+", type=peers.positive, default=[2, 8, 16, 32], metavar="N",
                       help="sequences (default: 2 8 16 32)")
    table.add_argument("--limit-gb", type=float, default=0.0, metavar="X", help="as if there were no more memory than "
                       "this (default: what is free)")
    for command in (loss, table):
        command.add_argument("--steps", type=peers.positive, default=3, metavar="N", help="timed steps (default: 3)")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
        command.add_argument("--out", type=Path, metavar="FILE", help="results (default: bench/results/, by date)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print, keep the numbers."""
    import train

    names = ("loss",) if args.command == "loss" else (args.dataset, args.preset)
    out = args.out or peers.results("-".join(("memory", *names, args.device)))
    peers.checked(args.device, out)
    if args.command == "table":
        train.make_config({"dataset": args.dataset, "preset": args.preset}, has_gpu=False)  # or ConfigError
        if not 0 <= args.limit_gb < 1e6:
            raise ValueError(f"--limit-gb {args.limit_gb} must be at least 0")
    elif args.width % 64:
        raise ValueError(f"--width {args.width} must be a multiple of 64")
    found = (compare if args.command == "loss" else by_batch)(args)
    train.write_json(out, peers.about(args.device) | found)
    print(f"\nwritten to {out}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 after one line about bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--one"]:
        spec = json.loads(argv[1])
        part = spec.pop("part")
        if part == "table":
            measure_batches(**spec)
        else:
            print(json.dumps((measure_step if part == "step" else measure_loss)(**spec)))
        return 0
    args = make_parser().parse_args(argv)
    return peers.guarded("memory.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
