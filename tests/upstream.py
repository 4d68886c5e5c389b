"""Code that nobody here wrote, as a reference for ours.

`kernels(request)` runs upstream's own Triton kernels (mamba-ssm, the package of the Mamba-2 paper) on the CPU, under
Triton's interpreter. They live in a subprocess: Triton reads TRITON_INTERPRET once, when it is first imported, and
patching torch.cuda must not reach other tests. The same file is that subprocess:

    python tests/upstream.py REQUEST.pt RESPONSE.pt

The package is a pure-Python wheel, built on first use into the user's cache (about ten seconds) and never installed.
Where it cannot be had, tests skip with the reason, or fail with it if CI=true or REQUIRE_KERNELS=1.

`granite()` is transformers' GraniteMoeHybrid, always on its PyTorch code, whatever kernels are installed.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
import zipfile
from pathlib import Path

import pytest
import torch

VERSION = "2.3.2.post1"
NEEDS = ("triton", "einops", "packaging", "huggingface_hub")  # to import the kernels and the Mamba2 module
NEEDS_TO_BUILD = ("pip", "setuptools", "wheel", "packaging", "ninja")


class Unavailable(Exception):
    """Upstream's kernels cannot run here; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# In the test process


def kernels(request: dict) -> dict:
    """Upstream's answers to {"scans": [...], "layers": [...]}; where its kernels cannot run, the test skips or fails.

    A scan is {"tensors": {x, dt, A, B, C, ...}, "options": {chunk_size, ...}, "gradients": {"y", maybe "final_states"}}
    and is answered with {"outputs": {...}, "gradients": {by input}}. A layer is {"options", "state_dict", "u",
    "gradient"} and is answered with {"initial": its own state dict, "y", "gradients": {by parameter, and "u"}}.
    What raised is answered with {"error": traceback}.
    """
    try:
        return run(request)
    except Unavailable as error:
        reason = str(error)
    if os.environ.get("CI", "").lower() == "true" or os.environ.get("REQUIRE_KERNELS") == "1":
        pytest.fail(f"upstream's kernels must run here, but cannot: {reason}", pytrace=False)
    pytest.skip(f"upstream's kernels cannot run: {reason}")


def run(request: dict, timeout: float = 900) -> dict:
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"Triton has no wheels for {sys.platform}")
    missing(NEEDS)
    package = package_folder()
    settings = {
        "TRITON_INTERPRET": "1",
        "MAMBA_DETERMINISTIC": "1",  # one autotune configuration, no atomics
        "TRITON_F32_DEFAULT": "ieee",
        "CUDA_VISIBLE_DEVICES": "",
        "UPSTREAM_PACKAGE": str(package),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.pt"), Path(folder, "response.pt")
        torch.save(request, asked)
        done = call([sys.executable, __file__, str(asked), str(answered)], settings, timeout)
        if not answered.exists():
            raise RuntimeError(f"{__file__} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        response = torch.load(answered, weights_only=True)
    if "unavailable" in response:
        raise Unavailable(response["unavailable"])
    return response


def call(command: list[str], settings: dict, timeout: float) -> subprocess.CompletedProcess:
    environment = os.environ | settings
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout
    )


def missing(names) -> None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise Unavailable(f"{', '.join(absent)} not installed (pip install -r requirements-dev.txt)")


def package_folder() -> Path:
    """The folder that holds upstream's `mamba_ssm`: installed, or built on first use; two processes may ask at once."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("mamba-ssm") == VERSION:
            return Path(importlib.util.find_spec("mamba_ssm").submodule_search_locations[0]).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mamba-ssm-pure-python")
    folder = cache / VERSION
    if (folder / "mamba_ssm").is_dir():
        return folder
    missing(NEEDS_TO_BUILD)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    except OSError as error:
        raise Unavailable(f"no place to build mamba-ssm: {error}") from error
    try:
        with zipfile.ZipFile(build_wheel(work)) as wheel:
            wheel.extractall(work / "package")
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            (work / "package").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def build_wheel(work: Path) -> Path:
    """mamba-ssm without CUDA extensions; kept out of pip's cache, where a later, real install would find it."""
    flags = ["--no-deps", "--no-build-isolation", "--no-binary=mamba-ssm", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", str(work), f"mamba-ssm=={VERSION}"]
    try:
        done = call(command, {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise Unavailable("building mamba-ssm took longer than ten minutes") from error
    wheels = list(work.glob("mamba_ssm-*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"mamba-ssm {VERSION} does not build:\n{(done.stdout + done.stderr)[-2000:]}")
    return wheels[0]


def granite() -> types.ModuleType:
    """transformers' modeling_granitemoehybrid on its PyTorch code, even where mamba-ssm is installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a look-up without a network retries for 23 seconds
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


# ---------------------------------------------------------------------------------------------------------------------
# In the subprocess


def import_kernels() -> None:
    """Make upstream's submodules importable without its __init__, which asks for a compiled extension."""
    sys.path.insert(0, os.environ["UPSTREAM_PACKAGE"])
    sys.modules["causal_conv1d"] = None  # an installed one would want a GPU
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=1)


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot even add up a row here (3.6 with numpy 2.4, for one), or None."""
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

    name = f"the interpreter of Triton {triton.__version__} with numpy {numpy.__version__}"
    target = torch.zeros(2)
    try:
        add_up[(2,)](torch.ones(20), target, 20, n=8)
    except Exception as error:
        return f"{name} fails: {error!r}"
    return None if target.tolist() == [20.0, 20.0] else f"{name} gives wrong sums"


def answer_scan(scan: dict) -> dict:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    tensors = {
        name: tensor.requires_grad_() if tensor.is_floating_point() else tensor.int()
        for name, tensor in scan["tensors"].items()
    }
    result = mamba_chunk_scan_combined(**tensors, **scan["options"])
    outputs = dict(zip(("y", "final_states"), result if isinstance(result, tuple) else (result,), strict=False))
    names = list(scan["gradients"])
    torch.autograd.backward([outputs[name] for name in names], [scan["gradients"][name] for name in names])
    return {
        "outputs": {name: output.detach() for name, output in outputs.items()},
        "gradients": {name: tensor.grad for name, tensor in tensors.items() if tensor.is_floating_point()},
    }


def answer_layer(layer: dict) -> dict:
    from mamba_ssm.modules.mamba2 import Mamba2

    theirs = Mamba2(**layer["options"], use_mem_eff_path=False)  # the fused path needs compiled causal-conv1d
    initial = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(layer["state_dict"], strict=True)
    u = layer["u"].requires_grad_()
    y = theirs(u)
    y.backward(layer["gradient"])
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    return {"initial": initial, "y": y.detach(), "gradients": gradients | {"u": u.grad}}


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception:
        return {"error": traceback.format_exc()}


def main(asked: str, answered: str) -> None:
    import_kernels()
    request = torch.load(asked, weights_only=True)
    if fault := interpreter_fault():
        response = {"unavailable": fault}
    else:
        response = {
            "scans": [attempt(answer_scan, scan) for scan in request.get("scans", [])],
            "layers": [attempt(answer_layer, layer) for layer in request.get("layers", [])],
        }
    torch.save(response, answered + ".part")
    os.replace(answered + ".part", answered)


if __name__ == "__main__":
    main(*sys.argv[1:])
