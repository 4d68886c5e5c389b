"""Break train.py in every way that a machine, a disk or a user can, and count what it costs. Linux.

    python bench/faults.py                         # everything, about half an hour on one core
    python bench/faults.py --only kills --times 20

Each promise is a part: `kills` (kill -9 at random instants), `disk` (no room), `signals` (Ctrl-C, SIGTERM, SIGHUP),
`ranks` (several processes) and `streams` (closed or full ones). Runs are those of a model of a few thousand parameters
on a few official tasks or on made-up text; a killed process is a fork of this one that runs `main(argv)`, which saves
the seconds of importing torch; a few are whole processes. Ends are compared to the last bit, minutes and speed aside.
Exit code 1 if a promise was broken. Damaged files are tried in tests/test_runs.py.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import mmap
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimizers need it; here once, not in every child

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import TINY, copy_small_tasks  # noqa: E402

import train  # noqa: E402
from arc_data.prepare import prepare  # noqa: E402
from data.files import UserError, write_json  # noqa: E402
from tools import plot  # noqa: E402

MORE = {"arc": ["--packed", "--dropout", "0.1"], "text": ["--grad-accum-steps", "2", "--batch-size", "2"]}
OFTEN = ["--max-steps", "10", "--eval-every", "4", "--save-every", "3"]
STARTING, TRAINING, EVALUATING, SAVING, ENDING = range(5)
PHASES = "start-up", "training", "evaluation", "writing a checkpoint", "the end"
PHASE = mmap.mmap(-1, 1)  # what a child is doing, seen from outside


class Findings(list):
    """Promises that were broken, in words."""

    def expect(self, kept: Any, what: str) -> None:
        """Note `what` unless `kept`."""
        if not kept:
            self.append(what)
            print(f"BROKEN      {what}", flush=True)


# == PROCESSES ========================================================================================================


class Child:
    """A fork of this process that runs train.main(argv), after `before()`; `out` and `err` are what it has printed."""

    def __init__(self, argv: list, folder: Path, before: Callable):
        self.paths, self.code = [folder / "out.txt", folder / "err.txt"], None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                for number, path in zip((1, 2), self.paths, strict=True):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
                before()
                code = train.main([str(a) for a in argv])
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs."""
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
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.wait(300)  # it is gone when this returns

    def end(self, seconds: float = 300) -> int:
        """The exit code; if it hangs, it is killed and the code is 99."""
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


class Slow:
    """A file that takes its time; a signal that comes meanwhile meets torch's writer, as it would on a disk."""

    def __init__(self, file: Any, seconds: float):
        self.file, self.seconds = file, seconds

    def write(self, data: Any) -> int:
        time.sleep(self.seconds)
        written = self.file.write(data)
        self.file.flush()
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watched(slow: float) -> Callable:
    """In a child: `quick`, PHASE kept up to date, and checkpoints written slowly, over so many seconds."""

    def phase(name: str, during: int, after: int) -> None:
        plain = getattr(train, name)

        def wrapped(*args, **more):
            PHASE[0] = during
            result = plain(*args, **more)
            PHASE[0] = after
            return result

        setattr(train, name, wrapped)

    def before() -> None:
        quick()
        PHASE[0], save, flush = STARTING, torch.save, os.fsync
        phase("optimizer_step", TRAINING, TRAINING)
        phase("evaluate", EVALUATING, TRAINING)
        phase("save_checkpoint", SAVING, TRAINING)
        phase("finish", ENDING, ENDING)
        torch.save = lambda state, file: save(state, Slow(file, slow / 300))  # a checkpoint takes about as many writes
        os.fsync = lambda number: (time.sleep(slow / 10), flush(number))

    return before


SCRIPT = """import os, pathlib, sys, time, train
from tools import plot
plot.plot_run = lambda folder: []
pathlib.Path(sys.argv[1], "pid" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
plain = train.optimizer_step
train.optimizer_step = lambda *args: (time.sleep(float(sys.argv[2])), plain(*args))[1]
sys.exit(train.main(sys.argv[3:]))
"""


