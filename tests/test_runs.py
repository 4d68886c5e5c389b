"""extras/runs.py: settings that are checked, checkpoints, locks, signals and the log; damaged files by hypothesis."""

import contextlib
import errno
import gc
import io
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
unusual = [HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]  # each example writes its own file
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture
def folder(tmp_path):
    """A copy of a run that an earlier version made."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


@st.composite
def damage(draw, name):
    """The bytes of a file of the old run with some replaced, most often near the ends, where archives are delicate."""
    data = bytearray((OLD / name).read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        at = draw(st.integers(0, 300) | st.integers(max(0, size - 2500), size) | st.integers(0, size))
        data[at : at + draw(st.integers(0, 3) | st.integers(0, size))] = draw(st.binary(max_size=8))
    return bytes(data)


STATE = torch.load(OLD / "checkpoint.pt", weights_only=True)
CONFIG = json.loads((OLD / "config.json").read_text())
TENSORS = [torch.zeros(0), torch.zeros(3, 5), torch.full((2,), float("nan")), torch.ones(2, dtype=torch.bool)]
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


def odd_config(where, value):
    return json.dumps(replaced(CONFIG, where, value)).encode()


def odd_state(where, value):
    torch.save(replaced(STATE, where, value), file := io.BytesIO())
    return file.getvalue()


@settings(max_examples=250, suppress_health_check=unusual)
@given(damage("config.json") | st.builds(odd_config, st.sampled_from(nodes(CONFIG)), JSON))
@example(b"[" * 100_000)
@example(b'{"model": 1, "train": 2}')
@example(b'{"model": {"d_modle": 3}, "train": {}}')
@example(b'{"model": {"d_ff": ' + b"9" * 5000 + b'}, "train": {}}')
@example(odd_config(("model", "d_model"), 10**400))
@example(odd_config(("model", "chunk_size"), 0))
@example(odd_config(("model", "ngroups"), 3))
@example(odd_config(("train", "max_lr"), float("nan")))
@example(odd_config(("train", "device"), "x" * 10**5))
def test_damaged_settings_are_refused(folder, data):
    (folder / "config.json").write_bytes(data)
    with contextlib.suppress(UserError):
        model_cfg, cfg = runs.load_config(folder)
        assert isinstance(model_cfg, train.ModelConfig) and isinstance(cfg, train.TrainConfig)


def restored(folder):
    """The old run as a resume has it, its tasks taken as given, and what `restore` returns."""
    state, (model_cfg, cfg) = runs.load_checkpoint(folder / "checkpoint.pt"), runs.load_config(folder)
    model, loader = train.GPT(model_cfg), train.Loader(cfg.batch_size)
    optimizers, loader.fingerprint = train.Optimizers(model, cfg), "f0663b87975dacbb"
    found = runs.restore(state, folder, model, optimizers, loader, train.Runtime(CPU, torch.float32))
    return model, optimizers, found


@settings(max_examples=180, suppress_health_check=unusual)
@given(damage("checkpoint.pt") | st.builds(odd_state, st.sampled_from(nodes(STATE)), JSON | st.sampled_from(TENSORS)))
@example(b"")
@example(pickle.dumps({"step": 1}, protocol=2))
@example(odd_state(("loader",), []))
@example(odd_state(("loader", "epoch"), -1))
@example(odd_state(("minutes",), float("nan")))
@example(odd_state(("rng", "torch"), torch.zeros(3, dtype=torch.uint8)))
@example(odd_state(("optimizer", 0, "state", 0, "exp_avg"), {}))
@example(odd_state(("optimizer", 0, "state", 0), {"step": torch.zeros(())}))
@example(odd_state(("optimizer",), [1, 2]))
@example(odd_state(("optimizer",), [{}]))
@example(odd_state(("loader",), STATE["loader"] | {"files": [3]}))
def test_damaged_checkpoints_are_refused_or_can_be_gone_on_with(folder, data):
    (folder / "checkpoint.pt").write_bytes(data)
    with contextlib.suppress(UserError):
        model, optimizers, counts = restored(folder)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers.step(0.0)
        assert all(n >= 0 for n in counts)


def test_weights_of_other_sizes_are_called_that(folder):
    (folder / "config.json").write_bytes(odd_config(("model", "d_ff"), 32))
    for read in (restored, lambda folder: runs.load_model(folder, runs.load_config(folder)[0])):
        with pytest.raises(UserError, match="checkpoint.pt: .*weights of other names or shapes"):
            read(folder)


def test_the_average_of_an_earlier_version_answers(folder):
    average = {f"module.{name}": 0 * v for name, v in STATE["model"].items()} | {"n_averaged": torch.tensor(3)}
    torch.save(STATE | {"ema": average}, folder / "checkpoint.pt")
    assert not any(p.any() for p in runs.load_model(folder, runs.load_config(folder)[0])[0].parameters())


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(zipped, folder):
    path, harm = folder / "checkpoint.pt", folder / "harm"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (harm,)

    torch.save(STATE | {"step": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="checkpoint.pt"):
        runs.load_checkpoint(path)
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # it would have


@posix
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("x", path)])
def test_something_else_in_the_place_of_a_file(make, folder):
    for name, read in (("checkpoint.pt", runs.load_checkpoint), ("config.json", lambda _: runs.load_config(folder))):
        (path := folder / name).unlink()
        make(path)
        with pytest.raises((UserError, OSError), match=str(path)):
            read(path)


@posix
def test_a_full_disk_leaves_the_checkpoint_before(folder):
    import resource

    path, before = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.0, 0.3, 0.99):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
        try:
            with pytest.raises(UserError, match=f"{path}: cannot be written .File too large.; it needs .* MB where"):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, folder):
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="lower learning rate"):
        runs.save_checkpoint(folder / "checkpoint.pt", replaced(STATE, ("model", "norm.weight"), torch.tensor(value)))
    assert (folder / "checkpoint.pt").read_bytes() == before


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with runs.watch_signals() as stop:
        assert not stop.up
        signal.raise_signal(number)
        assert stop.up
        with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
            signal.raise_signal(number)  # a second Ctrl-C stops at once
    with runs.watch_signals() as stop:
        with stop.at_once():
            signal.raise_signal(number)
            pytest.fail("went on")
    with runs.watch_signals() as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
        raise KeyboardInterrupt  # nobody's signal
    assert signal.signal(number, signal.SIG_IGN) == before
    try:
        with runs.watch_signals() as stop:
            signal.raise_signal(number)
            assert not stop.up, "what nohup or a script's & ignores stays ignored"
    finally:
        signal.signal(number, before)


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


def test_wandb_goes_on_with_its_run_after_a_resume_and_is_asked_for_in_a_line(tmp_path, monkeypatch, capsys):
    asked, logged, wanted = [], [], {"train": {"wandb": True}}
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **more: asked.append(more["id"]) or run))
    for step in (1, 2):
        log = runs.open_log(tmp_path, step, wanted)
        log(step=step, loss=1.0)
        del log
    assert asked[0] == asked[1] and logged[:2] == [{"step": 1, "loss": 1.0}, "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb: .* pip install wandb"):
        runs.open_log(tmp_path, 0, wanted)
    gc.collect()
    assert capsys.readouterr().err == ""


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("given, world", [
    ({}, 1), ({"RANK": "one", "LOCAL_RANK": "x", "WORLD_SIZE": ""}, 1), ({"RANK": "1", "WORLD_SIZE": "0"}, 1),
    ({"WORLD_SIZE": "1", "RANK": "5"}, 1), (WHOLE, 2),
    ({"WORLD_SIZE": "2", "RANK": "0"}, None), ({"WORLD_SIZE": "two"}, None), ({"WORLD_SIZE": "-1"}, None),
    *((WHOLE | {name: ""}, None) for name in WHOLE if name != "WORLD_SIZE"),
    *((WHOLE | {name: value}, None) for name, value in (
        ("RANK", "2"), ("LOCAL_RANK", "2"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "ssh"), ("MASTER_PORT", "99999"),
        ("MASTER_ADDR", "no-such-host.invalid")))])  # fmt: skip
def test_variables_of_several_processes(given, world, monkeypatch):
    """What a cluster leaves there is one process; what torchrun sets is several; anything else is refused."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = runs.config_problems(train.ModelConfig(), train.TrainConfig(preset="base"))
    assert bool(found) == (world is None)
    assert not found or "torchrun" in found[0] and "unset WORLD_SIZE" in found[0]
    if world == 1:
        runtime = train.Runtime.start(train.TrainConfig(device="cpu"))
        assert (runtime.rank, runtime.world) == (0, 1)
