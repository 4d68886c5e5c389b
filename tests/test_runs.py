"""extras/runs.py: settings that are checked, checkpoints, locks, signals and the log; damaged files by hypothesis."""

import contextlib
import errno
import gc
import itertools
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, ROOT, differences, metrics, one_thread  # noqa: F401
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train
from data.files import UserError
from extras import runs

OLD = ROOT / "tests" / "old_run"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture
def folder(tmp_path):
    """A copy of a run that an earlier version made."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that all examples of one test share."""
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("damaged") / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# Runs of earlier versions, whole and damaged


def prepared(folder):
    """What a resume of the old run has before it restores the checkpoint; its tasks are taken as given."""
    model_cfg, cfg = runs.load_config(folder)
    model, loader = train.GPT(model_cfg), train.Loader(cfg.batch_size)
    loader.fingerprint = "f0663b87975dacbb"
    return model, train.Optimizers(model, cfg), loader, train.Runtime(CPU, torch.float32)


def test_weights_of_other_sizes_are_called_that(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(replaced(config, ("model", "d_ff"), 32)))
    state = runs.load_checkpoint(folder / "checkpoint.pt")
    for read in (lambda: runs.restore(state, folder, *prepared(folder)),
                 lambda: runs.load_model(folder, runs.load_config(folder)[0])):  # fmt: skip
        with pytest.raises(UserError, match="checkpoint.pt: .*weights of other names or shapes"):
            read()


def test_the_average_of_an_earlier_version_answers(folder):
    state = runs.load_checkpoint(folder / "checkpoint.pt")
    state["ema"] = {f"module.{name}": 0 * v for name, v in state["model"].items()} | {"n_averaged": torch.tensor(3)}
    torch.save(state, folder / "checkpoint.pt")
    assert not any(p.any() for p in runs.load_model(folder, runs.load_config(folder)[0])[0].parameters())


@st.composite
def damage(draw, name):
    """The bytes of a file of the old run with some replaced, most often near the ends, where archives are delicate."""
    data = bytearray((OLD / name).read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        at = draw(st.integers(0, 300) | st.integers(max(0, size - 2500), size) | st.integers(0, size))
        data[at : at + draw(st.integers(0, 3) | st.integers(0, size))] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(max_examples=120)
@given(damage("checkpoint.pt"))
@example(b"")
@example(b"hello")
@example(pickle.dumps({"step": 1}, protocol=2))
def test_damaged_checkpoints_are_refused(place, data):
    (place / "checkpoint.pt").write_bytes(data)
    with contextlib.suppress(UserError):
        assert isinstance(runs.load_checkpoint(place / "checkpoint.pt"), dict)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = LEAVES | st.sampled_from([10**400, 2**40]) | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(), LEAVES)


