"""What only a machine with an NVIDIA GPU can show. Elsewhere these tests skip with the reason, or, where a GPU is
expected (REQUIRE_GPU=1, as in docs/install.md's Docker recipe), fail with it.
"""

import gc
import os

import pytest
import torch
from helpers import TINY, copy_small_tasks, metrics, python, run
from test_scan import make
from upstream import relative_error

import train
from data.files import UserError

gpu = pytest.mark.gpu
# Triton multiplies fp32 as TF32 by default. It asks when it compiles a kernel, so this holds for the whole process.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def unavailable(why: str) -> None:
    """Skip, or fail where a GPU and its kernels must be there."""
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(f"REQUIRE_GPU=1, but {why}; python tools/doctor.py says what mends it", pytrace=False)
    pytest.skip(why)


@pytest.fixture
def cuda():
    """The first GPU, with full fp32 products for the length of a test."""
    if not torch.cuda.is_available():
        unavailable(f"torch {torch.__version__} sees no CUDA device")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda", 0)
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def triton_scan(cuda):
    """The scan with upstream's kernels, as `--kernels triton` picks it."""
    try:
        return train.pick_ops(cuda, torch.float32, "triton").ssd_scan
    except UserError as error:
        unavailable(str(error))


@gpu
def test_torch_sees_the_gpu(cuda):
    assert torch.cuda.device_count() >= 1
    assert torch.cuda.get_device_capability(cuda) >= (7, 0), "Triton needs capability 7.0 or newer"
    free, total = torch.cuda.mem_get_info(cuda)
    assert 0 < free <= total


@gpu
def test_a_product_of_matrices(cuda):
    a, b = torch.randn(2, 256, 256, dtype=torch.float64).unbind()
    assert relative_error((a.float().to(cuda) @ b.float().to(cuda)).cpu(), a @ b) < 1e-5


@gpu
def test_bf16(cuda):
    if torch.cuda.get_device_capability(cuda) < (8, 0):
        pytest.skip("this GPU has no bf16 units; train.py computes in fp32 there")
    a, b = torch.randn(2, 256, 256, dtype=torch.float64).unbind()
    product = a.to(cuda, torch.bfloat16) @ b.to(cuda, torch.bfloat16)
    assert product.dtype == torch.bfloat16 and relative_error(product.cpu(), a @ b) < 1e-2


def run_scan(scan, tensors, options, device):
    """y and the gradients of every input, all on the CPU, under a cotangent that is always the same."""
    inputs = {k: t.to(device, copy=True).requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    y = scan(**inputs, chunk_size=64, **options)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device))
    return {"y": y} | {f"gradient of {k}": t.grad for k, t in inputs.items() if t.grad is not None}


@gpu
@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("packed", [False, True], ids=["one sequence a row", "packed"])
def test_kernels_equal_the_pytorch_scan(length, packed, cuda, triton_scan):
    """Forward and every gradient, fp32, at the sizes of a small model."""
    ids = torch.arange(length).div(70, rounding_mode="floor").expand(2, -1).contiguous() if packed else None
    tensors, options = make(length, seq_idx=ids, sizes=(2, 8, 64, 64))
    theirs = run_scan(triton_scan, tensors, options, cuda)
    for where in (cuda, torch.device("cpu")):
        ours = run_scan(train.ssd_scan, tensors, options, where)
        assert ours.keys() == theirs.keys()
        errors = {name: relative_error(ours[name].cpu(), theirs[name].cpu()) for name in ours}
        assert all(error < (1e-4 if name == "y" else 5e-4) for name, error in errors.items()), (where, errors)


@gpu
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


@pytest.mark.parametrize("required", [False, True])
def test_without_a_gpu_they_skip_or_fail_with_the_reason(required, tmp_path):
    """REQUIRE_GPU itself, tried in processes that see no GPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "REQUIRE_GPU": "1" if required else "", "OMP_NUM_THREADS": "1"}
    argv = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-k", "sees_the_gpu", __file__]
    out, _ = (process := python(*argv, cwd=tmp_path, env=env)).communicate(timeout=120)
    assert process.returncode == (1 if required else 0), out
    assert ("1 error" if required else "1 skipped") in out and "sees no CUDA device" in out
    assert ("doctor.py" in out) == required
