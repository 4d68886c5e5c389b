"""The whole model: causality, padding, decoding from carried states, the loss, the sizes it refuses, its start."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PATTERNS,
    one_thread,  # noqa: F401
    random_tasks,
    sequence,
    tiny_config,
    tiny_model,
)
from torch import nn

from train import ARC_VOCAB, END, GPT, IGNORE_INDEX, UNKNOWN_TASK, Attention, Cache, Mamba2, ModelConfig, RMSNorm

KINDS = [(pattern, grid) for grid in (False, True) for pattern in PATTERNS]
every_kind = pytest.mark.parametrize("pattern, grid", KINDS, ids=[p + (" grid" if g else " text") for p, g in KINDS])


def real(lengths, grid, seed=0):
    """Token sequences of these lengths: random text, or beginnings of ARC tasks."""
    rng = np.random.default_rng(seed)
    if not grid:
        return [torch.from_numpy(rng.integers(0, 61, n)) for n in lengths]
    tasks = random_tasks(len(lengths), seed, pairs=(8, 8), largest=4)
    return [
        torch.from_numpy(sequence(t.pairs, UNKNOWN_TASK + i % 3))[:n]
        for i, (t, n) in enumerate(zip(tasks, lengths, strict=True))
    ]


def pad(rows, value=0):
    """Rows in one batch, padded on the right."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Causality and padding


@every_kind
def test_a_later_token_changes_no_earlier_logit(pattern, grid):
    model = tiny_model(pattern, grid)
    tokens = pad(real([40, 40], grid))
    before = logits_of(model, tokens)
    rng = np.random.default_rng(1)
    for t in (1, 7, 8, 9, 23, 39):
        changed = tokens.clone()
        changed[:, t:] = torch.from_numpy(rng.integers(0, 14 if grid else 61, (2, 40 - t)))
        changed[:, t] = (tokens[:, t] + 1) % (14 if grid else 61)
        after = logits_of(model, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3, "the model does not look at its token"


@every_kind
def test_an_earlier_token_changes_later_logits(pattern, grid):
    """The counterpart: states and attention do carry, also over the ends of chunks."""
    model = tiny_model(pattern, grid)
    tokens = pad(real([40], grid))
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 10
    difference = (logits_of(model, changed) - logits_of(model, tokens)).abs().amax(-1)[0]
    assert (difference[3:] > 1e-6).all() and (difference[:3] == 0).all()


@every_kind
def test_pads_change_no_real_logit(pattern, grid):
    model = tiny_model(pattern, grid)
    rows = real([1, 2, 3, 8, 9, 30], grid)
    together = logits_of(model, pad(rows))
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found[: len(row)], logits_of(model, row[None])[0], rtol=0, atol=1e-5)


