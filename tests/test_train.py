"""The loop, run for a few steps on a CPU: resuming, accumulation, several processes, validation, the run folder."""

import contextlib
import itertools
import json
import shlex
import signal
import threading
import time

import pytest
import torch
from helpers import (  # noqa: F401
    TINY,
    checkpoint,
    copy_small_tasks,
    differences,
    make_quick,
    metrics,
    one_thread,
    python,
    random_tasks,
    run,
    runtime,
    tiny_config,
    tiny_model,
    write_text,
)
from torch import nn

import train
from arc_data.tasks import Task, canonical_hash, load_arc
from extras import runs
from train import IGNORE_INDEX, ArcDataLoader, Optimizers, TrainConfig, mean_loss, score_answers, validation_loss

plain_step = train.optimizer_step


@pytest.fixture(scope="module")
def data(arc_dir, tmp_path_factory):
    """Arguments that name small data of either kind."""
    folder = tmp_path_factory.mktemp("data")
    copy_small_tasks(arc_dir, folder / "arc")
    write_text(folder / "text", tokens=1000)
    arc = ["--dataset", "arc", "--data-dir", folder / "arc", "--holdout", "3", "--block-size", "600"]
    return {"arc": arc, "fineweb": ["--dataset", "fineweb", "--data-dir", folder / "text", "--block-size", "32"]}


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which each look takes a second."""
    monkeypatch.setattr(train.time, "monotonic", itertools.count(0.0).__next__)


def stop_at(monkeypatch, step):
    """As if a signal came while this command makes its optimizer step number `step`; None: never."""
    made = []
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (made.append(1), plain_step(*args))[1])

    class Watch:
        up = property(lambda self: len(made) == step)
        at_once = contextlib.nullcontext

    monkeypatch.setattr(runs, "watch_signals", lambda: contextlib.nullcontext(Watch()))


def assert_equal_runs(one, other):
    """Checkpoint, log and answers, all but the clock."""
    states = [checkpoint(folder) for folder in (one, other)]
    for state in states:
        state.pop("minutes"), state["config"]["train"].pop("out_dir")
    lines = [[line | {"minutes": 0, "tokens_per_second": 0} for line in metrics(folder)] for folder in (one, other)]
    assert not differences(*states) and lines[0] == lines[1]
    answers = [f.read_bytes() for folder in (one, other) for f in folder.glob("predictions.json")]
    assert len(answers) != 1 and len(set(answers)) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("kind, more", [
    ("arc", "--focus 0.5"), ("arc", "--packed --remat --dropout 0.2 --grad-accum-steps 2 --batch-size 2"),
    ("fineweb", "--reset-at-document --dropout 0.2 --optimizer adamw"), ("fineweb", "--dtype float16")])
def test_a_stopped_run_goes_on_to_the_last_bit(kind, more, data, tmp_path, monkeypatch, quick):
    arguments = [*TINY, *data[kind], "--max-steps", "10", "--eval-every", "4", *more.split()]
    assert run(*arguments, "--out-dir", tmp_path / "whole") == 0
    assert checkpoint(tmp_path / "whole")["step"] == 10
    assert (checkpoint(tmp_path / "whole")["loader"]["epoch"] > 0) == (kind == "arc")
    for more_steps, step in ((3, 3), (1, 4), (3, 7), (1, 8), (None, 10)):  # 4 and 8 evaluate; an ARC epoch ends after 7
        stop_at(monkeypatch, more_steps)
        assert run(*(arguments if step == 3 else ["--resume"]), "--out-dir", tmp_path / "stopped") == 0
        assert checkpoint(tmp_path / "stopped")["step"] == step
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


def test_a_crashed_run_goes_on_from_its_last_checkpoint(data, tmp_path, monkeypatch, quick):
    """Step 4 has been evaluated when step 6 crashes; the log holds that once."""
    arguments, folder = [*TINY, *data["arc"], "--max-steps", "9", "--save-every", "2"], tmp_path / "crashed"
    assert run(*arguments, "--eval-every", "2", "--out-dir", tmp_path / "whole") == 0
    step, left = Optimizers.step, iter(range(5))

    def crash(self, lr):
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizers, "step", crash)
        assert run(*arguments, "--eval-every", "2", "--out-dir", folder) == 130
    assert checkpoint(folder)["step"] == 4 and metrics(folder)[-1]["step"] == 5
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # torn
    for _ in range(2):  # the second time there is nothing left to do
        assert run("--resume", "--out-dir", folder) == 0
        assert_equal_runs(folder, tmp_path / "whole")


def test_a_resume_may_extend_either_budget_and_keeps_the_time_spent(data, tmp_path, quick):
    folder = tmp_path / "run"
    assert run(*TINY, *data["fineweb"], "--max-steps", "2", "--out-dir", folder) == 0
    spent = checkpoint(folder)["minutes"]
    assert run("--resume", "--out-dir", folder, "--max-steps", "4") == 0
    state = checkpoint(folder)
    assert state["step"] == 4 == state["config"]["train"]["max_steps"] and state["minutes"] > spent > 0
    assert json.loads((folder / "config.json").read_text())["train"]["max_steps"] == 4
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4]
    for minutes, more in ((spent / 2, False), (state["minutes"] + 0.02, True)):  # the first is spent already
        assert run("--resume", "--out-dir", folder, "--max-minutes", minutes) == 0
        assert (checkpoint(folder)["step"] > 4) == more


def test_a_minute_budget_ends_the_run_and_drives_the_schedule(data, tmp_path, quick, ticking):
    arguments = [*TINY, *data["fineweb"], "--max-minutes", "0.6", "--warmup-frac", "0", "--decay-frac", "1"]
    assert run(*arguments, "--out-dir", tmp_path / "run") == 0
    rates = [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line]
    assert len(rates) > 5 and rates[1:] == sorted(set(rates[1:]), reverse=True) and rates[-1] < rates[0] / 4
    assert 0.6 <= checkpoint(tmp_path / "run")["minutes"] < 0.7


@pytest.mark.parametrize("steps, minutes", [(3, 100), (1000, 0.2)])
def test_of_two_budgets_the_one_further_along_decides(steps, minutes, data, tmp_path, quick, ticking):
    budgets = ["--max-steps", steps, "--max-minutes", minutes]
    assert run(*TINY, *data["fineweb"], *budgets, "--out-dir", tmp_path / "run") == 0
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 3 if steps == 3 else 1 < state["step"] < 20 and state["minutes"] >= 0.2


def test_signals_save_and_say_how_to_go_on(data, tmp_path):
    """The real script and real signals: Ctrl-C first, the others for the command that it prints."""
    arguments = [train.__file__, *TINY, *data["arc"], "--max-steps", "1000000", "--out-dir", "my run"]
    log, steps = tmp_path / "my run" / "metrics.jsonl", [0]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = python(*arguments, cwd=tmp_path)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > steps[-1] + 2:
                break
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in err, err
        last = [line for line in out.splitlines() if line][-1]
        assert "--resume" in last and "my run" in last
        steps.append(checkpoint(tmp_path / "my run")["step"])
        assert len(metrics(tmp_path / "my run")) == steps[-1] > steps[-2] and str(steps[-1]) in last
        arguments = [train.__file__, *shlex.split(last[last.index("python train.py") :])[2:]]


@pytest.mark.parametrize("kind, every, step", [("arc", 2, 2), ("arc", 0, 4), ("fineweb", 2, 2)])
def test_a_signal_stops_an_evaluation_too(kind, every, step, data, tmp_path, monkeypatch, capsys, quick):
    """And the resume makes it."""
    arguments, plain = [*TINY, *data[kind], "--max-steps", "4", "--eval-every", every], train.validation_loss
    assert run(*arguments, "--out-dir", tmp_path / "whole") == 0
    capsys.readouterr()

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_loss", interrupted)
        assert run(*arguments, "--out-dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "the evaluation was left out" in out and f"stopped at step {step} and saved" in out
    assert f"step      {step} " not in out and checkpoint(tmp_path / "run")["step"] == step
    assert run("--resume", "--out-dir", tmp_path / "run") == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_in_a_thread(data, tmp_path, quick):
    """Signals can be handled in the main thread only; a notebook or a server may start a run in another one."""
    found = []
    arguments = [*TINY, *data["fineweb"], "--max-steps", "2", "--out-dir", tmp_path / "run"]
    (thread := threading.Thread(target=lambda: found.append(run(*arguments)))).start()
    thread.join()
    assert found == [0] and checkpoint(tmp_path / "run")["step"] == 2


def test_a_run_that_was_slow_to_begin_does_not_write_over_another(data, tmp_path, monkeypatch, capsys, quick):
    """It finds its folder empty, reads its data, and meanwhile another run begins there and ends, or goes on."""
    folder, plain = tmp_path / "run", train.open_data
    arguments = [*TINY, *data["fineweb"], "--max-steps", "2", "--out-dir", folder]

    def overtaken(*args):
        monkeypatch.setattr(train, "open_data", plain)
        assert run(*arguments) == 0
        return plain(*args)

    monkeypatch.setattr(train, "open_data", overtaken)
    assert run(*arguments, "--max-lr", "1e-4") == 2
    assert "holds a run" in capsys.readouterr().err and checkpoint(folder)["config"]["train"]["max_lr"] != 1e-4
    with contextlib.closing(runs.hold(folder)):
        assert run("--resume", "--out-dir", folder, "--max-steps", "3") == 2
    assert "another process is writing there" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation and processes


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("grid", [True, False])
def test_eight_micro_batches_of_one_equal_one_of_eight(grid):
    """Lengths, and so the numbers of supervised tokens, differ: a mean of means would be another gradient."""
    tasks = random_tasks(8, pairs=(1, 4), largest=7)
    found = []
    for batch_size, accum in ((8, 1), (1, 8), (2, 4)):
        model = tiny_model("MAMA", grid, vocab_size=16)
        tokens = {} if grid else {t.name: 0 for t in tasks}
        loader = ArcDataLoader(tasks, batch_size, 4096, grad_accum_steps=accum, task_tokens=tokens)
        batches, _ = train.next_batches(loader, iter(loader))
        if not grid:
            batches = [(x.clamp(max=15), y) for x, y in batches]
        assert len(batches) == accum and len({int((y != IGNORE_INDEX).sum()) for x, y in batches}) == accum
        loss = mean_loss(model, batches, runtime()).item()
        found.append((loss, gradients(model)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert (gradient - found[0][1]).norm() < 1e-6 * found[0][1].norm()


def test_processes_exchange_gradients_on_the_last_micro_batch_only(monkeypatch):
    """The ancestor set the flag after the forward pass, where it no longer counts."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.alone, self.forwards, self.backwards = tiny_model(vocab_size=16), False, [], []
            next(self.model.parameters()).register_hook(lambda _: self.backwards.append(self.alone))

        @contextlib.contextmanager
        def no_sync(self):
            self.alone = True
            yield
            self.alone = False

        def forward(self, x, y):
            self.forwards.append(self.alone)
            return self.model(x, y)

    tokens = torch.randint(0, 16, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    batches = [(x, x.roll(-1, 1)) for x in tokens]
    network, twins = Network(), runtime()
    expected = mean_loss(network, batches, twins).item()
    assert network.forwards == [False] * 3
    gradient = gradients(network)
    network.zero_grad()
    network.forwards, network.backwards, twins.world = [], [], 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: tensor.mul_(2))  # the other one's are equal
    assert mean_loss(network, batches, twins).item() == pytest.approx(expected, rel=1e-6)
    assert network.forwards == network.backwards[-3:] == [True, True, False]
    torch.testing.assert_close(gradients(network), gradient)


