"""The whole model: causality, padding, decoding from carried states, the loss, the sizes it refuses, its start."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, PATTERNS, one_thread, random_tasks, sequence, tiny_config, tiny_model  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import train
from extras.decode import Carried
from train import ARC_VOCAB, GPT, IGNORE_INDEX, PLAIN, UNKNOWN_TASK, Attention, Mamba2

TABLES = {"plain": PLAIN, "fast": train.pick_ops(CPU, torch.float32, "auto")}
KINDS = [(pattern, grid) for grid in (False, True) for pattern in PATTERNS]
every_kind = pytest.mark.parametrize("pattern, grid", KINDS, ids=[p + (" grid" if g else " text") for p, g in KINDS])
every_table = pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)


def tokens_of(seed, grid, *shape):
    """Random tokens: any of a text, or those that ARC sequences are made of."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 14 if grid else 61, shape))


def real(lengths, grid, seed=0):
    """Token sequences of these lengths: random text, or beginnings of ARC tasks."""
    if not grid:
        return [tokens_of(seed + i, grid, n) for i, n in enumerate(lengths)]
    tasks = random_tasks(len(lengths), seed, pairs=(8, 8), largest=4)
    return [torch.from_numpy(sequence(t.pairs, UNKNOWN_TASK + i % 3))[:n]
            for i, (t, n) in enumerate(zip(tasks, lengths, strict=True))]


