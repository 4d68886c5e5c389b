"""Pictures of a run: the curves of its metrics, and its predicted grids beside the truth.

    python tools/plot.py runs/arc        # metrics.jsonl -> curves.png, predictions.json -> predictions.png

Needs only matplotlib and numpy, and no display. `train.py` draws the same pictures when a run ends.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path

os.environ.pop("MPLBACKEND", None)  # a notebook's; importing matplotlib fails where it names one that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from arc_data.tasks import Grid, read_grid
from data.files import UserError, fits, read_json, read_text, reason, replacing, run_script
from data.flags import Parser

ARC_COLOURS = ["#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00",  # black, blue, red, green, yellow
               "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25"]  # grey, magenta, orange, light blue, maroon
INK, QUIET, RIGHT, WRONG = "#24292f", "#6e7781", "#1a7f37", "#cf222e"
TRAIN, VALIDATION = "#4c78a8", "#e4572e"
RATES = {"solve_rate": ("tasks solved", RIGHT), "cell_accuracy": ("cells right", "#8250df"),
         "shape_accuracy": ("shapes right", "#9a6700")}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.edgecolor": "#d0d7de",
    "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#eaeef2", "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "text.usetex": False, "text.parse_math": False,
}


# == READING A RUN ====================================================================================================


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, oldest first. A torn last line (the run was killed) is left out."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}: give the folder of a run, for example runs/arc")
    lines = [(n, text) for n, text in enumerate(read_text(path, "replace").splitlines(), 1) if text.strip()]
    metrics = []
    for number, text in lines:
        try:
            metrics.append({**json.loads(text)})
        except (ValueError, TypeError, RecursionError) as error:
            if number == lines[-1][0]:
                break
            raise UserError(f"{path} line {number} is broken ({reason(error)}): remove that line, try again") from None
    return metrics


def series(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, both (n,), as far as they are finite; of two lines of a step the later counts."""
    values = {}
    for line in metrics:
        step, value = line.get("step"), line.get(key)
        if all(isinstance(v, (int, float)) and abs(v) < 1e15 for v in (step, value)):
            values[step] = value
    steps = sorted(values)
    return np.array(steps, dtype=float), np.array([values[s] for s in steps], dtype=float)


def read_predictions(path: Path) -> list[dict]:
    """The entries of a predictions.json with their grids as arrays. Raises UserError naming the first bad entry."""
    shape = {"task": str, "test": int, "demonstrations": [{"input": list, "output": list}], "input": list,
             "prediction": (list, None), "truth": list}
    entries = read_json(path)
    if not fits(entries, [shape]):
        raise UserError(f"{path} is not a list of predictions: remove it, or let the run write it again")

    def checked(number: int, entry: dict) -> dict:
        def grid(rows: list | None) -> Grid | None:
            return None if rows is None else read_grid(rows, f"{path}: a grid of entry {number}")

        shown = [(grid(pair["input"]), grid(pair["output"])) for pair in entry["demonstrations"]]
        grids = {key: grid(entry[key]) for key in ("input", "prediction", "truth")}
        name = printable(entry["task"]) + ", second attempt" * (entry.get("attempt") == 2)
        return {"name": name, "test": entry["test"], "demonstrations": shown} | grids

    return [checked(number, entry) for number, entry in enumerate(entries)]


def printable(name: str) -> str:
    """A name as it can be drawn: in one line, not too long, without characters that no font could have."""
    return "".join(c if c.isprintable() else "?" for c in name[:40])


# == THE CURVES =======================================================================================================


def plot_curves(run: Path) -> Path | None:
    """Draw `curves.png` from `metrics.jsonl`; None if there is nothing in it to draw yet."""
    metrics = read_metrics(run / "metrics.jsonl")
    rates = any(len(series(metrics, key)[0]) for key in RATES)
    if not rates and not any(len(series(metrics, key)[0]) for key in ("loss", "val_loss")):
        return None
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(12 if rates else 8, 5.4), dpi=140, layout="constrained")
        panels = figure.subplots(2, 2 if rates else 1, sharex=True, squeeze=False, height_ratios=[5, 1])
        draw_loss(panels[0, 0], metrics)
        draw_strip(panels[1, 0], metrics, "lr", "learning rate")
        if rates:
            draw_rates(panels[0, 1], metrics)
            draw_strip(panels[1, 1], metrics, "grad_norm", "gradient norm")
        for axes in (a for a in panels[0] if a.lines):
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=3, borderaxespad=0, handlelength=1.6)
        for axes in panels[1]:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
        figure.text(0.008, 0.965, headline(run, metrics), fontsize=10, color=QUIET, va="center")
        return save(figure, run / "curves.png")


