"""Reading of files: whatever they hold, it is read, or refused with a UserError; and how a script ends."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arc_data import tasks
from arc_data.prepare import read_extra
from data import files, prepare, shards
from data.files import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
TASK = {"train": [{"input": [[1, 2], [3, 4]], "output": [[4]]}, {"input": [[5]], "output": [[5]]}],
        "test": [{"input": [[5]], "output": [[6, 7]]}]}  # fmt: skip
META = prepare.new_meta("x", None, [{"name": "a.txt", "bytes": 9, "start": "0"}], "bytes", shard_tokens=9,
                        val_tokens=None) | {"shards": [
    {"name": "text_val_000000.npy", "split": "val", "tokens": 4, "documents": 1, "bytes": 136, "sha256": "0",
     "next": {"file": 0, "at": 0, "inside": False, "skip": 4}}]}  # fmt: skip
fuzz = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                        st.sampled_from(["train", "test", "input", "output", "shards", "name", "bytes"]), inner),
                    max_leaves=12)  # fmt: skip


@st.composite
def changed(draw, value):
    """Parsed JSON with one of its parts replaced or left out."""
    if draw(st.booleans()) and isinstance(value, (dict, list)) and value:
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        if draw(st.booleans()):
            items[key] = draw(changed(items[key]))
        else:
            del items[key]
        return items if isinstance(value, dict) else list(items.values())
    return draw(JSON)


def spoiled(data: bytes):
    """The bytes of a real file, cut short, with some of them replaced, or any bytes at all."""
    some = st.tuples(st.integers(0, len(data)), st.binary(max_size=6), st.integers(0, 6))
    return st.binary(max_size=300) | st.integers(0, len(data)).map(lambda n: data[:n]) | some.map(
        lambda x: data[: x[0]] + x[1] + data[x[0] + x[2] :])  # fmt: skip


def json_files(value):
    """Files that hold this JSON, the same with a part of it changed, any JSON, or no JSON."""
    return changed(value).map(lambda v: json.dumps(v).encode()) | spoiled(json.dumps(value).encode())


def reads(read, *arguments) -> None:
    """What is to be shown of every reader: it returns, or raises a UserError of one line, and nothing else."""
    try:
        read(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# == READERS ==========================================================================================================


@fuzz
@given(data=json_files(TASK))
@example(data=b"[" * 100_000)
@example(data=b"1" * 5000)
@example(data=b"\xff\xfe\x00")
@example(data=b'{"train": [{"input": [[true]], "output": [[1]]}], "test": [{"input": [[1e0]]}]}')
def test_any_task_file_is_read_or_refused(data, folder):
    file = folder / "task.json"
    file.write_bytes(data)
    reads(tasks.read_task, file)
    reads(tasks.read_tasks, folder)
    reads(read_extra, file, 3)


@fuzz
@given(challenges=json_files({"a": TASK, "b": TASK}), solutions=json_files({"a": [[[6, 7]]], "b": [[[1]]]}))
@example(challenges=json.dumps({"../a": TASK}).encode(), solutions=b"{}")
@example(challenges=json.dumps({"\ud800": TASK}).encode(), solutions=b"{}")
def test_any_combined_file_is_read_or_refused(challenges, solutions, folder):
    (folder / "k").mkdir(exist_ok=True)
    for data, name in ((challenges, "challenges"), (solutions, "solutions")):
        (folder / "k" / f"arc-agi_test_{name}.json").write_bytes(data)
    reads(tasks.read_split, folder / "k", "test")
    reads(tasks.read_tasks, folder / "k" / "arc-agi_test_challenges.json")


def npy(tokens: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


def bin_shard(tokens: np.ndarray, length: int) -> bytes:
    return np.array([shards.MAGIC, 1, length, *[0] * 253], "<i4").tobytes() + tokens.astype("<u2").tobytes()


TOKENS = np.arange(40, dtype=np.uint16)


@fuzz
@given(data=spoiled(npy(TOKENS)) | spoiled(bin_shard(TOKENS, 40)), ending=st.sampled_from([".npy", ".bin", ".NPY"]))
@example(data=bin_shard(TOKENS, -1), ending=".bin")
@example(data=bin_shard(TOKENS, 41), ending=".bin")
@example(data=npy(TOKENS.astype(">u2")), ending=".npy")
@example(data=npy(TOKENS.reshape(5, 8)), ending=".npy")
@example(data=npy(TOKENS.astype(object)), ending=".npy")
@example(data=npy(TOKENS)[:-1], ending=".npy")
@example(data=npy(TOKENS).replace(b"(40,)", b"(-4,)"), ending=".npy")
def test_any_shard_is_read_or_refused(data, ending, folder):
    file = folder / f"shard{ending}"
    file.write_bytes(data)

    def read() -> None:
        shard = shards.read_shard(file)
        assert len(shard[:]) == len(shard) and len(np.asarray(shard)[1:3]) == len(shard[1:3])

    reads(read)


@fuzz
@given(data=json_files(META))
@example(data=json.dumps(META | {"shards": [META["shards"][0] | {"name": "../x"}]}).encode())
@example(data=json.dumps(META | {"shards": [META["shards"][0] | {"name": "a\0b"}]}).encode())
@example(data=json.dumps(META | {"shards": [META["shards"][0] | {"next": 3}]}).encode())
def test_any_meta_json_is_read_or_refused(data, folder):
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "meta.json").write_bytes(data)
    (folder / "m" / "text_val_000000.npy").write_bytes(npy(TOKENS[:4]))
    (folder / "m" / "a.txt").write_text("some text", encoding="utf-8")
    for read in (shards.read_meta, prepare.read_begun):
        reads(read, folder / "m")
    reads(shards.shard_files, folder / "m", "val")


@pytest.mark.parametrize("name", ["", "gpt9", "\udcff", "x" * 999])
def test_any_other_name_of_a_tokenizer(name):
    with pytest.raises(UserError, match="gpt2, bytes"):
        shards.load_tokenizer(name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-32-be"])
def test_json_in_every_encoding(encoding, tmp_path):
    (tmp_path / "x.json").write_bytes(json.dumps({"é": "東"}, ensure_ascii=False).encode(encoding))
    assert files.read_json(tmp_path / "x.json") == {"é": "東"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("read", [shards.read_shard, files.read_json])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="x.json: .*not an ordinary file"):
        read(tmp_path / "x.json")


def test_links_are_followed_once_and_nothing_is_left_out_in_silence(tmp_path):
    for name in ("in/a.txt", "in/sub/b.txt", "in/.hidden/c.txt", "elsewhere/d.txt", "in/sub/e.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, target in (("in/sub/up", ".."), ("in/z", "../elsewhere"), ("in/zz", "z"), ("elsewhere/back", "../in")):
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    found = files.files_below(tmp_path / "in", lambda name: name.endswith(".txt"))
    assert [f.relative_to(tmp_path / "in").as_posix() for f in found] == ["a.txt", "sub/b.txt", "z/d.txt"]
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone.txt: a broken link"):
        files.files_below(tmp_path / "in", lambda name: name.endswith(".txt"))


# == LAYOUTS OF TASKS =================================================================================================


def put(file: Path, value: object, mark: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(mark + json.dumps(value), encoding="utf-8")
    return file


def test_kaggle_s_files_are_a_folder_of_tasks(tmp_path):
    hidden = {**TASK, "test": [{"input": [[5]]}, {"input": [[0]]}]}
    put(tmp_path / "arc-agi_evaluation_challenges.json", {"b": hidden, "a": hidden})
    put(tmp_path / "arc-agi_test_challenges.json", {"c": hidden})
    solutions = put(tmp_path / "arc-agi_evaluation_solutions.json", {"a": [[[1, 2]], [[3]]], "x": [[[1]]]})
    found = tasks.read_split(tmp_path, "evaluation")
    assert list(found) == ["a", "b"] and tasks.read_tasks(tmp_path, "evaluation").keys() == found.keys()
    assert [answer.tolist() for _, answer in found["a"]["test"]] == [[[1, 2]], [[3]]]
    assert [answer for _, answer in found["b"]["test"]] == [None, None]
    assert [answer for _, answer in tasks.read_split(tmp_path, "test")["c"]["test"]] == [None, None]
    assert tasks.read_tasks(tmp_path / "arc-agi_evaluation_challenges.json").keys() == found.keys()
    put(solutions, {"a": [[[1, 2]]]})
    with pytest.raises(UserError, match=r"solutions.json: a must be a list of 2 grids"):
        tasks.read_split(tmp_path, "evaluation")


def test_endings_in_capitals_and_byte_order_marks(tmp_path):
    put(tmp_path / "training" / "one.JSON", TASK, mark="\ufeff")
    put(tmp_path / "training" / "two.json", TASK)
    put(tmp_path / "training" / ".three.json", "hidden")
    assert list(tasks.read_split(tmp_path, "training")) == ["one", "two"]
    assert list(tasks.read_tasks(tmp_path / "training")) == ["one", "two"]


@pytest.mark.parametrize("path, words", [
    ("missing", "there is no .*missing .looked for from"), ("a.txt", "a.txt/training: not a folder"),
    ("empty", "no arc-agi_training_challenges.json in .*empty")])
def test_a_folder_without_tasks_says_what_was_looked_for(path, words, tmp_path):
    put(tmp_path / "a.txt", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        tasks.read_split(tmp_path / path, "training")


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that tell capitals and are not UTF-8")
@pytest.mark.parametrize("names, words", [(["x.json", "x.JSON"], "x.json: x.JSON has the same name"),
                                          (["\udcff.json"], "is not UTF-8; rename it")])  # fmt: skip
def test_a_name_that_cannot_be_used_is_refused(names, words, tmp_path):
    for name in names:
        put(tmp_path / name, TASK)
    with pytest.raises(UserError, match=words):
        tasks.read_tasks(tmp_path)


# == SHARDS ===========================================================================================================


def test_three_hundred_shards_with_few_file_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(300):
        (tmp_path / f"t_train_{i:06d}.{'npy' if i % 2 else 'bin'}").write_bytes(
            npy(TOKENS + i) if i % 2 else bin_shard(TOKENS + i, 40))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        found = [shards.read_shard(file) for file in shards.shard_files(tmp_path, "train")]
        assert [int(shard[3]) for shard in found] == [i + 3 for i in range(300)]
        with contextlib.ExitStack() as held, pytest.raises(UserError, match="ulimit -n"):
            for _ in range(64):
                held.enter_context(open(os.devnull))
                shards.read_shard(tmp_path / "t_train_000001.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_only_the_shards_that_are_finished_and_asked_for(tmp_path):
    names = ["text_train_000001.npy", "text_train_000002.npy", "text_val_000000.npy"]
    listed = [{"name": name, "bytes": len(npy(TOKENS))} for name in names]
    for name in [*names, "text_train_000003.npy", ".text_train_000004.npy"]:
        (tmp_path / name).write_bytes(npy(TOKENS))
    found = lambda *more: [f.name for f in shards.shard_files(tmp_path, "train", *more)]  # noqa: E731
    assert found() == ["text_train_000001.npy", "text_train_000002.npy", "text_train_000003.npy"]
    meta = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "complete": False, "shards": listed}
    put(tmp_path / "meta.json", meta)  # data/prepare.py has not entered the third yet
    assert found() == names[:2] and found(names[:1]) == names[:1]
    with pytest.raises(UserError, match="000003.npy: missing, but the run was started with it"):
        found(["text_train_000003.npy"])
    (tmp_path / names[0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"000001.npy: missing, or not the 208 bytes"):
        found()
    put(tmp_path / "meta.json", meta | {"shards": []})
    with pytest.raises(UserError, match="no training shards"):
        found()
    put(tmp_path / "meta.json", meta | {"shards": [{"name": "../x.npy", "bytes": 208}]})
    with pytest.raises(UserError, match="meta.json: does not describe shards"):
        found()


def test_a_shard_that_is_cut_off_while_it_is_used_is_named(tmp_path):
    file = tmp_path / "x.npy"
    file.write_bytes(npy(TOKENS))
    shard = shards.read_shard(file)
    for spoil in (lambda: file.write_bytes(npy(TOKENS)[:-8]), file.unlink):
        spoil()
        with pytest.raises(UserError, match="x.npy: cannot be read any more"):
            shard[:4]


# == WRITING AND ENDING ===============================================================================================


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError) as caught, files.replacing(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path) and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(UserError), files.replacing(path, check=lambda p: files.read_json(p)) as file:
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


def shell(arguments: str, redirections: str = "", **env: str) -> tuple[int, str, str]:
    """What a script does: its exit code, stdout and stderr, both with escapes for what is not ASCII."""
    command = f'"{sys.executable}" -c "$SCRIPT" {arguments} {redirections}'
    env = os.environ | {"SCRIPT": SCRIPT, "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=100)
    return done.returncode, *(s.decode("ascii", "backslashreplace") for s in (done.stdout, done.stderr))


bash = pytest.mark.skipif(sys.platform == "win32", reason="needs bash")


@bash
@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252", "gbk", "utf-8"])
def test_no_console_s_encoding_ends_a_program(encoding):
    code, out, err = shell("user", PYTHONIOENCODING=encoding)
    assert code == 2 and out.count("\n") == 1 and "\\udcff" in out.replace("\\xed\\xb3\\xbf", "\\udcff")
    assert err.count("\n") == 3 and "p.py: a.json: " in err and err.endswith("p.py: b.json: bad\n")


@bash
@pytest.mark.parametrize("arguments, redirections, code, said", [
    ("user", "2>&-", 2, ""), ("user", ">&-", 2, "b.json"), ("x", ">&- 2>&- <&-", 0, ""), ("stdin", "<&-", 0, ""),
    ("x", "2>/dev/full", 0, ""), ("x", "1</dev/null", 2, "standard output: "), ("x", ">/dev/full", 2, "No space left"),
    ("many output", ">/dev/full", 2, "No space left"), ("many", "| head -1; exit ${PIPESTATUS[0]}", 0, "note"),
    ("many output", "| head -1; exit ${PIPESTATUS[0]}", 0, "")])  # fmt: skip
def test_a_closed_or_full_stream_ends_no_program_with_a_traceback(arguments, redirections, code, said):
    if "full" in redirections and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    found, _, err = shell(arguments, redirections)
    assert found == code and said in err and "Traceback" not in err and "Exception ignored" not in err, err


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("error, code, line", [
    (UserError("x.json: bad"), 2, "x.json: bad"), (KeyboardInterrupt(), 130, "stopped"),
    (KeyboardInterrupt("stopped; all is safe"), 130, "stopped; all is safe"),
    (MemoryError(), 2, "out of memory; buy some"), (OSError(28, "No space left", "/x"), 2, "/x: No space left"),
    (RuntimeError("CUDA out of memory. Tried\nto"), 2, "out of memory (CUDA out of memory. Tried); buy some"),
    (RuntimeError("x: CUBLAS_STATUS_ALLOC_FAILED"), 2, "out of memory (x: CUBLAS_STATUS_ALLOC_FAILED); buy some"),
    (OSError(12, "Cannot allocate memory"), 2, "out of memory (Cannot allocate memory); buy some"),
    (FileNotFoundError(2, "No such file or directory"), 2, "the current folder: No such file or directory"),
    (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe")])  # fmt: skip
def test_every_ending_is_one_line_and_a_code(error, code, line, capsys):
    assert run_script("p.py", raising(error), "buy some") == code
    assert capsys.readouterr() == ("", f"p.py: {line}\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("out of memory"), RecursionError()])
def test_what_is_a_bug_is_not_hidden(error):
    streams = sys.stdin, sys.stdout, sys.stderr
    with pytest.raises(type(error)):
        run_script("p.py", raising(error))
    assert (sys.stdin, sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (3, 3)])
def test_what_a_script_returns_is_its_code(returned, code):
    assert run_script("p.py", lambda: returned) == code


def test_another_package_of_our_name_does_not_take_our_place(tmp_path):
    for name in ("data", "arc_data"):
        put(tmp_path / name / "__init__.py", "")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "data" / "prepare.py", "--help"]
    assert subprocess.run(command, capture_output=True, env=env, cwd=tmp_path).returncode == 0
