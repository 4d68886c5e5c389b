"""Continuing a prompt: which tokens may be drawn, what is printed when, and one clear line for what cannot work.

Models here are random and speak bytes, so nothing is downloaded; the command itself is what runs.
"""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, one_thread, python, run, runtime, tiny_config, tiny_model, write_text  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from data.files import UserError, write_json
from data.shards import load_tokenizer

END = 256  # of the bytes tokenizer


def make_run(folder: Path, pattern: str = "MAMA", tokenizer: str = "bytes", average: bool = False, **changes):
    """A run folder with a random text model of 300 tokens, as if trained for 7 steps; returns what should answer.

    With `average`, as earlier versions left it: an average of the weights, which answers, beside other weights.
    """
    changes = {"vocab_size": 300, "dropout": 0.5} | changes
    model, answers = tiny_model(pattern, **changes), tiny_model(pattern, seed=1, **changes)
    ema = {"n_averaged": torch.tensor(3)} | {f"module.{name}": w for name, w in answers.state_dict().items()}
    dataset = "arc" if changes.get("grid") else "fineweb"
    cfg = train.TrainConfig(dataset=dataset, preset="nano", data_dir=str(folder / "data"))
    config = {"model": vars(model.config), "train": vars(cfg)}
    (folder / "data").mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "data" / "meta.json", {"tokenizer": tokenizer})
    train.save_checkpoint(folder / "checkpoint.pt", {
        "model": model.state_dict(), "ema": ema if average else None, "optimizer": [], "step": 7, "minutes": 0.0,
        "skipped": 0, "rng": {"torch": torch.get_rng_state()}, "config": config,
        "loader": {"epoch": 0, "rows": 0, "effective": 1, "data": ""}})
    return answers if average else model


def command(*argv) -> int:
    """The exit code of `python sample.py` with these arguments, in this process."""
    try:
        return sample.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation among bytes and end-of-text, each token from a whole pass over the text so far."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and END not in tokens[len(prompt) :]:
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1, : END + 1].argmax()))
    return tokens[len(prompt) :]


def shown(prompt: bytes, tokens: list[int]) -> str:
    return (prompt + bytes(t for t in tokens if t != END)).decode("utf-8", "replace")


# == WHICH TOKENS MAY BE DRAWN ========================================================================================


def test_likely_tokens_by_hand():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.3, 0.2]])

    def kept(**limits):
        return [row.nonzero()[:, 0].tolist() for row in sample.keep_likely(p.log(), **limits).exp()]

    assert kept() == [[0, 1, 2, 3]] * 2
    assert kept(top_k=2) == [[1, 3], [0, 1, 2]]  # two are equally the second likeliest
    assert kept(top_k=1) == [[1], [2]] and kept(top_k=99) == kept()
    assert kept(top_p=0.5) == [[1], [0, 2]] and kept(top_p=0.51) == [[1, 3], [0, 2]]
    assert kept(top_p=1e-9) == [[1], [2]]
    assert kept(top_k=2, top_p=0.6) == [[1], [0, 2]]  # 0.5 of the 0.75 that top_k leaves is more than 0.6
    untouched = sample.keep_likely(p.log(), top_k=2)
    assert torch.equal(untouched[0, [1, 3]], p.log()[0, [1, 3]])


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.9), (40, 0.3), (200, 0.999)])
def test_likely_tokens_are_those_of_transformers(top_k, top_p):
    warp = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")
    logp = (3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    expected = warp.TopKLogitsWarper(top_k)(None, logp) if top_k else logp
    expected = warp.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(sample.keep_likely(logp, top_k, top_p), expected)


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])  # the last is no token of the tokenizer
    logp = logits.log_softmax(-1).expand(20_000, -1)
    for temperature in (0.5, 1.0, 2.0):
        tokens = sample.chooser(4, temperature, 0, 1.0, seed=3)(logp)
        share = torch.bincount(tokens, minlength=4) / len(tokens)
        torch.testing.assert_close(share, (logits[:4] / temperature).softmax(0), atol=0.015, rtol=0)
    again, other = (sample.chooser(4, 1.0, 0, 1.0, seed)(logp) for seed in (3, 4))
    assert torch.equal(again, sample.chooser(4, 1.0, 0, 1.0, 3)(logp)) and not torch.equal(again, other)
    choose = sample.chooser(4, 1.0, 0, 1.0, 3)
    assert not torch.equal(choose(logp), choose(logp)), "every step draws anew"
    assert sample.chooser(4, 0, 0, 1.0, 3)(logp).unique().tolist() == [3]
    assert set(sample.chooser(4, 2.0, 2, 1.0, 3)(logp).tolist()) == {2, 3}
    assert set(sample.chooser(4, 2.0, 0, 0.3, 3)(logp).tolist()) == {3}


