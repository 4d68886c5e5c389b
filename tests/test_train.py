"""The loop, run for a few steps on a CPU: resuming, accumulation, several processes, validation, the run folder."""

import contextlib
import itertools
import json
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
import torch
from helpers import TINY, checkpoint, copy_small_tasks, metrics, one_thread, run, runtime, tiny_model  # noqa: F401
from torch import nn

import train
from arc_data.tasks import Task, canonical_hash, load_arc
from extras import runs
from train import IGNORE_INDEX, ArcDataLoader, Optimizers, TrainConfig, mean_loss, score_answers, validation_loss


@pytest.fixture(scope="module")
def data(arc_dir, tmp_path_factory):
    """Arguments that name small data of either kind: five steps are an epoch of the twenty tasks."""
    folder = tmp_path_factory.mktemp("data")
    copy_small_tasks(arc_dir, folder / "arc")
    helpers.write_text(folder / "text", tokens=1000)
    arc = ["--dataset", "arc", "--data-dir", folder / "arc", "--holdout", "3", "--block-size", "600", "--max-grid", "5"]
    return {"arc": arc, "fineweb": ["--dataset", "fineweb", "--data-dir", folder / "text", "--block-size", "32"]}


@pytest.fixture
def go(data, tmp_path, monkeypatch):
    """A function that trains for some steps in a folder, or else resumes the run there, and returns the folder."""
    helpers.make_quick(monkeypatch)

    def go(name, kind=None, steps=None, *more, code=0):
        what = [*TINY, *data[kind], "--max-steps", steps] if kind else ["--resume"]
        assert run(*what, *more, "--out-dir", tmp_path / name) == code
        return tmp_path / name

    return go


def numbers(folder, name):
    """This number of every line of the log that has it."""
    return [line[name] for line in metrics(folder) if name in line]


def assert_equal_runs(one, other):
    """Checkpoint, log and answers, all but the clock."""
    states = [checkpoint(folder) for folder in (one, other)]
    for state in states:
        state.pop("minutes"), state["config"]["train"].pop("out_dir")
    lines = [[line | {"minutes": 0, "tokens_per_second": 0} for line in metrics(folder)] for folder in (one, other)]
    assert not helpers.differences(*states) and lines[0] == lines[1]
    answers = [f.read_bytes() for folder in (one, other) for f in folder.glob("predictions.json")]
    assert len(answers) != 1 and len(set(answers)) <= 1


# == STOPPED AND RESUMED ==============================================================================================


INTERRUPTED = [  # the function in whose call of this number a command is interrupted, how, and the step saved by then
    ("optimizer_step", 3, "signal", 3), ("optimizer_step", 1, "signal", 4), ("optimizer_step", 3, "crash", 4),
    ("validation_loss", 1, "signal", 4), ("optimizer_step", 1, "signal", 5), ("validation_loss", 2, "signal", 10),
    (None, 0, None, 10), (None, 0, None, 10)]  # the last command has nothing left to do


def interrupted(function, number, how):
    """A function in whose call of this number Ctrl-C is pressed, or an error is raised."""
    calls = itertools.count(1)

    def call(*args):
        if next(calls) == number:
            if how == "crash":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    return call


@pytest.mark.parametrize("kind, more", [
    ("arc", "--focus 0.5"), ("arc", "--packed --remat --dropout 0.2 --grad-accum-steps 2 --batch-size 2"),
    ("fineweb", "--reset-at-document --dropout 0.2 --optimizer adamw"), ("fineweb", "--dtype float16")])
