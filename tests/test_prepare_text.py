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
import sys
import threading
import time
import types
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from helpers import ROOT, complaint, exit_code, python, write_shard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data import documents as blocks
from data import prepare as script
from data import shards
from data.files import UserError
from data.prepare import EOT

tiktoken = pytest.importorskip("tiktoken")
pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
MERGES = ("th", " t", "he", " a", "in", "er", " th", "the", " the", "  ", "    ", "\n\n", "aa", "aaaa", "..", "an", "é")
BLANK = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")  # for tiktoken
HOSTILE = ["", " \n\t ", EOT, f"the {EOT}{EOT} end", "<|endoftext", "trailing   ", "\tindented\n  more", "'s",
           "é日本 語", "the then there " * 40, "a" * 700, "   " * 300 + "x", "日本語" * 200,
           "\u3000\u2003 wide\u00a0"]  # fmt: skip
WHITE = st.builds(lambda some, times: some * times,
                  st.text(" \n\t\r\x0b\x0c\u3000\x85\xa0\x1c", min_size=1, max_size=3), st.integers(1, 60))
WORD = st.sampled_from(["the", " the", "é", "日本", "'s", "x" * 50, EOT, "12", "..", "\ufeff", "\x1c"])
TEXT = st.lists(WHITE | WORD | st.text(" \na", max_size=5), max_size=12).map("".join)


@pytest.fixture
def inline(monkeypatch):
    """The small vocabulary, in this process: quick. Tests without this fixture run the real worker processes.

    It cuts text into words as GPT-2's does and has its end-of-text, and a few merges, so that cuts can do harm.
    """
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *map(str.encode, MERGES)])}
    small = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})
    pool = types.SimpleNamespace(submit=lambda work, *args: types.SimpleNamespace(result=lambda: work(*args)))

    def load(name):
        found = small if name == "gpt2" else shards.load_tokenizer(name)
        monkeypatch.setattr(script, "ENCODING", found, raising=False)
        return found

    monkeypatch.setattr(script, "load_tokenizer", load)
    monkeypatch.setattr(script, "worker_pool", lambda count, name: contextlib.nullcontext(pool))
    return load("gpt2")


def expected(vocabulary, documents) -> list[int]:
    """The definition: end-of-text, then the document, one at a time; documents without text left out."""
    return [i for d in documents if d and d.strip(BLANK) for i in (50256, *vocabulary.encode_ordinary(d))]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def columns(path: Path, **values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(values), path, row_group_size=5)
    return path


def write(path: Path, documents: list[str]) -> Path:
    """A corpus in the format that the name's ending says."""
    if path.suffix == ".parquet":
        return columns(path, id=range(len(documents)), text=pyarrow.array(documents, pyarrow.string()))
    if ".jsonl" in path.name:
        data = "".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate(documents))
    else:
        data = "\n\n".join(documents)
    return raw(path, gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())


def run(source: Path, out: Path, *more) -> int:
    """The exit code of the command, in this process."""
    return exit_code(script, "--from", source, "--out", out, *more)


def refused(capsys, words, *argv) -> None:
    """Exit code 2, nothing printed, and one line on stderr with these words."""
    err = complaint(script, capsys, *argv)
    assert all(word in err for word in words), err


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
        letters = "etaoinshré日" + rng.choice(["", *["  \n.'"] * 4])
        text = "".join(rng.choices(letters, k=rng.randint(1, rng.choice((3, 30, 300, 1500)))))
        white = " " * rng.choice((0, 0, 0, 9, 400))  # some of it longer than a block
        found.append("x" + white + re.sub(r"\n+", "\n", text).strip() + white)
    return found


