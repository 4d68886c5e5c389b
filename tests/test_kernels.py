"""Every function of the CPU's table against the plain one of train.py, and the choice between tables."""

import sys
import threading
import types

import pytest
import torch
from helpers import CPU, one_thread, tiny_model  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upstream import relative_error

import train
from data.files import UserError
from extras import kernels
from train import PLAIN, Film

FORWARD, BACKWARD = 2e-5, 1e-4  # relative
quick = settings(max_examples=25, deadline=None, derandomize=True)
lengths = st.integers(1, 150)
slab_sizes = st.sampled_from((1, 500, 2**17))  # of one row, of a few, of all at once


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents_of(seed: int, b: int, t: int) -> torch.Tensor:
    """Ids (b, t) that ascend from 0, a few to a row."""
    opens = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 3 / t
    opens[:, 0] = False
    return opens.long().cumsum(1)


def results(function, tensors: dict, **options) -> dict:
    """Outputs and all gradients of a function of named tensors, for a gradient that is random but the same."""
    tensors = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in tensors.items()}
    found = function(**tensors, **options)
    found = found if isinstance(found, tuple) else (found,)
    inputs = {k: v for k, v in tensors.items() if v.requires_grad}
    above = [normal(9 + i, *v.shape).to(v) for i, v in enumerate(found)]
    gradients = dict(zip(inputs, torch.autograd.grad(found, inputs.values(), above), strict=True))
    return {f"output {i}": v for i, v in enumerate(found)} | gradients


def check(name: str, tensors: dict, slab: int = kernels.SLAB, wrap=lambda f: f, **options) -> None:
    """The function called `name` of the CPU's table gives what the plain one gives, whatever it does at once.

    Errors are relative, but a gradient that is nothing beside the largest, where nothing hears the past, may differ.
    """
    expected = results(wrap(getattr(PLAIN, name)), tensors, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SLAB", slab)
        found = results(wrap(getattr(kernels.CPU, name)), tensors, **options)
    least = 1e-3 * max(value.norm() for key, value in expected.items() if not key.startswith("output"))
    for key, value in expected.items():
        error = (found[key] - value).norm() / (value.norm() if key.startswith("output") else max(value.norm(), least))
        assert found[key].dtype == value.dtype
        assert error <= (FORWARD if key.startswith("output") else BACKWARD), f"{name}, {key}: {float(error)}"


# == THE TABLE ========================================================================================================


@quick
@given(st.integers(1, 3), lengths, st.integers(8, 40), st.booleans(), slab_sizes)
def test_rms_norm(b, t, d, gated, slab):
    tensors = {"x": normal(0, b, t, d), "weight": 1 + 0.3 * normal(1, d)}
    if gated:  # a strided view, as a part of a projection is
        tensors["gate"] = normal(2, b, t, d + 3)[..., 1 : d + 1]
    check("rms_norm", tensors, slab, eps=1e-5)


@quick
@given(st.integers(1, 3), lengths, st.integers(8, 40), st.sampled_from(("row", "documents", "any")), slab_sizes)
@example(2, 150, 40, "row", 500)
@example(2, 150, 8, "documents", 2**17)
def test_film(b, t, d, kind, slab):
    tasks = {"row": torch.arange(b)[:, None] % 3, "documents": documents_of(3, b, t) % 3,
             "any": torch.arange(b * t).view(b, t) % 3}[kind]
    tensors = {"x": normal(0, b, t, d), "weight": 1 + 0.3 * normal(1, d), "table": normal(2, 3, 4 * d)[:, d : 3 * d]}

    def with_film(function):
        return lambda x, weight, table: function(x, weight, 1e-5, film=Film(table, tasks))

    check("rms_norm", tensors, slab, wrap=with_film)


@quick
@given(st.integers(1, 3), lengths, st.integers(1, 12), st.integers(1, 4), st.booleans(), slab_sizes)
def test_causal_conv(b, t, c, taps, packed, slab):
    tensors = {"x": normal(0, b, t, c + 2)[..., 1:-1], "weight": normal(1, c, taps), "bias": normal(2, c)}
    check("causal_conv", tensors, slab, seq_idx=documents_of(3, b, t) if packed else None)


@quick
@given(st.integers(1, 3), lengths, st.sampled_from((1, 2)), st.integers(1, 70), st.booleans(), st.booleans(),
       st.booleans(), slab_sizes)
@example(2, 150, 1, 32, True, True, True, 500)
def test_ssd_scan(b, t, g, chunk, packed, initial, final, slab):
    h, p, n = 4, 8, 8
    tensors = {"x": normal(0, b, t, h, p), "dt": normal(1, b, t, h), "A": -8 * normal(8, h).abs(),
               "B": normal(2, b, t, g, n), "C": normal(3, b, t, g, n), "D": normal(4, h), "dt_bias": normal(5, h) - 3}
    if initial:
        tensors["initial_states"] = normal(6, b, h, p, n)
    check("ssd_scan", tensors, slab, chunk_size=chunk, dt_softplus=True, return_final_states=final,
          seq_idx=documents_of(7, b, t) if packed else None)


@quick
@given(st.integers(1, 3), lengths, st.integers(1, 40), slab_sizes)
def test_swiglu(b, t, f, slab):
    check("swiglu", {"gate_up": normal(0, b, t, 2 * f)}, slab)


@quick
@given(st.integers(1, 3), lengths, st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_rotary(b, t, heads, pairs, shared):
    angles = normal(1, 1 if shared else b, t, pairs)
    qk = {"x": normal(0, b, t, heads + 1, 2 * pairs)[:, :, :-1]}
    check("rotary", qk, cos=angles.cos(), sin=angles.sin())


@quick
@given(st.integers(1, 3), lengths, st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_attention(b, t, heads, p, packed):
    tensors = {name: normal(i, b, t, heads, p).transpose(1, 2) for i, name in enumerate("qkv")}
    check("attention", tensors, documents=documents_of(3, b, t) if packed else None)


@quick
@given(lengths, st.integers(1, 20), st.integers(2, 70))
def test_linear_cross_entropy(tokens, d, v):
    targets = (torch.arange(tokens) * 7) % v
    targets[1::3] = train.IGNORE_INDEX
    check("linear_cross_entropy", {"hidden": normal(0, tokens, d), "weight": normal(1, v, d)}, targets=targets)


def test_float16_holds_the_gradients_of_many_targets():
    """Divided by 32,768 targets, most of them would be below float16's 6e-8; the loss is scaled, as GradScaler does."""
    hidden, weight, targets = normal(0, 2**15, 4), normal(1, 500, 4) / 10, torch.arange(2**15) % 500
    expected = gradients(PLAIN.linear_cross_entropy, hidden, weight, targets, 1024)
    with torch.autocast("cpu", torch.float16):
        found = gradients(kernels.CPU.linear_cross_entropy, hidden, weight, targets, 1024)
    assert all(relative_error(f, e) < 0.01 for f, e in zip(found, expected, strict=True))


def gradients(cross_entropy, hidden, weight, targets, scale):
    """Of the scaled loss, for hidden and weight."""
    inputs = [v.clone().requires_grad_() for v in (hidden, weight)]
    return torch.autograd.grad(cross_entropy(*inputs, targets) * scale, inputs)


def test_no_entry_is_forgotten():
    """Every entry of the table has a test here, and is not the plain function."""
    for name in train.Ops._fields[1:]:
        assert f"test_{name}" in globals() and getattr(kernels.CPU, name) is not getattr(PLAIN, name)


# == IN A MODEL =======================================================================================================


def loss_and_gradients(model: train.GPT, ops: train.Ops, tokens: torch.Tensor, dtype=torch.float32) -> dict:
    model.use(ops)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(tokens, tokens.roll(-1, 1).clamp(max=15))
    return {"loss": loss} | dict(zip((n for n, _ in model.named_parameters()),
                                     torch.autograd.grad(loss, list(model.parameters())), strict=True))


def grids(rows: int, length: int) -> torch.Tensor:
    """Two tasks in a row, each of grids of any colours."""
    tokens = torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 7::8], tokens[:, 9::48], tokens[:, 25::48] = train.ROW, train.IN, train.OUT
    tokens[:, 0], tokens[:, length // 2] = 17, 18
    return tokens


@pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)))
def test_a_model_computes_what_the_plain_table_does_in_float32(packed, dtype, bound):
    model, tokens = tiny_model(grid=True, document_token=16 if packed else -1), grids(3, 200)
    plain = loss_and_gradients(model, PLAIN, tokens)
    fast = loss_and_gradients(model, train.pick_ops(CPU, dtype, "auto"), tokens, dtype)
    errors = {name: relative_error(fast[name], plain[name]) for name in plain}
    assert max(errors.values()) <= bound, errors


