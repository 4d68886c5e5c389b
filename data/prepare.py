"""Writes token shards for `train.py --dataset fineweb`: ready-made ones, FineWeb-Edu tokenised here, or your own text.

    python data/prepare.py --pretokenized 10                   # fetch 1 validation and 10 training shards, 2.2 GB
    python data/prepare.py --tokenize                          # fetch FineWeb-Edu sample-10BT, 28.5 GB, tokenise it
    python data/prepare.py --from my_texts --out data/mine     # your own .txt, .jsonl(.gz) or .parquet files
    python data/prepare.py --from my.txt --tokenizer bytes --out data/mine     # the same without any download

A shard is written under a temporary name, renamed when it is whole, and entered in meta.json. Stop the script at any
moment and give the same command again: it continues after the last whole shard, and every file comes out the same to
the byte. Run again on a finished folder, it checks every checksum. Formats, sizes, counts: data/README.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)] * (str(HERE.parent) not in sys.path)

from data.documents import (  # noqa: E402
    BLOCK,
    LETTER,
    SPLIT,
    BadLine,
    Block,
    Position,
    all_blocks,
    line_number,
    local_files,
    parts,
)
from data.files import UserError, fits, package, read_json, reason, replacing, run_script, write_json  # noqa: E402
from data.flags import Parser, folder_name, whole_number  # noqa: E402
from data.shards import EOT, TOKENIZERS, load_tokenizer, reachable, read_shard  # noqa: E402

READY = "kjj0/finewebedu10B-gpt2"  # FineWeb-Edu in GPT-2 tokens: 1 + 99 .bin files of 100M tokens
RAW, RAW_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"  # 14 parquet files

SHARD_TOKENS = 100_000_000
MOST_WORKERS = 60  # what Windows can wait for
POSITION = {"file": int, "at": int, "inside": bool, "skip": int}
SHARD = {"name": str, "split": str, "tokens": int, "documents": int, "bytes": int, "sha256": str}
META = {"format": int, "source": str, "revision": (str, None), "files": ([{"name": str, "bytes": int}], None),
        "tokenizer": str, "vocab_size": int, "end_of_text": int, "dtype": str, "shard_tokens": (int, None),
        "val_tokens": (int, None), "complete": bool, "shards": [SHARD]}  # fmt: skip


class Encoded(NamedTuple):
    """What a worker makes of a block."""

    tokens: np.ndarray  # uint16
    documents: np.ndarray  # int64: where each document that begins in the block does so, relative to the block's `at`
    empty: int  # documents left out
    repaired: int  # documents with bytes that are not UTF-8


# == NETWORK ==========================================================================================================


def need_hub(what: str) -> None:
    """Raises UserError if the hub cannot be reached: its library would retry for 23 seconds."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{what} has to be fetched, but HF_HUB_OFFLINE is set: unset it")
    if not reachable(address):
        raise UserError(f"{what} has to be fetched, but {address} cannot be reached: connect, or set HTTPS_PROXY or "
                        "HF_ENDPOINT (a mirror), or copy the shards from another machine, or --from your own text")


