"""solve.py: views, votes and scores; going on after a stop; test-time training; and that no answer leaks."""

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, complaint, exit_code, make_quick, one_thread, random_grid, run, runtime, sequence  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

import solve
import train
from arc_data.tasks import Task, apply_symmetry, canonical_hash, load_arc, read_grid, read_split
from data.files import UserError
from extras.decode import answer_logprobs, answer_prompts
from extras.runs import hold, load_model
from extras.views import Question, Shown, answer_in_views, make_view, two_attempts, view_prompt, vote
from train import UNKNOWN_TASK

FEW = ("--views", "5", "--batch-tokens", "500")
call = functools.partial(exit_code, solve)
refused = functools.partial(complaint, solve)


def make_task(rng, tests=1):
    """A task that a tiny model learns to answer with some grid: the first cell of the input, twice."""
    grids = [random_grid(rng, 4, 3) for _ in range(3 + tests)]
    pairs = [{"input": grid.tolist(), "output": [[int(grid[0, 0])] * 2]} for grid in grids]
    return {"train": pairs[:3], "test": pairs[3:]}


def write_task(path, task):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(task))


def learn(data, folder, *more):
    """A tiny run on these tasks."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert run(*TINY, "--data-dir", data, "--block-size", "256", "--holdout", "2", "--out-dir", folder, *more) == 0
    return folder


def interrupt(monkeypatch, after):
    """As if Ctrl-C came while batch number `after` is answered; lists the prompts of each batch that was."""
    batches = []

    def patched(model, prompts, *args):
        if len(batches) == after:
            raise KeyboardInterrupt
        batches.append([prompt.tobytes() for prompt in prompts])
        return answer_prompts(model, prompts, *args)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    return batches


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ten training and six evaluation tasks: one with two tests, one with two of which one answer is not known. A run
    that has learned to answer with grids of one row, many of them wrong; and its answers. Shared: only read them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("made")
    data, trained, solved = folder / "tasks", folder / "run", folder / "solved"
    for i in range(10):
        write_task(data / "training" / f"tr{i}.json", make_task(rng))
    for i in range(6):
        task = make_task(rng, tests=1 + (i < 2))
        if i == 1:
            del task["test"][0]["output"]
        write_task(data / "evaluation" / f"ev{i}.json", task)
    learn(data, trained, "--demonstrations", "training", "--dropout", "0.05", "--max-steps", "100")
    with pytest.MonkeyPatch.context() as patch:
        batches = interrupt(patch, None)
        assert call(trained, "--out", solved, *FEW) == 0
    questions, truths = solve.read_questions(data, "evaluation", [])
    return SimpleNamespace(data=data, questions=questions, truths=truths, run=trained, solved=solved, batches=batches)


def model_of(folder):
    return load_model(folder, solve.read_run(folder).model_cfg)[0]


def load(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder):
    """What a log keeps of each task, by its name."""
    return {line["task"]: line["outputs"] for line in lines(folder / "answers.jsonl")[1:]}


def tree(folder):
    """Every file of a folder, by its path, with a hash of what it holds."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# == VIEWS AND VOTES ==================================================================================================


def question(name="a"):
    rng = np.random.default_rng(0)
    return Question(name, [(random_grid(rng), random_grid(rng)) for _ in range(5)], [random_grid(rng)])


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
    def seen(grids):
        return tuple(view.colours[apply_symmetry(g, view.symmetry)] for g in grids)

    q = question()
    for k in range(12):
        view = make_view(0, q, k)
        pairs, (query,) = [seen(q.demonstrations[i]) for i in view.order], seen(q.inputs)
        whole = len(view_prompt(q, 0, view, 4096, {})[0])
        for block in (whole, whole - 1, 150, 60):
            prompt, left_out = view_prompt(q, 0, view, block, {"a": 21, "b": 22})
            shown = sequence([*pairs[left_out:], (query, query)], first=21)
            assert prompt.tolist() == shown[: len(prompt)].tolist() and prompt[-1] == train.OUT
            assert (left_out == 0) == (block == whole) and (len(prompt) <= block or left_out == 4)
    assert view_prompt(question("z"), 0, view, 4096, {"a": 21})[0][0] == UNKNOWN_TASK