def pad(rows, value=0):
    """Rows in one batch, padded on the right."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens)[0]


def loss_and_gradients(model, x, y):
    model.zero_grad()
    loss = model(x, y)[1]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# == CAUSALITY AND PADDING ============================================================================================


@every_table
@every_kind
def test_a_token_changes_its_own_and_later_logits_and_no_earlier_one(pattern, grid, ops):
    """States and attention carry, also over the ends of chunks, and nothing looks ahead."""
    model, tokens = tiny_model(pattern, grid), pad(real([40, 40], grid))
    model.use(ops)
    before = logits_of(model, tokens)
    for t in (1, 3, 8, 29):  # 8 is the first of a chunk
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % (14 if grid else 61)
        difference = (logits_of(model, changed) - before).abs().amax(-1)
        assert (difference[:, t:] > 1e-6).all() and difference[:, t].min() > 1e-3, "the model forgets its token"
        changed[:, t + 1 :] = tokens_of(t, grid, 2, 39 - t)
        assert (logits_of(model, changed) - before)[:, :t].abs().max() <= 1e-6


@every_table
@every_kind
def test_pads_change_no_real_logit_and_carry_neither_loss_nor_gradient(pattern, grid, ops):
    """Other tokens as pads, more pads, and each row by itself, weighted by its supervised tokens: all the same."""
    model, rows = tiny_model(pattern, grid), real([30, 12, 5, 1, 2, 9, 8], grid)
    model.use(ops)
    x, y = pad(rows), pad([row.roll(-1) % 14 for row in rows], IGNORE_INDEX)
    for row, found in zip(rows, logits_of(model, x), strict=True):
        torch.testing.assert_close(found[: len(row)], logits_of(model, row[None])[0], rtol=0, atol=1e-5)
    y[0, 4:9] = IGNORE_INDEX
    junk = torch.where(pad([torch.ones_like(row) for row in rows]) > 0, x, tokens_of(1, grid, *x.shape))
    assert not torch.equal(junk, x)
    loss, gradients = loss_and_gradients(model, x, y)
    expected = F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parts = [loss_and_gradients(model, row[None], y[i : i + 1, : len(row)]) for i, row in enumerate(rows)]
    share = (y != IGNORE_INDEX).sum(1) / (y != IGNORE_INDEX).sum()
    for other, others in (
        loss_and_gradients(model, junk, y),
        loss_and_gradients(model, F.pad(x, (0, 11)), F.pad(y, (0, 11), value=IGNORE_INDEX)),
        (sum(s * part[0] for s, part in zip(share, parts, strict=True)),
         {name: sum(s * part[1][name] for s, part in zip(share, parts, strict=True)) for name in gradients}),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        for name, g in gradients.items():
            assert (others[name] - g).norm() <= 1e-5 * g.norm() + 1e-9, name


# == DECODING =========================================================================================================


@torch.no_grad()
@every_kind
@settings(max_examples=2)
@example(lengths=[1, 2, 3, 4, 8, 9, 17, 30], seed=0)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_prefill_and_steps_equal_one_pass_over_rows_of_different_lengths(pattern, grid, lengths, seed):
    """Whatever stands behind a row's end, and whichever slots the rows are in."""
    model, steps, slots = tiny_model(pattern, grid), 12, torch.arange(len(lengths)).flip(0)
    rows, end = real([n + steps for n in lengths], grid, seed), torch.tensor(lengths)
    prompts = pad([row[:n] for row, n in zip(rows, lengths, strict=True)])
    junk = tokens_of(seed, grid, *prompts.shape)
    prompts = torch.where(torch.arange(prompts.shape[1]) < end[:, None], prompts, junk)
    carried, found = Carried(model, len(rows), prompts.shape[1] + steps), []
    carried.read(slots, tokens_of(seed, grid, len(rows), 4), torch.full_like(end, 4))
    carried.read(slots, prompts, end)  # takes the slots over from what stood there
    for i in range(steps + 1):
        found.append(carried.feed(slots, 1)[0][:, 0])
        carried.advance(slots, torch.ones_like(slots))
        if i < steps:
            carried.append(slots, torch.stack([row[n + i] for row, n in zip(rows, lengths, strict=True)]))
    for row, n, logp in zip(rows, lengths, torch.stack(found, dim=1), strict=True):
        torch.testing.assert_close(logp, logits_of(model, row[None])[0, n - 1 :].log_softmax(-1), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid, document_token", [(False, -1), (False, 50), (True, -1), (True, UNKNOWN_TASK)])
def test_generate_is_greedy_or_as_chosen_stops_and_sums_log_probabilities(grid, document_token):
    """Against one full pass per token and row, also where a row holds, or goes on with, several documents."""
    model, rows = tiny_model("MAMA", grid, seed=3, document_token=document_token), real([1, 5, 14, 27], grid)
    lengths = torch.tensor([len(r) for r in rows])

    def step_by_step(row, rank, most):
        """The tokens that a row goes on with, each the likeliest or the next to it, and their log-probabilities."""
        new = []
        for _ in range(most):
            values, tokens = logits_of(model, row[None])[0, -1].log_softmax(-1).topk(2)
            row = torch.cat([row, tokens[rank : rank + 1]])
            new.append((tokens[rank].item(), values[rank].item()))
        return zip(*new, strict=True)

    expected, sums = zip(*(step_by_step(row, 0, 10) for row in rows), strict=True)
    second, second_sums = zip(*(step_by_step(row, 1, 3) for row in rows), strict=True)
    stop = expected[2][7]
    end = [whole.index(stop) + 1 if stop in whole else 10 for whole in expected]
    for way in (train.generate, train.generate.plain):
        found, logp = way(model, pad(rows), lengths, 10)
        assert found.tolist() == list(map(list, expected))
        assert logp.tolist() == pytest.approx([sum(s) for s in sums], abs=1e-3)
        found, logp = way(model, pad(rows), lengths, 10, stop)
        assert found.tolist() == [[*row[:n], *[stop] * (max(end) - n)] for row, n in zip(expected, end, strict=True)]
        assert logp.tolist() == pytest.approx([sum(s[:n]) for s, n in zip(sums, end, strict=True)], abs=1e-3)
        alone, _ = way(model, rows[2][None], lengths[2:3], 10, stop)
        assert alone[0].tolist() == list(expected[2][: end[2]])  # nothing is made behind the last stop
        found, logp = way(model, pad(rows), lengths, 3, choose=lambda logp: logp.topk(2)[1][:, 1])
        assert found.tolist() == list(map(list, second))
        assert logp.tolist() == pytest.approx([sum(s) for s in second_sums], abs=1e-3)


# == PARTS ============================================================================================================


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_builds_the_layers_it_names_and_sees_where_a_token_stands(pattern):
    """The same colours in a grid of another shape are told apart, even by Mamba-2 alone."""
    model, text = tiny_model(pattern, grid=True), tiny_model(pattern)
    assert text.head.weight is text.embed.weight
    assert len(model.head.weight) == ARC_VOCAB < len(model.embed.weight) == UNKNOWN_TASK + 4
    assert "".join({Mamba2: "M", Attention: "A"}[type(block.mixer)] for block in model.blocks) == pattern
    square, line = (sequence([(np.ones(shape, int), np.ones((1, 1), int))]) for shape in ((2, 3), (3, 2)))
    found = [logits_of(model, torch.from_numpy(s)[None])[0, -1] for s in (square, line)]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("change, flags", [
    (dict(headdim=24), ["--headdim 24"]),  # 2 x 32 channels are no whole number of heads
    (dict(n_head=3), ["--n-head 3"]),
    (dict(n_head=32), ["--n-head"]),  # one channel per head cannot be rotated
    (dict(n_head=8, grid=True), ["--n-head"]),  # four are too few for three axes
    (dict(pattern=""), ["--pattern"]),
    (dict(pattern="MAX"), ["--pattern 'MAX'"]),
    *((dict([change]), ["--" + change[0].replace("_", "-")]) for change in [
        ("d_model", 0), ("n_head", 0), ("d_state", -1), ("headdim", 0), ("d_ff", 0), ("block_size", 0),
        ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan)]),
    (dict(d_model=0, d_state=0, pattern="x", dropout=2.0), ["--d-model", "--d-state", "--pattern", "--dropout"]),
    (dict(headdim=24, n_head=5), ["--headdim 24", "--n-head 5"]),
    (dict(pattern="MMMM", n_head=3), []),  # what the pattern does not use
    (dict(pattern="AAAA", headdim=24), []),
    (dict(grid=True), []),
], ids=str)  # fmt: skip
def test_impossible_sizes_are_all_named(change, flags):
    found = train.config_problems(tiny_config(**change), train.TrainConfig(preset="nano"))
    assert len(found) == len(flags) and all(any(f in line for line in found) for f in flags), found
    assert not any("\n" in line for line in found)


