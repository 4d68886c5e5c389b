"""The table of functions for CUDA: Triton kernels, most of them one pass over their tensors, and mamba-ssm's scan.

Importing this needs Triton. Inputs may be float32, bfloat16 or float16, and rows of a wider tensor; all sums are taken
in float32. Nothing is added up by atomic operations, so equal inputs give equal gradients. The sizes of a model are
compile-time constants of the kernels and the number of tokens is not: another batch compiles nothing anew.
"""

import functools
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr

from train import IGNORE_INDEX, Film, Ops

SPAN = 64  # rows of a norm, or
TIME = 256  # positions of a convolution, whose share of the weight's gradient one program adds up
LOGITS = 2**27  # numbers in a chunk of logits


def flat(x: Tensor) -> Tensor:
    """x as (rows, channels), channels side by side: a view of contiguous tensors and of their columns."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def tile(width: int, numbers: int = 2048, columns: int = 4096) -> dict[str, int]:
    """Rows and columns, powers of two, of a tile of about so many numbers, for tensors of this width."""
    columns = min(triton.next_power_of_2(width), columns)
    return dict(ROWS=max(1, numbers // columns), COLS=columns)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product reads x as: autocast's type where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# == NORM =============================================================================================================


class Spans(NamedTuple):
    """Rows sorted by task, cut into spans of one task each, of at most SPAN rows."""

    tasks: Tensor  # (rows,) int64
    order: Tensor  # (rows,): the row at each place
    task: Tensor  # (spans,): of each span; the last of all for spans that are empty
    start: Tensor  # (spans,) first place of each span, and
    stop: Tensor  # (spans,) the place behind its last
    first: Tensor  # (tasks + 1,): first span of each task


@functools.lru_cache(maxsize=1)  # every norm of a model asks for the spans of the same tensor
def spans_of(tasks: Tensor, b: int, t: int, count: int) -> Spans:
    """The spans of b x t rows, of tasks (b, 1) or (b, t) below `count`. As many as there may be: nothing waits for the
    GPU to say how many there are."""
    tasks = tasks.expand(b, t).reshape(-1)
    ordered, order = tasks.sort(stable=True)
    place = torch.searchsorted(ordered, torch.arange(count + 1, device=tasks.device))  # where each task begins
    first = F.pad((place.diff() + SPAN - 1).div(SPAN, rounding_mode="floor").cumsum(0), (1, 0))
    index = torch.arange(triton.cdiv(len(tasks), SPAN) + count, device=tasks.device)
    task = torch.searchsorted(first, index, right=True).sub(1).clamp(max=count - 1)
    start = place[task] + (index - first[task]) * SPAN
    stop = torch.minimum(start + SPAN, place[task + 1])
    return Spans(tasks, order, task, start, stop, first)


@triton.jit
def norm_forward(x, gate, weight, table, tasks, y, scales, n, eps, X: constexpr, GATE: constexpr, TABLE: constexpr,
                 D: constexpr, ROWS: constexpr, COLS: constexpr):
    """y = h / rms(h) * weight * (1 + scale) + shift, h = x * silu(gate); keeps 1 / rms(h). X ...: row strides."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    here = (row < n) & (col < D)
    h = tl.load(x + row * X + col, here, 0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate + row * GATE + col, here, 0.0).to(tl.float32)
        h *= g * tl.sigmoid(g)
    r = 1 / tl.sqrt(tl.sum(h * h, 1, keep_dims=True) / D + eps)
    h *= r * tl.load(weight + col, col < D, 0.0)
    if table is not None:
        film = table + tl.load(tasks + row, row < n, 0) * TABLE + col
        h = h * (1 + tl.load(film, here, 0.0).to(tl.float32)) + tl.load(film + D, here, 0.0).to(tl.float32)
    tl.store(y + row * D + col, h, here)
    tl.store(scales + row, r, row < n)


