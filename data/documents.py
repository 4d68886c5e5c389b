"""Reads documents out of text files, in blocks of bounded size that workers can tokenise by themselves.

Plain text, where blank lines separate documents, JSON lines, and parquet. Neither long white space nor the place where
a long document is cut changes a token. data/README.md describes the formats.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.files import UserError, files_below, package, reason

KINDS = {".txt": "text", ".txt.gz": "text", ".md": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "rows"}
BLOCK = 1 << 20  # bytes of text that travel to a worker at once; a document of plain text that is longer is cut
ROWS = 128  # the same for parquet
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")  # of its column text
LONGEST = 1 << 18  # characters of white space in one call of tiktoken, which fails on a million of them before a word

BOM = b"\xef\xbb\xbf"
GAP = re.compile(rb"\r?\n[ \t\r\x0b\x0c\n]*(?:\n|\Z)")  # blank lines, which separate the documents of a plain text
FIRST_GAP = re.compile(rb"(?s:.*?)\n[ \t\r\x0b\x0c]*\n")  # with all that comes before
LAST_GAP = re.compile(rb"(?s:.*)\n[ \t\r\x0b\x0c]*\n")
LEADING_LINES = re.compile(rb"(?:[ \t\r\x0b\x0c]*\n)*")
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s in tiktoken's patterns; Python has more
LETTER = re.compile(f"[^{WHITE}]")
LAST_EDGE = re.compile(f"(?s:.*)[^{WHITE}](?=[{WHITE}])")  # all before the last place that no token reaches across


class BadLine(Exception):
    """A line of a .jsonl file that cannot be used: (its number within the block, from 0; what is wrong)."""


class Position(NamedTuple):
    """A place in the stream of tokens."""

    file: int = 0  # number of the source file
    at: int = 0  # where a document begins in it: byte of the uncompressed text in UTF-8, or row
    inside: bool = False  # or where a long document of plain text goes on
    skip: int = 0  # tokens after that place


class Block(NamedTuple):
    """Some text of one source file, on its way to a worker."""

    file: int
    at: int
    inside: bool
    kind: str
    data: Any  # bytes, or a list with the text of each row
    read: int  # bytes of all source files up to its end, for the progress bar


# == FILES ============================================================================================================


def local_files(source: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the files below it that can be read, in the order of their names, each with name, bytes and start.

    `start` is a checksum of the first mebibyte. Raises UserError if there is no such file.
    """
    endings = ", ".join(KINDS)
    if not source.exists():
        raise UserError(f"{source} does not exist: --from takes a file ({endings}) or a folder of such files")
    if not source.is_dir() and not kind_of(source.name):
        raise UserError(f"{source} is of no known kind: --from reads {endings}; give a plain text the ending .txt")
    root, found = (source, files_below(source, kind_of)) if source.is_dir() else (source.parent, [source])
    if not found:
        raise UserError(f"{source} holds no file that --from reads: {endings}")
    files = []
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} is not an ordinary file: save what it gives as a file")
        with open(path, "rb") as file:
            start = zlib.crc32(file.read(1 << 20))
        files.append({"name": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "start": f"{start:08x}"})
    return root, files


def kind_of(name: str) -> str | None:
    """How a file is read, by the ending of its name; None if it is not."""
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), None)


