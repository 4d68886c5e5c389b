"""Continuing a prompt: which tokens may be drawn, what is printed when, and one clear line for what cannot work.

Models here are random and speak bytes, so nothing is downloaded.
"""

import functools
import io
import itertools
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import ROOT, complaint, exit_code, one_thread, python, runtime, tiny_config, tiny_model  # noqa: F401
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


refused = functools.partial(complaint, sample)


def printed(capsys, *argv) -> tuple[str, str]:
    """What sample.py writes to standard output and to standard error, on the CPU."""
    capsys.readouterr()
    assert exit_code(sample, *argv, "--device", "cpu") == 0
    return capsys.readouterr()


@torch.no_grad()
def continued(model, prompt: str, count: int) -> str:
    """What should be printed: the likeliest among bytes and end-of-text, each from a whole pass over all before it."""
    tokens = load_tokenizer("bytes").encode(prompt, allowed_special="all") or [END]
    new = []
    while len(new) < count and END not in new:
        new.append(int(model(torch.tensor([tokens + new]))[0][0, -1, : END + 1].argmax()))
    return prompt + bytes(t for t in new if t != END).decode("utf-8", "replace") + "\n"


def test_likely_tokens_by_hand():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.3, 0.2]])

    def kept(**limits):
        return [row.nonzero()[:, 0].tolist() for row in sample.keep_likely(p.log(), **limits).exp()]

    assert kept() == [[0, 1, 2, 3]] * 2
    assert kept(top_k=2) == [[1, 3], [0, 1, 2]]  # two are equally the second likeliest
    assert kept(top_p=0.5) == [[1], [0, 2]] and kept(top_p=1e-9) == [[1], [2]]
    assert kept(top_k=2, top_p=0.6) == [[1], [0, 2]]  # 0.5 of the 0.75 that top_k leaves is more than 0.6


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])  # the last is no token of the tokenizer
    logp = logits.log_softmax(-1).expand(20_000, -1)
    for temperature in (0.5, 1.0, 2.0):
        tokens = sample.chooser(4, temperature, 0, 1.0, seed=3)(logp)
        share = torch.bincount(tokens, minlength=4) / len(tokens)
        torch.testing.assert_close(share, (logits[:4] / temperature).softmax(0), atol=0.015, rtol=0)
    choose, again, other = (sample.chooser(4, 1.0, 0, 1.0, seed) for seed in (3, 3, 4))
    first = choose(logp)
    assert torch.equal(first, again(logp)) and not torch.equal(first, other(logp))
    assert not torch.equal(first, choose(logp)), "every step draws anew"
    assert set(sample.chooser(4, 2.0, 2, 1.0, 3)(logp).tolist()) == {2, 3}
    for temperature, top_p in ((0, 1.0), (1e-40, 1.0), (5e-324, 1.0), (2.0, 0.3)):
        assert sample.chooser(4, temperature, 0, top_p, 3)(logp).unique().tolist() == [3]


@given(st.floats(0, 1e9, allow_subnormal=True), st.integers(0, 9), st.floats(1e-9, 1),
       st.lists(st.floats(-1e5, 1e5) | st.just(-np.inf), min_size=7, max_size=7))
def test_any_limits_draw_one_of_the_tokens(temperature, top_k, top_p, logits):
    logp = torch.tensor([logits]).log_softmax(-1)
    token = sample.chooser(5, temperature, top_k, top_p, 0)(logp)
    assert token.shape == (1,) and 0 <= token < 5


@pytest.mark.parametrize("prompt, changes, read, notes", [
    ("ROMEO: ", {}, 7, 0),
    ("é", {"average": True}, 2, 0),
    ("", {}, 1, 0),
    ("to be, or not to be, ", {"block_size": 16}, 21, 1),
    ("to be, or not to be, ", {"block_size": 16, "pattern": "MMMM"}, 21, 0),
    ("to be", {"block_size": 16}, 5, 0),
    ("first<|endoftext|>second", {}, 12, 0),
    ("1<|endoftext|>2<|endoftext|>third", {"document_token": END}, 6, 0),
])
def test_greedy_continuation_is_that_of_whole_passes(tmp_path, capsys, prompt, changes, read, notes):
    """By the averaged weights where the run keeps them; with a note where attention was not trained on such lengths.

    A model that resets at documents reads the last one only.
    """
    model = make_run(tmp_path, **changes)
    out, err = printed(capsys, tmp_path, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 11)
    assert out == continued(model, prompt, 11)
    assert f"{'averaged ' * ('average' in changes)}weights of step 7" in err and "bytes, named in" in err
    assert re.search(rf"(?m)^prompt      {read} tokens in [\d.]+ s, [\d,]+ tokens/s$", err)
    assert re.search(r"(?m)^new         \d+ tokens in [\d.]+ s, [\d,]+ tokens/s$", err)
    assert err.count("beyond the block size of 16") == notes


def test_samples_stand_one_after_another(tmp_path, capsys):
    make_run(tmp_path)
    flags = "--prompt Go --num-samples 3 --temperature 1 --max-new-tokens 8".split()
    one, same, other, likeliest = (printed(capsys, tmp_path, *flags, *more)[0]
                                   for more in ([], [], ["--seed", 1], ["--top-k", 1]))  # fmt: skip
    assert one == same != other
    for out, different in ((one, 3), (likeliest, 1)):
        texts = out.removesuffix("\n").split(f"\n{sample.RULE}\n")
        assert len(texts) == 3 and len(set(texts)) == different and all(t.startswith("Go") for t in texts)


