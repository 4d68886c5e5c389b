"""The functions of the CPU's table against the plain ones of train.py, and the choice between tables.

tests/test_scan.py has the scan. tests/test_triton.py starts a process that runs `TestFunctions` with Triton's kernels
instead, in Triton's interpreter.
"""

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CPU, differences, one_thread, tiny_model  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st
from upstream import INTERPRETED, assert_close, interpreter, results  # noqa: F401

import train
from data.files import UserError
from extras import kernels
from train import IGNORE_INDEX, PLAIN, Film

FORWARD, BACKWARD = (1e-5 if INTERPRETED else 2e-5), 1e-4  # relative
few = settings(max_examples=3 if INTERPRETED else 12)
rows, lengths = st.integers(1, 3), st.integers(1, 80 if INTERPRETED else 150)
slab_sizes = st.sampled_from((1, 500, 2**17))  # of one row, of a few, of all at once
either = pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))


def fast_ops(dtype=torch.float32) -> train.Ops:
    """The table under test."""
    if not INTERPRETED:
        return train.pick_ops(CPU, dtype, "auto")
    from extras import triton_kernels

    ours = {name: getattr(triton_kernels, name) for name in train.Ops._fields if hasattr(triton_kernels, name)}
    return PLAIN._replace(**ours | {"ssd_scan": PLAIN.ssd_scan})  # which is upstream's: tests/test_mamba.py


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents_of(seed: int, b: int, t: int) -> torch.Tensor:
    """Ids (b, t) that ascend from 0, a few to a row."""
    opens = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 3 / t
    opens[:, 0] = False
    return opens.long().cumsum(1)


