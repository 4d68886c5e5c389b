"""data/prepare.py: the tokens are those of the text, an interruption leaves no trace, bad input gets one line.

No test needs a network: a small vocabulary made here stands in for GPT-2's, and a server in this process for the hub.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data import documents as blocks
from data import prepare as script
from data import shards
from data.files import UserError
from data.prepare import EOT, main

tiktoken = pytest.importorskip("tiktoken")

ROOT = Path(__file__).resolve().parent.parent
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
MERGES = ("th", " t", "he", " a", "in", "er", " th", "the", " the", "  ", "    ", "\n\n", "aa", "aaaa", "..", "an", "é")
LETTERS = "etaoinshr é日"
BLANK = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")  # for tiktoken
HOSTILE = ["", " \n\t ", EOT, f"the {EOT}{EOT} end", "<|endoftext", "trailing   ", "\tindented\n  more", "'s",
           "é日本 語", "the then there " * 40, "a" * 700, "   " * 300 + "x", "日本語" * 200,
           "\u3000\u2003 wide\u00a0"]  # fmt: skip
WHITE = st.builds(lambda some, times: some * times,
                  st.text(" \n\t\r\x0b\x0c\u3000\x85\xa0\x1c", min_size=1, max_size=3), st.integers(1, 60))
WORD = st.sampled_from(["the", " the", "é", "日本", "'s", "x" * 50, EOT, "12", "..", "\ufeff", "\x1c"])
TEXT = st.lists(WHITE | WORD | st.text(" \na", max_size=5), max_size=12).map("".join)


def small_vocabulary() -> tiktoken.Encoding:
    """GPT-2's way to cut text into words, its end-of-text, the bytes, and a few merges, so that cuts can do harm."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in MERGES:
        ranks[merge.encode()] = len(ranks)
    return tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})


class Inline:
    """A pool of no processes."""

    def submit(self, work, *args):
        return types.SimpleNamespace(result=lambda: work(*args))


@pytest.fixture
def inline(monkeypatch):
    """The small vocabulary, in this process: quick. Tests without this fixture run the real worker processes."""
    vocabulary = small_vocabulary()
    monkeypatch.setattr(script, "load_tokenizer", lambda name: vocabulary)
    monkeypatch.setattr(script, "ENCODING", vocabulary, raising=False)
    monkeypatch.setattr(script, "worker_pool", lambda count, name: contextlib.nullcontext(Inline()))
    return vocabulary


def expected(vocabulary, documents) -> list[int]:
    """The definition: end-of-text, then the document, one at a time; documents without text left out."""
    return [i for d in documents if d.strip(BLANK) for i in (50256, *vocabulary.encode_ordinary(d))]


def documents_of(text: str) -> list[str]:
    """The documents of a plain text, by the definition: lines between blank ones."""
    groups = [[]]
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.strip(" \t\r\x0b\x0c"):
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    return ["\n".join(group) for group in groups if group]


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def columns(path: Path, **values) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(values), path, row_group_size=5)
    return path


def write(path: Path, documents: list[str]) -> Path:
    """A corpus in the format that the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        return columns(path, id=range(len(documents)), text=pyarrow.array(documents, pyarrow.string()))
    if ".jsonl" in path.name:
        data = "".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate(documents))
    else:
        data = "\n\n".join(documents)
    return raw(path, gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())


def run(source: Path, out: Path, *more) -> int:
    """The exit code of the command, in this process."""
    try:
        return main(["--from", str(source), "--out", str(out), *map(str, more)])
    except SystemExit as stop:
        return stop.code


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"), key=lambda f: f.stem[-6:])


def tokens_in(folder: Path) -> list[int]:
    return np.concatenate([np.load(f) for f in shard_files(folder)]).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def random_documents(seed: int, count: int = 60) -> list[str]:
    """Documents of letters and white space, some far longer than a block of these tests, some without any space."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        letters = LETTERS.replace(" ", "") if rng.random() < 0.2 else LETTERS + " \n.'"
        text = "".join(rng.choices(letters, k=rng.randint(1, rng.choice((3, 30, 300, 1500)))))
        white = " " * rng.choice((0, 0, 0, 9, 400))  # some of it longer than a block
        found.append("x" + white + re.sub(r"\n+", "\n", text).strip() + white)
    return found