def small_blocks(monkeypatch, block: int, longest: int = 1 << 18) -> None:
    """Blocks so small that a test's corpus has many; everything else takes the same path."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "LONGEST", longest)
    monkeypatch.setattr(blocks, "ROWS", 3)


COLUMNS = ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]
COLUMNS = [kind for kind in COLUMNS if kind == "dictionary" or hasattr(pyarrow, kind)]  # old ones lack string_view
KINDS = {"utf-8": "c.txt", "utf-8-sig": "c.txt", "utf-16": "c.md", "gzip": "c.txt.gz", "jsonl": "c.jsonl",
         **dict.fromkeys(COLUMNS, "c.parquet")}  # fmt: skip


def column(documents: list[str | None], kind: str):
    """A column of parquet."""
    array = pyarrow.array(documents, pyarrow.string())
    return array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pyarrow, kind)())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=TEXT, kind=st.sampled_from(sorted(KINDS)), block=st.sampled_from([7, 16, 33, 64, 1 << 20]),
       longest=st.sampled_from([2, 5, 1 << 18]))
@example(text="first\n" + " " * 99 + "\nsecond", kind="utf-8", block=33, longest=5)
@example(text="!\x1c" + " " * 99 + "the", kind="utf-8", block=16, longest=1 << 18)
@example(text="a\u3000" + " " * 40 + "the", kind="utf-8", block=16, longest=2)
@example(text="\x0b".join(HOSTILE), kind="jsonl", block=64, longest=1 << 18)
@example(text="\x0b".join(HOSTILE), kind="dictionary", block=64, longest=1 << 18)
def test_the_tokens_are_those_of_each_document_alone(text, kind, block, longest, inline, tmp_path, monkeypatch):
    """In however small pieces the text is read, and however long its white space is."""
    small_blocks(monkeypatch, block, longest)
    file, documents = tmp_path / KINDS[kind], [d or None for d in text.split("\x0b")]
    if kind in COLUMNS:
        columns(file, text=column(documents, kind))
    elif kind == "jsonl":
        write(file, documents)
    else:
        text = text.lstrip("\ufeff")
        raw(file, gzip.compress(text.encode()) if kind == "gzip" else text.encode(kind))
        documents = documents_of(text)
    files = [{"name": file.name, "bytes": file.stat().st_size}]
    found = [script.encode_block(b.kind, b.data, b.inside)
             for b in blocks.all_blocks(files, lambda name: file, blocks.Position())]  # fmt: skip
    assert [int(i) for encoded in found for i in encoded.tokens] == expected(inline, documents)
    assert sum(encoded.empty for encoded in found) == sum(not (d or "").strip(BLANK) for d in documents)


def test_a_million_spaces_and_a_word_longer_than_a_block_do_not_stop_it(inline, tmp_path):
    documents = ["x" + " " * 1_100_000 + "y", "日" * 500_000]
    with pytest.raises(ValueError, match="(?i)stack"):  # what would happen in one call
        inline.encode_to_numpy(documents[0])
    for name in ("c.txt", "c.jsonl"):
        assert run(write(tmp_path / name, documents), out := tmp_path / name[2:]) == 0
        assert inline.decode(tokens_in(out)) == "".join(EOT + d for d in documents)


@pytest.mark.parametrize("name, data, documents, notes", [
    ("c.txt", b"good one\n\nbad \xff\xfe one\n\n\xe9t\xe9", ["good one", "bad \ufffd\ufffd one", "\ufffdt\ufffd"],
     ["2 documents were not UTF-8"]),
    ("c.jsonl", b'{"text": "half \\ud83d pair"}\r\n{"text": null}\n{"text": "bad \xff"}',
     ["half \ufffd pair", "bad \ufffd"], ["1 documents were not UTF-8", "1 documents without any text"])])
def test_what_is_not_text_is_repaired_and_counted(name, data, documents, notes, inline, tmp_path, capsys):
    assert run(raw(tmp_path / name, data), tmp_path / "out") == 0
    assert tokens_in(tmp_path / "out") == expected(inline, documents)
    said = capsys.readouterr().out
    assert all(note in said for note in notes), said


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


def test_stopped_again_and_again_it_ends_the_same_to_the_byte(inline, tmp_path, monkeypatch):
    """At every kind of moment: before anything is written, or with a shard that is there but not listed, and so on."""
    small_blocks(monkeypatch, 200, 90)
    source, out, few = tmp_path / "in", tmp_path / "stopped", ("--shard-tokens", 900, "--val-tokens", 300)
    for i, name in enumerate(("a/c.jsonl", "a/c.txt", "b/c.jsonl.gz", "b/c.parquet", "c.txt.gz")):
        write(source / name, random_documents(i, 30))
    assert run(source, tmp_path / "straight", *few) == 0
    wanted, last = contents(tmp_path / "straight"), (source / "c.txt.gz").read_bytes()
    ends = [s["next"]["file"] for s in meta(tmp_path / "straight")["shards"] if s["next"]]
    assert all(ends.count(file) > 4 for file in range(5))
    write(source / "c.txt.gz", ["a file that is not reached yet may still change"])
    for writes in (6, *(0, 1, 2, 3, 4, 9) * len(wanted)):
        with stopping(writes), contextlib.suppress(Stop):
            assert run(source, out, *few) == 0
            break
        raw(source / "c.txt.gz", last)
    assert contents(out) == wanted


def wait_for(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_signals_leave_whole_shards_no_process_and_the_same_end(inline, tmp_path, capsys):
    source = write(tmp_path / "c.jsonl", ["the then there " * 400 + str(i) for i in range(1400)])  # 8 MB
    command = ("--from", source, "--tokenizer", "bytes", "--shard-tokens", 250_000, "--workers", 2, "--out")
    out, start = tmp_path / "out", lambda: python(ROOT / "data" / "prepare.py", *command, "out", cwd=tmp_path,
                                                  start_new_session=True)  # fmt: skip
    stops = (("SIGKILL", -9, 4), ("SIGINT", 130, 6), ("SIGTERM", 130, 8), ("SIGHUP", 130, 10))
    for name, code, shard in stops:
        number, process = getattr(signal, name), start()
        assert wait_for((out / f"text_train_{shard:06d}.npy").exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")  # Linux
        workers = children.read_text().split() if children.exists() else []
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal sends it: to the workers as well
        else:
            process.send_signal(number)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == code, err
        assert code < 0 or err.count("\n") == 1 and "the same command goes on" in err, err
        assert wait_for(lambda: not any(Path(f"/proc/{p}/cmdline").exists() for p in workers))  # noqa: B023
        assert not meta(out)["complete"]
    said, err = (process := start()).communicate(timeout=300)
    assert process.returncode == 0 and err == "" and "going on behind text_train_" in said, err
    assert exit_code(script, *command, tmp_path / "straight") == 0 and "going on" not in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "straight") and len(shard_files(out)) > 24


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="--workers"), script.worker_pool(1, "bytes") as pool:
        pool.submit(os._exit, 3).result()


def test_a_finished_folder_is_described_checked_and_mended_and_nothing_else_taken(inline, tmp_path, capsys):
    write(tmp_path / "books" / "a.TXT", ["the end"] * 50)
    write(tmp_path / "books" / "picture.png", ["no"])
    source, out = write(tmp_path / "books" / "deep" / "c.jsonl", random_documents(5)), tmp_path / "out"
    command = ["--out", out, "--shard-tokens", 1500, "--from", tmp_path / "books"]
    assert exit_code(script, *command) == 0
    found, times, wanted = meta(out), {f: f.stat().st_mtime_ns for f in out.iterdir()}, contents(out)
    told = dict(source="books", tokenizer="gpt2", vocab_size=50257, end_of_text=50256, dtype="uint16", complete=True)
    assert found.items() >= told.items() and [f["name"] for f in found["files"]] == ["a.TXT", "deep/c.jsonl"]
    assert [s["name"] for s in found["shards"]] == [f.name for f in shard_files(out)]
    for shard in found["shards"]:
        data, tokens = wanted[shard["name"]], np.load(out / shard["name"])
        assert tokens.dtype == np.uint16 and shard["tokens"] == len(tokens) and shard["bytes"] == len(data)
        assert shard["documents"] == (tokens == 50256).sum() and shard["sha256"] == hashlib.sha256(data).hexdigest()

    assert exit_code(script, *command) == 0 and "complete already" in capsys.readouterr().out
    for more, words in ((["--shard-tokens", 3000], "--shard-tokens 1500, not 3000"),
                        (["--val-tokens", 9], "--val-tokens default, not 9"),
                        (["--tokenizer", "bytes"], "--tokenizer gpt2, not bytes"),
                        (["--from", source], "source books, not c.jsonl")):  # fmt: skip
        refused(capsys, [words, "--out"], *command, *more)
    for changed in (random_documents(6), random_documents(5)[::-1], random_documents(5)[:-1]):  # the second: same size
        write(source, changed)
        refused(capsys, ["c.jsonl", "delete"], *command)
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == times

    write(source, random_documents(5))
    flipped = wanted["text_train_000002.npy"][:-1] + b"\xee"
    for name, spoil in (("text_train_000002.npy", lambda f: f.write_bytes(flipped)),
                        ("text_val_000000.npy", lambda f: f.write_bytes(b"")),
                        (shard_files(out)[-1].name, Path.unlink)):  # fmt: skip
        spoil(out / name)
        assert exit_code(script, *command) == 0 and contents(out) == wanted
        assert f"{name} is missing or damaged" in capsys.readouterr().out


def test_a_folder_with_other_shards_is_refused(inline, tmp_path, capsys):
    command = ["--from", write(tmp_path / "c.txt", ["x"] * 50), "--out"]
    strange = write_shard(tmp_path / "mine_train_000001.npy", np.zeros(9))
    refused(capsys, [strange.name, "another --out"], *command, tmp_path)
    raw(tmp_path / "meta.json", b'{"format": 1, "shards": []}')
    refused(capsys, ["meta.json", "another --out"], *command, tmp_path)
    refused(capsys, [strange.name], *command, strange)
    assert sorted(os.listdir(tmp_path)) == ["c.txt", "meta.json", strange.name]


def lines_with(path: Path, bad: str) -> Path:
    """A file whose line 61 is bad, and some empty ones before."""
    good = [json.dumps({"text": f"number {i}"}) + "\n" * (1 + i % 2) for i in range(40)]
    return raw(path / "c.jsonl.gz", gzip.compress("".join([*good, bad, "\n", good[0]]).encode()))


BAD_SOURCES = {
    "missing": (lambda p: p / "none.txt", "does not exist"),
    "unknown ending": (lambda p: raw(p / "c.pdf", b"%PDF"), ".parquet"),
    "empty folder": (lambda p: raw(p / "empty" / ".hidden.txt", b"x").parent, "holds no file"),
    "truncated gzip": (lambda p: raw(p / "c.txt.gz", gzip.compress(b"text")[:-9]), "c.txt.gz is damaged"),
    "no parquet": (lambda p: raw(p / "c.parquet", b"plain"), "c.parquet is damaged"),
    "no column": (lambda p: columns(p / "c.parquet", content=["a"]), "its columns are content"),
    "odd UTF-16": (lambda p: raw(p / "c.txt", "some text".encode("utf-16")[:-1]), "truncated"),
    "pipe": (lambda p: os.mkfifo(p / "c.txt") or p / "c.txt", "not an ordinary file"),
    "no strings": (lambda p: columns(p / "c.parquet", text=[1]), "int64, not strings"),
    "blank lines": (lambda p: raw(p / "c.txt", b"\n \n\n"), "0 tokens"),
    "too small": (lambda p: raw(p / "c.txt", b"x"), "2 tokens"),
    "no JSON": (lambda p: lines_with(p, '{"text": "a"'), "c.jsonl.gz, line 61 is not JSON"),
    "deep JSON": (lambda p: lines_with(p, "[" * 100_000), "c.jsonl.gz, line 61 is not JSON"),
    "a list": (lambda p: lines_with(p, '["text"]'), "c.jsonl.gz, line 61 is not an object"),
    "no text": (lambda p: lines_with(p, '{"txt": "a"}'), "c.jsonl.gz, line 61 is not an object"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SOURCES)
def test_a_bad_source_is_named(bad, inline, tmp_path, capsys, monkeypatch):
    small_blocks(monkeypatch, 300)
    make, word = BAD_SOURCES[bad]
    refused(capsys, [word], "--from", make(tmp_path), "--out", out := tmp_path / "out")
    assert not out.exists() or os.listdir(out) == ["meta.json"]  # which says that nothing is complete
    assert run(write(tmp_path / "good.txt", ["a good text"] * 3), out) == 0  # and is in nobody's way


CACHE = ["TIKTOKEN_CACHE_DIR", "no cache", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4", "--tokenizer bytes"]
NETWORK = ["http://127.0.0.1:9 cannot be reached", "HTTPS_PROXY", "--from"]


@pytest.mark.parametrize("missing, argv, words", [
    ("", "", ["--pretokenized"]), ("", "--pretokenized 0", ["from 1 to 99"]),
    ("", "--pretokenized x", ["whole number"]), ("", "--pretokenized 1 --workers 2", ["--workers"]),
    ("", "--tokenize --from x", ["not allowed with"]), ("", "--tokenizer gpt9", ["gpt9"]),
    ("", "--from ~no.such.user/x", ["no such user"]), ("", "--from c.txt --workers 61", ["--workers"]),
    ("", "--tokenize --shard-tokens 9 --val-tokens 10", ["--val-tokens 10"]),
    ("", "--pretokenized 3", NETWORK), ("", "--tokenize --tokenizer bytes", NETWORK), ("", "--from c.txt", CACHE),
    ("huggingface_hub", "--pretokenized 1", ["pip install huggingface-hub"]),
    ("pyarrow", "--tokenize --tokenizer bytes", ["pip install pyarrow"]),
    ("tiktoken", "--tokenize", ["pip install tiktoken"])])  # fmt: skip
def test_what_cannot_work_is_one_line_at_once(missing, argv, words, tmp_path, capsys, monkeypatch):
    """A command that makes no sense, no network, no vocabulary, or a package that is missing."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.txt", ["x"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "no cache")
    monkeypatch.setattr(shards, "reachable", lambda url: False)  # the vocabulary
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setattr(script, "need_hub", lambda what: None)
    refused(capsys, words, *argv.split(), "--out", "out")
    assert os.listdir() == ["c.txt"]


