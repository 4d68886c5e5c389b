"""The whole model: causality, padding, decoding from carried states, the loss, the sizes it refuses, its start."""

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
from train import ARC_VOCAB, END, GPT, IGNORE_INDEX, PLAIN, UNKNOWN_TASK, Attention, Mamba2, ModelConfig, RMSNorm

TABLES = {"plain": PLAIN, "fast": train.pick_ops(CPU, torch.float32, "auto")}
KINDS = [(pattern, grid) for grid in (False, True) for pattern in PATTERNS]
every_kind = pytest.mark.parametrize("pattern, grid", KINDS, ids=[p + (" grid" if g else " text") for p, g in KINDS])
every_table = pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
seeds = st.integers(0, 1000)
lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=6)


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
@settings(max_examples=2)
@example(t=1, seed=0)
@example(t=8, seed=1)  # the first of a chunk
@given(t=st.integers(1, 39), seed=seeds)
def test_a_token_changes_its_own_and_later_logits_and_no_earlier_one(pattern, grid, ops, t, seed):
    model, tokens = tiny_model(pattern, grid), pad(real([40, 40], grid))
    model.use(ops)
    before = logits_of(model, tokens)
    changed = tokens.clone()
    changed[:, t:] = tokens_of(seed, grid, 2, 40 - t)
    changed[:, t] = (tokens[:, t] + 1) % (14 if grid else 61)
    difference = (logits_of(model, changed) - before).abs()
    assert difference[:, :t].max() <= 1e-6
    assert difference[:, t].max() > 1e-3, "the model does not look at its token"


@every_kind
def test_an_earlier_token_changes_all_later_logits(pattern, grid):
    """The counterpart: states and attention do carry, also over the ends of chunks."""
    model, tokens = tiny_model(pattern, grid), pad(real([40], grid))
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 10
    difference = (logits_of(model, changed) - logits_of(model, tokens)).abs().amax(-1)[0]
    assert (difference[3:] > 1e-6).all() and (difference[:3] == 0).all()


@every_table
@every_kind
@settings(max_examples=2)
@example(lengths=[1, 2, 3, 8, 9, 30], seed=0)
@given(lengths=lengths_of_rows, seed=seeds)
def test_pads_change_no_real_logit(pattern, grid, ops, lengths, seed):
    model, rows = tiny_model(pattern, grid), real(lengths, grid, seed)
    model.use(ops)
    for row, found in zip(rows, logits_of(model, pad(rows)), strict=True):
        torch.testing.assert_close(found[: len(row)], logits_of(model, row[None])[0], rtol=0, atol=1e-5)