def small_blocks(monkeypatch, block: int, longest: int = 1 << 18) -> None:
    """Blocks so small that a test's corpus has many; everything else takes the same path."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "LONGEST", longest)
    monkeypatch.setattr(blocks, "ROWS", 3)


KINDS = {"utf-8": "c.txt", "utf-8-sig": "c.txt", "utf-16": "c.md", "gzip": "c.txt.gz", "jsonl": "c.jsonl",
         "parquet": "c.parquet"}  # fmt: skip


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=TEXT, kind=st.sampled_from(sorted(KINDS)), block=st.sampled_from([7, 16, 33, 64, 1 << 20]),
       longest=st.sampled_from([2, 5, 1 << 18]))
@example(text="first\n" + " " * 99 + "\nsecond", kind="utf-8", block=33, longest=5)
@example(text="!\x1c" + " " * 99 + "the", kind="utf-8", block=16, longest=1 << 18)
@example(text="a\u3000" + " " * 40 + "the", kind="utf-8", block=16, longest=2)
@example(text="\x0b".join(HOSTILE), kind="jsonl", block=64, longest=1 << 18)
def test_the_tokens_are_those_of_each_document_alone(text, kind, block, longest, inline, tmp_path, monkeypatch):
    """In however small pieces the text is read, and however long its white space is."""
    small_blocks(monkeypatch, block, longest)
    if kind in ("jsonl", "parquet"):
        documents = text.split("\x0b")
        file = write(tmp_path / KINDS[kind], [d or None for d in documents])
    else:
        text = text.lstrip("\ufeff")
        documents = documents_of(text)
        file = raw(tmp_path / KINDS[kind], gzip.compress(text.encode()) if kind == "gzip" else text.encode(kind))
    files = [{"name": file.name, "bytes": file.stat().st_size}]
    found = [script.encode_block(b.kind, b.data, b.inside)
             for b in blocks.all_blocks(files, lambda name: file, blocks.Position())]  # fmt: skip
    assert [int(i) for encoded in found for i in encoded.tokens] == expected(inline, documents)
    assert sum(encoded.empty for encoded in found) == sum(not d.strip(BLANK) for d in documents)


def test_a_million_spaces_and_a_word_longer_than_a_block_do_not_stop_it(inline, tmp_path):
    documents = ["x" + " " * 1_100_000 + "y", "日" * 500_000]
    with pytest.raises(ValueError, match="(?i)stack"):  # what would happen in one call
        inline.encode_to_numpy(documents[0])
    for name in ("c.txt", "c.jsonl"):
        assert run(write(tmp_path / name, documents), out := tmp_path / name[2:]) == 0
        assert inline.decode(tokens_in(out)) == "".join(EOT + d for d in documents)


class Stop(BaseException):
    """Stands for a power cut: nothing catches it."""


@contextlib.contextmanager
def stopping(after: int):
    """Runs in here end when they have written `after` files, shards and meta.json alike: the next gets no name."""
    left = iter(range(after))

    def replace(one, other, plain=os.replace):
        if next(left, None) is None:
            raise Stop
        plain(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet", "c.txt", "c.txt.gz"])
def test_stopped_again_and_again_it_ends_the_same_to_the_byte(name, inline, tmp_path, monkeypatch):
    """At every kind of moment: before anything is written, or with a shard that is there but not listed, and so on."""
    small_blocks(monkeypatch, 200, 90)
    few = ("--shard-tokens", 900, "--val-tokens", 300)
    for part in "ab":
        write(tmp_path / "in" / part / name, random_documents(ord(part), 40))
    assert run(tmp_path / "in", tmp_path / "straight", *few) == 0
    wanted, out = contents(tmp_path / "straight"), tmp_path / "stopped"
    assert {s["next"]["file"] for s in meta(tmp_path / "straight")["shards"] if s["next"]} == {0, 1}
    for writes in (0, 1, 2, 3, 4, 9) * len(wanted):
        with stopping(writes), contextlib.suppress(Stop):
            assert run(tmp_path / "in", out, *few) == 0
            break
    assert contents(out) == wanted and len(wanted) > 12


def python(*argv, cwd: Path, **env: str | None) -> subprocess.Popen:
    """The script in a process of its own; environment variables given as None are absent."""
    full = {k: v for k, v in (os.environ | env).items() if v is not None}
    options = dict(cwd=cwd, text=True, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return subprocess.Popen([sys.executable, ROOT / "data" / "prepare.py", *map(str, argv)], **options)


def worker_pids(pid: int) -> list[int]:
    """The processes below one (Linux)."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in found.read_text().split()] if found.exists() else []