@triton.jit
def norm_backward(dy, x, gate, weight, table, order, task, start, stop, scales, dx, dgate, sums, n, DY: constexpr,
                  X: constexpr, GATE: constexpr, TABLE: constexpr, D: constexpr, SPAN: constexpr, ROWS: constexpr,
                  COLS: constexpr):
    """With u = h / rms(h) and w = weight * (1 + scale), dh = (dy * w - u * mean(dy * w * u)) / rms(h), row by row.

    A program keeps the sums of dy * u and, with a table, of dy over its span, which is of one task.
    """
    span, col = tl.program_id(0), tl.arange(0, COLS)[None, :]
    w = tl.load(weight + col, col < D, 0.0)
    begin, end = span * SPAN, tl.minimum(span * SPAN + SPAN, n)
    if table is not None:
        begin, end = tl.load(start + span), tl.load(stop + span)
        w *= 1 + tl.load(table + tl.load(task + span) * TABLE + col, col < D, 0.0).to(tl.float32)
    by_u, plain = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for place in range(begin, end, ROWS):
        row = place + tl.arange(0, ROWS)[:, None]
        real = row < end
        row = row.to(tl.int64) if table is None else tl.load(order + row, real, 0)
        here = real & (col < D)
        h = tl.load(x + row * X + col, here, 0.0).to(tl.float32)
        if gate is not None:
            v, g = h, tl.load(gate + row * GATE + col, here, 0.0).to(tl.float32)
            s = tl.sigmoid(g)
            h = v * g * s
        r = tl.load(scales + row, real, 0.0)
        u, d = h * r, tl.load(dy + row * DY + col, here, 0.0).to(tl.float32)
        by_u += d * u
        plain += d
        d *= w
        d = (d - u * (tl.sum(d * u, 1, keep_dims=True) / D)) * r
        if gate is not None:
            tl.store(dgate + row * D + col, d * v * s * (1 + g * (1 - s)), here)
            d *= g * s
        tl.store(dx + row * D + col, d, here)
    col = tl.arange(0, COLS)
    if table is None:
        tl.store(sums + span * D + col, tl.sum(by_u, 0), col < D)
    else:
        tl.store(sums + span * 2 * D + col, tl.sum(by_u, 0), col < D)
        tl.store(sums + (span * 2 + 1) * D + col, tl.sum(plain, 0), col < D)


@triton.jit
def film_backward(sums, first, weight, table, dtable, dweight, TABLE: constexpr, D: constexpr, COLS: constexpr):
    """The sums of a task's spans make dscale = weight * sum(dy * u), dshift = sum(dy) and its share of dweight."""
    task, col = tl.program_id(0), tl.program_id(1) * COLS + tl.arange(0, COLS)
    by_u, plain = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for span in range(tl.load(first + task), tl.load(first + task + 1)):
        by_u += tl.load(sums + span * 2 * D + col, col < D, 0.0)
        plain += tl.load(sums + (span * 2 + 1) * D + col, col < D, 0.0)
    scale = tl.load(table + task * TABLE + col, col < D, 0.0).to(tl.float32)
    tl.store(dtable + task * 2 * D + col, by_u * tl.load(weight + col, col < D, 0.0), col < D)
    tl.store(dtable + (task * 2 + 1) * D + col, plain, col < D)
    tl.store(dweight + task * D + col, by_u * (1 + scale), col < D)


