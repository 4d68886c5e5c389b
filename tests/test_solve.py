"""solve.py: views, votes and scores; going on after a stop; test-time training; and that no answer leaks."""

import dataclasses
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
    make_quick,
    metrics,
    one_thread,  # noqa: F401
    random_grid,
    run,
    runtime,
    same_pairs,
    sequence,
)

import solve
import train
from arc_data.tasks import (
    SHARE_EVALUATION_PAIRS,
    Task,
    apply_symmetry,
    canonical_hash,
    load_arc,
    read_grid,
    read_split,
)
from data.files import UserError
from extras.decode import answer_prompts
from extras.runs import hold, load_model
from extras.views import Question, make_view, two_attempts, view_prompt, vote
from solve import score
from train import UNKNOWN_TASK


def call(*argv):
    """The exit code of `python solve.py` with these arguments, in this process."""
    try:
        return solve.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def make_task(rng, demonstrations=3, tests=1, hidden=False):
    """A task that a tiny model learns to answer with some grid: the first cell of the input, twice."""
    pairs = []
    for _ in range(demonstrations + tests):
        grid = random_grid(rng, 4, 3)
        pairs.append({"input": grid.tolist(), "output": [[int(grid[0, 0])] * 2]})
    task = {"train": pairs[:demonstrations], "test": pairs[demonstrations:]}
    if hidden:
        del task["test"][0]["output"]
    return task