A, B, C, QUERY = (np.array(rows, dtype=np.uint8) for rows in ([[1, 2]], [[1], [2]], [[3, 3]], [[0, 0]]))


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


def test_ties_go_by_the_summed_log_probability_then_by_the_cells_and_there_are_always_two_attempts():
    """Sums: B -4, A -5, though the best single view is A's; C has one vote less and is the surest."""
    candidates, _ = vote([(B, -2.0), (A, -0.5), (C, -0.1), (B, -2.0), (A, -4.5)], QUERY)
    assert order(candidates) == [(B.tolist(), 2), (A.tolist(), 2), (C.tolist(), 1)]
    assert [c.logprob for c in candidates] == [-2.0, -2.5, -0.1]
    equal = [(C, -1.0), (A, -1.0), (B, -1.0)]
    assert order(vote(equal, QUERY)[0]) == [(A.tolist(), 1), (C.tolist(), 1), (B.tolist(), 1)]
    for grids, expected in (([A, B, C], (A, B)), ([A], (A, A)), ([], (QUERY, QUERY))):
        assert str(two_attempts([g.tolist() for g in grids], QUERY)) == str(expected)


def test_the_limit_on_answers_holds_for_every_official_task_in_every_view(arc_dir, arc2_dir):
    for folder, split in itertools.product((arc_dir, arc2_dir), ("training", "evaluation")):
        questions, truths = solve.read_questions(folder, split, [])
        limits = {q.name: solve.answer_limit(q) for q in questions}
        assert max(limits.values()) == 931 and min(limits.values()) < 400
        for name, answers in truths.items():
            assert max(len(train.encode_grid(g)) for a in answers for g in (a, a.T)) < limits[name], name


def test_an_answer_above_the_limit_of_its_own_task_does_not_count(monkeypatch):
    """Whatever the other tasks of the batch may say."""
    grids = [np.zeros((side, side), np.uint8) for side in (1, 4)]
    shown = [Shown(Question("a", [(grid, grid)], [grid]), 0, 1, 0, 1000, {}) for grid in grids]
    monkeypatch.setattr("extras.views.answer_prompts", lambda model, prompts, *_: [(grids[1], 0.0)] * len(prompts))
    answer_in_views(None, shown, None, 1000)
    assert [s.answers[0][0] is None for s in shown] == [True, False]


# == SCORES ===========================================================================================================


def shares(scores):
    return [[scores[f"pass@{n}"][rule] for rule in ("arc_prize", "per_output", "all_outputs")] for n in (1, 2)]


def counts(scores):
    return [scores[name] for name in ("tasks", "outputs", "seen_outputs", "unknown_outputs", "tasks_left_out")]


def test_scores_of_a_hand_computed_example():
    """The share of tasks is (1 + 0 + 2/4) / 3 with one attempt and (1 + 1/2 + 3/4) / 3 with two.

    Then outputs that were seen, or are not known, are left out, and with them a task that has no others: b's first
    output and c's second and third stay.
    """
    truths = {"a": [A], "b": [A, A], "c": [A] * 4}
    submission = {"a": [(A, B)], "b": [(B, A), (C, B)], "c": [(A, C), (A, A), (B, A), (None, None)]}
    seen = {name: [False] * len(outputs) for name, outputs in truths.items()}
    scores = solve.score(submission, truths, seen)
    assert shares(scores) == [pytest.approx([0.5, 3 / 7, 1 / 3]), pytest.approx([0.75, 5 / 7, 1 / 3])]
    assert counts(scores) == [3, 7, 0, 0, 0]
    seen["a"][0] = seen["c"][0] = True
    truths["b"][1] = truths["c"][3] = None
    scores = solve.score(submission, truths, seen)
    assert shares(scores) == [pytest.approx([0.25, 1 / 3, 0]), [1, 1, 1]] and counts(scores) == [2, 3, 2, 2, 1]


