"""Writes token shards for `train.py --dataset fineweb`: ready-made ones, FineWeb-Edu tokenised here, or your own text.

    python data/prepare.py --pretokenized 10                   # fetch 1 validation and 10 training shards, 2.2 GB
    python data/prepare.py --tokenize                          # fetch FineWeb-Edu sample-10BT, 28.5 GB, tokenise it
    python data/prepare.py --from my_texts --out data/mine     # your own .txt, .jsonl(.gz) or .parquet files
    python data/prepare.py --from my.txt --tokenizer bytes --out data/mine     # the same without any download

A shard is written under a temporary name, renamed when it is whole, and entered in meta.json. Stop the script at any
moment and give the same command again: it goes on behind the last whole shard, and every file comes out the same to
the byte. Run again on a finished folder, it checks every checksum. Formats, sizes, counts: data/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
READY = "kjj0/finewebedu10B-gpt2"  # FineWeb-Edu in GPT-2 tokens: 1 + 99 .bin files of 100M tokens
RAW, RAW_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"  # 14 parquet files
VOCABULARY = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"  # the ids of "gpt2" in one file
KINDS = {".txt": "text", ".txt.gz": "text", ".md": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "rows"}

SHARD_TOKENS = 100_000_000
SHARD_KEYS = {"name", "split", "tokens", "documents", "bytes", "sha256"}  # of a shard in meta.json
BLOCK = 1 << 20  # bytes of text that travel to a worker at once; a document of plain text that is longer is cut
ROWS = 128  # the same for parquet
LONGEST = 1 << 18  # characters in one call of tiktoken, which fails on a million spaces in a row
PATIENCE = 1.5  # seconds to wait for a first sign of the network

EOT = "<|endoftext|>"
BOM = b"\xef\xbb\xbf"
BLANK_LINES = re.compile(rb"\r?\n[ \t\r\x0b\x0c\n]*\n")  # between two documents of a plain text
LEADING_LINES = re.compile(rb"(?:[ \t\r\x0b\x0c]*\n)*")


class PrepareError(Exception):
    """What is wrong, in which file or flag, and what to do about it, in one line."""


class BadLine(Exception):
    """A line of a .jsonl file that cannot be used: (its number within the block, from 0; what is wrong)."""


class Position(NamedTuple):
    """A place in the stream of tokens."""

    file: int = 0  # number of the source file
    at: int = 0  # where a document begins in it: byte of the uncompressed stream, or row
    inside: bool = False  # or where a long document of plain text goes on
    skip: int = 0  # tokens behind that place


class Block(NamedTuple):
    """Some text of one source file, on its way to a worker."""

    file: int
    at: int
    inside: bool
    kind: str
    data: Any  # bytes, or a list with the bytes of each row
    read: int  # bytes of all source files up to its end, for the progress bar


class Encoded(NamedTuple):
    """What a worker makes of a block."""

    tokens: np.ndarray  # uint16
    documents: np.ndarray  # int64: where each document that begins in the block does so, relative to the block's `at`
    empty: int  # documents left out
    repaired: int  # documents with bytes that are not UTF-8


# == NETWORK ==========================================================================================================


def reachable(url: str) -> bool:
    """Whether the host of `url`, or the proxy in front of it, takes a connection within PATIENCE seconds."""
    place = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(place.hostname) else urllib.request.getproxies().get(place.scheme)
    place = urlsplit(proxy) if proxy else place
    address = place.hostname, place.port or (80 if place.scheme == "http" else 443)
    answered = []

    def knock() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, PATIENCE):
            answered.append(True)

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def need_hub(what: str) -> None:
    """Raises PrepareError where the hub cannot be reached: its library would retry for 23 seconds."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise PrepareError(f"{what} has to be fetched, but HF_HUB_OFFLINE is set: unset it")
    if not reachable(address):
        raise PrepareError(f"{what} has to be fetched, but {address} cannot be reached: connect, or set HTTPS_PROXY or "
                           "HF_ENDPOINT (a mirror), or copy the shards from another machine, or --from your own text")


