"""How a run answers one test input: every view of it, the answer in that view, turned back, and the votes.

    python tools/views.py runs/arc 00d62c1b                    # an evaluation or training task -> runs/arc/views-….png
    python tools/views.py runs/arc my_task.json --views 16     # a file in the official layout
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import solve
import train
from arc_data.tasks import Grid
from data.files import UserError, run_script
from data.flags import Parser
from extras.views import Candidate, Question, Shown, answer_in_views, rescored, two_attempts
from tools.plot import BOX, QUIET, RIGHT, STYLE, WRONG, corners, draw_grid, printable, save

SIDE = 0.7 * BOX  # inches that the largest grid takes
STEP = SIDE + 0.25


def find_question(run: solve.Run, name: str) -> tuple[Question, list[Grid | None]]:
    """A task by its file, or by its name in the folder that the run learned from, with its answers."""
    if Path(name).is_file():
        questions, truths = solve.read_questions(Path(name), "", ())
        if len(questions) != 1:
            raise UserError(f"{name} holds {len(questions)} tasks; give a file of one")
        return questions[0], truths[questions[0].name]
    path = solve.data_path(solve.Settings(), run)
    for split in [split for split in ("evaluation", "training") if solve.has_splits(path, split)]:
        questions, truths = solve.read_questions(path, split, ())
        if found := [q for q in questions if q.name == name]:
            return found[0], truths[name]
    raise UserError(f"{path} has no task {name}; give its name there, or its file")


def draw_cell(sheet: Axes, grid: Grid | None, x: float, y: float, size: float, text: str, colour: str = QUIET) -> None:
    """A grid around (x, y), or that there is none, with words below it; framed where the words have a colour."""
    sheet.text(x, y + SIDE / 2 + 0.12, text, fontsize=8, color=colour, ha="center", va="center")
    if grid is None:
        sheet.text(x, y, "no grid", color=WRONG, ha="center", va="center")
        return
    draw_grid(sheet, grid, x, y, size)
    if colour != QUIET:
        across, down = corners(grid, x, y, size)
        frame = (across[0] - 0.03, down[0] - 0.03), across[-1] - across[0] + 0.06, down[-1] - down[0] + 0.06
        sheet.add_patch(Rectangle(*frame, facecolor="none", edgecolor=colour, linewidth=2))


def draw_views(path: Path, question: Question, shown: Shown, best: list[Candidate], truth: Grid | None) -> Path:
    """The task, then a column for each view: what it shows, the answer to that, and the answer turned back."""
    answers = [grid for grid, _ in shown.answers]
    known = [grid for grid in answers if grid is not None]
    pairs = [grid for pair in question.demonstrations[:3] for grid in pair]
    others = [shown.query, *known, *([] if truth is None else [truth])]
    scales = [SIDE / max(max(grid.shape) for grid in grids) for grids in ([*pairs, shown.query], others)]
    first, second = two_attempts([c.grid.tolist() for c in best], shown.query)

    def votes(grid: Grid) -> int:
        return sum(np.array_equal(grid, other) for other in known)

    def colour(grid: Grid | None) -> str:
        return QUIET if grid is None or truth is None else RIGHT if np.array_equal(grid, truth) else WRONG

    views = list(zip(shown.views, answers, strict=True))
    rows = [
        ("the task", [(grid, "input" if i % 2 == 0 else "output", QUIET) for i, grid in enumerate(pairs)]
         + [(shown.query, "test input", QUIET)]),
        ("the test input in each view",
         [(v.show(shown.query), f"view {k}", QUIET) for k, (v, _) in enumerate(views, 1)]),
        ("answers", [(a if a is None else v.show(a), "", QUIET) for v, a in views]),
        ("turned back", [(a, "" if a is None else f"{votes(a)} of {len(views)} say so", colour(a)) for _, a in views]),
        ("the result", [(grid, f"{name}: {votes(grid)} of {len(views)}", colour(grid))
                        for name, grid in (("first", first), ("second", second))]
         + [(truth, "truth", QUIET)] * (truth is not None)),
    ]
    with style.context(STYLE, after_reset=True):
        width, height = STEP * max(len(cells) for _, cells in rows) + 0.4, (STEP + 0.4) * len(rows) + 0.2
        figure = Figure(figsize=(width, height), dpi=110)
        sheet = figure.add_axes((0, 0, 1, 1))
        sheet.set(xlim=(0, width), ylim=(height, 0))
        sheet.axis("off")
        for row, (title, cells) in enumerate(rows):
            top = 0.2 + row * (STEP + 0.4)
            title, size = (f"{printable(question.name)}: {title}", scales[0]) if row == 0 else (title, scales[1])
            sheet.text(0.25, top + 0.1, title, fontsize=10, fontweight="bold", va="center")
            for column, (grid, text, tint) in enumerate(cells):
                draw_cell(sheet, grid, 0.25 + column * STEP + SIDE / 2, top + 0.3 + SIDE / 2, size, text, tint)
        return save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 after one line on stderr."""

    def work() -> None:
        parser = Parser(prog="tools/views.py", description="Draw how a run answers a task, view by view.")
        parser.add_argument("run", type=Path, help="the folder of a run, for example runs/arc")
        parser.add_argument("task", help="the name of a task, or a file in the official layout")
        parser.add_argument("--test", type=int, default=1, help="which of its test inputs (default: 1)")
        parser.add_argument("--views", type=int, default=8, help="how many views (default: 8)")
        args = parser.parse_args(argv)
        run = solve.read_run(args.run)
        question, truths = find_question(run, args.task)
        if args.views < 1:
            raise UserError(f"--views is {args.views}; it must be at least 1")
        if not 1 <= args.test <= len(truths):
            raise UserError(f"--test is {args.test}; {args.task} has {len(truths)} test inputs, counted from 1")
        model, _ = solve.load_model(args.run, run.model_cfg)
        here = dataclasses.replace(run.cfg, device="auto", dtype="auto", kernels="auto")  # perhaps another machine
        runtime = train.Runtime.start(here, distributed=False)
        model.to(runtime.device).eval().use(runtime.ops)
        shown = Shown(question, args.test - 1, args.views, 0, run.model_cfg.block_size, run.task_tokens)
        answer_in_views(model, [shown], runtime, 1 << 15)
        (best,) = rescored(model, [shown], runtime, 1 << 15)
        path = args.run / f"views-{printable(question.name)}-{args.test}.png"
        print(f"wrote {draw_views(path, question, shown, best, truths[args.test - 1])}")

    return run_script("views.py", work)


if __name__ == "__main__":
    sys.exit(main())
