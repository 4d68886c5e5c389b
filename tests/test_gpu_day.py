"""bench/gpu_day.sh and record.sh at toy size on a CPU, so that nothing but the GPU is new on the day there is one."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import TINY, copy_small_tasks

ROOT = Path(__file__).resolve().parent.parent
lacking = [tool for tool in ("bash", "timeout", "realpath", "tar") if not shutil.which(tool)]
reason = f"bench/gpu_day.sh is for Linux; not found here: {', '.join(lacking)}"
needs_linux = pytest.mark.skipif(bool(lacking) or sys.platform != "linux", reason=reason)


def gpu_day(out: Path, python: Path, **more: str) -> tuple[int, dict[str, str], list[str]]:
    """Exit status, how each piece ended, and the files of the archive."""
    env = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    done = subprocess.run(["bash", ROOT / "bench" / "gpu_day.sh", "--smoke", out], env=env, timeout=1500,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    pieces = dict(line.split("\t")[:2] for line in (out / "pieces.tsv").read_text().splitlines())
    with tarfile.open(out / "day.tar.gz") as archive:
        return done.returncode, pieces, [Path(name).name for name in archive.getnames()]


@needs_linux
def test_what_fails_stops_nothing_and_all_is_packed(tmp_path):
    """With a python that does nothing, badly."""
    python, out = tmp_path / "python", tmp_path / "a day"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *parity*) exit 1;; *train.py*) sleep 30;; esac\n')
    python.chmod(0o755)
    code, pieces, packed = gpu_day(out, python, SECONDS_IN_ALL="10")
    assert code == 1 and pieces["parity"] == "1" and pieces["small"] == "0"
    assert pieces["arc"] == "124" and pieces["answers"] == pieces["hf-granite"] == "unstarted"
    assert {"pieces.tsv", "results.jsonl", "parity.log", "arc.log"} < set(packed)


@needs_linux
def test_a_record_and_a_longer_one(tmp_path, arc_dir):
    """bench/record.sh, and again with more minutes: other weights, so all is answered anew."""
    copy_small_tasks(arc_dir, tmp_path / "tasks", 6, 2)
    command = ["bash", ROOT / "bench" / "record.sh", "--preset", "nano", "--views", "1", "--out", tmp_path / "run",
               "--data-dir", tmp_path / "tasks", "--flags", " ".join([*TINY, "--device", "cpu", "--holdout", "0"])]
    steps = []
    for minutes in ("0.01", "0.02"):
        done = subprocess.run([*command, "--train-minutes", minutes], env=os.environ | {"PYTHON": sys.executable},
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "run" / "record.json").read_text())
        steps.append(found["steps"])
        assert found["scores"]["tasks"] + found["scores"]["tasks_left_out"] == 2 and found["hardware"]
        assert found["minutes"]["training"] >= float(minutes)
    assert steps[0] < steps[1]


@needs_linux
@pytest.mark.slow
def test_a_whole_day_at_toy_size(tmp_path, arc_dir):
    """Every piece for real."""
    pytest.importorskip("transformers")
    code, pieces, packed = gpu_day(tmp_path / "day", Path(sys.executable))
    assert code == 0 and set(pieces.values()) == {"0"}, pieces
    assert {"metrics.jsonl", "answers.log"} < set(packed) and "checkpoint.pt" not in packed
    found = [json.loads(line) for line in (tmp_path / "day" / "results.jsonl").read_text().splitlines()]
    assert [r["name"] for r in found] == ["parity", "small", *["gpt2"] * 3, "hf-gpt2", "hf-granite"]
    assert found[0]["ok"] and all(r["tokens_per_second"] > 0 for r in found[1:])
