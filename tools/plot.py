"""Pictures of a run: the curves of its metrics, and its predicted grids beside the truth.

    python plot.py runs/arc        # metrics.jsonl -> curves.png, predictions.json -> predictions.png

Needs only matplotlib and numpy, and no display. `train.py` draws the same pictures when a run ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

ARC_COLOURS = ["#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00",  # black, blue, red, green, yellow
               "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25"]  # grey, magenta, orange, light blue, maroon
INK, QUIET, RIGHT, WRONG = "#24292f", "#6e7781", "#1a7f37", "#cf222e"
TRAIN, VALIDATION = "#4c78a8", "#e4572e"
RATES = {"solve_rate": ("tasks solved", RIGHT), "cell_accuracy": ("cells right", "#8250df"),
         "shape_accuracy": ("shapes right", "#9a6700")}
ROWS = 8  # of the contact sheet; the rest of its measures are inches
BOX, ARROW = 1.55, 0.3  # side of a grid's place, gap inside a pair
TOP, HEAD, FOOT = 0.92, 0.42, 0.34  # heights of the heading, and of what stands above and below the grids of a row
PAIR = 2 * BOX + ARROW
LEFT = [0.2, 0.2 + BOX + ARROW, 0.5 + PAIR, 0.5 + PAIR + BOX + ARROW,  # where the seven grids of a row begin
        1.0 + 2 * PAIR, 1.0 + 2 * PAIR + BOX + ARROW, 1.2 + 3 * PAIR]
WIDTH = LEFT[6] + BOX + 0.2
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.edgecolor": "#d0d7de",
    "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#eaeef2", "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "text.usetex": False, "text.parse_math": False,
}

Grid = np.ndarray  # (rows, columns) of colours 0-9


class PlotError(Exception):
    """What is wrong with the run folder, in one line."""


# == reading a run ==================================================================================================


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, oldest first. A torn last line (the run was killed) is left out."""
    if not path.is_file():
        raise PlotError(f"{path.parent} holds no {path.name}: give the folder of a run, for example runs/arc")
    lines = [(n, text) for n, text in enumerate(path.read_text("utf-8", "replace").splitlines(), 1) if text.strip()]
    metrics = []
    for number, text in lines:
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as problem:
            if number == lines[-1][0]:
                break
            raise PlotError(f"{path} line {number} is broken ({problem}): remove that line and try again") from None
        metrics.append(line)
    return metrics


