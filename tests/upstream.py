"""Code that nobody here wrote, as a reference for ours, and how far ours is from it.

Upstream's own Triton kernels (mamba-ssm, the package of the Mamba-2 paper) run on the CPU, under Triton's interpreter,
in a process that tests/test_triton.py starts: Triton reads TRITON_INTERPRET when it is first imported, and patching
torch.cuda must not reach other tests. The package is pure Python, built on first use into the user's cache (about ten
seconds) and never installed. Where it cannot be had, tests skip with the reason, or fail with it if CI=true or
REQUIRE_KERNELS=1.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

VERSION = "2.3.2.post1"
NEEDS = ("triton", "einops", "packaging", "huggingface_hub")  # to import the kernels and the Mamba2 module
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(reason: str) -> None:
    """Skip, or fail where the kernels must run."""
    if os.environ.get("CI", "").lower() == "true" or os.environ.get("REQUIRE_KERNELS") == "1":
        pytest.fail(f"Triton's kernels must run here, but cannot: {reason}", pytrace=False)
    pytest.skip(f"Triton's kernels cannot run: {reason}")


def settings() -> dict[str, str]:
    """The environment of a process in which Triton and upstream's kernels are interpreted."""
    if not sys.platform.startswith("linux"):
        unavailable(f"Triton has no wheels for {sys.platform}")
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        unavailable(f"{', '.join(absent)} not installed (pip install -r requirements-dev.txt)")
    try:
        package = package_folder()
    except (OSError, subprocess.SubprocessError) as error:
        unavailable(f"mamba-ssm {VERSION} does not build: {error}\n{getattr(error, 'stderr', None) or ''}")
    return {
        "TRITON_INTERPRET": "1",
        "MAMBA_DETERMINISTIC": "1",  # one autotune configuration, no atomics
        "TRITON_F32_DEFAULT": "ieee",
        "CUDA_VISIBLE_DEVICES": "",
        "UPSTREAM_PACKAGE": str(package),
    }


def call(*command: object, timeout: float, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), env=os.environ | settings, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=timeout)  # fmt: skip


def package_folder() -> Path:
    """The folder that holds upstream's `mamba_ssm`: installed, or built on first use; two processes may ask at once."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("mamba-ssm") == VERSION:
            return Path(importlib.util.find_spec("mamba_ssm").submodule_search_locations[0]).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mamba-ssm-pure-python")
    folder = cache / VERSION
    if (folder / "mamba_ssm").is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:  # without CUDA extensions, and out of pip's cache, where a later, real install would find it
        call(sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-binary=mamba-ssm",
             "--no-cache-dir", "--target", work / "package", f"mamba-ssm=={VERSION}", timeout=600,
             MAMBA_SKIP_CUDA_BUILD="TRUE", MAMBA_FORCE_BUILD="TRUE").check_returncode()  # fmt: skip
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            (work / "package").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


@pytest.fixture(scope="module", autouse=INTERPRETED)
def interpreter():
    """For a file that imports this: in the process with these settings, upstream's submodules can be imported."""
    if fault := interpreter_fault():
        unavailable(fault)
    if "mamba_ssm" in sys.modules:
        return
    sys.path.insert(0, os.environ["UPSTREAM_PACKAGE"])
    sys.modules["causal_conv1d"] = None  # an installed one would want a GPU
    package = types.ModuleType("mamba_ssm")  # without its __init__, which asks for a compiled extension
    package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=1)


def interpreter_fault() -> str:
    """Why Triton's interpreter cannot even add up a row here (3.6 with numpy 2.4, for one), or nothing."""
    import numpy
    import triton
    import triton.language as tl

    @triton.jit
    def add_up(source, target, count, n: tl.constexpr):
        total = tl.zeros((n,), dtype=tl.float32)
        for begin in range(0, count, n):
            index = begin + tl.arange(0, n)
            total += tl.load(source + index, mask=index < count, other=0.0)
        tl.store(target + tl.program_id(0), tl.sum(total))

    target, error = torch.zeros(2), "wrong sums"
    try:
        add_up[(2,)](torch.ones(20), target, 20, n=8)
    except Exception as raised:
        error = repr(raised)
    good = target.tolist() == [20.0, 20.0]
    return "" if good else f"the interpreter of Triton {triton.__version__} with numpy {numpy.__version__}: {error}"


def granite() -> types.ModuleType:
    """transformers' modeling_granitemoehybrid on its PyTorch code, even where mamba-ssm is installed."""
    reason = "needs transformers (pip install -r requirements-dev.txt, Python >= 3.11)"
    modeling = pytest.importorskip("transformers.models.granitemoehybrid.modeling_granitemoehybrid", reason=reason)
    for name, function in vars(modeling).copy().items():
        if name.startswith(("mamba2_", "causal_conv1d_")):
            setattr(modeling, name, getattr(function, "__wrapped__", function))
    return modeling


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights at which every parameter counts: matrices keep the scale of what they read, nothing is left at 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if name.endswith(("A_log", "dt_bias")):
                parameter += 0.3 * noise
            elif parameter.dim() == 1:  # norms, D, the convolution's bias
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def relative_error(ours: torch.Tensor, reference: torch.Tensor, least: float = 1e-6) -> float:
    """Norm of the difference over that of the reference, or `least`. NaN where ours is not finite: no bound holds."""
    ours, reference = ours.detach().double(), reference.detach().double()
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    return ((ours - reference).norm() / reference.norm().clamp(min=least)).item()


def results(function: Callable, tensors: dict, hears=("y",), **options) -> tuple[dict, dict]:
    """Outputs, "y" and perhaps "final_states", and the gradients of all inputs, by name.

    The loss hears of some of the outputs, with random weights that are always the same.
    """
    tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    found = function(**tensors, **options)
    outputs = dict(zip(("y", "final_states"), found if isinstance(found, tuple) else (found,), strict=False))
    heard, inputs = [outputs[name] for name in hears], {name: t for name, t in tensors.items() if t.requires_grad}
    weights = [torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v) for v in heard]
    gradients = torch.autograd.grad(heard, list(inputs.values()), weights, materialize_grads=True)
    return {name: v.detach() for name, v in outputs.items()}, dict(zip(inputs, gradients, strict=True))


def assert_close(found: tuple, expected: tuple, forward: float, backward: float, share: float = 0.0) -> None:
    """Relative errors of the `results`, each relative to at least a share of the largest."""
    for ours, reference, bound in zip(found, expected, (forward, backward), strict=True):
        assert ours.keys() == reference.keys()
        least = max(1e-6, share * max(v.double().norm().item() for v in reference.values()))
        errors = {name: relative_error(ours[name], reference[name], least) for name in ours}
        assert all(error <= bound for error in errors.values()), f"relative errors {errors}, allowed {bound}"
