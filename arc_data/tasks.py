"""Reads ARC tasks and checks them, in every layout that is in use. Raises UserError naming the file.

    FOLDER/training/<id>.json, FOLDER/evaluation/<id>.json        one file per task: the official repositories
    FOLDER/arc-agi_{training,evaluation,test}_challenges.json     all tasks of a split in one file: Kaggle; the answers
                                                                  are beside it in arc-agi_…_solutions.json, if at all
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.files import UserError, read_json

Grid = np.ndarray  # (height, width) uint8, colours 0 to 9, at most 30 x 30
Pair = tuple[Grid, Grid]  # input and output
TaskPairs = dict[str, list[tuple[Grid, Grid | None]]]  # "train" and "test"; an output is None if it is not given

SHARE_EVALUATION_PAIRS = ("40853293", "caa06a1f")  # official ARC-1 training tasks that repeat pairs of evaluation tasks


class Task(NamedTuple):
    """A task's name and its pairs. In a question the last pair's output is None and the answer is kept elsewhere."""

    name: str
    pairs: list[tuple[Grid, Grid | None]]

    def largest(self) -> int:
        """The longest side of any of its grids."""
        return max(side for pair in self.pairs for g in pair if g is not None for side in g.shape)


def base_task(name: str) -> str:
    """The task that a generated one is named after: arc_data/prepare.py names those `<task>-r000`, `<task>-r001`, …"""
    return re.sub(r"-r\d{3,}$", "", name)


# == ONE TASK =========================================================================================================


def read_grid(value: Any, where: str) -> Grid:
    """A grid out of parsed JSON."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise UserError(f"{where} is not a list of rows")
    if not 1 <= len(value) <= 30 or not 1 <= len(value[0]) <= 30:
        raise UserError(f"{where} has {len(value)} rows of {len(value[0]) if value else 0}; sides must be 1 to 30")
    if any(len(row) != len(value[0]) for row in value):
        raise UserError(f"{where} is ragged: its rows differ in length")
    for row in value:
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) > 9:
            cell = next(c for c in row if type(c) is not int or not 0 <= c <= 9)
            raise UserError(f"{where} has a cell {str(cell)[:20]!r}; colours are the integers 0 to 9")
    return np.array(value, dtype=np.uint8)


def read_pairs(task: Any, where: str) -> TaskPairs:
    """One task in the official layout out of parsed JSON; a test output may be missing (None)."""
    pairs: TaskPairs = {}
    for part in ("train", "test"):
        listed = task.get(part) if isinstance(task, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(p, dict) for p in listed):
            raise UserError(f'{where}: "{part}" must be a list of at least one {{"input": …, "output": …}}')
        pairs[part] = []
        for i, pair in enumerate(listed):
            hidden = part == "test" and pair.get("output") is None
            output = None if hidden else read_grid(pair.get("output"), f"{where}: {part} {i} output")
            pairs[part].append((read_grid(pair.get("input"), f"{where}: {part} {i} input"), output))
    return pairs


def read_task(path: Path | str) -> TaskPairs:
    """One task file: {"train": pairs, "test": pairs}."""
    check_name(Path(path).name, path)
    return read_pairs(read_json(path), str(path))


def check_name(name: str, where: Any) -> None:
    """Raises UserError if a task's name could not be written to our files, or would be a path to another one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the name is not UTF-8; rename it") from None
    if not 0 < len(name) <= 200 or name[0] == "." or set(name) & set("/\\\0"):
        raise UserError(f"{where}: {name!r:.60} cannot be the name of a task")


# == MANY TASKS =======================================================================================================


def read_combined(path: Path) -> dict[str, TaskPairs]:
    """All tasks of a file in Kaggle's layout, {id: task}, with the answers of the `…_solutions.json` beside it."""
    beside = path.with_name(path.name.replace("_challenges", "_solutions"))
    challenges, solutions = read_json(path), read_json(beside) if beside != path and beside.exists() else {}
    for value, file in ((challenges, path), (solutions, beside)):
        if not isinstance(value, dict):
            raise UserError(f"{file}: must be an object with the tasks by their names")
    found = {}
    for name, value in sorted(challenges.items()):
        check_name(name, path)
        task = found[name] = read_pairs(value, f"{path}: {name}")
        if name in solutions:
            answers, where = solutions[name], f"{beside}: {name}"
            if not isinstance(answers, list) or len(answers) != len(task["test"]):
                raise UserError(f"{where} must be a list of {len(task['test'])} grids, one for each test input")
            answers = [read_grid(answer, f"{where}, output {i}") for i, answer in enumerate(answers)]
            task["test"] = [(question, answer) for (question, _), answer in zip(task["test"], answers, strict=True)]
    return found


def task_files(folder: Path) -> list[Path]:
    """The task files directly in a folder, in the order of their names, without hidden ones; none if it is missing."""
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".json" and not f.name.startswith("."))
    for one, other in zip(files, files[1:], strict=False):
        if one.stem == other.stem:
            raise UserError(f"{other}: {one.name} has the same name; keep one of the two")
    return files


def read_split(folder: Path | str, split: str) -> dict[str, TaskPairs]:
    """All tasks of one split, by name, in the order of their names, in either layout.

    `folder` may also be the root of a clone of the official repository, whose `data/` holds the splits.
    """
    folder = Path(folder)
    combined = f"arc-agi_{split}_challenges.json"
    for root in (folder, folder / "data"):
        if files := task_files(root / split):
            return {f.stem: read_task(f) for f in files}
        if (root / combined).exists() and (found := read_combined(root / combined)):
            return found
    what = f"no task files (*.json) there, and no {combined} in {folder}"
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else f"there is no {folder} (looked for from {Path.cwd()})"
    raise UserError(f"{folder / split}: {what}; a folder of tasks has training/ and evaluation/, as "
                    "`python arc_data/prepare.py` writes them, or Kaggle's files")  # fmt: skip