def wait_for(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_signals_leave_whole_shards_no_process_and_the_same_end(tmp_path):
    source = write(tmp_path / "c.jsonl", ["the then there " * 400 + str(i) for i in range(2000)])  # 12 MB
    command = ("--from", source, "--tokenizer", "bytes", "--shard-tokens", 500_000, "--workers", 2, "--out")
    stops = [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 130), ("SIGHUP", 130)]
    for next_shard, (name, code) in enumerate(stops, 2):
        number, process = getattr(signal, name), python(*command, "out", cwd=tmp_path)
        assert wait_for((tmp_path / "out" / f"text_train_{3 * next_shard:06d}.npy").exists)
        below = worker_pids(process.pid)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal sends it: to the workers as well
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert code < 0 or err.count("\n") == 1 and "the same command goes on" in err, err
        assert wait_for(lambda: not any(Path(f"/proc/{p}/cmdline").exists() for p in below))  # noqa: B023
        assert not meta(tmp_path / "out")["complete"]
    for name in ("out", "straight"):
        out, err = (process := python(*command, name, cwd=tmp_path)).communicate(timeout=300)
        assert process.returncode == 0 and err == "", err
        assert ("going on behind text_train_" in out) == (name == "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight") and len(shard_files(tmp_path / "out")) > 24


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="--workers"), script.worker_pool(1, "bytes") as pool:
        pool.submit(os._exit, 3).result()


@pytest.mark.parametrize("asked, tokens, val", [
    (None, 5000, 100), (None, 999, 99), (None, 1090, 100), (300, 5000, 300), (300, 301, 300), (300, 300, 30),
    (300, 10, 1)])  # fmt: skip
def test_a_corpus_of_any_size_gets_a_validation_shard(asked, tokens, val, inline, tmp_path, capsys):
    source = write(tmp_path / "c.jsonl", ["x" * (tokens - 1)])
    more = ("--val-tokens", asked) if asked else ()
    assert run(source, tmp_path / "out", "--shard-tokens", 1000, *more) == 0
    counts = [s["tokens"] for s in meta(tmp_path / "out")["shards"]]
    assert counts[0] == val and sum(counts) == tokens and max(counts) <= 1000 and set(counts[1:-1]) <= {1000}
    assert [f.stem.split("_")[1] for f in shard_files(tmp_path / "out")] == ["val"] + ["train"] * (len(counts) - 1)
    assert ("note: " in capsys.readouterr().out) == (asked is not None and asked != val)


