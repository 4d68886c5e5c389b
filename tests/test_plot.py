"""tools/plot.py: pictures from run folders made up here, and one clear line for those it cannot draw."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.files import UserError
from tools import plot

ROOT = Path(plot.__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(run: Path, steps: int = 120, rates: bool = True) -> None:
    """A run like those train.py leaves: one line per step, some with an evaluation."""
    run.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2.5 * math.exp(-step / 40), "lr": 0.01, "grad_norm": 1, "tokens_per_second": 9e3}
        if step % 20 == 0:
            line |= {"val_loss": 2.6 * math.exp(-step / 50), "minutes": step / 60}
            line |= {"solve_rate": 0.1, "cell_accuracy": 0.8, "shape_accuracy": 0.8} if rates else {"sample": "text"}
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def entry(truth: list, prediction: list | None, task: str = "a", demonstrations: int = 2) -> dict:
    """One prediction as train.py writes it."""
    pairs = [{"input": [[0, 1], [2, 3]], "output": [[4, 5, 6]]}] * demonstrations
    return {"task": task, "test": 0, "demonstrations": pairs, "input": [[7, 8], [9, 0]], "prediction": prediction,
            "truth": truth}


def write_predictions(run: Path, entries: object) -> None:
    (run / "predictions.json").write_text(json.dumps(entries), encoding="utf-8")


def size(picture: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG."""
    data = picture.read_bytes()
    assert data.startswith(PNG) and data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


# == THE CURVES =======================================================================================================


def test_a_run_gives_both_pictures_and_no_other_file(tmp_path, capsys):
    write_metrics(tmp_path)
    write_predictions(tmp_path, [entry([[1, 2]], [[1, 2]]), entry([[1, 2]], [[1, 3]]), entry([[1]], None)])
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / n}.png" for n in ("curves", "predictions")]
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl", "predictions.json", "predictions.png"]
    assert min(size(tmp_path / "curves.png") + size(tmp_path / "predictions.png")) > 300


def test_without_rates_there_is_one_panel(tmp_path):
    write_metrics(tmp_path / "arc")
    write_metrics(tmp_path / "text", rates=False)
    wide, narrow = (size(plot.plot_curves(tmp_path / name))[0] for name in ("arc", "text"))
    assert wide > narrow


def test_what_is_not_a_finite_number_is_left_out(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf, "lr": None},
             {"step": 4}, {"note": "no step"}, {"step": 5, "loss": 1.0}, {"step": 10**400, "loss": 1},
             {"step": 6, "loss": 10**400}, {"step": 7, "loss": 1e300}, {"step": 8, "loss": "2"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, values = plot.series(plot.read_metrics(tmp_path / "metrics.jsonl"), "loss")
    assert steps.tolist() == [1, 5] and values.tolist() == [2, 1]
    assert plot.plot_curves(tmp_path)


def test_after_a_resume_the_later_line_of_a_step_counts():
    steps, values = plot.series([{"step": s, "loss": v} for s, v in ((1, 5), (2, 4), (3, 3), (2, 40), (3, 30))], "loss")
    assert steps.tolist() == [1, 2, 3] and values.tolist() == [5, 40, 30]


def test_smoothing_keeps_length_level_and_middle():
    assert plot.smooth(np.full(500, 3.0)) == pytest.approx(3.0)
    line = np.arange(500.0)
    assert plot.smooth(line)[50:-50] == pytest.approx(line[50:-50])  # centred: no lag
    noise = np.random.default_rng(0).normal(size=500)
    assert plot.smooth(noise).std() < 0.4 * noise.std() and len(plot.smooth(noise)) == 500


# == THE CONTACT SHEET ================================================================================================

GRIDS = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 9))


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
    write_predictions(tmp_path, [entry(truth, answer, name) for name, answer in answers.items()])
    ordered = sorted(plot.read_predictions(tmp_path / "predictions.json"), key=plot.rank)
    assert [item["name"] for item in ordered] == ["all", "most", "half", "none"]
    assert [plot.judge(item)[1] for item in ordered] == [plot.RIGHT] + [plot.WRONG] * 3
    assert plot.judge(ordered[1])[0].endswith("75 % of cells right")


def test_almost_right_is_never_called_100_percent():
    truth = np.zeros((30, 30), dtype=int)
    close = truth.copy()
    close[0, 0] = 1
    assert "99 %" in plot.judge({"prediction": close, "truth": truth})[0]
    assert "wrong shape" in plot.judge({"prediction": close[1:], "truth": truth})[0]


def test_at_most_eight_rows(tmp_path):
    heights = []
    for count in (1, 8, 9):
        write_predictions(tmp_path, [entry([[1, 2]], [[1, 2]], str(i)) for i in range(count)])
        heights.append(size(plot.plot_predictions(tmp_path))[1])
    assert heights[0] < heights[1] == heights[2]