def write_tasks(folder, scrambled=False):
    """Ten training and six evaluation tasks: one with two tests, one with two of which one answer is not known."""
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    for split, count in (("training", 10), ("evaluation", 6)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            odd = split == "evaluation" and i < 2
            task = make_task(rng, tests=1 + odd, hidden=odd and i == 1)
            if scrambled and split == "evaluation":
                for pair in task["test"]:
                    if "output" in pair:
                        pair["output"] = random_grid(other, 5).tolist()
            (folder / split / f"{split[:2]}{i}.json").write_text(json.dumps(task))
    return folder


def learn(data, folder, *more, steps=150):
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
def solved(trained, tmp_path_factory):
    """The folder with that run's answers to the evaluation tasks, in five views, few at a time."""
    out = tmp_path_factory.mktemp("solved")
    assert call(trained, "--out", out, *FEW) == 0
    return out


FEW = ("--views", "5", "--batch-tokens", "300")


def load(path):
    return json.loads(Path(path).read_text())


def tree(folder):
    """Every file of a folder, by its path, with a hash of what it holds."""
    files = (f for f in sorted(Path(folder).rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def question(rng=None, name="a", demonstrations=4):
    rng = rng or np.random.default_rng(0)
    return Question(name, [(random_grid(rng), random_grid(rng)) for _ in range(demonstrations)], [random_grid(rng)])


def whole_prompt(q, first=0):
    """A question as it stands, from demonstration `first` on."""
    return train.make_prompt(Task("", [*q.demonstrations[first:], (q.inputs[0], None)]), 10**6, {})


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_a_view_is_undone():
    rng = np.random.default_rng(0)
    q = question(rng)
    for k in range(40):
        view = make_view(3, q, k)
        for grid in (random_grid(rng, 30) for _ in range(5)):
            assert np.array_equal(view.undo(view.show(grid)), grid) and view.show(grid).dtype == np.uint8
            assert np.array_equal(view.show(view.undo(grid)), grid)


def test_view_0_is_the_task_as_it_stands_and_eight_views_have_the_eight_symmetries():
    q, grid = question(), np.arange(6, dtype=np.uint8).reshape(2, 3)
    prompt, left_out = view_prompt(q, 0, make_view(5, q, 0), 4096, {})
    assert left_out == 0 and prompt.tolist() == whole_prompt(q).tolist()
    for first in (0, 8, 16):
        shapes = {apply_symmetry(grid, make_view(5, q, k).symmetry).tobytes() for k in range(first, first + 8)}
        assert len(shapes) == 8


def test_views_depend_on_seed_name_and_number_alone():
    def key(seed, q, k):
        view = make_view(seed, q, k)
        return view.symmetry, view.colours.tobytes(), tuple(view.order)

    q = question(demonstrations=6)
    same = Question("a", q.demonstrations[::-1], [])
    assert [key(1, q, k) for k in range(20)] == [key(1, same, k) for k in range(20)]
    keys = [key(seed, Question(name, q.demonstrations, []), k)
            for seed, name, k in itertools.product((0, 1), "ab", range(1, 20))]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert {colours[0] for _, colours, _ in keys} == {0}, "black has to stay"


def test_a_prompt_shows_all_grids_in_one_view_and_names_a_known_task():
    q = question()
    for k in range(1, 12):
        view = make_view(0, q, k)
        prompt, _ = view_prompt(q, 0, view, 4096, {"a": 21, "b": 22})
        pairs = [tuple(view.colours[apply_symmetry(g, view.symmetry)] for g in q.demonstrations[i])
                 for i in view.order]  # fmt: skip
        query = view.colours[apply_symmetry(q.inputs[0], view.symmetry)]
        shown = sequence([*pairs, (query, query)], first=21)
        assert prompt.tolist() == shown[: len(prompt)].tolist() and prompt[-1] == train.OUT
    assert view_prompt(q._replace(name="z"), 0, view, 4096, {"a": 21})[0][0] == UNKNOWN_TASK


def test_demonstrations_that_do_not_fit_are_left_out_whole_and_counted():
    q = question(demonstrations=5)
    whole = len(view_prompt(q, 0, make_view(0, q, 0), 4096, {})[0])
    counts = []
    for block in range(whole, 60, -1):
        prompt, left_out = view_prompt(q, 0, make_view(0, q, 0), block, {})
        counts.append(left_out)
        assert prompt.tolist() == whole_prompt(q, left_out).tolist()
        assert len(prompt) <= block or left_out == 4
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 1


# ---------------------------------------------------------------------------------------------------------------------
# Votes


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


A, B, C, QUERY = grid([1, 2]), grid([1], [2]), grid([3, 3]), grid([0, 0])


def order(candidates):
    return [(c.grid.tolist(), c.votes) for c in candidates]


def test_votes_count_and_what_is_no_answer_does_not():
    answers = [(B, -0.1), (A, -9.0), (None, 0.0), (QUERY, 0.0), (A, -9.0), (QUERY.copy(), 0.0), (None, 0.0), (None, 0)]
    candidates, dropped = vote(answers, QUERY)
    assert order(candidates) == [([[1, 2]], 2), ([[1], [2]], 1)] and dropped == {"malformed": 3, "copies": 2}
    assert [c.logprob for c in candidates] == [-9.0, -0.1]
    assert vote([(None, 0.0), (QUERY, 0.0)], QUERY) == ([], {"malformed": 1, "copies": 1})


def test_ties_go_by_the_summed_log_probability_then_by_the_cells():
    """Sums: B -4, A -5, though the best single view is A's; C has one vote less and is the surest."""
    answers = [(B, -2.0), (A, -0.5), (C, -0.1), (B, -2.0), (A, -4.5)]
    assert order(vote(answers, QUERY)[0]) == [([[1], [2]], 2), ([[1, 2]], 2), ([[3, 3]], 1)]
    equal = [(C, -1.0), (A, -1.0), (B, -1.0)]
    assert [c.grid.tolist() for c in vote(equal, QUERY)[0]] == [[[1, 2]], [[3, 3]], [[1], [2]]]


def test_the_order_of_the_views_does_not_matter():
    rng = np.random.default_rng(0)
    answers = [(g, float(-v)) for g in (A, B, C) for v in rng.random(4)] + [(None, 0.0), (QUERY, 0.0)]
    expected = vote(answers, QUERY)
    for _ in range(50):
        shuffled = [answers[i] for i in rng.permutation(len(answers))]
        candidates, dropped = vote(shuffled, QUERY)
        assert order(candidates) == order(expected[0]) and dropped == expected[1]
        assert [c.logprob for c in candidates] == [c.logprob for c in expected[0]]


def test_there_are_always_two_attempts():
    def attempts(candidates):
        return [a.tolist() for a in two_attempts(candidates, QUERY)]

    assert attempts([[[1]], [[2]], [[3]]]) == [[[1]], [[2]]]
    assert attempts([[[1]]]) == [[[1]], [[1]]]
    assert attempts([]) == [[[0, 0]], [[0, 0]]]  # the input: never right by chance


def test_the_limit_on_answers_holds_for_every_official_task_in_every_view(arc_dir, arc2_dir):
    for folder, split in itertools.product((arc_dir, arc2_dir), ("training", "evaluation")):
        questions, truths = solve.read_questions(folder, split, [])
        limits = [solve.answer_limit(q) for q in questions]
        assert max(limits) == 931 and min(limits) < 400
        for q, limit in zip(questions, limits, strict=True):
            for answer in truths[q.name]:
                assert max(len(train.encode_grid(g)) for g in (answer, answer.T)) < limit, q.name


# ---------------------------------------------------------------------------------------------------------------------
# Scores


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
    nothing = score(submission, {"a": [None]}, {"a": [False]})
    assert nothing["pass@2"] == {"arc_prize": None, "per_output": None, "all_outputs": None} and nothing["tasks"] == 0
    assert "none" in solve.table(nothing)


def submission_of(truths, change=lambda name, answers: answers):
    """A submission in Kaggle's layout whose first attempts are `change(name, right answers)`; the second is 1 x 1."""
    return {name: [{"attempt_1": None if a is None else a.tolist(), "attempt_2": [[0]]}
                   for a in change(name, answers)] for name, answers in truths.items()}  # fmt: skip


def shares(capsys, submission, path, *where):
    """What --score says about a submission: its three numbers for one attempt and for two."""
    path.write_text(json.dumps(submission))
    assert call("--score", path, *where) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [[last[f"pass@{n}"][rule] for rule in ("arc_prize", "per_output", "all_outputs")] for n in (1, 2)], last


def test_perfect_empty_shuffled_and_random_submissions(arc_dir, tmp_path, capsys):
    """Over the 400 official evaluation tasks, and `--score` needs no run for it."""
    _, truths = solve.read_questions(arc_dir, "evaluation", [])
    path, where = tmp_path / "submission.json", ("--data-dir", arc_dir, "--split", "evaluation")
    found, last = shares(capsys, submission_of(truths), path, *where)
    assert found == [[1, 1, 1]] * 2 and (last["tasks"], last["outputs"]) == (400, 419)
    for nothing in (None, [], [[]], [[0]]):
        empty = {n: [{"attempt_1": nothing, "attempt_2": nothing}] * len(a) for n, a in truths.items()}
        assert shares(capsys, empty, path, *where)[0] == [[0, 0, 0]] * 2
    several = [name for name, answers in truths.items() if len(answers) > 1]
    assert len(several) == 19  # their outputs in the wrong order: those tasks fail, wholly or, of three, by two
    turned = submission_of(truths, lambda name, answers: answers[1:] + answers[:1])
    _, last = shares(capsys, turned, path, *where)
    assert last["pass@2"]["all_outputs"] == pytest.approx(381 / 400)
    assert last["pass@1"]["per_output"] == pytest.approx(381 / 419)
    names = sorted(truths)
    rng = np.random.default_rng(0)
    moved = dict(zip(names, [names[i] for i in (np.arange(400) + 7) % 400], strict=True))
    strangers = submission_of(truths, lambda name, answers: (truths[moved[name]] * 4)[: len(answers)])
    assert shares(capsys, strangers, path, *where)[0] == [[0, 0, 0]] * 2
    noise = submission_of(truths, lambda name, answers: [rng.integers(0, 10, a.shape) for a in answers])
    assert shares(capsys, noise, path, *where)[0] == [[0, 0, 0]] * 2


BAD = {
    "not JSON": ("{", "cannot be read as JSON"),
    "a list": ([], "holds a list"),
    "a task is missing": (lambda s: s.pop("ev2"), "1 of 6 tasks are missing: ev2"),
    "nothing": (lambda s: s.clear(), "6 of 6 tasks are missing: ev0, ev1, ev2 and 3 more"),
    "a task too many": (lambda s: s.update(other=[]), "1 tasks are not in --data-dir and --split: other"),
    "an output is missing": (lambda s: s["ev0"].pop(), "task ev0 has a list of 1; it needs a list of 2"),
    "an object": (lambda s: s.update(ev0={}), "task ev0 has a dict"),
    "one attempt": (lambda s: s["ev0"][1].pop("attempt_2"), 'task ev0, output 1 has no "attempt_2"'),
    "no object": (lambda s: s["ev3"].__setitem__(0, [[1]]), 'task ev3, output 0 has no "attempt_1"'),
    "ragged": (lambda s: s["ev0"][1].update(attempt_2=[[1, 2], [3]]), "task ev0, output 1, attempt_2 is ragged"),
    "a float": (lambda s: s["ev5"][0].update(attempt_1=[[1.0]]), "task ev5, output 0, attempt_1 has a cell '1.0'"),
    "a truth value": (lambda s: s["ev5"][0].update(attempt_1=[[True]]), "attempt_1 has a cell 'True'"),
    "no colour": (lambda s: s["ev5"][0].update(attempt_1=[[10]]), "attempt_1 has a cell '10'"),
    "text": (lambda s: s["ev5"][0].update(attempt_1="0"), "attempt_1 is not a list of rows"),
    "too large": (lambda s: s["ev5"][0].update(attempt_1=[[0] * 31]), "sides must be 1 to 30"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_submission_is_refused_with_one_line(name, data, tmp_path, capsys):
    change, expected = BAD[name]
    path = tmp_path / "submission.json"
    if callable(change):
        submission = submission_of(solve.read_questions(data, "evaluation", [])[1])
        change(submission)
        path.write_text(json.dumps(submission))
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    assert call("--score", path, "--data-dir", data) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"solve.py: {path}") and expected in err, err


def test_some_tasks_of_a_submission_can_be_scored(data, tmp_path, capsys):
    _, truths = solve.read_questions(data, "evaluation", [])
    found, last = shares(capsys, submission_of(truths), tmp_path / "s.json", "--data-dir", data, "--tasks", "ev0")
    assert found == [[1, 1, 1]] * 2 and (last["tasks"], last["outputs"]) == (1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Solving


def test_what_solving_writes_and_prints(trained, solved, data, capsys):
    """Kaggle's layout for every task and output, a page, and scores that --score finds again."""
    submission, scores = load(solved / "submission.json"), load(solved / "scores.json")
    questions, truths = solve.read_questions(data, "evaluation", [])
    assert list(submission) == sorted(truths) == [q.name for q in questions]
    for q in questions:
        assert len(submission[q.name]) == len(q.inputs)
        for entry in submission[q.name]:
            assert list(entry) == ["attempt_1", "attempt_2"]
            for attempt in entry.values():
                read_grid(attempt, "attempt")
    assert (scores["tasks"], scores["outputs"], scores["unknown_outputs"], scores["answers"]) == (6, 7, 1, 5 * 8)
    assert scores["malformed_answers"] < 20, "the model has to write grids, or these tests prove little"
    assert call("--score", solved / "submission.json", "--data-dir", data) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: scores[key] for key in last if key != "settings"} == {k: last[k] for k in last if k != "settings"}
    page = (solved / "report.html").read_text()
    assert all(name in page for name in truths)


def test_answers_are_the_votes_of_the_views(trained, solved, data):
    """One output, done again by hand: every view asked alone, mapped back, counted."""
    questions, _ = solve.read_questions(data, "evaluation", [])
    model, _ = load_model(trained, solve.read_run(trained).model_cfg)
    known = {name: UNKNOWN_TASK + 1 + i for i, name in enumerate(load(trained / "config.json")["tasks"])}
    log = [json.loads(line) for line in (solved / "answers.jsonl").read_text().splitlines()]
    records = {record["task"]: record for record in log[1:]}
    for q in questions[:2]:
        for test, query in enumerate(q.inputs):
            answers = []
            for view in (make_view(0, q, k) for k in range(5)):
                prompt, _ = view_prompt(q, test, view, 256, known)
                tokens, length = torch.from_numpy(prompt)[None], torch.tensor([len(prompt)])
                new, logp = train.generate.plain(model, tokens, length, 300, train.END)
                found = train.decode_grid(new[0].tolist())
                answers.append((None if found is None else view.undo(found), float(logp)))
            candidates, dropped = vote(answers, query)
            kept = records[q.name]["outputs"][test]
            assert [(c["grid"], c["votes"]) for c in kept["candidates"]] == order(candidates)[:5]
            assert {k: kept[k] for k in dropped} == dropped
            logprobs = [c["logprob"] for c in kept["candidates"]]
            assert logprobs == pytest.approx([c.logprob for c in candidates[:5]], rel=1e-4)


def interrupt(monkeypatch, after):
    """As if Ctrl-C came while batch number `after` is answered; counts the batches that were answered."""
    made, answer = [], answer_prompts

    def patched(*args):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(args)
        return answer(*args)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    return made


def test_a_stopped_run_goes_on_to_the_same_bytes(trained, solved, tmp_path, monkeypatch, capsys):
    whole = interrupt(monkeypatch, None)
    assert call(trained, "--out", tmp_path / "whole", *FEW) == 0
    assert len(whole) >= 4 and tree(tmp_path / "whole") == tree(solved)
    out = tmp_path / "stopped"
    made = interrupt(monkeypatch, 2)
    assert call(trained, "--out", out, *FEW) == 130
    assert f"python solve.py {trained} --out {out}" in capsys.readouterr().out.splitlines()[-1]
    assert not (out / "submission.json").exists() and len((out / "answers.jsonl").read_text().splitlines()) > 1
    with open(out / "answers.jsonl", "a") as file:
        file.write('{"task": "ev')  # torn by a crash
    rest = interrupt(monkeypatch, None)
    assert call(trained, "--out", out, *FEW) == 0
    assert len(made) + len(rest) == len(whole) and tree(out) == tree(solved)
    none = interrupt(monkeypatch, 0)
    assert call(trained, "--out", out, *FEW) == 0 and none == [] and tree(out) == tree(solved)


def test_a_group_of_which_a_part_is_written_is_answered_again_to_the_same_bytes(trained, tmp_path, monkeypatch):
    several = ("--views", "3", "--batch-tokens", "1500")
    whole = interrupt(monkeypatch, None)
    assert call(trained, "--out", tmp_path / "a", *several) == 0
    lines = (tmp_path / "a" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "answers.jsonl").write_text("".join(lines[:2]))
    again = interrupt(monkeypatch, None)
    assert call(trained, "--out", tmp_path / "b", *several) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert [len(args[1]) for args in whole] == [len(args[1]) for args in again], "other batches, other rounding"


def test_rescoring_orders_the_candidates_by_all_views(trained, solved, data, tmp_path, capsys):
    assert call(trained, "--out", solved, *FEW, "--rescore") == 2 and "with rescore None" in capsys.readouterr().err
    assert call(trained, "--out", tmp_path, *FEW, "--rescore") == 0
    votes, scored = ([json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()[1:]]
                     for folder in (solved, tmp_path))  # fmt: skip
    model, _ = load_model(trained, solve.read_run(trained).model_cfg)
    questions = {q.name: q for q in solve.read_questions(data, "evaluation", [])[0]}
    moved = 0
    for one, other in zip(votes, scored, strict=True):
        q = questions[one["task"]]
        for test, (before, after) in enumerate(zip(one["outputs"], other["outputs"], strict=True)):
            totals = []
            for candidate in after["candidates"]:
                total = 0.0
                for view in (make_view(0, q, k) for k in range(5)):
                    prompt, _ = view_prompt(q, test, view, 256, solve.read_run(trained).task_tokens)
                    shown = view.show(np.array(candidate["grid"], np.uint8))
                    whole = torch.from_numpy(np.concatenate([prompt, train.encode_grid(shown), [train.END]]))
                    logp = model(whole[None, :-1])[0][0, len(prompt) - 1 :].log_softmax(-1)
                    total += logp.gather(1, whole[len(prompt) :, None]).sum().item()
                totals.append(total)
            assert totals == sorted(totals, reverse=True)
            moved += before["candidates"] != after["candidates"]
    assert moved, "nothing was put in another order"


@pytest.mark.parametrize("change, expected", [
    (("--views", "4"), "with views 5, not 4"),
    (("--seed", "1"), "with seed 0, not 1"),
    (("--block-size", "300"), "with block_size 256, not 300"),
    (("--tasks", "ev1"), "for other tasks"),
    (("--ttt-steps", "1"), "with ttt_steps 0, not 1"),
])  # fmt: skip
def test_answers_made_with_other_settings_are_not_mixed_in(change, expected, trained, solved, capsys):
    before = tree(solved)
    assert call(trained, "--out", solved, *FEW, *change) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and expected in err and "--out" in err and tree(solved) == before


def test_two_processes_do_not_write_into_one_folder(trained, solved, capsys):
    lock = hold(solved)
    assert call(trained, "--out", solved, *FEW) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another process" in err and str(solved) in err
    lock.close()
    assert call(trained, "--out", solved, *FEW) == 0


def test_other_weights_are_other_settings(trained, solved, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    state = checkpoint(trained)
    state["model"]["head.weight"][0, 0] += 1
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert call(tmp_path / "run", "--out", solved, *FEW) == 2
    assert "with other weights" in capsys.readouterr().err


def test_out_of_memory_halves_the_batches_and_goes_on(trained, solved, tmp_path, monkeypatch, capsys):
    asked, answer = [], answer_prompts

    def patched(model, prompts, runtime, limit, batch_tokens, drafts):
        asked.append(batch_tokens)
        if batch_tokens > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(model, prompts, runtime, limit, batch_tokens, drafts)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    assert call(trained, "--out", tmp_path, "--views", "5", "--batch-tokens", "6000") == 0
    assert asked[:3] == [6000, 3000, 1500] and set(asked[2:]) == {1500}
    assert capsys.readouterr().out.count("out of memory; going on") == 2
    assert load(tmp_path / "submission.json") == load(solved / "submission.json")


def test_without_an_end_to_halving_it_says_so(trained, tmp_path, monkeypatch, capsys):
    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("extras.views.answer_prompts", never)
    assert call(trained, "--out", tmp_path) == 2
    assert "lower --batch-tokens" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_or_a_file_of_tasks_that_the_run_has_never_seen(trained, data, tmp_path):
    (tmp_path / "mine").mkdir()
    task = make_task(np.random.default_rng(7), hidden=True)
    (tmp_path / "mine" / "new.json").write_text(json.dumps(task))
    for i, path in enumerate((tmp_path / "mine", tmp_path / "mine" / "new.json")):
        assert call(trained, "--data-dir", path, "--views", "2", "--out", tmp_path / str(i), "--picture") == 0
        assert list(load(tmp_path / str(i) / "submission.json")) == ["new"]
        scores = load(tmp_path / str(i) / "scores.json")
        assert scores["pass@2"]["arc_prize"] is None and scores["unknown_outputs"] == 1
        assert (tmp_path / str(i) / "picture-01.png").read_bytes().startswith(b"\x89PNG")


def test_results_go_beside_the_run_by_default_and_leave_its_own_files_alone(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    assert call(tmp_path / "run", "--views", "1", "--split", "training", "--tasks", "tr1", "tr0", "--picture") == 0
    out = tmp_path / "run" / "solve-training"
    assert list(load(out / "submission.json")) == ["tr0", "tr1"]
    assert sorted(f.name for f in out.iterdir()) == ["answers.jsonl", "picture-01.png", "report.html", "scores.json",
                                                     "submission.json"]  # fmt: skip
    shutil.rmtree(out)
    assert call(tmp_path / "run", "--views", "1", "--data-dir", data, "--tasks", "ev0") == 0  # other data, other folder
    assert [f.name for f in (tmp_path / "run").glob("solve-*")] == [f"solve-{data.name}-evaluation"]
    shutil.rmtree(tmp_path / "run" / f"solve-{data.name}-evaluation")
    assert tree(tmp_path / "run") == tree(trained)


# ---------------------------------------------------------------------------------------------------------------------
# Test-time training


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
    losses = [train.validation_loss(model, loader, runtime())]
    model.load_state_dict(torch.load(tmp_path / "a" / "adapted.pt", weights_only=True)["model"])
    losses.append(train.validation_loss(model, loader, runtime()))
    assert losses[1] < 0.9 * losses[0], losses

    made = interrupt(monkeypatch, 1)  # stopped while it answers: the adapted weights are there
    (tmp_path / "a" / "answers.jsonl").unlink()
    monkeypatch.setattr(solve, "adapt", lambda *args: pytest.fail("trained again"))
    assert call(trained, "--out", tmp_path / "a", *options) == 130 and len(made) == 1
    interrupt(monkeypatch, None)
    assert call(trained, "--out", tmp_path / "a", *options) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


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
        assert task.name == q.name and q.name not in folder.task_tokens
        listed = load(data / "evaluation" / f"{q.name}.json")["train"]
        assert same_pairs(task.pairs, [(np.array(p["input"]), np.array(p["output"])) for p in listed])


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


# ---------------------------------------------------------------------------------------------------------------------
# No leak


def test_scrambled_evaluation_answers_change_nothing_but_the_scores(data, tmp_path):
    """(a) Not a batch, not a loss, not a weight, not a prediction, with evaluation demonstrations learned from."""
    scrambled = write_tasks(tmp_path / "scrambled", scrambled=True)
    changed = [f.name for f in sorted((data / "evaluation").iterdir())
               if f.read_text() != (scrambled / "evaluation" / f.name).read_text()]  # fmt: skip
    assert len(changed) == 6
    loaders = [train.ArcDataLoader(load_arc(folder, 2, 30, "both").tasks, 4, 256) for folder in (data, scrambled)]
    for _ in range(2):  # epochs
        for one, other in zip(*loaders, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    runs = [learn(folder, tmp_path / name, "--demonstrations", "both", steps=40)
            for name, folder in (("one", data), ("other", scrambled))]  # fmt: skip
    losses = [[line.get("loss", line.get("val_loss")) for line in metrics(folder)] for folder in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 41
    for folder in runs:
        assert call(folder, *FEW, "--ttt-steps", "3") == 0
    for name in ("answers.jsonl", "submission.json"):
        one, other = ((folder / "solve-evaluation" / name).read_bytes() for folder in runs)
        assert one == other, name
    assert (runs[0] / "supervised_pairs.json").read_bytes() == (runs[1] / "supervised_pairs.json").read_bytes()


def collisions(folder, learned):
    """The evaluation outputs, as (task, number), whose pair is among the pairs of these tasks; and whose it is."""
    owners = {}
    for task in learned:
        for pair in task.pairs:
            owners.setdefault(canonical_hash(pair), set()).add(task.name)
    return {(name, i): owners[canonical_hash(pair)] for name, task in read_split(folder, "evaluation").items()
            for i, pair in enumerate(task["test"]) if canonical_hash(pair) in owners}  # fmt: skip


def test_no_evaluation_answer_is_supervised(arc_dir, arc2_dir):
    """(b) Up to symmetry and colours. Left in, two official training tasks would repeat evaluation pairs.

    Seven evaluation tasks ask for a turned or recoloured copy of one of their own demonstrations: who learns from these
    has seen the answer, and `solve.py` leaves it out of the score. ARC-2 has no such task.
    """
    assert collisions(arc_dir, load_arc(arc_dir, 0, 30, "training").tasks) == {}
    shared = [Task(name, task["train"] + task["test"]) for name, task in read_split(arc_dir, "training").items()
              if name in SHARE_EVALUATION_PAIRS]  # fmt: skip
    assert collisions(arc_dir, shared) == {("070dd51e", 0): {"40853293"}, ("50a16a69", 0): {"caa06a1f"}}
    own = ("00576224", "3979b1a8", "66e6c45b", "94414823", "992798f6", "ca8de6ea", "f3e62deb")
    assert collisions(arc_dir, load_arc(arc_dir, 40, 30, "both").tasks) == {(name, 0): {name} for name in own}
    assert collisions(arc2_dir, load_arc(arc2_dir, 40, 30, "both").tasks) == {}


def test_seen_outputs_are_marked_left_out_and_counted(arc_dir, arc2_dir, capsys):
    """(c) ARC-1's evaluation after ARC-2's training: 376 of its tasks are there, with all their outputs."""
    learned = load_arc(arc2_dir, 0, 30, "training").tasks
    pairs = {canonical_hash(p) for task in learned for p in task.pairs}
    questions, truths = solve.read_questions(arc_dir, "evaluation", [])
    seen = solve.mark_seen(questions, truths, pairs)
    whole = {task.name for task in learned} & truths.keys()
    assert len(whole) == 376 and all(all(seen[name]) for name in whole)
    right = {name: [(a, a) for a in answers] for name, answers in truths.items()}
    scores = score(right, truths, seen)
    assert scores["seen_outputs"] == sum(map(sum, seen.values())) == 395
    assert (scores["tasks"], scores["outputs"], scores["tasks_left_out"]) == (24, 24, 376)
    assert "395 outputs that the run learned from" in solve.table(scores)


def test_a_run_does_not_count_what_it_learned_from(data, trained, tmp_path, capsys):
    """Over the command line: a test that is a demonstration in other colours, asked from a run that learned it."""
    folder = tmp_path / "tasks"
    shutil.copytree(data, folder)
    task = load(folder / "evaluation" / "ev2.json")
    learned_from = load(trained / "supervised_pairs.json")
    known = load(folder / "training" / "tr5.json")["train"][1]
    assert canonical_hash([np.array(known[side], np.uint8) for side in ("input", "output")]) in learned_from
    swap = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 9])
    task["test"] = [{side: np.rot90(swap[np.array(known[side])]).tolist() for side in ("input", "output")}]
    (folder / "evaluation" / "ev2.json").write_text(json.dumps(task))
    assert call(trained, "--data-dir", folder, "--views", "2", "--out", tmp_path / "out") == 0
    scores = load(tmp_path / "out" / "scores.json")
    assert (scores["tasks"], scores["outputs"], scores["seen_outputs"], scores["tasks_left_out"]) == (5, 6, 1, 1)
    assert "1 outputs that the run learned from" in capsys.readouterr().out
    file = tmp_path / "out" / "submission.json"
    counts = []
    for who in ((trained,), ()):
        assert call(*who, "--score", file, "--data-dir", folder) == 0
        counts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["seen_outputs"])
    assert counts == [1, 0], "who made the submission decides"


def test_what_test_time_training_shows_counts_as_learned(data, trained, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(data, folder)
    task = load(folder / "evaluation" / "ev2.json")
    task["test"] = [{side: np.flipud(task["train"][0][side]).tolist() for side in ("input", "output")}]
    (folder / "evaluation" / "ev2.json").write_text(json.dumps(task))
    for steps, expected in ((0, 0), (1, 1)):
        out = tmp_path / str(steps)
        assert call(trained, "--data-dir", folder, "--views", "1", "--ttt-steps", steps, "--out", out) == 0
        assert load(out / "scores.json")["seen_outputs"] == expected


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("arguments, expected", [
    ([], "give the folder of a run"),
    (["{run}", "--views", "0", "--seed", "-1"], "--views is 0"),
    (["{run}", "--ttt-lr", "nan"], "--ttt-lr is nan"),
    (["{run}", "--views", "many"], "--views"),
    (["{run}", "--view", "2"], "--view"),
    (["{run}/missing"], "no run in this folder"),
    (["{run}", "--tasks", "ev0", "nope"], "has no nope"),
    (["{run}", "--data-dir", "{run}"], "config.json"),
    (["{run}", "--data-dir", "{run}/nowhere"], "nowhere: cannot be read"),
    (["{run}", "--data-dir", "{run}/config.json"], '"train" must be a list'),
    (["{run}", "--out", "{run}/config.json"], "--out"),
    (["{run}", "--kernels", "triton", "--device", "cpu"], "--kernels triton"),
    (["--score", "{run}/nowhere.json", "--data-dir", "{data}"], "nowhere.json: cannot be read"),
])  # fmt: skip
def test_what_cannot_work_is_said_in_a_line(arguments, expected, trained, data, capsys):
    before = tree(trained)
    assert call(*(a.format(run=trained, data=data) for a in arguments)) == 2
    err = capsys.readouterr().err
    assert expected in err and all(line.startswith("solve.py: ") for line in err.splitlines()), err
    assert err.count("\n") == (2 if "-1" in arguments else 1) and tree(trained) == before


@pytest.mark.parametrize("name, content", [
    ("checkpoint.pt", None), ("checkpoint.pt", b"PK"), ("config.json", b"{}"), ("supervised_pairs.json", None),
    ("supervised_pairs.json", b"{"), ("supervised_pairs.json", b"7"),
])  # fmt: skip
def test_a_damaged_run_is_named(name, content, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if content is not None:
        (tmp_path / "run" / name).write_bytes(content)
    assert call(tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and name in err
    assert not (tmp_path / "run" / "solve-evaluation").exists()


def test_weights_of_another_model_and_runs_on_text_are_refused(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    config = load(trained / "config.json")
    for part, key, value, expected in (("model", "d_ff", 48, "does not fit"), ("train", "dataset", "fineweb", "ARC")):
        other = config | {part: config[part] | {key: value}}
        (tmp_path / "run" / "config.json").write_text(json.dumps(other))
        assert call(tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and expected in err
