"""Parameter groups, NorMuon, AdamW, the schedule and the average of the weights."""

import copy
import math

import pytest
import torch
from helpers import (
    differences,
    one_thread,  # noqa: F401
    tiny_config,
)

from train import GPT, Mamba2, NorMuon, Optimizers, TrainConfig, make_ema, schedule

KINDS = [("muon", False), ("muon", True), ("adamw", False), ("adamw", True)]
every_kind = pytest.mark.parametrize("optimizer, grid", KINDS)


def make(optimizer="muon", grid=False, pattern="MAMA", **settings):
    """A model at its start and its optimizers."""
    torch.manual_seed(0)
    model = GPT(tiny_config(pattern, grid))
    return model, Optimizers(model, TrainConfig(optimizer=optimizer, **settings))


def groups(optimizers):
    """(optimizer, its group) for each group."""
    return [(o, g) for o in optimizers.all for g in o.param_groups]


@torch.no_grad()
def marked(model, optimizers, wanted):
    """Each parameter with 1 where a wanted group holds the number, 0 elsewhere (2 where two hold it)."""
    for p in model.parameters():
        p.zero_()
    for o, g in groups(optimizers):
        if wanted(o, g):
            for p in g["params"]:
                p += 1
    return dict(model.named_parameters())


def random_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


@every_kind
def test_every_number_of_every_parameter_is_in_exactly_one_group(optimizer, grid):
    for name, p in marked(*make(optimizer, grid), lambda o, g: True).items():
        assert (p == 1).all(), name


@every_kind
def test_only_matrices_and_embeddings_decay(optimizer, grid):
    model, optimizers = make(optimizer, grid, weight_decay=0.3)
    assert {g["weight_decay"] for _, g in groups(optimizers)} == {0.0, 0.3}
    for name, p in marked(model, optimizers, lambda o, g: g["weight_decay"] > 0).items():
        kept = any(part in name for part in ("conv1d", "norm", "A_log", "D", "dt_bias")) or p.dim() != 2
        assert (p == (0 if kept else 1)).all(), name


def test_muon_takes_the_hidden_matrices_and_no_rows_of_dt():
    model, optimizers = make("muon", grid=True)
    found = marked(model, optimizers, lambda o, g: isinstance(o, NorMuon))
    hidden = [name for name, p in found.items() if name.startswith("blocks.") and p.dim() == 2]
    assert len(hidden) == 4 * 4
    for name, p in found.items():
        if name.endswith("in_proj.weight"):
            nheads = model.blocks[int(name.split(".")[1])].mixer.nheads
            assert (p[:-nheads] == 1).all() and (p[-nheads:] == 0).all()
        else:
            assert (p == (1 if name in hidden else 0)).all(), name


def test_muon_holds_the_matrices_inside_the_fused_ones():
    """z, x, B, C, and q, k, v, and gate, up: each is made orthogonal by itself."""
    model, optimizers = make("muon", pattern="MA")
    shapes = sorted(tuple(p.shape) for o, g in groups(optimizers) if isinstance(o, NorMuon) for p in g["params"])
    mixer = next(m for m in model.modules() if isinstance(m, Mamba2))
    expected = [(mixer.d_inner, 32)] * 2 + [(mixer.d_state, 32)] * 2 + [(32, mixer.d_inner)]
    expected += [(32, 32)] * 4 + [(48, 32), (48, 32), (32, 48)] * 2
    assert shapes == sorted(expected)


def test_adamw_alone_holds_everything_if_asked():
    assert [type(o) for o in make("adamw")[1].all] == [torch.optim.AdamW]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@every_kind
def test_a_step_changes_every_number(optimizer, grid):
    model, optimizers = make(optimizer, grid)
    before = copy.deepcopy(model.state_dict())
    random_gradients(model)
    optimizers.step(1e-2)
    for name, p in model.state_dict().items():
        assert (p != before[name]).all(), name


def test_without_gradient_and_decay_a_step_changes_nothing():
    model, optimizers = make(weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(1e-2)
    assert not differences(before, model.state_dict())


def test_parts_of_a_fused_matrix_do_not_disturb_each_other():
    changes = []
    for scale in (1.0, 100.0):
        model, optimizers = make(pattern="M")
        weight = model.blocks[0].mixer.in_proj.weight
        before = weight.detach().clone()
        random_gradients(model)
        d_inner = model.blocks[0].mixer.d_inner
        weight.grad[d_inner:] *= scale
        optimizers.step(1e-2)
        changes.append((weight - before).detach())
    torch.testing.assert_close(changes[0][:d_inner], changes[1][:d_inner], rtol=0, atol=0)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-3, atol=1e-6)  # nor does the size of a gradient matter


