"""bench/speed.py at toy size: all parts run, peers have as many parameters, and beside busy processes too."""

import json

import pytest
import torch
from helpers import one_thread  # noqa: F401

from bench import speed


@pytest.fixture(autouse=True)
def needs_transformers():
    pytest.importorskip("transformers", reason="needs transformers (pip install -r requirements-dev.txt)")


@pytest.mark.parametrize("size", speed.SIZES.values(), ids=speed.SIZES)
def test_all_have_as_many_parameters(size):
    with torch.device("meta"):
        kinds = ("ours", "GPT-2", "GraniteMoeHybrid")
        ours, gpt2, granite = (speed.count(speed.build(kind, size, 64)) for kind in kinds)
    assert granite == ours and abs(ours / gpt2 - 1) < 0.05


def test_training_and_answers_are_compared(tmp_path, capsys):
    out = tmp_path / "speed.json"
    argv = ["train", "answer", "--size", "toy", "--shapes", "2x40", "--rounds", "1", "--busy", "1", "--out", str(out)]
    assert speed.main([*argv, "--dtypes", "float32"]) == 0
    training, answers = json.loads(out.read_text())["rows"]
    assert training["what"] == "training, 2 x 40 tokens" and len(answers["tokens_per_second"]) == 3
    assert all(value > 0 for row in training["tokens_per_second"].values() for value in row.values())
    assert list(training["tokens_per_second"]["ours, float32"]) == ["0", "1"]
    assert "1.00x  beside 1:" in capsys.readouterr().out


@pytest.mark.skipif(not speed.Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    out = tmp_path / "speed.json"
    argv = ["memory", "--size", "toy", "--shapes", "2x512", "--dtypes", "float32", "--out", str(out)]
    assert speed.main(argv) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert all(value >= 0 for value in row["bytes"].values()) and len(row["bytes"]) == 3


def test_the_step_of_the_first_command(arc_dir, monkeypatch):
    made = speed.train.make_config
    monkeypatch.setattr(speed.train, "make_config",
                        lambda given, has_gpu: made(given | {"data_dir": str(arc_dir), "max_grid": 4}, has_gpu))
    found = speed.nano_step("auto", "float32", 2, steps=1)
    (loss, norm), = found.work()
    assert 0 < loss < 10 and norm > 0 and found.tokens > 0