def test_any_number_of_demonstrations_and_any_shape(tmp_path):
    grids = [(np.arange(30 * c).reshape(30, c) % 10).tolist() for c in (1, 30)] + [[[5]]]
    pairs = zip(itertools.product(grids, grids), itertools.cycle([0, 1, 2, 5]), strict=False)
    write_predictions(tmp_path, [entry(t, p, demonstrations=n) for (t, p), n in pairs])
    assert size(plot.plot_predictions(tmp_path))


def test_the_colours_are_those_of_arc(tmp_path):
    """Every cell of a drawn grid has, in its middle, the official colour."""
    from matplotlib.image import imread

    official = "000000 0074D9 FF4136 2ECC40 FFDC00 AAAAAA F012BE FF851B 7FDBFF 870C25".split()
    grid = [list(range(10)), [9 - c for c in range(10)]]
    write_predictions(tmp_path, [entry(grid, grid)])
    pixels = (imread(plot.plot_predictions(tmp_path))[..., :3] * 255).round().astype(int).reshape(-1, 3)
    seen = {f"{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}
    assert set(official) <= seen


def test_any_name_is_drawn(tmp_path, recwarn):
    names = [r"$\frac{$", "x" * 10**6, "a\nb\x00", "\ud800", "東京 \u2028"]
    write_metrics(tmp_path / names[0], 20)
    write_predictions(tmp_path / names[0], [entry([[1]], [[1]], task=name) for name in names])
    assert size(plot.plot_run(tmp_path / names[0])[1])[0] < 2000 and not recwarn.list


# == WHAT CANNOT BE DRAWN =============================================================================================


@pytest.mark.parametrize("tail", [b'{"step": 31, "lo\xc3', b"7", b"[" * 99999])
def test_a_torn_last_line_is_left_out(tail, tmp_path):
    write_metrics(tmp_path, 30)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert len(plot.read_metrics(tmp_path / "metrics.jsonl")) == 30


def refused(run: Path, capsys: pytest.CaptureFixture) -> str:
    """The one line that plot.py says about a folder it cannot draw."""
    assert plot.main([str(run)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and str(run) in output.err
    assert not list(run.glob(".*"))
    return output.err


def test_folders_without_a_run_are_refused(tmp_path, capsys):
    assert "not a folder" in refused(tmp_path / "missing", capsys)
    assert "no metrics.jsonl" in refused(tmp_path, capsys)
    for nothing in ("", '{"step": 1, "lr": 0.1}\n', '{"step": 1, "lo'):
        (tmp_path / "metrics.jsonl").write_text(nothing)
        assert "nothing to draw yet" in refused(tmp_path, capsys)
    write_predictions(tmp_path, [])
    assert plot.plot_predictions(tmp_path) is None and not (tmp_path / "predictions.png").exists()


@pytest.mark.parametrize("broken", ["{", "7", "\x00\x00"])
def test_a_broken_line_in_the_middle_is_named(broken, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2}}\n{broken}\n{{"step": 2, "loss": 1}}\n')
    assert "line 2 is broken" in refused(tmp_path, capsys)


@pytest.mark.parametrize("bad", [
    {"a": 1}, [3], [entry([[1]], None) | {"truth": None}], [entry([[1]], [[1, 2], [3]])], [entry([[1]], [[0.5]])],
    [entry([[1]], 5)], [entry([], [[1]])], [entry([[1]], [[1]]) | {"test": math.inf}],
])  # fmt: skip
def test_bad_predictions_are_refused(bad, tmp_path):
    write_predictions(tmp_path, bad)
    with pytest.raises(UserError, match="predictions.json"):
        plot.plot_predictions(tmp_path)


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    write_metrics(tmp_path)
    before = plot.plot_curves(tmp_path).read_bytes()

    def full(self, file, **_):
        file.write(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot.Figure, "savefig", full)
    assert plot.main([str(tmp_path)]) == 2
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]


# == IN A PROCESS OF ITS OWN ==========================================================================================

ALONE = """
import sys, matplotlib
matplotlib.rcParams.update({"font.size": 31, "text.usetex": True, "axes.titlesize": 40})
before = matplotlib.rcParams.copy()
from tools import plot
plot.plot_run(sys.argv[1])
assert matplotlib.rcParams.copy() == before
print([name for name in ("torch", "train", "matplotlib.pyplot") if name in sys.modules])
"""


def process(*argv, **env) -> tuple[int, str, str]:
    """Exit code, output and errors of a Python without a display."""
    env = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | env
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_it_stands_alone_and_leaves_settings_alone(tmp_path):
    """No torch, no pyplot, no display, no change of the caller's matplotlib settings, whatever those are."""
    write_metrics(tmp_path)
    assert process("-c", ALONE, tmp_path) == (0, "[]\n", "")


def test_any_backend_any_path_and_any_console(tmp_path):
    name = b"caf\xe9 \xff" if sys.platform == "linux" else b"run"
    write_metrics(folder := Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), 1)
    options = dict(MPLBACKEND="nonsense", PYTHONIOENCODING="ascii")
    code, out, err = process("-W", "error", ROOT / "tools" / "plot.py", folder, **options)
    assert code == 0 and out.startswith("wrote ") and err == ""