def nodes(value, where=()):
    """The way to every node of nested containers."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [where, *itertools.chain.from_iterable(nodes(part, (*where, key)) for key, part in parts)]


def replaced(value, where, new):
    """A copy of nested containers with another value in one place."""
    if not where:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[where[0]] = replaced(copy[where[0]], where[1:], new)
    return copy


CONFIG = json.loads((OLD / "config.json").read_text())
ODD = st.builds(lambda where, value: replaced(CONFIG, where, value), st.sampled_from(nodes(CONFIG)), JSON)


def odd(part, **values):
    """The settings of the old run with other values in this part."""
    return json.dumps(CONFIG | {part: CONFIG[part] | values}).encode()


@settings(max_examples=250)
@given(damage("config.json") | ODD.map(lambda config: json.dumps(config).encode()))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"model": 1, "train": 2}')
@example(b'{"model": {"d_modle": 3}, "train": {}}')
@example(b'{"model": {"d_ff": ' + b"9" * 5000 + b'}, "train": {}}')
@example(odd("model", d_model=10**400))
@example(odd("model", chunk_size=0))
@example(odd("model", ngroups=3))
@example(odd("train", max_lr=float("nan")))
@example(odd("train", device="x" * 10**5))
def test_damaged_settings_are_refused(place, data):
    (place / "config.json").write_bytes(data)
    with contextlib.suppress(UserError):
        model_cfg, cfg = runs.load_config(place)
        assert isinstance(model_cfg, train.ModelConfig) and isinstance(cfg, train.TrainConfig)


STATE = torch.load(OLD / "checkpoint.pt", weights_only=True)
TENSORS = [torch.zeros(0), torch.zeros(3, 5), torch.full((2,), float("nan")), torch.ones(2, dtype=torch.bool)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.data_too_large])
@given(st.sampled_from(nodes(STATE)), JSON | st.sampled_from(TENSORS))
@example(("loader",), [])
@example(("loader", "epoch"), -1)
@example(("minutes",), float("nan"))
@example(("rng", "torch"), torch.zeros(3, dtype=torch.uint8))
@example(("optimizer", 0, "state", 0, "exp_avg"), {})
@example(("optimizer", 0, "state", 0), {"step": torch.zeros(())})
@example(("optimizer",), [1, 2])
@example(("optimizer",), [{}])
@example(("loader",), STATE["loader"] | {"files": [3]})
def test_checkpoints_with_odd_values_are_refused(place, where, value):
    shutil.copy(OLD / "config.json", place)
    torch.save(replaced(STATE, where, value), place / "checkpoint.pt")
    with contextlib.suppress(UserError):
        state = runs.load_checkpoint(place / "checkpoint.pt")
        model, optimizers, *more = prepared(place)
        step, minutes, skipped = runs.restore(state, place, model, optimizers, *more)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers.step(0.0)  # what was restored can be gone on with
        assert step >= 0 and minutes >= 0 and skipped >= 0


class Harmful:
    """A pickle that would run code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(zipped, folder):
    path, harm = folder / "checkpoint.pt", folder / "harm"
    torch.save(STATE | {"step": Harmful(harm)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="checkpoint.pt"):
        runs.load_checkpoint(path)
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # it would have


@posix
@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_something_else_in_the_place_of_a_file(name, folder):
    (path := folder / name).unlink()
    for make in (lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("x")):
        make()
        with pytest.raises((UserError, OSError), match=str(path)):
            runs.load_config(folder) if name == "config.json" else runs.load_checkpoint(path)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@posix
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_full_disk_leaves_the_checkpoint_before(share, folder):
    import resource

    path, before = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        words = rf"{path}: cannot be written \(File too large\); it needs .* MB where"
        with pytest.raises(UserError, match=words):
            runs.save_checkpoint(path, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and not list(folder.glob(".*"))
    runs.save_checkpoint(path, STATE)
    assert not differences(torch.load(path, weights_only=True), STATE)


def test_what_was_written_wrongly_is_not_taken(folder, monkeypatch):
    """A disk that says yes and keeps something else."""
    path, before, plain = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes(), torch.save

    def save(state, file):
        plain(state, file)
        file.seek(5000)
        file.write(bytes(100))
        file.seek(0, os.SEEK_END)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match=r"written .damaged at .*; it needs"):
        runs.save_checkpoint(path, STATE)
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(folder):
    before = (folder / "checkpoint.pt").read_bytes()
    for value in (float("nan"), float("inf")):
        bad = STATE["model"] | {"norm.weight": torch.full_like(STATE["model"]["norm.weight"], value)}
        with pytest.raises(UserError, match="--max-lr"):
            runs.save_checkpoint(folder / "checkpoint.pt", STATE | {"model": bad})
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_folder_has_one_writer_at_a_time(folder):
    first = runs.hold(folder)
    with pytest.raises(UserError, match="another process is writing there"):
        runs.hold(folder)
    first.close()
    second = runs.hold(folder)
    del second
    gc.collect()
    runs.hold(folder).close()


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_is_noted_ends_an_evaluation_and_handlers_are_put_back(number, capsys):
    before = signal.getsignal(number)
    with runs.watch_signals() as stop:
        assert not stop.up
        signal.raise_signal(number)
        assert stop.up
        if number == signal.SIGINT:  # the second one stops at once
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)
    with runs.watch_signals() as stop:
        with stop.at_once():
            signal.raise_signal(number)
            pytest.fail("went on")
        assert stop.up and "the evaluation was left out" in capsys.readouterr().out
    with runs.watch_signals() as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
        raise KeyboardInterrupt  # nobody's signal
    assert signal.getsignal(number) == before