def series(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, where both are numbers a run can have; the later line of a step counts."""
    values = {}
    for line in metrics:
        step, value = line.get("step"), line.get(key)
        if all(isinstance(v, (int, float)) and abs(v) < 1e15 for v in (step, value)):
            values[step] = value
    steps = sorted(values)
    return np.array(steps, dtype=float), np.array([values[s] for s in steps], dtype=float)


def read_predictions(path: Path) -> list[dict]:
    """The entries of a predictions.json with their grids as arrays. Raises PlotError naming the first bad entry."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise PlotError(f"{path} is not JSON ({problem}): remove it or let the run write it again") from None
    if not isinstance(entries, list):
        raise PlotError(f"{path} holds no list of predictions: remove it or let the run write it again")
    checked = []
    for number, entry in enumerate(entries):
        try:
            shown = [(_grid(pair["input"]), _grid(pair["output"])) for pair in entry["demonstrations"]]
            answer = _grid(entry["prediction"]) if entry["prediction"] else None
            name = f"{entry['task']}"[:40].encode("utf-8", "replace").decode()
            checked.append({"name": name, "test": int(entry["test"]), "demonstrations": shown,
                            "input": _grid(entry["input"]), "prediction": answer, "truth": _grid(entry["truth"])})
        except KeyError as problem:
            raise PlotError(f"{path} entry {number} has no {problem}: let the run write it again") from None
        except (TypeError, ValueError, OverflowError) as problem:
            raise PlotError(f"{path} entry {number} is malformed ({problem}): let the run write it again") from None
    return checked


def _grid(rows: list[list[int]]) -> Grid:
    """A grid as an array. Raises ValueError unless it is a rectangle of colours, at most 30 x 30."""
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not 1 <= max(len(rows), *lengths) <= 30 or 0 in lengths:
        raise ValueError("a grid with rows of different lengths, empty, or larger than 30 x 30")
    grid = np.array(rows)
    if grid.ndim != 2 or grid.dtype.kind != "i" or grid.min() < 0 or grid.max() > 9:
        raise ValueError("a grid with a cell that is no colour from 0 to 9")
    return grid


# == the curves =====================================================================================================


def plot_curves(run: Path) -> Path | None:
    """Draws `curves.png` from `metrics.jsonl`; None if there is nothing in it to draw yet."""
    run = Path(run)
    metrics = read_metrics(run / "metrics.jsonl")
    drawable = ("loss", "val_loss", *RATES)
    if not any(len(series(metrics, key)[0]) for key in drawable):
        return None
    with style.context(STYLE, after_reset=True):
        rates = any(len(series(metrics, key)[0]) for key in RATES)
        figure = Figure(figsize=(12 if rates else 8, 5.4), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2 if rates else 1, sharex=True, squeeze=False, height_ratios=[5, 1])
        draw_loss(panels[0, 0], metrics)
        draw_strip(panels[1, 0], metrics, "lr", "learning rate")
        if rates:
            draw_rates(panels[0, 1], metrics)
            draw_strip(panels[1, 1], metrics, "grad_norm", "gradient norm")
        for axes in panels[-1]:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
        figure.text(0.008, 0.965, _headline(run, metrics), fontsize=10, color=QUIET, va="center")
        return _save(figure, run / "curves.png")


def _headline(run: Path, metrics: list[dict]) -> str:
    """One line that tells runs apart: name, steps, minutes, speed."""
    parts = [run.resolve().name]
    for key, form, pick in (("step", "{:,.0f} steps", np.max), ("minutes", "{:.1f} minutes", np.max),
                            ("tokens_per_second", "{:,.0f} tokens/s", np.median)):
        values = series(metrics, key)[1]
        if len(values):
            parts.append(form.format(pick(values)))
    return "   ·   ".join(parts)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred average under a Hann window of about a fifteenth of the curve: no lag, no steps; narrower at the ends."""
    half = len(values) // 30
    window = np.hanning(2 * half + 3)[1:-1]
    weight = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / weight


def draw_loss(axes: Axes, metrics: list[dict]) -> None:
    """Training loss, raw and smoothed, and validation loss with its last value written beside it."""
    steps, loss = series(metrics, "loss")
    tops = []
    if len(steps):
        many = len(steps) >= 60
        if many:
            axes.plot(steps, loss, color=TRAIN, alpha=0.28, linewidth=0.8)
            loss = smooth(loss)
        axes.plot(steps, loss, color=TRAIN, linewidth=1.8, label="training, smoothed" if many else "training")
        tops.append(loss.max())
    steps, loss = series(metrics, "val_loss")
    if len(steps):
        axes.plot(steps, loss, color=VALIDATION, linewidth=1.8, marker="o", markersize=4, label="validation")
        _label(axes, steps[-1], loss[-1], f"{loss[-1]:.3f}", VALIDATION)
        tops.append(loss.max())
    if tops and max(tops) > 0:
        axes.set_ylim(0, 1.08 * max(tops))  # a single spike does not flatten the curve
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")
    _legend(axes)


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
        height = max(value, height + 0.055)  # equal values would write over each other
        _label(axes, step, height, f"{value:.1%}", colour)
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Held-out tasks")
    _legend(axes)


def draw_strip(axes: Axes, metrics: list[dict], key: str, name: str) -> None:
    """A small panel with one quantity, named inside it."""
    steps, values = series(metrics, key)
    axes.plot(steps, values, color=QUIET, linewidth=1.2)
    if len(values):
        axes.set_ylim(0, 1.15 * max(np.percentile(values, 99), 1e-12))
    axes.set_title(name, fontsize=9, fontweight="normal", color=QUIET)
    axes.yaxis.set_major_locator(MaxNLocator(2))


def _legend(axes: Axes) -> None:
    """On the line of the title, where it covers no curve."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=3, borderaxespad=0, handlelength=1.6)


def _label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", color=colour, va="center", fontweight="bold")


# == the contact sheet ==============================================================================================


def share_right(prediction: Grid | None, truth: Grid) -> float:
    """Share of cells that are right; where the shapes differ, of all cells that either grid has."""
    if prediction is None:
        return 0.0
    rows, columns = np.minimum(prediction.shape, truth.shape)
    same = int((prediction[:rows, :columns] == truth[:rows, :columns]).sum())
    return same / (prediction.size + truth.size - rows * columns)


def wrong_cells(prediction: Grid, truth: Grid) -> Grid:
    """True where the prediction differs from the truth or lies outside it."""
    wrong = np.ones(prediction.shape, dtype=bool)
    rows, columns = np.minimum(prediction.shape, truth.shape)
    wrong[:rows, :columns] = prediction[:rows, :columns] != truth[:rows, :columns]
    return wrong


def solved(entry: dict) -> bool:
    return entry["prediction"] is not None and np.array_equal(entry["prediction"], entry["truth"])


def rank(entry: dict) -> tuple:
    """The order of the sheet: solved first, then by the share of right cells."""
    share = 0.0 if entry["truth"] is None else share_right(entry["prediction"], entry["truth"])
    return not solved(entry), -share, entry["name"], entry["test"]


def plot_predictions(run: Path) -> Path | None:
    """Draws `predictions.png` from `predictions.json`; None if the run has no predictions."""
    run = Path(run)
    if not (run / "predictions.json").is_file():
        return None
    entries = read_predictions(run / "predictions.json")
    if not entries:
        return None
    best = sorted(entries, key=rank)[:ROWS]
    notes = [run.resolve().name] + ([f"the best {len(best)} are shown"] if len(entries) > len(best) else [])
    return draw_sheet(run / "predictions.png", best, heading(entries), notes)


def heading(entries: list[dict]) -> str:
    """The result in words."""
    return f"{sum(map(solved, entries))} of {len(entries)} test outputs solved"


def draw_sheet(path: Path, entries: list[dict], title: str, notes: list[str]) -> Path:
    """One contact sheet, a row an entry as `read_predictions` gives it; a truth that is not known is None."""
    with style.context(STYLE, after_reset=True):
        tops = np.cumsum([TOP] + [row_height(entry) for entry in entries])
        height = tops[-1]
        figure = Figure(figsize=(WIDTH, height), dpi=110)
        FigureCanvasAgg(figure)
        sheet = figure.add_axes((0, 0, 1, 1))  # one canvas, measured in inches from the upper left corner
        sheet.set(xlim=(0, WIDTH), ylim=(height, 0))
        sheet.axis("off")
        draw_heading(sheet, title, [*notes, "wrong cells are outlined"])
        for entry, top in zip(entries, tops[:-1], strict=True):
            draw_entry(sheet, entry, top)
        return _save(figure, path)


def draw_heading(sheet: Axes, title: str, notes: list[str]) -> None:
    """The title, what else is to be known, and the titles of the columns."""
    sheet.text(LEFT[0], 0.34, title, fontsize=16, fontweight="bold", va="center")
    sheet.text(LEFT[6] + BOX, 0.34, "   ·   ".join(notes), fontsize=10, color=QUIET, ha="right", va="center")
    for x, title in ((LEFT[0], "demonstration 1"), (LEFT[2], "demonstration 2"), (LEFT[4], "test input"),
                     (LEFT[5], "prediction"), (LEFT[6], "truth")):
        sheet.text(x, 0.72, title, fontsize=10, color=QUIET, va="center")


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


def row_height(entry: dict) -> float:
    """Inches from the line above a row to the line above the next."""
    return HEAD + grids_height(entry) + FOOT


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


def corners(grid: Grid, x: float, y: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the columns and rows of a grid begin and end whose middle is at (x, y), in inches."""
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


# == saving and the command line ====================================================================================


def _save(figure: Figure, path: Path) -> Path:
    """Writes the picture under a temporary name and renames it: a viewer never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(scratch, format="png", facecolor="white")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def plot_run(run: Path | str) -> list[Path]:
    """Draws every picture that a run folder has data for and returns their paths. Raises PlotError on bad data."""
    run = Path(run)
    if not run.is_dir():
        raise PlotError(f"{run} is not a folder: give the folder of a run, for example runs/arc")
    return [picture for picture in (plot_curves(run), plot_predictions(run)) if picture is not None]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Draw the pictures of a run into its folder.")
    parser.add_argument("run", type=Path, help="the folder of a run, for example runs/arc")
    run = parser.parse_args(argv).run
    try:
        pictures = plot_run(run)
        if not pictures:
            raise PlotError(f"{run / 'metrics.jsonl'} holds nothing to draw yet: let the run take a few steps")
    except (PlotError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    for picture in pictures:
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