def test_a_run_that_is_interrupted_goes_on_to_the_last_bit(kind, more, go, data, tmp_path, monkeypatch, capsys):
    """With the command that it prints. Steps 4 and 8 are evaluated; after 5 an epoch of ARC ends."""
    whole, folder = go("whole", kind, 10, "--eval-every", 4, *more.split()), tmp_path / "my run"
    assert (checkpoint(whole)["loader"]["epoch"] > 0) == (kind == "arc")
    capsys.readouterr()
    argv = [*TINY, *data[kind], "--max-steps", 10, "--eval-every", 4, *more.split(), "--out-dir", folder]
    for name, number, how, saved in INTERRUPTED:
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(train, name, interrupted(getattr(train, name), number, how))
            assert run(*argv) == (130 if how == "crash" else 0)
        out, argv = capsys.readouterr().out, ["--resume", "--out-dir", folder]
        assert checkpoint(folder)["step"] == saved
        assert ("the evaluation was left out" in out) == (name == "validation_loss")
        if how == "signal":
            assert f"stopped at step {saved} and saved" in out
            argv = shlex.split(out.split("python train.py ")[1])
        if how == "crash":
            assert metrics(folder)[-1]["step"] == 6
            with open(folder / "metrics.jsonl", "a") as log:
                log.write('{"step": 7, "lo')  # torn
    assert_equal_runs(folder, whole)


def test_a_resume_may_extend_either_budget_and_keeps_the_time_spent(go):
    folder = go("run", "fineweb", 2)
    spent = checkpoint(folder)["minutes"]
    go("run", None, None, "--max-steps", 4)
    state = checkpoint(folder)
    assert state["step"] == 4 == state["config"]["train"]["max_steps"] and state["minutes"] > spent > 0
    assert json.loads((folder / "config.json").read_text())["train"]["max_steps"] == 4
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4]
    for minutes, more in ((spent / 2, False), (state["minutes"] + 0.02, True)):  # the first is spent already
        go("run", None, None, "--max-minutes", minutes)
        assert (checkpoint(folder)["step"] > 4) == more


@pytest.mark.parametrize("steps, minutes", [(8, 100), (1000, 0.6), (0, 0.6)])
def test_of_two_budgets_the_one_further_along_ends_the_run_and_drives_the_schedule(steps, minutes, go, monkeypatch):
    """On a clock on which each look takes a second."""
    monkeypatch.setattr(train.time, "monotonic", itertools.count(0.0).__next__)
    folder = go("run", "fineweb", steps, "--max-minutes", minutes, "--warmup-frac", 0, "--decay-frac", 1)
    state, rates = checkpoint(folder), numbers(folder, "lr")
    assert state["step"] == 8 if steps == 8 else state["step"] < 20 and 0.6 <= state["minutes"] < 0.7
    assert len(rates) > 5 and rates[1:] == sorted(set(rates[1:]), reverse=True) and rates[-1] < rates[0] / 4


def test_a_run_that_was_slow_to_begin_does_not_write_over_another(go, monkeypatch, capsys):
    """It finds its folder empty, reads its data, and meanwhile another run begins there and ends, or goes on."""
    plain = train.open_data

    def overtaken(*args):
        monkeypatch.setattr(train, "open_data", plain)
        go("run", "fineweb", 2)
        return plain(*args)

    monkeypatch.setattr(train, "open_data", overtaken)
    folder = go("run", "fineweb", 2, "--max-lr", "1e-4", code=2)
    assert "holds a run" in capsys.readouterr().err and checkpoint(folder)["config"]["train"]["max_lr"] != 1e-4
    with contextlib.closing(runs.hold(folder)):
        go("run", None, None, "--max-steps", 3, code=2)
    assert "another process is writing there" in capsys.readouterr().err
    go("run", None, None, "--max-steps", 3)


# == ACCUMULATION AND PROCESSES =======================================================================================


class Network(nn.Module):
    """A model as DistributedDataParallel wraps it: in its forward pass it looks whether gradients are exchanged."""

    def __init__(self, model):
        super().__init__()
        self.model, self.exchanges, self.found = model, True, []

    @contextlib.contextmanager
    def no_sync(self):
        self.exchanges = False
        yield
        self.exchanges = True

    def forward(self, x, y):
        self.found.append(self.exchanges)
        return self.model(x, y)


