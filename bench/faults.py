"""Break train.py in every way that a machine, a disk or a user can, and count what it costs. Linux.

    python bench/faults.py                                   # everything, about twenty minutes on one core
    python bench/faults.py --only kills damages --times 20   # a part of it, with other counts
    python bench/faults.py --only damages --seed 7 --case 123   # one damage again, with all it prints

Each promise is a part: `kills` (kill -9 at random instants), `damages` (damaged inputs), `disk` (no room), `memory`
(out of memory), `numbers` (NaN), `ranks` (several processes), `folder` (two runs in one), `signals` (SIGTERM, Ctrl-C)
and `overhead`. Runs are those of a model of a few thousand parameters on a few official tasks or on made-up text; a
killed process is a fork of this one that runs `main(argv)`, which saves the seconds of importing torch; a few are
whole processes. Ends are compared to the last bit, minutes and speed aside. Exit code 1 where a promise was broken.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import mmap
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimizers need it; here once, not in every child

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plot  # noqa: E402
import sample  # noqa: E402
import solve  # noqa: E402
import train  # noqa: E402

VOCABULARY = 257  # of the made-up text: bytes and end-of-text
SIZES = ["--preset", "nano", "--pattern", "MA", "--d-model", "32", "--n-head", "2", "--d-state", "8", "--headdim", "16",
         "--d-ff", "64", "--batch-size", "4", "--device", "cpu"]  # fmt: skip
NOBODY = 65534
STARTING, TRAINING, EVALUATING, SAVING, ENDING = range(5)
PHASES = ("start-up", "training", "evaluation", "writing a checkpoint", "the end")
WORDS = "unsigned char * Ω\u2028 <script>alert(1)</script> \U0001f600"
PHASE = mmap.mmap(-1, 1)  # what a child is doing, seen from outside


class Findings(list):
    """Promises that were broken, in words."""

    def expect(self, kept: Any, what: str) -> bool:
        """Note `what` unless `kept`."""
        if not kept:
            self.append(what)
            print(f"BROKEN      {what}", flush=True)
        return bool(kept)


# == PROCESSES ========================================================================================================


class Child:
    """A fork of this process that runs `main(argv)`, after `before()`; `out` and `err` are what it has printed."""

    def __init__(self, argv: list, folder: Path, before: Callable | None = None, main: Callable = train.main):
        self.paths, self.code = [folder / "out.txt", folder / "err.txt"], None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self.run([str(a) for a in argv], before, main)

    def run(self, argv: list[str], before: Callable | None, main: Callable) -> None:
        code = 70
        try:
            for number, path in zip((1, 2), self.paths, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
                                      for number in (1, 2))
            if before:
                before()
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)

    def wait(self, seconds: float = 300.0) -> int | None:
        """The exit code, negative for a signal; None where it still runs."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal; after SIGKILL the process is gone when this returns."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.wait()

    def end(self, seconds: float = 300.0) -> int:
        """The exit code; where it hangs, it is killed and the code is 99."""
        if self.wait(seconds) is None:
            self.kill()
            self.code = 99
        return self.code

    @property
    def out(self) -> str:
        return self.paths[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.paths[1].read_text(errors="replace")


def quick() -> None:
    """In a child: no pictures when a run ends."""
    plot.plot_run = lambda folder: []


def watched(slow: float = 0.0) -> Callable:
    """In a child: `quick`, PHASE kept up to date, and checkpoints written slowly, over so many seconds."""

    def phase(name: str, during: int, after: int) -> None:
        plain = getattr(train, name)

        @functools.wraps(plain)
        def wrapped(*args, **more):
            PHASE[0] = during
            result = plain(*args, **more)
            PHASE[0] = after
            return result

        setattr(train, name, wrapped)

    class Slow:
        """A file that takes its time; a signal that comes meanwhile meets torch's writer, as it would on a disk."""

        def __init__(self, file: Any):
            self.file = file

        def write(self, data: Any) -> int:
            time.sleep(slow / 300)  # a checkpoint of these models takes about as many writes
            written = self.file.write(data)
            self.file.flush()
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def save(state: dict, file: Any) -> None:
        plain_save(state, Slow(file))

    def flush(number: int) -> None:
        time.sleep(slow / 10)
        plain_flush(number)

    def before() -> None:
        quick()
        PHASE[0] = STARTING
        phase("accumulate", TRAINING, TRAINING)
        phase("evaluate", EVALUATING, TRAINING)
        phase("save_checkpoint", SAVING, TRAINING)
        phase("finish", ENDING, ENDING)
        if slow:
            torch.save, os.fsync = save, flush

    plain_save, plain_flush = torch.save, os.fsync
    return before


# == RUNS =============================================================================================================


def shard(path: Path, tokens: np.ndarray) -> None:
    """A token shard, in the format that the name's ending says."""
    if path.suffix == ".npy":
        np.save(path, tokens.astype(np.uint16))
    else:
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def make_data(place: Path) -> dict[str, Any]:
    """Small data of either kind below `place`: official tasks and noisy counting, with the flags that name them.

    "small" is the folder that holds both, "official" the one with all tasks.
    """
    from arc_data.prepare import prepare

    with contextlib.redirect_stdout(io.StringIO()):
        official = prepare("arcagi", place)
    place = place / "small"
    for split, many in (("training", 14), ("evaluation", 3)):
        (place / "tasks" / split).mkdir(parents=True)
        files = [f for f in (official / split).glob("*.json") if f.stem not in train.SHARE_EVALUATION_PAIRS]
        for file in sorted(files, key=lambda f: (f.stat().st_size, f.name))[:many]:
            shutil.copy(file, place / "tasks" / split)
    (place / "text").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train_1.npy", 1500), ("train_2.bin", 900), ("val_0.npy", 400)):
        shard(place / "text" / name, (np.arange(n) + rng.integers(0, 2, n).cumsum()) % 50)
    listed = [{"name": f.name, "bytes": f.stat().st_size} for f in sorted((place / "text").iterdir())]
    meta = {"tokenizer": "bytes", "vocab_size": VOCABULARY, "end_of_text": VOCABULARY - 1, "shards": listed}
    (place / "text" / "meta.json").write_text(json.dumps(meta))
    arc = ["--dataset", "arc", "--data-dir", place / "tasks", "--holdout", "2", "--block-size", "600"]
    text = ["--dataset", "fineweb", "--data-dir", place / "text", "--block-size", "32"]
    return {"arc": SIZES + arc, "text": SIZES + text, "small": place, "official": official}


KEPT = {"arc": ["--ema", "0.5", "--dropout", "0.1"], "text": ["--grad-accum-steps", "2", "--batch-size", "2"]}
OFTEN = ["--max-steps", "10", "--eval-every", "4", "--save-every", "3"]


def end_of(folder: Path) -> tuple[dict, list[dict]]:
    """What two equal runs have in common: the checkpoint and the log, without clock and folder. Raises if torn."""
    state = train.load_checkpoint(folder / "checkpoint.pt")
    state.pop("minutes"), [state["config"]["train"].pop(name) for name in ("out_dir", "save_failure")]
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError("the last line of metrics.jsonl is torn")
    lines = [json.loads(line) for line in text.splitlines()]
    return state, [{k: v for k, v in line.items() if k not in ("minutes", "tokens_per_second")} for line in lines]


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nests of containers and tensors are not the same to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for k in one for found in unequal(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for i in range(len(one)) for found in unequal(one[i], other[i], f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy().tobytes() == other.numpy().tobytes() else [where]
    return [] if type(one) is type(other) and (one == other or one != one) else [f"{where}: {one!r} {other!r}"[:200]]


def go_on(folder: Path, flags: list) -> list:
    """The arguments that a user gives after a crash: --resume, or the same again where nothing was saved yet."""
    return ["--resume", "--out-dir", folder] if (folder / "checkpoint.pt").exists() else [*flags, "--out-dir", folder]


class Whole:
    """A run that nothing happens to: flags, end, seconds it takes."""

    def __init__(self, place: Path, flags: list, name: str, before: Callable | None = None):
        self.flags, self.folder, start = flags, place / name, time.monotonic()
        child = Child([*flags, "--out-dir", self.folder], place, before or quick)
        if child.end(300):
            raise SystemExit(f"a run that nothing happens to ends in {child.code}: {child.err}")
        self.seconds, self.end = time.monotonic() - start, end_of(self.folder)

    def same(self, folder: Path) -> str:
        """How the end of another run differs from this one's; empty where it does not."""
        try:
            return "; ".join(unequal(self.end, end_of(folder))[:3])
        except (train.DataError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"


# == KILLS ============================================================================================================


def kills(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 100) -> dict:
    """kill -9 at instants that are uniform over a run, one to three times a run, which then goes on to its end."""
    phases, ends, killed = Counter(), 0, 0
    for kind, share in (("arc", times // 2), ("text", times - times // 2)):
        before = watched(slow=0.3)
        whole = Whole(place, [*data[kind], *KEPT[kind], *OFTEN], f"{kind} whole", before)
        killed = 0
        for number in itertools.count():
            folder, left = place / f"{kind} {number}", min(rng.randint(1, 3), share - killed)
            if left <= 0:
                break
            while True:
                child = Child(go_on(folder, whole.flags), place, before)
                if child.wait(rng.uniform(0, whole.seconds) if left else 300) is not None:
                    break
                child.kill()
                killed, left = killed + 1, left - 1
                phases[PHASES[PHASE[0]]] += 1
                standing(folder, found)
            found.expect(child.code == 0, f"{folder.name}: ends in {child.code} after a kill: {child.err[-300:]}")
            found.expect(not (why := whole.same(folder)), f"{folder.name}: another end than without a kill: {why}")
            ends += 1
            shutil.rmtree(folder)
    real = real_kills(place, data["arc"], rng, found, times // 20) if times >= 20 else 0
    return {"kills": sum(phases.values()) + real, "while in": dict(phases), "of whole processes": real,
            "runs ended, all equal to the last bit": ends}


def standing(folder: Path, found: Findings) -> None:
    """After a kill: the checkpoint is whole, and the log holds every step up to it."""
    if (folder / "checkpoint.pt").exists():
        try:
            step = train.load_checkpoint(folder / "checkpoint.pt")["step"]
        except train.DataError as error:
            found.expect(False, f"{folder.name}: after a kill {error}")
            return
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        logged = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        steps = [line["step"] for line in logged if "loss" in line]
        found.expect(steps[:step] == list(range(1, step + 1)), f"{folder.name}: lines lost: {steps} at step {step}")


SCRIPT = """import os, pathlib, sys, time, types, train
sys.modules["plot"] = types.SimpleNamespace(plot_run=lambda folder: [])
pathlib.Path(sys.argv[1], "pid" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
if sys.argv[2] != "0":
    plain = train.accumulate
    train.accumulate = lambda *args: (time.sleep(float(sys.argv[2])), plain(*args))[1]
sys.exit(train.main(sys.argv[3:]))
"""


def process(place: Path, argv: list, ranks: int = 1, sleep: float = 0.0) -> subprocess.Popen:
    """`python train.py`, or `torchrun train.py` with so many processes; their ids are in pid0, pid1, …"""
    (place / "script.py").write_text(SCRIPT)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for old in place.glob("pid*"):
        old.unlink()
    return subprocess.Popen([sys.executable, *many, "script.py", str(place), str(sleep), *map(str, argv)], cwd=place,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def real_kills(place: Path, flags: list, rng: random.Random, found: Findings, times: int) -> int:
    """The same with whole processes, import and all."""
    flags, start = [*flags, *OFTEN], time.monotonic()
    whole = Whole(place, flags, "real whole")
    (first := process(place, [*flags, "--out-dir", place / "timed"])).communicate(timeout=300)
    seconds, folder = time.monotonic() - start, place / "real"
    found.expect(first.returncode == 0 and not whole.same(place / "timed"), "a process and a fork differ")
    for left in range(times, -1, -1):
        child = process(place, go_on(folder, flags))
        try:
            out, err = child.communicate(timeout=rng.uniform(0, seconds) if left else 300)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
    found.expect(child.returncode == 0, f"a killed process ends in {child.returncode}: {err[-300:]}")
    found.expect(not (why := whole.same(folder)), f"a killed process has another end: {why}")
    return times


# == DAMAGES ==========================================================================================================


class Bomb:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


ODD = ("null", "true", "-1", "0", "31", "1.0", "1e999", "-1e999", "NaN", "9" * 30, "9" * 5000, '""', '"a"', "[]", "{}",
       "[[]]", "[[[0]]]", '"\\ud800"', json.dumps("x" * 100_000), deep(200), deep(980), deep(990), deep(1000),
       deep(100_000), json.dumps([[0] * 1000] * 1000), json.dumps(WORDS), "18446744073709551616",
       "-9223372036854775809", "1e-320", "10000000", '{"a": 1, "a": 2}', "[null]", '[{"input": [[1]]}]')  # fmt: skip
HOLE = "\ufdd0hole"  # stands for what is put into JSON by hand


def places(value: Any, where: tuple = ()) -> list[tuple]:
    """The way to every node of nested containers."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [where] + [w for key, part in parts for w in places(part, (*where, key))]


def replaced(value: Any, where: tuple, new: Any) -> Any:
    """A copy of nested containers with another value in one place."""
    if not where:
        return new
    key, *rest = where
    if isinstance(value, dict):
        return value | {key: replaced(value[key], tuple(rest), new)}
    return type(value)([*value[:key], replaced(value[key], tuple(rest), new), *value[key + 1 :]])


def some_place(value: Any, rng: random.Random) -> tuple:
    """The way to a random node, the shallow ones as likely as the many deep ones."""
    found = places(value)
    depth = rng.choice(sorted({len(w) for w in found}))
    return rng.choice([w for w in found if len(w) == depth])


def damage_json(path: Path, rng: random.Random) -> str:
    """One node of one line replaced by something odd, or a key taken away."""
    raw = path.read_text(encoding="utf-8")
    lines = raw.splitlines() if path.suffix == ".jsonl" else [raw]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    where = some_place(value, rng)
    if where and isinstance(where[-1], str) and rng.random() < 0.2:
        parent = functools.reduce(lambda v, k: v[k], where[:-1], value)
        lines[number] = json.dumps(replaced(value, where[:-1], {k: v for k, v in parent.items() if k != where[-1]}))
        what = f"without {'/'.join(map(str, where))}"
    else:
        odd = rng.choice(ODD)
        lines[number] = json.dumps(replaced(value, where, HOLE)).replace(json.dumps(HOLE), odd)
        what = f"{'/'.join(map(str, where)) or 'all'} is {odd[:30]}"
    path.write_text("\n".join(lines) + "\n" * (path.suffix == ".jsonl"), encoding="utf-8")
    return f"line {number + 1} {what}"


def damage_bytes(path: Path, rng: random.Random) -> str:
    """The file cut, emptied, overwritten, with bits flipped, bytes put in or parts doubled."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("cut", "empty", "random", "flipped", "header", "put in", "doubled", "zeros", "not UTF-8"))
    at = rng.randrange(len(data))
    if kind == "cut":
        del data[at:]
    elif kind == "empty":
        data.clear()
    elif kind == "random":
        data = bytearray(rng.randbytes(rng.choice((1, 100, len(data)))))
    elif kind in ("flipped", "header"):
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data) if kind == "flipped" else min(200, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "put in":
        data[at:at] = rng.randbytes(rng.randint(1, 50))
    elif kind == "doubled":
        data[at:at] = data[rng.randrange(len(data)) :]
    elif kind == "zeros":
        data[at : at + 500] = bytes(len(data[at : at + 500]))
    else:
        data[at:at] = b"\xff\xfe\x80"
    path.write_bytes(data)
    return kind


def damage_file(path: Path, rng: random.Random) -> str:
    """Something else in the file's place, or a file that nobody may read."""
    kind = rng.choice(("loop", "dangling", "folder", "unreadable", "pipe", "missing"))
    if kind == "unreadable":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


def damage_shard(path: Path, rng: random.Random) -> str:
    """A shard whose header says something else, of another type, empty, or with tokens beyond the vocabulary."""
    tokens = np.fromfile(path, "<u2")[512:] if path.suffix == ".bin" else np.load(path)
    kind = rng.choice(("none", "one", "beyond", "float", "object", "two rows", "big endian", "huge header", "npz"))
    if path.suffix == ".bin" and kind not in ("none", "one", "beyond"):
        header = np.zeros(256, "<i4")
        header[:3] = rng.choice((20240520, 20240519)), rng.choice((1, 2)), rng.choice((-1, 2**31 - 1, len(tokens) + 1))
        path.write_bytes(header.tobytes() + tokens.tobytes())
    elif kind == "huge header":
        head = {"descr": "<u2", "fortran_order": False, "shape": rng.choice([(10**12,), (-1,), (), (2**64,), (1.5,)])}
        with open(path, "wb") as file, contextlib.suppress(Exception):
            np.lib.format.write_array_header_1_0(file, head)
    elif kind in ("none", "one", "beyond"):
        shard(path, {"none": tokens[:0], "one": tokens[:1]}.get(kind, np.where(tokens == 7, 60_000, tokens)))
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, tokens)
    else:
        odd = {"float": tokens.astype(float), "object": np.array([Bomb(path.with_name("bomb"))], object),
               "two rows": tokens[: len(tokens) // 2 * 2].reshape(2, -1), "big endian": tokens.astype(">u2")}[kind]
        np.save(path, odd, allow_pickle=True)
    return f"shard: {kind}"


def damage_checkpoint(path: Path, rng: random.Random) -> str:
    """A value of a checkpoint replaced by an odd one, a part taken away, or a pickle that runs code."""
    state = torch.load(path, weights_only=True)
    kind, mark = rng.random(), path.with_name("bomb")
    if kind < 0.1:
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=rng.choice((0, 2, 4))))
        return "a pickle that runs code"
    where = some_place(state, rng)
    if kind < 0.2:
        torch.save(replaced(state, where, Bomb(mark)), path, _use_new_zipfile_serialization=rng.random() < 0.7)
        return f"{'/'.join(map(str, where))} runs code"
    if kind < 0.3 and where and isinstance(where[-1], (str, int)):
        parent = functools.reduce(lambda v, k: v[k], where[:-1], state)
        if isinstance(parent, dict):
            torch.save(replaced(state, where[:-1], {k: v for k, v in parent.items() if k != where[-1]}), path)
            return f"without {'/'.join(map(str, where))}"
    tensors = (torch.zeros(0), torch.zeros(3, 5), torch.full((2,), math.nan), torch.zeros((), dtype=torch.long),
               torch.ones(2, dtype=torch.bool), torch.zeros(5, dtype=torch.uint8), torch.zeros(10**6))  # fmt: skip
    odd = rng.choice((None, True, -1, 0, 2**70, -(2**70), 1e300, math.nan, math.inf, "", "x" * 10_000, [], {}, (), [[]],
                      {"a": 1}, *tensors))  # fmt: skip
    torch.save(replaced(state, where, odd), path)
    text = f"tensor {tuple(odd.shape)}" if isinstance(odd, torch.Tensor) else repr(odd)[:20]
    return f"{'/'.join(map(str, where)) or 'all'} is {text}"


def commands(case: Path) -> dict[str, tuple[Callable, list]]:
    """What a user types, by a short name; each reads some of the files below `case`."""
    tasks, text = ["--data-dir", case / "tasks"], ["--data-dir", case / "text"]
    small = [*SIZES, "--max-steps", "1", "--holdout", "2", "--block-size", "600", "--out-dir", case / "new"]
    one = ["--views", "1", "--device", "cpu", "--batch-tokens", "4000"]
    return {
        "train arc": (train.main, [*small, "--dataset", "arc", *tasks]),
        "train text": (train.main, [*small, "--dataset", "fineweb", *text, "--block-size", "32"]),
        "resume arc": (train.main, ["--resume", "--out-dir", case / "arc-run", "--max-steps", "3", *tasks]),
        "resume text": (train.main, ["--resume", "--out-dir", case / "text-run", "--max-steps", "3", *text]),
        "solve": (solve.main, [case / "arc-run", *tasks, *one, "--out", case / "solved"]),
        "score": (solve.main, ["--score", case / "solved" / "submission.json", *tasks]),
        "sample": (sample.main, [case / "text-run", "--prompt", "The", "--max-new-tokens", "3", "--device", "cpu"]),
        "plot": (plot.main, [case / "arc-run"]),
    }


KINDS = {"json": damage_json, "shard": damage_shard, "checkpoint": damage_checkpoint}
TARGETS = [  # file, how it may be damaged besides its bytes, and who reads it
    ("tasks/training/*.json", "json", ("train arc",)),
    ("tasks/evaluation/*.json", "json", ("train arc", "solve", "score")),
    ("text/train_1.npy", "shard", ("train text",)),
    ("text/train_2.bin", "shard", ("train text",)),
    ("text/val_0.npy", "shard", ("train text",)),
    ("text/meta.json", "json", ("sample", "train text")),
    ("arc-run/checkpoint.pt", "checkpoint", ("resume arc", "resume arc", "solve")),
    ("text-run/checkpoint.pt", "checkpoint", ("resume text", "sample")),
    ("arc-run/config.json", "json", ("resume arc", "solve")),
    ("text-run/config.json", "json", ("resume text", "sample")),
    ("arc-run/metrics.jsonl", "json", ("resume arc", "plot")),
    ("arc-run/predictions.json", "json", ("plot",)),
    ("arc-run/supervised_pairs.json", "json", ("solve",)),
    ("solved/submission.json", "json", ("score",)),
    ("solved/answers.jsonl", "json", ("solve",)),
]


HARD = [  # what chance finds too seldom: file, the way to a node or None for the end of the file, what goes there
    *[(f"{run}-run/config.json", ("model", key), value) for run in ("arc", "text") for key, value in (
        ("d_model", "10000000"), ("d_model", "9" * 30), ("vocab_size", "9" * 18), ("d_conv", "0"), ("d_conv", "-3"),
        ("expand", "0"), ("expand", "-2"), ("ngroups", "0"), ("ngroups", "3"), ("chunk_size", "1" + "0" * 12),
        ("norm_eps", "NaN"), ("rope_theta", "0.0"), ("rope_theta", "-1.0"), ("d_ff", str(2**40)), ("n_head", "9" * 30),
        ("pattern", json.dumps("M" * 10**6)), ("block_size", "9" * 30))],
    *[("arc-run/metrics.jsonl", None, line) for line in (
        b"\xff\xfe\n", deep(100_000).encode() + b"\n", b'{"step": 1, "loss": 1', b'{"step": 0, "loss": 1e308}\n',
        b'{"step": 0, "loss": ' + b"9" * 400 + b"}\n", b"\0" * 4096)],
    *[("arc-run/predictions.json", (0, key), value) for key, value in (
        ("test", "1e999"), ("task", json.dumps("x" * 10**6)), ("demonstrations", deep(980)),
        ("task", '"$\\\\frac{$ $"'))],
    *[("text/meta.json", (key,), value) for key, value in (
        ("vocab_size", '"257"'), ("vocab_size", "257.5"), ("end_of_text", '"256"'), ("tokenizer", '["x"]'),
        ("tokenizer", '"none"'), ("shards", '[{"name": "../../etc/passwd", "bytes": 1e999}]'))],
    ("text/meta.json", None, deep(100_000).encode()),
]  # fmt: skip


def make_area(place: Path, data: dict) -> Path:
    """A folder with one real file of every kind, to be damaged in copies."""
    area = place / "area"
    area.mkdir()
    for name in ("tasks", "text"):
        shutil.copytree(data["small"] / name, area / name)
    few = ["--max-steps", "2", "--eval-every", "2"]
    Whole(area, [*data["arc"], *few, *KEPT["arc"]], "arc-run")
    Whole(area, [*data["text"], *few], "text-run")
    main, argv = commands(area)["solve"]
    child = Child(argv, place, quick, main)
    if child.end():
        raise SystemExit(f"solve.py does not work here: {child.err}")
    return area


def damage(area: Path, case: Path, seed: int, number: int) -> tuple[str, Path, str, str]:
    """A copy of `area` at `case` with one file damaged: which, its path, how, and a command that reads it."""
    rng = random.Random(f"{seed} {number}")
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(area, case)
    if number < len(HARD):
        return hard(case, *HARD[number], rng)
    pattern, kind, readers = TARGETS[number % len(TARGETS)]
    path = rng.choice(sorted(case.glob(pattern)))
    how = rng.choices((damage_bytes, damage_file, KINDS[kind]), (3, 1, 4))[0](path, rng)
    if number % 50 == 49:  # a name that is not UTF-8
        pattern, readers, how = "tasks/training/*.json", ("train arc",), "a name that is not UTF-8"
        (path := case / "tasks" / "training" / os.fsdecode(b"\xff.json")).write_bytes(
            sorted(case.glob(pattern))[0].read_bytes())
    return pattern, path, how, rng.choice(readers)


def hard(case: Path, name: str, where: tuple | None, new: Any, rng: random.Random) -> tuple[str, Path, str, str]:
    """The same for one of HARD."""
    path = case / name
    if where is None:
        path.write_bytes(path.read_bytes() + new)
    else:
        value = replaced(json.loads(path.read_text(encoding="utf-8")), where, HOLE)
        path.write_text(json.dumps(value).replace(json.dumps(HOLE), new), encoding="utf-8")
    how = f"{'/'.join(map(str, where or ['more']))} is {str(new)[:30]}"
    return name, path, how, rng.choice(next(readers for target, _, readers in TARGETS if target == name))


def confined(case: Path, unreadable: bool, main: Callable) -> Callable:
    """In a child: no more than 4 GB of memory; where a file is unreadable, a user who is not root."""

    def before() -> None:
        if main is not plot.main:
            quick()
        resource.setrlimit(resource.RLIMIT_AS, (size := resident("VmSize") + (4 << 30), size))
        if unreadable and os.geteuid() == 0:
            for path in [case, *case.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)
            os.setgroups([]), os.setegid(NOBODY), os.seteuid(NOBODY)

    return before


def resident(name: str = "VmRSS") -> int:
    """Bytes that this process has, as the kernel calls them."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1])


def judge(child: Child, code: int, case: Path, path: Path) -> str:
    """What is wrong with how a command took a damaged file; empty where nothing is."""
    said = child.out + child.err
    if any(case.rglob("bomb")):
        return "code in a file was run"
    if code == 99:
        return "hangs"
    if code not in (0, 2):
        last = (child.err.strip().splitlines() or [""])[-1]
        return f"exit code {code}: {last[:160]}"
    if "Traceback" in said:
        return "a traceback"
    lines = [line for line in child.err.splitlines() if re.match(r"(\w+\.py|error): ", line)]
    if code == 2 and not lines:
        return "no message"
    if code == 2 and (len(lines) > 6 or max(map(len, lines)) > 1000):
        return f"a message of {len(lines)} lines, up to {max(map(len, lines))} characters"
    if code == 2 and "was made" in lines[0]:  # a task that is still whole, but not the one that was answered
        return ""
    if code == 2 and path.stem not in (told := "\n".join(lines)) and path.parent.name not in told:
        return f"does not name the file: {lines[0][:160]}"
    return ""


def damages(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 1000, seed: int = 0,
            case: int | None = None) -> dict:
    """Damaged files, one at a time, each read by a command: exit code 0 or 2, one clear line, no traceback."""
    area, codes, slow = make_area(place, data), Counter(), 0.0
    kinds: dict[str, list[str]] = {}
    for number in range(times) if case is None else [case]:
        pattern, path, how, name = damage(area, place / "case", seed, number)
        main, argv = commands(place / "case")[name]
        start = time.monotonic()
        child = Child(argv, place, confined(place / "case", how == "unreadable", main), main)
        code = child.end(30)
        slow = max(slow, time.monotonic() - start)
        codes[code] += 1
        why = judge(child, code, place / "case", path)
        if "does not name" in why and how.split(" ", 2)[-1].startswith("without "):
            why = ""  # a default stands in for the setting, and what that makes is another file's message
        if why:
            kinds.setdefault(f"{name}: {re.sub(r'[0-9]+', '#', why)[:100]}", []).append(f"{number} ({pattern}: {how})")
        if case is not None:
            print(f"{name} on {path}: {how}\nexit code {code}\n{child.out}{child.err}")
    for what, cases in kinds.items():
        found.expect(False, f"{what}; {len(cases)} times, such as case {cases[0]}")
    return {"damaged inputs": sum(codes.values()), "seed": seed, "exit codes": {str(k): n for k, n in codes.items()},
            "tracebacks": sum(n for k, n in codes.items() if k not in (0, 2)), "slowest, seconds": round(slow, 1)}


# == DISK =============================================================================================================


def limited(size: int) -> Callable:
    """In a child: no file may grow beyond so many bytes."""

    def before() -> None:
        quick()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def crash_at(step: int) -> Callable:
    """In a child: the process is gone in the middle of this step."""

    def before() -> None:
        quick()
        plain, made = train.accumulate, itertools.count(1)
        train.accumulate = lambda *args: os._exit(9) if next(made) == step else plain(*args)

    return before


def disk(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 24) -> dict:
    """No room: at sizes from nothing to a whole checkpoint, for the log, on a small file system, and then again."""
    flags = [*data["arc"], *KEPT["arc"], *OFTEN]
    whole = Whole(place, flags, "disk whole")
    size, ends = (whole.folder / "checkpoint.pt").stat().st_size, Counter()
    half = place / "half"
    Child([*flags, "--out-dir", half], place, crash_at(5)).end()
    least = (half / "config.json").stat().st_size - 1
    for i in range(times):
        folder, limit = place / f"full {i}", round(least + (size - least) * i / times)
        shutil.copytree(half, folder)
        before = (folder / "checkpoint.pt").read_bytes()
        child = Child(["--resume", "--out-dir", folder], place, limited(limit))
        ends[code := child.end()] += 1
        line = child.err.strip().splitlines()[-1:] or [""]
        plain = line[0].startswith("train.py: ") and folder.name in line[0] and "File too large" in line[0]
        found.expect(code == 2 and plain,
                     f"no room for files over {limit} bytes: exit code {code}, {line[0][:200]}")
        found.expect((folder / "checkpoint.pt").read_bytes() == before, f"the old checkpoint was touched at {limit}")
        found.expect(not list(folder.glob(".*tmp")), f"half-written files are left: {list(folder.glob('.*tmp'))}")
        ended_equal(Child(["--resume", "--out-dir", folder], place, quick), folder, whole, found)
        shutil.rmtree(folder)
    figures = {"limits on the size of files": times, "refused with exit code 2": ends[2]}
    full_log(place, flags, whole, found)
    return figures | goes_on(place, flags, whole, size, found) | small_disk(place, flags, whole, size, found)


def ended_equal(child: Child, folder: Path, whole: Whole, found: Findings) -> None:
    """A run that has what it needs again ends as if nothing had happened."""
    code = child.end()
    found.expect(code == 0, f"{folder.name}: after the fault it ends in {code}: {child.err[-300:]}")
    found.expect(not (why := whole.same(folder)), f"{folder.name}: after the fault it has another end: {why}")


def full_log(place: Path, flags: list, whole: Whole, found: Findings) -> None:
    """The log itself finds no room, before there is any checkpoint to write."""
    folder = place / "full log"
    never = ["--eval-every", "0", "--save-every", "0", "--max-steps", "400"]
    child = Child([*flags, *never, "--out-dir", folder], place, limited(20_000))
    code, line = child.end(), (child.err.strip().splitlines() or [""])[-1]
    found.expect(code == 2 and "metrics.jsonl" in line, f"no room for the log: exit code {code}, {line[:200]}")
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    whole_lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    found.expect(all(json.loads(line) for line in whole_lines), "the log is torn in its middle")


def goes_on(place: Path, flags: list, whole: Whole, size: int, found: Findings) -> dict:
    """--save-failure warn: the run ends as it would have, and says each time what was not written."""
    folder, warn = place / "warn", ["--save-failure", "warn"]
    child = Child([*flags, *warn, "--out-dir", folder], place, limited(size // 2))
    code, warnings = child.end(), child.err.count("warning ")
    found.expect(code == 0, f"--save-failure warn ends in {code}: {child.err[-300:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [[line.get("loss"), line.get("val_loss")] for line in lines]
    found.expect(losses == [[line.get("loss"), line.get("val_loss")] for line in whole.end[1]],
                 "--save-failure warn: other losses")
    found.expect(warnings == 7, f"--save-failure warn: {warnings} warnings for 7 saves: {child.err[-500:]}")
    return {"warnings where the run goes on": warnings}


@contextlib.contextmanager
def file_system(place: Path, kib: int):
    """A file system of so many KiB in memory, or None where it cannot be mounted."""
    (mounted := place / "small").mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(options, capture_output=True).returncode == 0
    except OSError:
        done = False
    try:
        yield mounted if done else None
    finally:
        if done:
            subprocess.run(["umount", str(mounted)], check=True)


def small_disk(place: Path, flags: list, whole: Whole, size: int, found: Findings) -> dict:
    """A file system that holds one checkpoint and a half: stop with a message, or go on, and then there is room."""
    with file_system(place, size * 3 // 2048 + 16) as mounted:
        if not mounted:
            return {"a small file system": "could not be mounted"}
        for more in ([], ["--save-failure", "warn"]):
            folder = mounted / "run"
            child = Child([*flags, *more, "--out-dir", folder], place, quick)
            code, said = child.end(), child.err
            found.expect(code == (0 if more else 2), f"a full disk {more}: exit code {code}, {said[-300:]}")
            told = re.search(r"run/checkpoint.pt: .* needs [\d.]+ MB where [\d.]+ MB", said)
            found.expect(told, f"says {said[-300:]}")
            found.expect(train.load_checkpoint(folder / "checkpoint.pt")["step"] == 0, "not the old checkpoint")
            subprocess.run(["mount", "-o", "remount,size=100m", str(mounted)], check=True)
            ended_equal(Child(["--resume", "--out-dir", folder], place, quick), folder, whole, found)
            shutil.rmtree(folder)
            subprocess.run(["mount", "-o", f"remount,size={size * 3 // 2048 + 16}k", str(mounted)], check=True)
    return {"a small file system": "stopped, resumed and went on as asked"}


# == MEMORY ===========================================================================================================


def too_small(limits: Callable[[int], int], backward: bool, always: bool = False) -> Callable:
    """In a child: steps run out of memory where more than `limits(step)` sequences are computed at a time.

    backward: while gradients are made; always: evaluations, too.
    """

    def before() -> None:
        quick()
        plain, step = train.GPT.forward, itertools.count()
        accumulate, now = train.accumulate, [0]

        def forward(self, tokens, targets=None):
            logits, loss = plain(self, tokens, targets)
            fails = (self.training or always) and len(tokens) > limits(now[0])
            if fails and not backward:
                raise torch.OutOfMemoryError("pretended")
            if fails:
                loss.register_hook(lambda grad: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended")))
            return logits, loss

        def counted(network, batches, runtime):
            now[0] = next(step)
            return accumulate(network, batches, runtime)

        train.GPT.forward, train.accumulate = forward, counted

    return before


def memory(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 8) -> dict:
    """Memory that runs out at random steps, or that the reckoning finds too small: the same numbers, or one line."""
    worst, bits, cuts = 0.0, 0, 0
    for kind in ("arc", "text"):
        flags = [*data[kind], "--max-steps", "8", "--eval-every", "4"]
        whole = Whole(place, flags, f"memory {kind}")
        for i in range(times // 2):
            when, few = sorted(rng.sample(range(8), 2)), rng.choice((1, 2))
            folder = place / f"memory {kind} {i}"
            limits = lambda step, when=when, few=few: few if step >= when[1] else 3 if step >= when[0] else 99  # noqa: E731
            child = Child([*flags, "--out-dir", folder], place, too_small(limits, backward=bool(i % 2)))
            if not found.expect(child.end() == 0, f"out of memory at steps {when}: ends in {child.code}: {child.err}"):
                continue
            cuts += child.out.count("memory      ")
            found.expect(child.out.count("memory      ") == 1 + (few == 1), f"{when}, {few}: says {child.out}")
            away = difference(whole.folder, folder)
            worst, bits = max(worst, away), bits + (away == 0)
    found.expect(worst < 1e-5, f"losses with smaller pieces differ by {worst:.2e}")
    for kind in ("arc", "text"):
        flags = [*data[kind], "--max-steps", "4", "--eval-every", "2"]
        child = Child([*flags, "--out-dir", place / f"evaluated {kind}"], place, too_small(lambda step: 1, False, True))
        found.expect(child.end() == 0, f"{kind}: out of memory in an evaluation ends in {child.code}: "
                     f"{child.err.strip().splitlines()[-1:]}")
    reckoned = reckoning(place, data["arc"], found)
    return {"runs out of memory": times, "pieces cut": cuts, "largest relative difference of a loss": worst,
            "runs with every loss equal to the last bit": bits} | reckoned | rehearsal(data["arc"], found)


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of a loss between the logs of two runs."""
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    pairs = [(a[k], b[k]) for a, b in zip(*logs, strict=True) for k in ("loss", "val_loss") if k in a]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def reckoning(place: Path, flags: list, found: Findings) -> dict:
    """A CPU with ever less memory: the whole batch, fewer sequences, activations made again, and one clear error."""
    flags = [*flags, "--max-steps", "3", "--pattern", "MAMAMAMA"]
    with contextlib.redirect_stdout(io.StringIO()):
        model = train.GPT(settings(flags)[0])
    one, weights = train.activation_bytes(model), sum(p.nbytes for p in model.parameters())
    model.remat = True
    again, seen = train.activation_bytes(model) + 3 * one // 8, {}  # a block of eight is made again, with transients
    rooms = {"whole": 9, "half": 2.5, "one": 1.2, "remat": (again + one) / 2 / one, "none": 0.01}
    for name, share in rooms.items():
        free = 4 * weights + share * 1.5 * one

        def before(free=free) -> None:
            quick()
            train.free_memory = lambda: free

        child = Child([*flags, "--out-dir", place / f"room {name}"], place, before)
        seen[name] = child.end(), child.out.count("memory      "), "--remat" in child.out
        if name == "none":
            line = child.err.strip().splitlines()[-1]
            found.expect("does not fit in memory" in line and "--block-size" in line, f"without memory: {line}")
            found.expect(not (place / "room none" / "checkpoint.pt").exists(), "a run without memory was begun")
    wanted = {"whole": (0, 0, False), "half": (0, 1, False), "one": (0, 2, False), "remat": (0, 3, True)}
    found.expect(seen == wanted | {"none": (2, 3, True)}, f"reckoned memory: (exit code, lines, remat) {seen}")
    for name in ("half", "one", "remat"):
        away = difference(place / "room whole", place / f"room {name}")
        found.expect(away < 1e-5, f"{name}: losses differ by {away:.2e}")
    return {"reckoned on a CPU": "whole, half, one sequence, remat, refused"}


def settings(flags: list) -> tuple[train.ModelConfig, train.TrainConfig]:
    """What these flags mean, data counted."""
    given = vars(train.make_parser().parse_args([str(f) for f in flags]))
    model_cfg, cfg = train.make_config(given, has_gpu=False)
    train.open_data(model_cfg, cfg, train.Runtime.start(cfg))
    return model_cfg, cfg


def rehearsal(flags: list, found: Findings) -> dict:
    """rehearse() leaves weights, optimizer and random numbers as they were, on a CPU and as on a GPU (pretended)."""
    with contextlib.redirect_stdout(io.StringIO()):
        model_cfg, cfg = settings(flags)
        runtime = train.Runtime.start(cfg)
        elsewhere = dataclasses.replace(runtime, device=types.SimpleNamespace(type="elsewhere"))
        plain, tried = train.accumulate, []

        def accumulate(network, batches, _):
            tried.append(len(batches[0][0]))
            if len(batches[0][0]) > 2:
                raise torch.OutOfMemoryError("pretended")
            return plain(network, batches, runtime)

        train.accumulate = accumulate
        for place in (runtime, elsewhere):
            torch.manual_seed(3)
            model = train.GPT(dataclasses.replace(model_cfg, dropout=0.2))
            optimizers = train.Optimizers(model, cfg)
            states = []
            for _ in range(2):
                copies = {k: v.clone() for k, v in model.state_dict().items()}
                states.append([copies, torch.get_rng_state(), [len(o.state) for o in optimizers.all],
                               [p.grad for p in model.parameters()]])
                train.rehearse(model, optimizers, cfg, place)
            found.expect(not unequal(*states), f"a rehearsal changes {unequal(*states)[:3]} ({place.device.type})")
        train.accumulate = plain
    found.expect(tried[:2] == [4, 2] and elsewhere.pieces == 2, f"rehearsed with {tried} sequences")
    return {"a rehearsal leaves weights, optimizer, random numbers": "to the last bit"}


# == NUMBERS ==========================================================================================================


def poisoned(steps: tuple, kind: str) -> Callable:
    """In a child: from step to step numbers that are none, in the loss, the gradient or both."""

    def before() -> None:
        quick()
        plain, step = train.accumulate, itertools.count(1)

        def accumulate(network, batches, runtime):
            loss = plain(network, batches, runtime)
            if next(step) not in steps:
                return loss
            parameters = list(network.parameters())
            parameters[len(parameters) // 2].grad.flatten()[0] = math.inf if kind == "inf" else math.nan
            return math.nan if kind == "loss" else loss

        train.accumulate = accumulate

    return before


def numbers(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 6) -> dict:
    """NaN and inf in losses and gradients at random steps, five in a row, and a learning rate that is far too high."""
    flags, skipped = [*data["text"], "--max-steps", "14", "--save-every", "3", "--eval-every", "5"], 0
    for i in range(times):
        steps, folder = tuple(sorted(rng.sample(range(1, 15), 4))), place / f"poison {i}"
        child = Child([*flags, "--out-dir", folder], place, poisoned(steps, ("inf", "nan", "loss")[i % 3]))
        found.expect(child.end() == 0 and "skipped:          4" in child.out, f"{steps}: {child.code} {child.err}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        marked = tuple(line["step"] for line in lines if "skipped" in line)
        found.expect(marked == steps, f"poisoned at {steps}, skipped at {marked}")
        found.expect(finite(folder), f"poisoned at {steps}: the weights are not finite")
        skipped += len(marked)
    folder = place / "five in a row"
    child = Child([*flags, "--out-dir", folder], place, poisoned((7, 8, 9, 10, 11), "nan"))
    found.expect(child.end() == 2 and "--max-lr" in child.err and finite(folder), f"five in a row: {child.err}")
    whole, again = Whole(place, flags, "numbers whole"), Child(["--resume", "--out-dir", folder], place, quick)
    found.expect(again.end() == 0, f"after five in a row: {again.err}")
    rates = {}
    for rate in ("1e3", "1e10", "1e38"):
        folder = place / f"rate {rate}"
        child = Child([*flags, "--max-lr", rate, "--warmup-frac", "0", "--save-every", "1", "--out-dir", folder], place,
                      quick)
        rates[rate] = child.end()
        found.expect(child.code in (0, 2) and finite(folder), f"--max-lr {rate}: exit code {child.code}, and the "
                     f"checkpoint holds weights that are not finite; says {child.err.strip().splitlines()[-1:]}")
    return {"poisoned steps, all skipped": skipped, "five in a row": f"stopped, the end of {whole.folder.name}",
            "exit codes of absurd learning rates": rates}


def finite(folder: Path) -> bool:
    """Whether every weight in a checkpoint is a number, or there is none."""
    if not (folder / "checkpoint.pt").exists():
        return True
    weights = train.load_checkpoint(folder / "checkpoint.pt")["model"].values()
    return all(bool(torch.isfinite(w).all()) for w in weights)


# == RANKS ============================================================================================================


def ranks(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 4) -> dict:
    """torchrun with two processes on gloo: the same as one, and a process that is killed ends all of them."""
    figures: dict[str, Any] = {}
    for kind in ("arc", "text"):
        flags = [*data[kind], "--max-steps", "6", "--eval-every", "3", "--save-every", "2", "--optimizer", "adamw"]
        whole = Whole(place, flags, f"one {kind}")
        two, folder = [*flags, "--batch-size", "2"], place / f"two {kind}"
        out, err = (job := process(place, [*two, "--out-dir", folder], ranks=2)).communicate(timeout=300)
        found.expect(job.returncode == 0 and out.count("\nsteps:") == 1, f"two: {job.returncode} {err[-500:]}")
        figures[f"{kind}: losses of 2 processes and 1 differ by"] = away = difference(whole.folder, folder)
        found.expect(away < 1e-4, f"{kind}: losses of two processes differ by {away:.1e}")
    waits = []
    for i in range(times):
        folder, kind = place / f"dead {i}", ("arc", "text")[i % 2]
        flags = [*data[kind], "--max-steps", "12", "--eval-every", "3", "--save-every", "2", "--optimizer", "adamw"]
        waits.append(dead(place, folder, [*flags, "--batch-size", "2"], rng, found, victim=(i // 2) % 2))
        job = process(place, [*go_on(folder, flags), "--batch-size", "4"])
        err = job.communicate(timeout=300)[1]
        found.expect(job.returncode == 0, f"one process after two, of which one died: {job.returncode} {err[-400:]}")
        whole = Whole(place, flags, f"alone {i}")
        away = difference(whole.folder, folder) if not job.returncode else math.inf
        found.expect(away < 1e-4, f"one process after two: losses differ by {away:.1e}")
    return figures | {"a process killed": times, "the job is over after seconds": [round(w, 1) for w in waits]}


def dead(place: Path, folder: Path, flags: list, rng: random.Random, found: Findings, victim: int) -> float:
    """Kill one of two processes at a random step; the seconds until the job is over."""
    job = process(place, [*flags, "--out-dir", folder], ranks=2, sleep=0.3)
    log, end = folder / "metrics.jsonl", time.monotonic() + 120
    step = rng.randint(1, 8)
    while time.monotonic() < end and job.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.3))
    os.kill(int((place / f"pid{victim}").read_text()), signal.SIGKILL)
    start = time.monotonic()
    try:
        out, err = job.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        job.kill()
        out, err = job.communicate()
        found.expect(False, f"process {victim} is dead, and the job hangs")
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    found.expect(job.returncode != 0, "a job with a dead process ends well")
    if victim:
        found.expect(said and "--resume" in said[0], f"process 1 is dead, and process 0 says {said or err[-600:]}")
    return time.monotonic() - start


# == FOLDER ===========================================================================================================


def folder(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 1) -> dict:
    """A second run in a folder is refused, also when it looked before the first began; a killed one is no obstacle."""
    flags = [*data["text"], "--max-steps", "40", "--save-every", "2"]
    whole, held = Whole(place, flags, "folder whole"), place / "held"

    def slowed() -> None:
        quick()
        plain = train.accumulate
        train.accumulate = lambda *args: (time.sleep(0.05), plain(*args))[1]

    first = Child([*flags, "--out-dir", held], place, slowed)
    await_file(held / "checkpoint.pt")
    for argv in ([*flags, "--out-dir", held], ["--resume", "--out-dir", held]):
        (where := place / "second").mkdir(exist_ok=True)
        second = Child(argv, where, quick)
        found.expect(second.end() == 2 and str(held) in second.err, f"a second run: {second.code} {second.err[-300:]}")
    first.kill()
    ended_equal(Child(["--resume", "--out-dir", held], place, quick), held, whole, found)
    late(place, flags, found)
    return {"a second run in the folder": "refused, started or resumed", "the lock of a killed run": "free"}


def await_file(path: Path, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


def late(place: Path, flags: list, found: Findings) -> None:
    """A run that looked at the folder while it was empty, and then was slow to read its data, finds another's end."""
    where, gate = place / "late", place / "gate"

    def waits() -> None:
        quick()
        plain = train.open_data

        def open_data(*args):
            (place / "ready").touch()
            await_file(gate)
            return plain(*args)

        train.open_data = open_data

    (place / "slow").mkdir()
    slow = Child([*flags, "--max-lr", "1e-4", "--out-dir", where], place / "slow", waits)
    await_file(place / "ready")
    fast = Child([*flags, "--out-dir", where], place, quick)
    fast.end()
    ended = (where / "checkpoint.pt").read_bytes()
    gate.touch()
    slow.end()
    found.expect(slow.code == 2 and (where / "checkpoint.pt").read_bytes() == ended,
                 f"a run that was slow to begin wrote over a finished one (exit code {slow.code})")


# == SIGNALS ==========================================================================================================


def signals(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 24) -> dict:
    """SIGTERM, Ctrl-C and a second Ctrl-C at random instants; then what the run printed is typed."""
    before, ways, waits = watched(slow=0.15), Counter(), []
    whole = Whole(place, [*data["arc"], *KEPT["arc"], *OFTEN], "signals whole", before)
    for i in range(times):
        kind = ("SIGTERM", "SIGINT", "twice")[i % 3]
        folder, number = place / f"signal's {i}", signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT
        child = Child([*whole.flags, "--out-dir", folder], place, before)
        if child.wait(rng.uniform(0, whole.seconds)) is None:
            phase, start = PHASES[PHASE[0]], time.monotonic()
            child.kill(number)
            if kind == "twice" and child.wait(rng.uniform(0, 0.05)) is None:
                child.kill(number)
            child.end()
            waits.append(time.monotonic() - start)
            running = phase not in (PHASES[STARTING], PHASES[ENDING])
            fine = {0, 130} if kind == "twice" or not running else {0}
            fine |= {-signal.SIGTERM} if kind == "SIGTERM" and not running else set()
            found.expect(child.code in fine and "Traceback" not in child.err,
                         f"{kind} during {phase}: exit code {child.code}, {child.err[-400:]}")
            ways[f"{kind}: exit code {child.code}"] += 1
        printed = re.search(r"^stopped at step .* to go on: python train.py (.*)$", child.out, re.M)
        if child.code == 0 and not printed:
            found.expect(not whole.same(folder), f"{kind}: exit code 0, neither stopped nor at its end")
            continue
        again = Child(shlex.split(printed[1]) if printed else go_on(folder, whole.flags), place, before)
        found.expect(again.end() == 0, f"{kind}: {printed and printed[1]} ends in {again.code}: {again.err[-300:]}")
        found.expect(not (why := whole.same(folder)), f"{kind}: another end: {why}")
    return {"signals": dict(ways), "longest wait for the end, seconds": round(max(waits, default=0.0), 2)}


# == OVERHEAD =========================================================================================================


def overhead(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 24) -> dict:
    """What the log and saving take of a step of `train.py --dataset arc --preset nano --batch-size 16`."""
    took: dict[str, list[float]] = {"write": [], "save": [], "sync": [], "snapshot": []}

    def timed(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args, **more):
            start = time.perf_counter()
            result = plain(*args, **more)
            took[name].append(time.perf_counter() - start)
            return result

        setattr(owner, name, wrapped)

    def before() -> None:
        quick()
        timed(train.MetricsLog, "write"), timed(train.MetricsLog, "sync")
        timed(train, "save"), timed(train, "snapshot")
        train.evaluate = lambda *args: {"solve_rate": 0.0}  # not what is measured

    def main(argv: list[str]) -> int:
        start = time.perf_counter()
        code = train.main(argv)
        print(json.dumps(took | {"all": time.perf_counter() - start}))
        return code

    flags = ["--dataset", "arc", "--preset", "nano", "--batch-size", "16", "--device", "cpu", "--data-dir",
             data["official"]]  # fmt: skip
    child = Child([*flags, "--max-steps", times, "--out-dir", place / "nano"], place, before, main)
    found.expect(child.end(600) == 0, f"nano ends in {child.code}: {child.err[-300:]}")
    took = json.loads(child.out.splitlines()[-1])
    lines = [json.loads(line) for line in (place / "nano" / "metrics.jsonl").read_text().splitlines()]
    at = [60 * line["minutes"] for line in lines if "loss" in line]
    step = statistics.median(b - a for a, b in itertools.pairwise(at))
    every = train.PRESETS["arc"]["nano"]["save_every"]
    save = sum(statistics.mean(took[name]) for name in ("save", "sync", "snapshot"))
    shares = statistics.mean(took["write"]) / step, save / every / step
    found.expect(sum(shares) < 0.01, f"log and saving take {sum(shares):.2%} of a step")
    size = (place / "nano" / "checkpoint.pt").stat().st_size
    return {"a step, seconds": round(step, 3), "a line of the log, milliseconds": round(1e3 * shares[0] * step, 3),
            "a checkpoint, milliseconds": round(1e3 * save, 1), "its size, MB": round(size / 1e6, 1),
            "share of the log": f"{shares[0]:.4%}", f"share of saving every {every} steps": f"{shares[1]:.4%}"}


# == COMMAND LINE =====================================================================================================

PARTS: dict[str, Callable] = {"kills": kills, "damages": damages, "disk": disk, "memory": memory, "numbers": numbers,
                              "ranks": ranks, "folder": folder, "signals": signals, "overhead": overhead}


def write_results(folder: Path, figures: dict[str, dict]) -> Path:
    """Add figures to today's file, beside those of other seeds."""
    path = folder / f"{date.today()}-faults.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    for name, values in figures.items():
        known[name] = known.get(name, {}) | {f"seed {values.pop('seed')}": values}
    train.write_json(path, known | {"machine": machine})
    return path


def run(name: str, place: Path, data: dict, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part."""
    print(f"{name:<12}{PARTS[name].__doc__.splitlines()[0]} Seed {args.seed}.", flush=True)
    found, start, more = Findings(), time.monotonic(), {"times": args.times} if args.times else {}
    if name == "damages":
        more |= {"seed": args.seed, "case": args.case}
    figures = PARTS[name](place, data, random.Random(args.seed), found, **more)
    minutes = round((time.monotonic() - start) / 60, 1)
    return figures | {"seed": args.seed, "minutes": minutes, "broken": list(found)}


def main(argv: list[str] | None = None) -> int:
    """The command line: 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description="Break train.py, and count.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="of all choices (default: time)")
    parser.add_argument("--times", type=int, help="how often (default: 100 kills, 1,000 damages, a few of the others)")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no further part after these (default: 30)")
    parser.add_argument("--case", type=int, help="of damages: this one only, with what it prints")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the figures go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a fork of a process with threads would wait for them
    end, figures = time.monotonic() + 60 * args.minutes, {}
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        os.chmod(top, 0o755)
        data = make_data(Path(top))
        for name in args.only:
            if time.monotonic() > end:
                print(f"{name:<12}not begun: {args.minutes:g} minutes are over")
                continue
            (place := Path(top) / name).mkdir()
            figures[name] = run(name, place, data, args)
    broken = sum(len(values["broken"]) for values in figures.values())
    for name, values in figures.items():
        print("\n".join(f"{name:<12}{key:<56}{value}" for key, value in values.items() if key != "broken"))
    if args.case is None:
        print(f"{broken} promises broken; figures in {write_results(args.results, figures)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