def test_meta_json_says_what_is_there(inline, tmp_path):
    write(tmp_path / "books" / "deep" / "b.jsonl", ["the end"] * 50)
    write(tmp_path / "books" / "a.TXT", ["one"] * 50)
    write(tmp_path / "books" / "picture.png", ["no"])
    assert run(tmp_path / "books", out := tmp_path / "out", "--shard-tokens", 200, "--val-tokens", 60) == 0
    found = meta(out)
    assert (found["source"], found["tokenizer"], found["vocab_size"]) == ("books", "gpt2", 50257)
    assert (found["end_of_text"], found["dtype"], found["complete"]) == (50256, "uint16", True)
    assert [f["name"] for f in found["files"]] == ["a.TXT", "deep/b.jsonl"]
    assert [s["name"] for s in found["shards"]] == [f.name for f in shard_files(out)]
    for shard in found["shards"]:
        data, tokens = (out / shard["name"]).read_bytes(), np.load(out / shard["name"])
        assert tokens.dtype == np.uint16 and shard["tokens"] == len(tokens) and shard["bytes"] == len(data)
        assert shard["documents"] == (tokens == 50256).sum() and shard["sha256"] == hashlib.sha256(data).hexdigest()
    for split in ("val", "train"):  # and the readers find the same
        files = shards.shard_files(out, split)
        assert [f.name for f in files] == [s["name"] for s in found["shards"] if s["split"] == split] != []
        assert all(np.array_equal(shards.read_shard(f)[:], np.load(f)) for f in files)


def test_a_finished_folder_is_checked_and_left_alone(inline, tmp_path, capsys):
    source = write(tmp_path / "c.jsonl", random_documents(4))
    few = ("--shard-tokens", 1500)
    assert run(source, out := tmp_path / "out", *few) == 0
    times, wanted = {f: f.stat().st_mtime_ns for f in out.iterdir()}, contents(out)
    assert run(source, out, *few) == 0 and "complete already" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == times
    flipped = bytearray(wanted["text_train_000002.npy"])
    flipped[-1] ^= 1
    for name, spoil in (("text_train_000002.npy", lambda f: f.write_bytes(flipped)),
                        ("text_val_000000.npy", lambda f: f.write_bytes(b"")),
                        (shard_files(out)[-1].name, Path.unlink)):  # fmt: skip
        spoil(out / name)
        assert run(source, out, *few) == 0 and contents(out) == wanted
        assert f"{name} is missing or damaged" in capsys.readouterr().out


def refused(capsys, code: int, *words: str) -> None:
    """Exit code 2 and one line on stderr with these words."""
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("prepare.py: "), err
    assert all(word in err for word in words), err


def test_other_settings_or_sources_are_refused(inline, tmp_path, capsys):
    source = write(tmp_path / "c.jsonl", random_documents(5))
    assert run(source, out := tmp_path / "out", "--shard-tokens", 2000) == 0
    before = contents(out)
    capsys.readouterr()
    for more, words in ((("--shard-tokens", 3000), "--shard-tokens 2000, not 3000"),
                        (("--val-tokens", 9), "--val-tokens default, not 9"),
                        (("--tokenizer", "bytes"), "--tokenizer gpt2, not bytes")):  # fmt: skip
        refused(capsys, run(source, out, "--shard-tokens", 2000, *more), words, "--out")
    refused(capsys, run(write(tmp_path / "d.txt", ["d"]), out, "--shard-tokens", 2000), "source c.jsonl, not d.txt")
    for changed in (random_documents(6), random_documents(5)[::-1], random_documents(5)[:-1]):  # the second: same size
        refused(capsys, run(write(source, changed), out, "--shard-tokens", 2000), "c.jsonl", "delete")
    assert contents(out) == before


def test_a_file_not_reached_yet_may_still_change(inline, tmp_path):
    few = ("--shard-tokens", 1000, "--val-tokens", 100)
    for name in "ab":
        write(tmp_path / "in" / f"{name}.jsonl", random_documents(7, 20))
    with stopping(6), pytest.raises(Stop):  # meta, val, meta, train, meta, train
        run(tmp_path / "in", tmp_path / "out", *few)
    write(tmp_path / "in" / "b.jsonl", random_documents(8, 20))
    for out in ("out", "straight"):
        assert run(tmp_path / "in", tmp_path / out, *few) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


BAD_LINES = {"not JSON": '{"text": "a"', "a list": '["text"]', "no text": '{"txt": "a"}',
             "deep": "[" * 100_000}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named(bad, inline, tmp_path, capsys, monkeypatch):
    small_blocks(monkeypatch, 300)
    lines = [json.dumps({"text": f"number {i}"}) + "\n" * (1 + i % 2) for i in range(40)]  # some lines are empty
    text = "".join(lines) + BAD_LINES[bad] + "\n" + lines[0]
    source = raw(tmp_path / "c.jsonl.gz", gzip.compress(text.encode()))
    refused(capsys, run(source, tmp_path / "out"), "c.jsonl.gz, line 61 ", "repair or remove")
    assert shard_files(tmp_path / "out") == []


