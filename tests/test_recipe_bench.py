"""bench/recipe.py: what it holds out, that every variant trains and differs, the clock, voting, and the table."""

import itertools
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, exit_code, one_thread, parse_pairs, python, task_json  # noqa: F401

import train
from arc_data.tasks import SHARE_EVALUATION_PAIRS, canonical_hash, read_split
from bench import recipe

recipe.ANSWER["1d"], recipe.VIEWS = 3, 2  # models of two steps never end a grid; no need to wait for it
TINY = "--d-model 32 --n-head 2 --d-state 8 --headdim 16 --d-ff 16 --max-steps 2 --max-minutes 0"
FAMILIES = ("fill", "flip", "move", "pad", "scale")


def family_of(name: str) -> str:
    return name.split("_")[0]


def write_one_d(folder: Path) -> Path:
    """Five families of five tasks that turn a row around; some repeat, or are too wide."""
    rng, tasks = np.random.default_rng(0), {}
    for family, i in itertools.product(FAMILIES, range(5)):
        rows = [rng.integers(0, 10, (1, width)) for width in rng.integers(12, 21 if family == "flip" else 16, 4)]
        tasks[f"{family}_{i}"] = task_json([(row, row[:, ::-1]) for row in rows])
    pair = tasks["fill_0"]["train"][0]
    mirrored = {key: [[(9 - c) for c in row[::-1]] for row in pair[key]] for key in pair}
    tasks["move_0"]["test"] = [mirrored]  # a demonstration elsewhere, mirrored and in other colours
    tasks["pad_0"]["test"] = tasks["scale_0"]["test"]
    tasks["pad_1"]["train"][1] = tasks["fill_1"]["train"][2]
    tasks["scale_1"]["test"][0]["input"] = [[0] * 31]
    for name, task in tasks.items():
        (folder / family_of(name)).mkdir(parents=True, exist_ok=True)
        (folder / family_of(name) / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, arc_dir) -> Path:
    """A folder with both data sets; `small` from a copy of ARC-1 that has no evaluation tasks at all."""
    folder = tmp_path_factory.mktemp("recipe")
    shutil.copytree(arc_dir / "training", folder / "arc" / "training")
    recipe.prepare(folder, write_one_d(folder / "source"), arc=folder / "arc")
    return folder


def test_one_d_keeps_each_pair_once_and_holds_out_a_fifth_of_known_families_and_three_whole(out):
    learned, held = (read_split(out / "1d", split) for split in ("training", "evaluation"))
    pairs = [canonical_hash(p) for t in [*learned.values(), *held.values()] for p in t["train"] + t["test"]]
    assert max(Counter(pairs).values()) == 1
    left_out = {f"{f}_{i}" for f in FAMILIES for i in range(5)} - learned.keys() - held.keys()
    assert left_out == {"move_0", "scale_0", "scale_1"}  # a test seen elsewhere, a test seen before, too wide
    assert len((learned | held)["pad_1"]["train"]) == 2

    groups = json.loads((out / "1d" / "groups.json").read_text())
    assert sorted(groups["known"] + groups["new"]) == sorted(held)
    known, new = (Counter(map(family_of, groups[group])) for group in ("known", "new"))
    assert len(new) == 3 and known.keys() == {family_of(name) for name in learned} == set(FAMILIES) - set(new)
    assert set(known.values()) == {1}


def test_small_holds_out_a_fifth_of_small_training_tasks_and_keeps_what_is_there(out, arc_dir, capsys):
    learned, held = (read_split(out / "small", split) for split in ("training", "evaluation"))
    assert not learned.keys() & held.keys() and len(held) == (len(learned) + len(held)) // 5
    tasks = learned | held
    assert tasks.keys() < {f.stem for f in (arc_dir / "training").iterdir()} - set(SHARE_EVALUATION_PAIRS)
    assert max(train.Task(n, t["train"] + t["test"]).largest() for n, t in tasks.items()) == 10
    supervised = {canonical_hash(p) for n, t in tasks.items() for p in t["train"] + t["test"] * (n in learned)}
    assert not supervised & {canonical_hash(p) for t in held.values() for p in t["test"]}
    before = sorted((out / "small").rglob("*"))
    recipe.prepare(out, None, arc=out / "nowhere")
    assert "there already" in capsys.readouterr().out and sorted((out / "small").rglob("*")) == before


@pytest.fixture(scope="module")
def base(out) -> dict:
    return recipe.train_and_measure(out, "1d", "base", 0, 1, TINY)