def hub_files(repo: str, folder: str | None, ending: str, revision: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The commit a data set stands at and the files of one folder: name, bytes, sha256 (None where not known)."""
    need_hub(repo)
    library = package("huggingface_hub", "huggingface-hub", "fetching")
    try:
        api = library.HfApi()
        revision = revision or api.repo_info(repo, repo_type="dataset", expand=["sha"], timeout=30).sha
        entries = list(api.list_repo_tree(repo, folder, revision=revision, repo_type="dataset"))
    except Exception as error:  # every layer of the network has its own
        raise UserError(f"cannot list the files of {repo} ({reason(error)}); try again later") from None
    files = [{"name": e.path, "bytes": e.size, "sha256": e.lfs.sha256 if e.lfs else None}
             for e in entries if e.path.endswith(ending)]  # fmt: skip
    return revision, sorted(files, key=lambda f: f["name"])


def fetch(repo: str, name: str, revision: str, folder: Path | None = None) -> Path:
    """A file of a data set: in `folder`, or in the hub's own cache; what broke off is continued."""
    library = package("huggingface_hub", "huggingface-hub", "fetching")
    if folder is None:
        cached = library.try_to_load_from_cache(repo, name, repo_type="dataset", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    need_hub(f"{repo}/{name}")
    try:
        return Path(library.hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:
        raise UserError(f"cannot fetch {name} of {repo} ({reason(error)}); the same command goes on") from None


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


def encode_block(kind: str, data: Any, inside: bool) -> Encoded:
    """The tokens of a block: end-of-text, then the document, for each of its documents; `inside`, the first goes on.

    Raises BadLine. Documents go to tiktoken together, with end-of-text between them, which gives the same ids as one by
    one; those that hold the text of that token, or very long white space, go alone.
    """
    pieces, together, places, empty, repaired = [], [], [], 0, 0

    def flush() -> None:
        if together:
            pieces.append(token_ids(EOT + EOT.join(together), {EOT}))
            together.clear()

    for number, (offset, text, whole) in enumerate(SPLIT[kind](data)):
        begins = number > 0 or not inside
        if begins and not LETTER.search(text):
            empty += 1
            continue
        repaired += not whole
        if begins:
            places.append(offset)
        cut = parts(text)
        if begins and len(cut) == 1 and EOT not in text:
            together.append(text)
            continue
        flush()
        pieces += [token_ids(EOT, {EOT})] * begins + [token_ids(part) for part in cut]
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


# == SHARDS ===========================================================================================================


def read_begun(folder: Path) -> dict[str, Any] | None:
    """meta.json of a folder that was begun, else None. Raises UserError if it is damaged, or missing beside shards."""
    path = folder / "meta.json"
    if not path.exists():
        stray = next((f for f in sorted(folder.glob("*")) if f.suffix in (".npy", ".bin")), None)
        if stray:
            raise UserError(f"{stray} is there but {path.name} is not, so those shards are not of this script: "
                            "give another --out, or move them away")  # fmt: skip
        return None
    try:
        meta = read_json(path)
        problem = "of another format"
    except UserError as error:
        meta, problem = None, reason(error)
    if not fits(meta, META) or meta["format"] != 1 or not all(
            Path(s["name"]).name == s["name"] and fits(s.get("next"), (POSITION, None)) for s in meta["shards"]):
        raise UserError(f"{path} is not what this script writes ({problem}): give another --out, or delete it and the "
                        "shards beside it")
    return meta if meta["shards"] else None


def same_job(folder: Path, meta: dict[str, Any], job: dict[str, Any]) -> None:
    """Raises UserError where the folder was begun with another source or other settings."""
    for key in ("source", "tokenizer", "shard_tokens", "val_tokens"):
        if meta[key] != job[key]:
            what = "source" if key == "source" else "--" + key.replace("_", "-")
            was, now = ("default" if value is None else value for value in (meta[key], job[key]))
            raise UserError(f"{folder} was begun with {what} {was}, not {now}: give the same, or another --out")


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
    vocab = TOKENIZERS[tokenizer]
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
        """The last shard; of a small corpus, both. Raises UserError where there is too little for two."""
        tokens = self.buffer[: self.filled]
        if not self.meta["shards"]:
            asked, tenth = self.meta["val_tokens"], min(self.val, len(tokens) // 10)
            val = asked if asked and asked < len(tokens) else tenth
            if not val:
                raise UserError(f"{self.meta['source']} holds {len(tokens)} tokens: too few to train and validate")
            if asked and val != asked:
                print(f"note: of {len(tokens):,} tokens a tenth is for validation, not --val-tokens {asked:,}")
            self.write("val", tokens[:val], None)
            tokens = tokens[val:]
        if len(tokens):
            self.write("train", tokens, None)
        self.meta["complete"] = True
        write_json(self.folder / "meta.json", self.meta)

    def write(self, split: str, tokens: np.ndarray, behind: Position | None) -> None:
        """One shard, then its entry."""
        path = self.folder / f"{self.prefix}_{split}_{len(self.meta['shards']):06d}.npy"
        with replacing(path) as file:
            np.save(file, tokens)
        documents = int(np.count_nonzero(tokens == self.meta["end_of_text"]))
        self.meta["shards"].append({"name": path.name, "split": split, "tokens": len(tokens), "documents": documents,
                                    "bytes": path.stat().st_size, "sha256": sha256(path),
                                    "next": behind and behind._asdict()})  # fmt: skip
        write_json(self.folder / "meta.json", self.meta)
        tqdm.write(f"{path.name}  {len(tokens):,} tokens, {documents:,} documents begin in it")


# == TOKENISE =========================================================================================================


@contextlib.contextmanager
def worker_pool(count: int, tokenizer: str):
    """Processes with the tokenizer loaded. They are spawned on every system, so they are the same on every system."""

    def on_interrupt(handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # others may not
            signal.signal(signal.SIGINT, handler)

    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=start_worker, initargs=(tokenizer,))
    before = signal.getsignal(signal.SIGINT)
    on_interrupt(signal.SIG_IGN)  # which they inherit: Ctrl-C is for the main process
    try:
        for _ in range(count):
            pool.submit(int)  # starts one
        on_interrupt(before)
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: try again, fewer --workers") from None
    finally:
        on_interrupt(before)
        pool.shutdown(cancel_futures=True)


def encode_in_order(pool: ProcessPoolExecutor, blocks: Iterator[Block], ahead: int) -> Iterator[tuple[Block, Any]]:
    """(block, future of its Encoded), with at most `ahead` blocks on their way."""
    waiting: deque = deque()
    for block in blocks:
        waiting.append((block, pool.submit(encode_block, block.kind, block.data, block.inside)))
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
    workers = max(1, min(workers, total // BLOCK + 1))
    with worker_pool(workers, name) as pool, \
            tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:  # fmt: skip
        for block, future in encode_in_order(pool, all_blocks(files, locate, start), 2 * workers + 2):
            try:
                encoded = future.result()
            except BadLine as error:
                path = locate(files[block.file]["name"])
                line = line_number(path, block.at) + error.args[0]
                raise UserError(f"{path}, line {line} {error.args[1]}: repair or remove that line") from None
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
    meta, start = read_begun(out) or job, Position()
    same_job(out, meta, job)
    complete, known = meta["complete"], len(meta["shards"])
    with checking(meta["shards"]) as listed:
        shards = list(itertools.takewhile(lambda shard: whole(out, shard), listed))
    if len(shards) < known or not complete:
        complete = False
        place = shards[-1].get("next") if shards else Position()._asdict()
        shards, start = (shards, Position(*map(place.get, Position._fields))) if place else ([], Position())
    used = max(len(job["files"]), len(meta["files"] or [])) if complete else start.file + 1 if shards else 0
    for was, now in itertools.zip_longest((meta["files"] or [])[:used], job["files"][:used]):
        if was != now:
            raise UserError(f"{(was or now)['name']} is not the file that the shards in {out} were begun with: "
                               "give another --out, or delete those shards and their meta.json")  # fmt: skip
    if not complete:
        load_tokenizer(job["tokenizer"])  # before anything is written
        meta = job | {"shards": shards}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "meta.json", meta)
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
    known = read_begun(out)
    if known and known["source"] == RAW:
        revision, files = known["revision"], known["files"]
    else:
        load_tokenizer(tokenizer)
        package("pyarrow", "pyarrow", "reading parquet")
        revision, files = hub_files(RAW, RAW_FOLDER, ".parquet", None)
    job = new_meta(RAW, revision, files, tokenizer, shard_tokens=shard_tokens, val_tokens=val_tokens)
    prepare_text(out, job, lambda name: fetch(RAW, name, revision), "edufineweb", val_tokens or shard_tokens, workers)


def from_ready(out: Path, count: int) -> None:
    """--pretokenized: the public shards, one for validation and `count` to train on."""
    job = new_meta(READY, None, None, "gpt2", shard_tokens=None, val_tokens=None)
    meta = read_begun(out) or job
    same_job(out, meta, job)
    names = {s["name"] for s in meta["shards"]}
    with checking(meta["shards"]) as listed:
        meta["shards"] = [s for s in listed if whole(out, s)]
    have, splits = {s["name"] for s in meta["shards"]}, [s["split"] for s in meta["shards"]]
    if have == names and "val" in splits and splits.count("train") >= count:
        write_json(out / "meta.json", meta | {"complete": True})  # a call for more may have been stopped
        summary(out, meta, "complete already")
        return
    meta["revision"], files = hub_files(READY, None, ".bin", meta["revision"])
    val, train = ([f for f in files if ("val" in f["name"]) == wanted] for wanted in (True, False))
    if count > len(train):
        raise UserError(f"--pretokenized {count}: {READY} has {len(train)} training shards")
    out.mkdir(parents=True, exist_ok=True)
    meta["complete"] = False
    for name in names - have:
        (out / name).unlink(missing_ok=True)  # the hub's library might take it as it is
    for file in val[:1] + [f for i, f in enumerate(train) if i < count or f["name"] in names]:
        if file["name"] not in have:
            write_json(out / "meta.json", meta)
            meta["shards"] = sorted([*meta["shards"], ready_shard(out, file, meta)], key=lambda s: s["name"])
    meta["complete"] = True
    write_json(out / "meta.json", meta)
    summary(out, meta, "complete")


def ready_shard(out: Path, file: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Fetch one public shard, check it and describe it for meta.json."""
    path = fetch(READY, file["name"], meta["revision"], out)
    try:
        tokens, found = read_shard(path)[:], sha256(path)
        if file["sha256"] not in (None, found):
            raise UserError(f"{path}: its checksum is not the hub's")
    except UserError as error:
        path.unlink()
        raise UserError(f"{reason(error)}; it was removed, the same command fetches it again") from None
    documents = int(np.count_nonzero(tokens == meta["end_of_text"]))
    print(f"{path.name}  {len(tokens):,} tokens, {documents:,} documents begin in it")
    return {"name": path.name, "split": "val" if "val" in path.name else "train", "tokens": len(tokens),
            "documents": documents, "bytes": path.stat().st_size, "sha256": found}  # fmt: skip


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="data/prepare.py",
                    description="Write token shards for train.py --dataset fineweb. See data/README.md.")  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretokenized", type=whole_number(1, 99), metavar="N",
                        help=f"fetch the validation shard and N (1 to 99) training shards of {READY}, 200 MB each")
    source.add_argument("--tokenize", action="store_true",
                        help="fetch FineWeb-Edu sample-10BT (14 parquet files, 28.5 GB) and tokenise it")
    source.add_argument("--from", dest="source", type=folder_name, metavar="FILE_OR_FOLDER",
                        help='tokenise your own files: .parquet (column "text"), .jsonl or .jsonl.gz (key "text"), or '
                             ".txt, .txt.gz, .md (documents separated by blank lines)")
    parser.add_argument("--out", type=folder_name, default=HERE, metavar="DIR",
                        help="where to (default: the script's folder)")
    parser.add_argument("--shard-tokens", type=whole_number(1, 10**10), metavar="N",
                        help=f"tokens per shard ({SHARD_TOKENS:,})")
    parser.add_argument("--val-tokens", type=whole_number(1, 10**10), metavar="N",
                        help="tokens of the validation shard, the first ones (default: of FineWeb-Edu one whole shard; "
                             "of your own files a tenth of a shard, or of a small corpus a tenth)")
    parser.add_argument("--tokenizer", choices=tuple(TOKENIZERS),
                        help="gpt2: 50,257 ids, downloaded once; bytes: 257 ids, for small trials (default: gpt2)")
    parser.add_argument("--workers", type=whole_number(1, MOST_WORKERS), metavar="N",
                        help=f"processes that tokenise (default: one per core, at most {MOST_WORKERS})")
    return parser


def cores() -> int:
    """The processors this process may use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def prepare(argv: list[str] | None) -> None:
    """What the command line asks for."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = [n for n in ("shard_tokens", "val_tokens", "tokenizer", "workers") if getattr(args, n) is not None]
    if args.pretokenized and given:
        parser.error(f"--{given[0].replace('_', '-')} has no meaning with --pretokenized")
    shard_tokens = args.shard_tokens or SHARD_TOKENS
    if (args.val_tokens or 0) > shard_tokens:
        parser.error(f"--val-tokens {args.val_tokens} is more than --shard-tokens {shard_tokens}: raise that one")
    out, how = Path(args.out), (args.tokenizer or "gpt2", shard_tokens, args.val_tokens, args.workers or cores())
    try:
        if args.pretokenized:
            from_ready(out, args.pretokenized)
        elif args.tokenize:
            from_hub(out, *how)
        else:
            from_local(Path(args.source), out, *how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what is in {out} is whole, and the same command goes on") from None


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the shards are complete, 2 after one line on stderr, 130 after Ctrl-C."""
    return run_script("prepare.py", lambda: prepare(argv), "lower --shard-tokens (2 bytes each) or --workers")


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # a polite kill, or a terminal that closes, is a Ctrl-C
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