BAD_SOURCES = {
    "missing": (lambda p: p / "none.txt", "does not exist"),
    "unknown ending": (lambda p: raw(p / "c.pdf", b"%PDF"), ".parquet"),
    "empty folder": (lambda p: folder(p / "empty"), "holds no file"),
    "truncated gzip": (lambda p: raw(p / "c.txt.gz", gzip.compress(b"text")[:-9]), "c.txt.gz is damaged"),
    "no parquet": (lambda p: raw(p / "c.parquet", b"plain"), "c.parquet is damaged"),
    "no column": (lambda p: columns(p / "c.parquet", content=["a"]), "its columns are content"),
    "odd UTF-16": (lambda p: raw(p / "c.txt", "some text".encode("utf-16")[:-1]), "truncated"),
    "pipe": (lambda p: os.mkfifo(p / "c.txt") or p / "c.txt", "not an ordinary file"),
    "no strings": (lambda p: columns(p / "c.parquet", text=[1]), "int64, not strings"),
    "blank lines": (lambda p: raw(p / "c.txt", b"\n \n\n"), "0 tokens"),
    "too small": (lambda p: raw(p / "c.txt", b"x"), "2 tokens"),
}


@pytest.mark.parametrize("bad", BAD_SOURCES)
def test_a_bad_source_is_named(bad, inline, tmp_path, capsys):
    make, word = BAD_SOURCES[bad]
    refused(capsys, run(make(tmp_path), out := tmp_path / "out"), word)
    assert not out.exists() or os.listdir(out) == ["meta.json"]  # which says that nothing is complete
    assert run(write(tmp_path / "good.txt", ["a good text"] * 3), out) == 0  # and is in nobody's way


def test_a_folder_with_other_shards_is_refused(inline, tmp_path, capsys):
    source, out = write(tmp_path / "c.txt", ["x"] * 50), folder(tmp_path / "out")
    np.save(out / "mine_train_000001.npy", np.zeros(9, np.uint16))
    refused(capsys, run(source, out), "mine_train_000001.npy", "another --out")
    (out / "meta.json").write_text('{"format": 1, "shards": []}')
    refused(capsys, run(source, out), "meta.json", "another --out")
    refused(capsys, run(source, raw(tmp_path / "file", b"")), "file")
    assert sorted(os.listdir(out)) == ["meta.json", "mine_train_000001.npy"]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_text_in_every_kind_of_column(kind, inline, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    if kind == "string_view" and not hasattr(pyarrow, kind):
        pytest.skip("this pyarrow has no string views")
    array = pyarrow.array([d.encode() if "binary" in kind else d for d in HOSTILE])
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pyarrow, kind)())
    assert run(columns(tmp_path / "c.parquet", text=array), tmp_path / "out") == 0
    assert tokens_in(tmp_path / "out") == expected(inline, HOSTILE)


@pytest.mark.parametrize("name, data, documents, words", [
    ("c.txt", b"good one\n\nbad \xff\xfe one\n\n\xe9t\xe9", ["good one", "bad \ufffd\ufffd one", "\ufffdt\ufffd"],
     ["2 documents were not UTF-8"]),
    ("c.jsonl", b'{"text": "half \\ud83d pair"}\r\n{"text": null}\n{"text": "bad \xff"}',
     ["half \ufffd pair", "bad \ufffd"], ["1 documents were not UTF-8", "1 documents without any text"])])
def test_what_is_not_text_is_repaired_and_counted(name, data, documents, words, inline, tmp_path, capsys):
    assert run(raw(tmp_path / name, data), tmp_path / "out") == 0
    assert tokens_in(tmp_path / "out") == expected(inline, documents)
    said = capsys.readouterr().out
    assert all(word in said for word in words), said