def test_updates_have_the_size_of_adamws():
    model, optimizers = make(weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_gradients(model)
    optimizers.step(1e-2)
    for name, p in model.named_parameters():
        size = (p - before[name]).square().mean().sqrt().item() / 1e-2
        assert 0.19 < size < 1.01, f"{name}: {size}"  # 0.2 for Muon's, 1 for AdamW's first step


def test_a_step_goes_downhill():
    model, optimizers = make(grid=True)
    x = torch.randint(0, 14, (4, 40), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        loss = model(x[:, :-1], x[:, 1:])[1]
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        optimizers.step(1e-2)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("shape", [(2, 24, 64), (2, 64, 24), (1, 8, 40), (3, 1, 16)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    U, S, Vh = torch.linalg.svd(NorMuon.orthogonalize(G), full_matrices=False)
    assert S.min() > 0.6 and S.max() < 1.3
    exact, _, exact_vh = torch.linalg.svd(G, full_matrices=False)
    inside = exact.mT @ NorMuon.orthogonalize(G) @ exact_vh.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3 and inside.diagonal(dim1=-2, dim2=-1).min() > 0.6


def test_decay_is_decoupled_and_follows_the_learning_rate():
    model, optimizers = make(weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model.state_dict())
    optimizers.step(0.1)
    assert torch.allclose(model.embed.weight, before["embed.weight"] * 0.95)
    assert torch.allclose(model.blocks[0].mixer.in_proj.weight, before["blocks.0.mixer.in_proj.weight"] * 0.95)
    assert torch.equal(model.blocks[0].mixer.A_log, before["blocks.0.mixer.A_log"])


@every_kind
def test_state_goes_there_and_back(optimizer, grid):
    model, optimizers = make(optimizer, grid)
    for seed in range(3):
        random_gradients(model, seed)
        optimizers.step(1e-2)
    twin, others = make(optimizer, grid)
    twin.load_state_dict(model.state_dict())
    others.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    ours, theirs = ([o["state"] for o in each.state_dict()] for each in (optimizers, others))  # rates come with a step
    assert not differences(ours, theirs)
    for m, o in ((model, optimizers), (twin, others)):
        random_gradients(m, 9)
        o.step(1e-2)
    assert not differences(model.state_dict(), twin.state_dict())
    assert not differences(optimizers.state_dict(), others.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and average


def test_schedule_warms_up_stays_and_decays_to_zero():
    points = [schedule(i / 1000, 0.1, 0.4) for i in range(1001)]
    assert points == [schedule(i / 1000, 0.1, 0.4) for i in range(1001)]
    assert 0 < points[0] < 0.02 and all(a < b for a, b in zip(points[:99], points[1:100], strict=True))
    assert all(p == 1 for p in points[101:600])
    assert all(a > b for a, b in zip(points[601:], points[602:], strict=False)) and points[-1] == 0
    assert points[800] == pytest.approx(0.5) and points[50] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("warmup, decay", [(0, 0), (0, 1), (1, 0), (1, 1), (0.02, 0.4)])
def test_schedule_is_a_share_whatever_the_shares(warmup, decay):
    points = [schedule(i / 100, warmup, decay) for i in range(111)]
    assert all(0 <= p <= 1 and math.isfinite(p) for p in points)
    assert points[100] == 0 == points[110] and points[0] > 0 and max(points) > 0.49


def test_average_follows_the_weights_and_grows_with_the_run():
    model, _ = make(pattern="M")
    assert make_ema(model, 0.0) is None
    ema = make_ema(model, 0.5)
    mean = None
    for n in range(12):
        with torch.no_grad():
            model.embed.weight.fill_(n)
        ema.update_parameters(model)
        mean = float(n) if mean is None else mean + (n - mean) / (1 + 0.5 * n)  # horizon: half of the steps so far
        assert torch.allclose(ema.module.embed.weight, torch.tensor(mean))
    assert 5.5 < mean < 11
