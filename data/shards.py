"""Reads and checks token shards, what meta.json says of them, and their tokenizers. Raises UserError naming the file.

data/README.md describes the formats.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data.files import UserError, fits, read_bytes, read_json, reason

MAGIC = 20240520  # first number of a .bin shard
EOT = "<|endoftext|>"
TOKENIZERS = {"gpt2": 50257, "bytes": 257}  # name -> number of tokens; the last one is end-of-text
VOCABULARY = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"  # the ids of "gpt2" in one file
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
PATIENCE = 1.5  # seconds to wait for a first sign of the network


# == SHARDS ===========================================================================================================


class Shard:
    """The tokens of one file, (length,) uint16: `shard[a:b]` copies some out of a memory map that is opened for it.

    A map that stays open takes a file descriptor, and many systems allow 256 of them; a folder may hold more shards.
    """

    def __init__(self, path: Path, offset: int, length: int):
        self.path, self.offset, self.length = path, offset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: slice | int) -> np.ndarray:
        if not self.length:
            return np.empty(0, np.uint16)[key]  # an empty file cannot be mapped
        try:
            with open(self.path, "rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(whole, "<u2", self.length, self.offset)[key].astype(np.uint16)  # a copy
        except (OSError, ValueError) as error:  # removed or cut off since
            raise UserError(f"{self.path}: cannot be read any more ({reason(error)})") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def read_shard(path: Path | str) -> Shard:
    """One shard: `.npy`, or `.bin` behind a header of 256 int32. Raises UserError if it is not whole."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not an ordinary file")
        with open(path, "rb") as file:
            offset, length = (npy_header if path.suffix.lower() == ".npy" else bin_header)(file)
        size, found = offset + 2 * length, path.stat().st_size
        if found < size or found > size and path.suffix.lower() != ".npy":
            raise ValueError(f"has {found:,} bytes where its header says {size:,}")
        return Shard(path, offset, length)
    except OSError as error:  # the file may be whole, but the system does not let us have it
        raise UserError(f"{path}: cannot be opened ({reason(error)})") from None
    except Exception as error:  # numpy raises many kinds for damaged files
        raise UserError(f"{path}: not a whole token shard ({reason(error)}); make or fetch it again") from None


def npy_header(file: Any) -> tuple[int, int]:
    """Where the tokens of a `.npy` file begin, and how many it should have."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"is of version {version} of numpy's format")
    shape, _, dtype = read[version](file)
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 0:
        raise ValueError(f"holds {dtype} of shape {shape}, not one row of uint16")
    return file.tell(), shape[0]


def bin_header(file: Any) -> tuple[int, int]:
    """The same for a `.bin` file."""
    header = np.frombuffer(file.read(1024), "<i4")
    if len(header) < 256 or header[0] != MAGIC or header[1] != 1 or header[2] < 0:
        raise ValueError(f"does not begin with the header {MAGIC}, 1 and a number of tokens")
    return 1024, int(header[2])


def shard_files(folder: Path | str, split: str, names: Collection[str] | None = None) -> list[Path]:
    """The shards of a split ("val": those with val in their names, "train": the others), in the order of their names.

    With a meta.json only those that it lists: data/prepare.py may still be adding to them. `names` asks for just these,
    so that a run that goes on finds the shards it began with. Raises UserError if there is none, or one is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else f"no such folder (looked for from {Path.cwd()})"
        raise UserError(f"{folder}: {what}; --data-dir wants a folder with shards, see data/README.md")
    meta = read_meta(folder)
    listed = {shard["name"] for shard in meta.get("shards", [])}
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".npy", ".bin") and not f.name.startswith("."))
    files = [f for f in files if ("val" in f.name) == (split == "val") and (not meta or f.name in listed)]
    if names is not None:
        if missing := sorted(set(names) - {f.name for f in files}):
            raise UserError(f"{folder / missing[0]}: missing, but the run was started with it; put it back")
        files = [f for f in files if f.name in names]
    if not files:
        kind, having = ("validation", "with") if split == "val" else ("training", "without")
        raise UserError(f"{folder}: no {kind} shards (.npy or .bin files {having} \"val\" in their names) there; "
                        "data/README.md says how to make them")
    return files