class Norm(torch.autograd.Function):
    """`rms_norm`; x and gate (B, T, D), table (count, 2 * D) and tasks, or None, are the film."""

    @staticmethod
    def forward(ctx, x, weight, eps, gate, table, tasks):
        d, shape = x.shape[-1], x.shape
        spans = None if table is None else spans_of(tasks, x.numel() // d // shape[-2], shape[-2], len(table))
        x, gate = flat(x), None if gate is None else flat(gate)
        table = table if table is None or table.stride(1) == 1 else table.contiguous()
        y, scales = x.new_empty(x.shape, dtype=product_dtype(x)), x.new_empty(len(x), dtype=torch.float32)
        strides = [0 if v is None else v.stride(0) for v in (x, gate, table)]
        size = tile(d)
        norm_forward[(triton.cdiv(len(x), size["ROWS"]),)](
            x, gate, weight, table, spans and spans.tasks, y, scales, len(x), eps, *strides, d, **size)
        ctx.save_for_backward(x, weight, gate, table, scales)
        ctx.spans, ctx.strides, ctx.shape = spans, strides, shape
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, gate, table, scales = ctx.saved_tensors
        (n, d), spans, dy = x.shape, ctx.spans, flat(dy)
        dx, dgate = x.new_empty(n, d), None if gate is None else gate.new_empty(n, d)
        programs, kinds = (triton.cdiv(n, SPAN), 1) if spans is None else (len(spans.task), 2)
        sums = scales.new_empty(programs, kinds, d)
        where = spans[1:5] if spans else [None] * 4
        norm_backward[(programs,)](dy, x, gate, weight, table, *where, scales, dx, dgate, sums, n, dy.stride(0),
                                   *ctx.strides, d, SPAN, **tile(d))
        dtable = None
        if spans:
            dtable, dweight = table.new_empty(len(table), 2 * d), sums.new_empty(len(table), 1, d)
            film_backward[(len(table), triton.cdiv(d, 256))](sums, spans.first, weight, table, dtable, dweight,
                                                             ctx.strides[2], d, 256)
            sums = dweight
        dgate = dgate if dgate is None else dgate.view(ctx.shape)
        return dx.view(ctx.shape), sums.sum((0, 1)), None, dgate, dtable, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, film: Film | None = None) -> Tensor:
    """Twin of train.py's. Under autocast the result has autocast's type, as the product that reads it would."""
    return Norm.apply(x, weight, eps, gate, *(film or (None, None)))


# == CONVOLUTION ======================================================================================================


@triton.jit
def at(x, t, c, T, C: constexpr, X: constexpr):
    """x[t, c] in float32, 0 outside."""
    return tl.load(x + t * X + c, (t >= 0) & (t < T) & (c < C), 0.0).to(tl.float32)


@triton.jit
def same(ids, t, u, T):
    """Whether positions t and u are of one sequence; all are where there are no ids."""
    if ids is None:
        equal = t == t
    else:
        equal = tl.load(ids + t, (t >= 0) & (t < T), -1) == tl.load(ids + u, (u >= 0) & (u < T), -1)
    return equal


@triton.jit
def taps(x, weight, ids, t, c, T, C: constexpr, K: constexpr, X: constexpr, WAY: constexpr):
    """sum over s of weight[c, K - 1 - s] * x[t - WAY * s]: of what stands before t, or with WAY -1 behind it"""
    total = tl.load(weight + c * K + K - 1, c < C, 0.0) * at(x, t, c, T, C, X)
    for s in tl.static_range(1, K):
        v = tl.where(same(ids, t, t - WAY * s, T), at(x, t - WAY * s, c, T, C, X), 0.0)
        total += tl.load(weight + c * K + K - 1 - s, c < C, 0.0) * v
    return total


@triton.jit
def conv_forward(x, weight, bias, ids, y, T, C: constexpr, K: constexpr, X: constexpr, ROWS: constexpr,
                 COLS: constexpr):
    """y = silu(bias + taps(x)), or, without a bias, what y's gradient x becomes on its way back through the taps.

    A program makes ROWS positions of COLS channels of one row of the batch.
    """
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(2) * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.program_id(0).to(tl.int64) * T
    if ids is not None:
        ids += begin
    a = taps(x + begin * X, weight, ids, t, c, T, C, K, X, 1 if bias is not None else -1)
    if bias is not None:
        a += tl.load(bias + c, c < C, 0.0).to(tl.float32)
        a *= tl.sigmoid(a)
    tl.store(y + (begin + t) * C + c, a, (t < T) & (c < C))


