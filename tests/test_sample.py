"""Continuing a prompt: which tokens may be drawn, what is printed when, and one clear line for what cannot work.

Models here are random and speak bytes, so nothing is downloaded; the command itself is what runs.
"""

import functools
import io
import itertools
import json
import re
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    complaint,
    exit_code,
    make_quick,
    one_thread,  # noqa: F401
    python,
    run,
    runtime,
    tiny_config,
    tiny_model,
    write_text,
)
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


command = functools.partial(exit_code, sample)
refused = functools.partial(complaint, sample)


def printed(capsys, *argv) -> str:
    """What sample.py prints with these arguments, on the CPU."""
    capsys.readouterr()
    assert command(*argv, "--device", "cpu") == 0
    return capsys.readouterr().out


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation among bytes and end-of-text, each token from a whole pass over the text so far."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and END not in tokens[len(prompt) :]:
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1, : END + 1].argmax()))
    return tokens[len(prompt) :]


def continued(model, prompt: bytes, count: int) -> str:
    """The prompt with that continuation, as it is printed."""
    tokens = greedy(model, list(prompt) or [END], count)
    return (prompt + bytes(t for t in tokens if t != END)).decode("utf-8", "replace") + "\n"


# == WHICH TOKENS MAY BE DRAWN ========================================================================================


def test_likely_tokens_by_hand():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.3, 0.2]])

    def kept(**limits):
        return [row.nonzero()[:, 0].tolist() for row in sample.keep_likely(p.log(), **limits).exp()]

    assert kept() == [[0, 1, 2, 3]] * 2
    assert kept(top_k=2) == [[1, 3], [0, 1, 2]]  # two are equally the second likeliest
    assert kept(top_p=0.5) == [[1], [0, 2]] and kept(top_p=1e-9) == [[1], [2]]
    assert kept(top_k=2, top_p=0.6) == [[1], [0, 2]]  # 0.5 of the 0.75 that top_k leaves is more than 0.6


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
    assert set(sample.chooser(4, 2.0, 2, 1.0, 3)(logp).tolist()) == {2, 3}
    for temperature, top_p in ((0, 1.0), (1e-40, 1.0), (5e-324, 1.0), (2.0, 0.3)):
        assert sample.chooser(4, temperature, 0, top_p, 3)(logp).unique().tolist() == [3]


@given(st.floats(0, 1e9, allow_subnormal=True), st.integers(0, 9), st.floats(1e-9, 1),
       st.lists(st.floats(-1e5, 1e5) | st.just(-np.inf), min_size=7, max_size=7))
def test_any_limits_draw_one_of_the_tokens(temperature, top_k, top_p, logits):
    logp = torch.tensor([logits]).log_softmax(-1)
    token = sample.chooser(5, temperature, top_k, top_p, 0)(logp)
    assert token.shape == (1,) and 0 <= token < 5


# == WHAT IS PRINTED ==================================================================================================


