"""What a checkout promises to those who install, copy or start it: requirements, the image's files, the scripts."""

import ast
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPTS = ["sample.py", *(f"tools/{name}.py" for name in ("plot", "doctor", "export"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["train.py", "solve.py", "sample.py"])
def test_inline_metadata_equals_requirements_txt(script):
    """`uv run` reads the block (PEP 723), pip reads the file."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", read(script))["content"]
    text = re.sub(r"(?m)^# ?", "", block)
    listed = [re.sub(r"\s*#.*", "", line) for line in read("requirements.txt").splitlines()]
    assert ast.literal_eval(re.search(r"dependencies = (\[.*?\])", text, re.DOTALL)[1]) == [s for s in listed if s]
    assert 'requires-python = ">=3.10"' in text and read(script).startswith("# /// script")


@pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="this is no whole checkout")
def test_what_the_dockerfile_copies_is_there_and_hadolint_reads_it():
    copied = [name for line in re.findall(r"(?m)^COPY (.*)$", read("Dockerfile")) for name in line.split()[:-1]]
    assert copied and all(list(ROOT.glob(name)) if name != "." else True for name in copied), copied
    allowed = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    assert all(list(ROOT.glob(pattern)) for pattern in allowed), "a pattern that names nothing"
    assert re.search(r"(?m)^hadolint Dockerfile$", read(".ci/run"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_from_any_folder_beside_packages_of_the_same_names(script, tmp_path):
    for name in ("tools", "data", "arc_data", "extras"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a package of somebody else')")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script} ") and not done.stderr, done.stderr
