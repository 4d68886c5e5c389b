"""What only a machine with an NVIDIA GPU can show. Elsewhere these tests skip with the reason, or, where a GPU is
expected (REQUIRE_GPU=1, as in docs/install.md's Docker recipe), fail with it.
"""

import gc
import os

import pytest
import torch
from helpers import TINY, copy_small_tasks, metrics, run
from test_scan import make
from upstream import assert_close, results

import train
from data.files import UserError

# Triton multiplies fp32 as TF32 by default. It asks when it compiles a kernel, so this holds for the whole process.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def unavailable(why: str) -> None:
    """Skip, or fail where a GPU and its kernels must be there."""
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(f"REQUIRE_GPU=1, but {why}; python tools/doctor.py says what mends it", pytrace=False)
    pytest.skip(why)


def first_gpu() -> torch.device:
    if not torch.cuda.is_available():
        unavailable(f"torch {torch.__version__} sees no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def cuda():
    """The first GPU, with full fp32 products for the length of a test."""
    device, before = first_gpu(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield device
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def triton_scan(cuda):
    """The scan with upstream's kernels, as `--kernels triton` picks it."""
    try:
        return train.pick_ops(cuda, torch.float32, "triton").ssd_scan
    except UserError as error:
        unavailable(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("starts", [None, [(70, 140)] * 2], ids=["one sequence a row", "packed"])
def test_kernels_equal_the_pytorch_scan(length, starts, cuda, triton_scan):
    """Forward and every gradient, fp32, at the sizes of a small model."""
    tensors, options = make(length, starts=starts, sizes=(2, 8, 64, 64))
    found = []
    for device, scan in ((cuda, triton_scan), (cuda, train.ssd_scan), (torch.device("cpu"), train.ssd_scan)):
        there = {name: t.to(device) for name, t in tensors.items()}
        parts = results(scan, there, chunk_size=64, **options)
        found.append([{name: t.cpu() for name, t in part.items()} for part in parts])
    for plain in found[1:]:
        assert_close(plain, found[0], 1e-4, 5e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_training_runs_and_gives_its_memory_back(kernels, cuda, request, arc_dir, tmp_path, monkeypatch):
    """The real command, twice: what a run still holds afterwards does not grow."""
    if kernels == "triton":
        request.getfixturevalue("triton_scan")
    monkeypatch.chdir(tmp_path)
    tasks, held = copy_small_tasks(arc_dir, tmp_path / "tasks"), []
    for name in ("first", "second"):
        more = ["--device", "cuda", "--kernels", kernels, "--max-steps", 2, "--out-dir", name]
        assert run("--data-dir", tasks, *TINY, *more) == 0
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated(cuda))
    losses = [[m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("first", "second")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0][1] < losses[0][0] * 1.5
    assert held[1] <= held[0] + 2**20, f"{held[1] - held[0]:,} bytes more after the second run"


@pytest.mark.parametrize("required", ["", "1"])
def test_without_a_gpu_they_skip_or_fail_with_the_reason(required, monkeypatch):
    monkeypatch.setenv("REQUIRE_GPU", required)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((pytest.fail if required else pytest.skip).Exception, match="sees no CUDA device") as stop:
        first_gpu()
    assert ("doctor.py" in str(stop.value)) == bool(required)