def submission_of(truths):
    """A submission in Kaggle's layout whose first attempts are these; the second is always 1 x 1."""
    return {name: [{"attempt_1": None if a is None else a.tolist(), "attempt_2": [[0]]} for a in answers]
            for name, answers in truths.items()}


def file_scores(capsys, submission, path, *where):
    """What --score says about a submission."""
    path.write_text(json.dumps(submission))
    assert call("--score", path, *where) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scoring_a_file_needs_no_run(arc_dir, made, tmp_path, capsys):
    """19 official tasks have several outputs, here in the wrong order; then only some tasks; and without answers."""
    truths, path = solve.read_questions(arc_dir, "evaluation", [])[1], tmp_path / "submission.json"
    turned = submission_of({name: answers[1:] + answers[:1] for name, answers in truths.items()})
    scores = file_scores(capsys, turned, path, "--data-dir", arc_dir, "--split", "evaluation")
    assert shares(scores) == [pytest.approx([381 / 400, 381 / 419, 381 / 400])] * 2 and counts(scores)[:2] == [400, 419]
    some = ("--data-dir", made.data, "--tasks", "ev0", "ev2")
    scores = file_scores(capsys, submission_of(made.truths), path, *some)
    assert shares(scores) == [[1, 1, 1]] * 2 and counts(scores)[:2] == [2, 3]
    empty = [{"attempt_1": [], "attempt_2": None}, {"attempt_1": [[]], "attempt_2": []}]
    submission = {name: empty[: len(answers)] for name, answers in made.truths.items()}
    assert shares(file_scores(capsys, submission, path, *some)) == [[0, 0, 0]] * 2


@pytest.mark.parametrize("change, expected", [
    ("{", "cannot be read as JSON"), ("[]", "holds a list"),
    (lambda s: s.clear(), "6 of 6 tasks are missing: ev0, ev1, ev2 and 3 more"),
    (lambda s: s.update(other=[]), "1 tasks are not in --data-dir and --split: other"),
    (lambda s: s["ev0"].pop(), "task ev0 has a list of 1; it needs a list of 2"),
    (lambda s: s["ev0"][1].pop("attempt_2"), 'task ev0, output 1 has no "attempt_2"'),
    (lambda s: s["ev0"][1].update(attempt_2=[[1, 2], [3]]), "task ev0, output 1, attempt_2 is ragged"),
    (lambda s: s["ev5"][0].update(attempt_1=[[True]]), "attempt_1 has a cell 'True'")])
def test_a_bad_submission_is_refused_with_one_line(change, expected, made, tmp_path, capsys):
    path, submission = tmp_path / "submission.json", submission_of(made.truths)
    if callable(change):
        change(submission)
    path.write_text(json.dumps(submission) if callable(change) else change)
    err = refused(capsys, "--score", path, "--data-dir", made.data)
    assert f"solve.py: {path}" in err and expected in err


# == SOLVING ==========================================================================================================


def test_what_solving_writes_and_prints(made, tmp_path, capsys):
    """Kaggle's layout for every task and output, a page, and scores that --score finds again."""
    submission, scores = load(made.solved / "submission.json"), load(made.solved / "scores.json")
    assert [(name, len(a)) for name, a in submission.items()] == [(q.name, len(q.inputs)) for q in made.questions]
    for entry in itertools.chain(*submission.values()):
        assert list(entry) == ["attempt_1", "attempt_2"]
        for attempt in entry.values():
            read_grid(attempt, "attempt")
    assert counts(scores) == [6, 7, 0, 1, 0] and scores["answers"] == 5 * 8
    assert scores["malformed_answers"] < 20, "the model has to write grids, or these tests prove little"
    again = file_scores(capsys, submission, tmp_path / "s.json", "--data-dir", made.data)
    assert shares(again) == shares(scores) and counts(again) == counts(scores)
    assert all(name in (made.solved / "report.html").read_text() for name in submission)