@triton.jit
def conv_backward(dy, x, weight, bias, ids, da, sums, T, C: constexpr, K: constexpr, DY: constexpr, X: constexpr,
                  TIME: constexpr, ROWS: constexpr, COLS: constexpr):
    """da = dy * silu'(a) of a = bias + taps(x), which is made again rather than kept.

    A program keeps, over TIME positions, its sums of da * x[t - s], s = 0 ... 3, and of da: rows K - 1 ... 0 and K of
    `sums`, (programs, K + 1, C).
    """
    span, c = tl.program_id(1), tl.program_id(2) * COLS + tl.arange(0, COLS)[None, :]
    begin = tl.program_id(0).to(tl.int64) * T
    x, dy, da = x + begin * X, dy + begin * DY, da + begin * C
    if ids is not None:
        ids += begin
    zero = tl.zeros([ROWS, COLS], tl.float32)
    w0, w1, w2, w3, b = zero, zero, zero, zero, zero
    for start in range(span * TIME, tl.minimum(span * TIME + TIME, T), ROWS):
        t = start + tl.arange(0, ROWS)[:, None]
        a = tl.load(bias + c, c < C, 0.0).to(tl.float32) + taps(x, weight, ids, t, c, T, C, K, X, 1)
        p = tl.sigmoid(a)
        g = at(dy, t, c, T, C, DY) * p * (1 + a * (1 - p))
        tl.store(da + t.to(tl.int64) * C + c, g, (t < T) & (c < C))
        b += g
        w0 += g * at(x, t, c, T, C, X)
        w1 += g * tl.where(same(ids, t, t - 1, T), at(x, t - 1, c, T, C, X), 0.0)
        if K > 2:
            w2 += g * tl.where(same(ids, t, t - 2, T), at(x, t - 2, c, T, C, X), 0.0)
        if K > 3:
            w3 += g * tl.where(same(ids, t, t - 3, T), at(x, t - 3, c, T, C, X), 0.0)
    c = tl.program_id(2) * COLS + tl.arange(0, COLS)
    sums += (tl.program_id(0) * tl.num_programs(1) + span) * (K + 1) * C + c
    tl.store(sums + (K - 1) * C, tl.sum(w0, 0), c < C)
    tl.store(sums + (K - 2) * C, tl.sum(w1, 0), c < C)
    if K > 2:
        tl.store(sums + (K - 3) * C, tl.sum(w2, 0), c < C)
    if K > 3:
        tl.store(sums, tl.sum(w3, 0), c < C)
    tl.store(sums + K * C, tl.sum(b, 0), c < C)


class Convolve(torch.autograd.Function):
    """`causal_conv` of two to four taps."""

    @staticmethod
    def forward(ctx, x, weight, bias, ids):
        (b, t, c), k = x.shape, weight.shape[1]
        assert 2 <= k <= 4, f"a convolution of {k} taps; the kernel knows 2 to 4"
        x, weight, ids = flat(x), weight.contiguous(), None if ids is None else ids.contiguous()
        y = x.new_empty(b, t, c)
        conv_forward[(b, triton.cdiv(t, 32), triton.cdiv(c, 64))](x, weight, bias, ids, y, t, c, k, x.stride(0), 32, 64)
        ctx.save_for_backward(x, weight, bias, ids)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, ids = ctx.saved_tensors
        (b, t, c), k, rows = dy.shape, weight.shape[1], flat(dy)
        (da, dx), spans = (x.new_empty(b, t, c) for _ in range(2)), triton.cdiv(t, TIME)
        sums = weight.new_empty(b * spans, k + 1, c, dtype=torch.float32)
        conv_backward[(b, spans, triton.cdiv(c, 64))](rows, x, weight, bias, ids, da, sums, t, c, k, rows.stride(0),
                                                      x.stride(0), TIME, 16, 64)
        conv_forward[(b, triton.cdiv(t, 32), triton.cdiv(c, 64))](da, weight, None, ids, dx, t, c, k, c, 32, 64)
        sums = sums.sum(0)
        return dx, sums[:k].T, sums[k], None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Twin of train.py's."""
    return Convolve.apply(x, weight, bias, seq_idx)


# == SWIGLU AND ROTARY ================================================================================================