class Recorder(io.StringIO):
    """Standard output that remembers what was there at every flush."""

    seen: tuple[str, ...] = ()

    def flush(self):
        self.seen += (self.getvalue(),)


def say(monkeypatch, *rows: list[int]) -> Recorder:
    """What is printed where a model says these tokens; a row leaves after its end-of-text."""
    steps = [[(i, token) for i, token in enumerate(said) if token is not None] for said in itertools.zip_longest(*rows)]
    stream = Mock(return_value=[(*torch.tensor(step).T, None) for step in steps])
    monkeypatch.setattr(sample, "stream", stream)
    monkeypatch.setattr(sys, "stdout", recorder := Recorder())
    args = SimpleNamespace(num_samples=len(rows), max_new_tokens=99, temperature=0, top_k=0, top_p=1, seed=0)
    sample.write(None, load_tokenizer("bytes"), "> ", [62, 32], args, runtime())
    _, tokens, lengths, most, stop, _ = stream.call_args.args
    assert len(tokens) == len(lengths) == len(rows) and (most, stop) == (99, END)
    return recorder


def test_text_streams_and_half_characters_wait(monkeypatch):
    recorder = say(monkeypatch, [*"a€".encode(), 0xE2, 0x82, ord("b"), END])
    texts = ["", "a", "a", "a", "a€", "a€", "a€", "a€\ufffdb", "a€\ufffdb", "a€\ufffdb\n"]
    assert recorder.seen == tuple(f"> {text}" for text in texts)
    assert say(monkeypatch, [ord("a"), 0xE2]).getvalue() == "> a\ufffd\n"
    rows = say(monkeypatch, [*"é".encode(), END], [0xC3], [END], [*b"hello", END]).getvalue()
    assert rows == f"\n{sample.RULE}\n".join(["> é", "> \ufffd", "> ", "> hello"]) + "\n"


def test_prompt_from_standard_input(tmp_path, capsys, monkeypatch):
    model = make_run(tmp_path)
    for flags in ([], ["--prompt", "-"]):
        for text, prompt in ((b"\xef\xbb\xbftwo\r\nlines\r\n\n", "two\nlines\n"), (b"", "")):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
            out, _ = printed(capsys, tmp_path, *flags, "--max-new-tokens", 3, "--temperature", 0)
            assert out == continued(model, prompt, 3)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
        assert "standard input is not UTF-8" in refused(capsys, tmp_path, *flags)
        monkeypatch.setattr(sys, "stdin", None)
        assert "standard input is closed; give --prompt" in refused(capsys, tmp_path, *flags)


def test_what_is_no_text_run(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, tmp_path, "--prompt", "a")
    make_run(tmp_path / "arc", grid=True, vocab_size=train.ARC_VOCAB, tie_embeddings=False)
    line = refused(capsys, tmp_path / "arc", "--prompt", "a")
    assert "ARC" in line and f"python solve.py {tmp_path / 'arc'}" in line


def test_numbers_out_of_range_are_named_together(tmp_path, capsys):
    flags = "--num-samples 0 --max-new-tokens 99999999999 --temperature nan --top-k -1 --top-p 1.1 --seed -1".split()
    err = refused(capsys, tmp_path, "--prompt", "a", *flags, lines=6)
    assert all(re.fullmatch(r"sample.py: --[\w-]+ is \S+; it must be from \S+ to \S+", s) for s in err.splitlines())


def test_the_data_name_the_tokenizer(tmp_path):
    cfg = train.TrainConfig(data_dir=str(tmp_path))
    assert sample.choose_tokenizer(None, train.ModelConfig(), cfg)[0] == "gpt2"
    for name in ("bytes", "gpt2"):
        (tmp_path / "meta.json").write_text(json.dumps({"source": "x", "tokenizer": name}))
        assert sample.choose_tokenizer(None, train.ModelConfig(), cfg)[0] == name
    named = sample.choose_tokenizer("bytes", tiny_config(vocab_size=257), cfg)
    assert named == ("bytes", "bytes, named by --tokenizer")
    with pytest.raises(UserError, match="has 257 tokens, the model only 256; .*--tokenizer"):
        sample.choose_tokenizer("bytes", tiny_config(vocab_size=256), cfg)
    for text in ("{", "[]", "{}", '{"tokenizer": "cl100k"}', '{"tokenizer": ["gpt2"]}'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json: "):
            sample.choose_tokenizer(None, train.ModelConfig(), cfg)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and pipes")
def test_stopping(tmp_path, monkeypatch):
    """Ctrl-C ends with one line and 130; a reader that has seen enough, such as `head`, ends it quietly.

    Variables of a cluster's shell, which name processes that are not there, do not matter.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    make_run(tmp_path, "MMMM")
    flags = ["--temperature", 0, "--max-new-tokens", 100_000, "--device", "cpu"]  # a text that goes on and on
    argv = [ROOT / "sample.py", tmp_path, "--prompt", "Once", *flags]
    stopped, unread = processes = [python(*argv, cwd=tmp_path, text=False) for _ in range(2)]
    assert all(process.stdout.read(20).startswith(b"Once") for process in processes)
    stopped.send_signal(signal.SIGINT)
    unread.stdout.close()
    said, unsaid = stopped.communicate(timeout=300)[1], unread.stderr.read()
    assert [process.wait(timeout=300) for process in processes] == [130, 0]
    assert said.endswith(b"\nsample.py: stopped\n") and b"Traceback" not in said + unsaid and b"rror" not in unsaid
    assert b"\nnew " not in said + unsaid, "neither made all its tokens"
