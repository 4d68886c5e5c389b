"""bench/faults.py in small: runs killed, starved of disk and memory, poisoned, stopped and fed damaged files."""

import importlib.util
import json
import os
import random
import sys

import pytest
import torch
from helpers import ROOT, python

spec = importlib.util.spec_from_file_location("faults", ROOT / "bench" / "faults.py")
faults = importlib.util.module_from_spec(spec)
if sys.platform.startswith("linux"):
    spec.loader.exec_module(faults)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, limits and signals of Linux")
SEED = 5


def break_it(folder, *argv) -> dict:
    """The figures of `python bench/faults.py` with these arguments, by part."""
    script = python(ROOT / "bench" / "faults.py", *argv, "--seed", SEED, "--results", folder, cwd=folder)
    out, err = script.communicate(timeout=900)
    assert (file := next(folder.glob("*-faults.json"), None)), out + err
    return {name: values[f"seed {SEED}"] for name, values in json.loads(file.read_text()).items() if name != "machine"}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Four parts, each a few times, once for the tests below."""
    parts = ["kills", "disk", "memory", "numbers"]
    return break_it(tmp_path_factory.mktemp("faults"), "--only", *parts, "--times", "2")


@pytest.mark.parametrize("part", ["kills", "disk", "memory", "numbers"])
def test_promises_are_kept(part, figures):
    assert figures[part]["broken"] == []


@pytest.mark.slow
def test_signals_and_second_runs(tmp_path):
    found = break_it(tmp_path, "--only", "folder", "signals", "--times", "6")
    assert found["folder"]["broken"] == found["signals"]["broken"] == []


def test_kills_happened_and_ends_were_compared(figures):
    assert figures["kills"]["kills"] == 2 and figures["kills"]["runs ended, all equal to the last bit"] >= 2


def test_memory_ran_out(figures):
    assert figures["memory"]["pieces cut"] >= 1 and figures["memory"]["largest relative difference of a loss"] < 1e-5


def test_damaged_files(tmp_path):
    """Those that chance finds too seldom, and a few by chance; the generator makes a thousand others likewise."""
    found = break_it(tmp_path, "--only", "damages", "--times", str(len(faults.HARD) + 15))["damages"]
    assert found["broken"] == [] and found["tracebacks"] == 0
    assert found["exit codes"].keys() <= {"0", "2"} and found["exit codes"]["2"] > 20


@pytest.mark.slow
def test_several_processes(tmp_path):
    found = break_it(tmp_path, "--only", "ranks", "--times", "1")["ranks"]
    assert found["broken"] == [] and max(found["the job is over after seconds"]) < 60


# ---------------------------------------------------------------------------------------------------------------------
# The instrument itself: what it would miss, nobody would see


def test_a_bomb_goes_off_where_pickles_are_trusted(tmp_path):
    torch.save({"step": faults.Bomb(tmp_path / "bomb")}, tmp_path / "checkpoint.pt")
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "bomb").is_dir()


@pytest.mark.parametrize(
    "one, other",
    [
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, -0.0])}),
        ([1, 2.0], [1, 2]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)]),
        ((1, 2), (1,)),
    ],
    ids=["a bit", "a type", "a key", "a dtype", "a length"],
)
def test_any_difference_is_seen(one, other):
    assert faults.unequal(one, other) and not faults.unequal(one, one) and not faults.unequal(other, other)


def test_every_damage_changes_its_file(tmp_path):
    rng = random.Random(SEED)
    for i in range(200):
        path = tmp_path / f"{i}.json"
        path.write_text(before := json.dumps({"train": [{"input": [[1, 2]], "output": [[3]]}], "test": []}))
        how = rng.choice((faults.damage_bytes, faults.damage_json, faults.damage_file))(path, rng)
        assert path.is_symlink() or not path.is_file() or not os.stat(path).st_mode & 0o777 or (
            path.read_bytes() != before.encode() or how.startswith(("flipped", "header", "zeros", "line"))
        ), how


def test_a_child_that_hangs_or_dies_is_told_apart(tmp_path):
    hangs = faults.Child([], tmp_path, main=lambda argv: signal_pause())
    assert hangs.end(0.2) == 99
    dies = faults.Child([], tmp_path, main=lambda argv: 1 / 0)
    assert dies.end() == 70 and "ZeroDivisionError" in dies.err
    assert "exit code 70" in faults.judge(dies, 70, tmp_path, tmp_path / "x")
    fine = faults.Child([], tmp_path, main=lambda argv: print("x.py: bad.json: damaged", file=sys.stderr) or 2)
    assert fine.end() == 2 and faults.judge(fine, 2, tmp_path, tmp_path / "bad.json") == ""
    assert "does not name" in faults.judge(fine, 2, tmp_path / "case", tmp_path / "case" / "good.json")


def signal_pause():
    import signal

    signal.pause()