def read_meta(folder: Path | str) -> dict[str, Any]:
    """What data/prepare.py wrote about its shards in meta.json; empty if there is none. Raises UserError if damaged.

    Checked is what is cheap to check: that every shard named is there with as many bytes as it should have.
    """
    folder = Path(folder)
    path = folder / "meta.json"
    if not path.exists():
        return {}
    meta = read_json(path)
    shape = {"tokenizer": str, "vocab_size": int, "end_of_text": int, "shards": [{"name": str, "bytes": int}]}
    if not fits(meta, shape) or not 0 < meta["end_of_text"] < meta["vocab_size"] <= 65536 \
            or any(Path(shard["name"]).name != shard["name"] for shard in meta["shards"]):  # fmt: skip
        raise UserError(f"{path}: does not describe shards; make them again with data/prepare.py, or remove it")
    for shard in meta["shards"]:
        file = folder / shard["name"]
        if not os.path.isfile(file) or file.stat().st_size != shard["bytes"]:
            raise UserError(f"{file}: missing, or not the {shard['bytes']:,} bytes that meta.json names; "
                            "data/prepare.py, started again, mends it")
    return meta


# == TOKENIZERS =======================================================================================================


def load_tokenizer(name: str):
    """A `tiktoken.Encoding`: "gpt2" (50,257 ids), or "bytes" (256 and end-of-text), which needs no download.

    Raises UserError if tiktoken, or GPT-2's vocabulary, is neither here nor to be had.
    """
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r:.60} is not one of {', '.join(TOKENIZERS)}")
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"tokenising needs tiktoken, which does not load ({error}): pip install tiktoken") from None
    if name == "bytes":
        single = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=single, special_tokens={EOT: 256})
    folder, file = vocabulary_cache()
    if not cached(folder, file) and not reachable(VOCABULARY):
        raise UserError(f"GPT-2's vocabulary is not in tiktoken's cache ({folder or 'switched off'}), and "
                        f"{urlsplit(VOCABULARY).hostname} cannot be reached: connect, or set TIKTOKEN_CACHE_DIR to "
                        f"a folder that holds {file} (see data/README.md), or take --tokenizer bytes")
    try:
        return tiktoken.get_encoding("r50k_base")
    except Exception as error:  # of the download, or of a cache that cannot be written
        raise UserError(f"cannot load GPT-2's vocabulary from {folder or VOCABULARY} ({reason(error)})") from None


def vocabulary_cache() -> tuple[str, str]:
    """tiktoken's cache folder, "" if it is switched off, and the name that GPT-2's vocabulary has there."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return folder, hashlib.sha1(VOCABULARY.encode()).hexdigest()


def cached(folder: str, file: str) -> bool:
    """Whether the cache holds GPT-2's vocabulary, whole: tiktoken would fetch a damaged one without a time limit."""
    if not folder:
        return False
    with contextlib.suppress(OSError):
        return hashlib.sha256(read_bytes(os.path.join(folder, file))).hexdigest() == VOCABULARY_SHA256
    return False


def reachable(url: str) -> bool:
    """Whether the host of `url`, or the proxy in front of it, takes a connection within PATIENCE seconds."""
    place = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(place.hostname or "") else urllib.request.getproxies().get(place.scheme)
    place = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else place
    try:
        address = place.hostname, place.port or (80 if place.scheme == "http" else 443)
    except ValueError as error:  # no port
        raise UserError(f"{place.geturl()}, taken from the environment, is no address: {error}") from None
    answered = []

    def knock() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, PATIENCE):
            answered.append(True)

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def bytes_per_token(tokenizer: Any, tokens: np.ndarray) -> float:
    """Bytes of text that one of these tokens stands for on average; end-of-text, the last token, stands for none."""
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab - 1)]
    return max(float(np.array([*lengths, *[0] * (65536 - len(lengths))])[tokens].mean()), 1e-9)