def test_a_network_that_does_not_answer_is_not_waited_for_and_a_proxy_is_asked_instead(monkeypatch):
    asked = []
    monkeypatch.setattr(shards.urllib.request, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(shards.socket, "create_connection",
                        lambda place, _: asked.append(place) or contextlib.nullcontext())  # fmt: skip
    for proxy, place in {"http://gate:3128": ("gate", 3128), "gate:3128": ("gate", 3128), "gate": ("gate", 80)}.items():
        monkeypatch.setattr(shards.urllib.request, "getproxies", lambda proxy=proxy: {"https": proxy})
        assert shards.reachable("https://example.org") and asked.pop() == place
    monkeypatch.setattr(shards.urllib.request, "getproxies", lambda: {"https": "gate:x"})
    with pytest.raises(UserError, match="gate:x"):
        shards.reachable("https://example.org")
    monkeypatch.setattr(shards.urllib.request, "getproxies", dict)
    monkeypatch.setattr(shards.socket, "create_connection", lambda *_: time.sleep(9) or contextlib.nullcontext())
    began = time.monotonic()
    assert not shards.reachable("https://example.org") and 1 < time.monotonic() - began < 8


class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses of the hub that are asked: a data set's commit, a folder's listing, a file."""

    def do_GET(self):
        hub, headers = self.server, {}
        asked = re.search(r"/(tree|resolve)/(\w{40})/?([^?]*)", unquote(self.path))
        kind, commit, name = asked.groups() if asked else ("commit", "", "")
        if kind == "commit":
            data = json.dumps({"id": "x/y", "sha": hub.commit}).encode()
        elif kind == "tree":
            found = [self.entry(n, d) for n, d in hub.files[commit].items() if os.path.dirname(n) == name]
            data = json.dumps(found).encode()
        else:
            data = hub.files[commit][name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            hub.served += [name] * (self.command == "GET")
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data if self.command == "GET" else b"")

    do_HEAD = do_GET

    def entry(self, name: str, data: bytes) -> dict:
        told = self.server.listed.get(name, hashlib.sha256(data).hexdigest())
        lfs = {"oid": told, "size": len(data), "pointerSize": 1}
        return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with the commit now, files by commit and name, checksums that it tells wrongly, and what it served."""
    pytest.importorskip("huggingface_hub")
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.commit, server.files, server.listed, server.served = "a" * 40, {}, {}, []
        for name, value in (("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}"), ("HF_HUB_OFFLINE", "0"),
                            ("NO_PROXY", "127.0.0.1"), ("HF_HOME", str(tmp_path / "hf")),
                            ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):  # fmt: skip
            monkeypatch.setenv(name, value)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def test_ready_shards_are_fetched_checked_and_not_fetched_again(hub, tmp_path, capsys, monkeypatch):
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in (1, 2, 3))]
    made = [write_shard(tmp_path / name, [50256, i, 50256, 7]).read_bytes() for i, name in enumerate(names)]
    hub.files = {"a" * 40: dict(zip(names, made, strict=True)) | {"README.md": b"hello"}, "b" * 40: {}}
    out = tmp_path / "out"

    def run(count):
        """The exit code, what is printed, and what was fetched."""
        hub.served.clear()
        code = exit_code(script, "--pretokenized", count, "--out", out)
        return code, "".join(capsys.readouterr()), hub.served

    hub.listed[names[2]] = hashlib.sha256(b"other").hexdigest()  # arrives damaged
    code, said, _ = run(2)
    assert code == 2 and all(word in said for word in (names[2], "checksum", "fetches it again"))
    assert not (out / names[2]).exists() and not meta(out)["complete"]
    hub.listed.clear()
    hub.commit = "b" * 40  # the data set moves on; what was begun does not
    code, _, served = run(2)
    assert code == 0 and served == [names[2]]
    found = meta(out)
    assert (found["complete"], found["revision"], found["vocab_size"]) == (True, "a" * 40, 50257)
    assert {s["name"]: (s["split"], s["tokens"], s["documents"], s["bytes"]) for s in found["shards"]} == {
        name: ("val" if "val" in name else "train", 4, 2, 1032) for name in names[:3]}  # fmt: skip
    for i, spoil in ((0, lambda f: f.write_bytes(b"damaged")), (2, Path.unlink)):  # the latter: listed, not asked for
        spoil(out / names[i])
        code, _, served = run(1)
        assert code == 0 and served == [names[i]]
    code, said, _ = run(4)
    assert code == 2 and "3 training shards" in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(2)[1].startswith(f"{out} is complete already: 1 validation and 2 training shards")


