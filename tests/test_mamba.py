"""The Mamba-2 layer against upstream's, and against GraniteMoeHybridMambaLayer of transformers, weights copied."""

import functools

import pytest
import torch
import torch.nn.functional as F
import upstream
from upstream import randomise, relative_error

from train import GPT, Mamba2, ModelConfig

SIZES = dict(d_model=32, d_state=16, d_conv=4, expand=2, headdim=16, chunk_size=32)


def layer(seed=0, **changes):
    """Our layer with weights at which every parameter counts, and its options."""
    torch.manual_seed(seed)
    options = SIZES | changes
    ours = Mamba2(**options)
    randomise(ours, seed)
    return ours, options


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
    shape = (batch, length, SIZES["d_model"])
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def shapes(state_dict):
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def granite_layer(options):
    """transformers' layer of the same sizes."""
    modeling = upstream.granite()
    heads = options["expand"] * options["d_model"] // options["headdim"]
    config = modeling.GraniteMoeHybridConfig(
        hidden_size=options["d_model"],
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        mamba_n_heads=heads,
        mamba_d_head=options["headdim"],
        mamba_n_groups=options.get("ngroups", 1),
        mamba_d_state=options["d_state"],
        mamba_d_conv=options["d_conv"],
        mamba_expand=options["expand"],
        mamba_chunk_size=options["chunk_size"],
    )
    return modeling.GraniteMoeHybridMambaLayer(config, layer_idx=0)


@pytest.mark.parametrize("ngroups", (1, 2))
@pytest.mark.parametrize("length", (1, 3, 32, 100))
def test_transformers_layer(length, ngroups):
    ours, options = layer(ngroups=ngroups)
    theirs = granite_layer(options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    u, gradient = inputs(length)
    y, gradients = run(ours, u, gradient)
    expected, expected_gradients = run(theirs, u, gradient)
    assert relative_error(y, expected) <= 1e-5
    assert_close(gradients, expected_gradients, 1e-4)


@pytest.mark.parametrize("ngroups", (1, 2))
def test_names_and_shapes(ngroups):
    """As mamba_ssm.Mamba2 2.3.2 declares them, written out: rows of in_proj are z, x, B, C, dt."""
    ours = Mamba2(d_model=64, d_state=16, d_conv=4, expand=2, headdim=32, ngroups=ngroups)
    mixed = 128 + 2 * ngroups * 16  # x, B, C
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


KERNEL_CASES = {"one-group": dict(ngroups=1, length=40), "two-groups": dict(ngroups=2, length=33)}


@pytest.fixture(scope="module")
def upstream_layers():
    """mamba_ssm.Mamba2 itself, with our weights loaded strictly, on its Triton kernels."""
    asked = []
    for case in KERNEL_CASES.values():
        ours, options = layer(ngroups=case["ngroups"])
        u, gradient = inputs(case["length"], batch=1)
        asked.append({"options": options, "state_dict": ours.state_dict(), "u": u, "gradient": gradient})
    answers = upstream.kernels({"layers": asked})["layers"]
    return dict(zip(KERNEL_CASES, zip(asked, answers, strict=True), strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_upstream_layer(upstream_layers, name):
    """Loading is strict both ways: ours into theirs in the fixture, theirs into ours here."""
    asked, answer = upstream_layers[name]
    assert "error" not in answer, answer["error"]
    ours = Mamba2(**asked["options"])
    assert shapes(ours.state_dict()) == shapes(answer["initial"])
    ours.load_state_dict(answer["initial"], strict=True)
    ours.load_state_dict(asked["state_dict"], strict=True)
    y, gradients = run(ours, asked["u"], asked["gradient"])
    assert relative_error(y, answer["y"]) <= 1e-4
    assert_close(gradients, answer["gradients"], 5e-4)


@pytest.mark.kernels
def test_upstreams_fused_kernel():
    """Our layer with everything between the projections, and the last one, handed to upstream; packed and not."""
    asked = []
    for packed in (False, True):
        ours, options = layer(ngroups=1)
        u, gradient = inputs(40, batch=1)
        seq_idx = (torch.arange(40)[None] > 24).int() if packed else None
        state = ours.state_dict()
        asked.append({"options": options, "state_dict": state, "u": u, "gradient": gradient, "seq_idx": seq_idx})
    for case, answer in zip(asked, upstream.kernels({"fused": asked})["fused"], strict=True):
        assert "error" not in answer, answer["error"]
        y, gradients = run(ours, case["u"], case["gradient"], functools.partial(ours, seq_idx=case["seq_idx"]))
        assert relative_error(y, answer["y"]) <= 1e-4
        assert_close(gradients, answer["gradients"], 5e-4)


@pytest.mark.parametrize("bounds", ((0, 1, 2, 4, 30, 70), (0, 32, 64, 70), (0, 69, 70)), ids=("short", "edges", "last"))
def test_packed_sequences_are_strangers(bounds):
    """Neither the scan nor the convolution looks back into the sequence before, nor do their gradients."""
    ours, _ = layer()
    u, gradient = inputs(70)
    seq_idx = torch.zeros(2, 70, dtype=torch.long)
    for begin in bounds[1:-1]:
        seq_idx[:, begin:] += 1

    def one_by_one(u):
        return torch.cat([ours(u[:, begin:end]) for begin, end in zip(bounds, bounds[1:], strict=False)], dim=1)

    expected, expected_gradients = run(ours, u, gradient, one_by_one)
    for ids in (seq_idx, seq_idx.int()):
        y, gradients = run(ours, u, gradient, functools.partial(ours, seq_idx=ids))
        assert relative_error(y, expected) <= 1e-5
        assert_close(gradients, expected_gradients, 1e-4)
    assert (ours(u) - expected).norm() > 1e-2 * expected.norm(), "a leak would not show"


@pytest.mark.parametrize("where", ("layer", "model"))
def test_initial_values(where):
    """As upstream draws them; the model's own initialisation must leave them alone."""
    torch.manual_seed(0)
    if where == "layer":
        mixer = Mamba2(d_model=512, headdim=8)
    else:
        config = ModelConfig(16, 64, d_model=512, pattern="M", n_head=8, d_state=64, headdim=8, d_ff=64)
        mixer = GPT(config).blocks[0].mixer
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16, "uniform in 1..16"
    assert 0.9e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101, "log-uniform in 0.001..0.1"
    assert abs(dt.log().mean().exp() - 0.01) < 0.004
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5 and 0.27 < mixer.conv1d.weight.std() < 0.31, "uniform in -0.5..0.5"
    assert mixer.conv1d.bias.abs().max() <= 0.5 and 0.25 < mixer.conv1d.bias.std() < 0.33