def headline(run: Path, metrics: list[dict]) -> str:
    """One line that tells runs apart: name, steps, minutes, speed."""
    parts = [printable(run.resolve().name)]
    for key, form, pick in (("step", "{:,.0f} steps", np.max), ("minutes", "{:.1f} minutes", np.max),
                            ("tokens_per_second", "{:,.0f} tokens/s", np.median)):
        values = series(metrics, key)[1]
        if len(values):
            parts.append(form.format(pick(values)))
    return "   ·   ".join(parts)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred average under a Hann window of about a fifteenth of the curve: no lag, no steps; narrower at the ends."""
    window = np.hanning(2 * (len(values) // 30) + 3)[1:-1]
    weight = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / weight


def draw_loss(axes: Axes, metrics: list[dict]) -> None:
    """Training loss, raw and smoothed, and validation loss with its last value written beside it."""
    top = 0.0
    steps, loss = series(metrics, "loss")
    if len(steps):
        name = "training"
        if len(steps) >= 60:
            axes.plot(steps, loss, color=TRAIN, alpha=0.28, linewidth=0.8)
            loss, name = smooth(loss), "training, smoothed"
        axes.plot(steps, loss, color=TRAIN, linewidth=1.8, label=name)
        top = loss.max()
    steps, loss = series(metrics, "val_loss")
    if len(steps):
        axes.plot(steps, loss, color=VALIDATION, linewidth=1.8, marker="o", markersize=4, label="validation")
        label(axes, steps[-1], loss[-1], f"{loss[-1]:.3f}", VALIDATION)
        top = max(top, loss.max())
    if top > 0:
        axes.set_ylim(0, 1.08 * top)  # of the smoothed loss: a single spike does not flatten the curve
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")


def draw_rates(axes: Axes, metrics: list[dict]) -> None:
    """Shares of tasks solved, cells right and shapes right, each with its last value written beside it."""
    last = []
    for key, (name, colour) in RATES.items():
        steps, values = series(metrics, key)
        if len(steps):
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)
            last.append((values[-1], steps[-1], colour))
    height = -1.0
    for value, step, colour in sorted(last):
        height = max(value, height + 0.055)  # equal values would be written over each other
        label(axes, step, height, f"{value:.1%}", colour)
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Held-out tasks")


def draw_strip(axes: Axes, metrics: list[dict], key: str, name: str) -> None:
    """A small panel with one quantity, named inside it."""
    steps, values = series(metrics, key)
    axes.plot(steps, values, color=QUIET, linewidth=1.2)
    if len(values):
        axes.set_ylim(0, 1.15 * max(np.percentile(values, 99), 1e-12))
    axes.set_title(name, fontsize=9, fontweight="normal", color=QUIET)
    axes.yaxis.set_major_locator(MaxNLocator(2))


def label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A value beside the point (x, y) of a curve."""
    axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", color=colour, va="center", fontweight="bold")


# == THE CONTACT SHEET ================================================================================================

ROWS = 8  # of the contact sheet
# All other measures are inches: side of a grid's place, gap inside a pair, heights of the heading and of what stands
# above and below the grids of a row.
BOX, ARROW, TOP, HEAD, FOOT = 1.55, 0.3, 0.92, 0.42, 0.34
PAIR = 2 * BOX + ARROW
PLACES = ("demonstration 1", "", "demonstration 2", "", "test input", "prediction", "truth")
LEFT = [0.2, 0.2 + BOX + ARROW, 0.5 + PAIR, 0.5 + PAIR + BOX + ARROW,  # where the seven grids of a row begin
        1.0 + 2 * PAIR, 1.0 + 2 * PAIR + BOX + ARROW, 1.2 + 3 * PAIR]
WIDTH = LEFT[6] + BOX + 0.2


def share_right(prediction: Grid | None, truth: Grid) -> float:
    """Share of cells that are right; where the shapes differ, of all cells that either grid has."""
    if prediction is None:
        return 0.0
    wrong = wrong_cells(prediction, truth)
    shared = np.prod(np.minimum(prediction.shape, truth.shape))
    return float((prediction.size - wrong.sum()) / (prediction.size + truth.size - shared))


def wrong_cells(prediction: Grid, truth: Grid) -> np.ndarray:
    """True where the prediction differs from the truth or lies outside it; (rows, columns) of the prediction."""
    wrong = np.ones(prediction.shape, dtype=bool)
    rows, columns = np.minimum(prediction.shape, truth.shape)
    wrong[:rows, :columns] = prediction[:rows, :columns] != truth[:rows, :columns]
    return wrong


def solved(entry: dict) -> bool:
    """Whether a prediction is right in every cell."""
    return entry["prediction"] is not None and np.array_equal(entry["prediction"], entry["truth"])


