"""Both scans, the plain one and the CPU's, against references that nobody here wrote.

These are the recurrence, one step at a time in float64, and upstream's own Triton kernels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import upstream
from helpers import one_thread  # noqa: F401
from upstream import relative_error

import train
from extras import kernels

SCANS = {"plain": train.ssd_scan, "fast": kernels.ssd_scan}
every_scan = pytest.mark.parametrize("ssd_scan", SCANS.values(), ids=SCANS)
LENGTHS = (1, 3, 63, 64, 65, 257)
BATCH, HEADS, HEADDIM, STATE, CHUNK = 2, 4, 16, 32, 64


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


def make(length, groups=1, seq_idx=None, initial=False, D=True, dt_bias=True, dt_softplus=True, seed=0, sizes=()):
    """Random inputs at the scale a fresh Mamba-2 layer sees: dt log-uniform in 0.001..0.1, A uniform in -1..-16."""
    batch, heads, headdim, state = sizes or (BATCH, HEADS, HEADDIM, STATE)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    def uniform(*shape):
        return torch.rand(*shape, generator=draw)

    step = torch.exp(uniform(heads) * math.log(100) + math.log(1e-3))
    before_softplus = step + torch.log(-torch.expm1(-step))
    centre = before_softplus if dt_softplus else step
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
    if seq_idx is not None:
        tensors["seq_idx"] = seq_idx
    return tensors, {"dt_softplus": dt_softplus}


def ids(length, *starts):
    """seq_idx (B, T) from one tuple per row: the positions at which a new sequence starts."""
    rows = torch.zeros(len(starts), length, dtype=torch.long)
    for row, begins in zip(rows, starts, strict=True):
        for begin in begins:
            row[begin:] += 1
    return rows


def outputs_and_gradients(function, tensors, gradients, **options):
    tensors = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    result = function(**tensors, **options)
    outputs = dict(zip(("y", "final_states"), result if isinstance(result, tuple) else (result,), strict=False))
    torch.autograd.backward([outputs[name] for name in gradients], list(gradients.values()))
    return outputs, {name: t.grad for name, t in tensors.items() if t.is_floating_point()}


def output_gradients(tensors, final, seed=1):
    """What the loss sends back: a random gradient for y and, if asked, for the final states."""
    draw = torch.Generator().manual_seed(seed)
    x, B = tensors["x"], tensors["B"]
    gradients = {"y": torch.randn(x.shape, generator=draw)}
    if final:
        gradients["final_states"] = torch.randn(x.shape[0], *x.shape[2:], B.shape[-1], generator=draw)
    return gradients


def check(tensors, options, final=True, chunk_size=CHUNK, forward=2e-5, backward=1e-4, vanishing=()):
    """The scans in float32 equal the recurrence in float64, outputs and gradients of every input.

    Gradients named in `vanishing` are all but zero in the reference; ours have to be so beside the largest one.
    """
    gradients = output_gradients(tensors, final)
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wide = {name: t.double() for name, t in gradients.items()}
    expected, expected_gradients = outputs_and_gradients(recurrence, doubles, wide, **options)
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name in vanishing:
        assert expected_gradients.pop(name).norm() <= 1e-6 * largest
    for scan in SCANS.values():
        outputs, found = outputs_and_gradients(
            scan, tensors, gradients, chunk_size=chunk_size, return_final_states=final, **options
        )
        assert outputs.keys() == gradients.keys(), "final states come back exactly when they are asked for"
        assert_close(outputs, {name: expected[name] for name in outputs}, forward)
        for name in vanishing:
            assert found.pop(name).norm() <= 1e-6 * largest
        assert_close(found, expected_gradients, backward)


def assert_close(found, expected, bound):
    """Relative errors; of what is all but zero in the reference, relative to a 100,000th of the largest."""
    assert found.keys() == expected.keys()
    assert None not in found.values(), f"no gradient: {[name for name in found if found[name] is None]}"
    least = 1e-5 * max(v.norm().double() for v in expected.values())
    errors = {name: relative_error(found[name], expected[name], least) for name in found}
    assert all(error <= bound for error in errors.values()), f"relative errors {errors}, allowed {bound}"


# ---------------------------------------------------------------------------------------------------------------------
# Against the recurrence


@pytest.mark.parametrize("final", (False, True), ids=("", "final"))
@pytest.mark.parametrize("initial", (False, True), ids=("", "initial"))
@pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("length", LENGTHS)
def test_recurrence(length, groups, packed, initial, final):
    starts = ((length // 3, length // 2), (2 * length // 3,)) if length > 1 else ((), ())
    seq_idx = ids(length, *starts) if packed else None
    check(*make(length, groups, seq_idx, initial, seed=length), final=final)


@pytest.mark.parametrize("dt_softplus", (False, True), ids=("", "softplus"))
@pytest.mark.parametrize("dt_bias", (False, True), ids=("", "dt_bias"))
@pytest.mark.parametrize("D", (False, True), ids=("", "D"))
def test_optional_arguments(D, dt_bias, dt_softplus):
    check(*make(65, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus))


@pytest.mark.parametrize(
    "starts",
    (
        ((10,), (100,)),  # inside a chunk
        ((64,), (128, 192)),  # at a chunk's edge
        ((63,), (65,)),  # one before and one after it
        ((70, 75, 76, 90, 127), (1, 2, 3, 62)),  # several inside one chunk
        ((3, 130), (250,)),  # one sequence over whole chunks
        (tuple(range(1, 200)), ()),  # a new sequence at every step; none at all
        ((199,), (192,)),  # the last sequence is one token long; it is the last, unfilled chunk
    ),
    ids=("inside", "edge", "beside-edge", "several", "long", "every-step", "last"),
)
@pytest.mark.parametrize("initial", (False, True), ids=("", "initial"))
def test_sequences_start_anywhere(starts, initial):
    check(*make(200, groups=2, seq_idx=ids(200, *starts), initial=initial))


@every_scan
def test_sequences_in_a_row_are_strangers(ssd_scan):
    """Packed sequences give what each gives alone; only the first sees the initial state."""
    bounds = (0, 20, 64, 65, 150)
    tensors, options = make(150, seq_idx=ids(150, bounds[1:-1], bounds[1:-1]), initial=True)
    y, state = ssd_scan(**tensors, **options, chunk_size=CHUNK, return_final_states=True)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        alone = {name: t[:, begin:end] if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}
        del alone["seq_idx"]
        if begin > 0:
            del alone["initial_states"]
        y_alone, state_alone = ssd_scan(**alone, **options, chunk_size=CHUNK, return_final_states=True)
        assert relative_error(y[:, begin:end], y_alone) <= 2e-5
    assert relative_error(state, state_alone) <= 2e-5


@every_scan
def test_gradient_of_the_final_state_alone(ssd_scan):
    """The state may be all that the loss sees, and nothing but the last sequence reaches it."""
    tensors, options = make(100, groups=2, seq_idx=ids(100, (10, 80), ()), initial=True, D=False)
    gradients = {"final_states": output_gradients(tensors, final=True)["final_states"]}
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wide = {"final_states": gradients["final_states"].double()}
    _, expected = outputs_and_gradients(recurrence, doubles, wide, **options)
    _, found = outputs_and_gradients(
        ssd_scan, tensors, gradients, chunk_size=CHUNK, return_final_states=True, **options
    )
    unheard = found.pop("C")  # None or zeros
    assert expected.pop("C") is None and (unheard is None or unheard.norm() == 0)
    assert found["x"][0, :80].norm() == 0
    assert_close(found, expected, 1e-4)


@every_scan
def test_final_state_continues_the_sequence(ssd_scan):
    tensors, options = make(150, groups=2, initial=True)
    whole, last = ssd_scan(**tensors, **options, chunk_size=CHUNK, return_final_states=True)
    parts, state = [], tensors["initial_states"]
    for begin, end in ((0, 1), (1, 70), (70, 150)):
        part = {name: t[:, begin:end] if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}
        part["initial_states"] = state
        y, state = ssd_scan(**part, **options, chunk_size=CHUNK, return_final_states=True)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), whole) <= 2e-5
    assert relative_error(state, last) <= 2e-5


@pytest.mark.parametrize("chunk_size", (1, 7, 16, 32, 64, 128, 256))
def test_any_chunk_size(chunk_size):
    tensors, options = make(100, groups=2, seq_idx=ids(100, (10, 64), (33, 34)), initial=True)
    check(tensors, options, chunk_size=chunk_size)


def test_realistic_sizes():
    check(*make(257, initial=True, sizes=(1, 8, 64, 64)))


def test_chunks_are_cut_shorter_where_decay_is_steep():
    """A decay of e^-200 over one chunk cannot be taken apart into two factors: both scans still give the recurrence."""
    tensors, options = make(150, initial=True, dt_bias=False, dt_softplus=False)
    tensors["dt"], tensors["A"] = 0.2 + tensors["dt"].abs(), tensors["A"].clamp(max=-8)
    check(tensors, options)


@pytest.mark.parametrize("packed", (False, True), ids=("", "packed"))
def test_large_steps_do_not_overflow(packed):
    """dt 5 and A -16 decay by e^-80 a step: every exponent must be negative before it is taken, gradients included."""
    seq_idx = ids(200, (10, 100), (64, 190)) if packed else None
    tensors, _ = make(200, seq_idx=seq_idx, initial=True, D=False, dt_bias=False, dt_softplus=False)
    tensors["dt"] = torch.full_like(tensors["dt"], 5.0)
    tensors["A"] = torch.full_like(tensors["A"], -16.0)
    check(tensors, {}, vanishing=("A", "initial_states"))


def test_large_and_small_steps_together():
    """A burst of strong decay must not blur the steps after it (the running sum is then some thousands)."""
    tensors, _ = make(200, initial=True, D=False, dt_bias=False, dt_softplus=False)
    tensors["dt"] = torch.where(torch.arange(200)[None, :, None] % 50 < 20, 5.0, 1e-2).expand_as(tensors["dt"]).clone()
    tensors["A"] = torch.full_like(tensors["A"], -16.0)
    check(tensors, {}, forward=1e-3, backward=1e-3)


@every_scan
def test_no_step_no_change(ssd_scan):
    """dt = 0 on right pads leaves the state as it was, which is how a padded row keeps its final state."""
    tensors, _ = make(100, D=False, dt_bias=False, dt_softplus=False)
    tensors["dt"][:, 70:] = 0
    short = {name: t[:, :70] if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}
    _, padded = ssd_scan(**tensors, chunk_size=CHUNK, return_final_states=True)
    _, state = ssd_scan(**short, chunk_size=CHUNK, return_final_states=True)
    assert relative_error(padded, state) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Against upstream's Triton kernels

FEW = (1, 4, 16, 16)  # batch, heads, P, N: the interpreter takes a second or two for each case
TWO = (2, 2, 16, 16)
CASES = {
    "plain": dict(length=96, sizes=FEW),
    "bare": dict(length=96, sizes=FEW, D=False, dt_bias=False, dt_softplus=False),
    "unfilled-chunk": dict(length=70, sizes=FEW, groups=2),
    "initial-final": dict(length=96, sizes=FEW, groups=2, initial=True, final=True),
    "short-initial-final": dict(length=5, sizes=FEW, initial=True, final=True),
    "packed": dict(length=96, sizes=TWO, seq_idx=ids(96, (10, 64), (31, 33, 40))),
    "packed-final": dict(length=80, sizes=TWO, seq_idx=ids(80, (32, 70), ()), groups=2, final=True),
    "packed-initial-final": dict(length=80, sizes=TWO, seq_idx=ids(80, (10, 64), (48,)), initial=True, final=True),
}


@pytest.fixture(scope="module")
def upstream_scans():
    """Every case with upstream's answer, all from one subprocess."""
    scans = []
    for case in CASES.values():
        final = case.get("final", False)
        tensors, options = make(**{name: value for name, value in case.items() if name != "final"})
        options |= {"chunk_size": 32, "return_final_states": final}
        scans.append({"tensors": tensors, "options": options, "gradients": output_gradients(tensors, final)})
    answers = upstream.kernels({"scans": scans})["scans"]
    return dict(zip(CASES, zip(scans, answers, strict=True), strict=True))


@pytest.mark.kernels
@every_scan
@pytest.mark.parametrize("name", CASES)
def test_upstream_kernels(upstream_scans, name, ssd_scan):
    scan, answer = upstream_scans[name]
    assert "error" not in answer, answer["error"]
    outputs, gradients = outputs_and_gradients(ssd_scan, scan["tensors"], scan["gradients"], **scan["options"])
    assert_close(outputs, answer["outputs"], 1e-4)
    assert_close(gradients, answer["gradients"], 5e-4)