def shown_to(made, questions):
    """Each output of these as it was asked about: its input, its five views and prompts, and what the log keeps."""
    known = {name: UNKNOWN_TASK + 1 + i for i, name in enumerate(load(made.run / "config.json")["tasks"])}
    for q in questions:
        views = [make_view(0, q, k) for k in range(5)]
        for test, query in enumerate(q.inputs):
            yield q.name, test, query, views, [view_prompt(q, test, view, 256, known)[0] for view in views]


def test_answers_are_the_votes_of_the_views(made, tmp_path):
    """Two tasks, done again by hand: every view asked alone, mapped back, counted."""
    assert call(made.run, "--out", tmp_path, *FEW, "--no-rescore") == 0
    by_votes, model = records(tmp_path), model_of(made.run)
    assert by_votes != records(made.solved), "scores put nothing in another order"
    for name, test, query, views, prompts in shown_to(made, made.questions[:2]):
        answers, kept = [], by_votes[name][test]
        for view, prompt in zip(views, prompts, strict=True):
            tokens, length = torch.from_numpy(prompt)[None], torch.tensor([len(prompt)])
            new, logp = train.generate.plain(model, tokens, length, 300, train.END)
            found = train.decode_grid(new[0].tolist())
            answers.append((None if found is None else view.undo(found), float(logp)))
        candidates, dropped = vote(answers, query)
        assert [(c["grid"], c["votes"]) for c in kept["candidates"]] == order(candidates)[:5]
        assert {k: kept[k] for k in dropped} == dropped
        logprobs = [c["logprob"] for c in kept["candidates"]]
        assert logprobs == pytest.approx([c.logprob for c in candidates[:5]], rel=1e-4)


@pytest.mark.parametrize("judges", [8, 2])
def test_the_first_views_judge_the_candidates_of_all(judges, made, tmp_path, monkeypatch):
    monkeypatch.setattr("extras.views.JUDGES", judges)
    assert call(made.run, "--out", tmp_path, *FEW) == 0
    model = model_of(made.run)
    for name, test, _, views, prompts in shown_to(made, made.questions):
        grids = [np.array(candidate["grid"], np.uint8) for candidate in records(tmp_path)[name][test]["candidates"]]
        answers = [[np.append(train.encode_grid(view.show(g)), train.END) for g in grids] for view in views[:judges]]
        totals = np.sum(answer_logprobs(model, prompts[:judges], answers, runtime(), 3000), axis=0)
        assert totals.tolist() == sorted(totals, reverse=True), "the likeliest first"


def test_a_stopped_run_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, capsys):
    """Each group of tasks is answered once, but for one of which a line is lost: that again, in the same batches."""
    after, log = len(made.batches) - 1, tmp_path / "answers.jsonl"
    answered = interrupt(monkeypatch, after)
    assert call(made.run, "--out", tmp_path, *FEW) == 130
    assert f"python solve.py {made.run} --out {tmp_path}" in capsys.readouterr().out.splitlines()[-1]
    assert answered == made.batches[:after] and len(records(tmp_path)) >= 3
    assert not (tmp_path / "submission.json").exists()
    written = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*written[:-1], written[-1].replace('"left_out": ', '"left_out": 1'), '{"task": "ev']))
    rest = interrupt(monkeypatch, None)
    assert call(made.run, "--out", tmp_path, *FEW) == 0 and tree(tmp_path) == tree(made.solved)
    assert rest == made.batches[-len(rest) :] != made.batches
    interrupt(monkeypatch, 0)  # nothing is left to answer
    assert call(made.run, "--out", tmp_path, *FEW) == 0 and tree(tmp_path) == tree(made.solved)


def heavier(run, out):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["model"]["head.weight"][0, 0] += 1
    torch.save(state, run / "checkpoint.pt")