@pytest.mark.parametrize("prompt, average", [("ROMEO: ", False), ("é", True), ("", False)])
def test_greedy_continuation(tmp_path, capsys, prompt, average):
    """The text is that of whole passes, by the averaged weights where the run keeps them."""
    model = make_run(tmp_path, average=average)
    assert command(tmp_path, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out == continued(model, prompt.encode(), 20)
    assert f"{'averaged ' * average}weights of step 7" in err and "bytes, named in" in err
    assert len(re.findall(r"^(?:prompt|new) +\d+ tokens in [\d.]+ s, [\d,]+ tokens/s$", err, re.M)) == 2


def test_samples_stand_one_after_another(tmp_path, capsys):
    make_run(tmp_path)
    flags = "--prompt Go --num-samples 3 --temperature 1 --max-new-tokens 8".split()
    one, same, other, likeliest = (printed(capsys, tmp_path, *flags, *more)
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

    def stream(model, tokens, lengths, max_new_tokens, stop, choose):
        assert len(tokens) == len(rows) == len(lengths) and stop == END
        for said in itertools.zip_longest(*rows):
            going = [i for i, token in enumerate(said) if token is not None]
            yield torch.tensor(going), torch.tensor([said[i] for i in going]), torch.zeros(len(going))

    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    monkeypatch.setattr(sample, "stream", stream)
    args = types.SimpleNamespace(num_samples=len(rows), max_new_tokens=99, temperature=0, top_k=0, top_p=1, seed=0)
    sample.write(None, load_tokenizer("bytes"), "> ", [62, 32], args, runtime())
    return recorder


def test_text_streams_and_half_characters_wait(monkeypatch):
    recorder = say(monkeypatch, [*"a€".encode(), 0xE2, 0x82, ord("b"), END])
    assert recorder.seen == ("> ", "> a", "> a", "> a", "> a€", "> a€", "> a€", "> a€\ufffdb", "> a€\ufffdb",
                             "> a€\ufffdb\n")
    assert say(monkeypatch, [ord("a"), 0xE2]).getvalue() == "> a\ufffd\n"
    rows = say(monkeypatch, [*"é".encode(), END], [0xC3], [END], [*b"hello", END]).getvalue()
    assert rows == f"\n{sample.RULE}\n".join(["> é", "> \ufffd", "> ", "> hello"]) + "\n"


@pytest.mark.parametrize("given", ([], ["--prompt", "-"]))
def test_prompt_from_standard_input(tmp_path, capsys, monkeypatch, given):
    make_run(tmp_path)
    flags = ["--max-new-tokens", 5, "--temperature", 0]
    for text, prompt in ((b"\xef\xbb\xbftwo\r\nlines\r\n", "two\nlines"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert printed(capsys, tmp_path, *given, *flags) == printed(capsys, tmp_path, "--prompt", prompt, *flags)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "standard input is not UTF-8" in refused(capsys, tmp_path, *given, *flags)
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed; give --prompt" in refused(capsys, tmp_path, *given, *flags)


@pytest.mark.parametrize("pattern, prompt, new, notes", [
    ("MAMA", "to be, or not to be, ", 12, 1), ("MMMM", "to be, or not to be, ", 12, 0), ("MAMA", "short", 11, 0)])
def test_prompts_longer_than_the_block_size(tmp_path, capsys, pattern, prompt, new, notes):
    """They work, as whole passes do; where there is attention, one line says that it was not trained for that."""
    model = make_run(tmp_path, pattern, block_size=16)
    assert command(tmp_path, "--prompt", prompt, "--temperature", 0, "--device", "cpu", "--max-new-tokens", new) == 0
    out, err = capsys.readouterr()
    assert out == continued(model, prompt.encode(), new)
    assert err.count("beyond the block size of 16") == notes


@pytest.mark.parametrize("prompt, last_document, ids", [
    ("a<|endoftext|>b", False, [97, END, 98]), ("", False, [END]),
    ("a<|endoftext|>b<|endoftext|>cd", True, [END, 99, 100]), ("cd", True, [99, 100])])
def test_end_of_text_in_a_prompt_begins_a_document(prompt, last_document, ids):
    assert sample.encode_prompt(load_tokenizer("bytes"), prompt, last_document) == ids


def test_a_model_that_resets_at_documents_sees_the_last_one_only(tmp_path, capsys):
    """Which is what its whole pass over both documents says, and not what a model without resets says."""
    model = make_run(tmp_path, document_token=END)
    tokens, new = [*b"first", END, *b"second"], ["--temperature", 0, "--max-new-tokens", 9]
    expected = greedy(model, tokens, 9)
    model.config.document_token = -1
    assert greedy(model, tokens, 9) != expected
    said = printed(capsys, tmp_path, "--prompt", "first<|endoftext|>second", *new)
    assert said == "first<|endoftext|>second" + bytes(expected).decode("utf-8", "replace") + "\n"


def test_a_run_of_train(tmp_path, capsys, monkeypatch):
    """Whatever train.py leaves, this reads: a short run that has learned to count."""
    make_quick(monkeypatch)
    monkeypatch.setitem(train.PRESETS["fineweb"]["nano"], "vocab_size", 260)
    data, folder = write_text(tmp_path / "data", top=100), tmp_path / "run"
    sizes = ["--batch-size", 8, "--block-size", 64, "--max-steps", 60]
    assert run("--dataset", "fineweb", "--data-dir", data, "--out-dir", folder, *TINY, *sizes) == 0
    capsys.readouterr()
    prompt = bytes(range(48, 58)).decode()  # 0123456789
    assert command(folder, "--tokenizer", "bytes", "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 12) == 0
    out, err = capsys.readouterr()
    assert "weights of step 60" in err and "bytes, named by --tokenizer" in err
    steps = np.diff(list(out.removesuffix("\n").encode()))
    assert out.startswith(prompt) and set(steps.tolist()) <= {1, 2}, "the text goes up by one or two"


# == WHAT CANNOT WORK =================================================================================================


def test_what_is_no_text_run(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, tmp_path, "--prompt", "a")
    make_run(tmp_path / "arc", grid=True, vocab_size=train.ARC_VOCAB, tie_embeddings=False)
    line = refused(capsys, tmp_path / "arc", "--prompt", "a")
    assert "ARC" in line and f"python solve.py {tmp_path / 'arc'}" in line
    make_run(tmp_path / "text")
    (tmp_path / "text" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "checkpoint.pt: not a readable checkpoint" in refused(capsys, tmp_path / "text", "--prompt", "a")


def test_wrong_flags(tmp_path, capsys):
    """Numbers out of range are named together."""
    make_run(tmp_path)
    assert "--kernels triton" in refused(capsys, tmp_path, "--prompt", "a", "--kernels", "triton", "--device", "cpu")
    flags = "--num-samples 0 --max-new-tokens 99999999999 --temperature nan --top-k -1 --top-p 1.1 --seed -1".split()
    form = r"sample.py: --[\w-]+ is \S+; it must be from \S+ to \S+"
    err = refused(capsys, tmp_path, "--prompt", "a", *flags, lines=6)
    assert all(re.fullmatch(form, line) for line in err.splitlines())


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


# == IN A PROCESS OF ITS OWN ==========================================================================================


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and pipes")
@pytest.mark.parametrize("event", ("ctrl-c", "reader gone"))
def test_stopping(tmp_path, event, monkeypatch):
    """Ctrl-C ends with one line and 130; a reader that has seen enough, such as `head`, ends it quietly.

    Variables of a cluster's shell, which name processes that are not there, do not matter.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
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