def read_tasks(path: Path | str, split: str | None = None) -> dict[str, TaskPairs]:
    """Tasks by name: of a split, of a folder of task files, of one task file, or of one of Kaggle's combined files."""
    path = Path(path)
    if split is not None:
        return read_split(path, split)
    if path.is_dir():
        if files := task_files(path):
            return {f.stem: read_task(f) for f in files}
        raise UserError(f"{path}: no task files (*.json) there")
    if path.name.endswith("_challenges.json"):
        return read_combined(path)
    return {path.stem: read_task(path)}


# == WHAT A RUN MAY LEARN FROM ========================================================================================


def apply_symmetry(grid: Grid, symmetry: int) -> Grid:
    """One of the 8 symmetries of the square: 0-3 quarter turns, 4-7 the same, then mirrored left to right."""
    grid = np.rot90(grid, symmetry % 4)
    return np.fliplr(grid) if symmetry >= 4 else grid


def random_colours(rng: np.random.Generator) -> np.ndarray:
    """A permutation of the ten colours that keeps black (0), as a table (10,): `colours[grid]` applies it."""
    return np.append(0, 1 + rng.permutation(9)).astype(np.uint8)


def canonical_hash(pair: Pair) -> str:
    """A name for a pair that is the same for all its symmetries and colourings (16 hexadecimal digits)."""
    forms = []
    for symmetry in range(8):
        grids = [apply_symmetry(np.asarray(g, np.uint8), symmetry) for g in pair]
        cells = b"".join(g.tobytes() for g in grids)
        colours = bytes(dict.fromkeys(cells))  # in the order in which they appear
        ranks = bytes.maketrans(colours, bytes(range(len(colours))))
        forms.append(bytes(side for g in grids for side in g.shape) + cells.translate(ranks))
    return hashlib.sha256(min(forms)).hexdigest()[:16]


def as_json(question: Task) -> dict[str, Any]:
    """A question as predictions.json and the report show it."""
    *shown, (query, _) = question.pairs
    return {"task": question.name, "input": query.tolist(),
            "demonstrations": [{"input": i.tolist(), "output": o.tolist()} for i, o in shown]}


class ArcData(NamedTuple):
    """What a run may learn from, and what it is asked while it trains. Answers go to the scorer and nowhere else."""

    tasks: list[Task]  # every output is supervised
    questions: list[Task]  # held-out training tasks, one for each test input
    answers: list[Grid]
    pairs: list[str]  # canonical hashes of all pairs of `tasks`
    focus: list[str]  # names of the tasks that are asked about: held-out ones, or, without any, evaluation tasks
    report: str  # all that in words


def load_arc(folder: Path | str, holdout: int, max_grid: int, demonstrations: str) -> ArcData:
    """Read tasks, hold some training tasks out (by a hash of their names), and drop evaluation answers on sight.

    Tasks with a grid over max_grid x max_grid are left out. demonstrations is "training", or "both" to learn from the
    demonstrations of held-out and evaluation tasks too. A held-out output that equals a pair to learn from, up to
    symmetry and colours, is not asked: it would prove nothing.
    """
    training = {name: t for name, t in read_split(folder, "training").items() if name not in SHARE_EVALUATION_PAIRS}
    small = {name: t for name, t in training.items() if Task(name, t["train"] + t["test"]).largest() <= max_grid}
    real = [name for name in small if base_task(name) == name]
    by_hash = sorted(real, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(by_hash[: min(holdout, len(by_hash) // 4)])
    tasks = [Task(name, [p for p in t["train"] + t["test"] if p[1] is not None])
             for name, t in small.items() if base_task(name) not in held]
    too_large, learned, focus = len(training) - len(small), "training tasks", sorted(held)
    if demonstrations == "both":
        tasks += [Task(name, small[name]["train"]) for name in held]
        evaluation = [Task(name, t["train"]) for name, t in read_split(folder, "evaluation").items()]
        tasks += [task for task in evaluation if task.largest() <= max_grid]
        focus = focus or [task.name for task in evaluation]
        too_large += sum(task.largest() > max_grid for task in evaluation)
        learned += " and the demonstrations, never the answers, of held-out and evaluation tasks"
    tasks.sort(key=lambda task: task.name)
    if not tasks:
        raise UserError(f"{folder}: no task has grids of at most {max_grid} x {max_grid}; raise --max-grid")
    pairs = sorted({canonical_hash(p) for t in tasks for p in t.pairs})
    asked = [(Task(name, [*small[name]["train"], (query, None)]), answer) for name in sorted(held)
             for query, answer in small[name]["test"] if answer is not None]
    unseen = [(q, answer) for q, answer in asked if canonical_hash((q.pairs[-1][0], answer)) not in pairs]
    report = (f"{len(tasks)} tasks, {sum(len(t.pairs) for t in tasks)} pairs to learn from: {learned}\n"
              f"            {len(unseen)} outputs of {len({q.name for q, _ in unseen})} held-out training tasks to "
              f"measure on\n            left out: {too_large} tasks with grids over {max_grid} x {max_grid}, "
              f"{len(asked) - len(unseen)} held-out outputs that equal a pair to learn from")
    return ArcData(tasks, [q for q, _ in unseen], [answer for _, answer in unseen], pairs, focus, report)