@posix
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "a script's &"])
def test_what_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with runs.watch_signals() as stop:
            signal.raise_signal(number)
            assert not stop.up
    finally:
        signal.signal(number, before)


# ---------------------------------------------------------------------------------------------------------------------
# The log

NO_WANDB = {"train": {"wandb": False}}


def test_the_log_is_cut_back_and_mended(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.5}', '{"step": 2, "val_loss": 1.6}', "[1]", "null",
             '{"step": "3"}', '{"loss": 1}', "[" * 100_000, "\0\0\0", '{"step": 3, "loss": 1.0}', '{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    log = runs.open_log(tmp_path, 2, NO_WANDB)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 2]
    log(step=2, val_loss=1.6, solve_rate=0.25)  # made again
    log(step=3, loss=float("nan"), grad_norm=float("inf"), lr=1 / 3)
    kept = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "val_loss": 1.6, "solve_rate": 0.25}]
    assert metrics(tmp_path) == [*kept, {"step": 3, "loss": None, "grad_norm": None, "lr": 0.333333}]
    runs.open_log(tmp_path, 2, NO_WANDB)(step=3, loss=1.0)  # an evaluation that is not made again stays
    assert metrics(tmp_path) == [*kept, {"step": 3, "loss": 1.0}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named_with_the_log(tmp_path):
    log = runs.open_log(tmp_path, 0, NO_WANDB)
    log.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(UserError, match=f"metrics.jsonl: cannot be written .{os.strerror(errno.ENOSPC)}"):
        log(step=1, loss=1.0)


def test_without_wandb_one_line_and_no_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb: .* pip install wandb"):
        runs.open_log(tmp_path, 0, {"train": {"wandb": True}})
    gc.collect()
    assert capsys.readouterr().err == ""


def test_a_resume_goes_on_with_its_wandb_run(tmp_path, monkeypatch):
    asked, logged = [], []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **more: asked.append(more["id"]) or run))
    for step in (1, 2):
        log = runs.open_log(tmp_path, step, {"train": {"wandb": True}})
        log(step=step, loss=1.0)
        del log
    assert asked[0] == asked[1] and logged[:2] == [{"step": 1, "loss": 1.0}, "end"]


# ---------------------------------------------------------------------------------------------------------------------
# The environment of several processes

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("given, wrong", [
    ({}, False), ({"RANK": "1"}, False), ({"WORLD_SIZE": ""}, False), ({"WORLD_SIZE": "0"}, False),
    ({"WORLD_SIZE": "1", "RANK": "5"}, False), (WHOLE, False),
    ({"WORLD_SIZE": "2", "RANK": "0"}, True), ({"WORLD_SIZE": "two"}, True), ({"WORLD_SIZE": "-1"}, True),
    *((WHOLE | {name: ""}, True) for name in WHOLE if name != "WORLD_SIZE"),
    *((WHOLE | {name: value}, True) for name, value in (
        ("RANK", "2"), ("LOCAL_RANK", "2"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "ssh"), ("MASTER_PORT", "99999"),
        ("MASTER_ADDR", "no-such-host.invalid")))])  # fmt: skip
def test_variables_of_several_processes(given, wrong, monkeypatch):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert bool(found := runs.process_problems()) == wrong
    assert not found or "torchrun" in found[0] and "unset WORLD_SIZE" in found[0]