def rank(entry: dict) -> tuple:
    """The order of the sheet: solved first, then by the share of right cells."""
    share = 0.0 if entry["truth"] is None else share_right(entry["prediction"], entry["truth"])
    return not solved(entry), -share, entry["name"], entry["test"]


def judge(entry: dict) -> tuple[str, str]:
    """What became of a prediction, in words, and the colour of those words."""
    prediction, truth = entry["prediction"], entry["truth"]
    if solved(entry):
        return "\u2714 solved, 100 % right", RIGHT
    if prediction is None:
        return "\u2718 not a grid, 0 % right", WRONG
    if truth is None:
        return "the truth is not known", QUIET
    shape = "" if prediction.shape == truth.shape else ", wrong shape"
    return f"\u2718 {math.floor(100 * share_right(prediction, truth))} % of cells right{shape}", WRONG


def heading(entries: list[dict]) -> str:
    """The result in words."""
    return f"{sum(map(solved, entries))} of {len(entries)} test outputs solved"


def plot_predictions(run: Path) -> Path | None:
    """Draw `predictions.png` from `predictions.json`; None if the run has no predictions."""
    path = run / "predictions.json"
    entries = read_predictions(path) if path.is_file() else []
    if not entries:
        return None
    best = sorted(entries, key=rank)[:ROWS]
    notes = [printable(run.resolve().name)] + [f"the best {ROWS} are shown"] * (len(entries) > ROWS)
    return draw_sheet(run / "predictions.png", best, heading(entries), notes)


def draw_sheet(path: Path, entries: list[dict], title: str, notes: list[str]) -> Path:
    """One contact sheet. Each row is an entry as `read_predictions` gives it; an unknown truth is None."""
    tops = np.cumsum([TOP] + [HEAD + grids_height(entry) + FOOT for entry in entries])
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, tops[-1]), dpi=110)
        sheet = figure.add_axes((0, 0, 1, 1))  # one canvas, measured in inches from the upper left corner
        sheet.set(xlim=(0, WIDTH), ylim=(tops[-1], 0))
        sheet.axis("off")
        sheet.text(LEFT[0], 0.34, title, fontsize=16, fontweight="bold", va="center")
        notes = [*notes, "wrong cells are outlined"]
        sheet.text(LEFT[6] + BOX, 0.34, "   ·   ".join(notes), fontsize=10, color=QUIET, ha="right", va="center")
        for left, place in zip(LEFT, PLACES, strict=True):
            sheet.text(left, 0.72, place, fontsize=10, color=QUIET, va="center")
        for entry, top in zip(entries, tops[:-1], strict=True):
            draw_entry(sheet, entry, top)
        return save(figure, path)


def draw_answers(out: Path, outputs: list[dict], title: str) -> list[Path]:
    """Contact sheets of all outputs that `report.entries` lists, solved ones first: picture-01.png, picture-02.png, …

    The heading counts as the scores do; outputs that the run learned from come last and say so.
    """
    entries = []
    for o in outputs:
        second = o["truth"] is not None and o["attempts"][1] == o["truth"]
        grids = {"input": o["input"], "prediction": o["attempts"][second], "truth": o["truth"]}
        shown = [tuple(np.array(pair[side]) for side in ("input", "output")) for pair in o["demonstrations"]]
        name = o["task"] + ", learned from" * o["seen"] + ", second attempt" * second
        entries.append({"name": name, "test": o["test"], "demonstrations": shown, "seen": o["seen"]}
                       | {key: None if grid is None else np.array(grid) for key, grid in grids.items()})
    entries.sort(key=lambda entry: (entry["seen"], rank(entry)))
    text = heading([e for e in entries if e["truth"] is not None and not e["seen"]])
    sheets = [entries[i : i + ROWS] for i in range(0, len(entries), ROWS)]
    digits = max(2, len(str(len(sheets))))
    return [draw_sheet(out / f"picture-{n:0{digits}}.png", sheet, text, [title, f"sheet {n} of {len(sheets)}"])
            for n, sheet in enumerate(sheets, 1)]


def placed(entry: dict) -> list[tuple[float, Grid, float]]:
    """Left edge, grid and cell size (inches) of the grids in a row.

    All have one scale, so that shapes compare, but a small grid fills at least half of its place.
    """
    shown = [grid for pair in (entry["demonstrations"] + [(None, None)] * 2)[:2] for grid in pair]
    shown += [entry["input"], entry["prediction"], entry["truth"]]
    largest = max(max(grid.shape) for grid in shown if grid is not None)
    return [(left, grid, BOX / min(largest, 2 * max(grid.shape)))
            for left, grid in zip(LEFT, shown, strict=True) if grid is not None]


def grids_height(entry: dict) -> float:
    """Inches that the tallest grid of a row takes."""
    return max(len(grid) * size for _, grid, size in placed(entry))


