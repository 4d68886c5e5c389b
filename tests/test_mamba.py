"""The Mamba-2 layer against upstream's, and against GraniteMoeHybridMambaLayer of transformers, weights copied."""

import functools

import pytest
import torch
import torch.nn.functional as F
import upstream
from helpers import CPU, one_thread  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upstream import randomise, relative_error

import train
from train import GPT, PLAIN, Mamba2, ModelConfig

SIZES = dict(d_model=32, d_state=16, d_conv=4, expand=2, headdim=16, chunk_size=32)
TABLES = {"plain": PLAIN, "fast": train.pick_ops(CPU, torch.float32, "auto")}
every_table = pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)


def layer(ops=PLAIN):
    """Our layer with weights at which every parameter counts."""
    torch.manual_seed(0)
    ours = Mamba2(ModelConfig(**SIZES))
    randomise(ours)
    for module in ours.modules():
        module.ops = ops
    return ours


def run(module, u, gradient, function=None):
    """Output of module (or of a function of it), and the gradients of the input and of every parameter, by name."""
    module.zero_grad()
    u = u.clone().requires_grad_()
    y = (function or module)(u)
    y.backward(gradient)
    return y.detach(), {name: p.grad for name, p in module.named_parameters()} | {"u": u.grad}


def assert_close(found, expected, bound):
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert all(error <= bound for error in errors.values()), f"relative errors {errors}, allowed {bound}"


def inputs(length, batch=2, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, length, SIZES["d_model"], generator=draw)


def shapes(state_dict):
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def granite_layer():
    """transformers' layer of the same sizes."""
    modeling, heads = upstream.granite(), SIZES["expand"] * SIZES["d_model"] // SIZES["headdim"]
    config = modeling.GraniteMoeHybridConfig(
        hidden_size=SIZES["d_model"], num_hidden_layers=1, layer_types=["linear_attention"], num_attention_heads=1,
        rms_norm_eps=1e-5, mamba_n_heads=heads, mamba_d_head=SIZES["headdim"], mamba_n_groups=1,
        mamba_d_state=SIZES["d_state"], mamba_d_conv=SIZES["d_conv"], mamba_expand=SIZES["expand"],
        mamba_chunk_size=SIZES["chunk_size"],
    )  # fmt: skip
    return modeling.GraniteMoeHybridMambaLayer(config, layer_idx=0)


@every_table
@pytest.mark.parametrize("length", (1, 3, 32, 100))
def test_transformers_layer(length, ops):
    ours, theirs = layer(ops), granite_layer()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    y, gradients = run(ours, *inputs(length))
    expected, expected_gradients = run(theirs, *inputs(length))
    assert relative_error(y, expected) <= 1e-5
    assert_close(gradients, expected_gradients, 1e-4)


def test_names_and_shapes():
    """As mamba_ssm.Mamba2 2.3.2 declares them, written out: rows of in_proj are z, x, B, C, dt."""
    ours = Mamba2(ModelConfig(d_model=64, d_state=16, headdim=32))
    mixed = 128 + 2 * 16  # x, B, C
    assert shapes(ours.state_dict()) == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (128 + mixed + 4, 64),
        "conv1d.weight": (mixed, 1, 4),
        "conv1d.bias": (mixed,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


@pytest.mark.kernels
def test_upstream_layer():
    """mamba_ssm.Mamba2 itself on its Triton kernels. Either loads the other's weights strictly."""
    ours, (u, gradient) = layer(), inputs(40, batch=1)
    asked = {"options": SIZES | {"ngroups": 1}, "state_dict": ours.state_dict(), "u": u, "gradient": gradient}
    (answer,) = upstream.kernels({"layers": [asked]})["layers"]
    assert "error" not in answer, answer["error"]
    assert shapes(ours.state_dict()) == shapes(answer["initial"])
    layer().load_state_dict(answer["initial"], strict=True)
    for ops in TABLES.values():
        y, gradients = run(layer(ops), u, gradient)
        assert relative_error(y, answer["y"]) <= 1e-4
        assert_close(gradients, answer["gradients"], 5e-4)


@every_table
@settings(max_examples=4)
@example(bounds={1, 2, 4, 30})
@example(bounds={32, 64})  # the ends of chunks
@example(bounds={69})
@given(bounds=st.sets(st.integers(1, 69), max_size=6))
def test_packed_sequences_are_strangers(ops, bounds):
    """Neither the scan nor the convolution looks back into the sequence before, nor do their gradients."""
    ours, (u, gradient), ends = layer(ops), inputs(70), [0, *sorted(bounds), 70]
    seq_idx = torch.tensor([[sum(b <= t for b in bounds) for t in range(70)]] * 2)

    def one_by_one(u):
        return torch.cat([ours(u[:, begin:end]) for begin, end in zip(ends, ends[1:], strict=False)], dim=1)

    expected, expected_gradients = run(ours, u, gradient, one_by_one)
    for ids in (seq_idx, seq_idx.int()):
        y, gradients = run(ours, u, gradient, functools.partial(ours, seq_idx=ids))
        assert relative_error(y, expected) <= 1e-5
        assert_close(gradients, expected_gradients, 1e-4)
    assert not bounds or (ours(u) - expected).norm() > 1e-3 * expected.norm(), "a leak would not show"


@pytest.mark.parametrize("where", ("layer", "model"))
def test_initial_values(where):
    """As upstream draws them; the model's own initialisation must leave them alone."""
    torch.manual_seed(0)
    config = ModelConfig(16, 64, d_model=512, pattern="M", n_head=8, d_state=64, headdim=8, d_ff=64)
    mixer = Mamba2(config) if where == "layer" else GPT(config).blocks[0].mixer
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16, "uniform in 1..16"
    assert 0.9e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101, "log-uniform in 0.001..0.1"
    assert abs(dt.log().mean().exp() - 0.01) < 0.004
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5 and 0.27 < mixer.conv1d.weight.std() < 0.31, "uniform in -0.5..0.5"
    assert mixer.conv1d.bias.abs().max() <= 0.5 and 0.25 < mixer.conv1d.bias.std() < 0.33