@every_table
@every_kind
def test_pads_carry_neither_loss_nor_gradient(pattern, grid, ops):
    """Other tokens as pads, more pads, and each row by itself, weighted by its supervised tokens: all the same."""
    model, rows = tiny_model(pattern, grid), real([30, 12, 5], grid)
    model.use(ops)
    x, y = pad(rows), pad([row.roll(-1) % 14 for row in rows], IGNORE_INDEX)
    y[:, 0] = IGNORE_INDEX
    junk = torch.where(pad([torch.ones_like(row) for row in rows]) > 0, x, tokens_of(1, grid, *x.shape))
    assert not torch.equal(junk, x)
    loss, gradients = loss_and_gradients(model, x, y)
    parts = [loss_and_gradients(model, row[None], y[i : i + 1, : len(row)]) for i, row in enumerate(rows)]
    share = [(len(row) - 1) / sum(len(r) - 1 for r in rows) for row in rows]
    for other, others in (
        loss_and_gradients(model, junk, y),
        loss_and_gradients(model, F.pad(x, (0, 11)), F.pad(y, (0, 11), value=IGNORE_INDEX)),
        (sum(s * part[0] for s, part in zip(share, parts, strict=True)),
         {name: sum(s * part[1][name] for s, part in zip(share, parts, strict=True)) for name in gradients}),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        for name, g in gradients.items():
            assert (others[name] - g).norm() <= 1e-5 * g.norm() + 1e-9, name


@every_table
def test_loss_is_the_mean_over_supervised_tokens(ops):
    model, x = tiny_model(), pad(real([9, 20, 14], grid=False))
    model.use(ops)
    y = torch.full_like(x, IGNORE_INDEX)
    places = [(0, 3), (0, 8), (1, 0), (1, 19), (2, 5)]
    for b, t in places:
        y[b, t] = (7 * b + t) % 61
    logits, loss = model(x)[0], model(x, y)[1]
    logp = logits.log_softmax(-1)
    assert loss.item() == pytest.approx(-sum(logp[b, t, y[b, t]].item() for b, t in places) / 5, rel=1e-5)
    assert model(x)[1] is None and model(x, y)[0] is None


# == DECODING =========================================================================================================


@torch.no_grad()
@every_kind
@settings(max_examples=2)
@example(lengths=[1, 2, 3, 4, 8, 9, 17, 30], seed=0)
@given(lengths=lengths_of_rows, seed=seeds)
def test_prefill_and_steps_equal_one_pass_over_rows_of_different_lengths(pattern, grid, lengths, seed):
    """Whatever stands behind a row's end, and whichever slots the rows are in."""
    model, steps, slots = tiny_model(pattern, grid), 12, torch.arange(len(lengths)).flip(0)
    rows, end = real([n + steps for n in lengths], grid, seed), torch.tensor(lengths)
    prompts = pad([row[:n] for row, n in zip(rows, lengths, strict=True)])
    junk = tokens_of(seed, grid, *prompts.shape)
    prompts = torch.where(torch.arange(prompts.shape[1]) < end[:, None], prompts, junk)
    carried, found = Carried(model, len(rows), prompts.shape[1] + steps), []
    for once in range(2):  # the second time, slots are taken over from what stood there
        carried.read(slots, tokens_of(seed, grid, len(rows), 4) if once == 0 else prompts, end * once + 4 * (1 - once))
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
    lengths, expected, sums = torch.tensor([len(r) for r in rows]), [], []
    for row in rows:
        logps, new = [], []
        for _ in range(10):
            value, token = logits_of(model, row[None])[0, -1].log_softmax(-1).max(-1)
            row = torch.cat([row, token[None]])
            new.append(token.item()), logps.append(value.item())
        expected.append(new), sums.append(logps)
    stop = expected[2][7]
    for way in (train.generate, train.generate.plain):
        found, logp = way(model, pad(rows), lengths, 10)
        assert found.tolist() == expected and logp.tolist() == pytest.approx([sum(s) for s in sums], abs=1e-3)
        found, logp = way(model, pad(rows), lengths, 10, stop)
        for row, total, whole, values in zip(found.tolist(), logp.tolist(), expected, sums, strict=True):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert row == (whole[:end] + [stop] * 10)[: len(row)]
            assert total == pytest.approx(sum(values[:end]), abs=1e-3)
        alone, _ = way(model, rows[2][None], lengths[2:3], 10, stop)
        assert alone[0].tolist() == expected[2][: expected[2].index(stop) + 1]  # nothing is made behind the last stop
        second, logp = way(model, pad(rows), lengths, 3, choose=lambda logp: logp.topk(2)[1][:, 1])
        for row, new, total in zip(rows, second, logp, strict=True):
            logps = logits_of(model, torch.cat([row, new])[None])[0, len(row) - 1 : -1].log_softmax(-1)
            value, choice = logps.topk(2)
            assert torch.equal(new, choice[:, 1]) and total.item() == pytest.approx(value[:, 1].sum().item(), abs=1e-3)


# == PARTS ============================================================================================================


@pytest.mark.parametrize("letter, kind", [("M", Mamba2), ("A", Attention)])
def test_every_block_has_norms_and_residuals(letter, kind):
    """The ancestor stacked Mamba layers without either."""
    rope = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    for block in tiny_model(letter * 3).blocks:
        assert isinstance(block.mixer, kind) and isinstance(block.norm1, RMSNorm) and isinstance(block.norm2, RMSNorm)
        x = torch.randn(1, 5, 32) * 3
        with torch.no_grad():
            block.mlp.down.weight.zero_()
            added = block(x, rope, None, (None, None)) - x
            assert added.abs().max() > 1e-2
            hundredfold = block(100 * x, rope, None, (None, None)) - 100 * x
            torch.testing.assert_close(hundredfold, added, rtol=0, atol=2e-3)  # the norm takes the 100 out
            block.mixer.out_proj.weight.zero_()
            assert torch.equal(block(x, rope, None, (None, None)), x)


@every_table
def test_rms_norm_is_the_textbook_one(ops):
    norm, x, z = RMSNorm(12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    norm.ops = ops
    torch.nn.init.uniform_(norm.weight)
    for h, found in ((x, norm(x)), (x * F.silu(z), norm(x, z))):
        torch.testing.assert_close(found, h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_builds_the_layers_it_names_and_sees_where_a_token_stands(pattern):
    """The same colours in a grid of another shape are told apart, even by Mamba-2 alone."""
    model = tiny_model(pattern, grid=True)
    assert "".join({Mamba2: "M", Attention: "A"}[type(block.mixer)] for block in model.blocks) == pattern
    square, line = (sequence([(np.ones(shape, int), np.ones((1, 1), int))]) for shape in ((2, 3), (3, 2)))
    found = [logits_of(model, torch.from_numpy(s)[None])[0, -1] for s in (square, line)]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_tied_embeddings_are_one_tensor_and_untied_ones_two():
    assert (tied := tiny_model()).head.weight is tied.embed.weight
    assert (untied := tiny_model(tie_embeddings=False)).head.weight is not untied.embed.weight
    grid = tiny_model(grid=True)
    assert len(grid.embed.weight) == UNKNOWN_TASK + 1 + 3 and len(grid.head.weight) == ARC_VOCAB > END


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
], ids=str)  # fmt: skip
def test_impossible_sizes_are_all_named(change, flags):
    found = train.config_problems(tiny_config(**change), train.TrainConfig(preset="nano"))
    assert len(found) == len(flags) and all(any(f in line for line in found) for f in flags), found
    assert not any("\n" in line for line in found)


def test_possible_sizes_are_no_problem():
    possible = [ModelConfig(), *(tiny_config(pattern, grid) for pattern, grid in KINDS)]
    possible += [tiny_config("MMMM", n_head=3), tiny_config("AAAA", headdim=24)]  # what the pattern does not use
    assert not [found for cfg in possible if (found := train.config_problems(cfg, train.TrainConfig(preset="nano")))]


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
    """A task whose vector asks for scales 0.5 and -0.25 is a model with other norms; another task sees none of it."""
    model, tokens = tiny_model("MA", grid=True), torch.tensor([[UNKNOWN_TASK + 1, 11, 3, 10, 12], [16, 11, 3, 10, 12]])
    model.use(ops)
    with torch.no_grad():
        model.embed.weight[UNKNOWN_TASK:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        model.film.weight.zero_()
        plain = model(tokens)[0]
        scales = model.film.weight.view(2, 2, 2, 32, 32)  # block, norm, scale or shift, channel, by channel of the task
        scales[:, 0, 0, :, 0], scales[:, 1, 0, :, 0] = 0.5, -0.25
        scaled = model(tokens)[0]
        for block in model.blocks:
            block.norm1.weight *= 1.5
            block.norm2.weight *= 0.75
        torch.testing.assert_close(scaled[1], plain[1])
        scales.zero_()
        torch.testing.assert_close(scaled[0], model(tokens)[0][0])
        scales[1, 1, 1, :, 0] = 1.0
        shifted = []
        model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: shifted.append(args[0]))
        model(tokens)
        scales.zero_()
        model(tokens)
        torch.testing.assert_close(shifted[0] - shifted[1], torch.tensor([1.0, 0.0])[:, None, None].expand(2, 5, 32))


def test_the_same_seed_gives_the_same_model():
    one, same, other = (tiny_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
