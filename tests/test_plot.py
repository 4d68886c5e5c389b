"""tools/plot.py: pictures from run folders made up here, and one clear line for those it cannot draw."""

import functools
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import complaint, python
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data.files import UserError
from tools import plot

GRIDS = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 9))


def write_metrics(run: Path, lines) -> Path:
    """A log of these lines; what is no text is written as JSON."""
    run.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    return run / "metrics.jsonl"


def steps(count: int, every: int = 20) -> list[dict]:
    """Lines like those train.py writes: one per step, some with an evaluation."""
    common = {"loss": 2.5, "lr": 0.01, "grad_norm": 1, "tokens_per_second": 9e3}
    tested = {"val_loss": 2.6, "minutes": 3.5, "solve_rate": 0.1, "cell_accuracy": 0.8, "shape_accuracy": 0.8}
    return [{"step": n} | common | (tested if n % every == 0 else {}) for n in range(1, count + 1)]


def entry(truth: list, prediction: list | None, task: str = "a", demonstrations: int = 2) -> dict:
    """One prediction as train.py writes it."""
    pairs = [{"input": [[0, 1], [2, 3]], "output": [[4, 5, 6]]}] * demonstrations
    return {"task": task, "test": 0, "demonstrations": pairs, "input": [[7, 8], [9, 0]], "prediction": prediction,
            "truth": truth}


def write_predictions(run: Path, entries: object) -> None:
    (run / "predictions.json").write_text(json.dumps(entries), encoding="utf-8")