def headless(run, out):
    (out / "answers.jsonl").write_text("".join((out / "answers.jsonl").read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize("change, arguments, expected", [
    (None, ["--views", "4"], "with views 5, not 4; give another --out"), (None, ["--seed", "1"], "with seed 0, not 1"),
    (None, ["--block-size", "300"], "with block_size 256, not 300"), (None, ["--tasks", "ev1"], "for other tasks"),
    (None, ["--ttt-steps", "1"], "with ttt_steps 0, not 1"), (None, ["--no-rescore"], "with rescore True"),
    (heavier, [], "with other weights"), (headless, [], "by another program"),
    (lambda run, out: hold(out), [], "another process")])
def test_other_answers_and_those_of_another_process_are_left_alone(change, arguments, expected, made, tmp_path, capsys):
    run, out = shutil.copytree(made.run, tmp_path / "run"), shutil.copytree(made.solved, tmp_path / "out")
    held = change and change(run, out)
    before = tree(out)
    err = refused(capsys, run, "--out", out, *FEW, *arguments)
    assert expected in err and str(out) in err and tree(out) == before
    if held:
        held.close()


@pytest.mark.parametrize("enough", [2000, 0])
def test_out_of_memory_halves_the_batches_and_goes_on(enough, made, tmp_path, monkeypatch, capsys):
    tried = []

    def patched(model, prompts, runtime, limit, batch_tokens, drafts):
        tried.append(batch_tokens)
        if batch_tokens > enough:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer_prompts(model, prompts, runtime, limit, batch_tokens, drafts)

    monkeypatch.setattr("extras.views.answer_prompts", patched)
    code = call(made.run, "--out", tmp_path, "--views", "5", "--batch-tokens", "6000")
    out, err = capsys.readouterr()
    assert tried[:3] == [6000, 3000, 1500]
    if enough:
        assert code == 0 and set(tried[2:]) == {1500} and out.count("out of memory; going on") == 2
        assert load(tmp_path / "submission.json") == load(made.solved / "submission.json")
    else:
        assert code == 2 and "lower --batch-tokens" in err.splitlines()[-1]


def test_results_go_beside_the_run_and_tasks_may_be_such_as_it_has_never_seen(made, tmp_path):
    folder, task = shutil.copytree(made.run, tmp_path / "run"), make_task(np.random.default_rng(7))
    del task["test"][0]["output"]
    write_task(mine := tmp_path / "mine" / "new.json", task)
    for arguments, name, tasks in (
        (["--split", "training", "--tasks", "tr1", "tr0", "--picture"], "solve-training", ["tr0", "tr1"]),
        (["--data-dir", made.data, "--tasks", "ev0"], "solve-tasks-evaluation", ["ev0"]),
        (["--data-dir", mine.parent, "--picture"], "solve-mine", ["new"]),
        (["--data-dir", mine], "solve-new", ["new"]),
    ):
        assert call(folder, "--views", "1", *arguments) == 0
        files = {f.name: f.read_bytes() for f in (folder / name).iterdir()}
        assert list(json.loads(files["submission.json"])) == tasks
        scores = json.loads(files["scores.json"])
        assert tasks != ["new"] or (scores["unknown_outputs"], scores["pass@2"]["arc_prize"]) == (1, None)
        assert files.pop("picture-01.png", b"").startswith(b"\x89PNG") == ("--picture" in arguments)
        assert files.keys() == {"answers.jsonl", "report.html", "scores.json", "submission.json"}
        shutil.rmtree(folder / name)
    assert tree(folder) == tree(made.run), "the run's own files are left alone"


# == TEST-TIME TRAINING ===============================================================================================


def test_test_time_training_learns_the_demonstrations_and_leaves_the_run_alone(made, tmp_path, monkeypatch):
    """And from the same seed the same weights and answers, even when it is stopped while it answers."""
    before, one, other = tree(made.run), tmp_path / "one", tmp_path / "other"
    options = (*FEW, "--ttt-steps", "40", "--ttt-lr", "0.003")
    assert call(made.run, "--out", one, *options) == 0
    loader = train.ArcDataLoader([Task(q.name, q.demonstrations) for q in made.questions], 6, 256, seed=99)
    model = model_of(made.run)
    first = train.validation_loss(model, loader, runtime())
    model.load_state_dict(torch.load(one / "adapted.pt", weights_only=True)["model"])
    assert train.validation_loss(model, loader, runtime()) < 0.9 * first
    interrupt(monkeypatch, 1)
    assert call(made.run, "--out", other, *options) == 130
    interrupt(monkeypatch, None)
    monkeypatch.setattr(solve, "adapt", lambda *args: pytest.fail("trained again"))
    assert call(made.run, "--out", other, *options) == 0 and tree(other) == tree(one)
    assert tree(made.run) == before


@pytest.mark.parametrize("packed", [False, True])
def test_test_time_training_sees_demonstrations_only(packed, made, monkeypatch):
    """What its loader is given, with their tokens: a task that the run has no token for trains without one."""
    loaders = []

    def record(tasks, *args, **options):
        loaders.append((tasks, train.ArcDataLoader(tasks, *args, **options)))
        return loaders[-1][1]

    monkeypatch.setattr(solve, "ArcDataLoader", record)
    folder = solve.read_run(made.run)
    cfg = dataclasses.replace(folder.cfg, packed=packed, batch_size=16, grad_accum_steps=3)
    solve.adapt(model_of(made.run), made.questions, folder._replace(cfg=cfg), runtime(), 1, 0.001, 5)
    tasks, loader = loaders[-1]
    rows = len(train.ArcDataLoader(tasks, 1, 256, packed=packed, seed=5).batches())
    assert rows < 6 if packed else rows == 6
    assert loader.packed == packed and loader.effective == rows, "each task once in a batch"
    assert loader.seed == 5 and loader.task_tokens == folder.task_tokens
    assert not folder.task_tokens.keys() & {q.name for q in made.questions}
    assert tasks == [Task(q.name, q.demonstrations) for q in made.questions]


def test_an_overflow_of_float16_does_not_end_test_time_training(made, monkeypatch, capsys):
    """The step is skipped and the loss's scale halved; in float32 a gradient that is not finite is an error."""
    folder, model, where = solve.read_run(made.run), model_of(made.run), runtime()
    where.dtype, where.scaler = torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**40)
    solve.adapt(model, made.questions, folder, where, 2, 0.001, 0)
    assert where.scaler.get_scale() == 2.0**38 and "trained     2 steps" in capsys.readouterr().out
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (1.0, float("inf")))
    with pytest.raises(UserError, match="step 0: .*gradient norm inf; lower --ttt-lr"):
        solve.adapt(model, made.questions, folder, runtime(), 2, 0.001, 0)


