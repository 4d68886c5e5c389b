"""The recipes for other machines: Docker, conda, GitHub's machines, and what Windows and macOS lack."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TINY, copy_small_tasks, metrics, python

checkout = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="the image holds no recipes")
CODE = [f for part in (".", "arc_data", "data", "extras", "tools") for f in sorted((ROOT / part).glob("*.py"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, one (instruction, arguments) each, comments gone and continued lines joined."""
    text = "\n".join(line for line in read("Dockerfile").splitlines() if not line.lstrip().startswith("#"))
    found = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in found]


def copied() -> list[tuple[list[str], str]]:
    """What the Dockerfile copies, and where to."""
    lines = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [(line[:-1], line[-1]) for line in lines]


@checkout
def test_dockerfile(tmp_path):
    found = instructions()
    assert re.fullmatch(r"BASE=pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-devel", found[0][1])
    (user,) = (rest for name, rest in found if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "not root, and by id"
    code = found.index(("COPY", ". ."))
    assert "RUN" not in [name for name, _ in found[code:]], "a change of the code would rebuild a layer"
    for sources, target in copied()[:-1]:
        (tmp_path / target).mkdir(exist_ok=True)
        for file in (file for source in sources for file in ROOT.glob(source)):
            shutil.copy(file, tmp_path / target)
    scripts = re.findall(r"python (\S+\.py)", " ".join(rest for name, rest in found[:code] if name == "RUN"))
    for script in set(scripts):  # with the files that are there by then
        subprocess.run([sys.executable, "-E", script, "--help"], cwd=tmp_path, check=True, capture_output=True)


@checkout
def test_dockerignore_is_a_whitelist_that_holds_the_code():
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(re.fullmatch("!.*[^/]", line) for line in lines[1:])
    allowed = {path for line in lines[1:] for path in ROOT.glob(line[1:])}
    patterns = [pattern for patterns, _ in copied() for pattern in patterns if pattern != "."]
    wanted = [*CODE, *(path for pattern in patterns for path in ROOT.glob(pattern))]
    missing = [path for path in wanted if not allowed & {path, *path.parents}]
    assert not missing, f"{missing} do not reach the image"
    ignored = {"!" + line[1:] for line in read(".gitignore").splitlines() if line.startswith("/") and "*" not in line}
    assert not ignored & set(lines)


@checkout
def test_one_version_of_mamba_ssm_everywhere():
    files = ["Dockerfile", "tools/doctor.py", "README.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))]
    found = {name: set(re.findall(r"mamba-ssm==([\w.]+)", read(name))) for name in files}
    found["tests/upstream.py"] = set(re.findall(r'^VERSION = "(.*)"', read("tests/upstream.py"), re.MULTILINE))
    assert set.union(*found.values()) == {"2.3.2.post1"}, found
    assert found["Dockerfile"] and found["tools/doctor.py"] and found["tests/upstream.py"]


@checkout
def test_workflow():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert {"run": ".ci/run"} in steps and (os.name == "nt" or os.access(ROOT / ".ci" / "run", os.X_OK))
    scripts = re.findall(r"python (\S+\.py)", " ".join(step.get("run", "") for step in steps))
    assert scripts and all((ROOT / script).exists() for script in scripts)


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


def test_text_is_read_and_written_as_utf8():
    """Windows takes its own code page where no encoding is named."""
    calls = re.compile(r"(\.read_text\(|\.write_text\(|(?<!def )(?<![\w.])open\()(.*)")
    for path in CODE:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if call := calls.search(line):
                assert re.search(r'utf-8|"[rwa]b\+?"', call[2]), f"{path.name}:{i} names no encoding: {line.strip()}"