@pytest.mark.parametrize("grid", [True, False])
def test_eight_micro_batches_of_one_equal_one_of_eight(grid, monkeypatch):
    """Lengths, and so the numbers of supervised tokens, differ: a mean of means would be another gradient. Two
    processes, here with the same batches, exchange gradients on the last one only."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: tensor.mul_(2))
    tasks, found = helpers.random_tasks(8, pairs=(1, 4), largest=7), []
    for batch_size, accum, world in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 4, 2)):
        network, twins = Network(tiny_model("MAMA", grid, vocab_size=16)), runtime()
        twins.world = world
        tokens = {} if grid else {t.name: 0 for t in tasks}
        loader = ArcDataLoader(tasks, batch_size, 4096, grad_accum_steps=accum, task_tokens=tokens)
        batches, _ = train.next_batches(loader, iter(loader))
        if not grid:
            batches = [(x.clamp(max=15), y) for x, y in batches]
        assert len(batches) == accum and len({int((y != IGNORE_INDEX).sum()) for x, y in batches}) == accum
        loss = mean_loss(network, batches, twins).item()
        found.append((loss, torch.cat([p.grad.flatten() for p in network.parameters()])))
        assert network.found == [world == 1 or i == accum - 1 for i in range(accum)]
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert (gradient - found[0][1]).norm() < 1e-6 * found[0][1].norm()


def test_two_processes_equal_one(go, data, tmp_path):
    """torchrun with 2 x 1 x 2 sequences a step against one process with 4; AdamW, because Muon amplifies rounding."""
    code = "import sys, train; train.finish = lambda *_: print('end'); sys.exit(train.main(sys.argv[1:]))"
    (tmp_path / "script.py").write_text(code)
    common = ["--eval-every", "3", "--save-every", "2", "--optimizer", "adamw"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    sizes = ["--max-steps", "6", "--batch-size", "1", "--grad-accum-steps", "2"]
    process = helpers.python(*torchrun, *TINY, *data["arc"], *common, *sizes, "--out-dir", "two", cwd=tmp_path)
    folders = [go("one", "arc", 6, *common), tmp_path / "two"]
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("\nmodel  ") == out.count("\nend\n") == 1, "only one process may speak"
    one, two = map(metrics, folders)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-6 if a["step"] == 1 else 1e-4), a
    states = [checkpoint(folder) for folder in folders]
    assert states[0]["loader"] == states[1]["loader"] and states[0]["model"].keys() == states[1]["model"].keys()


# == EVALUATION =======================================================================================================


def test_validation_gives_the_same_loss_each_time():
    """The ancestor's validation iterator was never made anew: its default run died at the third evaluation."""
    model = tiny_model(grid=True)
    loader = ArcDataLoader(helpers.random_tasks(10), 4, 4096, train=False)
    first = validation_loss(model, loader, runtime())
    assert [validation_loss(model, loader, runtime()) for _ in range(2)] == [first] * 2
    part = validation_loss(model, loader, runtime(), batches=2)
    assert part == validation_loss(model, loader, runtime(), batches=2) != first
    assert validation_loss(model, loader, runtime()) == first


@pytest.mark.parametrize("kind", ["arc", "fineweb"])
def test_a_run_outlives_epochs_and_evaluations_that_do_not_touch_it(kind, go):
    arguments = [kind, 16, "--batch-size", 6, "--dropout", 0.1]
    often, once = go("often", *arguments, "--eval-every", 4, "--save-every", 3), go("once", *arguments)
    assert [line["step"] for line in metrics(often) if "val_loss" in line] == [4, 8, 12, 16]
    assert [line["step"] for line in metrics(once) if "val_loss" in line] == [16]
    assert numbers(often, "loss") == numbers(once, "loss") and metrics(often)[-2]["epoch"] >= 2
    assert not helpers.differences(checkpoint(often)["model"], checkpoint(once)["model"])