# == NO LEAK ==========================================================================================================


def test_scrambled_evaluation_answers_change_nothing_but_the_scores(made, tmp_path):
    """Not a loss and not a prediction, with evaluation demonstrations learned from."""
    scrambled, rng, runs = shutil.copytree(made.data, tmp_path / "scrambled"), np.random.default_rng(1), []
    for file in (scrambled / "evaluation").iterdir():
        task = load(file)
        task["test"] = [pair | {"output": random_grid(rng, 5).tolist()} if "output" in pair else pair
                        for pair in task["test"]]
        assert task != load(file)
        write_task(file, task)
    for folder, name in ((made.data, "one"), (scrambled, "other")):
        runs.append(learn(folder, tmp_path / name, "--demonstrations", "both", "--max-steps", "10"))
        assert call(runs[-1], "--views", "3", "--ttt-steps", "3") == 0
    losses = [[line.get("loss", line.get("val_loss")) for line in lines(folder / "metrics.jsonl")] for folder in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 11
    for name in ("solve-evaluation/answers.jsonl", "solve-evaluation/submission.json", "supervised_pairs.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name


def test_no_evaluation_answer_is_supervised(arc_dir, arc2_dir):
    """Up to symmetry and colours; tests/test_data.py shows that two official training tasks are left out for it.

    Seven evaluation tasks ask for a turned or recoloured copy of one of their own demonstrations: who learns from these
    has seen the answer, and `solve.py` leaves it out of the score. ARC-2 has no such task.
    """
    own = ["00576224", "3979b1a8", "66e6c45b", "94414823", "992798f6", "ca8de6ea", "f3e62deb"]
    for folder, expected in ((arc_dir, own), (arc2_dir, [])):
        learned, found = set(load_arc(folder, 0, 30, "both").pairs), []
        for name, task in sorted(read_split(folder, "evaluation").items()):
            if known := learned & {canonical_hash(pair) for pair in task["test"]}:
                assert known <= {canonical_hash(pair) for pair in task["train"]}, name
                found.append(name)
        assert found == expected


def test_a_run_does_not_count_what_it_learned_from(made, tmp_path, capsys):
    """Two tests are pairs turned and in other colours: one of the run's own training, one of test-time training."""
    folder, swap = shutil.copytree(made.data, tmp_path / "tasks"), np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 9])
    for file, source in (("ev2.json", "training/tr5.json"), ("ev3.json", "evaluation/ev3.json")):
        known, task = load(folder / source)["train"][1], load(folder / "evaluation" / file)
        task["test"] = [{side: np.rot90(swap[np.array(known[side])]).tolist() for side in ("input", "output")}]
        write_task(folder / "evaluation" / file, task)
    for steps, seen in ((0, 1), (1, 2)):
        out = tmp_path / str(steps)
        assert call(made.run, "--data-dir", folder, "--views", "2", "--ttt-steps", steps, "--out", out) == 0
        scores = load(out / "scores.json")
        assert counts(scores) == [6 - seen, 7 - seen, seen, 1, seen]
        assert f"{seen} outputs that the run learned from" in capsys.readouterr().out
    submission, where = load(out / "submission.json"), ("--data-dir", folder)
    for who, seen in (((made.run,), 1), ((), 0)):  # who made the submission decides
        assert file_scores(capsys, submission, tmp_path / "s.json", *where, *who)["seen_outputs"] == seen