def draw_entry(sheet: Axes, entry: dict, top: float) -> None:
    """One row of the sheet: two demonstrations, the test input, the prediction and the truth."""
    sheet.plot([LEFT[0], LEFT[6] + BOX], [top, top], color="#d0d7de", linewidth=0.8)
    sheet.text(LEFT[0], top + HEAD / 2, f"{entry['name']}, test {entry['test'] + 1}", fontweight="bold", va="center")
    verdict, colour = judge(entry)
    sheet.text(LEFT[5], top + HEAD / 2, verdict, color=colour, fontsize=11, fontweight="bold", va="center")
    height = grids_height(entry)
    middle = top + HEAD + height / 2
    for left, grid, size in placed(entry):
        draw_grid(sheet, grid, left + BOX / 2, middle, size)
        sheet.text(left + BOX / 2, middle + height / 2 + 0.13, "{} \u00d7 {}".format(*grid.shape), fontsize=7.5,
                   color=QUIET, ha="center", va="center")
        if left in (LEFT[0], LEFT[2], LEFT[4]):
            sheet.text(left + BOX + ARROW / 2, middle, "\u2192", fontsize=13, color=QUIET, ha="center", va="center")
        if left == LEFT[5]:
            mark_prediction(sheet, entry, left + BOX / 2, middle, size)
    if entry["prediction"] is None:
        corner = (LEFT[5], middle - height / 2)
        sheet.add_patch(Rectangle(corner, BOX, height, facecolor="none", edgecolor=WRONG, linestyle=":"))
        sheet.text(LEFT[5] + BOX / 2, middle, "no grid", color=WRONG, ha="center", va="center")


def corners(grid: Grid, x: float, y: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the columns and the rows of a grid begin and end whose middle is at (x, y), in inches."""
    rows, columns = grid.shape
    return x + size * (np.arange(columns + 1) - columns / 2), y + size * (np.arange(rows + 1) - rows / 2)


def draw_grid(sheet: Axes, grid: Grid, x: float, y: float, size: float) -> None:
    """One grid around (x, y), cells `size` inches wide, with thin lines between them."""
    sheet.pcolormesh(*corners(grid, x, y, size), grid, cmap=ListedColormap(ARC_COLOURS), vmin=-0.5, vmax=9.5,
                     edgecolors="#5c5c5c", linewidth=min(0.6, 5 * size), antialiased=True)


def mark_prediction(sheet: Axes, entry: dict, x: float, y: float, size: float) -> None:
    """A green or red frame around the prediction, and an outline around each wrong cell."""
    across, down = corners(entry["prediction"], x, y, size)
    truth = entry["prediction"] if entry["truth"] is None else entry["truth"]
    cells = [Rectangle((across[c], down[r]), size, size)
             for r, c in np.argwhere(wrong_cells(entry["prediction"], truth))]
    for width, colour in ((2.4, "white"), (1.1, "black")):  # two tones stand out from every colour
        outlines = dict(facecolors="none", edgecolors=colour, linewidths=width * min(1, 8 * size))
        sheet.add_collection(PatchCollection(cells, **outlines), autolim=False)
    gap = 0.035
    frame = (across[0] - gap, down[0] - gap), across[-1] - across[0] + 2 * gap, down[-1] - down[0] + 2 * gap
    sheet.add_patch(Rectangle(*frame, facecolor="none", edgecolor=judge(entry)[1], linewidth=2))


# == COMMAND LINE =====================================================================================================


def save(figure: Figure, path: Path) -> Path:
    """Write the picture, of which a viewer never sees half; no backend is asked for."""
    FigureCanvasAgg(figure)
    with replacing(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box, without a word on each
        figure.savefig(file, format="png", facecolor="white")
    return path


def plot_run(run: Path | str) -> list[Path]:
    """Draw every picture that a run folder has data for; their paths. Raises UserError on bad data."""
    run = Path(run)
    return [picture for picture in (plot_curves(run), plot_predictions(run)) if picture]


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 after one line on stderr."""

    def work() -> None:
        parser = Parser(prog="tools/plot.py", description="Draw the pictures of a run into its folder.")
        parser.add_argument("run", type=Path, help="the folder of a run, for example runs/arc")
        run = parser.parse_args(argv).run
        if not run.is_dir():
            raise UserError(f"{run} is not a folder: give the folder of a run, for example runs/arc")
        pictures = plot_run(run)
        if not pictures:
            raise UserError(f"{run / 'metrics.jsonl'} holds nothing to draw yet: let the run take a few steps")
        for picture in pictures:
            print(f"wrote {picture}")

    return run_script("plot.py", work)


if __name__ == "__main__":
    sys.exit(main())