def test_scores_count_exact_grids_shapes_and_cells():
    a, b, c = (torch.full(shape, 3).numpy() for shape in ((2, 2), (1, 4), (4, 2)))
    wrong = a.copy()
    wrong[0, 1] = 4
    found = score_answers([a, None, wrong, b], [a, b, a, c])
    assert found == {"solve_rate": 0.25, "shape_accuracy": 0.5, "cell_accuracy": 7 / 20}


def test_learns_eight_official_tasks_by_heart(arc_dir, tmp_path):
    """Every pair of eight tasks in the answer's place, answered exactly after a few hundred steps without views."""
    small = load_arc(copy_small_tasks(arc_dir, tmp_path, training=8), 0, 30, "training").tasks
    shown = [Task(t.name, t.pairs[i:] + t.pairs[:i]) for t in small for i in range(len(t.pairs))]
    ((x, y),) = list(ArcDataLoader(shown, len(shown), 4096, train=False))
    torch.manual_seed(0)
    model = train.GPT(helpers.tiny_config("MA", grid=True, d_model=64, d_state=16, d_ff=128, chunk_size=32))
    optimizers, steps = Optimizers(model, TrainConfig()), 0
    while steps < 300 and (loss := mean_loss(model, [(x, y)], runtime())) >= 0.003:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1e-2 * min(1.0, (300 - steps) / 150))
        model.zero_grad()
        steps += 1
    prompts = [train.make_prompt(Task(t.name, [*t.pairs[:-1], (t.pairs[-1][0], None)]), 4096, {}) for t in shown]
    predicted = [grid for grid, _ in train.answer_prompts(model.eval(), prompts, runtime(), 931, 4 * 4096)]
    scores = score_answers(predicted, [t.pairs[-1][1] for t in shown])
    assert len(shown) > 20 and scores["solve_rate"] == 1.0, f"loss {loss:.4f} after {steps} steps"


# == THE RUN FOLDER ===================================================================================================


