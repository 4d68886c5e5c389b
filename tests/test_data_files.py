"""Reading of files: whatever they hold, it is read, or refused with a UserError; and how a script ends."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from arc_data import tasks
from arc_data.prepare import read_extra
from data import files, prepare, shards
from data.files import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent


def put(file: Path, data: object) -> Path:
    """A file with these bytes, or with this as its JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return file


def npy(tokens: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), tokens)
    return file.getvalue()


def bin_shard(tokens: np.ndarray, length: int = 40) -> bytes:
    return np.array([shards.MAGIC, 1, length, *[0] * 253], "<i4").tobytes() + tokens.astype("<u2").tobytes()


TASK = {"train": [{"input": [[1, 2], [3, 4]], "output": [[4]]}, {"input": [[5]], "output": [[5]]}],
        "test": [{"input": [[5]], "output": [[6, 7]]}]}  # fmt: skip
TOKENS = np.arange(40, dtype=np.uint16)
SHARD = {"name": "text_val_000000.npy", "split": "val", "tokens": 40, "documents": 1, "bytes": 208, "sha256": "0",
         "next": {"file": 0, "at": 0, "inside": False, "skip": 4}}  # fmt: skip
META = prepare.new_meta("x", None, [{"name": "a.txt", "bytes": 9, "start": "0"}], "bytes", shard_tokens=9,
                        val_tokens=None) | {"shards": [SHARD]}  # fmt: skip
GOOD = {"task/a.json": TASK, "combined/arc-agi_test_challenges.json": {"a": TASK},
        "combined/arc-agi_test_solutions.json": {"a": [[[6, 7]]], "x": [[[1]]]}, "meta/meta.json": META,
        "meta/text_val_000000.npy": npy(TOKENS), "shard/s.npy": npy(TOKENS), "shard/s.bin": bin_shard(TOKENS),
        "shard/s.NPY": npy(TOKENS)}  # fmt: skip
