"""Text: the hybrid beside all-attention and all-Mamba models of as many parameters, trained for equal CPU time.

    python data/prepare.py --from FOLDER --out data/mine                        # any texts; a few MB are enough
    python bench/text.py run --data data/mine --seeds 0 1 2 --minutes 10        # 90 minutes on one core
    python bench/text.py table

Every run is `train.py --dataset fineweb --preset nano` in a process of its own, with one thread, and its minutes are
minutes of CPU time, so that whatever else the machine does takes no step away. Run folders stay in `--out`, for
sample.py and export.py; each adds one line to results.jsonl there, and is not done again.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODELS = {"hybrid": "", "attention": "--pattern AAAA --d-ff 430", "mamba": "--pattern MMMM --d-ff 316"}  # nano: MMAM


def one(out: Path, data: Path, name: str, seed: int, minutes: float) -> dict[str, Any]:
    """Train one model in this process; its row."""
    import train
    from extras import runs

    folder = out / f"{name}-{seed}-{minutes:g}"
    flags = f"--dataset fineweb --preset nano --device cpu --eval-every 0 --seed {seed} --max-minutes {minutes:g}"
    argv = [*flags.split(), *MODELS[name].split(), "--data-dir", str(data), "--out-dir", str(folder)]
    if (folder / "checkpoint.pt").exists():  # it was stopped
        argv = ["--resume", "--out-dir", str(folder)]
    clock = SimpleNamespace(monotonic=time.process_time)
    with mock.patch.object(train, "time", clock), open(f"{folder}.log", "w", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if train.main(argv):
                raise SystemExit(f"text.py: {name} seed {seed} was refused; see {folder}.log")
    model = train.GPT(runs.load_config(folder)[0])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, last = [line for line in lines if "loss" in line], lines[-1]
    if "val_loss" not in last:
        raise SystemExit(f"text.py: {name} seed {seed} was stopped; the same command goes on")
    return {"model": name, "seed": seed, "minutes": minutes, "flags": MODELS[name], "steps": len(steps),
            "parameters": sum(p.numel() for p in model.parameters()), "val_loss": last["val_loss"],
            "bits_per_byte": last.get("bits_per_byte"), "sample": last.get("sample")}


def run(out: Path, data: Path, names: list[str], seeds: list[int], minutes: float) -> int:
    """Every model with every seed that has no row yet, seed after seed; 1 where any failed."""
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for seed, name in [(seed, name) for seed in seeds for name in names]:
        if any((r["model"], r["seed"], r["minutes"]) == (name, seed, minutes) for r in read_rows(out)):
            continue
        command = [sys.executable, __file__, "one", "--data", str(data), "--out", str(out), "--models", name,
                   "--seeds", str(seed), "--minutes", str(minutes)]
        failed |= subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode != 0
    return int(failed)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a model and number of minutes, means and standard errors over the seeds."""
    from recipe import spread

    runs: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["minutes"], row["model"]].append(row)
    lines = ["| CPU minutes | model | seeds | parameters | steps | validation loss, nats a token | bits per byte |",
             "|---" * 7 + "|"]
    for (minutes, name), mine in sorted(runs.items()):
        figures = [spread([r[key] for r in mine], ".3f") if mine[0][key] is not None else ""
                   for key in ("val_loss", "bits_per_byte")]
        steps, seeds = sum(r["steps"] for r in mine) / len(mine), " ".join(str(r["seed"]) for r in mine)
        lines.append(f"| {minutes:g} | {name} | {seeds} | {mine[0]['parameters']:,} | {steps:,.0f} | "
                     f"{' | '.join(figures)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "one"), help="train, or print the results (one: a single run)")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="token shards (default: data)")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="runs and results (default: runs/text)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME",
                        help="hybrid, attention, mamba (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X", help="of CPU time a run (default: 10)")
    args = parser.parse_args(argv)
    if args.what == "table":
        print(table(read_rows(args.out)))
        return 0
    if args.what == "run":
        return run(args.out, args.data, args.models, args.seeds, args.minutes)
    row = one(args.out, args.data, args.models[0], args.seeds[0], args.minutes)
    with open(args.out / "results.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")
    print(f"{row['model']} seed {row['seed']}: {row['steps']} steps, val_loss {row['val_loss']:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
