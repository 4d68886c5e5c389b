"""tools/views.py: a picture of a task answered view by view."""

import json
import shutil
from pathlib import Path

import pytest

from tools.views import main

NAME = "3c9b0459"


@pytest.fixture
def run(tmp_path, arc_dir):
    """A run that knows one task, by its name."""
    folder, tasks = shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run"), tmp_path / "training"
    tasks.mkdir()
    shutil.copy(arc_dir / "training" / f"{NAME}.json", tasks)
    settings = json.loads((folder / "config.json").read_text())
    settings["train"]["data_dir"] = str(tmp_path)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_task_is_drawn_into_the_folder_of_the_run(run, capsys):
    assert main([str(run), NAME, "--views", "3"]) == 0
    picture = run / f"views-{NAME}-1.png"
    assert capsys.readouterr().out == f"wrote {picture}\n" and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task, more, says", [
    (NAME, ["--test", "2"], "has 1 test inputs"), ("{file}", ["--test", "0"], "has 1 test inputs"),
    ("{file}", ["--views", "0"], "at least 1"), ("{two}", [], "holds 2 tasks"), ("nobody", [], "has no task nobody")])
def test_what_cannot_be_drawn_is_said_in_one_line(run, tmp_path, capsys, task, more, says):
    file, two = tmp_path / "training" / f"{NAME}.json", tmp_path / "arc-agi_test_challenges.json"
    two.write_text(json.dumps(dict.fromkeys("ab", json.loads(file.read_text()))))
    assert main([str(run), task.format(file=file, two=two), *more]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