@every_kind
def test_pads_carry_neither_loss_nor_gradient(pattern, grid):
    model = tiny_model(pattern, grid)
    rows = real([30, 12, 5], grid)
    x = pad(rows)
    y = pad([row.roll(-1) % 14 for row in rows], IGNORE_INDEX)
    y[:, 0] = IGNORE_INDEX

    def loss_and_gradients(x, y):
        model.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    def assert_same(one, other):
        torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
        for (name, _), a, b in zip(model.named_parameters(), one[1], other[1], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, name

    expected = loss_and_gradients(x, y)
    junk = x.clone()
    for i, row in enumerate(rows):
        junk[i, len(row) :] = torch.randint(0, 14, (30 - len(row),), generator=torch.Generator().manual_seed(i))
    assert not torch.equal(junk, x)
    assert_same(loss_and_gradients(junk, y), expected)
    longer = F.pad(x, (0, 11)), F.pad(y, (0, 11), value=IGNORE_INDEX)
    assert_same(loss_and_gradients(*longer), expected)
    # and each row by itself, weighted by its supervised tokens, gives the same
    parts = [loss_and_gradients(row[None], y[i : i + 1, : len(row)]) for i, row in enumerate(rows)]
    weights = [(len(row) - 1) / sum(len(r) - 1 for r in rows) for row in rows]
    mean = [
        sum(w * g for w, g in zip(weights, gradients, strict=True))
        for gradients in zip(*(p[1] for p in parts), strict=True)
    ]
    assert_same((sum(w * p[0] for w, p in zip(weights, parts, strict=True)), mean), expected)


def test_loss_is_the_mean_over_supervised_tokens():
    model = tiny_model()
    x = pad(real([9, 20, 14], grid=False))
    y = torch.full_like(x, IGNORE_INDEX)
    places = [(0, 3), (0, 8), (1, 0), (1, 19), (2, 5)]
    for b, t in places:
        y[b, t] = (7 * b + t) % 61
    logits, loss = model(x)[0], model(x, y)[1]
    logp = logits.log_softmax(-1)
    assert loss.item() == pytest.approx(-sum(logp[b, t, y[b, t]].item() for b, t in places) / 5, rel=1e-5)
    assert model(x)[1] is None


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("junk", [False, True], ids=["zeros", "junk"])
def test_prefill_and_steps_equal_one_pass_over_rows_of_different_lengths(pattern, grid, junk):
    model = tiny_model(pattern, grid)
    lengths, steps = [1, 2, 3, 4, 8, 9, 17, 30], 25
    rows = real([n + steps for n in lengths], grid)
    prompts = pad([row[:n] for row, n in zip(rows, lengths, strict=True)])
    if junk:  # whatever stands behind a row's end
        real_ = torch.arange(30) < torch.tensor(lengths)[:, None]
        prompts = torch.where(
            real_, prompts, torch.randint(0, 14, prompts.shape, generator=torch.Generator().manual_seed(0))
        )
    cache = Cache(prompts, torch.tensor(lengths), room=steps)
    hidden = model.hidden(prompts, cache)[torch.arange(len(rows)), torch.tensor(lengths) - 1]
    found = [model.head(hidden)]
    for i in range(steps):
        token = torch.stack([row[n + i] for row, n in zip(rows, lengths, strict=True)])
        cache.append(token)
        found.append(model.head(model.hidden(token[:, None], cache)[:, 0]))
    found = torch.stack(found, dim=1)  # (B, steps + 1, V)
    for row, n, logits in zip(rows, lengths, found, strict=True):
        torch.testing.assert_close(logits, logits_of(model, row[None])[0, n - 1 :], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [False, True])
def test_generate_is_greedy_stops_and_sums_log_probabilities(grid):
    model = tiny_model("MAMA", grid, seed=3)
    rows = real([1, 5, 14, 27], grid)
    lengths = torch.tensor([len(r) for r in rows])
    expected, sums = [], []
    for row in rows:  # one full pass a token
        total, new = 0.0, []
        for _ in range(20):
            logp = logits_of(model, row[None])[0, -1].log_softmax(-1)
            new.append(int(logp.argmax()))
            total += logp.max().item()
            row = torch.cat([row, logp.argmax()[None]])
        expected.append(new)
        sums.append(total)
    found, logp = model.generate(pad(rows), lengths, max_new_tokens=20)
    assert found.tolist() == expected and logp.tolist() == pytest.approx(sums, abs=1e-3)
    stop = expected[2][7]
    found, logp = model.generate(pad(rows), lengths, max_new_tokens=20, stop=stop)
    for row, whole in zip(found.tolist(), expected, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert row == (whole[: end + 1] + [stop] * 20)[: len(row)]
    batches = [len(going) for going, _, _ in model.stream(pad(rows), lengths, 20, stop)]
    assert batches[0] == 4 and batches[-1] < 4  # rows that are done leave
    alone, value = model.generate(rows[2][None], stop=stop, max_new_tokens=20)  # lengths may be left out
    end = expected[2].index(stop)
    assert alone[0].tolist() == expected[2][: end + 1] and value.item() == pytest.approx(logp[2].item(), abs=1e-4)


@torch.no_grad()
def test_tokens_may_be_chosen_by_the_caller():
    model = tiny_model()
    tokens = pad(real([6, 6], grid=False))

    def draw(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            tokens,
            max_new_tokens=12,
            choose=lambda logp: torch.multinomial((logp / temperature).softmax(-1), 1, generator=generator)[:, 0],
        )[0]

    assert torch.equal(draw(0, 1.0), draw(0, 1.0)) and not torch.equal(draw(0, 1.0), draw(1, 1.0))
    assert torch.equal(draw(0, 1e-4), model.generate(tokens, max_new_tokens=12)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize("letter", "MA")
def test_every_block_has_norms_and_residuals(letter):
    """The ancestor stacked Mamba layers without either."""
    model = tiny_model(letter * 3)
    rope = [torch.ones(1, 5, 1, 1, 8), torch.zeros(1, 5, 1, 1, 8)]
    for block in model.blocks:
        assert isinstance(block.mixer, {"M": Mamba2, "A": Attention}[letter])
        assert isinstance(block.norm1, RMSNorm) and isinstance(block.norm2, RMSNorm)
        x = torch.randn(1, 5, 32) * 3
        with torch.no_grad():
            block.mlp.down.weight.zero_()
            added = block(x, rope) - x
            assert added.abs().max() > 1e-2
            torch.testing.assert_close(
                block(100 * x, rope) - 100 * x, added, rtol=0, atol=2e-3
            )  # the norm takes the 100 out
            block.mixer.out_proj.weight.zero_()
            assert torch.equal(block(x, rope), x)


def test_rms_norm_is_the_textbook_one():
    norm = RMSNorm(12)
    torch.nn.init.uniform_(norm.weight)
    x, z = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for h, found in ((x, norm(x)), (x * F.silu(z), norm(x, z))):
        torch.testing.assert_close(found, h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


def test_grid_models_see_where_a_token_stands():
    """The same colours in another shape, and the same tokens in another grid, are told apart by every pattern."""
    for pattern in PATTERNS:
        model = tiny_model(pattern, grid=True)
        square, line = (sequence([(np.ones(shape, int), np.ones((1, 1), int))]) for shape in ((2, 3), (3, 2)))
        found = [logits_of(model, torch.from_numpy(s)[None])[0, -1] for s in (square, line)]
        assert (found[0] - found[1]).abs().max() > 1e-3


def test_each_pattern_builds_the_layers_it_names():
    for pattern in PATTERNS:
        kinds = [{Mamba2: "M", Attention: "A"}[type(block.mixer)] for block in tiny_model(pattern).blocks]
        assert "".join(kinds) == pattern


def test_tied_embeddings_are_one_tensor_and_untied_ones_two():
    assert (tied := tiny_model()).head.weight is tied.embed.weight
    assert (untied := tiny_model(tie_embeddings=False)).head.weight is not untied.embed.weight
    grid = tiny_model(grid=True)
    assert len(grid.embed.weight) == UNKNOWN_TASK + 1 + 3 and len(grid.head.weight) == ARC_VOCAB > END


@pytest.mark.parametrize(
    "change, flags",
    [
        (dict(headdim=24), ["--headdim 24"]),  # 2 x 32 channels are no whole number of heads
        (dict(n_head=3), ["--n-head 3"]),
        (dict(n_head=32), ["--n-head"]),  # one channel a head cannot be rotated
        (dict(n_head=8, grid=True), ["--n-head"]),  # four are too few for three axes
        (dict(pattern=""), ["--pattern"]),
        (dict(pattern="MAX"), ["--pattern 'MAX'"]),
        (dict(d_model=0), ["--d-model"]),
        (dict(n_head=0), ["--n-head"]),
        (dict(d_state=-1), ["--d-state"]),
        (dict(headdim=0), ["--headdim"]),
        (dict(d_ff=0), ["--d-ff"]),
        (dict(block_size=0), ["--block-size"]),
        (dict(dropout=1.0), ["--dropout"]),
        (dict(dropout=-0.1), ["--dropout"]),
        (dict(dropout=math.nan), ["--dropout"]),
        (dict(d_model=0, d_state=0, pattern="x", dropout=2.0), ["--d-model", "--d-state", "--pattern", "--dropout"]),
        (dict(headdim=24, n_head=5), ["--headdim 24", "--n-head 5"]),
    ],
    ids=str,
)
def test_impossible_sizes_are_all_named(change, flags):
    cfg = tiny_config(**change)
    found = cfg.validate()
    assert len(found) == len(flags) and all(sum(f in line for line in found) >= 1 for f in flags), found
    assert not any("\n" in line for line in found)
    with pytest.raises(ValueError) as caught:
        GPT(cfg)
    assert all(f in str(caught.value) for f in flags)


def test_possible_sizes_are_no_problem():
    assert ModelConfig().validate() == []
    assert all(tiny_config(pattern, grid).validate() == [] for pattern, grid in KINDS)
    assert tiny_config("MMMM", n_head=3).validate() == []  # no attention, no heads to divide
    assert tiny_config("AAAA", headdim=24).validate() == []


# ---------------------------------------------------------------------------------------------------------------------
# The start


@pytest.mark.parametrize("grid", [False, True])
def test_initialisation_leaves_what_mamba_sets_itself(grid):
    torch.manual_seed(0)
    model = GPT(tiny_config("MAMM", grid, d_model=64, headdim=2))  # 64 heads
    for module in model.modules():
        if isinstance(module, Mamba2):
            A, dt = module.A_log.exp(), F.softplus(module.dt_bias)
            assert A.min() >= 1 and A.max() <= 16 and A.std() > 2
            assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001 and dt.log().std() > 0.8
            assert (module.D == 1).all()
            bound = module.d_conv**-0.5  # torch's own for a depthwise convolution
            for p in (module.conv1d.weight, module.conv1d.bias):
                assert 0.9 * bound < p.abs().max() <= bound
                assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
        if isinstance(module, RMSNorm):
            assert (module.weight == 1).all()
    deep = 0.02 / math.sqrt(2 * 4)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = deep if name.endswith(("out_proj.weight", "down.weight")) else 0.02 * (name != "film.weight")
            assert p.std().item() == pytest.approx(expected, rel=0.15), name


def test_a_task_scales_and_shifts_every_norm():
    """A task whose vector asks for scales 0.5 and -0.25 is a model with other norms; another task sees none of it."""
    model, tokens = tiny_model("MA", grid=True), torch.tensor([[UNKNOWN_TASK + 1, 11, 3, 10, 12], [16, 11, 3, 10, 12]])
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
        mlp = model.blocks[1].mlp
        shifted = []
        mlp.register_forward_pre_hook(lambda module, args: shifted.append(args[0]))
        model(tokens)
        scales.zero_()
        model(tokens)
        torch.testing.assert_close(shifted[0] - shifted[1], torch.tensor([1.0, 0.0])[:, None, None].expand(2, 5, 32))


def test_the_same_seed_gives_the_same_model():
    one, twin, other = (tiny_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], twin[k]) for k in one) and not torch.equal(
        one["embed.weight"], other["embed.weight"]
    )