def test_fineweb_is_fetched_and_tokenised_and_its_revision_kept(hub, inline, tmp_path, capsys, monkeypatch):
    documents = [["the first", "the second " * 30, EOT] * 20, ["another file"] * 40]
    names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(2)]
    good = [write(tmp_path / f"{i}.parquet", d).read_bytes() for i, d in enumerate(documents)]
    hub.files["a" * 40] = {names[0]: good[0], names[1]: b"PAR1 damaged"}
    out, command = tmp_path / "out", ("--tokenize", "--tokenizer", "bytes", "--shard-tokens", 1500, "--out")
    assert exit_code(script, *command, out) == 2
    said = capsys.readouterr()
    assert "001_00000.parquet is damaged" in said.err and "edufineweb_val_000000.npy" in said.out  # read ahead
    cached = (tmp_path / "hf").rglob("*")
    next(f for f in cached if f.is_file() and f.read_bytes() == b"PAR1 damaged").write_bytes(good[1])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # everything is here
    assert exit_code(script, *command, out) == 0 and "going on behind" in capsys.readouterr().out
    assert tokens_in(out) == [i for d in sum(documents, []) for i in (256, *d.encode())]
    assert meta(out)["revision"] == "a" * 40
    assert [np.load(f).size for f in shard_files(out)][:3] == [1500] * 3  # the first one for validation
