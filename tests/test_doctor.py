"""doctor.py on this machine, and on machines that lack something or have it broken."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, python, write_shard

import doctor
import train


@pytest.fixture
def checkout(tmp_path):
    """A copy of what doctor.py looks at, without data, that a test may change."""
    folder = tmp_path / "check out"
    for name in ("doctor.py", "train.py", "requirements.txt", "arc_data/prepare.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def examine(folder: Path, *options, packages: Path | None = None, **env) -> tuple[int, str]:
    """Exit code and screen of `python doctor.py`; what `packages` holds is found before what is installed."""
    env = os.environ | {"PYTHONPATH": str(packages or ""), "OMP_NUM_THREADS": "1"} | env
    out, err = (process := python(*options, folder / "doctor.py", cwd=folder, env=env)).communicate(timeout=300)
    assert err == "" and "Traceback" not in out, err
    assert out.isascii() and len(out.splitlines()) <= 40, "more than one screen"
    return process.returncode, out


def lines(out: str) -> dict[str, str]:
    """The screen by the names of its lines."""
    return {line[:15].strip(): line[15:] for line in out.splitlines() if line[:1].strip() and line[14:15] == " "}


def stand_in(folder: Path, name: str, code: str) -> None:
    """A module that does this instead of what it should."""
    path = folder / (name.replace(".", "/") + ".py")
    for parent in [p for p in path.parents if folder in p.parents]:
        parent.mkdir(parents=True, exist_ok=True)
        (parent / "__init__.py").touch()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)


def test_this_machine():
    code, out = examine(ROOT)
    shown = lines(out)
    assert code == 0 and "Training can run here" in out
    assert shown["torch"].startswith(torch.__version__) and np.__version__ in shown["packages"]
    assert {"system", "python", "triton", "mamba-ssm", "causal-conv1d", "kernels", "scan", "arc tasks"} <= shown.keys()
    if not torch.cuda.is_available():
        assert "PyTorch scan" in shown["scan"]


def test_without_any_package(checkout):
    """-S hides site-packages: torch and all the others are really not there."""
    code, out = examine(checkout, "-S")
    assert code == 1 and "not installed: torch, numpy" in out and "pip install -r requirements.txt" in out
    assert lines(out)["torch"] == "not installed" and lines(out)["arc tasks"].startswith("none yet")


@pytest.mark.parametrize("name", ["torch", "numpy", "tqdm"])
def test_a_needed_package_that_does_not_import(name, checkout, tmp_path):
    stand_in(tmp_path / "broken", name, "raise OSError('libsomething.so.1: cannot open shared object file')")
    code, out = examine(checkout, packages=tmp_path / "broken")
    assert code == 1 and f"{name} does not import" in out and "--force-reinstall" in out
    assert "OSError: libsomething.so.1: cannot open shared object file" in out


def test_kernels_that_do_not_load_are_no_obstacle(checkout, tmp_path):
    what = "RuntimeError('undefined symbol: _ZN3c10')"
    stand_in(tmp_path / "broken", "mamba_ssm.ops.triton.ssd_combined", f"raise {what}")
    code, out = examine(checkout, packages=tmp_path / "broken")
    assert code == 0 and lines(out)["kernels"] == "do not load: RuntimeError: undefined symbol: _ZN3c10"


def test_kernels_that_load(checkout, tmp_path):
    stand_in(tmp_path / "whole", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined = print")
    assert lines(examine(checkout, packages=tmp_path / "whole")[1])["kernels"] == "load"


def test_data(checkout):
    (checkout / "data").mkdir()
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
    assert "delete data/train_2.bin" in out


@pytest.fixture
def report():
    return doctor.Report()


def test_a_gpu_that_cannot_compute(report, monkeypatch):
    """A card newer than the torch: everything looks well until the first product."""

    def ones(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
    monkeypatch.setattr(torch, "ones", ones)
    doctor.look_at_gpu(report, torch, 0)
    screen = "\n".join(report.lines)
    assert "Tesla T4, capability 7.5 (no bf16 units, trains in fp32), 10.0 of 16.0 GiB free" in screen
    assert "no kernel image is available" in screen and not report.can_train
    assert "--device cpu" in report.problems[0][1]


@pytest.mark.parametrize(
    "built, words", [(None, "this torch is built for the CPU"), ("13.0", "torch cannot use it")], ids=["cpu", "cuda"]
)
def test_a_gpu_that_torch_does_not_use(built, words, report, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "output", lambda *command: "580.65.06, NVIDIA L4, 23034 MiB")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.look_at_torch(report)
    assert report.can_train and words in report.problems[0][0]
    assert "580.65.06" in "\n".join(report.lines)


def test_a_part_that_fails_is_a_line(report):
    doctor.guarded(report, "machine", lambda report: 1 / 0)
    assert report.lines == ["machine        could not be examined: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize(
    "have, wanted, fits",
    [("2.13.0+cpu", ">=2.9,<2.14", True), ("2.8.1", ">=2.9,<2.14", False), ("2.14.0", ">=2.9,<2.14", False),
     ("2.14.0a0+git1", ">=2.9,<2.14", False), ("1.0.1", "==1.0.1", True), ("10.0", ">=9.5", True), ("1", "", True)],
)  # fmt: skip
def test_versions(have, wanted, fits):
    assert doctor.satisfies(have, wanted) == fits


def test_it_takes_no_flags_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--nonsense"])
    assert stop.value.code == 2 and "--nonsense" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# --memory

SMALL = ["--preset", "nano", "--pattern", "MA", "--d-model", "32", "--n-head", "2", "--d-state", "8", "--headdim", "16",
         "--d-ff", "64", "--block-size", "512", "--device", "cpu"]  # fmt: skip
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a CPU is measured on Linux only")


@linux
def test_memory_is_measured(tmp_path):
    """What it prints is the model's size, and what steps on 1 and 2 sequences take; more take more."""
    argv = [ROOT / "doctor.py", "--memory", *SMALL, "--dataset", "fineweb", "--batch-size", "2"]
    out, err = (process := python(*argv, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    cfg = train.make_config(dict(dataset="fineweb", preset="nano", pattern="MA", d_model=32, n_head=2, d_state=8,
                                 headdim=16, d_ff=64, block_size=512), False)[0]  # fmt: skip
    size = sum(p.numel() for p in train.GPT(cfg).parameters())
    assert f"{size:,} parameters" in out and f"weights        {4 * size / 1e6:,.1f} MB" in out
    rows = re.findall(r"^ +(\d+) +([\d,]+) MB +([\d,]+) MB +[\d.]+ s$", out, re.M)
    assert [int(n) for n, _, _ in rows] == [1, 2, 1, 2] and "fits           2 sequences at a time, 2 with" in out
    assert all(int(peak.replace(",", "")) > int(grown.replace(",", "")) > 0 for _, grown, peak in rows)


@pytest.mark.parametrize("fits, code, words", [(2, 0, "fits           2 sequences at a time, 4 with --remat"),
                                               (0, 1, "not one sequence fits")])  # fmt: skip
def test_memory_that_does_not_suffice(fits, code, words, monkeypatch, capsys):
    """As if memory ran out beyond `fits` sequences, and beyond twice as many with --remat."""
    monkeypatch.setattr(sys, "platform", "linux")

    def measured(model_cfg, cfg, rows, remat):
        kept = 5_000_000 // (1 + remat)
        found = {"optimizer": 8e6, "kept": kept, "grown": rows * kept, "peak": 1e8 + rows * kept, "seconds": 0.1}
        return found if rows <= fits * (1 + remat) else None

    monkeypatch.setattr(doctor, "measured", measured)
    assert doctor.main(["--memory", *SMALL]) == code
    out = capsys.readouterr().out
    assert words in out and out.count("does not fit") == 2
    if fits:
        assert "activations    5.0 MB a sequence, 2.5 MB a sequence with --remat" in out


@linux
def test_memory_stops_before_the_machine_does(monkeypatch, capsys):
    """Sixteen sequences would take more than is free: they are not tried."""
    monkeypatch.setattr(train, "free_memory", lambda: 60e6)
    tried = []

    def measured(model_cfg, cfg, rows, remat):
        tried.append(rows)
        return {"optimizer": 8e6, "kept": 5e6, "grown": rows * 5e6, "peak": rows * 5e6, "seconds": 0.1}

    monkeypatch.setattr(doctor, "measured", measured)
    assert doctor.main(["--memory", *SMALL]) == 0
    assert tried == [1, 2, 4, 8] * 2 and "   16   not tried: about 0.1 GB, with 0.1 GB free" in capsys.readouterr().out


def test_memory_refuses_what_train_would_refuse(capsys):
    assert doctor.main(["--memory", "--preset", "none"]) == 2
    assert "doctor.py: --preset 'none' is none of arc's" in capsys.readouterr().err