@pytest.mark.parametrize("argv, words", [
    ([], "--pretokenized"), (["--pretokenized", "0"], "from 1 to 99"), (["--pretokenized", "x"], "whole number"),
    (["--tokenize", "--from", "x"], "not allowed with"), (["--pretokenized", "1", "--workers", "2"], "--workers"),
    (["--tokenize", "--shard-tokens", "9", "--val-tokens", "10"], "--val-tokens 10"), (["--tokenizer", "gpt9"], "gpt9"),
])  # fmt: skip
def test_a_command_that_makes_no_sense_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    refused(capsys, stop.value.code, words)


# == without a network ================================================================================================


@pytest.mark.parametrize("argv", [["--pretokenized", "3"], ["--tokenize", "--tokenizer", "bytes"]])
def test_without_a_network_it_says_so_at_once(argv, tmp_path, capsys, monkeypatch):
    if argv[0] == "--tokenize":
        pytest.importorskip("pyarrow")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(capsys, main([*argv, "--out", str(tmp_path / "out")]),
            "http://127.0.0.1:9 cannot be reached", "HTTPS_PROXY", "--from")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_network_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(shards.urllib.request, "getproxies", dict)
    monkeypatch.setattr(shards.socket, "create_connection", lambda *_: time.sleep(9) or contextlib.nullcontext())
    began = time.monotonic()
    assert not shards.reachable("https://example.org") and 1 < time.monotonic() - began < 8


def test_a_proxy_is_asked_instead(monkeypatch):
    asked = []
    monkeypatch.setattr(shards.urllib.request, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(shards.urllib.request, "getproxies", lambda: {"https": "http://gate:3128"})
    connect = lambda place, _: asked.append(place) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(shards.socket, "create_connection", connect)
    assert shards.reachable("https://example.org") and asked == [("gate", 3128)]


def test_without_the_vocabulary_the_cache_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shards, "reachable", lambda url: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    code = run(write(tmp_path / "c.txt", ["x"]), tmp_path / "out")
    file = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
    refused(capsys, code, "TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"), file, "--tokenizer bytes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package, argv", [("huggingface_hub", ["--pretokenized", "1"]), ("pyarrow", ["--tokenize"]),
                                           ("tiktoken", ["--tokenize"])])  # fmt: skip
def test_a_missing_package_is_named_with_its_remedy(package, argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "need_hub", lambda what: None)
    if package != "tiktoken":
        monkeypatch.setattr(script, "load_tokenizer", lambda name: None)
    monkeypatch.setitem(sys.modules, package, None)
    refused(capsys, main([*argv, "--out", str(tmp_path / "out")]), "pip install", package.split("_")[0])


# == a stand-in for the hub ===========================================================================================


class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses of the hub that are asked: a data set's commit, a folder's listing, a file."""

    commit, files, listed, served = "a" * 40, {}, {}, []  # commit now; commit -> {name: data}; checksums told; GETs

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        head, headers, data = self.command == "HEAD", {}, None
        if "/tree/" in path:
            commit, _, below = path.split("/tree/")[1].partition("/")
            found = [self.entry(n, d) for n, d in self.files[commit].items() if n.rpartition("/")[0] == below]
            data = json.dumps(found).encode()
        elif path.startswith("api/"):
            data = json.dumps({"id": "x/y", "sha": Hub.commit}).encode()
        elif "/resolve/" in path:
            commit, _, name = path.split("/resolve/")[1].partition("/")
            data = self.files[commit].get(name)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data or b"").hexdigest()}"'}
            self.served += [] if head else [(commit, name)]
        self.send_response(200 if data is not None else 404)
        for key, value in (headers | {"Content-Length": str(len(data or b""))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if head else data or b"")

    do_HEAD = do_GET

    def entry(self, name: str, content: bytes) -> dict:
        told = self.listed.get(name, hashlib.sha256(content).hexdigest())
        lfs = {"oid": told, "size": len(content), "pointerSize": 1}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs}

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(the handler with its files, a function that runs the script against it: (exit code, stdout, last of stderr))."""
    pytest.importorskip("huggingface_hub")
    for name, value in (("commit", "a" * 40), ("files", {}), ("listed", {}), ("served", [])):
        monkeypatch.setattr(Hub, name, value)

    def run(*argv, **more):
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": None,
               "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = python(*argv, "--out", "out", cwd=tmp_path, **env | more)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, (err.splitlines() or [""])[-1]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub, run
        server.shutdown()


