"""tools/doctor.py on this machine, and on machines that lack something or have it broken."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, complaint, python, write_shard

from data.files import UserError
from tools import doctor


@pytest.fixture
def checkout(tmp_path):
    """A copy of what doctor.py looks at, without data, that a test may change."""
    folder = tmp_path / "check out"
    files = [f for part in ("extras", "data", "arc_data", "tools") for f in (ROOT / part).glob("*.py")]
    for file in [ROOT / "train.py", ROOT / "requirements.txt", *files]:
        (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.relative_to(ROOT))
    return folder


def examine(folder: Path, *options, packages: Path | None = None, **env) -> tuple[int, str]:
    """Exit code and screen of `python tools/doctor.py`; what `packages` holds is found before what is installed."""
    env = os.environ | {"PYTHONPATH": str(packages or ""), "OMP_NUM_THREADS": "1"} | env
    process = python(*options, folder / "tools" / "doctor.py", cwd=folder, env=env)
    out, err = process.communicate(timeout=300)
    assert err == "" and "Traceback" not in out, err
    assert len(out.splitlines()) <= 40, "more than one screen"
    return process.returncode, out


def lines(out: str) -> dict[str, str]:
    """The screen by the names of its lines."""
    return {line[:15].strip(): line[15:] for line in out.splitlines() if line[:1].strip() and line[14:15] == " "}


def test_this_machine():
    code, out = examine(ROOT, PYTHONIOENCODING="ascii")
    shown = lines(out)
    assert code == 0 and "Training can run here" in out
    assert shown["torch"].startswith(torch.__version__) and np.__version__ in shown["packages"]
    assert {"commit", "system", "memory", "python", "kernels", "arc tasks", "text shards"} <= shown.keys()
    if not torch.cuda.is_available():
        assert re.match(r"cpu \(\d+ threads\), (float32|bfloat16), CPU functions", shown["trains on"])


def test_without_any_package(checkout):
    """-S hides site-packages: torch and all the others are really not there."""
    code, out = examine(checkout, "-S")
    assert code == 1 and "not installed: torch, numpy" in out and "pip install -r requirements.txt" in out
    assert lines(out)["torch"] == "not installed" and lines(out)["arc tasks"].startswith("none yet")


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_needed_package_that_does_not_import(name, checkout, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{name}.py").write_text("raise OSError('libsomething.so.1: cannot open it')")
    code, out = examine(checkout, packages=tmp_path / "broken")
    assert code == 1 and f"{name} does not import" in out and "--force-reinstall" in out
    assert "OSError: libsomething.so.1: cannot open it" in out


def test_data(checkout):
    write_shard(checkout / "data" / "val_0.npy", range(100))
    write_shard(checkout / "data" / "train_1.bin", range(250))
    (checkout / "data" / "train_2.bin").write_bytes(b"half a shard")
    for split, count in (("training", 2), ("evaluation", 1)):
        (checkout / "arc_data" / "mine" / split).mkdir(parents=True)
        for i in range(count):
            (checkout / "arc_data" / "mine" / split / f"{i}.json").touch()
    code, out = examine(checkout)
    assert code == 0 and lines(out)["arc tasks"] == "arc_data/mine: 2 training, 1 evaluation"
    assert lines(out)["text shards"] == "3 in data: 250 training, 100 validation tokens"
    assert "train_2.bin: not a whole token shard" in out


def test_an_older_python_can_read_it():
    for name in ("tools/doctor.py", "data/files.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.fixture
def report():
    return doctor.Report()


@pytest.mark.parametrize("locked", ["runs", ".", "arc_data"])
def test_training_cannot_run_where_nothing_can_be_written(locked, report, tmp_path, monkeypatch):
    """Not in the folder of runs, which may be mounted, nor in arc_data/ as long as no tasks are there."""
    (tmp_path / "arc_data").mkdir()
    if locked == "runs":
        (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "HERE", tmp_path)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).resolve() != (tmp_path / locked).resolve() and
                        allowed(path, mode))
    doctor.look_at_machine(report)
    assert not report.can_train and f"{(tmp_path / locked).resolve()} cannot be written to" in str(report)
    assert "Training cannot run here" in str(report)


def test_training_cannot_run_on_a_full_disk(report, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6))
    doctor.look_at_machine(report)
    assert "Training cannot run here" in str(report) and "1 MiB" in str(report)


def test_a_gpu_that_cannot_compute(report, monkeypatch):
    """A card newer than the torch: everything looks well until the first product."""

    def ones(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
    monkeypatch.setattr(torch, "ones", ones)
    doctor.look_at_gpu(report, torch, 0)
    assert "Tesla T4, capability 7.5 (no bf16 units, trains in fp16), 10.0 of 16.0 GiB free" in str(report)
    assert "no kernel image is available" in str(report) and not report.can_train
    assert "--device cpu" in report.problems[0][1]


@pytest.mark.parametrize("built, words", [(None, "this torch is built for the CPU"), ("13.0", "torch cannot use it")])
def test_a_gpu_that_torch_does_not_use(built, words, report, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "output", lambda *command: "580.65.06, NVIDIA L4, 23034 MiB")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.look_at_torch(report)
    assert report.can_train and words in report.problems[0][0] and "580.65.06" in str(report)


def test_kernels_that_do_not_work_are_no_obstacle(report, monkeypatch):
    import train

    def pick_ops(device, dtype, asked):
        raise UserError("--kernels triton: undefined symbol; use --kernels auto")

    gpu = train.Runtime(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(gpu, "describe", lambda: "cuda (a stand-in)", raising=False)
    monkeypatch.setattr(train.Runtime, "start", staticmethod(lambda cfg, distributed: gpu))
    monkeypatch.setattr(train, "pick_ops", pick_ops)
    doctor.look_at_ops(report)
    assert report.can_train and "slower: --kernels triton: undefined symbol" in str(report)


def test_a_part_that_fails_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look_at_torch", lambda report: 1 / 0)
    doctor.look_at_torch.__name__ = "look_at_torch"
    for name in ("look_at_packages", "look_at_ops", "look_at_data"):
        monkeypatch.setattr(doctor, name, lambda report: None)
    assert doctor.main([]) == 0
    assert "torch          could not be examined: ZeroDivisionError: division by zero\n" in capsys.readouterr().out


@pytest.mark.parametrize("have, wanted, fits", [
    ("2.13.0+cpu", ">=2.9,<2.14", True), ("2.8.1", ">=2.9,<2.14", False), ("2.14.0a0+git1", ">=2.9,<2.14", False),
    ("1.0.1", "==1.0.1", True), ("10.0", ">=9.5", True), ("1", "", True)])
def test_versions(have, wanted, fits):
    assert doctor.satisfies(have, wanted) == fits


@pytest.mark.parametrize("argv, words", [("--nonsense", "unrecognized arguments: --nonsense"),
                                         ("--memory --preset none", "--preset 'none' is none of arc's"),
                                         ("--memory --device mps", "--memory can measure on")])
def test_wrong_flags_are_one_line(argv, words, capsys):
    assert words in complaint(doctor, capsys, *argv.split())


# == MEMORY ===========================================================================================================

SMALL = [*TINY, "--block-size", "512", "--data-dir", "none"]


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU is measured on Linux only")
def test_memory_is_measured():
    one, more = (doctor.measured(SMALL, rows) for rows in (1, 9))
    assert more["peak"] > one["peak"] > 0 and more["kept"] == one["kept"] > 0 and one["free"] > 0


@pytest.mark.parametrize("peaks, code, words", [
    ({1: 100e6, 3: 140e6}, 0, ["20 MB for each further one: about 46 at a time", "--remat   100 MB for one"]),
    ({1: 100e6}, 0, ["100 MB for one sequence, three do not fit"]), ({}, 1, ["not one sequence fits", "lower"])])
def test_what_fits_is_reckoned(peaks, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    found = {rows: {"peak": peak, "free": 1e9, "kept": 8e6} for rows, peak in peaks.items()}
    monkeypatch.setattr(doctor, "measured", lambda flags, rows: found.get(rows))
    assert doctor.main(["--memory", *SMALL]) == code
    out = capsys.readouterr().out
    assert all(word in out for word in words) and ("optimizer 8.0 MB" in out) == bool(peaks)