@triton.jit
def swiglu_forward(x, y, n, X: constexpr, D: constexpr, ROWS: constexpr, COLS: constexpr):
    """y = silu(gate) * up; gate and up are the halves, D wide, of a row of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    here = (row < n) & (col < D)
    gate = tl.load(x + row * X + col, here, 0.0).to(tl.float32)
    up = tl.load(x + row * X + D + col, here, 0.0).to(tl.float32)
    tl.store(y + row * D + col, gate * tl.sigmoid(gate) * up, here)


@triton.jit
def swiglu_backward(dy, x, dx, n, DY: constexpr, X: constexpr, D: constexpr, ROWS: constexpr, COLS: constexpr):
    """dgate = dy * up * silu'(gate), silu' = s * (1 + gate * (1 - s)), s = sigmoid(gate); dup = dy * silu(gate)"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    here = (row < n) & (col < D)
    gate = tl.load(x + row * X + col, here, 0.0).to(tl.float32)
    up = tl.load(x + row * X + D + col, here, 0.0).to(tl.float32)
    d, s = tl.load(dy + row * DY + col, here, 0.0).to(tl.float32), tl.sigmoid(gate)
    tl.store(dx + row * 2 * D + col, d * up * s * (1 + gate * (1 - s)), here)
    tl.store(dx + row * 2 * D + D + col, d * gate * s, here)


