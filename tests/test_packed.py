"""Several documents in a row: each is computed as if it were alone, by either mixer, in text and in grids; and
activations made again are the same."""

import numpy as np
import pytest
import torch
from helpers import CPU, one_thread, random_tasks, sequence, tiny_config, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from extras.kernels import block_mask
from train import GPT, IGNORE_INDEX, PLAIN, UNKNOWN_TASK, ArcDataLoader, pick_ops

EOT = 60
every_table = pytest.mark.parametrize("ops", [PLAIN, pick_ops(CPU, torch.float32, "auto")], ids=["plain", "fast"])
either = pytest.mark.parametrize("grid", [True, False], ids=["grid", "text"])


def some_documents(grid: bool) -> list[torch.Tensor]:
    """ARC tasks, or texts that begin with end-of-text; chunks of `tiny_model` are 8 long."""
    if grid:
        tasks = random_tasks(6, pairs=(1, 3))
        return [torch.from_numpy(sequence(t.pairs, UNKNOWN_TASK + i % 3)) for i, t in enumerate(tasks)]
    rng = np.random.default_rng(0)
    return [torch.from_numpy(np.append(EOT, rng.integers(0, EOT, n - 1))) for n in (30, 2, 8, 47, 1, 20)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@settings(max_examples=20)
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
def test_packed_documents_are_computed_as_if_alone(pattern, grid, ops):
    """In two rows, of two and four documents, with pads behind them."""
    model, documents = tiny_model(pattern, grid, document_token=UNKNOWN_TASK if grid else EOT), some_documents(grid)
    model.use(ops)
    rows = [torch.cat(documents[:2]), torch.cat(documents[2:])]
    targets = [row.roll(-1).clamp(max=15) for row in rows]
    x = pad_sequence(rows, batch_first=True)
    y = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)

    def hidden():
        return torch.cat([h[: len(row)] for h, row in zip(model.hidden(x), rows, strict=True)])

    alone = torch.cat([model.hidden(d[None])[0] for d in documents])
    assert relative(hidden(), alone) < 1e-5
    model(x, y)[1].backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for d, t in zip(documents, torch.cat(targets).split([len(d) for d in documents]), strict=True):
        (model(d[None], t[None])[1] * len(d) / len(alone)).backward()
    for one, (name, p) in zip(together, model.named_parameters(), strict=True):
        assert relative(one, p.grad) < 1e-4, name
    model.config.document_token = -1
    assert relative(hidden(), alone) > 1e-2, "a leak would not show"


@either
def test_remat_changes_nothing(grid):
    """Not even where dropout draws."""
    x, grads = torch.cat(some_documents(grid))[None], []
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
def test_packed_rows_hold_the_same_sequences_as_padded_ones_in_other_companies_every_epoch(train):
    tasks = random_tasks(60, seed=4)
    tokens = {t.name: UNKNOWN_TASK + 1 + i for i, t in enumerate(tasks[::2])}
    packed = ArcDataLoader(tasks, 1, 512, train=train, task_tokens=tokens, packed=True)
    alone = ArcDataLoader(tasks, 1, 512, train=train, task_tokens=tokens)
    companies = []
    for _ in range(2):  # epochs
        companies.append({frozenset(plan.task for plan in row) for batch in packed.batches() for row in batch})
        batches, expected = list(packed), [part for x, y in alone for part in parts(x, y)]
        assert all(x.shape == y.shape == (1, 512) for x, y in batches)
        assert sorted(part for x, y in batches for part in parts(x, y)) == sorted(expected)
        assert len(batches) < 0.6 * len(expected) and packed.padding < 0.15 * packed.tokens
    assert not train or len(companies[0] & companies[1]) < len(companies[0]) / 4