@given(st.floats(0, 1e9, allow_subnormal=True), st.integers(0, 9), st.floats(1e-9, 1),
       st.lists(st.floats(-1e5, 1e5) | st.just(-np.inf), min_size=7, max_size=7))
def test_any_limits_draw_one_of_the_tokens(temperature, top_k, top_p, logits):
    logp = torch.tensor([logits]).log_softmax(-1)
    token = sample.chooser(5, temperature, top_k, top_p, 0)(logp)
    assert token.shape == (1,) and 0 <= token < 5


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_near_zero_is_zero(temperature):
    logp = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.equal(sample.chooser(40, temperature, 0, 1.0, 3)(logp), logp[:, :40].argmax(-1))


# == WHAT IS PRINTED ==================================================================================================


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("prompt", ("ROMEO: ", "é", ""))
def test_greedy_continuation(tmp_path, capsys, prompt, average):
    """The text is that of whole passes, by the averaged weights where the run keeps them."""
    model = make_run(tmp_path, average=average)
    assert command(tmp_path, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    with torch.no_grad():
        expected = greedy(model, list(prompt.encode()) or [END], 20)
    assert out == shown(prompt.encode(), expected) + "\n"
    assert f"{'averaged ' * average}weights of step 7" in err and "bytes, named in" in err
    assert re.search(r"^prompt +\d+ tokens in [\d.]+ s, [\d,]+ tokens/s$", err, re.M)
    assert re.search(rf"^new +{len(expected)} tokens in [\d.]+ s, [\d,]+ tokens/s$", err, re.M)


def test_samples_stand_one_after_another(tmp_path, capsys):
    make_run(tmp_path)
    flags = "--prompt Go --num-samples 3 --temperature 1 --max-new-tokens 8 --device cpu".split()
    outputs = []
    for more in ([], [], ["--seed", "1"]):
        assert command(tmp_path, *flags, *more) == 0
        outputs.append(capsys.readouterr().out)
    texts = outputs[0].removesuffix("\n").split(f"\n{sample.RULE}\n")
    assert len(texts) == 3 == len(set(texts)) and all(t.startswith("Go") for t in texts)
    assert outputs[0] == outputs[1] != outputs[2]
    assert command(tmp_path, *flags, "--top-k", 1) == 0  # the likeliest only
    texts = capsys.readouterr().out.removesuffix("\n").split(f"\n{sample.RULE}\n")
    assert len(set(texts)) == 1


class Recorder(io.StringIO):
    """Standard output that remembers what was there at every flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def speaker(*rows: list[int]):
    """A stand-in for `stream` with a model that says these tokens; a row leaves after its end-of-text."""
    def stream(model, tokens, lengths, max_new_tokens, stop, choose):
        assert len(tokens) == len(rows) == len(lengths) and stop == END
        for said in itertools.zip_longest(*rows):
            going = [i for i, token in enumerate(said) if token is not None]
            yield torch.tensor(going), torch.tensor([said[i] for i in going]), torch.zeros(len(going))

    return stream


def say(monkeypatch, *rows) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    args = types.SimpleNamespace(num_samples=len(rows), max_new_tokens=99, temperature=0, top_k=0, top_p=1, seed=0)
    monkeypatch.setattr(sample, "stream", speaker(*rows))
    sample.write(None, load_tokenizer("bytes"), "> ", [62, 32], args, runtime())
    return recorder


def test_text_streams_and_half_characters_wait(monkeypatch):
    recorder = say(monkeypatch, [*"a€".encode(), 0xE2, 0x82, ord("b"), END])
    assert recorder.seen == ["> ", "> a", "> a", "> a", "> a€", "> a€", "> a€", "> a€\ufffdb", "> a€\ufffdb",
                             "> a€\ufffdb\n"]


def test_text_that_ends_within_a_character(monkeypatch):
    assert say(monkeypatch, [ord("a"), 0xE2]).getvalue() == "> a\ufffd\n"
    assert say(monkeypatch, [ord("a"), 0xE2, END]).getvalue() == "> a\ufffd\n"
    rows = say(monkeypatch, [*"é".encode(), END], [0xC3], [END], [*b"hello", END]).getvalue()
    assert rows == f"\n{sample.RULE}\n".join(["> é", "> \ufffd", "> ", "> hello"]) + "\n"


@pytest.mark.parametrize("given", ([], ["--prompt", "-"]))
def test_prompt_from_standard_input(tmp_path, capsys, monkeypatch, given):
    make_run(tmp_path)
    flags = ["--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
    for text, prompt in ((b"Now\n", "Now"), (b"\xef\xbb\xbftwo\r\nlines\r\n", "two\nlines"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert command(tmp_path, *given, *flags) == 0
        out = capsys.readouterr().out
        assert command(tmp_path, "--prompt", prompt, *flags) == 0
        assert capsys.readouterr().out == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert command(tmp_path, *given, *flags) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_prompts_longer_than_the_block_size(tmp_path, capsys):
    """They work, as whole passes do; where there is attention, one line says that it was not trained for that."""
    prompt = "to be, or not to be, "
    for pattern, notes in (("MAMA", 1), ("MMMM", 0)):
        model = make_run(tmp_path / pattern, pattern, block_size=16)
        flags = ["--prompt", prompt, "--temperature", 0, "--device", "cpu", "--max-new-tokens"]
        assert command(tmp_path / pattern, *flags, 12) == 0
        out, err = capsys.readouterr()
        with torch.no_grad():
            assert out == shown(prompt.encode(), greedy(model, list(prompt.encode()), 12)) + "\n"
        assert err.count("beyond the block size of 16") == notes
    assert command(tmp_path / "MAMA", "--prompt", "short", "--max-new-tokens", 11, "--device", "cpu") == 0
    assert "block size" not in capsys.readouterr().err


def test_end_of_text_in_a_prompt_begins_a_document():
    encoding = load_tokenizer("bytes")
    assert sample.encode_prompt(encoding, "a<|endoftext|>b") == [97, END, 98]
    assert sample.encode_prompt(encoding, "") == [END]
    for text in ("a<|endoftext|>b<|endoftext|>cd", "<|endoftext|>cd"):
        assert sample.encode_prompt(encoding, text, last_document=True) == [END, 99, 100]
    assert sample.encode_prompt(encoding, "cd", last_document=True) == [99, 100]


def test_a_model_that_resets_at_documents_sees_the_last_one_only(tmp_path, capsys):
    """Which is what its whole pass over both documents says, and not what a model without resets says."""
    model = make_run(tmp_path, document_token=END)
    flags = ["--temperature", 0, "--max-new-tokens", 9, "--device", "cpu", "--prompt"]
    assert command(tmp_path, *flags, "first<|endoftext|>second") == 0
    with torch.no_grad():
        expected = greedy(model, [*b"first", END, *b"second"], 9)
        model.config.document_token = -1
        assert greedy(model, [*b"first", END, *b"second"], 9) != expected
    assert capsys.readouterr().out == shown(b"first<|endoftext|>second", expected) + "\n"


def test_a_run_of_train(tmp_path, capsys, monkeypatch):
    """Whatever train.py leaves, this reads: a short run that has learned to count."""
    monkeypatch.setitem(train.PRESETS["fineweb"]["nano"], "vocab_size", 260)
    data, folder = write_text(tmp_path / "data", top=100), tmp_path / "run"
    sizes = "--preset nano --pattern MA --d-model 32 --n-head 2 --d-state 8 --headdim 16 --d-ff 64 --block-size 64"
    flags = "--batch-size 8 --max-steps 60 --device cpu --eval-every 0 --save-every 0"
    assert run("--dataset", "fineweb", "--data-dir", data, "--out-dir", folder, *sizes.split(), *flags.split()) == 0
    capsys.readouterr()
    prompt = bytes(range(48, 58)).decode()  # 0123456789
    assert command(folder, "--tokenizer", "bytes", "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 12) == 0
    out, err = capsys.readouterr()
    assert "weights of step 60" in err and "bytes, named by --tokenizer" in err
    steps = np.diff(list(out.removesuffix("\n").encode()))
    assert out.startswith(prompt) and set(steps.tolist()) <= {1, 2}, "the text goes up by one or two"


# == WHAT CANNOT WORK =================================================================================================


def refused(capsys, *argv) -> str:
    """The one line that `sample.py` ends with."""
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("sample.py: "), err
    return err


def test_what_is_no_text_run(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, tmp_path, "--prompt", "a")
    make_run(tmp_path / "arc", grid=True, vocab_size=train.ARC_VOCAB, tie_embeddings=False)
    line = refused(capsys, tmp_path / "arc", "--prompt", "a")
    assert "ARC" in line and f"python solve.py {tmp_path / 'arc'}" in line
    make_run(tmp_path / "text")
    (tmp_path / "text" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "checkpoint.pt: not a readable checkpoint" in refused(capsys, tmp_path / "text", "--prompt", "a")
    make_run(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["model"]["d_ff"] = 40
    write_json(tmp_path / "other" / "config.json", config)
    assert "does not fit config.json" in refused(capsys, tmp_path / "other", "--prompt", "a")
    (tmp_path / "other" / "checkpoint.pt").unlink()
    assert "has no checkpoint.pt" in refused(capsys, tmp_path / "other", "--prompt", "a")


def test_numbers_out_of_range_are_named_together(tmp_path, capsys):
    make_run(tmp_path)
    flags = "--num-samples 0 --max-new-tokens 99999999999 --temperature nan --top-k -1 --top-p 0 --seed -1".split()
    assert command(tmp_path, "--prompt", "a", *flags) == 2
    lines, form = capsys.readouterr().err.splitlines(), r"sample.py: --[\w-]+ is \S+; it must be from \S+ to \S+"
    assert len(lines) == 6 and all(re.fullmatch(form, line) for line in lines)


@pytest.mark.parametrize("wrong", ["--top-p 1.1", "--top-k x", "--device tpu", "--number 3", "--seed 1e3",
                                   "--num-samples 100001", "--temperature inf", "--max-new-tokens 2000000000"])
def test_wrong_flags_are_one_line(tmp_path, capsys, wrong):
    make_run(tmp_path)
    assert command(tmp_path, "--prompt", "a", *wrong.split()) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and err.splitlines()[-1].startswith("sample.py: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", ["--device cuda", "--kernels triton"])
def test_without_a_gpu(tmp_path, capsys, flags):
    make_run(tmp_path)
    assert flags in refused(capsys, tmp_path, "--prompt", "a", *flags.split())


def test_the_data_name_the_tokenizer(tmp_path):
    cfg = train.TrainConfig(data_dir=str(tmp_path))
    assert sample.choose_tokenizer(None, train.ModelConfig(), cfg)[0] == "gpt2"
    for name in ("bytes", "gpt2"):
        (tmp_path / "meta.json").write_text(json.dumps({"source": "x", "tokenizer": name}))
        assert sample.choose_tokenizer(None, train.ModelConfig(), cfg)[0] == name
    assert sample.choose_tokenizer("bytes", tiny_config(vocab_size=257), cfg)[0] == "bytes"
    with pytest.raises(UserError, match="has 257 tokens, the model only 256; .*--tokenizer"):
        sample.choose_tokenizer("bytes", tiny_config(vocab_size=256), cfg)
    for text in ("{", "[]", "{}", '{"tokenizer": "cl100k"}', '{"tokenizer": ["gpt2"]}'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json: "):
            sample.choose_tokenizer(None, train.ModelConfig(), cfg)


def test_without_vocabulary_and_network_there_is_one_line_soon(tmp_path, capsys, monkeypatch):
    """A proxy that takes no connection stands for a machine without a network."""
    make_run(tmp_path / "run", tokenizer="gpt2", vocab_size=50304)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    registry = pytest.importorskip("tiktoken.registry")
    monkeypatch.setattr(registry, "ENCODINGS", {})
    start = time.monotonic()
    assert "TIKTOKEN_CACHE_DIR" in refused(capsys, tmp_path / "run", "--prompt", "a", "--device", "cpu")
    assert time.monotonic() - start < 30


# == IN A PROCESS OF ITS OWN ==========================================================================================


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals, pipes and a shell")


@posix
@pytest.mark.parametrize("event", ("ctrl-c", "reader gone"))
def test_stopping(tmp_path, event):
    """Ctrl-C ends with one line and 130; a reader that has seen enough, such as `head`, ends it quietly."""
    make_run(tmp_path, "MMMM")
    flags = ["--prompt", "On", "--max-new-tokens", 1_000_000, "--device", "cpu", "--tokenizer", "bytes"]
    process = python(ROOT / "sample.py", tmp_path, *flags, cwd=tmp_path, text=False)
    assert process.stdout.read(20).startswith(b"On")
    if event == "ctrl-c":
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130 and err.endswith(b"\nsample.py: stopped\n")
    else:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=300) == 0
    assert b"Traceback" not in err and b"rror" not in err


SHELL = [("<&-", "", 2, "sample.py: standard input is closed; give --prompt"),
         (">/dev/full", "--prompt a", 2, "sample.py: standard output: No space left on device"),
         (">&-", "--prompt a", 0, ""), ("2>&-", "--prompt a", 0, ""), ("2>/dev/full", "--prompt a", 0, ""),
         ("</dev/null", "", 0, ""), ("<.", "", 1, None)]


@posix
@pytest.mark.parametrize("streams, flags, code, line", SHELL, ids=[s[0] for s in SHELL])
def test_streams_that_are_closed_or_full(tmp_path, streams, flags, code, line):
    """Nobody else's variables matter either: those of a cluster's shell name processes that are not there."""
    if "full" in streams and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    make_run(tmp_path)
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "", "MPLBACKEND": "none"}
    command = f"{sys.executable} {ROOT / 'sample.py'} {tmp_path} {flags} --max-new-tokens 3 --device cpu {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if line is not None:
        told = [text for text in done.stderr.splitlines() if text.startswith("sample.py")]
        assert told == ([line] if line else []), done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "gbk"])
def test_a_console_that_lacks_characters(tmp_path, monkeypatch, encoding):
    make_run(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    flags = ["--prompt", "é 東 🏳", "--max-new-tokens", 1, "--device", "cpu"]
    process = python(ROOT / "sample.py", tmp_path, *flags, cwd=tmp_path, text=False)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.startswith("é 東 🏳".encode(encoding, "backslashreplace")), err