def check(name: str, tensors: dict, slab: int = kernels.SLAB, wrap=lambda f: f, share: float = 0.0, **options) -> None:
    """The function called `name` of the table gives what the plain one gives, whatever it does at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SLAB", slab)
        if INTERPRETED:
            patch.setattr("extras.triton_kernels.TIME", 32)
            patch.setattr("extras.triton_kernels.LOGITS", 2**9 if slab == 500 else 2**27)
        found = results(wrap(getattr(fast_ops(), name)), tensors, **options)
    expected = results(wrap(getattr(PLAIN, name)), tensors, **options)
    for ours, reference in zip(found, expected, strict=True):
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in reference.items()}
    assert_close(found, expected, FORWARD, BACKWARD, share)


def grids(b: int, t: int) -> torch.Tensor:
    """Two tasks in a row, each of grids of any colours."""
    tokens = torch.randint(0, 10, (b, t), generator=torch.Generator().manual_seed(0))
    tokens[:, 7::8], tokens[:, 9::48], tokens[:, 25::48] = train.ROW, train.IN, train.OUT
    tokens[:, 0], tokens[:, t // 2] = 17, 18
    return tokens


def of_model(model: train.GPT, ops: train.Ops, tokens: torch.Tensor, dtype=torch.float32) -> tuple[dict, dict]:
    """The loss, and the gradients of all parameters."""
    model.use(ops)
    targets = tokens.roll(-1, 1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(tokens, targets.masked_fill(targets > 15, IGNORE_INDEX))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss}, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class TestFunctions:
    """What both tables, the CPU's and Triton's, have of their own; tensors are columns of wider ones."""

    @pytest.mark.parametrize("kind", ("bare", "gated", "film of a row", "of a document", "of a token"))
    @few
    @given(rows, lengths, st.sampled_from((8, 33, 64)), slab_sizes)
    @example(2, 150, 33, 500)
    def test_rms_norm(self, kind, b, t, d, slab):
        wide, weight = normal(0, b, t, 2 * d + 3), 1 + 0.3 * normal(1, d)
        tensors = {"x": wide[..., 3 : d + 3], "weight": weight}
        if kind == "gated":
            tensors["gate"] = wide[..., d + 3 :]
        tasks = {"film of a row": torch.arange(b)[:, None] % 3, "of a document": documents_of(3, b, t) * 2 % 3,
                 "of a token": torch.arange(b * t).view(b, t) % 3}.get(kind)  # fmt: skip
        if tasks is not None:
            tensors["table"] = normal(2, 4, 4 * d)[:, d : 3 * d]  # nobody asks for the last task

        def wrap(f):
            return lambda table=None, **more: f(**more, eps=1e-5, film=None if table is None else Film(table, tasks))

        check("rms_norm", tensors, slab, wrap)

    @either
    @few
    @given(rows, lengths, st.sampled_from((1, 8, 70)), st.integers(2 if INTERPRETED else 1, 4), slab_sizes)
    def test_causal_conv(self, packed, b, t, c, taps, slab):
        tensors = {"x": normal(0, b, t, c + 2)[..., 1:-1], "weight": normal(1, c, taps), "bias": normal(2, c)}
        check("causal_conv", tensors, slab, seq_idx=documents_of(3, b, t) if packed else None)

    @few
    @given(rows, lengths, st.sampled_from((1, 24, 700)), slab_sizes)
    def test_swiglu(self, b, t, f, slab):
        check("swiglu", {"gate_up": normal(0, b, t, 2 * f + 1)[..., 1:]}, slab)

    @few
    @given(rows, lengths, st.integers(1, 5), st.sampled_from((1, 10, 32)), st.booleans())
    def test_rotary(self, b, t, heads, pairs, shared):
        angles = normal(1, 1 if shared else b, t, pairs)
        for x in (normal(0, b, t, 3 * heads, 2 * pairs)[:, :, heads : 2 * heads],
                  normal(0, b, heads, t, 2 * pairs).transpose(1, 2)):  # fmt: skip
            check("rotary", {"x": x}, cos=angles.cos(), sin=angles.sin())

    @few
    @given(lengths, st.sampled_from((2, 300, 5000)), slab_sizes)
    def test_linear_cross_entropy(self, tokens, v, slab):
        targets = (torch.arange(tokens) * 7) % v
        targets[1::3] = IGNORE_INDEX
        hidden, weight = normal(0, tokens, 24), normal(1, v, 24)
        check("linear_cross_entropy", {"hidden": hidden, "weight": weight}, slab, targets=targets)
        check("linear_cross_entropy", {"hidden": hidden}, slab, weight=weight, targets=targets)
        with torch.no_grad():
            found, plain = (ops.linear_cross_entropy(hidden, weight, targets) for ops in (fast_ops(), PLAIN))
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)

    @pytest.mark.parametrize("kind", ("text", "grid", "packed"))
    @pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)))
    def test_a_model(self, kind, dtype, bound):
        """Loss and gradients of every parameter, with activations made again."""
        if INTERPRETED and dtype != torch.float32:
            return  # the interpreter knows no bfloat16
        tokens = grids(2, 60) if INTERPRETED else grids(3, 200)
        model = tiny_model("MA", kind != "text", document_token=16 if kind == "packed" else -1)
        plain = of_model(model.train(), PLAIN, tokens)
        model.remat = True
        assert_close(of_model(model, fast_ops(dtype), tokens, dtype), plain, bound / 10, bound)


# == THE CPU'S ALONE ==================================================================================================


@either
@few
@given(rows, lengths, st.integers(1, 3), st.integers(1, 9))
def test_attention(packed, b, t, heads, p):
    tensors = {name: normal(i, b, t, heads, p).transpose(1, 2) for i, name in enumerate("qkv")}
    check("attention", tensors, share=1e-3, documents=documents_of(3, b, t) if packed else None)


def test_float16_holds_the_gradients_of_many_targets():
    """Divided by 32,768 targets, most of them would be below float16's 6e-8; the loss is scaled, as GradScaler does."""
    tensors = {"hidden": normal(0, 2**15, 4), "weight": normal(1, 500, 4) / 10}

    def scaled(ops):
        return lambda **inputs: ops.linear_cross_entropy(**inputs, targets=torch.arange(2**15) % 500) * 1024

    with torch.autocast("cpu", torch.float16):
        found = results(scaled(kernels.CPU), tensors)
    assert_close(found, results(scaled(PLAIN), tensors), 0.01, 0.01)


def test_threads_may_use_the_table_at_once():
    """Pieces of a batch on threads of their own: each gets, to the last bit, what it gets alone."""
    pieces = [grids(2, 150 + 10 * i) for i in range(4)]
    model = tiny_model(grid=True)
    alone = [of_model(model, kernels.CPU, piece) for piece in pieces]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(lambda piece: of_model(model, kernels.CPU, piece), pieces))
    for one, other in zip(alone, together, strict=True):
        assert not differences(one, other)


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


def test_auto_dtype_is_what_a_gpu_has(monkeypatch):
    for capability, dtype in ((9, 0), torch.bfloat16), ((7, 5), torch.float16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert train.pick_dtype.plain(torch.device("cuda")) == dtype
