"""solve.py: views, votes and scores; going on after a stop; test-time training; and that no answer leaks."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    checkpoint,
    complaint,
    exit_code,
    make_quick,
    metrics,
    one_thread,  # noqa: F401
    random_grid,
    run,
    runtime,
    sequence,
)
from hypothesis import given
from hypothesis import strategies as st

import solve
import train
from arc_data.tasks import Task, apply_symmetry, canonical_hash, load_arc, read_grid, read_split
from data.files import UserError
from extras.decode import answer_logprobs, answer_prompts
from extras.runs import AnswerLog, hold, load_model
from extras.views import Question, Shown, answer_in_views, make_view, two_attempts, view_prompt, vote
from solve import score
from train import UNKNOWN_TASK

FEW = ("--views", "5", "--batch-tokens", "300")  # few views, few at a time


call = functools.partial(exit_code, solve)
refused = functools.partial(complaint, solve)


def make_task(rng, tests=1):
    """A task that a tiny model learns to answer with some grid: the first cell of the input, twice."""
    grids = [random_grid(rng, 4, 3) for _ in range(3 + tests)]
    pairs = [{"input": grid.tolist(), "output": [[int(grid[0, 0])] * 2]} for grid in grids]
    return {"train": pairs[:3], "test": pairs[3:]}


def write_tasks(folder, scrambled=False):
    """Ten training and six evaluation tasks: one with two tests, one with two of which one answer is not known."""
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    tasks = {f"training/tr{i}": make_task(rng) for i in range(10)}
    tasks |= {f"evaluation/ev{i}": make_task(rng, tests=1 + (i < 2)) for i in range(6)}
    del tasks["evaluation/ev1"]["test"][0]["output"]
    for name, task in tasks.items():
        for pair in task["test"]:
            if scrambled and name.startswith("evaluation") and "output" in pair:
                pair["output"] = random_grid(other, 5).tolist()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(task))
    return folder


def learn(data, folder, *more, steps=100):
    """A tiny run on these tasks."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert run(*TINY, "--data-dir", data, "--block-size", "256", "--holdout", "2", "--max-steps", steps,
                   "--out-dir", folder, *more) == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run that has learned to answer with grids of one row, many of them wrong. Shared: only read it."""
    return learn(data, tmp_path_factory.mktemp("runs") / "run", "--demonstrations", "training", "--dropout", "0.05")


@pytest.fixture(scope="module")
def model(trained):
    """The model of that run. Shared: only ask it."""
    return load_model(trained, solve.read_run(trained).model_cfg)[0]


@pytest.fixture(scope="module")
def solved(trained, tmp_path_factory):
    """The folder with that run's answers to the evaluation tasks. Shared: only read it."""
    out = tmp_path_factory.mktemp("solved")
    assert call(trained, "--out", out, *FEW) == 0
    return out


def load(path):
    return json.loads(Path(path).read_text())


def records(folder):
    """What a log keeps of each task, by its name."""
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return {line["task"]: line["outputs"] for line in lines[1:]}