def test_run_folder_of_an_arc_run(data, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*TINY, *data["arc"], "--max-steps", "4", "--eval-every", "2", "--save-every", "2"]
    assert run(*arguments, "--out-dir", folder) == 0
    out = capsys.readouterr().out
    names = "checkpoint.pt config.json curves.png metrics.jsonl predictions.json predictions.png supervised_pairs.json"
    assert sorted(f.name for f in folder.iterdir()) == names.split()
    for name in ("curves.png", "predictions.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and str(folder / name) in out

    config, state = json.loads((folder / "config.json").read_text()), checkpoint(folder)
    arc = load_arc(data["arc"][3], 3, 5, "both")
    assert config["tasks"] == [t.name for t in arc.tasks] and config["train"]["max_steps"] == 4 == state["step"]
    assert state["config"]["model"] == config["model"] and config["model"]["n_tasks"] == len(arc.tasks)
    assert all(t.dtype == torch.float32 for t in state["model"].values())
    lines = metrics(folder)
    assert [(line["step"], "val_loss" in line) for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (4, 1)]
    of_step = {"loss", "lr", "grad_norm", "tokens_per_second", "padding", "epoch", "minutes"}
    scores = {"val_loss", "solve_rate", "shape_accuracy", "cell_accuracy"}
    assert all(line.keys() >= (scores if "val_loss" in line else of_step) for line in lines)
    summary = dict(line.split(":", 1) for line in out.split("\n---\n")[1].splitlines())
    assert summary.keys() >= {"steps", "minutes", "solve_rate", "solved", "picture"} and "--out-dir" not in out
    assert float(summary["val_loss"]) == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    assert summary["next"].strip() == f"python solve.py {folder}" and "held-out and evaluation tasks" in out

    learned = {canonical_hash(p) for t in arc.tasks for p in t.pairs}
    assert set(json.loads((folder / "supervised_pairs.json").read_text())) == learned
    asked, predictions = arc.questions, json.loads((folder / "predictions.json").read_text())
    assert len(asked) == 2 and "0d3d703e" not in {q.name for q in asked}  # is its own demonstration in other colours
    for shown, q, answer in zip(predictions, asked, arc.answers, strict=True):
        query = q.pairs[-1][0]
        assert canonical_hash((query, answer)) not in learned and len(shown["demonstrations"]) == len(q.pairs) - 1
        assert (shown["task"], shown["input"], shown["truth"]) == (q.name, query.tolist(), answer.tolist())
        assert shown.keys() == {"task", "test", "attempt", "demonstrations", "input", "prediction", "truth"}


def test_run_folder_of_a_text_run_in_a_thread(go):
    """Signals can be handled in the main thread only; a notebook or a server may start a run in another one."""
    with ThreadPoolExecutor(1) as thread:
        folder = thread.submit(go, "deep/run", "fineweb", 30, "--eval-every", 10).result()
    assert sorted(f.name for f in folder.iterdir()) == [
        "checkpoint.pt", "config.json", "metrics.jsonl", "supervised_pairs.json"]  # fmt: skip
    first, _, last = numbers(folder, "val_loss")
    assert last < first - 1, "text is not learned"


def test_runs_without_a_name_take_the_first_free_one(data, tmp_path, monkeypatch, capsys):
    helpers.make_quick(monkeypatch), monkeypatch.chdir(tmp_path)
    for name in ("arc", "arc-2", "arc-3", "fineweb"):
        assert train.new_run_folder(TrainConfig(name.partition("-")[0])) == Path("runs", name)
        Path("runs", name).mkdir(parents=True)
    assert run(*TINY, *data["fineweb"], "--max-steps", "1") == 0
    assert Path("runs/fineweb-2/checkpoint.pt").exists() and "runs/fineweb-2\n" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_that_are_not_finite_are_skipped_and_five_end_the_run(dtype, go, monkeypatch, capsys):
    """Steps 3 and 6 to 10 have a gradient that is not finite; they leave what the steps before left, and in float16
    half the loss's scale."""
    plain, made = train.mean_loss, []

    def poisoned(network, *rest):
        loss = plain(network, *rest)
        made.append([p.detach().clone() for p in network.parameters()])
        if len(made) in (3, 6, 7, 8, 9, 10):
            next(network.parameters()).grad[0] = float("inf")
        return loss

    poisoned.plain = plain.plain
    monkeypatch.setattr(train, "mean_loss", poisoned)
    folder = go("run", "fineweb", 12, "--save-every", 2, "--dtype", dtype, code=2)
    said = capsys.readouterr().err
    assert "5 times in a row" in said and "step 8" in said and "--max-lr" in said
    norms = numbers(folder, "grad_norm")
    assert [step for step, norm in enumerate(norms, 1) if norm is None] == [3, 6, 7, 8, 9, 10]
    assert numbers(folder, "skipped") == [0, 0, 1, 1, 1, 2, 3, 4, 5, 6]
    same = [all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in itertools.pairwise(made)]
    assert same == [step in (3, 6, 7, 8, 9) for step in range(1, 10)]
    state = checkpoint(folder)
    assert state["step"] == 8 and state["skipped"] == 4
    assert state["scaler"].get("scale", 0) == (1024 / 2**4 if dtype == "float16" else 0)


def test_float16_learns_what_float32_does(go):
    """Gradients too small for float16 come through, because the loss is scaled: the same losses to three digits."""
    unasked = ["--demonstrations", "training", "--holdout", 0]  # no evaluation, which takes most of the time
    one, other = (numbers(go(dtype, "arc", 6, *unasked, "--dtype", dtype), "loss") for dtype in ("float32", "float16"))
    assert other == pytest.approx(one, rel=2e-3) and other != one
