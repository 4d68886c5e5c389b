"""bench/faults.py in small: runs killed, starved of disk and stopped by signals."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers import ROOT, python

linux = sys.platform.startswith("linux")
spec = importlib.util.spec_from_file_location("faults", ROOT / "bench" / "faults.py")
faults = importlib.util.module_from_spec(spec)
if linux:
    spec.loader.exec_module(faults)

pytestmark = pytest.mark.skipif(not linux, reason="forks, limits and signals of Linux")


def break_it(folder, *argv) -> dict:
    """The figures of `python bench/faults.py` with these arguments, by part."""
    script = python(ROOT / "bench" / "faults.py", *argv, "--seed", 5, "--results", folder, cwd=folder)
    out, err = script.communicate(timeout=900)
    assert (file := next(folder.glob("*-faults.json"), None)), out + err
    return {name: values for name, values in json.loads(file.read_text()).items() if name != "machine"}


def test_promises_are_kept(tmp_path):
    found = break_it(tmp_path, "--only", "kills", "disk", "signals", "--times", "2")
    assert [values["broken"] for values in found.values()] == [[], [], []]
    assert found["kills"]["kills"] == 2 and found["kills"]["runs ended, all equal to the last bit"] >= 2
    assert found["disk"]["refused with exit code 2"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ranks", "streams"])
def test_several_processes_and_closed_streams(part, tmp_path):
    assert break_it(tmp_path, "--only", part, "--times", "1")[part]["broken"] == []


# ---------------------------------------------------------------------------------------------------------------------
# The instrument itself: what it would miss, nobody would see


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


def test_a_child_that_hangs_or_dies_is_told_apart(tmp_path):
    hangs = faults.Child([], tmp_path, lambda: faults.time.sleep(300))
    assert hangs.end(0.2) == 99
    dies = faults.Child([], tmp_path, lambda: 1 / 0)
    assert dies.end() == 70 and "ZeroDivisionError" in dies.err
    fine = faults.Child(["--resume", "--out-dir", "nowhere"], tmp_path, faults.quick)
    assert fine.end() == 2 and "there is no run in this folder" in fine.err
