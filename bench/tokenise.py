"""How fast data/prepare.py tokenises, and how much memory it takes.

    python bench/tokenise.py speed my.txt                # beside one encode_ordinary a document in a pool, in one run
    python bench/tokenise.py memory my.txt               # peak memory while tokenising 1 GB (Linux)

`my.txt` is any English text; corpora of the size asked for are made of its lines, shuffled anew for every document. The
GPT-2 vocabulary has to be there or to be had (data/README.md). Nothing else should run on the machine.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PREPARE = ROOT / "data" / "prepare.py"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PARENT_SHARD = 100_000_000


def documents(text: str, size: int, rng: random.Random) -> Iterator[str]:
    """Documents of 500 to 20,000 characters, mostly about 4,000, of the lines of a text, until `size` characters."""
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    while size > 0:
        length, parts = min(20_000, 500 + int(rng.expovariate(1 / 3500))), []
        while length > 0:
            parts.append(rng.choice(lines))
            length -= len(parts[-1])
        document = "".join(parts)
        size -= len(document)
        yield document


def write_corpus(path: Path, text: str, megabytes: float) -> Path:
    """A corpus in the format that the ending of `path` says; `.line.txt` is one document without a line end."""
    found, size = documents(text, int(megabytes * 1e6), random.Random(0)), 0
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": list(found)})
        pyarrow.parquet.write_table(table, path, row_group_size=len(table))  # a single one: the hardest case
        return path
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for document in found:
            if path.suffix == ".jsonl":
                document = json.dumps({"text": document}) + "\n"
            else:
                document = document.replace("\n", " ") if path.name.endswith(".line.txt") else document + "\n"
            size += file.write(document)
    return path


def prepare(source: Path, out: Path, *more: object) -> list[str]:
    """The command."""
    return [sys.executable, str(PREPARE), "--from", str(source), "--out", str(out), *map(str, more)]


# == the other way: as build-nanogpt's fineweb.py does it, but with every core instead of half of them ================


def load() -> None:
    """In each process of the pool."""
    global GPT2
    import tiktoken

    GPT2 = tiktoken.get_encoding("r50k_base")


def encode(text: str) -> np.ndarray:
    """End-of-text and the ids of one document."""
    ids = np.array([GPT2.eot_token, *GPT2.encode_ordinary(text)])
    assert (0 <= ids).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def parent(source: Path, out: Path) -> None:
    """Shards of a .jsonl file: a pool, one document a call, 16 calls a message."""
    out.mkdir()
    shard, filled, number = np.empty(PARENT_SHARD, np.uint16), 0, 0
    with open(source, encoding="utf-8") as file, multiprocessing.Pool(CORES, load) as pool:
        for ids in pool.imap(encode, (json.loads(line)["text"] for line in file), chunksize=16):
            while filled + len(ids) >= len(shard):
                room = len(shard) - filled
                shard[filled:] = ids[:room]
                np.save(out / f"{number:06d}", shard)
                ids, filled, number = ids[room:], 0, number + 1
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
    np.save(out / f"{number:06d}", shard[:filled])


# == measurements =====================================================================================================


def tokens_in(folder: Path) -> np.ndarray:
    """All tokens of a folder's shards, in the order of their numbers."""
    files = sorted(folder.glob("*.npy"), key=lambda f: f.stem[-6:])
    return np.concatenate([np.load(f) for f in files])


def speed(text: str, work: Path, megabytes: float, rounds: int) -> dict:
    """Megabytes of text a second of both ways, whole commands, in turn; the same a CPU second; their tokens are equal.

    The second figure says what is left of the first on a machine that others use too.
    """
    corpus = write_corpus(work / "speed.jsonl", text, megabytes)
    size = sum(len(json.loads(line)["text"].encode()) for line in open(corpus, encoding="utf-8")) / 1e6
    spans: dict[str, list[float]] = {"parent": [], "ours": []}
    cpu: dict[str, list[float]] = {"parent": [], "ours": []}
    for i in range(rounds):
        outs = {name: work / f"{name}{i}" for name in spans}
        commands = {"parent": [sys.executable, __file__, "parent", str(corpus), "--out", str(outs["parent"])],
                    "ours": prepare(corpus, outs["ours"])}
        for name, command in commands.items():
            began, spent = time.perf_counter(), sum(os.times()[2:4])
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            spans[name].append(time.perf_counter() - began)
            cpu[name].append(sum(os.times()[2:4]) - spent)
            print(f"round {i}  {name:<7} {size / spans[name][-1]:6.2f} MB/s, {size / cpu[name][-1]:6.2f} MB per CPU "
                  "second", flush=True)
        same = np.array_equal(*(tokens_in(out) for out in outs.values()))
        assert same, "the two ways give different tokens"
    found = {"MB of text": size}
    for unit, kind in (("MB/s", spans), ("MB per CPU second", cpu)):
        rates = {name: size / statistics.median(values) for name, values in kind.items()}
        found |= {f"{name} {unit}": rate for name, rate in rates.items()}
        found[f"ratio of {unit}"] = rates["ours"] / rates["parent"]
    return found | {"seconds": spans, "CPU seconds": cpu}


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def memory_now(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it, what they share counted once; bytes of the process alone."""
    sizes = []
    for one in family(pid):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")))
    return sum(sizes), sizes[0]


def memory(text: str, work: Path, megabytes: float) -> dict:
    """Peak memory while tokenising files of `megabytes`: many documents, a single one, parquet with one row group."""
    found = {}
    for name in ("memory.txt", "memory.line.txt", "memory.jsonl", "memory.parquet"):
        corpus = write_corpus(work / name, text, megabytes)
        process = subprocess.Popen(prepare(corpus, work / f"{name}.out"), stdout=subprocess.DEVNULL)
        peak, main, began = 0, 0, time.perf_counter()
        while process.poll() is None:
            try:
                now, alone = memory_now(process.pid)
                peak, main = max(peak, now), max(main, alone)
            except OSError:  # one of them has just ended
                pass
            time.sleep(0.1)
        assert process.returncode == 0
        took = time.perf_counter() - began
        found[name] = {"file MB": corpus.stat().st_size / 1e6, "peak MB": peak / 1e6, "main process MB": main / 1e6,
                       "seconds": took}
        print(f"{name:<16} {corpus.stat().st_size / 1e6:6.0f} MB in {took:5.1f} s, peak {peak / 1e6:4.0f} MB, of which "
              f"the main process {main / 1e6:4.0f} MB", flush=True)
        corpus.unlink()
    return found


def main() -> None:
    """Make the corpus in a temporary folder, measure, keep the numbers in bench/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory", "parent"), help="what to measure")
    parser.add_argument("text", type=Path, help="a text to make the corpora of")
    parser.add_argument("--megabytes", type=float, help="size of a corpus (default: 150, 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turn, for the speed")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "parent":
        parent(args.text, args.out)
        return
    text, size = args.text.read_text(encoding="utf-8"), args.megabytes
    with tempfile.TemporaryDirectory() as work:
        found = {"speed": lambda: speed(text, Path(work), size or 150, args.rounds),
                 "memory": lambda: memory(text, Path(work), size or 1000)}[args.what]()
    print(json.dumps(found, indent=1))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    out = ROOT / "bench" / "results" / f"{date.today()}-tokenise-{args.what}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": f"{CORES} cores, {platform.machine()}", "python": platform.python_version(),
                               "commit": commit.strip(), "command": "python " + " ".join(sys.argv), **found}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