READERS = {
    "task": [tasks.read_task, lambda file: tasks.read_tasks(file.parent), lambda file: read_extra(file, 3)],
    "combined": [lambda file: tasks.read_split(file.parent, "test"),
                 lambda file: tasks.read_tasks(file.with_name("arc-agi_test_challenges.json"))],
    "meta": [lambda file: shards.read_meta(file.parent), lambda file: shards.shard_files(file.parent, "val"),
             lambda file: prepare.read_begun(file.parent)],
    "shard": [lambda file: np.add(shards.read_shard(file)[:], shards.read_shard(file))],
}  # fmt: skip
BAD = [
    *(("task/a.json", data) for data in (b"[" * 100_000, b"1" * 5000, b"\xff\xfe\x00", {**TASK, "train": []})),
    ("task/a.json", b'{"train": [{"input": [[true]], "output": [[1]]}], "test": [{"input": [[1e0]]}]}'),
    *(("combined/arc-agi_test_challenges.json", {name: TASK}) for name in ("../a", "\ud800")),
    *(("shard/s.bin", bin_shard(TOKENS, length)) for length in (-1, 39, 41)),
    *(("shard/s.npy", npy(made)) for made in (TOKENS.astype(">u2"), TOKENS.reshape(5, 8), TOKENS.astype(object))),
    *(("shard/s.npy", data) for data in (npy(TOKENS)[:-1], npy(TOKENS).replace(b"(40,)", b"(-4,)"))),
    *(("meta/meta.json", META | {"shards": [SHARD | change]})
      for change in ({"name": "../x"}, {"name": "a\0b"}, {"next": 3})),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with all files of GOOD."""
    folder = tmp_path_factory.mktemp("good")
    for name, value in GOOD.items():
        put(folder / name, value)
    return folder


def changes(value: object):
    """Parsed JSON with each of its parts in turn left out, or something else in its place."""
    yield from (None, True, -1, 1.5, 10**30, "", "\ud800", [], {}, [[]], [{}])
    if isinstance(value, (dict, list)):
        items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        for key in items:
            without = {k: v for k, v in items.items() if k != key}
            for made in (without, *(items | {key: other} for other in changes(items[key]))):
                yield made if isinstance(value, dict) else list(made.values())


def spoiled(value: object):
    """Such a file cut short, or with another byte, at many places, and all changes of its JSON."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    for i in range(0, len(data), 1 + len(data) // 200):
        yield from (data[:i], data[:i] + b"9" + data[i + 1 :], data[:i] + b"\xff" + data[i + 1 :])
    yield from () if isinstance(value, bytes) else changes(value)


def refusals(name: str, data: object, folder: Path) -> int:
    """How many readers refuse a file. What is to be shown: with a UserError of one line, and never in another way."""
    file, count = put(folder / name, data), 0
    for read in READERS[file.parent.name]:
        try:
            read(file)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            count += 1
    put(file, GOOD[name])
    return count


@pytest.mark.parametrize("name", GOOD)
def test_any_file_is_read_or_refused(name, folder):
    assert refusals(name, GOOD[name], folder) == 0
    assert sum(refusals(name, data, folder) > 0 for data in spoiled(GOOD[name])) > 80


@pytest.mark.parametrize("name, data", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_these_files_are_refused(name, data, folder):
    assert refusals(name, data, folder) > 0


@pytest.mark.parametrize("name", ["", "gpt9", "\udcff", "x" * 999])
def test_any_other_name_of_a_tokenizer(name):
    with pytest.raises(UserError, match="gpt2, bytes"):
        shards.load_tokenizer(name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-32-be"])
def test_json_in_every_encoding(encoding, tmp_path):
    file = put(tmp_path / "x.json", json.dumps({"é": "東"}, ensure_ascii=False).encode(encoding))
    assert files.read_json(file) == {"é": "東"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("read", [shards.read_shard, files.read_json])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="x.json: .*not an ordinary file"):
        read(tmp_path / "x.json")


def test_links_are_followed_once_and_nothing_is_left_out_in_silence(tmp_path):
    for name in ("in/a.txt", "in/sub/b.txt", "in/.hidden/c.txt", "elsewhere/d.txt", "in/sub/e.md"):
        put(tmp_path / name, b"text")
    for link, target in (("in/sub/up", ".."), ("in/z", "../elsewhere"), ("in/zz", "z"), ("elsewhere/back", "../in")):
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    found = files.files_below(tmp_path / "in", lambda name: name.endswith(".txt"))
    assert [f.relative_to(tmp_path / "in").as_posix() for f in found] == ["a.txt", "sub/b.txt", "z/d.txt"]
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone.txt: a broken link"):
        files.files_below(tmp_path / "in", lambda name: name.endswith(".txt"))


def test_kaggle_s_files_are_a_folder_of_tasks(tmp_path):
    hidden = {**TASK, "test": [{"input": [[5]]}, {"input": [[0]]}]}
    file = put(tmp_path / "arc-agi_evaluation_challenges.json", {"b": hidden, "a": hidden})
    put(tmp_path / "arc-agi_test_challenges.json", {"c": hidden})
    solutions = put(tmp_path / "arc-agi_evaluation_solutions.json", {"a": [[[1, 2]], [[3]]], "x": [[[1]]]})
    for found in (tasks.read_split(tmp_path, "evaluation"), tasks.read_tasks(tmp_path, "evaluation"),
                  tasks.read_tasks(file)):  # fmt: skip
        assert list(found) == ["a", "b"]
        assert [answer.tolist() for _, answer in found["a"]["test"]] == [[[1, 2]], [[3]]]
        assert [answer for _, answer in found["b"]["test"]] == [None, None]
    assert [answer for _, answer in tasks.read_split(tmp_path, "test")["c"]["test"]] == [None, None]
    put(solutions, {"a": [[[1, 2]]]})
    for path, words in ((tmp_path, "solutions.json: a must be a list of 2 grids"), (solutions, "not a folder"),
                        (tmp_path / "no", "there is no .*no .looked for"), (ROOT, "no arc-agi_evaluation_ch")):
        with pytest.raises(UserError, match=words):
            tasks.read_split(path, "evaluation")


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that tell capitals and are not UTF-8")
def test_names_of_task_files(tmp_path):
    for name in ("one.JSON", "two.json", ".three.json"):
        put(tmp_path / "training" / name, TASK)
    assert list(tasks.read_split(tmp_path, "training")) == ["one", "two"]
    for name, words in (("two.JSON", "two.json: two.JSON has the same name"), ("\udcff.json", "not UTF-8; rename it")):
        file = put(tmp_path / "training" / name, TASK)
        with pytest.raises(UserError, match=words):
            tasks.read_tasks(tmp_path / "training")
        file.unlink()


def test_a_hundred_shards_with_few_file_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(100):
        put(tmp_path / f"t_train_{i:06d}.{'bin' if i % 2 else 'npy'}", (bin_shard if i % 2 else npy)(TOKENS + i))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        found = [shards.read_shard(file) for file in shards.shard_files(tmp_path, "train")]
        assert [int(shard[3]) for shard in found] == [i + 3 for i in range(100)]
        with contextlib.ExitStack() as held, pytest.raises(UserError, match="ulimit -n"):
            for _ in range(64):
                held.enter_context(open(os.devnull))
                shards.read_shard(tmp_path / "t_train_000000.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_only_the_shards_that_are_finished_and_asked_for(tmp_path):
    names = ["text_train_000001.npy", "text_train_000002.npy", "text_val_000000.npy"]
    for name in [*names, "text_train_000003.npy", ".text_train_000004.npy"]:
        put(tmp_path / name, npy(TOKENS))

    def found(*more):
        return [f.name for f in shards.shard_files(tmp_path, "train", *more)]

    assert found() == [*names[:2], "text_train_000003.npy"]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "complete": False}
    three = [{"name": name, "bytes": 208} for name in names]
    put(tmp_path / "meta.json", meta | {"shards": three})  # data/prepare.py has not entered the fourth yet
    assert found() == names[:2] and found(names[:1]) == names[:1]
    with pytest.raises(UserError, match="000003.npy: missing, but the run was started with it"):
        found(["text_train_000003.npy"])
    put(tmp_path / names[0], b"")
    for listed, words in ((three, "000001.npy: missing, or not the 208 bytes"), ([], "no training shards"),
                          ([{"name": "../x.npy", "bytes": 208}], "meta.json: does not describe shards")):  # fmt: skip
        put(tmp_path / "meta.json", meta | {"shards": listed})
        with pytest.raises(UserError, match=words):
            found()


def test_a_shard_that_is_cut_off_while_it_is_used_is_named(tmp_path):
    shard = shards.read_shard(file := put(tmp_path / "x.npy", npy(TOKENS)))
    for spoil in (lambda: put(file, npy(TOKENS)[:-8]), file.unlink):
        spoil()
        with pytest.raises(UserError, match="x.npy: cannot be read any more"):
            shard[:4]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError) as caught, files.replacing(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path) and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(UserError), files.replacing(path, check=files.read_json) as file:
        file.write(b"{")
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


SCRIPT = """
import sys
from data.files import UserError, run_script
def work():
    if "stdin" in sys.argv: print(repr(sys.stdin.read()))
    for i in range(3000 if "many" in sys.argv else 1): print("東京 \\u2019 \\udcff")
    print("note 東京", file=sys.stderr)
    if "user" in sys.argv: raise UserError("a.json: 東京\\nb.json: bad")
sys.exit(run_script("p.py", work, output="output" in sys.argv))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell and /dev/full")
@pytest.mark.parametrize("line, code, said", [
    *((f"PYTHONIOENCODING={name} p user", 2, "p.py: b.json: bad\n") for name in ("ascii:strict", "cp1252", "gbk")),
    ("p user 2>&-", 2, ""), ("p user >&-", 2, "b.json"), ("p >&- 2>&- <&-", 0, ""), ("p stdin <&-", 0, ""),
    ("p 2>/dev/full", 0, ""), ("p 1</dev/null", 2, "standard output: "), ("p >/dev/full", 2, "No space left"),
    ("p many output >/dev/full", 2, "No space left"), ("p many | head -1; exit ${PIPESTATUS[0]}", 0, "note"),
    ("p many output | head -1; exit ${PIPESTATUS[0]}", 0, "")])  # fmt: skip
def test_no_stream_ends_a_program_with_a_traceback(line, code, said):
    """Whatever a stream cannot take, whether it is closed, and where nobody reads it any more."""
    env = os.environ | {"SCRIPT": SCRIPT, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f'p() {{ "$PYTHON" -c "$SCRIPT" "$@"; }}; {line}']
    done = subprocess.run(command, capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=100)
    err = done.stderr.decode("ascii", "backslashreplace")
    assert done.returncode == code and said in err and "Traceback" not in err and "Exception ignored" not in err, err


@pytest.mark.parametrize("end, code, line", [
    (None, 0, ""), (0, 0, ""), (3, 3, ""),
    (UserError("x.json: bad"), 2, "x.json: bad"), (KeyboardInterrupt(), 130, "stopped"),
    (KeyboardInterrupt("stopped; all is safe"), 130, "stopped; all is safe"),
    (MemoryError(), 2, "out of memory; buy some"), (OSError(28, "No space left", "/x"), 2, "/x: No space left"),
    (RuntimeError("CUDA out of memory. Tried\nto"), 2, "out of memory (CUDA out of memory. Tried); buy some"),
    (RuntimeError("x: CUBLAS_STATUS_ALLOC_FAILED"), 2, "out of memory (x: CUBLAS_STATUS_ALLOC_FAILED); buy some"),
    (OSError(12, "Cannot allocate memory"), 2, "out of memory (Cannot allocate memory); buy some"),
    (FileNotFoundError(2, "No such file or directory"), 2, "the current folder: No such file or directory"),
    (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe")])  # fmt: skip
def test_every_ending_is_at_most_one_line_and_a_code(end, code, line, capsys):
    assert run_script("p.py", Mock(side_effect=[end]), "buy some") == code
    assert capsys.readouterr() == ("", f"p.py: {line}\n" if line else "")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("out of memory"), RecursionError()])
def test_what_is_a_bug_is_not_hidden(error):
    streams = sys.stdin, sys.stdout, sys.stderr
    with pytest.raises(type(error)):
        run_script("p.py", Mock(side_effect=[error]))
    assert (sys.stdin, sys.stdout, sys.stderr) == streams


def test_another_package_of_our_name_does_not_take_our_place(tmp_path):
    for name in ("data", "arc_data"):
        put(tmp_path / name / "__init__.py", b"")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "data" / "prepare.py", "--help"]
    assert subprocess.run(command, capture_output=True, env=env, cwd=tmp_path).returncode == 0