@pytest.mark.parametrize("name", [name for name in recipe.VARIANTS if name != "base"])
def test_every_variant_trains_and_makes_a_difference(out, base, name):
    row = recipe.train_and_measure(out, "1d", name, 0, 1, TINY)
    assert row["variant"] == name and row["steps"] == 2 and row["tokens"] > 0 and row["parameters"] > 10_000
    assert row["groups"].keys() == {"known", "new"}
    for group, found in row["groups"].items():
        assert 0 < found["loss"] < 10 and 0 <= found["exact"] <= 1 and 0 <= found["voted"] <= 1
        assert found["loss"] != base["groups"][group]["loss"]
    assert train.time is time and train.GPT is recipe.GPT and train.finish.__module__ == "train"  # patched no more


def test_patterns_have_equal_parameters():
    counts = []
    for name in ("base", "aa", "mm"):
        given = train.make_parser().parse_args(f"{recipe.COMMON} {recipe.VARIANTS[name].flags}".split())
        model = train.GPT(train.make_config(vars(given), has_gpu=False)[0])
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[1:] == pytest.approx(counts[:1] * 2, rel=0.01)


def test_the_budget_is_cpu_time_of_the_process(out, monkeypatch):
    seconds = itertools.count()  # one more whenever somebody looks
    monkeypatch.setattr(time, "process_time", lambda: float(next(seconds)))
    flags = TINY.replace("--max-steps 2 --max-minutes 0", "")
    row = recipe.train_and_measure(out, "1d", "base", 0, 0.5, flags)
    assert 8 <= row["steps"] <= 15  # two or three looks a step; the wall's clock would allow hundreds


def test_exact_counts_the_first_view_and_voted_all_turned_back(out, base, monkeypatch):
    """A model that turns the question around, which is right in any view, but gives none in the first view of most."""
    shown = []

    def answer(model, prompts, *sizes):
        shown[:] = [parse_pairs([*p[1:], 0, train.ROW, train.END])[-1][0] for p in prompts]
        return [(None if i and i % 8 == 0 else np.rot90(grid, 2), -1.0) for i, grid in enumerate(shown)]

    monkeypatch.setattr(train, "answer_prompts", answer)
    monkeypatch.setattr(recipe, "VIEWS", 8)
    groups = recipe.train_and_measure(out, "1d", "base", 0, 1, TINY)["groups"]
    for group, found in groups.items():
        assert found["exact"] == 1 / found["outputs"] and found["voted"] == 1
        assert found["loss"] == base["groups"][group]["loss"]  # to the last bit: the same run
    assert len({(grid.shape, grid.tobytes()) for grid in shown[:8]}) == 8


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


def start(out: Path, seed: int, minutes: str):
    argv = ["run", "--data", "1d", "--variants", "base", "--seeds", seed, "--minutes", minutes, "--out", out]
    return python(ROOT / "bench" / "recipe.py", *argv, cwd=out, start_new_session=True)


def test_a_run_is_done_once_and_an_interrupted_one_anew(out, capsys):
    log = out / "runs" / "1d-base-3-0.003" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo')
    process = start(out, 3, "0.003")
    printed = process.communicate()
    assert process.returncode == 0 and "1d base seed 3: " in printed[0], printed
    assert recipe.run(out, "1d", ["base"], [3], 0.003) == 0 and capsys.readouterr().out == printed[0]
    (row,) = recipe.read_rows(out)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [*range(1, row["steps"] + 1), row["steps"]]  # the last is that of the measurement


def test_a_stop_ends_both_processes_and_leaves_no_row(out):
    started = [(number, code, start(out, 10 + number, "9"))
               for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143))]
    for number, _, process in started:
        log = out / "runs" / f"1d-base-{10 + number}-9" / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.1)
        if number == signal.SIGINT:  # the terminal sends it to both
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    for number, code, process in started:
        error = process.communicate(timeout=300)[1]  # returns when both have closed their ends
        assert process.returncode == code and error.count("\n") == (number == signal.SIGINT), error
        assert not any(row["seed"] == 10 + number for row in recipe.read_rows(out))


@pytest.mark.parametrize("argv, said", [
    (["table", "--out", "damaged"], "line 2 is no result"),
    (["run", "--data", "small"], "prepare"),
    (["table"], "results.jsonl: nothing there"),
    (["prepare", "--one-d", "nowhere"], "--one-d nowhere"),
    (["run", "--data", "small", "--minutes", "0"], "not above 0"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    Path("damaged").mkdir()
    Path("damaged", "results.jsonl").write_text(json.dumps(known_row("base", 0, 1, 0)) + '\n{"data": "sm')
    assert exit_code(recipe, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("recipe.py") and said in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["damaged"]