# == THE COMMAND LINE =================================================================================================


@pytest.mark.parametrize("damage, arguments, expected", [
    ({}, [], "give the folder of a run"),
    ({}, ["{run}", "--views", "0", "--seed", "-1"], "--views is 0"),
    ({}, ["{run}", "--ttt-lr", "nan"], "--ttt-lr is nan"),
    ({}, ["{run}/missing"], "no run in this folder"),
    ({}, ["{run}", "--tasks", "ev0", "nope"], "has no nope"),
    ({}, ["{run}", "--data-dir", "{run}/nowhere"], "nowhere: cannot be read"),
    ({}, ["{run}", "--data-dir", "{run}/config.json"], '"train" must be a list'),
    ({}, ["{run}", "--out", "{run}/config.json"], "--out"),
    ({}, ["{run}", "--kernels", "triton", "--device", "cpu"], "--kernels triton"),
    ({"config.json": lambda old: old.replace(b'"arc"', b'"fineweb"')}, ["{run}"], "wants one on ARC tasks"),
    *(({name: change}, ["{run}"], name) for name, change in (
        ("checkpoint.pt", None), ("config.json", lambda old: b"{}"), ("supervised_pairs.json", None),
        ("supervised_pairs.json", lambda old: b"7")))])
def test_what_cannot_work_is_said_in_a_line(damage, arguments, expected, made, tmp_path, capsys):
    folder = shutil.copytree(made.run, tmp_path / "run")
    for name, change in damage.items():
        (folder / name).unlink()
        if change:
            (folder / name).write_bytes(change((made.run / name).read_bytes()))
    before = sorted(folder.rglob("*")), tree(folder)
    err = refused(capsys, *(a.format(run=folder) for a in arguments), lines=2 if "-1" in arguments else 1)
    assert expected in err and (sorted(folder.rglob("*")), tree(folder)) == before