def process(place: Path, argv: list, ranks: int = 1, sleep: float = 0.0, shell: str = "") -> subprocess.Popen:
    """`python train.py`, or `torchrun train.py` with so many processes; their ids are in pid0, pid1, …

    `shell` is what a shell gets behind the command, such as `2>&-`.
    """
    (place / "script.py").write_text(SCRIPT)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for old in place.glob("pid*"):
        old.unlink()
    command = [sys.executable, *many, "script.py", str(place), str(sleep), *map(str, argv)]
    line = ["bash", "-c", f"set -o pipefail; {shlex.join(command)} {shell}"]
    return subprocess.Popen(line if shell else command, cwd=place, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


# == RUNS =============================================================================================================


def make_data(place: Path) -> dict[str, list]:
    """Small data of either kind below `place`, official tasks and noisy counting: the flags that name them."""
    with contextlib.redirect_stdout(io.StringIO()):
        copy_small_tasks(prepare("arcagi", place), place / "tasks", 14, 3)
    (place / "text").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train_1.npy", 1500), ("train_2.npy", 900), ("val_0.npy", 400)):
        np.save(place / "text" / name, ((np.arange(n) + rng.integers(0, 2, n).cumsum()) % 50).astype(np.uint16))
    listed = [{"name": f.name, "bytes": f.stat().st_size} for f in sorted((place / "text").iterdir())]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "shards": listed}
    (place / "text" / "meta.json").write_text(json.dumps(meta))
    return {"arc": [*TINY, "--data-dir", place / "tasks", "--holdout", "2", "--block-size", "600"],
            "text": [*TINY, "--dataset", "fineweb", "--data-dir", place / "text", "--block-size", "32"]}


def end_of(folder: Path) -> tuple[dict, list[dict]]:
    """What two equal runs have in common: the checkpoint and the log, without clock and folder. Raises if torn."""
    state = train.load_checkpoint(folder / "checkpoint.pt")
    state.pop("minutes"), state["config"]["train"].pop("out_dir")
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
    """The arguments that a user gives after a crash: --resume, or the same again if nothing was saved yet."""
    return ["--resume", "--out-dir", folder] if (folder / "checkpoint.pt").exists() else [*flags, "--out-dir", folder]


class Whole:
    """A run that nothing happens to: flags, end, seconds it takes."""

    def __init__(self, place: Path, flags: list, name: str, before: Callable = quick):
        self.flags, self.folder, start = flags, place / name, time.monotonic()
        child = Child([*flags, "--out-dir", self.folder], place, before)
        if child.end():
            raise SystemExit(f"a run that nothing happens to ends in {child.code}: {child.err}")
        self.seconds, self.end = time.monotonic() - start, end_of(self.folder)

    def same(self, folder: Path) -> str:
        """How the end of another run differs from this one's; empty if it does not."""
        try:
            return "; ".join(unequal(self.end, end_of(folder))[:3])
        except (UserError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    def expect_same(self, folder: Path, child: Child, found: Findings) -> None:
        """The child has ended a run well, and as if nothing had happened to it."""
        found.expect(child.end() == 0, f"{folder.name}: ends in {child.code}: {child.err[-300:]}")
        found.expect(not (why := self.same(folder)), f"{folder.name}: another end: {why}")


def await_lines(folder: Path, count: int) -> None:
    """Wait until the log of a run has so many lines."""
    log, end = folder / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= count) and time.monotonic() < end:
        time.sleep(0.01)


# == KILLS ============================================================================================================


