"""tools/views.py: a picture of a task answered view by view."""

import json
import shutil
from pathlib import Path

import pytest

from tools.views import main


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run")


def test_a_task_is_drawn_into_the_folder_of_the_run(run, arc_dir, capsys):
    assert main([str(run), str(arc_dir / "training" / "3c9b0459.json"), "--views", "3"]) == 0
    picture = run / "views-3c9b0459-1.png"
    assert capsys.readouterr().out == f"wrote {picture}\n" and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more, says", [
    (["--test", "2"], "has 1 test inputs"), (["--test", "0"], "has 1 test inputs"), (["--views", "0"], "at least 1")])
def test_what_cannot_be_drawn_is_said_in_one_line(run, arc_dir, capsys, more, says):
    assert main([str(run), str(arc_dir / "training" / "3c9b0459.json"), *more]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_file_of_several_tasks_is_said(run, arc_dir, tmp_path, capsys):
    task = json.loads((arc_dir / "training" / "3c9b0459.json").read_text())
    (tmp_path / "arc-agi_test_challenges.json").write_text(json.dumps({"a": task, "b": task}))
    assert main([str(run), str(tmp_path / "arc-agi_test_challenges.json")]) == 2
    assert "holds 2 tasks" in capsys.readouterr().err


def test_an_unknown_task_is_said(run, arc_dir, capsys):
    settings = run / "config.json"
    settings.write_text(settings.read_text().replace("somewhere/else", str(arc_dir)))
    assert main([str(run), "nobody"]) == 2
    assert "has no task nobody" in capsys.readouterr().err