KEEP_FIRST_GRADIENTS = """
import sys, torch, train
from tools import plot

plot.plot_run = lambda folder: []
clip, kept = torch.nn.utils.clip_grad_norm_, []

def keep(parameters, *rest):
    parameters = list(parameters)
    if not kept:
        kept.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        torch.save(kept[0], sys.argv[1])
    return clip(parameters, *rest)

torch.nn.utils.clip_grad_norm_ = keep
sys.exit(train.main(sys.argv[2:]))
"""


def test_two_processes_equal_one(data, tmp_path):
    """torchrun with 2 x 1 x 2 sequences a step against one process with 4; AdamW, because Muon amplifies rounding."""
    (tmp_path / "script.py").write_text(KEEP_FIRST_GRADIENTS)
    common = [*TINY, *data["arc"], "--max-steps", "6", "--eval-every", "3", "--save-every", "2", "--optimizer", "adamw"]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sizes = {"one": ["--batch-size", "4"], "two": ["--batch-size", "1", "--grad-accum-steps", "2"]}
    for name, size in sizes.items():
        command = [*(many if name == "two" else []), "script.py", f"{name}.pt", *common, *size, "--out-dir", name]
        out, err = (process := python(*command, cwd=tmp_path)).communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("\nsteps:") == 1, "only one process may speak"
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in sizes)
    assert (one - two).norm() < 1e-6 * one.norm()
    one, two = (metrics(tmp_path / name) for name in sizes)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4)
    states = [checkpoint(tmp_path / name) for name in sizes]
    assert states[0]["loader"] == states[1]["loader"] and states[0]["model"].keys() == states[1]["model"].keys()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_validation_gives_the_same_loss_each_time():
    """The ancestor's validation iterator was never made anew: its default run died at the third evaluation."""
    model = tiny_model(grid=True)
    loader = ArcDataLoader(random_tasks(10), 4, 4096, train=False)
    first = validation_loss(model, loader, runtime())
    assert [validation_loss(model, loader, runtime()) for _ in range(4)] == [first] * 4
    part = validation_loss(model, loader, runtime(), batches=2)
    assert part == validation_loss(model, loader, runtime(), batches=2) != first
    assert validation_loss(model, loader, runtime()) == first
    other = ArcDataLoader(loader.tasks, 3, 4096, train=False)  # the mean over all supervised tokens in any batches
    assert validation_loss(model, other, runtime()) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("kind", ["arc", "fineweb"])