def kills(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 100) -> dict:
    """kill -9 at instants that are uniform over a run, one to three times per run, which then goes on to its end."""
    phases, ends, before = Counter(), 0, watched(slow=0.3)
    for kind, share in (("arc", times // 2), ("text", times - times // 2)):
        whole, killed = Whole(place, [*data[kind], *MORE[kind], *OFTEN], f"{kind} whole", before), 0
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
            whole.expect_same(folder, child, found)
            ends += 1
            shutil.rmtree(folder)
    real = real_kills(place, data["arc"], rng, found, times // 20) if times >= 20 else 0
    return {"kills": sum(phases.values()) + real, "while in": dict(phases), "of whole processes": real,
            "runs ended, all equal to the last bit": ends}


def real_kills(place: Path, flags: list, rng: random.Random, found: Findings, times: int) -> int:
    """The same with whole processes, import and all."""
    whole, folder = Whole(place, [*flags, *OFTEN], "real whole"), place / "real"
    for left in range(times, -1, -1):
        child = process(place, go_on(folder, whole.flags))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=rng.uniform(3, 20) if left else 300)
        child.kill(), child.communicate()
    found.expect(child.returncode == 0, f"a killed process ends in {child.returncode}")
    found.expect(not (why := whole.same(folder)), f"a killed process has another end: {why}")
    return times


# == DISK =============================================================================================================


def disk(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 24) -> dict:
    """No room: at sizes from nothing to a whole checkpoint, and on a small file system; and then there is."""
    flags = [*data["arc"], *MORE["arc"], *OFTEN]
    whole = Whole(place, flags, "disk whole")
    size, ends, half = (whole.folder / "checkpoint.pt").stat().st_size, Counter(), place / "half"
    first = Child([*flags, "--out-dir", half], place, watched(1.0))
    await_lines(half, 4)
    first.kill()
    for left in half.glob(".*tmp"):  # of the kill, not of a full disk
        left.unlink()
    least = (half / "supervised_pairs.json").stat().st_size
    for i in range(times):
        folder, limit = place / f"full {i}", round(least + (size - least) * i / times)
        shutil.copytree(half, folder)
        before = (folder / "checkpoint.pt").read_bytes()
        child = Child(["--resume", "--out-dir", folder], place,
                      lambda size=limit: (quick(), resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))
        ends[code := child.end()] += 1
        line = (child.err.strip().splitlines() or [""])[-1]
        plain = line.startswith("train.py: ") and folder.name in line and "File too large" in line
        found.expect(code == 2 and plain, f"no room for files over {limit} bytes: exit code {code}, {line[:200]}")
        found.expect((folder / "checkpoint.pt").read_bytes() == before, f"the old checkpoint was touched at {limit}")
        found.expect(not list(folder.glob(".*tmp")), f"half-written files are left: {list(folder.glob('.*tmp'))}")
        whole.expect_same(folder, Child(["--resume", "--out-dir", folder], place, quick), found)
        shutil.rmtree(folder)
    return {"limits on the size of files": times, "refused with exit code 2": ends[2],
            "a small file system": small_disk(place, whole, size, found)}


def small_disk(place: Path, whole: Whole, size: int, found: Findings) -> str:
    """A file system that holds one checkpoint and a half: the run stops with a message, and goes on with more room."""
    (mounted := place / "small").mkdir()
    options = f"mount -t tmpfs -o size={size * 3 // 2048 + 16}k tmpfs".split()
    if subprocess.run([*options, str(mounted)], capture_output=True).returncode:
        return "could not be mounted"
    try:
        child = Child([*whole.flags, "--out-dir", folder := mounted / "run"], place, quick)
        told = child.end() == 2 and re.search(r"run/checkpoint.pt: .* needs [\d.]+ MB where [\d.]+ MB", child.err)
        found.expect(told, f"a full disk: exit code {child.code}, {child.err[-300:]}")
        found.expect(train.load_checkpoint(folder / "checkpoint.pt")["step"] < 10, "not the old checkpoint")
        subprocess.run(["mount", "-o", "remount,size=100m", str(mounted)], check=True)
        whole.expect_same(folder, Child(["--resume", "--out-dir", folder], place, quick), found)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    return "stopped, and went on with more room"


# == SIGNALS ==========================================================================================================


def signals(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 24) -> dict:
    """SIGTERM, SIGHUP, Ctrl-C and a second Ctrl-C at random instants; then what the run printed is typed."""
    before, ways, waits = watched(slow=0.15), Counter(), []
    whole = Whole(place, [*data["arc"], *MORE["arc"], *OFTEN], "signals whole", before)
    for i in range(times):
        kind = ("SIGTERM", "SIGINT", "SIGHUP", "twice")[i % 4]
        folder, number = place / f"signal's {i}", getattr(signal, kind, signal.SIGINT)
        child = Child([*whole.flags, "--out-dir", folder], place, before)
        if child.wait(rng.uniform(0, whole.seconds)) is None:
            phase, start = PHASES[PHASE[0]], time.monotonic()
            child.kill(number)
            if kind == "twice" and child.wait(rng.uniform(0, 0.05)) is None:
                child.kill(number)
            child.end()
            waits.append(time.monotonic() - start)
            running = phase not in (PHASES[STARTING], PHASES[ENDING])
            fine = {0} if running and kind != "twice" else {0, 130} if number == signal.SIGINT else {0, -number}
            found.expect(child.code in fine and "Traceback" not in child.err,
                         f"{kind} during {phase}: exit code {child.code}, {child.err[-400:]}")
            ways[f"{kind}: exit code {child.code}"] += 1
        printed = re.search(r"^stopped at step .* to go on: python train.py (.*)$", child.out, re.M)
        if child.code == 0 and not printed:
            found.expect(not whole.same(folder), f"{kind}: exit code 0, neither stopped nor at its end")
            continue
        again = shlex.split(printed[1]) if printed else go_on(folder, whole.flags)
        whole.expect_same(folder, Child(again, place, before), found)
    return {"signals": dict(ways), "longest wait for the end, seconds": round(max(waits, default=0.0), 2)}


# == RANKS ============================================================================================================


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of a loss between the logs of two runs."""
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    pairs = [(a[k], b[k]) for a, b in zip(*logs, strict=True) for k in ("loss", "val_loss") if k in a]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def ranks(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 4) -> dict:
    """torchrun with two processes on gloo, one is killed: so ends the other, and one alone goes on."""
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
    return {"a process killed": times, "the job is over after seconds": [round(w, 1) for w in waits]}


def dead(place: Path, folder: Path, flags: list, rng: random.Random, found: Findings, victim: int) -> float:
    """Kill one of two processes at a random step; the seconds until the job is over."""
    job = process(place, [*flags, "--out-dir", folder], ranks=2, sleep=0.3)
    await_lines(folder, rng.randint(1, 8))
    time.sleep(rng.uniform(0, 0.3))
    os.kill(int((place / f"pid{victim}").read_text()), signal.SIGKILL)
    start = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.communicate(timeout=90)
    found.expect(job.returncode is not None, f"process {victim} is dead, and the job hangs")
    job.kill(), job.communicate()
    found.expect(job.returncode != 0, "a job with a dead process ends well")
    return time.monotonic() - start


# == STREAMS ==========================================================================================================


def streams(place: Path, data: dict, rng: random.Random, found: Findings, times: int = 1) -> dict:
    """Streams that are closed, full or gone, and a terminal that is gone: the run ends, and its folder is whole."""
    flags, codes = [*data["text"], "--max-steps", "3", "--eval-every", "1"], {}
    whole = Whole(place, flags, "streams whole")
    ways = {"<&-": 0, ">&-": 0, "2>&-": 0, "<&- >&- 2>&-": 0, ">/dev/full": 2, "2>/dev/full": 0, ">/dev/full 2>&1": 2,
            "| head -n 1": 0, "2>&1 | true": 0}  # and the exit codes  # fmt: skip
    for i, (way, code) in enumerate(ways.items()):
        where = place / f"streams {i}"
        err = (job := process(place, [*flags, "--out-dir", where], shell=way)).communicate(timeout=300)[1]
        codes[way] = job.returncode
        found.expect(job.returncode == code and "Traceback" not in err, f"{way}: {job.returncode}, {err[-400:]}")
        found.expect(not (why := whole.same(where)), f"{way}: another end: {why}")
    return {"exit codes": codes}


# == COMMAND LINE =====================================================================================================

PARTS: dict[str, Callable] = {"kills": kills, "disk": disk, "signals": signals, "ranks": ranks, "streams": streams}


def run(name: str, place: Path, data: dict, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part."""
    print(f"{name:<12}{PARTS[name].__doc__.splitlines()[0]} Seed {args.seed}.", flush=True)
    found, start = Findings(), time.monotonic()
    figures = PARTS[name](place, data, random.Random(args.seed), found, **({"times": args.times} if args.times else {}))
    minutes = round((time.monotonic() - start) / 60, 1)
    print("\n".join(f"{'':<12}{key:<48}{value}" for key, value in figures.items()), flush=True)
    return figures | {"seed": args.seed, "minutes": minutes, "broken": list(found)}


def main(argv: list[str] | None = None) -> int:
    """The command line: 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Break train.py, and count.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="of all choices (default: time)")
    parser.add_argument("--times", type=int, help="how often (default: 100 kills, a few of the others)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the figures go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a fork of a process with threads would wait for them
    path, place = args.results / f"{date.today()}-faults.json", Path(tempfile.mkdtemp(prefix="faults-"))
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    try:
        data = make_data(place)
        for name in args.only:
            (place / name).mkdir()
            figures[name] = run(name, place / name, data, args)
            write_json(path, figures)
    finally:
        shutil.rmtree(place)
    broken = sum(len(figures[name]["broken"]) for name in args.only)
    print(f"{broken} promises broken; figures in {path}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