class Gate(torch.autograd.Function):
    """`swiglu`."""

    @staticmethod
    def forward(ctx, x):
        shape, x = x.shape, flat(x)
        (n, d), size = (len(x), x.shape[1] // 2), tile(x.shape[1] // 2, columns=512)
        y = x.new_empty(n, d)
        swiglu_forward[(triton.cdiv(n, size["ROWS"]), triton.cdiv(d, size["COLS"]))](x, y, n, x.stride(0), d, **size)
        ctx.save_for_backward(x)
        ctx.shape = shape
        return y.view(*shape[:-1], d)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), dy = ctx.saved_tensors, flat(dy)
        (n, d), dx, size = dy.shape, x.new_empty(x.shape), tile(dy.shape[1], columns=512)
        swiglu_backward[(triton.cdiv(n, size["ROWS"]), triton.cdiv(d, size["COLS"]))](
            dy, x, dx, n, dy.stride(0), x.stride(0), d, **size)
        return dx.view(ctx.shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """Twin of train.py's."""
    return Gate.apply(gate_up)


@triton.jit
def rotate(x, cos, sin, y, n, T, B, ANGLES, X: constexpr, H: constexpr, XH: constexpr, D: constexpr, SIGN: constexpr,
           ROWS: constexpr, COLS: constexpr):
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves, D wide, of a head; SIGN -1 turns back.

    Rows are heads of tokens. B, X, XH: strides of the batch, a token, a head; ANGLES: that of the angles' batch.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    here = (row < n) & (col < D)
    head, token = row % H, row // H
    b, t = token // T, token % T
    x += b * B + t * X + head * XH + col
    u, v = tl.load(x, here, 0.0).to(tl.float32), tl.load(x + D, here, 0.0).to(tl.float32)
    angle = b * ANGLES + t * D + col
    c, s = tl.load(cos + angle, here, 0.0), tl.load(sin + angle, here, 0.0) * SIGN
    tl.store(y + row * 2 * D + col, u * c - v * s, here)
    tl.store(y + row * 2 * D + D + col, v * c + u * s, here)


class Rotate(torch.autograd.Function):
    """`rotary`, forward (sign 1) and backward (-1)."""

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        """x (B, T, H, P), with any strides but that of P."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        b, t, h, p = x.shape
        y, angles = x.new_empty(x.shape), 0 if len(cos) == 1 else cos.stride(0)
        size = tile(p // 2)
        rotate[(triton.cdiv(b * t * h, size["ROWS"]),)](
            x, cos, sin, y, b * t * h, t, x.stride(0), angles, x.stride(1), h, x.stride(2), p // 2, sign, **size)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Rotate.turn(dy, *ctx.saved_tensors, -1), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Twin of train.py's; the angles get no gradient."""
    return Rotate.apply(x, cos, sin)


# == CROSS-ENTROPY ====================================================================================================


@triton.jit
def softmax_loss(logits, targets, losses, n, V: constexpr, IGNORE: constexpr, LEARNS: constexpr, ROWS: constexpr,
                 COLS: constexpr):
    """loss = log(sum(exp(z))) - z[target] of a row z of logits, which softmax(z) - onehot(target) replaces.

    Both are 0 where there is no target. The sum is taken while the largest number so far becomes known (Milakov &
    Gimelshein 2018, arXiv:1805.02867).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    target = tl.load(targets + row, row < n, IGNORE)
    real = target != IGNORE
    logits += row * V
    right = tl.load(logits + target, real, 0.0).to(tl.float32)  # before anything is replaced
    top, total = tl.full([ROWS, 1], -float("inf"), tl.float32), tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, V, COLS):
        z = tl.load(logits + start + col, real & (start + col < V), -float("inf")).to(tl.float32)
        most = tl.where(real, tl.maximum(top, tl.max(z, 1, keep_dims=True)), 0.0)
        total = total * tl.exp(top - most) + tl.sum(tl.exp(z - most), 1, keep_dims=True)
        top = most
    tl.store(losses + row, tl.where(real, tl.log(total) + top - right, 0.0), row < n)
    if LEARNS:
        for start in range(0, V, COLS):
            here = (row < n) & (start + col < V)
            z = tl.load(logits + start + col, here, 0.0).to(tl.float32)
            p = tl.exp(z - top) / total - tl.where(start + col == target, 1.0, 0.0)
            tl.store(logits + start + col, tl.where(real, p, 0.0), here)


class CrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`: a chunk of logits at a time, and gradients on the way, as Liger-Kernel does (Hsu et al.
    2024, arXiv:2410.10989). They are divided by the number of targets last, so that float16 holds them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        dtype, few = product_dtype(hidden), max(1, LOGITS // len(weight))
        few = min(few, 2**14) if dtype == torch.float16 else few  # whose largest number is 65504, below some sums
        h, w, (n, v), size = hidden.to(dtype), weight.to(dtype), (len(hidden), len(weight)), tile(len(weight))
        dhidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses, learns = hidden.new_empty(n, dtype=torch.float32), any(ctx.needs_input_grad)
        for i in range(0, n, few):
            part, logits = slice(i, i + few), h[i : i + few] @ w.T  # (rows, V)
            softmax_loss[(triton.cdiv(len(logits), size["ROWS"]),)](
                logits, targets[part], losses[part], len(logits), v, IGNORE_INDEX, learns, **size, num_warps=8)
            if dhidden is not None:
                torch.mm(logits, w, out=dhidden[part])
            if dweight is not None:
                dweight += logits.T @ h[part]
        count = (targets != IGNORE_INDEX).sum()
        ctx.save_for_backward(dhidden, dweight, count)
        ctx.dtype = hidden.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight, count = ctx.saved_tensors
        share = dloss / count
        dhidden = None if dhidden is None else (dhidden * share).to(ctx.dtype)
        return dhidden, None if dweight is None else dweight * share, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Twin of train.py's: the logits never exist as a whole."""
    if not torch.is_grad_enabled():  # which a function cannot see: it would make gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return CrossEntropy.apply(hidden, weight, targets)


# == SCAN =============================================================================================================


TILE = dict(BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=32, BLOCK_SIZE_CS=32, BLOCK_SIZE_H=16, BLOCK_SIZE=512)


@functools.cache
def load_scan() -> types.ModuleType:
    """mamba-ssm's `ops.triton.ssd_combined`, without that package's compiled extensions, each kernel in one size.

    `import mamba_ssm` would load those, so an empty module with the package's path stands in for it. Upstream tries
    some two hundred sizes when a run starts, minutes of compiling. For states and heads of 64 channels the one near
    TILE is the fastest of seven kernels on an H200, or within 2 % of it (bench/results/2026-11-27-scan-tilings.jsonl);
    the other seven were not measured.
    """
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ImportError("mamba-ssm is not installed (docs/install.md says how)")
        package = types.ModuleType("mamba_ssm")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["mamba_ssm"] = package
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.ops.triton.ssd_")]:
        for f in vars(sys.modules[name]).values():
            if isinstance(f, triton.runtime.Autotuner):
                f.configs = [min(f.configs, key=lambda c: sum(abs(math.log2(c.kwargs.get(k, v) / v))
                                                              for k, v in TILE.items()))]
    return module


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
             dt_bias: Tensor | None = None, dt_softplus: bool = False, seq_idx: Tensor | None = None,
             initial_states: Tensor | None = None, return_final_states: bool = False):
    """Twin of train.py's: upstream's function, in float32 for float16, whose range states leave."""
    scan, dtype = load_scan().mamba_chunk_scan_combined, x.dtype
    if dtype == torch.float16:
        x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
    out = scan(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
               seq_idx=None if seq_idx is None else seq_idx.int(), initial_states=initial_states,
               return_final_states=return_final_states)
    return (out[0].to(dtype), out[1]) if return_final_states else out.to(dtype)