def test_a_run_outlives_epochs_and_evaluations_that_do_not_touch_it(kind, data, tmp_path, quick):
    arguments = [*TINY, *data[kind], "--batch-size", "6", "--max-steps", "16", "--dropout", "0.1"]
    assert run(*arguments, "--eval-every", "2", "--save-every", "3", "--out-dir", tmp_path / "often") == 0
    assert run(*arguments, "--out-dir", tmp_path / "once") == 0
    often, once = (metrics(tmp_path / name) for name in ("often", "once"))
    assert [line["step"] for line in often if "val_loss" in line] == list(range(2, 17, 2))
    assert [line["step"] for line in once if "val_loss" in line] == [16]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (often, once)]
    assert losses[0] == losses[1] and len(losses[0]) == 16 and often[-2]["epoch"] >= 2
    assert not differences(*(checkpoint(tmp_path / name)["model"] for name in ("often", "once")))


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
    model = train.GPT(tiny_config("MA", grid=True, d_model=64, headdim=16, d_state=16, d_ff=128, chunk_size=32))
    optimizers = Optimizers(model, TrainConfig(max_lr=1e-2))
    questions = [Task(t.name, [*t.pairs[:-1], (t.pairs[-1][0], None)]) for t in shown]
    for step in range(300):
        loss = model(x, y)[1]
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1e-2 * min(1.0, (300 - step) / 150))
        if loss < 0.003:
            break
    prompts = [train.make_prompt(task, 4096, {}) for task in questions]
    predicted = [grid for grid, _ in train.answer_prompts(model.eval(), prompts, runtime(), 931, 4 * 4096)]
    scores = score_answers(predicted, [t.pairs[-1][1] for t in shown])
    assert len(shown) > 20 and scores["solve_rate"] == 1.0, f"loss {loss.item():.4f} after {step + 1} steps"


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


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
    arc = load_arc(data["arc"][3], 3, config["train"]["max_grid"], "both")
    assert config["tasks"] == [t.name for t in arc.tasks] and TrainConfig(**config["train"]).max_steps == 4
    assert state.keys() >= {"optimizer", "minutes", "rng", "loader"} and state["step"] == 4
    assert state["config"]["model"] == config["model"] and config["model"]["n_tasks"] == len(arc.tasks)
    train.GPT(train.ModelConfig(**config["model"])).load_state_dict(state["model"])
    assert all(t.dtype == torch.float32 for t in state["model"].values())

    lines = metrics(folder)
    assert [(line["step"], "val_loss" in line) for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (4, 1)]
    of_step = {"loss", "lr", "grad_norm", "tokens_per_second", "padding", "epoch", "minutes"}
    scores = {"val_loss", "solve_rate", "shape_accuracy", "cell_accuracy"}
    assert all(line.keys() >= (scores if "val_loss" in line else of_step) for line in lines)
    summary = dict(line.split(":", 1) for line in out.split("\n---\n")[1].splitlines())
    assert summary.keys() >= {"steps", "minutes", "val_loss", "solve_rate", "solved", "picture"}
    assert float(summary["val_loss"]) == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    assert summary["next"].strip() == f"python solve.py {folder}"
    assert "held-out and evaluation tasks" in out and "--out-dir" not in out

    asked = list(zip(arc.questions, arc.answers, strict=True))
    learned = {canonical_hash(p) for t in arc.tasks for p in t.pairs}
    assert set(json.loads((folder / "supervised_pairs.json").read_text())) == learned
    assert not {canonical_hash((q.pairs[-1][0], a)) for q, a in asked} & learned
    assert len(asked) == 2 and "0d3d703e" not in {q.name for q, _ in asked}  # is its own demonstration in other colours
    for shown, (q, a) in zip(json.loads((folder / "predictions.json").read_text()), asked, strict=True):
        assert shown.keys() == {"task", "test", "attempt", "demonstrations", "input", "prediction", "truth"}
        assert (shown["task"], shown["truth"]) == (q.name, a.tolist())
        assert shown["input"] == q.pairs[-1][0].tolist() and len(shown["demonstrations"]) == len(q.pairs) - 1