def test_numbers_that_are_finite_count_and_the_later_of_two_lines(tmp_path):
    """A resumed run does steps again."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf, "lr": None},
             {"step": 4}, {"note": "no step"}, {"step": 5, "loss": 9}, {"step": 10**400, "loss": 1},
             {"step": 6, "loss": 10**400}, {"step": 7, "loss": 1e300}, {"step": 8, "loss": "2"}, {"step": 4, "loss": 3},
             {"step": 5, "loss": 1.0}]  # fmt: skip
    found = plot.series(plot.read_metrics(write_metrics(tmp_path, lines)), "loss")
    assert [values.tolist() for values in found] == [[1, 4, 5], [2, 3, 1]]
    assert plot.plot_curves(tmp_path)


def test_smoothing_keeps_length_level_and_middle():
    assert plot.smooth(np.full(500, 3.0)) == pytest.approx(3.0)
    line, noise = np.arange(500.0), np.random.default_rng(0).normal(size=500)
    assert plot.smooth(line)[50:-50] == pytest.approx(line[50:-50])  # centred: no lag
    assert plot.smooth(noise).std() < 0.4 * noise.std() and len(plot.smooth(noise)) == 500


@given(GRIDS, GRIDS)
def test_share_and_wrong_cells(prediction, truth):
    """Counted cell by cell: what is missing is wrong, and so is what is too much."""
    one, other = ({(*place, colour) for place, colour in np.ndenumerate(grid)} for grid in (prediction, truth))
    places = {cell[:2] for cell in one | other}
    assert plot.share_right(prediction, truth) == pytest.approx(len(one & other) / len(places))
    wrong = plot.wrong_cells(prediction, truth)
    assert wrong.shape == prediction.shape and {tuple(p) for p in np.argwhere(wrong)} == {c[:2] for c in one - other}
    assert plot.share_right(truth, truth) == 1 and plot.share_right(None, truth) == 0


def test_solved_ones_come_first_then_by_share(tmp_path):
    truth = [[1, 2, 3, 4]]
    answers = {"none": None, "half": [[1, 2, 0, 0]], "most": [[1, 2, 3, 0]], "all": truth}
    entries = [entry(truth, answer, name) for name, answer in answers.items()]
    write_predictions(tmp_path, [*entries[:-1], entries[-1] | {"attempt": 2}])
    ordered = sorted(plot.read_predictions(tmp_path / "predictions.json"), key=plot.rank)
    assert [item["name"] for item in ordered] == ["all, second attempt", "most", "half", "none"]
    assert [plot.judge(item)[1] for item in ordered] == [plot.RIGHT] + [plot.WRONG] * 3
    assert plot.judge(ordered[1])[0].endswith("75 % of cells right")
    truth, close = np.zeros((2, 30, 30), dtype=int)
    close[0, 0] = 1
    assert "99 %" in plot.judge({"prediction": close, "truth": truth})[0]  # not rounded to 100 %
    assert "wrong shape" in plot.judge({"prediction": close[1:], "truth": truth})[0]


def test_at_most_eight_rows_in_the_colours_of_arc(tmp_path):
    """Every cell of a drawn grid has, in its middle, the official colour."""
    official = "000000 0074D9 FF4136 2ECC40 FFDC00 AAAAAA F012BE FF851B 7FDBFF 870C25".split()
    grid = [list(range(10)), [9 - c for c in range(10)]]
    pictures = []
    for count in (1, 8, 9):
        write_predictions(tmp_path, [entry(grid, grid, str(i)) for i in range(count)])
        pictures.append(np.asarray(Image.open(plot.plot_predictions(tmp_path))))
    colours = np.unique(pictures[0][..., :3].reshape(-1, 3), axis=0)
    assert set(official) <= {f"{r:02X}{g:02X}{b:02X}" for r, g, b in colours}
    one, eight, nine = map(len, pictures)
    assert one < eight == nine


def test_any_shape_any_number_of_demonstrations_and_any_name(tmp_path, recwarn):
    grids = [(np.arange(30 * c).reshape(30, c) % 10).tolist() for c in (1, 30)] + [[[5]]]
    names = [r"$\frac{$", "x" * 10**6, "a\nb\x00", "\ud800", "東京 \u2028"]
    rows = zip(itertools.product(grids, [*grids, None]), itertools.cycle(names), (0, 1, 2, 5) * 2, strict=False)
    write_metrics(run := tmp_path / names[0], steps(60))
    write_predictions(run, [entry(truth, prediction, *row) for (truth, prediction), *row in rows])
    assert plot.main([str(run)]) == 0 and not recwarn.list
    assert Image.open(run / "predictions.png").width < 2000


def test_a_torn_last_line_is_left_out(tmp_path):
    whole = write_metrics(tmp_path, steps(30)).read_bytes()
    for tail in (b'{"step": 31, "lo\xc3', b"7", b"[" * 99999):
        (tmp_path / "metrics.jsonl").write_bytes(whole + tail)
        assert len(plot.read_metrics(tmp_path / "metrics.jsonl")) == 30


def test_folders_without_a_run_are_refused(tmp_path, capsys):
    refused = functools.partial(complaint, plot, capsys)
    assert f"{tmp_path / 'missing'} is not a folder" in refused(tmp_path / "missing")
    assert f"{tmp_path} holds no metrics.jsonl" in refused(tmp_path)
    for nothing in ([], [{"step": 1, "lr": 0.1}], ['{"step": 1, "lo']):
        assert f"{write_metrics(tmp_path, nothing)} holds nothing to draw yet" in refused(tmp_path)
    for broken in ("{", "7", "\x00\x00"):
        path = write_metrics(tmp_path, [{"step": 1, "loss": 2}, broken, {"step": 2, "loss": 1}])
        assert f"{path} line 2 is broken" in refused(tmp_path)
    write_predictions(tmp_path, [])
    assert plot.plot_predictions(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "predictions.json"]


def test_bad_predictions_are_refused(tmp_path):
    wrong = [{"truth": None}, {"prediction": [[1, 2], [3]]}, {"prediction": [[0.5]]}, {"prediction": 5}, {"truth": []},
             {"test": math.inf}]  # fmt: skip
    for bad in ({"a": 1}, [3], *([entry([[1]], [[1]]) | change] for change in wrong)):
        write_predictions(tmp_path, bad)
        with pytest.raises(UserError, match="predictions.json"):
            plot.plot_predictions(tmp_path)


ALONE = """
import runpy, sys
script = sys.argv.pop(1)
runpy.run_path(script)
import matplotlib
matplotlib.rcParams.update({"font.size": 31, "text.usetex": True, "axes.titlesize": 40})
before = matplotlib.rcParams.copy()
try:
    runpy.run_path(script, run_name="__main__")
finally:
    assert matplotlib.rcParams.copy() == before
    assert not {"torch", "train", "matplotlib.pyplot"} & sys.modules.keys()
"""


def test_a_process_with_any_settings_path_and_console(tmp_path, monkeypatch):
    """It needs no torch, no pyplot and no display, writes two pictures and nothing else, and changes no settings."""
    name = b"caf\xe9 \xff" if sys.platform == "linux" else b"run"
    write_metrics(run := tmp_path / os.fsdecode(name), steps(120, every=200))
    write_predictions(run, [entry([[1, 2]], [[1, 2]]), entry([[1, 2]], [[1, 3]]), entry([[1]], None)])
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = python("-W", "error", "-c", ALONE, plot.__file__, run, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "" and out.count("wrote ") == 2
    assert sorted(os.listdir(run)) == ["curves.png", "metrics.jsonl", "predictions.json", "predictions.png"]
    assert all(min(np.asarray(Image.open(path)).shape[:2]) > 300 for path in run.glob("*.png"))