def tree(folder):
    """Every file of a folder, by its path, with a hash of what it holds."""
    files = (f for f in sorted(Path(folder).rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# == VIEWS ============================================================================================================


def question(name="a", demonstrations=5):
    rng = np.random.default_rng(0)
    return Question(name, [(random_grid(rng), random_grid(rng)) for _ in range(demonstrations)], [random_grid(rng)])


def test_views_depend_on_seed_name_and_number_alone():
    def key(seed, q, k):
        view = make_view(seed, q, k)
        return view.symmetry, view.colours.tobytes(), tuple(view.order)

    same = Question("a", question().demonstrations[::-1], [])
    assert [key(1, question(), k) for k in range(20)] == [key(1, same, k) for k in range(20)]
    assert key(1, same, 0) == (0, bytes(range(10)), (0, 1, 2, 3, 4)), "the task as it stands"
    keys = [key(seed, question(name), k) for seed, name, k in itertools.product((0, 1), "ab", range(1, 20))]
    assert len(set(keys)) == len(keys)
    assert {colours[0] for _, colours, _ in keys} == {0}, "black has to stay"
    for first in (0, 8, 16):
        assert {key(5, same, k)[0] for k in range(first, first + 8)} == set(range(8)), "each symmetry once"


def test_a_prompt_shows_whole_pairs_in_one_view_and_names_a_known_task():
    """The last demonstrations of the view's order stay where not all fit; how many do not is counted."""
    q = question()
    for k in range(12):
        view = make_view(0, q, k)
        pairs = [tuple(view.colours[apply_symmetry(g, view.symmetry)] for g in q.demonstrations[i])
                 for i in view.order]  # fmt: skip
        query = view.colours[apply_symmetry(q.inputs[0], view.symmetry)]
        whole = len(view_prompt(q, 0, view, 4096, {})[0])
        for block in (whole, whole - 1, 150, 60):
            prompt, left_out = view_prompt(q, 0, view, block, {"a": 21, "b": 22})
            shown = sequence([*pairs[left_out:], (query, query)], first=21)
            assert prompt.tolist() == shown[: len(prompt)].tolist() and prompt[-1] == train.OUT
            assert (left_out == 0) == (block == whole) and (len(prompt) <= block or left_out == 4)
    assert view_prompt(question("z"), 0, view, 4096, {"a": 21})[0][0] == UNKNOWN_TASK


# == VOTES ============================================================================================================


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


A, B, C, QUERY = grid([1, 2]), grid([1], [2]), grid([3, 3]), grid([0, 0])


def order(candidates):
    return [(c.grid.tolist(), c.votes) for c in candidates]


@given(st.lists(st.tuples(st.sampled_from([None, QUERY, A, B, C]), st.floats(-9, 0)), max_size=12), st.randoms())
def test_any_votes(answers, random):
    """They count but for what is no answer, whatever the order of the views."""
    candidates, dropped = vote(answers, QUERY)
    times = [sum(said is g for said, _ in answers) for g in (None, QUERY, A, B, C)]
    assert dropped == {"malformed": times[0], "copies": times[1]}
    assert [c.votes for c in candidates] == sorted(filter(None, times[2:]), reverse=True)
    assert str(vote(random.sample(answers, len(answers)), QUERY)) == str((candidates, dropped))


def test_ties_go_by_the_summed_log_probability_then_by_the_cells():
    """Sums: B -4, A -5, though the best single view is A's; C has one vote less and is the surest."""
    candidates, _ = vote([(B, -2.0), (A, -0.5), (C, -0.1), (B, -2.0), (A, -4.5)], QUERY)
    assert order(candidates) == [([[1], [2]], 2), ([[1, 2]], 2), ([[3, 3]], 1)]
    assert [c.logprob for c in candidates] == [-2.0, -2.5, -0.1]
    equal = [(C, -1.0), (A, -1.0), (B, -1.0)]
    assert order(vote(equal, QUERY)[0]) == [([[1, 2]], 1), ([[3, 3]], 1), ([[1], [2]], 1)]


def test_there_are_always_two_attempts():
    """Without any answer both are the input, which is never right by chance."""
    for candidates, expected in (([A, B, C], [A, B]), ([A], [A, A]), ([], [QUERY, QUERY])):
        found = two_attempts([g.tolist() for g in candidates], QUERY)
        assert [g.tolist() for g in found] == [g.tolist() for g in expected]


def test_the_limit_on_answers_holds_for_every_official_task_in_every_view(arc_dir, arc2_dir):
    for folder, split in itertools.product((arc_dir, arc2_dir), ("training", "evaluation")):
        questions, truths = solve.read_questions(folder, split, [])
        limits = [solve.answer_limit(q) for q in questions]
        assert max(limits) == 931 and min(limits) < 400
        for q, limit in zip(questions, limits, strict=True):
            for answer in truths[q.name]:
                assert max(len(train.encode_grid(g)) for g in (answer, answer.T)) < limit, q.name


# == SCORES ===========================================================================================================


def hand_made():
    """Three tasks with one, two and four outputs, and two attempts at each.

    Right at the first attempt: a's output, the first and second of c. Right at the second: b's first, c's third.
    So with one attempt (1 + 0 + 2/4) / 3 of the tasks, 3 of 7 outputs, 1 of 3 whole tasks; with two attempts
    (1 + 1/2 + 3/4) / 3, 5 of 7 and still 1 of 3.
    """
    right, wrong, other = grid([5, 5]), grid([5], [5]), grid([5, 4])
    truths = {"a": [right], "b": [right, right], "c": [right] * 4}
    submission = {
        "a": [(right, wrong)],
        "b": [(wrong, right), (other, wrong)],
        "c": [(right, other), (right, right), (wrong, right), (None, None)],
    }
    return submission, truths, {name: [False] * len(outputs) for name, outputs in truths.items()}


def test_scores_of_a_hand_computed_example():
    scores = score(*hand_made())
    assert scores["pass@1"] == pytest.approx({"arc_prize": 0.5, "per_output": 3 / 7, "all_outputs": 1 / 3})
    assert scores["pass@2"] == pytest.approx({"arc_prize": 0.75, "per_output": 5 / 7, "all_outputs": 1 / 3})
    assert {k: v for k, v in scores.items() if "@" not in k} == {
        "tasks": 3, "outputs": 7, "seen_outputs": 0, "unknown_outputs": 0, "tasks_left_out": 0}  # fmt: skip


def test_seen_and_unknown_outputs_are_left_out_and_with_them_a_task_that_has_no_others():
    submission, truths, seen = hand_made()
    seen["a"][0] = seen["c"][0] = True
    truths["b"][1] = truths["c"][3] = None
    scores = score(submission, truths, seen)  # left: b's first output and c's second and third
    assert scores["pass@1"] == pytest.approx({"arc_prize": 0.25, "per_output": 1 / 3, "all_outputs": 0})
    assert scores["pass@2"] == {"arc_prize": 1, "per_output": 1, "all_outputs": 1}
    assert (scores["tasks"], scores["outputs"], scores["tasks_left_out"]) == (2, 3, 1)
    assert (scores["seen_outputs"], scores["unknown_outputs"]) == (2, 2)


def submission_of(truths, change=lambda answers: answers):
    """A submission in Kaggle's layout whose first attempts are `change(right answers)`; the second is always 1 x 1."""
    return {name: [{"attempt_1": None if a is None else a.tolist(), "attempt_2": [[0]]} for a in change(answers)]
            for name, answers in truths.items()}  # fmt: skip


def shares(capsys, submission, path, *where):
    """What --score says about a submission: its three numbers for one attempt and for two."""
    path.write_text(json.dumps(submission))
    assert call("--score", path, *where) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [[last[f"pass@{n}"][rule] for rule in ("arc_prize", "per_output", "all_outputs")] for n in (1, 2)], last


def test_scoring_a_file_needs_no_run(arc_dir, tmp_path, capsys):
    """All right; with the outputs of the 19 official tasks that have several in the wrong order; and without answers.
    """
    _, truths = solve.read_questions(arc_dir, "evaluation", [])
    path, where = tmp_path / "submission.json", ("--data-dir", arc_dir, "--split", "evaluation")
    found, last = shares(capsys, submission_of(truths), path, *where)
    assert found == [[1, 1, 1]] * 2 and (last["tasks"], last["outputs"]) == (400, 419)
    found, last = shares(capsys, submission_of(truths), path, *where, "--tasks", "00576224", "3979b1a8")
    assert found == [[1, 1, 1]] * 2 and (last["tasks"], last["outputs"]) == (2, 2)
    found, _ = shares(capsys, submission_of(truths, lambda answers: answers[1:] + answers[:1]), path, *where)
    assert found == [pytest.approx([381 / 400, 381 / 419, 381 / 400])] * 2
    empty = {name: [{"attempt_1": [], "attempt_2": None}, {"attempt_1": [[]], "attempt_2": []}][: len(answers)]
             for name, answers in truths.items() if len(answers) < 3}  # fmt: skip
    assert shares(capsys, empty, path, *where, "--tasks", *empty)[0] == [[0, 0, 0]] * 2


BAD = {
    "not JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "holds a list"),
    "nothing": (lambda s: s.clear(), "6 of 6 tasks are missing: ev0, ev1, ev2 and 3 more"),
    "a task too many": (lambda s: s.update(other=[]), "1 tasks are not in --data-dir and --split: other"),
    "an output is missing": (lambda s: s["ev0"].pop(), "task ev0 has a list of 1; it needs a list of 2"),
    "one attempt": (lambda s: s["ev0"][1].pop("attempt_2"), 'task ev0, output 1 has no "attempt_2"'),
    "ragged": (lambda s: s["ev0"][1].update(attempt_2=[[1, 2], [3]]), "task ev0, output 1, attempt_2 is ragged"),
    "a truth value": (lambda s: s["ev5"][0].update(attempt_1=[[True]]), "attempt_1 has a cell 'True'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_submission_is_refused_with_one_line(name, data, tmp_path, capsys):
    change, expected = BAD[name]
    path = tmp_path / "submission.json"
    submission = submission_of(solve.read_questions(data, "evaluation", [])[1])
    if callable(change):
        change(submission)
    path.write_text(json.dumps(submission) if callable(change) else change)
    assert f"solve.py: {path}" in (err := refused(capsys, "--score", path, "--data-dir", data)) and expected in err


# == SOLVING ==========================================================================================================


def test_what_solving_writes_and_prints(solved, data, tmp_path, capsys):
    """Kaggle's layout for every task and output, a page, and scores that --score finds again."""
    submission, scores = load(solved / "submission.json"), load(solved / "scores.json")
    questions, truths = solve.read_questions(data, "evaluation", [])
    assert {name: len(outputs) for name, outputs in submission.items()} == {q.name: len(q.inputs) for q in questions}
    assert list(submission) == sorted(truths)
    for entry in itertools.chain(*submission.values()):
        assert list(entry) == ["attempt_1", "attempt_2"]
        for attempt in entry.values():
            read_grid(attempt, "attempt")
    assert (scores["tasks"], scores["outputs"], scores["unknown_outputs"], scores["answers"]) == (6, 7, 1, 5 * 8)
    assert scores["malformed_answers"] < 20, "the model has to write grids, or these tests prove little"
    last = shares(capsys, submission, tmp_path / "s.json", "--data-dir", data)[1]
    assert {key: scores[key] for key in last if key != "settings"} == {k: last[k] for k in last if k != "settings"}
    page = (solved / "report.html").read_text()
    assert all(name in page for name in truths)


def test_answers_are_the_votes_of_the_views(trained, model, solved, data):
    """Two tasks, done again by hand: every view asked alone, mapped back, counted."""
    questions, _ = solve.read_questions(data, "evaluation", [])
    known = {name: UNKNOWN_TASK + 1 + i for i, name in enumerate(load(trained / "config.json")["tasks"])}
    for q in questions[:2]:
        for test, (query, kept) in enumerate(zip(q.inputs, records(solved)[q.name], strict=True)):
            answers = []
            for view in (make_view(0, q, k) for k in range(5)):
                prompt, _ = view_prompt(q, test, view, 256, known)
                tokens, length = torch.from_numpy(prompt)[None], torch.tensor([len(prompt)])
                new, logp = train.generate.plain(model, tokens, length, 300, train.END)
                found = train.decode_grid(new[0].tolist())
                answers.append((None if found is None else view.undo(found), float(logp)))
            candidates, dropped = vote(answers, query)
            assert [(c["grid"], c["votes"]) for c in kept["candidates"]] == order(candidates)[:5]
            assert {k: kept[k] for k in dropped} == dropped
            logprobs = [c["logprob"] for c in kept["candidates"]]
            assert logprobs == pytest.approx([c.logprob for c in candidates[:5]], rel=1e-4)


def interrupt(monkeypatch, after):
    """As if Ctrl-C came while batch number `after` is answered; lists the prompts of each batch that was answered."""
    made = []

    def patched(model, prompts, *args):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append([prompt.tobytes() for prompt in prompts])
        return answer_prompts(model, prompts, *args)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    return made


def test_a_stopped_run_goes_on_to_the_same_bytes(trained, solved, tmp_path, monkeypatch, capsys):
    out = tmp_path / "stopped"
    made = interrupt(monkeypatch, 2)
    assert call(trained, "--out", out, *FEW) == 130
    assert f"python solve.py {trained} --out {out}" in capsys.readouterr().out.splitlines()[-1]
    assert not (out / "submission.json").exists() and len(records(out)) >= 1
    with open(out / "answers.jsonl", "a") as file:
        file.write('{"task": "ev')  # torn by a crash
    rest = interrupt(monkeypatch, None)
    assert call(trained, "--out", out, *FEW) == 0 and tree(out) == tree(solved)
    asked = [prompt for batch in made + rest for prompt in batch]
    assert len(asked) == len(set(asked)) == 5 * 8, "each prompt is answered once"
    interrupt(monkeypatch, 0)
    assert call(trained, "--out", out, *FEW) == 0 and tree(out) == tree(solved), "nothing is left to answer"


def test_a_damaged_line_costs_its_own_task_alone(tmp_path):
    path, settings = tmp_path / "answers.jsonl", {"views": 1}
    log = AnswerLog(path, settings)
    log.write([{"task": name, "outputs": []} for name in "abc"])
    log.write([{"task": "a", "outputs": ["of other batches"]}])
    log.close()
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, lines[0], lines[1].replace("b", "x"), lines[2]]))
    again = AnswerLog(path, settings)
    again.close()
    assert again.records == {name: {"task": name, "outputs": []} for name in "ac"}
    path.write_text(before := first.replace("views", "vews") + lines[0])
    with pytest.raises(UserError, match="by another program"):
        AnswerLog(path, settings)
    assert path.read_text() == before


def test_an_answer_above_the_limit_of_its_own_task_does_not_count(monkeypatch):
    """Whatever the other tasks of the batch may say."""
    sides = (1, 4)
    grids = [np.zeros((side, side), np.uint8) for side in sides]
    shown = [Shown(Question("a", [(grid, grid)], [grid]), 0, 1, 0, 1000, {}) for grid in grids]
    monkeypatch.setattr("extras.views.answer_prompts", lambda model, prompts, *_: [(grids[1], 0.0)] * len(prompts))
    answer_in_views(None, shown, None, 1000)
    assert [s.answers[0][0] is None for s in shown] == [True, False]


def test_a_group_of_which_a_part_is_written_is_answered_again_to_the_same_bytes(trained, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    several = ("--views", "3", "--batch-tokens", "1500")
    whole = interrupt(monkeypatch, None)
    assert call(trained, "--out", one, *several) == 0
    other.mkdir()
    lines = (one / "answers.jsonl").read_text().splitlines(keepends=True)
    (other / "answers.jsonl").write_text("".join(lines[:2]))
    again = interrupt(monkeypatch, None)
    assert call(trained, "--out", other, *several) == 0
    assert tree(one) == tree(other) and whole == again, "other batches, other rounding"


def test_rescoring_orders_the_candidates_by_all_views(trained, model, solved, data, tmp_path, capsys):
    assert "with rescore None" in refused(capsys, trained, "--out", solved, *FEW, "--rescore")
    assert call(trained, "--out", tmp_path, *FEW, "--rescore") == 0
    known, rescored = solve.read_run(trained).task_tokens, records(tmp_path)
    assert rescored != records(solved), "nothing was put in another order"
    for q in solve.read_questions(data, "evaluation", [])[0]:
        views = [make_view(0, q, k) for k in range(5)]
        for test, output in enumerate(rescored[q.name]):
            grids = [np.array(candidate["grid"], np.uint8) for candidate in output["candidates"]]
            prompts = [view_prompt(q, test, view, 256, known)[0] for view in views]
            answers = [[np.append(train.encode_grid(view.show(g)), train.END) for g in grids] for view in views]
            totals = np.sum(answer_logprobs(model, prompts, answers, runtime(), 3000), axis=0)
            assert totals.tolist() == sorted(totals, reverse=True), "the likeliest first"


@pytest.mark.parametrize("change, expected", [
    (("--views", "4"), "with views 5, not 4"),
    (("--seed", "1"), "with seed 0, not 1"),
    (("--block-size", "300"), "with block_size 256, not 300"),
    (("--tasks", "ev1"), "for other tasks"),
    (("--ttt-steps", "1"), "with ttt_steps 0, not 1"),
    ((), "with other weights"),
])  # fmt: skip
def test_answers_made_with_other_settings_are_not_mixed_in(change, expected, trained, solved, tmp_path, capsys):
    folder, before = shutil.copytree(trained, tmp_path / "run"), tree(solved)
    if not change:
        state = checkpoint(trained)
        state["model"]["head.weight"][0, 0] += 1
        torch.save(state, folder / "checkpoint.pt")
    err = refused(capsys, folder, "--out", solved, *FEW, *change)
    assert expected in err and "--out" in err and tree(solved) == before


def test_two_processes_do_not_write_into_one_folder(trained, solved, capsys):
    with contextlib.closing(hold(solved)):
        err = refused(capsys, trained, "--out", solved, *FEW)
    assert "another process" in err and str(solved) in err


@pytest.mark.parametrize("enough", [2000, 0])
def test_out_of_memory_halves_the_batches_and_goes_on(enough, trained, solved, tmp_path, monkeypatch, capsys):
    asked = []

    def patched(model, prompts, runtime, limit, batch_tokens, drafts):
        asked.append(batch_tokens)
        if batch_tokens > enough:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer_prompts(model, prompts, runtime, limit, batch_tokens, drafts)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    code = call(trained, "--out", tmp_path, "--views", "5", "--batch-tokens", "6000")
    out, err = capsys.readouterr()
    assert asked[:3] == [6000, 3000, 1500]
    if enough:
        assert code == 0 and set(asked[2:]) == {1500} and out.count("out of memory; going on") == 2
        assert load(tmp_path / "submission.json") == load(solved / "submission.json")
    else:
        assert code == 2 and "lower --batch-tokens" in err.splitlines()[-1]


def test_a_folder_or_a_file_of_tasks_that_the_run_has_never_seen(trained, tmp_path):
    file = tmp_path / "mine" / "new.json"
    file.parent.mkdir()
    task = make_task(np.random.default_rng(7))
    del task["test"][0]["output"]
    file.write_text(json.dumps(task))
    for out, path in ((tmp_path / "0", file.parent), (tmp_path / "1", file)):
        assert call(trained, "--data-dir", path, "--views", "2", "--out", out, "--picture") == 0
        assert list(load(out / "submission.json")) == ["new"]
        scores = load(out / "scores.json")
        assert scores["pass@2"]["arc_prize"] is None and scores["unknown_outputs"] == 1
        assert (out / "picture-01.png").read_bytes().startswith(b"\x89PNG")


def test_results_go_beside_the_run_by_default_and_leave_its_own_files_alone(trained, data, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert call(folder, "--views", "1", "--split", "training", "--tasks", "tr1", "tr0", "--picture") == 0
    assert list(load(folder / "solve-training" / "submission.json")) == ["tr0", "tr1"]
    assert call(folder, "--views", "1", "--data-dir", data, "--tasks", "ev0") == 0  # other data, other folder
    files = {"answers.jsonl", "report.html", "scores.json", "submission.json"}
    for name, expected in (("solve-training", files | {"picture-01.png"}), (f"solve-{data.name}-evaluation", files)):
        assert {f.name for f in (folder / name).iterdir()} == expected
        shutil.rmtree(folder / name)
    assert tree(folder) == tree(trained)


# == TEST-TIME TRAINING ===============================================================================================


def test_test_time_training_learns_the_demonstrations_and_leaves_the_run_alone(trained, data, tmp_path, monkeypatch):
    before = tree(trained)
    options = (*FEW, "--ttt-steps", "40", "--ttt-lr", "0.003")
    for out in ("a", "b"):
        assert call(trained, "--out", tmp_path / out, *options) == 0
    assert tree(trained) == before
    assert tree(tmp_path / "a") == tree(tmp_path / "b"), "the same seed, the same weights and answers"
    questions, _ = solve.read_questions(data, "evaluation", [])
    loader = train.ArcDataLoader([Task(q.name, q.demonstrations) for q in questions], 6, 256, seed=99)
    model, _ = load_model(trained, solve.read_run(trained).model_cfg)
    first = train.validation_loss(model, loader, runtime())
    model.load_state_dict(torch.load(tmp_path / "a" / "adapted.pt", weights_only=True)["model"])
    assert train.validation_loss(model, loader, runtime()) < 0.9 * first

    interrupt(monkeypatch, 1)  # stopped while it answers: the adapted weights are there
    (tmp_path / "a" / "answers.jsonl").unlink()
    monkeypatch.setattr(solve, "adapt", lambda *args: pytest.fail("trained again"))
    assert call(trained, "--out", tmp_path / "a", *options) == 130
    interrupt(monkeypatch, None)
    assert call(trained, "--out", tmp_path / "a", *options) == 0 and tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("packed", [False, True])
def test_test_time_training_sees_demonstrations_only(packed, data, trained, monkeypatch):
    """What its loader is given, with their tokens: a task that the run has no token for trains without one."""
    made = []

    class Loader(train.ArcDataLoader):
        def __init__(self, tasks, *args, **options):
            super().__init__(tasks, *args, **options)
            self.given = tasks
            made.append(self)

    monkeypatch.setattr(solve, "ArcDataLoader", Loader)
    questions, _ = solve.read_questions(data, "evaluation", [])
    folder = solve.read_run(trained)
    model, _ = load_model(trained, folder.model_cfg)
    cfg = dataclasses.replace(folder.cfg, packed=packed, batch_size=16, grad_accum_steps=3)
    solve.adapt(model, questions, folder._replace(cfg=cfg), runtime(), 1, 0.001, 5)
    loader = made[-1]
    rows = len(train.ArcDataLoader(loader.given, 1, 256, packed=packed, seed=5).batches())
    assert rows < 6 if packed else rows == 6
    assert loader.packed == packed and loader.effective == rows, "each task once in a batch"
    assert loader.seed == 5 and loader.task_tokens == folder.task_tokens
    for task, q in zip(loader.given, questions, strict=True):
        assert task == Task(q.name, q.demonstrations) and q.name not in folder.task_tokens


def test_an_overflow_of_float16_does_not_end_test_time_training(data, trained, monkeypatch, capsys):
    """The step is skipped and the loss's scale halved; in float32 a gradient that is not finite is an error."""
    questions, _ = solve.read_questions(data, "evaluation", [])
    folder, where = solve.read_run(trained), runtime()
    model, _ = load_model(trained, folder.model_cfg)
    where.dtype, where.scaler = torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**40)
    solve.adapt(model, questions, folder, where, 2, 0.001, 0)
    assert where.scaler.get_scale() == 2.0**38 and "trained     2 steps" in capsys.readouterr().out
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (1.0, float("inf")))
    with pytest.raises(UserError, match="step 0: .*gradient norm inf; lower --ttt-lr"):
        solve.adapt(model, questions, folder, runtime(), 2, 0.001, 0)


# == NO LEAK ==========================================================================================================


def test_scrambled_evaluation_answers_change_nothing_but_the_scores(data, tmp_path):
    """Not a loss and not a prediction, with evaluation demonstrations learned from."""
    scrambled = write_tasks(tmp_path / "scrambled", scrambled=True)
    for file in (data / "evaluation").iterdir():
        assert file.read_text() != (scrambled / "evaluation" / file.name).read_text()
    runs = [learn(folder, tmp_path / name, "--demonstrations", "both", steps=20)
            for name, folder in (("one", data), ("other", scrambled))]  # fmt: skip
    losses = [[line.get("loss", line.get("val_loss")) for line in metrics(folder)] for folder in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 21
    for folder in runs:
        assert call(folder, *FEW, "--ttt-steps", "3") == 0
    for name in ("solve-evaluation/answers.jsonl", "solve-evaluation/submission.json", "supervised_pairs.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name


def collisions(folder, learned):
    """The evaluation outputs, as (task, number), whose pair is among the pairs of these tasks; and whose it is."""
    owners = {}
    for task in learned:
        for pair in task.pairs:
            owners.setdefault(canonical_hash(pair), set()).add(task.name)
    return {(name, i): owners[canonical_hash(pair)] for name, task in read_split(folder, "evaluation").items()
            for i, pair in enumerate(task["test"]) if canonical_hash(pair) in owners}  # fmt: skip


def test_no_evaluation_answer_is_supervised(arc_dir, arc2_dir):
    """Up to symmetry and colours; tests/test_data.py shows that two official training tasks are left out for it.

    Seven evaluation tasks ask for a turned or recoloured copy of one of their own demonstrations: who learns from these
    has seen the answer, and `solve.py` leaves it out of the score. ARC-2 has no such task.
    """
    own = ("00576224", "3979b1a8", "66e6c45b", "94414823", "992798f6", "ca8de6ea", "f3e62deb")
    assert collisions(arc_dir, load_arc(arc_dir, 0, 30, "both").tasks) == {(name, 0): {name} for name in own}
    assert collisions(arc2_dir, load_arc(arc2_dir, 0, 30, "both").tasks) == {}


def test_a_run_does_not_count_what_it_learned_from(data, trained, tmp_path, capsys):
    """Two tests are pairs turned and in other colours: one of the run's own training, one of test-time training."""
    folder, swap = shutil.copytree(data, tmp_path / "tasks"), np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 9])
    for name, source in (("ev2", "training/tr5"), ("ev3", "evaluation/ev3")):
        known, task = load(data / f"{source}.json")["train"][1], load(data / "evaluation" / f"{name}.json")
        task["test"] = [{side: np.rot90(swap[np.array(known[side])]).tolist() for side in ("input", "output")}]
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(task))
    for steps, seen in ((0, 1), (1, 2)):
        out = tmp_path / str(steps)
        assert call(trained, "--data-dir", folder, "--views", "2", "--ttt-steps", steps, "--out", out) == 0
        scores = load(out / "scores.json")
        counts = [scores[key] for key in ("tasks", "outputs", "seen_outputs", "tasks_left_out")]
        assert counts == [6 - seen, 7 - seen, seen, seen]
        assert f"{seen} outputs that the run learned from" in capsys.readouterr().out
    submission, where = load(out / "submission.json"), ("--data-dir", folder)
    for who, seen in (((trained,), 1), ((), 0)):  # who made the submission decides
        assert shares(capsys, submission, tmp_path / "s.json", *where, *who)[1]["seen_outputs"] == seen


