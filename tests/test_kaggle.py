"""The notebook for the competition: its cells, run one after another on a few tasks with tiny budgets."""

import json
import shutil

import numpy as np
from helpers import ROOT, TINY, copy_small_tasks

from solve import read_questions, read_submission


def competition(tasks, folder):
    """The competition's files: training with answers, test without."""
    folder.mkdir(parents=True)
    for split, ours in (("training", "training"), ("evaluation", "test")):
        asked = {file.stem: json.loads(file.read_text()) for file in (tasks / split).iterdir()}
        answers = {name: [test.pop("output") for test in task["test"]] for name, task in asked.items()}
        (folder / f"arc-agi_{ours}_challenges.json").write_text(json.dumps(asked))
        if ours == "training":
            (folder / f"arc-agi_{ours}_solutions.json").write_text(json.dumps(answers))


def test_the_notebook_goes_from_the_files_to_a_submission(arc_dir, tmp_path, monkeypatch):
    """From scratch, and again with the run of the first time attached."""
    notebook = json.loads((ROOT / "arc_data" / "kaggle.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    attached = tmp_path / "input"
    competition(copy_small_tasks(arc_dir, tmp_path / "small", training=6, evaluation=3), attached / "competition")
    for name in ("extras", "data", "arc_data", "tools", "tests/old_run"):  # the last is a run that is not meant
        shutil.copytree(ROOT / name, attached / "code" / name, ignore=shutil.ignore_patterns("arcagi*", "__pycache__"))
    for name in ("train.py", "solve.py"):
        shutil.copy(ROOT / name, attached / "code")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # models so small are slower on several threads
    monkeypatch.setenv("ARC_INPUT", str(attached))
    monkeypatch.setenv("ARC_TRAIN", " ".join([*TINY, "--block-size", "600", "--max-steps", "2"]))
    monkeypatch.setenv("ARC_SOLVE", "--views 2 --device cpu")
    monkeypatch.setenv("ARC_ADAPT", "--ttt-steps 1")
    questions, truths = read_questions(attached / "competition" / "arc-agi_test_challenges.json", None, ())
    assert len(questions) == 3 and all(answer is None for task in truths.values() for answer in task)
    for work in (tmp_path / "first", tmp_path / "again"):
        work.mkdir()
        monkeypatch.setenv("ARC_WORK", str(work))
        scope = {}
        for cell in cells:
            exec(compile(cell, "kaggle.ipynb", "exec"), scope)
        submission = read_submission(work / "submission.json", questions, set())
        assert all(isinstance(grid, np.ndarray) for task in submission.values() for pair in task for grid in pair)
        if work.name == "first":
            shutil.copytree(work / "run", attached / "run")
    assert not (work / "run").exists() and (work / "solved" / "adapted.pt").exists()