def test_run_folder_of_a_text_run(data, tmp_path, quick):
    folder = tmp_path / "deep" / "run"
    assert run(*TINY, *data["fineweb"], "--max-steps", "30", "--eval-every", "10", "--out-dir", folder) == 0
    assert sorted(f.name for f in folder.iterdir()) == [
        "checkpoint.pt", "config.json", "metrics.jsonl", "supervised_pairs.json"]  # fmt: skip
    losses = [line["val_loss"] for line in metrics(folder) if "val_loss" in line]
    assert len(losses) == 3 and losses[2] < losses[0] - 1, "text is not learned"


def test_runs_without_a_name_take_the_first_free_one(data, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/arc", "runs/arc-2", "runs/arc-3"):
        assert run(*TINY, *data["arc"], "--max-steps", "1", "--holdout", "0") == 0
        assert (tmp_path / expected / "checkpoint.pt").exists() and expected + "\n" in capsys.readouterr().out
    assert run(*TINY, *data["fineweb"], "--max-steps", "1") == 0
    assert (tmp_path / "runs/fineweb/checkpoint.pt").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_that_are_not_finite_are_skipped_and_five_end_the_run(dtype, data, tmp_path, monkeypatch, capsys, quick):
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
    arguments = [*TINY, *data["fineweb"], "--max-steps", "12", "--save-every", "2", "--dtype", dtype]
    assert run(*arguments, "--out-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "5 times in a row" in said and "step 8" in said and "--max-lr" in said
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [3, 6, 7, 8, 9, 10]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 3, 4, 5, 6]
    same = [all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in itertools.pairwise(made)]
    assert same == [step in (3, 6, 7, 8, 9) for step in range(1, 10)]
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 8 and state["skipped"] == 4
    assert state["scaler"].get("scale", 0) == (1024 / 2**4 if dtype == "float16" else 0)


def test_a_resume_on_other_data_is_refused(quick, arc_dir, tmp_path, capsys):
    """Same tasks, same shapes, one cell changed."""
    folder, tasks = tmp_path / "run", copy_small_tasks(arc_dir, tmp_path / "tasks")
    arguments = [*TINY, "--dataset", "arc", "--data-dir", tasks, "--holdout", "0", "--max-steps", "1"]
    assert run(*arguments, "--out-dir", folder) == 0
    file = sorted((tasks / "training").glob("*.json"))[0]
    task = json.loads(file.read_text())
    task["train"][0]["output"][0][0] = (task["train"][0]["output"][0][0] + 1) % 10
    file.write_text(json.dumps(task))
    capsys.readouterr()
    assert run("--resume", "--out-dir", folder, "--max-steps", "2") == 2
    assert "not those it was started with" in capsys.readouterr().err


def test_float16_learns_what_float32_does(data, tmp_path, quick):
    """Gradients too small for float16 come through, because the loss is scaled: the same losses to three digits."""
    losses = []
    for dtype in ("float32", "float16"):
        assert run(*TINY, *data["arc"], "--max-steps", "6", "--dtype", dtype, "--out-dir", tmp_path / dtype) == 0
        losses.append([line["loss"] for line in metrics(tmp_path / dtype) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[1] != losses[0]