# == THE START ========================================================================================================


@pytest.mark.parametrize("grid", [False, True])
def test_matrices_start_small_and_smaller_where_they_end_a_branch(grid):
    """What Mamba-2 sets itself, tests/test_mamba.py looks at."""
    torch.manual_seed(0)
    for name, p in GPT(tiny_config("MAMM", grid, d_model=64, headdim=2)).named_parameters():
        if p.dim() == 2:
            deep = name.endswith(("out_proj.weight", "down.weight"))
            expected = 0.02 / math.sqrt(2 * 4) if deep else 0.02 * (name != "film.weight")
            assert p.std().item() == pytest.approx(expected, rel=0.15), name
        assert "norm" not in name or (p == 1).all(), name


@every_table
def test_a_task_scales_and_shifts_every_norm(ops):
    """A row's first token has in `film` its own scale and shift for each norm of each block."""
    model, tokens = tiny_model("MA", grid=True), torch.tensor([[UNKNOWN_TASK + 1, 11, 3, 10, 12], [16, 11, 3, 10, 12]])
    model.use(ops)
    films = model.film(model.embed(tokens[:, 0])).view(2, 2, 2, 2, 1, 32)  # row, block, norm, scale or shift, 1, D
    seen = []

    def look(norm, args, y, film):
        normal = F.rms_norm(args[0], (32,), norm.weight, 1e-5)
        seen.append((y, normal * (1 + film[:, 0]) + film[:, 1]))

    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(functools.partial(look, film=films[:, i, 0]))
        block.norm2.register_forward_hook(functools.partial(look, film=films[:, i, 1]))
    model(tokens)
    assert len(seen) == 4
    for found, expected in seen:
        torch.testing.assert_close(found, expected)
