"""Small models, small data and small runs that several test files share."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from arc_data.tasks import SHARE_EVALUATION_PAIRS, Pair, Task

ROOT = Path(train.__file__).resolve().parent
CPU = torch.device("cpu")
MAGIC = 20240520  # first number of a .bin shard

PATTERNS = ("AAAA", "MMMM", "MAMA", "MMAM")
TINY = ["--preset", "nano", "--pattern", "MA", "--d-model", "32", "--n-head", "2", "--d-state", "8", "--headdim", "16",
        "--d-ff", "64", "--batch-size", "4", "--device", "cpu", "--dtype", "float32", "--eval-every", "0",
        "--save-every", "0"]  # fmt: skip


def tiny_config(pattern: str = "MAMA", grid: bool = False, **changes) -> train.ModelConfig:
    """A model of a few thousand parameters; short chunks, so that short sequences cross several of them."""
    sizes = dict(block_size=512, d_model=32, pattern=pattern, n_head=2, d_state=8, headdim=16, d_ff=48, chunk_size=8)
    arc = dict(vocab_size=train.ARC_VOCAB, tie_embeddings=False, grid=True, recall=True, n_tasks=3)
    return train.ModelConfig(**sizes | (arc if grid else dict(vocab_size=61)) | changes)


def tiny_model(pattern: str = "MAMA", grid: bool = False, seed: int = 0, **changes) -> train.GPT:
    """That model with weights so large that every token, position and parameter shows in the logits."""
    torch.manual_seed(seed)
    model = train.GPT(tiny_config(pattern, grid, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.7 * p.shape[1] ** -0.5)
            elif p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def runtime() -> train.Runtime:
    """One process on the CPU, with the fast functions."""
    return train.Runtime(CPU, torch.float32, train.pick_ops(CPU, torch.float32, "auto"))


def random_grid(rng: np.random.Generator, largest: int = 6, smallest: int = 1) -> np.ndarray:
    """A grid of any shape and colours."""
    return rng.integers(0, 10, rng.integers(smallest, largest + 1, 2)).astype(np.uint8)


def random_tasks(count: int, seed: int = 0, pairs: tuple[int, int] = (2, 5), largest: int = 6) -> list[Task]:
    """Tasks without any rule, whose pairs differ from each other."""
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(count):
        grids = [random_grid(rng, largest, 2) for _ in range(2 * rng.integers(pairs[0], pairs[1] + 1))]
        tasks.append(Task(f"task{i:03}", list(zip(grids[::2], grids[1::2], strict=True))))
    return tasks


def sequence(pairs: list[Pair], first: int = train.UNKNOWN_TASK) -> np.ndarray:
    """The whole sequence of a task as DESIGN draws it, prompt and answer, token by token."""
    tokens = [first]
    for question, answer in pairs:
        for mark, grid in ((train.IN, question), (train.OUT, answer)):
            tokens.append(mark)
            for row in grid.tolist():
                tokens += [*row, train.ROW]
        tokens.append(train.END)
    return np.array(tokens)


def parse_grids(tokens) -> list[tuple[int, np.ndarray]]:
    """The grids of a sequence, each with the mark (IN or OUT) that opened it; fails where a row has no end."""
    found = []
    for t in map(int, tokens):
        if t in (train.IN, train.OUT):
            found.append((t, [[]]))
        elif t == train.ROW:
            found[-1][1].append([])
        elif t < 10:
            found[-1][1][-1].append(t)
    assert all(rows[-1] == [] for _, rows in found), "a row without a row mark"
    return [(mark, np.array(rows[:-1], dtype=np.uint8)) for mark, rows in found]


def parse_pairs(tokens) -> list[Pair]:
    """The pairs of a whole sequence."""
    grids = parse_grids(tokens)
    assert [mark for mark, _ in grids] == [train.IN, train.OUT] * (len(grids) // 2)
    return [(grids[i][1], grids[i + 1][1]) for i in range(0, len(grids), 2)]


def same_pairs(one, other) -> bool:
    """Whether two lists of pairs hold the same grids in the same order."""
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)
    )  # fmt: skip


def task_json(pairs, answer=None) -> dict:
    """A task in the official layout, its last pair as the test."""
    listed = [{"input": np.asarray(i).tolist(), "output": np.asarray(o).tolist()} for i, o in pairs]
    return {"train": listed[:-1], "test": listed[-1:]}


def copy_small_tasks(arc_dir: Path, folder: Path, training: int = 26, evaluation: int = 4) -> Path:
    """The official tasks of fewest cells, in the official layout: a run on them takes seconds."""
    for split, count in (("training", training), ("evaluation", evaluation)):
        (folder / split).mkdir(parents=True)
        files = [f for f in (arc_dir / split).glob("*.json") if f.stem not in SHARE_EVALUATION_PAIRS]
        for f in sorted(files, key=lambda f: (f.stat().st_size, f.name))[:count]:
            shutil.copy(f, folder / split)
    return folder


def write_shard(path: Path, tokens) -> Path:
    """A token shard, in the format that the name's ending says."""
    tokens = np.asarray(tokens, dtype=np.uint16)
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, 1, len(tokens)
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


def write_text(folder: Path, tokens: int = 3000, top: int = 50) -> Path:
    """Two training shards, one of either format, and one for validation: noisy counting, which a model can learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in (("train_000001.npy", tokens), ("train_000002.bin", tokens // 2), ("val_000000.npy", tokens // 4)):
        write_shard(folder / name, (np.arange(n) + rng.integers(0, 2, n).cumsum()) % top)
    return folder


def make_quick(monkeypatch) -> None:
    """Runs of this test draw no pictures, and their text has 64 kinds of token."""
    monkeypatch.setitem(train.PRESETS["fineweb"]["nano"], "vocab_size", 64)
    no_pictures = types.SimpleNamespace(plot_run=lambda folder: [])
    monkeypatch.setitem(sys.modules, "tools.plot", no_pictures)
    monkeypatch.setattr(importlib.import_module("tools"), "plot", no_pictures, raising=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For a file that imports this: models so small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*argv) -> int:
    """The exit code of `python train.py` with these arguments, in this process."""
    try:
        return train.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def exit_code(script: types.ModuleType, *argv) -> int:
    """The exit code of a script, such as sample.py, with these arguments, in this process."""
    try:
        return script.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def complaint(script: types.ModuleType, capsys: pytest.CaptureFixture, *argv, lines: int = 1) -> str:
    """The one line, or so many, with which a script refuses these arguments."""
    capsys.readouterr()
    assert exit_code(script, *argv) == 2
    out, err = capsys.readouterr()
    name = Path(script.__file__).name
    assert not out and err.count("\n") == lines and all(t.startswith(f"{name}: ") for t in err.splitlines()), err
    return err


def python(*argv, cwd: Path, **options) -> subprocess.Popen:
    """A Python process that sees this checkout and one thread, with its output as text."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) | options
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, **options)


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def checkpoint(folder: Path) -> dict:
    """A run's checkpoint, read as a stranger would."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def differences(one, other, where: str = "") -> list[str]:
    """Where two nests of containers and tensors are not the same to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        alone = [f"{where}/{k}" for k in one.keys() ^ other.keys()]
        return alone + [d for k in one.keys() & other.keys() for d in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.shape == other.shape and torch.equal(one, other) else [where]
    return [] if one == other else [f"{where}: {one} {other}"]
