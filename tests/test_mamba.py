"""The Mamba-2 layer against GraniteMoeHybridMambaLayer of transformers and, like its scan, against upstream's own."""

import pytest
import torch
import torch.nn.functional as F
import upstream
from helpers import CPU, one_thread  # noqa: F401
from test_scan import BOTH, make
from upstream import INTERPRETED, assert_close, interpreter, randomise, results  # noqa: F401

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


def inputs(length, batch=2):
    return torch.randn(batch, length, SIZES["d_model"], generator=torch.Generator().manual_seed(1))


def of_layer(module, u):
    """Output, and gradients of the input and of every parameter."""

    def function(u, **parameters):
        return torch.func.functional_call(module, parameters, (u,))

    return results(function, {"u": u} | dict(module.named_parameters()))


@pytest.fixture(scope="module")
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
def test_transformers_layer(length, ops, granite_layer):
    ours = layer(ops)
    granite_layer.load_state_dict(ours.state_dict(), strict=True)
    assert_close(of_layer(ours, inputs(length)), of_layer(granite_layer, inputs(length)), 1e-5, 1e-4)


# == AGAINST UPSTREAM =================================================================================================

FINAL = dict(initial=True, final=True)
CASES = [
    dict(length=96, D=False, dt_bias=False, dt_softplus=False),
    dict(length=70, groups=2),  # an unfilled chunk
    dict(length=96, groups=2, sizes=(1, 4, 16, 16)) | FINAL,
    dict(length=5) | FINAL,
    dict(length=96, starts=((10, 64), (31, 33, 40)), sizes=(2, 2, 16, 16)),
    dict(length=80, starts=((32, 70),), groups=2, final=True),
    dict(length=80, starts=((10, 64), (48,)), sizes=(2, 2, 16, 16)) | FINAL,
]


class TestUpstream:
    """Started by tests/test_triton.py; upstream's kernels take a second or two for each case."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_scan(self, case):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        tensors, options = make(**{"sizes": (1, 2, 16, 16)} | {k: v for k, v in case.items() if k != "final"})
        options |= {"chunk_size": 32, "return_final_states": "final" in case}
        hears = BOTH if "final" in case else BOTH[:1]
        theirs = {name: t if t.is_floating_point() else t.int() for name, t in tensors.items()}
        expected = results(mamba_chunk_scan_combined, theirs, hears, **options)
        for ops in TABLES.values():
            assert_close(results(ops.ssd_scan, tensors, hears, **options), expected, 1e-4, 5e-4, share=1e-5)

    def test_layer(self):
        """Either loads the other's weights strictly."""
        from mamba_ssm.modules.mamba2 import Mamba2 as Theirs

        theirs = Theirs(**SIZES, ngroups=1, use_mem_eff_path=False)  # the fused path needs compiled causal-conv1d
        layer().load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(layer().state_dict(), strict=True)
        expected = of_layer(theirs, inputs(40, batch=1))
        for ops in TABLES.values():
            assert_close(of_layer(layer(ops), inputs(40, batch=1)), expected, 1e-4, 5e-4)


def test_initial_values():
    """As upstream draws them; the model's own initialisation leaves them alone."""
    torch.manual_seed(0)
    mixer = GPT(ModelConfig(16, 64, d_model=512, pattern="M", n_head=8, d_state=64, headdim=8, d_ff=64)).blocks[0].mixer
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16, "uniform in 1..16"
    assert 0.9e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101, "log-uniform in 0.001..0.1"
    assert abs(dt.log().mean().exp() - 0.01) < 0.004
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5 and 0.27 < mixer.conv1d.weight.std() < 0.31, "uniform in -0.5..0.5"
    assert mixer.conv1d.bias.abs().max() <= 0.5 and 0.25 < mixer.conv1d.bias.std() < 0.33
