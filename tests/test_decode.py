"""Answers from carried states and from drafts are those of passes over whole sequences, token for token."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import PATTERNS, one_thread, runtime, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from extras import decode, memory


def make_prompts(count: int, seed: int = 0, same_shapes: bool = False) -> list[np.ndarray]:
    """Prompts of different lengths, with task tokens or without."""
    rng, prompts = np.random.default_rng(seed), []
    for _ in range(count):
        pairs = []
        for _ in range(rng.integers(2, 5)):
            shapes = [rng.integers(1, 6, 2), rng.integers(1, 6, 2)]
            pairs.append([rng.integers(0, 10, shapes[i * (not same_shapes)]).astype(np.uint8) for i in range(2)])
        prompts.append(train.make_prompt(train.Task("t", pairs), 512, {"t": int(rng.integers(16, 20))}))
    return prompts


def plain(model, prompts, most, stop=train.END):
    """What train.generate says to each prompt, one by one: tokens (B, most), `stop` behind an end, and log-probs."""
    new, total = torch.full((len(prompts), most), stop), torch.zeros(len(prompts))
    for i, prompt in enumerate(prompts):
        one, length = torch.from_numpy(prompt)[None], torch.tensor([len(prompt)])
        said, logp = train.generate.plain(model, one, length, most, stop)
        new[i, : said.shape[1]], total[i] = said[0], logp[0]
    return new, total


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_drafts_change_no_answer(pattern, packed):
    model, prompts = tiny_model(pattern, True, document_token=16 if packed else -1), make_prompts(6)
    tokens, logp = plain(model, prompts, 16)
    right = [row[row != train.END].numpy() for row in tokens]
    guesses, wrong = list(map(decode.guess_answer, prompts)), [np.arange(40) % 11] * 6  # the last ones are too long
    for drafts, batch_tokens in ((guesses, 1 << 15), (wrong, 500), (right, 1), ([row[:0] for row in right], 400)):
        new, total, passes = decode.draft_answers(model, prompts, drafts, 16, train.END, batch_tokens)
        assert torch.equal(new, tokens)
        torch.testing.assert_close(total, logp, atol=1e-4, rtol=0)
        assert drafts is not right or passes.eq(1).all()


def test_answers_that_nobody_waits_for_end():
    """As threads that go on after a signal would otherwise, to the end of the last answer."""
    told, begun = [], threading.Event()

    def work(i):
        if i == 0:
            begun.wait(300)
            raise ValueError
        begun.set()
        told.append(memory.given_up.wait(300))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(memory, "pool", lambda: pool)
        with pytest.raises(ValueError):
            list(memory.on_threads(work, [0, 1]))
    assert told == [True] and not memory.given_up.is_set()
    memory.given_up.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            decode.draft_answers(tiny_model("MA", True), make_prompts(1), [np.array([1])], 16, train.END)
    finally:
        memory.given_up.clear()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_that_never_end(pattern):
    model, prompts = tiny_model(pattern, True), make_prompts(3, seed=1)
    tokens, logp = plain(model, prompts, 25, stop=-1)
    new, total, _ = decode.draft_answers(model, prompts, [np.array([1, 2, 3])] * 3, 25, -1)
    assert torch.equal(new, tokens)
    torch.testing.assert_close(total, logp, atol=1e-4, rtol=0)
    assert (tokens >= 0).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(PATTERNS), st.integers(1, 12), st.integers(1, 3000),
       st.lists(st.lists(st.integers(0, 15), max_size=30), min_size=1, max_size=3))
def test_any_drafts(seed, pattern, most, batch_tokens, drafts):
    model, prompts = tiny_model(pattern, True), make_prompts(len(drafts), seed)
    drafts = [np.array([t for t in draft if t != train.END], dtype=np.int64) for draft in drafts]
    tokens, logp = plain(model, prompts, most)
    new, total, passes = decode.draft_answers(model, prompts, drafts, most, train.END, batch_tokens)
    assert torch.equal(new, tokens) and passes.max() <= most
    torch.testing.assert_close(total, logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", (dict(grid=True), dict(), dict(document_token=50)))
def test_one_token_at_a_time(pattern, kind):
    model = tiny_model(pattern, **kind)
    if model.config.grid:
        tokens, lengths = decode.padded(make_prompts(4), "cpu")
    else:
        tokens, lengths = torch.randint(0, 61, (4, 30)), torch.tensor([30, 12, 1, 29])
    for stop in (train.END, -1):  # where nothing stops them, new documents begin among 20 tokens
        new, total = decode.generate(model, tokens, lengths, 20, stop)
        said, logp = train.generate.plain(model, tokens, lengths, 20, stop)
        assert torch.equal(new, said)
        torch.testing.assert_close(total, logp, atol=1e-4, rtol=1e-6)


def test_stream_says_what_is_chosen():
    model, lengths = tiny_model("MAMA"), torch.tensor([4, 9])
    tokens, script = torch.randint(0, 61, (2, 9)), iter([[5, 7], [6, 13], [8], [13]])
    steps = list(decode.stream(model, tokens, lengths, 9, 13, lambda logp: torch.tensor(next(script))))
    assert [rows.tolist() for rows, *_ in steps] == [[0, 1], [0, 1], [0], [0]]
    assert [said.tolist() for _, said, _ in steps] == [[5, 7], [6, 13], [8], [13]]
    whole = torch.cat([tokens[0, :4], torch.tensor([5, 6, 8, 13])])[None]
    logp = model(whole)[0].log_softmax(-1)[0, 3:7].gather(1, whole[0, 4:, None])[:, 0]
    torch.testing.assert_close(torch.stack([logp[0] for *_, logp in steps]), logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("same_shapes", (False, True))
def test_answer_prompts_is_a_twin(same_shapes, monkeypatch):
    monkeypatch.setattr(decode, "cores", lambda: 2)
    model, prompts = tiny_model("MAMA", True), make_prompts(5, same_shapes=same_shapes)
    with torch.no_grad():  # rather a grid now and then
        model.head.weight[10:14] *= 2
    wanted = train.answer_prompts.plain(model, prompts, runtime(), 20, 1)
    passes = []
    for drafts in (None, [np.array([3]), None, None, None, np.array([1, 10])]):
        found = decode.answer_prompts(model, prompts, runtime(), 20, 600, drafts, passes)
        for (one, a), (other, b) in zip(found, wanted, strict=True):
            assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))
            assert one is None or a == pytest.approx(b, abs=1e-4)
    assert len(passes) == 10 and decode.answer_prompts(model, [], runtime(), 20, 600) == []


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