# == TABLE ============================================================================================================


def trials(device: torch.device) -> dict[str, Callable[[Callable], tuple[Any, ...]]]:
    """For each entry of the table, what calls it on small random tensors: (result, inputs that get a gradient)."""
    draw = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device).requires_grad_()

    b, t = 2, 40
    ids = (torch.arange(t, device=device) // 25).expand(b, -1).contiguous()
    x, wide, head, up, weight = r(b, t, 64), r(b, t, 200), r(b, t, 4, 32), r(b, t, 96), r(64)
    table, taps, bias, vocabulary, angle = r(3, 128), r(64, 4), r(64), r(300, 64), r(b, t, 16).detach()
    v, dt, A, B, C, D = r(b, t, 2, 16), r(b, t, 2), r(2), r(b, t, 1, 16), r(b, t, 1, 16), r(2)
    targets = torch.where(ids == 1, IGNORE_INDEX, torch.arange(t, device=device)).flatten()
    return {
        "rms_norm": lambda f: (f(x, weight, 1e-5, film=Film(table, ids)) + f(x, weight, 1e-5, gate=wide[..., 64:128]),
                               (x, weight, table, wide)),
        "causal_conv": lambda f: (f(wide[..., 64:128], taps, bias, ids), (wide, taps, bias)),
        "ssd_scan": lambda f: (f(v, dt, -A.exp(), B, C, 16, D=D, dt_bias=A, dt_softplus=True, seq_idx=ids),
                               (v, dt, A, B, C, D)),
        "swiglu": lambda f: (f(up), (up,)),
        "rotary": lambda f: (f(head, angle.cos(), angle.sin()), (head,)),
        "linear_cross_entropy": lambda f: (f(x.flatten(0, 1), vocabulary, targets), (x, vocabulary)),
    }


def try_kernels(table: Ops, plain: Ops, device: torch.device, tolerance: float = 2e-2) -> dict[str, str]:
    """What is wrong with functions of the table, by name: what they raised, or how far they are from the plain ones on
    small random tensors, forward or backward. The tolerance is for products in TF32."""
    wrong = {}
    for name, call in trials(device).items():
        try:
            with torch.autocast(device.type, enabled=False), torch.enable_grad():
                results = []
                for f in (getattr(plain, name), getattr(table, name)):
                    y, inputs = call(f)
                    results.append([y, *torch.autograd.grad((y * y).sum(), inputs)])
                errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]
            if not max(errors) < tolerance or not all(map(math.isfinite, errors)):
                wrong[name] = f"differs from the plain one by {max(errors):.1%}"
        except Exception as error:  # a compiler, a driver or a package built for another torch fails in many ways
            wrong[name] = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[-1]}"
    return wrong


def make_ops(plain: Ops, device: torch.device | None = None, strict: bool = False) -> Ops:
    """`plain` with the functions of this file that pass their trial on `device` (the current GPU); the name says which
    do not, and why. RuntimeError instead where `strict`."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    table = plain._replace(name="Triton", rms_norm=rms_norm, causal_conv=causal_conv, ssd_scan=ssd_scan, swiglu=swiglu,
                           rotary=rotary, linear_cross_entropy=linear_cross_entropy)
    wrong = try_kernels(table, plain, device)
    why = "; ".join(f"{name}: {error}" for name, error in wrong.items())
    if strict and wrong:
        raise RuntimeError(why)
    return table._replace(name=f"Triton kernels, but plain PyTorch for {why}" if wrong else "Triton kernels",
                          **{name: getattr(plain, name) for name in wrong})
