"""bench/recipe.py: what it holds out, that every variant trains and differs, the clock, voting, and the table."""

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, one_thread, parse_pairs, python, random_tasks, task_json  # noqa: F401

import train
from arc_data.tasks import SHARE_EVALUATION_PAIRS, canonical_hash, read_split
from extras.views import Question

spec = importlib.util.spec_from_file_location("recipe", ROOT / "bench" / "recipe.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

recipe.ANSWER["1d"] = 12  # models of two steps never end a grid; no need to wait for it
TINY = "--d-model 32 --n-head 2 --d-state 8 --headdim 16 --d-ff 16 --max-steps 2 --max-minutes 0"
FAMILIES = ("fill", "flip", "move", "pad", "scale")


def one_d_task(rng: np.random.Generator, wide: int = 10) -> dict:
    """A random 1-D task of three demonstrations and a test."""
    return task_json([rng.integers(0, 10, (2, 1, rng.integers(7, wide))) for _ in range(4)])


def write_one_d(folder: Path) -> Path:
    """Five families of ten tasks, some of which repeat or are too wide."""
    rng = np.random.default_rng(0)
    tasks = {f"{f}_{i}": one_d_task(rng, wide=21 if f == "flip" else 10) for f in FAMILIES for i in range(10)}
    pair = tasks["fill_0"]["train"][0]
    mirrored = {key: [[(9 - c) for c in row[::-1]] for row in pair[key]] for key in pair}
    tasks["move_0"]["test"] = [mirrored]  # a demonstration elsewhere, mirrored and in other colours
    tasks["pad_0"]["test"] = tasks["scale_0"]["test"]
    tasks["pad_1"]["train"][1] = tasks["fill_1"]["train"][2]
    tasks["scale_1"]["test"][0]["input"] = [[0] * 31]
    for name, task in tasks.items():
        (folder / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
        (folder / name.split("_")[0] / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, arc_dir) -> Path:
    """A folder with both data sets; `small` from a copy of ARC-1 that has no evaluation tasks at all."""
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copytree(arc_dir / "training", folder / "arc" / "training")
    recipe.prepare(folder, write_one_d(folder / "source"), arc=folder / "arc")
    return folder


def names(folder: Path) -> set[str]:
    return {f.stem for f in folder.glob("*.json")}


def test_one_d_is_deduplicated(out):
    learned, held = (read_split(out / "1d", split) for split in ("training", "evaluation"))
    pairs = [canonical_hash(p) for t in [*learned.values(), *held.values()] for p in t["train"] + t["test"]]
    assert max(Counter(pairs).values()) == 1
    left_out = {f"{f}_{i}" for f in FAMILIES for i in range(10)} - learned.keys() - held.keys()
    assert left_out == {"move_0", "scale_0", "scale_1"}  # a test seen elsewhere, a test seen before, too wide
    assert len((learned | held)["pad_1"]["train"]) == 2


def test_one_d_holds_out_a_fifth_of_known_families_and_three_whole(out):
    learned, held = names(out / "1d" / "training"), names(out / "1d" / "evaluation")
    groups = json.loads((out / "1d" / "groups.json").read_text())
    assert set(groups["known"]) | set(groups["new"]) == held and not set(groups["known"]) & set(groups["new"])
    family = lambda name: name.split("_")[0]  # noqa: E731
    known, new = ({family(n) for n in groups[g]} for g in ("known", "new"))
    assert len(new) == 3 and len(known) == 2 and known | new == set(FAMILIES)
    assert {family(n) for n in learned} == known
    assert set(Counter(family(n) for n in groups["known"]).values()) == {2}


def test_small_holds_out_a_fifth_of_small_training_tasks(out, arc_dir):
    learned, held = names(out / "small" / "training"), names(out / "small" / "evaluation")
    assert not learned & held and len(held) == (len(learned) + len(held)) // 5
    assert learned | held < names(arc_dir / "training") - set(SHARE_EVALUATION_PAIRS)
    tasks = read_split(out / "small", "training") | read_split(out / "small", "evaluation")
    assert max(train.Task(n, t["train"] + t["test"]).largest() for n, t in tasks.items()) == 10
    supervised = {canonical_hash(p) for n, t in tasks.items() for p in t["train"] + t["test"] * (n in learned)}
    assert not supervised & {canonical_hash(p) for n in held for p in tasks[n]["test"]}


def test_prepare_keeps_what_is_there(out, capsys):
    before = sorted((out / "small").rglob("*"))
    recipe.prepare(out, None, arc=out / "nowhere")
    assert "there already" in capsys.readouterr().out and sorted((out / "small").rglob("*")) == before


@pytest.fixture(scope="module")
def base(out) -> dict:
    return recipe.train_and_measure(out, "1d", "base", 0, 1, TINY)


@pytest.mark.parametrize("name", recipe.VARIANTS)
def test_every_variant_trains_and_makes_a_difference(out, base, name):
    row = recipe.train_and_measure(out, "1d", name, 0, 1, TINY)
    assert row["variant"] == name and row["steps"] == 2 and row["tokens"] > 0 and row["parameters"] > 10_000
    losses = {}
    for group, found in row["groups"].items():
        assert 0 < found["loss"] < 10 and 0 <= found["exact"] <= 1 and 0 <= found["voted"] <= 1
        losses[group] = found["loss"] == base["groups"][group]["loss"]
    assert losses == {"known": name == "base", "new": name == "base"}  # to the last bit


def test_patches_end_with_the_run(base):
    assert train.time is time and train.GPT is recipe.GPT and train.finish.__module__ == "train"


@pytest.mark.parametrize("name", ["aa", "mm"])
def test_patterns_have_equal_parameters(name):
    def count(flags: str) -> int:
        given = vars(train.make_parser().parse_args(f"{recipe.COMMON} {flags}".split()))
        return sum(p.numel() for p in train.GPT(train.make_config(given, has_gpu=False)[0]).parameters())

    assert count(recipe.VARIANTS[name].flags) == pytest.approx(count(""), rel=0.01)


def loader(kind, tasks, **more):
    made = kind(tasks, 4, 1024, task_tokens={t.name: 17 + i for i, t in enumerate(tasks)}, **more)
    made.batches()
    return made


def pairs_of(made, row: int) -> list:
    x, y = made.sequence(row)
    return parse_pairs(np.append(x[1:], train.END))


def test_the_budget_is_cpu_time_of_the_process(out, monkeypatch):
    seconds = itertools.count()  # one more whenever somebody looks
    monkeypatch.setattr(time, "process_time", lambda: float(next(seconds)))
    flags = TINY.replace("--max-steps 2 --max-minutes 0", "")
    row = recipe.train_and_measure(out, "1d", "base", 0, 0.5, flags)
    assert 8 <= row["steps"] <= 15  # two or three looks a step; the wall's clock would allow hundreds


def test_views_are_turned_back(monkeypatch):
    """A model that copies the input it is shown gives, under every view, the query itself."""
    shown = []

    def copy(model, prompts, *sizes):
        shown.extend(parse_pairs([*p[1:], 0, train.ROW, train.END])[-1][0] for p in prompts)
        return [(grid, -1.0) for grid in shown]

    monkeypatch.setattr(train, "answer_prompts", copy)
    model = type("Model", (), {"config": train.ModelConfig(block_size=4096)})
    query = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    question = Question("task", random_tasks(1)[0].pairs, [query])
    (views,) = recipe.answer_views(model, [question], {}, None, 99)
    assert len(views) == 8 and all(np.array_equal(grid, query) for grid, _ in views)
    assert len({grid.tobytes() for grid in shown}) == 8


def test_exact_counts_the_first_view_and_voted_all(out, monkeypatch):
    tasks = read_split(out / "1d", "evaluation")
    right = {name: t["test"][0][1] for name, t in tasks.items()}
    wrong = np.full((2, 2), 9, np.uint8)

    def answers(model, questions, *sizes):
        first = questions[0].name
        return [[(right[q.name] if q.name == first else wrong, -1.0)] + [(right[q.name], -1.0)] * 2 + [(None, 0.0)] * 5
                for q in questions]

    monkeypatch.setattr(recipe, "answer_views", answers)
    groups = recipe.train_and_measure(out, "1d", "base", 0, 1, TINY)["groups"]
    for found in groups.values():
        assert found["exact"] == 1 / found["outputs"] and found["voted"] == 1


def known_row(variant: str, seed: int, loss: float, exact: float) -> dict:
    groups = {"held-out": {"outputs": 40, "loss": loss, "exact": exact, "voted": exact + 0.1}}
    return {"data": "small", "variant": variant, "seed": seed, "minutes": 4, "groups": groups, "steps": 100 + seed,
            "parameters": 1234567, "tokens_per_second": 5.0}


def test_table_of_known_rows(tmp_path, capsys):
    rows = [known_row("base", 0, 0.5, 0.10), known_row("base", 1, 0.7, 0.20), known_row("cosine", 7, 0.25, 0.0),
            *(known_row("task-kept", *row) for row in ((1, 0.4, 0.35), (0, 0.4, 0.15), (2, 0.1, 0.10)))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert recipe.main(["table", "--out", str(tmp_path)]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == ["base", "task-kept", "cosine"]
    assert lines[2][1:7] == ["2", "0.6000 ± 0.1000", "15.0 ± 5.0", "25.0 ± 5.0", "100", "1,234,567"]
    assert lines[3][1:4] == ["3", "0.3000 ± 0.1000 (-0.2000 ± 0.1000)", "20.0 ± 7.6 (+10.0 ± 5.0)"]
    assert lines[3][-1] == "`--data small --variants task-kept --seeds 0 1 2 --minutes 4`"
    assert lines[4][1:4] == ["1", "0.2500", "0.0"]  # no seed in common with base
    assert math.isclose(np.std([15, 35, 10], ddof=1) / 3**0.5, 7.6, abs_tol=0.05)


def test_a_run_is_done_once_and_an_interrupted_one_anew(out):
    torn = out / "runs" / "1d-base-3-0.003"
    torn.mkdir(parents=True)
    (torn / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo')
    argv = ["run", "--data", "1d", "--variants", "base", "--seeds", "3", "--minutes", "0.003", "--out", out]
    for _ in range(2):
        process = python(ROOT / "bench" / "recipe.py", *argv, cwd=out)
        printed = process.communicate()
        assert process.returncode == 0 and "1d base seed 3: " in printed[0], printed
    rows = recipe.read_rows(out)
    assert [(r["variant"], r["seed"]) for r in rows] == [("base", 3)]
    steps = [json.loads(line)["step"] for line in (torn / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, rows[0]["steps"] + 1), rows[0]["steps"]]  # the last is that of the measurement


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_both_processes_and_leaves_no_row(out, number, code):
    seed = 10 + number
    argv = ["run", "--data", "1d", "--variants", "base", "--seeds", seed, "--minutes", "9", "--out", out]
    process = python(ROOT / "bench" / "recipe.py", *argv, cwd=out, start_new_session=True)
    log = out / "runs" / f"1d-base-{seed}-9" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.1)
    if number == signal.SIGINT:  # the terminal sends it to both
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    error = process.communicate(timeout=300)[1]  # returns when both have closed their ends
    assert process.returncode == code and error.count("\n") == (number == signal.SIGINT), error
    assert not any(row["seed"] == seed for row in recipe.read_rows(out))


@pytest.mark.parametrize("argv, said", [
    (["run", "--data", "small"], "prepare"),
    (["table"], "results.jsonl: nothing there"),
    (["prepare", "--one-d", "nowhere"], "--one-d nowhere"),
    (["run", "--data", "small", "--variants", "nonsense"], "nonsense"),
    (["run", "--data", "small", "--minutes", "0"], "not above 0"),
    (["run", "--data", "small", "--minutes", "soon"], "--minutes"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    try:
        code = recipe.main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("recipe.py") and said in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_damaged_result_is_named(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps(known_row("base", 0, 1, 0)) + '\n{"data": "sm')
    assert recipe.main(["table", "--out", str(tmp_path)]) == 2
    assert "line 2 is no result" in capsys.readouterr().err