def test_threads_may_use_the_table_at_once():
    """Pieces of a batch on threads of their own: each gets, to the last bit, what it gets alone."""
    pieces = [grids(2, 150 + 10 * i) for i in range(4)]
    alone = [loss_and_gradients(tiny_model(grid=True), kernels.CPU, piece) for piece in pieces]
    together: list = [None] * 4
    model = tiny_model(grid=True)

    def work(i: int) -> None:
        torch.set_num_threads(1)
        together[i] = loss_and_gradients(model, kernels.CPU, pieces[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


# == THE CHOICE =======================================================================================================


def test_what_is_picked():
    assert train.pick_ops(CPU, torch.float32, "plain") is PLAIN
    assert train.pick_ops(CPU, torch.float32, "auto") is kernels.CPU
    assert train.pick_ops(torch.device("mps"), torch.float32, "auto") is PLAIN
    assert kernels.CPU.name != PLAIN.name
    with pytest.raises(UserError, match="^--kernels triton: .*--device cuda.*$"):
        train.pick_ops(CPU, torch.float32, "triton")


def test_where_triton_does_not_work_its_place_is_taken_and_the_reason_said(monkeypatch):
    def make_ops(plain, strict):
        raise RuntimeError("no kernel here\nand more")

    monkeypatch.setitem(sys.modules, "extras.triton_kernels", types.SimpleNamespace(make_ops=make_ops))
    cuda = torch.device("cuda")
    ops = kernels.pick_ops(cuda, torch.bfloat16, "auto")
    assert "RuntimeError: no kernel here" in ops.name and "and more" not in ops.name
    assert ops.ssd_scan is PLAIN.ssd_scan
    with pytest.raises(UserError, match="^--kernels triton: RuntimeError: no kernel here; .*$"):
        kernels.pick_ops(cuda, torch.bfloat16, "triton")
    monkeypatch.setitem(sys.modules, "extras.triton_kernels",
                        types.SimpleNamespace(make_ops=lambda plain, strict: plain._replace(name="Triton")))
    assert kernels.pick_ops(cuda, torch.bfloat16, "auto").name == "Triton"


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_is_what_a_gpu_has(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.pick_dtype.plain(torch.device("cuda")) == dtype