def hub():
    """The huggingface_hub package."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise PrepareError(f"fetching needs huggingface-hub ({error}): pip install huggingface-hub") from None
    return huggingface_hub


def hub_files(repo: str, folder: str | None, ending: str, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The commit a data set stands at and the files of one folder: name, bytes, sha256 (None where not known)."""
    need_hub(repo)
    try:
        api = hub().HfApi()
        revision = revision or api.repo_info(repo, repo_type="dataset", expand=["sha"], timeout=30).sha
        entries = list(api.list_repo_tree(repo, folder, revision=revision, repo_type="dataset"))
    except PrepareError:
        raise
    except Exception as error:  # every layer of the network has its own
        raise PrepareError(f"cannot list the files of {repo} ({reason(error)}); try again later") from None
    files = [{"name": e.path, "bytes": e.size, "sha256": e.lfs.sha256 if e.lfs else None}
             for e in entries if e.path.endswith(ending)]  # fmt: skip
    return revision, sorted(files, key=lambda f: f["name"])


def fetch(repo: str, name: str, revision: str, folder: Path | None = None) -> Path:
    """A file of a data set: in `folder`, or in the hub's own cache; what broke off is continued."""
    library = hub()
    if folder is None:
        cached = library.try_to_load_from_cache(repo, name, repo_type="dataset", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    need_hub(f"{repo}/{name}")
    try:
        return Path(library.hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:
        raise PrepareError(f"cannot fetch {name} of {repo} ({reason(error)}); the same command goes on") from None


def reason(error: BaseException) -> str:
    """The first line of an error, for a message of ours; its kind where it says nothing."""
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__


# == TOKENIZER ========================================================================================================


def load_tokenizer(name: str):
    """A `tiktoken.Encoding`: "gpt2" (50,257 ids), or "bytes" (256 and end-of-text), which needs no download.

    Raises PrepareError where tiktoken, or GPT-2's vocabulary, is neither here nor to be had.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise PrepareError(f"tokenising needs tiktoken, which does not load ({error}): pip install tiktoken") from None
    if name == "bytes":
        single = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=single, special_tokens={EOT: 256})
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    file = hashlib.sha1(VOCABULARY.encode()).hexdigest()
    if not os.path.exists(os.path.join(folder, file)) and not reachable(VOCABULARY):
        raise PrepareError(f"GPT-2's vocabulary is not in tiktoken's cache ({folder or 'switched off'}), and "
                           f"{urlsplit(VOCABULARY).hostname} cannot be reached: connect, or set TIKTOKEN_CACHE_DIR to "
                           f"a folder that holds {file} (see data/README.md), or take --tokenizer bytes")
    try:
        return tiktoken.get_encoding("r50k_base")
    except Exception as error:  # of the download, or of a cache that cannot be written
        raise PrepareError(f"cannot load GPT-2's vocabulary from {folder or VOCABULARY} ({reason(error)})") from None


# == WORKER ===========================================================================================================


def start_worker(tokenizer: str) -> None:
    """In a worker: load the tokenizer, leave Ctrl-C to the main process, and go when that one is gone."""
    global ENCODING

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    ENCODING = load_tokenizer(tokenizer)


def encode_block(kind: str, data: Any, at: int, inside: bool) -> Encoded:
    """The tokens of a block: end-of-text, then the document, for each of its documents; `inside`, the first goes on.

    Raises BadLine. Documents go to tiktoken together, with end-of-text between them, which gives the same ids as one by
    one; those that hold the text of that token, or are long, go alone.
    """
    pieces, together, places, empty, repaired = [], [], [], 0, 0

    def flush() -> None:
        if together:
            pieces.append(token_ids(EOT + EOT.join(together), {EOT}))
            together.clear()

    for number, (offset, text, whole) in enumerate(SPLIT[kind](data, at, inside)):
        begins = number > 0 or not inside
        if begins and not text.strip():
            empty += 1
            continue
        repaired += not whole
        if begins:
            places.append(offset)
        if begins and len(text) <= LONGEST and EOT not in text:
            together.append(text)
            continue
        flush()
        pieces += [token_ids(EOT, {EOT})] * begins + [token_ids(part) for part in parts(text)]
    flush()
    tokens = np.concatenate(pieces).astype(np.uint16) if pieces else np.empty(0, np.uint16)
    return Encoded(tokens, np.array(places, np.int64), empty, repaired)


def token_ids(text: str, special: set[str] = frozenset()) -> np.ndarray:
    """The ids of a text, in which only the `special` strings are special."""
    try:
        return ENCODING.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return ENCODING.encode_to_numpy(text, allowed_special=special, disallowed_special=())


def parts(text: str) -> Iterator[str]:
    """A text in parts of at most LONGEST characters."""
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= LONGEST else cut(text, start, start + LONGEST)
        yield text[start:end]
        start = end


def cut(text: str, start: int, end: int) -> int:
    """Where to cut between `start` and `end`: before the last white space, where no token of GPT-2 ever reaches across.

    Where there is none, at `end`: there the ids may differ from those of the whole text.
    """
    at = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
    while at > start and text[at - 1].isspace():
        at -= 1
    return at if at > start else end


def decode(raw: bytes) -> tuple[str, bool]:
    """A text and whether it was UTF-8; what is not becomes U+FFFD."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), False


def split_text(data: bytes, at: int, inside: bool) -> Iterator[tuple[int, str, bool]]:
    """(offset, text, whether it was UTF-8) of the documents of a plain text, which blank lines separate."""

    def document(start: int, end: int) -> tuple[int, str, bool]:
        text, whole = decode(data[start:end].removeprefix(BOM if at + start == 0 else b""))
        return start, text.replace("\r\n", "\n"), whole

    start = 0 if inside else LEADING_LINES.match(data).end()
    for gap in BLANK_LINES.finditer(data, start):
        yield document(start, gap.start())
        start = gap.end()
    if start < len(data):
        yield document(start, len(data))


def split_lines(data: bytes, at: int, inside: bool) -> Iterator[tuple[int, str, bool]]:
    """The same for lines of .jsonl: what each has under "text". Raises BadLine."""
    offset = 0
    for number, line in enumerate(data.split(b"\n")):
        if line.strip():
            text, whole = decode(line.removeprefix(BOM if at + offset == 0 else b""))
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadLine(number, f"is not JSON ({reason(error)})") from None
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise BadLine(number, 'is not an object with a string under "text"')
            yield offset, value["text"], whole
        offset += len(line) + 1


def split_rows(data: list[bytes | None], at: int, inside: bool) -> Iterator[tuple[int, str, bool]]:
    """The same for rows of parquet."""
    return ((i, *decode(raw or b"")) for i, raw in enumerate(data))


SPLIT = {"text": split_text, "json": split_lines, "rows": split_rows}


# == SOURCES ==========================================================================================================


def local_files(source: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the files below it that can be read, in the order of their names, each with name, bytes and start.

    `start` is a checksum of the first mebibyte. Raises PrepareError where there is none.
    """
    endings = ", ".join(KINDS)
    if not source.exists():
        raise PrepareError(f"{source} does not exist: --from takes a file ({endings}) or a folder of such files")
    root, found = source, [source]
    if source.is_dir():
        names = [f.relative_to(source) for f in source.rglob("*") if f.is_file() and kind_of(f.name)]
        found = [source / n for n in names if not any(part.startswith(".") for part in n.parts)]
    elif kind_of(source.name):
        root = source.parent
    else:
        raise PrepareError(f"{source} is of no known kind: --from reads {endings}; give a plain text the ending .txt")
    if not found:
        raise PrepareError(f"{source} holds no file that --from reads: {endings}")
    files = []
    for path in sorted(found, key=lambda f: f.relative_to(root).as_posix()):
        with open(path, "rb") as file:
            start = zlib.crc32(file.read(1 << 20))
        files.append({"name": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "start": f"{start:08x}"})
    return root, files


def kind_of(name: str) -> str | None:
    """How a file is read, by the ending of its name; None if it is not."""
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), None)


def read_blocks(path: Path, at: int, inside: bool) -> Iterator[tuple[int, bool, Any, float]]:
    """(at, inside, data, share of the file read) of the blocks of a file from a place on."""
    kind, size = kind_of(path.name), max(1, path.stat().st_size)
    if kind == "rows":
        yield from row_blocks(path, at)
        return
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise PrepareError(f"{path} is UTF-16: save it as UTF-8")
        stream.seek(at)
        for place, goes_on, data in (text_blocks if kind == "text" else line_blocks)(stream, at, inside):
            yield place, goes_on, data, raw.tell() / size


def text_blocks(stream: Any, at: int, inside: bool) -> Iterator[tuple[int, bool, bytes]]:
    """Blocks of a plain text that end where a document does.

    Only a document longer than BLOCK is cut, and then begins a block: where it is cut depends on its own bytes alone.
    """
    data = b""
    while True:
        data += stream.read(BLOCK - len(data))
        if len(data) < BLOCK:  # the end of the file, which ends a document as blank lines do
            if data:
                yield at, inside, data + b"\n\n"
            return
        end, goes_on = last_blank_line(data, inside), False
        if not end:  # surrogateescape gives every byte back; a character that the block cuts is among the last three
            text = data.decode("utf-8", "surrogateescape")
            end, goes_on = len(text[: cut(text, 0, len(text) - 3)].encode("utf-8", "surrogateescape")), True
        yield at, inside, data[:end]
        at, inside, data = at + end, goes_on, data[end:]


def last_blank_line(data: bytes, inside: bool) -> int:
    """The end of the last line of `data` that is blank, or 0; `inside`, what comes first is no whole line."""
    end = data.rfind(b"\n")
    while end >= 0:
        before = data.rfind(b"\n", 0, end)
        if not data[before + 1 : end].strip() and not (before < 0 and inside):
            return end + 1
        end = before
    return 0


def line_blocks(stream: Any, at: int, inside: bool) -> Iterator[tuple[int, bool, bytes]]:
    """Blocks of whole lines."""
    while data := stream.read(BLOCK):
        if not data.endswith(b"\n"):
            data += stream.readline()
        yield at, inside, data
        at += len(data)


def row_blocks(path: Path, row: int) -> Iterator[tuple[int, bool, list[bytes | None], float]]:
    """Blocks of rows of the column `text`; row groups before `row` are not read."""
    pyarrow, parquet = arrow()
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if kinds.get("text") not in (pyarrow.string(), pyarrow.large_string()):
            raise PrepareError(f"{path} has no column of strings named text; its columns are {', '.join(kinds)}")
        at, rows = 0, max(1, file.metadata.num_rows)
        for group in range(file.num_row_groups):
            behind = at + file.metadata.row_group(group).num_rows
            if behind <= row:
                at = behind
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=["text"]):
                texts, at = batch.column(0).cast(pyarrow.large_binary()).to_pylist(), at + len(batch)
                if at > row:
                    first = max(row, at - len(texts))
                    yield first, False, texts[first - at :], at / rows


def arrow():
    """The packages pyarrow and pyarrow.parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PrepareError(f"reading parquet needs pyarrow ({error}): pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def all_blocks(files: list[dict], locate: Callable[[str], Path], start: Position) -> Iterator[Block]:
    """The blocks of all files from a position on. Raises PrepareError naming a file that is damaged."""
    read = sum(f["bytes"] for f in files[: start.file])
    for number in range(start.file, len(files)):
        path, size = locate(files[number]["name"]), files[number]["bytes"]
        place = (start.at, start.inside) if number == start.file else (0, False)
        try:
            for at, inside, data, share in read_blocks(path, *place):
                yield Block(number, at, inside, kind_of(path.name), data, read + int(share * size))
        except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are ValueError or OSError
            what = f"{path} is damaged or cannot be read ({reason(error)})"
            raise PrepareError(f"{what}: repair it or fetch it again") from None
        read += size


def line_number(path: Path, at: int) -> int:
    """The number, from 1, of the line that begins at a byte of the uncompressed stream."""
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as stream:
        lines = 1
        while at > 0 and (data := stream.read(min(BLOCK, at))):
            lines, at = lines + data.count(b"\n"), at - len(data)
    return lines


# == SHARDS ===========================================================================================================


@contextlib.contextmanager
def replacing(path: Path):
    """Write to a temporary name beside `path`; on leaving, flush to disk and rename, so that `path` is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # as train.replacing does: to import it costs a second and torch
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """meta.json, never seen half-written."""
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json says, None where nothing is begun. Raises PrepareError where it is damaged, or shards lack it."""
    path = folder / "meta.json"
    if not path.exists():
        stray = next((f for f in sorted(folder.glob("*")) if f.suffix in (".npy", ".bin")), None)
        if stray:
            raise PrepareError(f"{stray} is there but {path.name} is not, so those shards are not of this script: "
                               "give another --out, or move them away")  # fmt: skip
        return None
    try:
        meta = json.loads(path.read_bytes())
        keys = new_meta("", None, None, "gpt2", shard_tokens=None, val_tokens=None).keys()
        if meta["format"] != 1 or not keys <= meta.keys() or not all(SHARD_KEYS <= s.keys() for s in meta["shards"]):
            raise ValueError("of another format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path} is not what this script writes ({reason(error)})"
        raise PrepareError(f"{what}: give another --out, or delete it and the shards beside it") from None
    return meta if meta["shards"] else None


def same_job(folder: Path, meta: dict[str, Any], job: dict[str, Any]) -> None:
    """Raises PrepareError where the folder was begun with another source or other settings."""
    for key in ("source", "tokenizer", "shard_tokens", "val_tokens"):
        if meta[key] != job[key]:
            what = "source" if key == "source" else "--" + key.replace("_", "-")
            was, now = ("default" if value is None else value for value in (meta[key], job[key]))
            raise PrepareError(f"{folder} was begun with {what} {was}, not {now}: give the same, or another --out")


def sha256(path: Path) -> str:
    """The checksum of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()


def whole(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is there as meta.json describes it; says so where it is not."""
    path = folder / shard["name"]
    if path.is_file() and path.stat().st_size == shard["bytes"] and sha256(path) == shard["sha256"]:
        return True
    tqdm.write(f"{path} is missing or damaged: it is made again")
    return False


def checking(shards: list[dict[str, Any]]) -> tqdm:
    """The same shards, with a progress bar: a hundred of them are 20 GB to read."""
    return tqdm(shards, desc="checking", unit="shard", leave=False, disable=None)


def new_meta(source: str, revision: str | None, files: list | None, tokenizer: str, **sizes: int | None) -> dict:
    """meta.json as it begins (data/README.md describes it)."""
    vocab = 257 if tokenizer == "bytes" else 50257
    return {"format": 1, "source": source, "revision": revision, "files": files, "tokenizer": tokenizer,
            "vocab_size": vocab, "end_of_text": vocab - 1, "dtype": "uint16", **sizes, "complete": False, "shards": []}


class Shards:
    """Takes tokens and writes them as shards: the first `val_tokens` for validation, then `shard_tokens` at a time.

    Until the first training shard is full both are held back, so that a corpus that ends before can be split anew:
    in a tenth and nine tenths, unless --val-tokens was given and leaves something to train on.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], prefix: str, val_tokens: int):
        self.folder, self.meta, self.prefix = folder, meta, prefix
        self.val, self.size = val_tokens, meta["shard_tokens"]
        self.buffer = np.empty(self.size + (0 if meta["shards"] else self.val), np.uint16)
        self.filled, self.behind_val = 0, None

    def add(self, tokens: np.ndarray, place: Callable[[int], Position]) -> None:
        """Take tokens; `place(n)` is the position behind the first n of them."""
        done = 0
        while done < len(tokens):
            end = self.next_cut()
            n = min(end - self.filled, len(tokens) - done)
            self.buffer[self.filled : self.filled + n] = tokens[done : done + n]
            self.filled, done = self.filled + n, done + n
            if self.filled == end:
                self.cut(place(done))

    def next_cut(self) -> int:
        """How many tokens the buffer holds when the next shard is full."""
        if self.meta["shards"]:
            return self.size
        return self.val if self.filled < self.val else self.val + self.size

    def cut(self, behind: Position) -> None:
        """A shard is full: write it, or keep in mind where it ends, as long as it is held back."""
        tokens = self.buffer[: self.filled]
        if not self.meta["shards"]:
            if self.filled == self.val:
                self.behind_val = behind
                return
            self.write("val", tokens[: self.val], self.behind_val)
            tokens = tokens[self.val :]
        self.write("train", tokens, behind)
        self.filled = 0

    def finish(self) -> None:
        """The last shard; of a small corpus, both. Raises PrepareError where there is too little for two."""
        tokens = self.buffer[: self.filled]
        if not self.meta["shards"]:
            asked, tenth = self.meta["val_tokens"], min(self.val, len(tokens) // 10)
            val = asked if asked and asked < len(tokens) else tenth
            if not val:
                raise PrepareError(f"{self.meta['source']} holds {len(tokens)} tokens: too few to train and validate")
            if asked and val != asked:
                print(f"note: of {len(tokens):,} tokens a tenth is for validation, not --val-tokens {asked:,}")
            self.write("val", tokens[:val], None)
            tokens = tokens[val:]
        if len(tokens):
            self.write("train", tokens, None)
        self.meta["complete"] = True
        write_meta(self.folder, self.meta)

    def write(self, split: str, tokens: np.ndarray, behind: Position | None) -> None:
        """One shard, then its entry."""
        path = self.folder / f"{self.prefix}_{split}_{len(self.meta['shards']):06d}.npy"
        with replacing(path) as file:
            np.save(file, tokens)
        documents = int(np.count_nonzero(tokens == self.meta["end_of_text"]))
        self.meta["shards"].append({"name": path.name, "split": split, "tokens": len(tokens), "documents": documents,
                                    "bytes": path.stat().st_size, "sha256": sha256(path),
                                    "next": behind and behind._asdict()})  # fmt: skip
        write_meta(self.folder, self.meta)
        tqdm.write(f"{path.name}  {len(tokens):,} tokens, {documents:,} documents begin in it")


# == TOKENISE =========================================================================================================


@contextlib.contextmanager
def worker_pool(count: int, tokenizer: str):
    """Processes with the tokenizer loaded. They are spawned on every system, so they are the same on every system."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=start_worker, initargs=(tokenizer,))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for the main process
    try:
        for _ in range(count):
            pool.submit(int)  # starts one
        signal.signal(signal.SIGINT, before)
        yield pool
    except BrokenProcessPool:
        raise PrepareError("a worker process died, perhaps for want of memory: try again, fewer --workers") from None
    finally:
        signal.signal(signal.SIGINT, before)
        pool.shutdown(cancel_futures=True)


def encode_in_order(pool: ProcessPoolExecutor, blocks: Iterator[Block], ahead: int) -> Iterator[tuple[Block, Any]]:
    """(block, future of its Encoded), with at most `ahead` blocks on their way."""
    waiting: deque = deque()
    for block in blocks:
        waiting.append((block, pool.submit(encode_block, block.kind, block.data, block.at, block.inside)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def position_behind(block: Block, encoded: Encoded, end_of_text: int, known: int, more: int) -> Position:
    """The position behind the first known + more tokens of a block."""
    n = known + more
    starts = np.flatnonzero(encoded.tokens == end_of_text)  # one a document: text never makes this id
    document = int(np.searchsorted(starts, n, side="right")) - 1
    if document < 0:
        return Position(block.file, block.at, block.inside, n)
    return Position(block.file, block.at + int(encoded.documents[document]), False, n - int(starts[document]))


def tokenize(shards: Shards, locate: Callable[[str], Path], start: Position, workers: int) -> None:
    """Tokenise the source files from a position on, all of them, into shards."""
    files, name, eot = shards.meta["files"], shards.meta["tokenizer"], shards.meta["end_of_text"]
    total, skip, empty, repaired = sum(f["bytes"] for f in files), start.skip, 0, 0
    with worker_pool(max(1, min(workers, total // BLOCK + 1)), name) as pool, \
            tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:  # fmt: skip
        for block, future in encode_in_order(pool, all_blocks(files, locate, start), 2 * workers + 2):
            try:
                encoded = future.result()
            except BadLine as error:
                path = locate(files[block.file]["name"])
                line = line_number(path, block.at) + error.args[0]
                raise PrepareError(f"{path}, line {line} {error.args[1]}: repair or remove that line") from None
            known = min(skip, len(encoded.tokens))  # in a shard already
            skip -= known
            place = functools.partial(position_behind, block, encoded, eot, known)
            shards.add(encoded.tokens[known:], place)
            empty, repaired = empty + encoded.empty, repaired + encoded.repaired
            bar.update(block.read - bar.n)
    shards.finish()
    if empty:
        print(f"note: {empty:,} documents without any text were left out")
    if repaired:
        print(f"note: {repaired:,} documents were not UTF-8 throughout; what was not is U+FFFD now")


def prepare_text(out: Path, job: dict, locate: Callable[[str], Path], prefix: str, val: int, workers: int) -> None:
    """Begin the shards of `job` in `out`, or go on with them, or find them complete."""
    meta, start = read_meta(out) or job, Position()
    same_job(out, meta, job)
    complete, known = meta["complete"], len(meta["shards"])
    with checking(meta["shards"]) as listed:
        shards = list(itertools.takewhile(lambda shard: whole(out, shard), listed))
    if len(shards) < known or not complete:
        complete = False
        place = shards[-1]["next"] if shards else Position()._asdict()
        shards, start = (shards, Position(**place)) if place else ([], Position())
    used = len(job["files"]) if complete else start.file + 1 if shards else 0
    for was, now in itertools.zip_longest(meta["files"][:used], job["files"][:used]):
        if was != now:
            raise PrepareError(f"{(was or now)['name']} is not the file that the shards in {out} were begun with: "
                               "give another --out, or delete those shards and their meta.json")  # fmt: skip
    if not complete:
        load_tokenizer(job["tokenizer"])  # before anything is written
        meta = job | {"shards": shards}
        out.mkdir(parents=True, exist_ok=True)
        write_meta(out, meta)
        if shards:
            print(f"going on behind {shards[-1]['name']}")
        tokenize(Shards(out, meta, prefix, val), locate, start, workers)
    summary(out, meta, "complete already" if complete else "complete")


def summary(out: Path, meta: dict[str, Any], state: str) -> None:
    """One line on what is in a folder."""
    train = [s for s in meta["shards"] if s["split"] == "train"]
    tokens = sum(s["tokens"] for s in meta["shards"])
    print(f"{out} is {state}: {len(meta['shards']) - len(train)} validation and {len(train)} training shards, "
          f"{tokens:,} tokens ({meta['tokenizer']})")


# == COMMANDS =========================================================================================================


def from_local(source: Path, out: Path, tokenizer: str, shard_tokens: int, val_tokens: int | None, workers: int):
    """--from: shards of a user's own files."""
    root, files = local_files(source)
    job = new_meta(source.resolve().name, None, files, tokenizer, shard_tokens=shard_tokens, val_tokens=val_tokens)
    prepare_text(out, job, lambda name: root / name, "text", val_tokens or max(1, shard_tokens // 10), workers)


def from_hub(out: Path, tokenizer: str, shard_tokens: int, val_tokens: int | None, workers: int):
    """--tokenize: shards of FineWeb-Edu, in the layout of build-nanogpt; the revision is that of the first call."""
    known = read_meta(out)
    if known and known["source"] == RAW:
        revision, files = known["revision"], known["files"]
    else:
        load_tokenizer(tokenizer)
        arrow()
        revision, files = hub_files(RAW, RAW_FOLDER, ".parquet", None)
    job = new_meta(RAW, revision, files, tokenizer, shard_tokens=shard_tokens, val_tokens=val_tokens)
    prepare_text(out, job, lambda name: fetch(RAW, name, revision), "edufineweb", val_tokens or shard_tokens, workers)


def from_ready(out: Path, count: int) -> None:
    """--pretokenized: the public shards, one for validation and `count` to train on."""
    job = new_meta(READY, None, None, "gpt2", shard_tokens=None, val_tokens=None)
    meta = read_meta(out) or job
    same_job(out, meta, job)
    names = {s["name"] for s in meta["shards"]}
    with checking(meta["shards"]) as listed:
        meta["shards"] = [s for s in listed if whole(out, s)]
    have, splits = {s["name"] for s in meta["shards"]}, [s["split"] for s in meta["shards"]]
    if "val" in splits and splits.count("train") >= count:
        summary(out, meta, "complete already")
        return
    meta["revision"], files = hub_files(READY, None, ".bin", meta["revision"])
    val, train = ([f for f in files if ("val" in f["name"]) == wanted] for wanted in (True, False))
    if count > len(train):
        raise PrepareError(f"--pretokenized {count}: {READY} has {len(train)} training shards")
    out.mkdir(parents=True, exist_ok=True)
    meta["complete"] = False
    for name in names - have:
        (out / name).unlink(missing_ok=True)  # the hub's library might take it as it is
    for file in val[:1] + train[:count]:
        if file["name"] not in have:
            write_meta(out, meta)
            meta["shards"] = sorted([*meta["shards"], ready_shard(out, file, meta)], key=lambda s: s["name"])
    meta["complete"] = True
    write_meta(out, meta)
    summary(out, meta, "complete")


def ready_shard(out: Path, file: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Fetch one public shard, check it and describe it for meta.json."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    from train import DataError, read_shard  # here, because importing torch takes a while

    path = fetch(READY, file["name"], meta["revision"], out)
    try:
        tokens, found = read_shard(path), sha256(path)
        if file["sha256"] not in (None, found):
            raise DataError(f"{path}: its checksum is not the hub's")
    except DataError as error:
        path.unlink()
        raise PrepareError(f"{reason(error)}; it was removed, the same command fetches it again") from None
    documents = int(np.count_nonzero(tokens == meta["end_of_text"]))
    print(f"{path.name}  {len(tokens):,} tokens, {documents:,} documents begin in it")
    return {"name": path.name, "split": "val" if "val" in path.name else "train", "tokens": len(tokens),
            "documents": documents, "bytes": path.stat().st_size, "sha256": found}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"prepare.py: {message} (see python data/prepare.py --help)\n")


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


positive.__name__ = "whole number"  # argparse shows it


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="prepare.py", allow_abbrev=False,
                    description="Write token shards for train.py --dataset fineweb. See data/README.md.")  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretokenized", type=positive, metavar="N",
                        help=f"fetch the validation shard and N (1 to 99) training shards of {READY}, 200 MB each")
    source.add_argument("--tokenize", action="store_true",
                        help="fetch FineWeb-Edu sample-10BT (14 parquet files, 28.5 GB) and tokenise it")
    source.add_argument("--from", dest="source", type=Path, metavar="FILE_OR_FOLDER",
                        help='tokenise your own files: .parquet (column "text"), .jsonl or .jsonl.gz (key "text"), or '
                             ".txt, .txt.gz, .md (documents separated by blank lines)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where to (default: the script's folder)")
    parser.add_argument("--shard-tokens", type=positive, metavar="N", help=f"tokens a shard ({SHARD_TOKENS:,})")
    parser.add_argument("--val-tokens", type=positive, metavar="N",
                        help="tokens of the validation shard, the first ones (default: of FineWeb-Edu one whole shard; "
                             "of your own files a tenth of a shard, or of a small corpus a tenth)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"),
                        help="gpt2: 50,257 ids, downloaded once; bytes: 257 ids, for small trials (default: gpt2)")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes that tokenise (default: one a core)")
    args = parser.parse_args(argv)
    given = [n for n in ("shard_tokens", "val_tokens", "tokenizer", "workers") if getattr(args, n) is not None]
    if args.pretokenized and given:
        parser.error(f"--{given[0].replace('_', '-')} has no meaning with --pretokenized")
    args.shard_tokens = args.shard_tokens or SHARD_TOKENS
    if (args.val_tokens or 0) > args.shard_tokens:
        parser.error(f"--val-tokens {args.val_tokens} is more than --shard-tokens {args.shard_tokens}: raise that one")
    return args


def cores() -> int:
    """The processors this process may use; 60 is what Windows can wait for."""
    return min(60, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the shards are complete, 2 after one line on stderr, 130 after Ctrl-C."""
    args = parse(argv)
    out = args.out.expanduser()
    how = (args.tokenizer or "gpt2", args.shard_tokens, args.val_tokens, args.workers or cores())
    try:
        if args.pretokenized:
            from_ready(out, args.pretokenized)
        elif args.tokenize:
            from_hub(out, *how)
        else:
            from_local(args.source.expanduser(), out, *how)
    except (PrepareError, OSError) as problem:
        print(f"prepare.py: {problem}", file=sys.stderr)
        return 2
    except MemoryError:
        print("prepare.py: out of memory: lower --shard-tokens (2 bytes each) or --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nprepare.py: stopped; what is in {out} is whole, and the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    sys.exit(main())
