"""Training recipes side by side at equal compute, on tasks small enough for one CPU core.

    python bench/recipe.py prepare --one-d ~/1D-ARC/dataset      # tasks to runs/recipe; without --one-d only `small`
    python bench/recipe.py run --data small --variants base mama --seeds 0 1 2 --minutes 4
    python bench/recipe.py run --data 1d --variants base mama --seeds 0 1 2 --minutes 4
    python bench/recipe.py table                                 # what bench/LOG.md shows

`small`: ARC-1 *training* tasks with grids up to 10 x 10, a fifth held out. `1d`: 1D-ARC (khalil-research/1D-ARC), a
fifth of each family held out ("known" families), and three families held out whole ("new"). ARC's evaluation tasks
are never read. As in a record run, the demonstrations of held-out tasks, never their tests, are learned from.

Every run is a process of its own with one thread, and its minutes are minutes of CPU time: whatever else runs on the
machine, or a pause of the process, takes no step away. Each adds one line to results.jsonl, and is not done again.
`exact` is the share of test outputs that one greedy answer gets right, `voted` the share that the most frequent answer
over 8 views does.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from arc_data import prepare as official  # noqa: E402
from arc_data.tasks import SHARE_EVALUATION_PAIRS, Task, canonical_hash, read_split, read_task  # noqa: E402
from data.files import UserError, read_json, reason, run_script, write_json  # noqa: E402
from data.flags import Parser  # noqa: E402
from extras import views as v  # noqa: E402
from train import GPT, ArcDataLoader  # noqa: E402

COMMON = "--preset nano --holdout 0 --eval-every 0 --save-every 0 --device cpu --batch-size 16 --demonstrations both"
SIDES = {"small": 10, "1d": 30}  # longest side of a grid
ANSWER = {"small": 10 * 11 + 1, "1d": 30 * 2 + 1}  # tokens of the longest answer; a row of 30 may stand upright
VIEWS = 8
NEW_FAMILIES = 3


# == VARIANTS =========================================================================================================


def cosine(progress: float, warmup_frac: float, decay_frac: float) -> float:
    """The same warm-up, then half a cosine to 0."""
    return max(0.0, min((progress + 1e-3) / (warmup_frac + 1e-3), (1 + math.cos(math.pi * min(1.0, progress))) / 2))


class Variant(NamedTuple):
    """A recipe: flags of train.py behind the common ones, and names of train.py that stand for something else."""

    text: str
    flags: str = ""
    patch: dict[str, Any] = {}


# What has been decided is no variant any more: bench/LOG.md keeps its numbers.
VARIANTS = {
    "base": Variant("the default recipe: MA, task token with scale and shift, grid positions, hints, focus, "
                    "NorMuon, every output"),
    "mama": Variant("twice as deep", "--pattern MAMA"),
    "aa": Variant("attention only; d_ff for equal parameters", "--pattern AA --d-ff 400"),
    "mm": Variant("Mamba-2 only; d_ff for equal parameters", "--pattern MM --d-ff 288"),
    "task-kept": Variant("no sequence goes without its task's token", patch={"TASK_DROPOUT": 0.0}),
    "dropout": Variant("dropout on what each mixer and MLP adds", "--dropout 0.1"),
    "cosine": Variant("half a cosine in place of stable and decay", patch={"schedule": cosine}),
    "batch-8": Variant("half the batch", "--batch-size 8"),
    "batch-32": Variant("twice the batch", "--batch-size 32"),
    "lr-2.5e-3": Variant("half the learning rate", "--max-lr 2.5e-3"),
    "lr-1e-2": Variant("twice the learning rate", "--max-lr 1e-2"),
    "training-only": Variant("does not learn from the demonstrations of held-out tasks", "--demonstrations training"),
}


# == DATA =============================================================================================================

Parts = dict[str, dict[str, list]]  # task name -> {"train": pairs, "test": pairs}


def by_hash(names: Any) -> list[str]:
    """Names in an order that has nothing to do with what they say."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def fresh(tasks: Parts, part: str, seen: set[str], least: int = 1) -> Parts:
    """Tasks without the pairs of one part that are in `seen` or come twice, up to symmetry and colours; those that keep
    `least` of them. `seen` grows by what is kept."""
    kept = {}
    for name, task in sorted(tasks.items()):
        pairs = []
        for pair in task[part]:
            if (key := canonical_hash(pair)) not in seen:
                pairs.append(pair)
                seen.add(key)
        if len(pairs) >= least:
            kept[name] = task | {part: pairs}
    return kept