def ready(*tokens: int) -> bytes:
    """A .bin shard."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_ready_shards_are_fetched_checked_and_not_fetched_again(hub, tmp_path):
    server, run = hub
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in (1, 2, 3))]
    server.files["a" * 40] = {name: ready(50256, i, 50256, 7) for i, name in enumerate(names)} | {"README.md": b"hello"}
    server.listed[names[2]] = hashlib.sha256(b"other").hexdigest()  # arrives damaged
    code, out, err = run("--pretokenized", 2)
    assert code == 2 and names[2] in err and "checksum" in err and "fetches it again" in err
    assert not (tmp_path / "out" / names[2]).exists() and not meta(tmp_path / "out")["complete"]
    server.listed.clear()
    server.commit, server.files["b" * 40] = "b" * 40, {}  # the data set moves on; what was begun does not
    server.served.clear()
    assert run("--pretokenized", 2)[0] == 0 and server.served == [("a" * 40, names[2])]
    found = meta(tmp_path / "out")
    assert (found["complete"], found["revision"], found["vocab_size"]) == (True, "a" * 40, 50257)
    assert {s["name"]: (s["split"], s["tokens"], s["documents"], s["bytes"]) for s in found["shards"]} == {
        name: ("val" if "val" in name else "train", 4, 2, 1032) for name in names[:3]}  # fmt: skip
    (tmp_path / "out" / names[0]).write_bytes(b"damaged")
    server.served.clear()
    assert run("--pretokenized", 1)[0] == 0 and server.served == [("a" * 40, names[0])]
    assert run("--pretokenized", 2, HF_ENDPOINT="http://127.0.0.1:9")[1].startswith("out is complete already: 1 valid")
    (tmp_path / "out" / names[2]).unlink()
    server.served.clear()
    assert run("--pretokenized", 1)[0] == 0 and server.served == [("a" * 40, names[2])], "not asked for, but listed"
    code, _, err = run("--pretokenized", 4)
    assert code == 2 and "3 training shards" in err


def test_fineweb_is_fetched_and_tokenised_and_its_revision_kept(hub, tmp_path):
    pytest.importorskip("pyarrow")
    server, run = hub
    documents = [["the first", "the second " * 30, EOT] * 20, ["another file"] * 40]
    server.files["a" * 40] = {f"sample/10BT/{i:03d}_00000.parquet": write(tmp_path / f"{i}.parquet", d).read_bytes()
                              for i, d in enumerate(documents)}  # fmt: skip
    command = ("--tokenize", "--tokenizer", "bytes", "--shard-tokens", 1500)
    second = server.files["a" * 40].pop("sample/10BT/001_00000.parquet")
    server.files["a" * 40]["sample/10BT/001_00000.parquet"] = b"PAR1 damaged"
    code, out, err = run(*command)
    assert code == 2 and "001_00000.parquet is damaged" in err and "edufineweb_val_000000.npy" in out  # read ahead
    for file in (tmp_path / "hf").rglob("*"):
        if file.is_file() and file.read_bytes() == b"PAR1 damaged":
            file.write_bytes(second)
    server.commit = "b" * 40
    code, out, err = run(*command, HF_ENDPOINT="http://127.0.0.1:9")  # everything is here
    assert code == 0 and "going on behind" in out, err
    wanted = [i for d in sum(documents, []) for i in (256, *d.encode())]
    assert tokens_in(tmp_path / "out") == wanted and meta(tmp_path / "out")["revision"] == "a" * 40
    assert [np.load(f).size for f in shard_files(tmp_path / "out")][:3] == [1500] * 3  # the first one for validation