# == THE COMMAND LINE =================================================================================================


@pytest.mark.parametrize("arguments, expected", [
    ([], "give the folder of a run"),
    (["{run}", "--views", "0", "--seed", "-1"], "--views is 0"),
    (["{run}", "--ttt-lr", "nan"], "--ttt-lr is nan"),
    (["{run}/missing"], "no run in this folder"),
    (["{run}", "--tasks", "ev0", "nope"], "has no nope"),
    (["{run}", "--data-dir", "{run}/nowhere"], "nowhere: cannot be read"),
    (["{run}", "--data-dir", "{run}/config.json"], '"train" must be a list'),
    (["{run}", "--out", "{run}/config.json"], "--out"),
    (["{run}", "--kernels", "triton", "--device", "cpu"], "--kernels triton"),
])  # fmt: skip
def test_what_cannot_work_is_said_in_a_line(arguments, expected, trained, capsys):
    before = tree(trained)
    err = refused(capsys, *(a.format(run=trained) for a in arguments), lines=2 if "-1" in arguments else 1)
    assert expected in err and tree(trained) == before


@pytest.mark.parametrize("name, content", [
    ("checkpoint.pt", None), ("config.json", b"{}"), ("supervised_pairs.json", None), ("supervised_pairs.json", b"7")])
def test_a_damaged_run_is_named(name, content, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert name in refused(capsys, folder)
    assert not (folder / "solve-evaluation").exists()


def test_a_run_on_text_is_refused(trained, tmp_path, capsys):
    folder, config = shutil.copytree(trained, tmp_path / "run"), load(trained / "config.json")
    config["train"]["dataset"] = "fineweb"
    (folder / "config.json").write_text(json.dumps(config))
    assert "wants one on ARC tasks" in refused(capsys, folder)
