"""Answers from carried states and from drafts are those of passes over whole sequences, token for token."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import PATTERNS, one_thread, random_tasks, runtime, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from extras import decode, memory


def make_prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    """Prompts of different lengths, with different task tokens."""
    tasks = random_tasks(count, seed, pairs=(2, 4), largest=5)
    asked = [train.Task(t.name, [*t.pairs[:-1], (t.pairs[-1][0], None)]) for t in tasks]
    return [train.make_prompt(task, 512, {task.name: 16 + i % 4}) for i, task in enumerate(asked)]


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=5)
@given(st.integers(0, 10**6), st.integers(1, 25), st.sampled_from((train.END, -1)), st.integers(1, 3000),
       st.lists(st.lists(st.integers(0, 15), max_size=30), min_size=1, max_size=5))
def test_no_drafts_change_an_answer(pattern, packed, seed, most, stop, batch_tokens, drafts):
    """Any drafts, first guesses and right ones, for answers that end, and with `stop` -1 for such that never do."""
    model, prompts = tiny_model(pattern, True, document_token=16 if packed else -1), make_prompts(len(drafts), seed)
    tokens, logp = train.generate.plain(model, *decode.padded(prompts, "cpu"), most, stop)
    drafts = [np.array([t for t in draft if t != train.END], dtype=np.int64) for draft in drafts]
    right = [row[row != stop].numpy() for row in tokens]
    for given_ones in (drafts, right, list(map(decode.guess_answer, prompts))):
        new, total, passes = decode.draft_answers(model, prompts, given_ones, most, stop, batch_tokens)
        assert torch.equal(new[:, : tokens.shape[1]], tokens) and (new[:, tokens.shape[1] :] == stop).all()
        torch.testing.assert_close(total, logp, atol=1e-4, rtol=0)
        assert passes.max() <= (1 if given_ones is right else most)


def test_answers_that_nobody_waits_for_end(monkeypatch):
    """As threads that go on after a signal would otherwise, to the end of the last answer."""
    told, begun, pool = [], threading.Event(), ThreadPoolExecutor(2)

    def work(i):
        if i == 0:
            begun.wait(300)
            raise ValueError
        begun.set()
        told.append(memory.given_up.wait(300))

    monkeypatch.setattr(memory, "pool", lambda: pool)
    with pytest.raises(ValueError):
        list(memory.on_threads(work, [0, 1]))
    assert told == [True] and not memory.given_up.is_set()
    monkeypatch.setattr(memory.given_up, "is_set", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        decode.draft_answers(tiny_model("MA", True), make_prompts(1), [np.array([1])], 16, train.END)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", (dict(grid=True), dict(), dict(document_token=50)))
def test_one_token_at_a_time(pattern, kind):
    model = tiny_model(pattern, **kind)
    if model.config.grid:
        tokens, lengths = decode.padded(make_prompts(4), "cpu")
    else:
        tokens, lengths = torch.randint(0, 61, (4, 30)), torch.tensor([30, 12, 1, 29])
    for stop, choose in ((train.END, None), (-1, lambda logp: logp.topk(2)[1][:, 1])):
        new, total = decode.generate(model, tokens, lengths, 20, stop, choose)
        said, logp = train.generate.plain(model, tokens, lengths, 20, stop, choose)
        assert torch.equal(new, said) and (stop >= 0 or model.config.document_token < 0 or (said >= 50).any())
        torch.testing.assert_close(total, logp, atol=1e-4, rtol=1e-6)


def test_answer_prompts_is_a_twin(monkeypatch):
    monkeypatch.setattr(decode, "cores", lambda: 2)
    model, prompts, passes = tiny_model("MAMA", True), make_prompts(8), []
    with torch.no_grad():  # so that one of the answers is a grid
        model.head.weight[[train.IN, train.OUT, 14, 15]] = 0
        model.head.weight[:10] *= 0.5
        model.head.weight[[train.ROW, train.END]] *= 3
    wanted = train.answer_prompts.plain(model, prompts, runtime(), 20, 1)
    assert {grid is None for grid, _ in wanted} == {True, False}
    for drafts in (None, [np.array([3]), None, None, None, np.array([1, 10]), *[None] * 3]):
        found = decode.answer_prompts(model, prompts, runtime(), 20, 600, drafts, passes)
        for (one, a), (other, b) in zip(found, wanted, strict=True):
            assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))
            assert one is None or a == pytest.approx(b, abs=1e-4)
    assert len(passes) == 16 and decode.answer_prompts(model, [], runtime(), 20, 600) == []


def test_answers_are_scored_as_whole_sequences_are():
    model, prompts, rng = tiny_model("MAMA", True), make_prompts(5), np.random.default_rng(0)
    answers = [[np.append(rng.integers(0, 11, rng.integers(2, 9)), train.END) for _ in range(i % 4)] for i in range(5)]
    for batch_tokens in (1, 400, 1 << 15):
        found = decode.answer_logprobs(model, prompts, answers, runtime(), batch_tokens)
        for prompt, said, logprobs in zip(prompts, answers, found, strict=True):
            assert len(said) == len(logprobs)
            for answer, logprob in zip(said, logprobs, strict=True):
                whole = torch.from_numpy(np.concatenate([prompt, answer]))
                logp = model(whole[None, :-1])[0][0, len(prompt) - 1 :].log_softmax(-1)
                wanted = logp.gather(1, whole[len(prompt) :, None]).sum().item()
                assert logprob == pytest.approx(wanted, abs=1e-4)


def test_first_drafts():
    a, b, c = (np.full(shape, i, np.uint8) for i, shape in enumerate(((2, 3), (2, 3), (3, 2)), 1))

    def guess(*pairs):
        return decode.guess_answer(train.make_prompt(train.Task("t", list(pairs)), 512, {})).tolist()

    assert guess((a, b), (c, None)) == [3, 3, 10] * 3  # outputs as large as inputs: a copy of the test input
    assert guess((a, b), (b, c), (a, None)) == [3, 3, 10] * 3  # else the last output
    assert guess((a, c), (c, b), (a, None)) == [2, 2, 2, 10] * 2