def fresh_tests(tasks: Parts) -> Parts:
    """Tasks without the tests that recur as a demonstration or an earlier test."""
    return fresh(tasks, "test", {canonical_hash(pair) for task in tasks.values() for pair in task["train"]})


def read_small(arc: Path) -> tuple[Parts, dict[str, list[str]]]:
    """ARC-1 training tasks up to 10 x 10, and the fifth of their names that is held out."""
    tasks = {name: t for name, t in read_split(arc, "training").items()
             if name not in SHARE_EVALUATION_PAIRS and Task(name, t["train"] + t["test"]).largest() <= 10}
    kept = fresh_tests(tasks)
    print(f"small: {len(tasks)} tasks; left out: {len(tasks) - len(kept)} whose tests recur elsewhere")
    return kept, {"held-out": sorted(by_hash(kept)[: len(kept) // 5])}


def read_one_d(folder: Path) -> tuple[Parts, dict[str, list[str]]]:
    """1D-ARC without what is too wide or recurs, and the names held out: of known families, and of new ones."""
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise UserError(f"--one-d {folder}: no family folders with task files (*.json) there")
    tasks, family = {}, {}
    for file in files:
        try:
            tasks[file.stem], family[file.stem] = read_task(file), file.parent.name
        except UserError as error:
            if "sides must be 1 to 30" not in str(error):
                raise
    kept = fresh_tests(fresh(tasks, "train", set(), 2))
    members = defaultdict(list)
    for name in kept:
        members[family[name]].append(name)
    new = by_hash(members)[:NEW_FAMILIES]
    known = [name for f in sorted(members) if f not in new for name in by_hash(members[f])[len(members[f]) * 4 // 5 :]]
    print(f"1d: {len(files)} tasks; left out: {len(files) - len(tasks)} with sides over 30, "
          f"{len(tasks) - len(kept)} that recur; {len(members)} families left, of which new: {', '.join(sorted(new))}")
    return kept, {"known": sorted(known), "new": sorted(name for f in new for name in members[f])}


def as_file(task: dict[str, list]) -> dict[str, list]:
    """A task in the official layout, ready for JSON."""
    return {part: [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs] for part, pairs in task.items()}


def write_data(target: Path, tasks: Parts, groups: dict[str, list[str]]) -> None:
    """training/, evaluation/ and groups.json (who of the latter is what) in a folder that is whole or not there."""
    held = {name for names in groups.values() for name in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for split in ("training", "evaluation"):
            (fresh / split).mkdir(parents=True)
        for name, task in tasks.items():
            write_json(fresh / ("evaluation" if name in held else "training") / f"{name}.json", as_file(task))
        write_json(fresh / "groups.json", groups)
        fresh.rename(target)
    counts = ", ".join(f"{len(names)} {group}" for group, names in groups.items())
    print(f"wrote {target}: {len(tasks) - len(held)} tasks to learn from; {counts}")


def prepare(out: Path, one_d: Path | None, arc: Path = ROOT / "arc_data" / "arcagi") -> None:
    """Both data folders; those that are there already stay."""
    wanted = ({"1d": lambda: read_one_d(one_d)} if one_d else {}) | {"small": lambda: read_small(arc)}
    for name, read in wanted.items():
        if (out / name).exists():
            print(f"{out / name} is there already; remove it to make it again")
            continue
        if name == "small" and not arc.is_dir():
            official.prepare("arcagi")
        write_data(out / name, *read())


# == MEASURE ==========================================================================================================


def read_groups(folder: Path) -> dict[str, list[tuple[v.Question, np.ndarray]]]:
    """The held-out test outputs of each group: a question with one test input, and its answer."""
    tasks = read_split(folder, "evaluation")
    return {group: [(v.Question(name, tasks[name]["train"], [query]), answer)
                    for name in names for query, answer in tasks[name]["test"]]
            for group, names in read_json(folder / "groups.json").items()}


def answer_views(model: GPT, questions: list[v.Question], tokens: dict[str, int], runtime: Any,
                 longest: int) -> list[list[tuple[np.ndarray | None, float]]]:
    """Greedy answers to every question under every view, turned back, with their log-probabilities."""
    views = [v.make_view(0, question, k) for question in questions for k in range(VIEWS)]
    prompts = [v.view_prompt(questions[i // VIEWS], 0, view, model.config.block_size, tokens)[0]
               for i, view in enumerate(views)]
    replies = train.answer_prompts(model, prompts, runtime, longest, 16 * model.config.block_size)
    found = [(grid if grid is None else np.ascontiguousarray(view.undo(grid)), logp)
             for view, (grid, logp) in zip(views, replies, strict=True)]
    return [found[i : i + VIEWS] for i in range(0, len(found), VIEWS)]


def measure(model: GPT, data: Any, cfg: Any, runtime: Any, longest: int) -> dict[str, dict]:
    """Loss and exact answers of each group of held-out outputs."""
    model.eval()
    tokens, found = data.task_tokens, {}
    for group, asked in read_groups(Path(cfg.data_dir)).items():
        questions, answers = [q for q, _ in asked], [answer for _, answer in asked]
        answered = [Task(q.name, [*q.demonstrations, (q.inputs[0], answer)]) for q, answer in asked]
        loader = ArcDataLoader(answered, 16, model.config.block_size, train=False, task_tokens=tokens)
        views = answer_views(model, questions, tokens, runtime, longest)
        ranked = [v.vote(said, q.inputs[0])[0] for said, q in zip(views, questions, strict=True)]
        voted = [candidates[0].grid if candidates else None for candidates in ranked]
        found[group] = {
            "outputs": len(questions),
            "loss": train.validation_loss(model, loader, runtime),
            "exact": train.score_answers([said[0][0] for said in views], answers)["solve_rate"],
            "voted": train.score_answers(voted, answers)["solve_rate"],
        }
    return found


# == RUN ==============================================================================================================


def train_and_measure(out: Path, data: str, name: str, seed: int, minutes: float, extra: str = "") -> dict[str, Any]:
    """One row: train a variant for so many minutes of CPU time and measure it; `extra` flags come last.

    Raises SystemExit where the run was stopped or refused; the reason has been printed.
    """
    variant, row, began = VARIANTS[name], {}, time.process_time()

    def evaluate(model, data_, cfg, runtime, folder, last):  # once, when the budget is spent, in train.evaluate's place
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["tokens"] = data_.train.tokens - data_.train.padding
        row["groups"] = measure(model, data_, cfg, runtime, ANSWER[data])
        return {}

    def finish(folder, data_, found, step, spent, skipped):  # in place of the summary and its pictures
        row.update(steps=step, tokens_per_second=row["tokens"] / (60 * spent))

    flags = f"{COMMON} --max-grid {SIDES[data]} --max-minutes {minutes:g} --seed {seed} {variant.flags} {extra}"
    folders = ["--data-dir", str(out / data), "--out-dir", str(out / "runs" / f"{data}-{name}-{seed}-{minutes:g}")]
    ours = dict(time=SimpleNamespace(monotonic=time.process_time), evaluate=evaluate, finish=finish,
                save_checkpoint=lambda path, state: None)
    with mock.patch.multiple(train, **ours, **variant.patch):
        if train.main(flags.split() + folders) or "steps" not in row:
            raise SystemExit(1)
    return {"data": data, "variant": name, "seed": seed, "minutes": minutes, **row,
            "cpu_seconds": time.process_time() - began, "flags": variant.flags, "torch": torch.__version__}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows so far; UserError where a line is none."""
    path, rows = out / "results.jsonl", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            row["data"], row["variant"], row["seed"], row["minutes"], row["groups"], row["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no result ({reason(error)}); remove it") from None
        rows.append(row)
    return rows


def one(out: Path, data: str, name: str, seed: int, minutes: float) -> None:
    """The work of one process: train, measure, add the row; what train.py says goes to a log in `out`/runs."""
    torch.set_num_threads(1)
    log = out / "runs" / f"{data}-{name}-{seed}-{minutes:g}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        row = train_and_measure(out, data, name, seed, minutes)
    with open(out / "results.jsonl", "ab", buffering=0) as file:  # one write, so that two processes may share the file
        file.write(json.dumps(row).encode() + b"\n")
        os.fsync(file.fileno())


def run(out: Path, data: str, names: list[str], seeds: list[int], minutes: float) -> int:
    """Every variant with every seed that has no row yet, one after another; 1 where any failed."""
    if not (out / data / "groups.json").exists():
        raise UserError(f"{out / data}: no tasks there; `python bench/recipe.py prepare` writes them"
                        + (" (with --one-d)" if data == "1d" else ""))
    failed = 0
    for seed, name in [(seed, name) for seed in seeds for name in names]:
        key = (data, name, seed, minutes)
        if not any((r["data"], r["variant"], r["seed"], r["minutes"]) == key for r in read_rows(out)):
            process = multiprocessing.get_context("spawn").Process(target=one, args=(out, *key), daemon=True)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: only we speak on Ctrl-C
            process.start()
            signal.signal(signal.SIGINT, before)
            process.join()
            if process.exitcode:
                failed += 1
                print(f"{data} {name} seed {seed}: failed; see {out}/runs/{data}-{name}-{seed}-{minutes:g}.log")
                continue
        row = next(r for r in read_rows(out) if (r["data"], r["variant"], r["seed"], r["minutes"]) == key)
        shown = "; ".join(f"{group}: loss {f['loss']:.4f}, exact {f['exact']:.1%}, voted {f['voted']:.1%} of "
                          f"{f['outputs']}" for group, f in row["groups"].items())
        print(f"{data} {name} seed {seed}: {row['steps']} steps, {row['tokens_per_second']:,.0f} tokens/s, {shown}",
              flush=True)
    return min(failed, 1)


# == TABLE ============================================================================================================


def spread(values: list[float], form: str) -> str:
    """Mean ± standard error; the mean alone of one value."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


def cell(mine: dict[int, dict], base: dict[int, dict], group: str, figure: str) -> str:
    """A figure of one variant over its seeds, and its difference to base over the seeds that both have."""
    scale, form = (1, ".4f") if figure == "loss" else (100, ".1f")
    values = {seed: scale * row["groups"][group][figure] for seed, row in mine.items()}
    both = [values[seed] - scale * base[seed]["groups"][group][figure] for seed in values if seed in base]
    return spread(list(values.values()), form) + (f" ({spread(both, '+' + form)})" if both and mine is not base else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for every data set and number of minutes a table, its rows in the order of VARIANTS."""
    runs: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        runs[row["data"], row["minutes"]][row["variant"]][row["seed"]] = row
    parts = []
    for (data, minutes), variants in sorted(runs.items()):
        groups = next(iter(next(iter(variants.values())).values()))["groups"]
        columns = [(group, figure) for figure in ("loss", "exact", "voted") for group in groups]
        heads = [f"{figure} {group}" if figure == "loss" else f"{figure} {group}, %" for group, figure in columns]
        outputs = ", ".join(f"{f['outputs']} {group}" for group, f in groups.items())
        lines = [f"`{data}`, {minutes:g} minutes of CPU time a run, test outputs: {outputs}; mean ± standard error "
                 "over seeds (difference to base over the seeds of both)", "",
                 f"| variant | seeds | {' | '.join(heads)} | steps | parameters | command |",
                 "|---" * (5 + len(heads)) + "|"]
        for name in [n for n in VARIANTS if n in variants]:
            mine = variants[name]
            seeds = " ".join(map(str, sorted(mine)))
            cells = [cell(mine, variants.get("base", {}), *column) for column in columns]
            steps = statistics.mean(row["steps"] for row in mine.values())
            command = f"`--data {data} --variants {name} --seeds {seeds} --minutes {minutes:g}`"
            lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {steps:,.0f} | "
                         f"{next(iter(mine.values()))['parameters']:,} | {command} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "Every command begins with `python bench/recipe.py run`."])


# == CLI ==============================================================================================================


def positive(text: str) -> float:
    """A number of minutes."""
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """The three commands; the help of `run` lists the variants."""
    width = max(map(len, VARIANTS)) + 2
    listed = "\n".join(f"  {name:<{width}}{v.text}" for name, v in VARIANTS.items())
    parser = Parser(prog="bench/recipe.py", description=__doc__.splitlines()[0], epilog=f"variants:\n{listed}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,run,table}")
    for name, text in (("prepare", "write the tasks"), ("run", "train and measure"), ("table", "print the results")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--out", type=Path, default=Path("runs/recipe"), metavar="FOLDER",
                             help="tasks and results (default: runs/recipe)")
        if name == "prepare":
            command.add_argument("--one-d", type=Path, metavar="FOLDER", help="1D-ARC: a folder of family folders")
        if name == "run":
            command.add_argument("--data", choices=list(SIDES), required=True, help="which tasks")
            command.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS),
                                 metavar="NAME", help="which recipes (default: all)")
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N",
                                 help="of weights, order and augmentation (default: 0 1 2)")
            command.add_argument("--minutes", type=positive, default=4.0, metavar="X",
                                 help="CPU minutes of training (default: 4)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 1 where a run failed, 2 after one line about bad input."""
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process at work is ended too

    def work() -> int | None:
        if args.command == "prepare":
            return prepare(args.out, args.one_d)
        if args.command == "run":
            os.environ["OMP_NUM_THREADS"] = "1"
            return run(args.out, args.data, args.variants, args.seeds, args.minutes)
        if not (args.out / "results.jsonl").exists():
            raise UserError(f"{args.out / 'results.jsonl'}: nothing there; `python bench/recipe.py run` makes it")
        return print(table(read_rows(args.out)))

    return run_script("recipe.py", work)


if __name__ == "__main__":
    sys.exit(main())
