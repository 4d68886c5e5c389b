"""Several documents in a row: each is computed as if it were alone, by either mixer, in text and in grids; and
activations made again are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CPU, one_thread, random_tasks, sequence, tiny_config, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_data.layout import GridLayout
from extras.kernels import block_mask
from train import GPT, IGNORE_INDEX, PLAIN, UNKNOWN_TASK, ArcDataLoader, pick_ops

EOT = 60
FAST = pick_ops(CPU, torch.float32, "auto")
every_table = pytest.mark.parametrize("ops", [PLAIN, FAST], ids=["plain", "fast"])
either = pytest.mark.parametrize("grid", [True, False], ids=["grid", "text"])


def some_documents(grid: bool, seed: int, count: int) -> list[torch.Tensor]:
    """ARC tasks, or texts that begin with end-of-text."""
    if grid:
        tasks = random_tasks(count, seed, pairs=(1, 3))
        return [torch.from_numpy(sequence(t.pairs, UNKNOWN_TASK + i % 3)) for i, t in enumerate(tasks)]
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(np.append(EOT, rng.integers(0, EOT, int(n)))) for n in rng.integers(0, 60, count)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def model_that_resets(pattern: str, grid: bool, ops=PLAIN) -> GPT:
    model = tiny_model(pattern, grid, document_token=UNKNOWN_TASK if grid else EOT)
    model.use(ops)
    return model


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), t=st.integers(1, 600), rate=st.sampled_from([0.0, 0.003, 0.03, 0.3]))
def test_the_mask_of_blocks_is_what_torch_would_make_position_by_position(seed, t, rate):
    from torch.nn.attention.flex_attention import create_block_mask

    documents = (torch.rand(2, t, generator=torch.Generator().manual_seed(seed)) < rate).long().cumsum(1)
    ours = block_mask(documents)
    theirs = create_block_mask(ours.mask_mod, 2, None, t, t, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@either
@every_table
@pytest.mark.parametrize("pattern", ["MMMM", "AAAA", "MAMA"])
@settings(max_examples=2)
@given(seed=st.integers(0, 100), count=st.integers(2, 7))
def test_packed_documents_are_computed_as_if_alone(pattern, grid, ops, seed, count):
    documents = some_documents(grid, seed, count)
    packed = torch.cat(documents)[None]
    targets = packed.roll(-1).clamp(max=15)
    model = model_that_resets(pattern, grid, ops)
    assert relative(model.hidden(packed), torch.cat([model.hidden(d[None]) for d in documents], dim=1)) < 1e-5
    model(packed, targets)[1].backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for d, t in zip(documents, targets[0].split([len(d) for d in documents]), strict=True):
        (model(d[None], t[None])[1] * len(d) / packed.numel()).backward()
    for one, (name, p) in zip(together, model.named_parameters(), strict=True):
        assert relative(one, p.grad) < 1e-4, name


@every_table
def test_rows_pack_differently_and_what_follows_is_not_seen(ops):
    a, b, c, d = some_documents(False, 1, 4)
    model = model_that_resets("MAMA", False, ops)
    rows = [torch.cat([a, b]), torch.cat([c, d, a])]
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    h = model.hidden(x)
    assert relative(h[0, len(a) : len(a) + len(b)], model.hidden(b[None])[0]) < 1e-5
    assert relative(h[1, len(c) + len(d) : len(rows[1])], model.hidden(a[None])[0]) < 1e-5
    model.config.document_token = -1
    assert relative(model.hidden(x)[1, len(c) : len(c) + len(d)], model.hidden(d[None])[0]) > 1e-2


def test_layout_of_packed_grids_is_that_of_each_alone():
    documents = some_documents(True, 2, 4)
    packed, first = torch.cat(documents)[None], 0
    layout = GridLayout.of(packed, (packed >= UNKNOWN_TASK).cumsum(1) - 1)
    hints = layout.hints(packed, torch.arange(packed.shape[1])[None], True)
    for d in documents:
        alone, span = GridLayout.of(d[None]), slice(first, first + len(d))
        for name in ("col", "row", "grid", "output"):
            assert torch.equal(getattr(layout, name)[:, span], getattr(alone, name)), name
        assert torch.equal(hints[:, span], alone.hints(d[None], torch.arange(len(d))[None], True))
        first += len(d)


@either
def test_remat_changes_nothing(grid):
    """Not even where dropout draws."""
    x, grads = torch.cat(some_documents(grid, 3, 3))[None], []
    for remat in (False, True):
        torch.manual_seed(0)
        model = GPT(tiny_config("MAMA", grid, dropout=0.2))
        model.remat = remat
        torch.manual_seed(1)
        model(x, x.clamp(max=15))[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def parts(x: torch.Tensor, y: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """The sequences in the rows of a batch, without padding, each as (x, y)."""
    found = []
    for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
        opens = [i for i, t in enumerate(tokens) if t >= UNKNOWN_TASK]
        last = max(i for i, t in enumerate(targets) if t != IGNORE_INDEX) + 1
        found += [(tokens[a:b], targets[a:b]) for a, b in zip(opens, [*opens[1:], last], strict=True)]
    return found


@pytest.mark.parametrize("train", [True, False])
def test_packed_rows_hold_the_same_sequences_as_padded_ones(train):
    tasks = random_tasks(60, seed=4)
    tokens = {t.name: UNKNOWN_TASK + 1 + i for i, t in enumerate(tasks[::2])}
    packed = ArcDataLoader(tasks, 1, 512, train=train, task_tokens=tokens, packed=True)
    alone = ArcDataLoader(tasks, 1, 512, train=train, task_tokens=tokens)
    for _ in range(2):  # epochs
        batches, expected = list(packed), [part for x, y in alone for part in parts(x, y)]
        assert all(x.shape == y.shape == (1, 512) for x, y in batches)
        assert sorted(part for x, y in batches for part in parts(x, y)) == sorted(expected)
        assert len(batches) < 0.6 * len(expected) and packed.padding < 0.15 * packed.tokens


def test_packed_rows_are_other_companies_every_epoch():
    tasks = random_tasks(40, seed=5)
    loader = ArcDataLoader(tasks, 2, 512, task_tokens={t.name: 17 + i for i, t in enumerate(tasks)}, packed=True)
    companies = []
    for _ in range(2):
        companies.append({frozenset(plan.task for plan in row) for batch in loader.batches() for row in batch})
        list(loader)
    assert len(companies[0] & companies[1]) < len(companies[0]) / 4
