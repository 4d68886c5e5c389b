"""Reading and writing files safely, and how every script ends: one line and an exit code, whatever went wrong.

Only the standard library is imported here, so that a script can say what is wrong before it loads anything large.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class UserError(Exception):
    """Something that a user can mend. Each line names the file or flag, says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """The first line of an error, for a message of ours; the kind of error where it says nothing."""
    if getattr(error, "errno", None) == errno.EMFILE:
        return "too many open files: allow more with `ulimit -n 4096`"
    said = getattr(error, "strerror", None) or str(error)  # strerror leaves out the file, which the message names
    return (said.strip().splitlines() or [""])[0][:160] or type(error).__name__


def from_here(path: Path | str) -> Path:
    """A path as one would type it: relative to the current folder if it lies below."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):  # the current folder may have been deleted
        return path.relative_to(Path.cwd())
    return path


def package(name: str, pip: str, use: str) -> Any:
    """An optional package, imported. Raises UserError with the remedy if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{use} needs {pip} ({error}): pip install {pip}") from None


# == READING ==========================================================================================================


def read_bytes(path: Path | str) -> bytes:
    """What a file holds. OSError if it is not an ordinary file: a pipe, for example, might be waited for for ever."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(None, "not an ordinary file", str(path))
    return path.read_bytes()


def read_text(path: Path | str, errors: str = "strict") -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    data = read_bytes(path)
    return data.decode(json.detect_encoding(data), errors)


def read_json(path: Path | str) -> Any:
    """What a JSON file holds. Raises UserError if it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)})") from None


def digest(parts: Any) -> str:
    """Sixteen hexadecimal digits for some bytes."""
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


def fits(value: Any, shape: Any) -> bool:
    """Whether parsed JSON has a shape: a type, None, {key: shape} (and other keys), [shape] or (shape, shape)."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], s) for key, s in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if isinstance(shape, tuple):
        return any(fits(value, s) for s in shape)
    return value is None if shape is None else type(value) is shape


def files_below(folder: Path, wanted: Callable[[str], Any]) -> list[Path]:
    """The files below a folder whose names are `wanted`, without hidden ones, sorted by path.

    Linked folders are followed, each once, so that links in a circle come to an end. Raises OSError for a folder that
    cannot be listed and UserError for something that is not a file, rather than leave it out in silence.
    """

    def stop(error: OSError) -> None:
        raise error

    found, seen, waiting = [], set(), [str(folder)]
    while waiting:
        for here, folders, names in os.walk(waiting.pop(0), onerror=stop):  # does not enter linked folders
            real = os.path.realpath(here)
            folders[:] = [] if real in seen else sorted(f for f in folders if f[0] != ".")
            if real not in seen:
                seen.add(real)
                waiting += [link for f in folders if os.path.islink(link := os.path.join(here, f))]
                found += [Path(here, name) for name in names if name[0] != "." and wanted(name)]
    for file in found:
        if not file.is_file():
            raise UserError(f"{file}: a broken link, or not an ordinary file; remove it")
    return sorted(found, key=lambda f: f.relative_to(folder).as_posix())


# == WRITING ==========================================================================================================


@contextlib.contextmanager
def replacing(path: Path, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Write to a temporary name beside `path`, flush to disk, then rename: `path` is never seen half-written.

    The old file stays until the new one has passed `check(temporary)`. The folder is flushed after the rename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
                os.fsync(folder)
            os.close(folder)
    except OSError as error:
        error.filename = str(path)  # not the temporary name; a full disk is reported without any
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file that is never seen half-written."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


# == HOW A SCRIPT BEGINS AND ENDS =====================================================================================


class Steady:
    """A text stream that printing cannot fail on.

    Characters that the console lacks are written as escapes, such as \\u6771. If the stream cannot be written to (its
    reader is gone, its disk is full), the first error is kept in `lost` and all further text is dropped.
    If `ends` is true, that error is raised: printing is what the program is for.
    """

    def __init__(self, stream: Any, ends: bool = False):
        self.stream, self.ends, self.lost = stream or open(os.devnull, "w", encoding="utf-8"), ends, None
        with contextlib.suppress(AttributeError, OSError, ValueError):  # not every stream can be reconfigured
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work: Callable[..., Any], *args: str) -> None:
        try:
            work(*args)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            if self.lost:
                return
            self.lost = error if isinstance(error, OSError) else OSError(None, str(error))
            self.lost.filename = "standard output"
            with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.ends:
                raise self.lost from None


def open_standard_descriptors() -> None:
    """Put the null device on descriptors 0 to 2 that are closed; otherwise the next files opened would get them."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    texts = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    said = isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in texts)
    return said or isinstance(error, MemoryError)


def run_script(program: str, work: Callable[[], int | None], memory: str = "", output: bool = False) -> int:
    """Run the work of a script and return its exit code, after at most one line on stderr for each problem.

    0 or what `work` returns; 2 after a UserError, an OSError, or when memory ran out (`memory` says what to do then);
    130 after Ctrl-C. The text of a KeyboardInterrupt, if it has one, is what is said. Any other exception is a bug in
    the program and keeps its traceback. While `work` runs, printing cannot fail. With `output`, a program that exists
    for what it prints ends when stdout takes no more: quietly if the reader is gone, as `head` is after ten lines.
    """
    open_standard_descriptors()
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = streams = Steady(sys.stdout, output), Steady(sys.stderr)
    try:
        return ending(program, work, memory, streams[0])
    finally:
        for stream in streams:
            stream.ends = False
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def ending(program: str, work: Callable[[], int | None], memory: str, stdout: Steady) -> int:
    """The exit code of `work`; problems are written to stderr."""
    try:
        code = work() or 0
        stdout.flush()
        if stdout.lost and not code:
            raise stdout.lost
        return code
    except UserError as error:
        lines, code = str(error).splitlines(), 2
    except KeyboardInterrupt as error:
        lines, code = [str(error) or "stopped"], 130
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            detail = f" ({reason(error)})" if str(error) else ""
            lines = [f"out of memory{detail}" + (f"; {memory}" if memory else "")]
        elif not isinstance(error, OSError):
            raise
        elif isinstance(error, BrokenPipeError) and error is stdout.lost:
            return 0
        else:
            where = error.filename or ("the current folder" if isinstance(error, FileNotFoundError) else "")
            lines = [f"{where}: {reason(error)}" if where else reason(error)]
        code = 2
    for line in lines:
        print(f"{program}: {line}", file=sys.stderr)
    return code
