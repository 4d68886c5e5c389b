"""Parameter groups, NorMuon, AdamW and the schedule."""

import copy

import numpy as np
import pytest
import torch
from helpers import differences, one_thread, tiny_config  # noqa: F401
from hypothesis import example, given
from hypothesis import strategies as st

from train import GPT, NorMuon, Optimizers, TrainConfig, schedule

every_kind = pytest.mark.parametrize("optimizer, grid", [(o, g) for o in ("muon", "adamw") for g in (False, True)])


def make(optimizer="muon", grid=False, pattern="MAMA", **settings):
    """A model at its start and its optimizers."""
    torch.manual_seed(0)
    model = GPT(tiny_config(pattern, grid))
    return model, Optimizers(model, TrainConfig(optimizer=optimizer, **settings))


@torch.no_grad()
def marked(model, optimizers, wanted):
    """Each parameter with 1 where a wanted group holds the number, 0 elsewhere (2 where two hold it)."""
    for p in model.parameters():
        p.zero_()
    for p in (p for o in optimizers.all for g in o.param_groups if wanted(o, g) for p in g["params"]):
        p += 1
    return dict(model.named_parameters())


def step(model, optimizers, gradient=None, lr=1e-2):
    """One step on random gradients, or on `gradient` everywhere; what each parameter was before it."""
    before, generator = copy.deepcopy(model.state_dict()), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if gradient is None else torch.full_like(p, gradient)
    optimizers.step(lr)
    return before


@every_kind
def test_every_number_is_in_one_group_and_only_matrices_and_embeddings_decay(optimizer, grid):
    model, optimizers = make(optimizer, grid, weight_decay=0.3)
    assert all((p == 1).all() for p in marked(model, optimizers, lambda o, g: True).values())
    assert {g["weight_decay"] for o in optimizers.all for g in o.param_groups} == {0.0, 0.3}
    for name, p in marked(model, optimizers, lambda o, g: g["weight_decay"] > 0).items():
        kept = any(part in name for part in ("conv1d", "norm", "A_log", "D", "dt_bias")) or p.dim() != 2
        assert (p == (0 if kept else 1)).all(), name


def test_muon_takes_the_hidden_matrices_each_by_itself_and_no_rows_of_dt():
    model, optimizers = make("muon", grid=True, pattern="MA")
    shapes = [tuple(p.shape) for o in optimizers.all if isinstance(o, NorMuon) for p in o.param_groups[0]["params"]]
    expected = [(64, 32)] * 2 + [(8, 32)] * 2 + [(32, 64)]  # z, x, B, C and the projection out; d_inner 64, d_state 8
    expected += [(32, 32)] * 4 + [(48, 32), (48, 32), (32, 48)] * 2  # q, k, v and out; gate, up and down
    assert sorted(shapes) == sorted(expected)
    found = marked(model, optimizers, lambda o, g: isinstance(o, NorMuon))
    hidden = [name for name, p in found.items() if name.startswith("blocks.") and p.dim() == 2]
    assert len(hidden) == 4 * 2
    for name, p in found.items():
        if name.endswith("in_proj.weight"):
            nheads = model.blocks[0].mixer.nheads
            assert (p[:-nheads] == 1).all() and (p[-nheads:] == 0).all()
        else:
            assert (p == (1 if name in hidden else 0)).all(), name
    assert [type(o) for o in make("adamw")[1].all] == [torch.optim.AdamW]


@every_kind
def test_a_step_changes_every_number_by_as_much_as_adamw_does(optimizer, grid):
    model, optimizers = make(optimizer, grid, weight_decay=0.0)
    before = step(model, optimizers)
    for name, p in model.named_parameters():
        assert (p != before[name]).all(), name
        size = (p - before[name]).square().mean().sqrt().item() / 1e-2
        assert 0.19 < size < 1.01, f"{name}: {size}"  # 0.2 for Muon's, 1 for AdamW's first step


def test_without_gradient_a_step_only_decays_and_as_far_as_the_learning_rate_says():
    model, optimizers = make(weight_decay=0.0)
    assert not differences(step(model, optimizers, gradient=0.0), model.state_dict())
    model, optimizers = make(weight_decay=0.5)
    before = step(model, optimizers, gradient=0.0, lr=0.1)
    for name, p in model.named_parameters():
        kept = p.dim() != 2 or "conv1d" in name
        torch.testing.assert_close(p.detach(), before[name] * (1 if kept else 0.95), msg=name)


@example((2, 24, 64))
@example((2, 64, 24))
@example((3, 1, 16))
@given(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(16, 40)))
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    S = torch.linalg.svdvals(NorMuon.orthogonalize(G))
    assert S.min() > 0.6 and S.max() < 1.3
    exact, _, exact_vh = torch.linalg.svd(G, full_matrices=False)
    inside = exact.mT @ NorMuon.orthogonalize(G) @ exact_vh.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3 and inside.diagonal(dim1=-2, dim2=-1).min() > 0.6


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (1, 8)])
def test_steps_of_normuon_are_those_of_its_papers(shape):
    """Written out for one matrix: Nesterov momentum, orthogonalized; each row over its root mean square; 0.2 on the
    average; decay apart from it."""
    rng, (lr, decay, mu, beta) = np.random.default_rng(0), (0.03, 0.2, 0.9, 0.8)
    W, M, V = rng.normal(size=shape), np.zeros(shape), np.zeros((shape[0], 1))
    ours = torch.nn.Parameter(torch.tensor(W, dtype=torch.float32))
    optimizer = NorMuon([ours], lr, decay, mu, beta)
    for _ in range(4):
        G = rng.normal(size=shape)
        ours.grad = torch.tensor(G, dtype=torch.float32)
        optimizer.step()
        M = mu * M + (1 - mu) * G
        U = NorMuon.orthogonalize(torch.tensor(mu * M + (1 - mu) * G)[None])[0].numpy()
        V = beta * V + (1 - beta) * (U**2).mean(1, keepdims=True)
        U = U / np.sqrt(V)
        W = W * (1 - lr * decay) - lr * 0.2 * U / np.sqrt((U**2).mean())
        np.testing.assert_allclose(ours.detach().numpy(), W, rtol=1e-3, atol=1e-5)


def test_schedule_warms_up_stays_and_decays_to_zero():
    points = [schedule(i / 1000, 0.1, 0.4) for i in range(1001)]
    assert 0 < points[0] < 0.02 and all(a < b for a, b in zip(points[:99], points[1:100], strict=True))
    assert all(p == 1 for p in points[101:600])
    assert all(a > b for a, b in zip(points[601:], points[602:], strict=False)) and points[-1] == 0
    assert points[800] == pytest.approx(0.5) and points[50] == pytest.approx(0.5, abs=0.02)


@given(st.floats(0, 1), st.floats(0, 1))
def test_schedule_is_a_share_whatever_the_shares(warmup, decay):
    points = [schedule(i / 100, warmup, decay) for i in range(111)]
    assert all(0 <= p <= 1 for p in points)
    assert points[100] == 0 == points[110] and points[0] > 0 and max(points) > 0.49
