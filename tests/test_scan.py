"""Both scans, the plain one and the CPU's, against the recurrence: one step at a time, in float64.

tests/test_mamba.py compares them with upstream's own Triton kernels.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import one_thread  # noqa: F401
from upstream import assert_close, results

import train
from extras import kernels

BOTH = ("y", "final_states")
FAST = kernels.ssd_scan
WAYS = (train.ssd_scan, 1), (FAST, 1), (FAST, 2**14), (FAST, kernels.SLAB)  # and how much the fast one does at once


def recurrence(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, seq_idx=None, initial_states=None):
    """The definition: state = exp(dt A) state + dt x B^T, y = state C + D x; a new sequence starts from zero."""
    heads, groups = x.shape[2], B.shape[2]
    B, C = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (B, C))  # (B, T, H, N)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
    previous, ys = torch.zeros(x.shape[0], dtype=torch.long), []  # the initial state belongs to sequence 0
    for t in range(x.shape[1]):
        if seq_idx is not None:
            state = state * (seq_idx[:, t] == previous)[:, None, None, None]
            previous = seq_idx[:, t]
        decay = torch.exp(dt[:, t] * A)  # (B, H)
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[..., None, None] * state + update
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(ys, dim=1)
    return y if D is None else y + D[:, None] * x, state


def make(length, groups=1, starts=None, initial=False, D=True, dt_bias=True, dt_softplus=True, sizes=(2, 4, 16, 32)):
    """Random inputs at the scale a fresh Mamba-2 layer sees: dt log-uniform in 0.001..0.1, A uniform in -1..-16.

    sizes: batch, heads, P, N. starts: for each row the positions at which a new sequence starts.
    """
    batch, heads, headdim, state = sizes
    draw = torch.Generator().manual_seed(length)
    normal, uniform = (functools.partial(f, generator=draw) for f in (torch.randn, torch.rand))
    step = torch.exp(uniform(heads) * math.log(100) + math.log(1e-3))
    centre = step + torch.log(-torch.expm1(-step)) if dt_softplus else step  # softplus(centre) = step
    tensors = {
        "x": normal(batch, length, heads, headdim),
        "dt": (0.5 if dt_softplus else 0.1 * step) * normal(batch, length, heads),
        "A": -(1 + 15 * uniform(heads)),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
    }
    if dt_bias:
        tensors["dt_bias"] = centre
    else:
        tensors["dt"] += centre
    if D:
        tensors["D"] = normal(heads)
    if initial:
        tensors["initial_states"] = normal(batch, heads, headdim, state)
    if starts is not None:
        tensors["seq_idx"] = torch.tensor([[sum(s <= t for s in row) for t in range(length)] for row in starts])
    return tensors, {"dt_softplus": dt_softplus}


def check(tensors, options, hears=BOTH, chunk_size=64, forward=2e-5, backward=1e-4, vanishing=()):
    """The scans in float32 equal the recurrence in float64, outputs and gradients of every input.

    Gradients named in `vanishing` are all but zero in the reference; ours have to be so beside the largest one.
    """
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    outputs, gradients = results(recurrence, doubles, hears, **options)
    largest, names = max(gradient.norm() for gradient in gradients.values()), BOTH if BOTH[1] in hears else BOTH[:1]
    vanished = [gradients.pop(name) for name in vanishing]
    options = options | {"chunk_size": chunk_size, "return_final_states": len(names) == 2}
    for scan, slab in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "SLAB", slab)
            found = results(scan, tensors, hears, **options)
        vanished += [found[1].pop(name) for name in vanishing]
        assert_close(found, ({name: outputs[name] for name in names}, gradients), forward, backward, share=1e-5)
    assert all(gradient.norm() <= 1e-6 * largest for gradient in vanished)


@pytest.mark.parametrize(
    "groups, initial, final", [(1, False, False), (1, True, True), (2, False, True), (2, True, False)]
)
@pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))
@pytest.mark.parametrize("length", (1, 3, 63, 64, 65, 257))
def test_recurrence(length, packed, groups, initial, final):
    starts = ((length // 3, length // 2), (2 * length // 3,)) if length > 1 else ((), ())
    check(*make(length, groups, starts if packed else None, initial), hears=BOTH[: 1 + final])


def test_optional_arguments():
    for D, dt_bias, dt_softplus in itertools.product((False, True), repeat=3):
        check(*make(65, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus))


@pytest.mark.parametrize("starts", [
    ((10,), (100,)),  # inside a chunk
    ((64,), (128, 192)),  # at a chunk's edge
    ((63,), (65,)),  # one before and one after it
    ((70, 75, 76, 90, 127), (1, 2, 3, 62)),  # several inside one chunk
    ((3, 130), (250,)),  # one sequence over whole chunks
    (tuple(range(1, 200)), ()),  # a new sequence at every step; none at all
    ((199,), (192,)),  # the last sequence is one token long; it is the last, unfilled chunk
], ids=("inside", "edge", "beside-edge", "several", "long", "every-step", "last"))  # fmt: skip
@pytest.mark.parametrize("hears", (BOTH, BOTH[1:]), ids=("", "the final state alone"))
def test_sequences_start_anywhere(starts, hears):
    check(*make(200, groups=2, starts=starts, initial=True), hears=hears)


@pytest.mark.parametrize("chunk_size", (1, 7, 16, 32, 128, 256))
def test_any_chunk_size(chunk_size):
    check(*make(100, groups=2, starts=((10, 64), (33, 34)), initial=True), chunk_size=chunk_size)


def test_realistic_sizes():
    check(*make(257, initial=True, sizes=(1, 8, 64, 64)))


def test_chunks_are_cut_shorter_where_decay_is_steep():
    """A decay of e^-200 over one chunk cannot be taken apart into two factors; a step of 0 changes no state."""
    tensors, options = make(150, initial=True, dt_bias=False, dt_softplus=False)
    tensors["dt"], tensors["A"] = 0.2 + tensors["dt"].abs(), tensors["A"].clamp(max=-8)
    tensors["dt"][:, 70:90] = tensors["dt"][1, 130:] = 0
    check(tensors, options)


@pytest.mark.parametrize("starts", (None, ((10, 100), (64, 190))), ids=("", "packed"))
def test_large_steps_do_not_overflow(starts):
    """dt 5 and A -16 decay by e^-80 a step: every exponent must be negative before it is taken, gradients included."""
    tensors, _ = make(200, starts=starts, initial=True, D=False, dt_bias=False, dt_softplus=False)
    tensors["dt"].fill_(5.0)
    tensors["A"].fill_(-16.0)
    check(tensors, {}, vanishing=("A", "initial_states"))


def test_large_and_small_steps_together():
    """A burst of strong decay must not blur the steps after it (the running sum is then some thousands)."""
    tensors, _ = make(200, initial=True, D=False, dt_bias=False, dt_softplus=False)
    tensors["dt"][:] = torch.where(torch.arange(200) % 50 < 20, 5.0, 1e-2)[:, None]
    tensors["A"].fill_(-16.0)
    check(tensors, {}, forward=1e-3, backward=1e-3)