class Recoded(io.RawIOBase):
    """A stream of text in some encoding, read as UTF-8."""

    def __init__(self, stream: Any, encoding: str):
        self.text, self.rest = io.TextIOWrapper(stream, encoding, newline=""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or self.text.read(BLOCK).encode()
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


@contextlib.contextmanager
def opened(path: Path, at: int) -> Iterator[tuple[Any, int, Callable[[], int]]]:
    """A text file from byte `at` of its text in UTF-8 on: the stream, where it stands, and how far the file is read.

    A byte order mark is left out, what is packed is unpacked, UTF-16 and UTF-32 become UTF-8.
    """
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else raw as stream:
        start = stream.read(4)
        stream.seek(0)
        if (encoding := json.detect_encoding(start)).startswith("utf-8"):
            at = max(at, len(BOM)) if start.startswith(BOM) else at
            stream.seek(at)
        else:
            stream, rest = io.BufferedReader(Recoded(stream, encoding), BLOCK), at
            while rest > 0 and (data := stream.read(min(BLOCK, rest))):
                rest -= len(data)
        yield stream, at, raw.tell


# == BLOCKS ===========================================================================================================


def read_blocks(path: Path, at: int, inside: bool) -> Iterator[tuple[int, bool, Any, float]]:
    """(at, inside, data, share of the file read) of the blocks of a file from a place on."""
    kind, size = kind_of(path.name), max(1, path.stat().st_size)
    if kind == "rows":
        yield from row_blocks(path, at)
        return
    with opened(path, at) as (stream, at, read):
        for place, goes_on, data in (text_blocks if kind == "text" else line_blocks)(stream, at, inside):
            yield place, goes_on, data, read() / size


def text_blocks(stream: Any, at: int, inside: bool) -> Iterator[tuple[int, bool, bytes]]:
    """Blocks of a plain text: from the begin of a document, or `inside` one, to a gap or to where white space begins.

    A document longer than BLOCK begins a block. It is cut at the last place within BLOCK bytes that no token reaches
    across, or within 2, 4, 8 ... times as many until there is one. Its own bytes alone say where, so that a run that
    was interrupted cuts it in the same places.
    """
    data, size = b"", BLOCK
    while True:
        data += stream.read(max(0, size - len(data)))
        if not inside and (blank := LEADING_LINES.match(data).end()):
            at, data, size = at + blank, data[blank:], BLOCK
            continue
        ended, head = len(data) < size, data[:size]
        gap = (LAST_GAP if size == BLOCK else FIRST_GAP).match(head)
        if ended and (size == BLOCK or not gap):
            if inside or data.strip():
                yield at, inside, data
            return
        if gap:
            end = gap.end()
        elif edge := LAST_EDGE.match(head.decode("utf-8", "surrogateescape")):  # which gives every byte back
            end = len(edge[0].encode("utf-8", "surrogateescape"))
        else:
            size *= 2
            continue
        yield at, inside, data[:end]
        at, inside, data, size = at + end, not gap, data[end:], BLOCK


def line_blocks(stream: Any, at: int, inside: bool) -> Iterator[tuple[int, bool, bytes]]:
    """Blocks of whole lines."""
    while data := stream.read(BLOCK):
        if not data.endswith(b"\n"):
            data += stream.readline()
        yield at, inside, data
        at += len(data)


def row_blocks(path: Path, row: int) -> Iterator[tuple[int, bool, list[bytes | None], float]]:
    """Blocks of rows of the column `text`; row groups before `row` are not read."""
    pyarrow = package("pyarrow", "pyarrow", "reading parquet")
    parquet = package("pyarrow.parquet", "pyarrow", "reading parquet")
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if "text" not in kinds:
            raise UserError(f"{path} has no column named text; its columns are {', '.join(kinds)}")
        kind = kinds["text"].value_type if pyarrow.types.is_dictionary(kinds["text"]) else kinds["text"]
        if str(kind) not in TEXT_TYPES:
            raise UserError(f"{path}: its column text holds {kind}, not strings")
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


def all_blocks(files: list[dict], locate: Callable[[str], Path], start: Position) -> Iterator[Block]:
    """The blocks of all files from a position on. Raises UserError naming a file that is damaged."""
    read = sum(f["bytes"] for f in files[: start.file])
    for number in range(start.file, len(files)):
        path, size = locate(files[number]["name"]), files[number]["bytes"]
        place = (start.at, start.inside) if number == start.file else (0, False)
        try:
            for at, inside, data, share in read_blocks(path, *place):
                yield Block(number, at, inside, kind_of(path.name), data, read + int(share * size))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # gzip, zlib and pyarrow raise many kinds for damaged files
            what = f"{path} is damaged or cannot be read ({reason(error)})"
            raise UserError(f"{what}: repair it or fetch it again") from None
        read += size


def line_number(path: Path, at: int) -> int:
    """The number, from 1, of the line that begins at a byte of the text."""
    with opened(path, 0) as (stream, begin, _):
        lines, rest = 1, at - begin
        while rest > 0 and (data := stream.read(min(BLOCK, rest))):
            lines, rest = lines + data.count(b"\n"), rest - len(data)
    return lines


# == DOCUMENTS ========================================================================================================


def decode(raw: bytes) -> tuple[str, bool]:
    """A text and whether it was UTF-8; what is not becomes U+FFFD."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), False


def split_text(data: bytes) -> Iterator[tuple[int, str, bool]]:
    """(offset, text, whether it was UTF-8) of the documents of a plain text, which gaps separate and may end."""
    start, gaps = 0, [gap.span() for gap in GAP.finditer(data)]
    for end, after in [*gaps, (len(data), len(data))]:
        if start < len(data):
            text, whole = decode(data[start:end])
            yield start, text.replace("\r\n", "\n"), whole
        start = after


def split_lines(data: bytes) -> Iterator[tuple[int, str, bool]]:
    """The same for lines of .jsonl: what each has under "text", where null is no text. Raises BadLine."""
    offset = 0
    for number, line in enumerate(data.split(b"\n")):
        if line.strip():
            text, whole = decode(line.removeprefix(BOM))  # files that were joined have some in the middle
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadLine(number, f"is not JSON ({reason(error)})") from None
            if not isinstance(value, dict) or not isinstance(value.get("text", 0), (str, type(None))):
                raise BadLine(number, 'is not an object with a string under "text"')
            yield offset, value["text"] or "", whole
        offset += len(line) + 1


def split_rows(data: list[bytes | None]) -> Iterator[tuple[int, str, bool]]:
    """The same for rows of parquet."""
    return ((i, *decode(raw or b"")) for i, raw in enumerate(data))


SPLIT = {"text": split_text, "json": split_lines, "rows": split_rows}


def parts(text: str) -> list[str]:
    """A text in parts that together have the ids of the whole: long runs of white space become parts of their own.

    tiktoken fails on a million white characters if a word follows. GPT-2's pattern takes all of them but the last one
    together, and that one with the word or by itself, so that a cut before it changes nothing.
    """
    if len(text) <= LONGEST:
        return [text]
    found, start = [], 0
    for run in re.finditer(f"(?<![{WHITE}])[{WHITE}]{{{LONGEST},}}", text):
        if run.end() < len(text):
            found += [text[start : run.start()], text[run.start() : run.end() - 1]]
            start = run.end() - 1
    return [part for part in (*found, text[start:]) if part]
