"""Faster functions for the table that a model computes with: for a CPU, and the choice of those for CUDA.

Each has the arguments and the meaning of the function of the same name in train.py. The CPU's have backward passes
written by hand and go through memory a few rows at a time, so that all that is made of these stays in the cache. They
keep nothing between calls, so that several threads may use them at once.
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data.files import UserError, reason
from train import IGNORE_INDEX, PLAIN, Film, Ops

SLAB = 2**17  # numbers of each tensor that are worked on at once


def slabs(rows: int, width: int, start: int = 0) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers from `start` on, about SLAB numbers each."""
    few = max(1, SLAB // width)
    return (slice(i, min(i + few, start + rows)) for i in range(start, start + rows, few))


def tiles(b: int, t: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Pairs of slices, of rows and of times, that cover (b, t, width), about SLAB numbers each."""
    return itertools.product(slabs(b, t * width), slabs(t, width))


# == NORM =============================================================================================================


class Normalize(torch.autograd.Function):
    """`rms_norm` that keeps only its inputs and one number per token for the backward pass.

    x and gate (tokens, D), weight (D,), table (tasks, 2 * D) or None; `runs` are slices of tokens with the row of the
    table that they go by.
    """

    @staticmethod
    def affine(weight: Tensor, table: Tensor | None, task: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What a film makes of the norm: 1 + its scale, its shift and the weight times that scale, (D,) each."""
        if table is None:
            return torch.ones_like(weight), None, weight
        scale, shift = table[task].float().chunk(2)
        return 1 + scale, shift, (1 + scale) * weight

    @staticmethod
    def forward(ctx, x, gate, weight, table, eps, runs):
        y, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        for rows, task in runs:
            _, shift, w = Normalize.affine(weight, table, task)
            xs, ss = x[rows].float(), scale[rows]
            h = xs if gate is None else F.silu(gate[rows].float()).mul_(xs)
            torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=ss)
            ss.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
            n = h * ss if gate is None else h.mul_(ss)
            torch.mul(n, w, out=y[rows]) if shift is None else torch.addcmul(shift, n, w, out=y[rows])
        ctx.save_for_backward(x, gate, weight, table, scale)
        ctx.runs = runs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate, weight, table, scale = ctx.saved_tensors
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        dweight, dtable = torch.zeros_like(weight), None if table is None else torch.zeros_like(table)
        for rows, task in ctx.runs:
            more, shift, w = Normalize.affine(weight, table, task)
            xs, ss, dys = x[rows].float(), scale[rows], dy[rows].float()
            z = None if gate is None else gate[rows].float()
            silu = None if z is None else F.silu(z)
            n = xs * ss if z is None else (silu * xs).mul_(ss)
            dn = dys * n
            total, inner = dn.sum(0), torch.mv(dn, w).div_(len(w))[:, None]
            dweight += total * more
            if shift is not None:
                dtable[task] += torch.cat([total * weight, dys.sum(0)])
            dh = torch.mul(dys, w, out=dn).addcmul_(n, inner, value=-1)
            if z is None:
                torch.mul(dh, ss, out=dx[rows])
            else:
                torch.mul(dh.mul_(ss), silu, out=dx[rows])
                dgate[rows] = torch.ops.aten.silu_backward(dh.mul_(xs), z)
        return dx, dgate, dweight, dtable, None, None


def runs_of(tasks: Tensor, width: int) -> list[tuple[slice, int]]:
    """Slices of the flat `tasks` (tokens,) over which the task is one, about SLAB numbers each, and that task."""
    values, counts = torch.unique_consecutive(tasks, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(rows, task) for task, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
            for rows in slabs(count, width, end - count)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, film: Film | None = None) -> Tensor:
    """train.rms_norm with the film in the same pass."""
    flat, d = x.reshape(-1, x.shape[-1]), x.shape[-1]
    if film is None:
        table, runs = None, [(rows, 0) for rows in slabs(len(flat), d)]
    else:
        table, runs = film.table, runs_of(film.tasks.expand(x.shape[:-1]).flatten(), d)
        if 32 * len(runs) > len(flat):  # a task for every few positions, as where one token follows another
            return train.rms_norm(x, weight, eps, gate, film)
    gate = None if gate is None else gate.reshape(-1, d)
    return Normalize.apply(flat, gate, weight, table, eps, runs).view(x.shape)


# == CONVOLUTION ======================================================================================================


class CausalConv(torch.autograd.Function):
    """`causal_conv` as shifted multiply-adds: x (B, T, C), weight (K, C), bias (C,), seq_idx (B, T) or None."""

    @staticmethod
    def taps(x, seq_idx, rows, times, taps):
        """For each tap how far back it reaches, the times that far back, the first of `times` that has one, and mask.

        The mask (rows, times, 1), or None, is 0 where what lies that far back is another sequence.
        """
        for back in range(min(taps, times.stop)):
            none = max(0, back - times.start)
            now, then = slice(times.start + none, times.stop), slice(times.start + none - back, times.stop - back)
            same = None if seq_idx is None or not back else (seq_idx[rows, then] == seq_idx[rows, now])[..., None]
            yield -1 - back, then, none, same

    @staticmethod
    def before_silu(x, weight, bias, seq_idx, rows, times):
        """What goes into the SiLU at those rows and times."""
        y = None
        for tap, then, none, same in CausalConv.taps(x, seq_idx, rows, times, len(weight)):
            v = x[rows, then].float() if same is None else x[rows, then] * same
            y = torch.addcmul(bias, v, weight[tap]) if y is None else y
            if tap < -1:
                y[:, none:].addcmul_(v, weight[tap])
        return y

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx):
        y = torch.empty(x.shape, dtype=x.dtype)
        for at in tiles(*x.shape):
            y[at] = F.silu(CausalConv.before_silu(x, weight, bias, seq_idx, *at), inplace=True)
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, seq_idx = ctx.saved_tensors
        dx, dweight, dbias = torch.empty(x.shape), torch.zeros_like(weight), torch.zeros_like(bias)
        for rows, times in tiles(*x.shape):
            d = CausalConv.before_silu(x, weight, bias, seq_idx, rows, times)
            d = torch.ops.aten.silu_backward.grad_input(dy[rows, times].float(), d, grad_input=d)
            dbias += d.sum((0, 1))
            for tap, then, none, same in CausalConv.taps(x, seq_idx, rows, times, len(weight)):
                late = d if not none else d[:, none:]
                late = late if same is None else late * same
                dweight[tap] += (late * x[rows, then]).sum((0, 1))
                if tap == -1:
                    torch.mul(late, weight[tap], out=dx[rows, then])
                else:
                    dx[rows, then].addcmul_(late, weight[tap])
        return dx.to(x.dtype), dweight, dbias, None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """train.causal_conv, a few rows at a time."""
    return CausalConv.apply(x, weight.T.contiguous(), bias, seq_idx)


# == SCAN =============================================================================================================

STEEPEST, LONGEST = 30.0, 120.0  # largest decay, as minus its logarithm, of one step and of one chunk


class Chunks:
    """The chunks of q positions of all rows, and how decay is taken apart within each.

    With a the running sum of dt * A in a chunk and `middle` half of its last, the decay from position j to i is
    exp(a_i - middle) * exp(middle - a_j), where neither factor can overflow. States are kept at the middles: `over` is
    the decay from one middle to the next. With seq_idx, nothing passes from one sequence to another.
    """

    def __init__(self, da: Tensor, q: int, seq_idx: Tensor | None, p: int):
        pad, self.q, self.t, self.seq = -da.shape[1] % q, q, da.shape[1], None
        a = F.pad(da, (0, 0, 0, pad)).unflatten(1, (-1, q)).cumsum(2)  # (b, c, q, h)
        middle = a[:, :, -1:] / 2
        self.into, self.back = (a - middle).exp_(), (middle - a).exp_()  # (b, c, q, h)
        half = middle.exp().repeat_interleave(p, dim=3)  # (b, c, 1, h * p)
        self.first, self.over = half[:, 0], half * F.pad(half[:, 1:], (0, 0, 0, 0, 0, 1), value=1.0)
        if seq_idx is not None:
            seq = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, q))  # (b, c, q)
            before = torch.cat([seq[:, :1, :1], seq[:, :-1, -1:]], dim=1)  # (b, c, 1): the id just before each chunk
            self.seq, self.hears, self.lasts = seq, seq == before, seq == seq[:, :, -1:]
            self.keeps = (before == seq[:, :, -1:]).float()[..., None]  # (b, c, 1, 1)

    def pieces(self, b: int, width: int) -> Iterator[list[Piece]]:
        """For some rows at a time their pieces, in order: a few whole chunks each, then perhaps a shorter one."""
        whole, rest = divmod(self.t, self.q)
        for rows in slabs(b, self.q * width):
            few = list(slabs(whole, (rows.stop - rows.start) * self.q * width))
            yield [Piece(self, rows, s, self.q) for s in few] + [Piece(self, rows, slice(whole, whole + 1), rest)
                                                                 for _ in range(rest > 0)]


class Piece:
    """Some chunks of q positions of some rows; as (R, q, ...), a row for each chunk, in all that is made of them."""

    def __init__(self, made: Chunks, rows: slice, chunks: slice, q: int):
        self.made, self.chunks, self.q = made, chunks, q
        self.states = rows, chunks
        self.at = rows, slice(chunks.start * made.q, min(chunks.stop * made.q, made.t))
        self.into, self.back = self.inside(made.into), self.inside(made.back)  # (R, q, h)

    def of(self, v: Tensor) -> Tensor:
        """Its part of v (b, t, ...) as (R, q, ...)."""
        return v[self.at].float().unflatten(1, (-1, self.q)).flatten(0, 1)

    def inside(self, v: Tensor) -> Tensor:
        """Its part of v (b, c, q, ...) as (R, q, ...)."""
        return v[self.states][:, :, : self.q].flatten(0, 1)

    def whole(self, v: Tensor) -> Tensor:
        """v (R, ...) as (rows, chunks, ...)."""
        return v.unflatten(0, (-1, self.chunks.stop - self.chunks.start))

    def couple(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What position i hears of j, C_i B_j, (R, q, q), and B and C as the states see them."""
        M = torch.bmm(C, B.mT).tril_()
        if self.made.seq is None:
            return M, B, C
        return self.same(M), B * self.inside(self.made.lasts)[..., None], C * self.inside(self.made.hears)[..., None]

    def same(self, M: Tensor) -> Tensor:
        """M (R, q, q) with 0 where i and j are of two sequences, in place."""
        seq = None if self.made.seq is None else self.inside(self.made.seq)
        return M if seq is None else M.mul_(seq[:, :, None] == seq[:, None])

    def add_kept(self, to: Tensor, state: Tensor, i: int) -> Tensor:
        """Add, in place, what chunk i of all rows lets through of a state (rows, n, h * p)."""
        return to.add_(state) if self.made.seq is None else to.addcmul_(state, self.made.keeps[self.states[0], i])


class ChunkScan(torch.autograd.Function):
    """The state space dual form of Mamba-2 as matrix products over all heads at once, with such a backward.

    Mirrors `ssd_minimal_discrete` of the paper (listing 1) and `_mamba_chunk_scan_combined_fwd/bwd` upstream, but
    takes the decay out of the products (see `Chunks`): M = C B^T is one matrix for all heads, where theirs have one
    each. Goes through a few rows and chunks at a time, so that what it makes of them stays in the processor's cache.

    x (b, t, h, p), dt and da = dt * A (b, t, h), B and C (b, t, n), D (b, h), seq_idx (b, t) or None, initial
    (b, n, h * p) or None, q the length of a chunk. Returns y like x in float32 and the final state (b, n, h * p).
    """

    @staticmethod
    def forward(ctx, x, dt, da, B, C, D, seq_idx, initial, q):
        (b, _, h, p), n, made = x.shape, B.shape[-1], Chunks(da, q, seq_idx, x.shape[3])
        y = x.new_empty(x.shape, dtype=torch.float32)
        states = y.new_empty(b, made.over.shape[1] + 1, n, h * p)  # at the middle of each chunk, and at the end
        states[:, 0] = 0 if initial is None else initial * made.first
        for piece in itertools.chain.from_iterable(made.pieces(b, h * p)):
            xs, dts, Bs, Cs = (piece.of(v) for v in (x, dt, B, C))
            w = (xs * (dts * piece.back)[..., None]).flatten(2)  # (R, q, h * p)
            M, Bm, Cm = piece.couple(Bs, Cs)
            # 1. what each chunk adds to the state by its end
            added = piece.whole(torch.bmm(Bm.mT, w))  # (rows, chunks, n, h * p)
            # 2. the state at each chunk: the only sequential part, one multiply-add per chunk
            rows = piece.states[0]
            for i, add in enumerate(added.unbind(1), piece.chunks.start):
                torch.mul(piece.add_kept(add, states[rows, i], i), made.over[rows, i], out=states[rows, i + 1])
            # 3. what that state says to each position, and 4. what those of the same chunk say
            out = torch.bmm(Cm, states[piece.states].flatten(0, 1)).baddbmm_(M, w).view(xs.shape)
            ys = y[piece.at]
            out, xs = (v.view(ys.shape) for v in (out.mul_(piece.into[..., None]), xs))
            torch.addcmul(out, xs, D[rows, None, :, None], out=ys)
        ctx.save_for_backward(x, dt, da, B, C, D, seq_idx, states)
        ctx.q, ctx.initial = q, initial is not None
        return y, states[:, -1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, da, B, C, D, seq_idx, states = ctx.saved_tensors
        (b, _, h, p), made = x.shape, Chunks(da, ctx.q, seq_idx, x.shape[3])
        grads = dx, ddt, dda, dB, dC, dD = [torch.empty_like(v) for v in (x, dt, da, B, C, D)]
        dinitial = torch.zeros_like(states[:, 0]) if dfinal is None else dfinal.clone()
        dD.zero_()
        for pieces in made.pieces(b, h * p):
            rows = pieces[0].states[0]
            dH = dinitial[rows]  # gradient of the state at the middle of a chunk
            for piece in reversed(pieces):
                xs, dts, Bs, Cs, dys = (piece.of(v) for v in (x, dt, B, C, dy))
                scale, G = (dts * piece.back)[..., None], states[piece.states].flatten(0, 1)
                w, E = (xs * scale).flatten(2), (dys * piece.into[..., None]).flatten(2)
                M, Bm, Cm = piece.couple(Bs, Cs)
                # 3. and 2. from each position to the state, from each chunk to those before it
                dG = piece.whole(torch.bmm(Cm.mT, E))
                dS = torch.empty_like(dG)  # gradient of what each chunk adds
                for j in reversed(range(dG.shape[1])):
                    torch.mul(dH, made.over[rows, piece.chunks.start + j], out=dS[:, j])
                    dH = piece.add_kept(dG[:, j], dS[:, j], piece.chunks.start + j)
                dG, dS = dG.flatten(0, 1), dS.flatten(0, 1)
                # 1. and 4. from the end of a chunk to its positions, and between these
                dw = torch.bmm(Bm, dS).baddbmm_(M.mT, E).view(xs.shape)
                dM = piece.same(torch.bmm(w, E.mT).triu_())  # (R, q, q), transposed
                dBs, dCs = torch.bmm(dS, w.mT).mT, torch.bmm(G, E.mT).mT
                if seq_idx is not None:
                    dBs, dCs = dBs * piece.inside(made.lasts)[..., None], dCs * piece.inside(made.hears)[..., None]
                # what flows through each position: the state's share and what was added before, less what was heard
                heard = torch.bmm(Cm, G).baddbmm_(M, w).mul_(E).view(xs.shape).sum(-1)  # (R, q, h)
                through, shape = (dw * xs).sum(-1), (rows.stop - rows.start, -1)
                net = through * scale[..., 0] - heard
                start = (dG * G).sum(1).unflatten(-1, (h, p)).sum(-1)[:, None]
                flow = net.cumsum(1).sub_(net).add_(start)
                dw = torch.addcmul((dw * scale).view(*shape, h, p), dys.view(*shape, h, p), D[rows, None, :, None])
                found = dw, through * piece.back, flow, dBs.baddbmm(dM, Cs), dCs.baddbmm(dM.mT, Bs)
                for total, part in zip(grads, found, strict=False):
                    total[piece.at] = part.reshape(total[piece.at].shape)
                dD[rows] += (dys * xs).sum(-1).view(*shape, h).sum(1)
            dinitial[rows] = dH * made.first[rows]
        return dx, ddt, dda, dB, dC, dD, None, dinitial if ctx.initial else None, None


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
             dt_bias: Tensor | None = None, dt_softplus: bool = False, seq_idx: Tensor | None = None,
             initial_states: Tensor | None = None, return_final_states: bool = False):
    """train.ssd_scan with its backward pass written by hand.

    Chunks are shorter than `chunk_size` where the decay over one would overflow when its two halves are taken apart.
    """
    (b, t, h, p), g = x.shape, B.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    da = (dt * A).clamp(min=-STEEPEST)  # exp(-30) of the past is nothing in float32
    D = dt.new_zeros(h) if D is None else D.float()
    q = min(chunk_size, t)
    while q > 1 and F.pad(da.detach(), (0, 0, 0, -t % q)).unflatten(1, (-1, q)).sum(2).min() < -LONGEST:
        q = (q + 1) // 2

    def rows(v: Tensor) -> Tensor:
        """(b, t, h or g, ...) -> (b * g, t, h / g or 1, ...): each group a row of its own."""
        return v.unflatten(2, (g, -1)).movedim(2, 1).reshape(b * g, t, -1, *v.shape[3:])

    if seq_idx is not None:
        seq_idx = seq_idx.repeat_interleave(g, 0)
    if initial_states is not None:  # (b, h, p, n) -> (b * g, n, h / g * p)
        initial_states = initial_states.float().reshape(b * g, h // g * p, -1).mT
    y, final = ChunkScan.apply(rows(x), rows(dt), rows(da), rows(B).squeeze(2), rows(C).squeeze(2),
                               D.view(g, -1).repeat(b, 1), seq_idx, initial_states, q)
    y = y.view(b, g, t, h // g, p).movedim(1, 2).reshape(b, t, h, p).to(x.dtype)
    return (y, final.mT.reshape(b, h, p, -1)) if return_final_states else y


# == SWIGLU AND ATTENTION =============================================================================================


class Gate(torch.autograd.Function):
    """silu(gate) * up of (tokens, gate and up side by side), of which only these are kept for the backward pass."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        y = both.new_empty(len(both), both.shape[1] // 2)
        for rows in slabs(*both.shape):
            gate, up = both[rows].chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=y[rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (both,) = ctx.saved_tensors
        dboth = torch.empty_like(both)
        for rows in slabs(*both.shape):
            (gate, up), (dgate, dup), d = both[rows].chunk(2, dim=-1), dboth[rows].chunk(2, dim=-1), dy[rows]
            torch.mul(d, F.silu(gate), out=dup)
            torch.ops.aten.silu_backward.grad_input(d * up, gate, grad_input=dgate)
        return dboth


def swiglu(gate_up: Tensor) -> Tensor:
    """train.swiglu, a few rows at a time."""
    return Gate.apply(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)


class Rotate(torch.autograd.Function):
    """`rotary`; its backward is the rotation by the same angles the other way round."""

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        (a, b), y, half = x.chunk(2, dim=-1), torch.empty(x.shape, dtype=x.dtype), x.shape[-1] // 2
        torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=y[..., half:]).addcmul_(a, sin, value=sign)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return Rotate.turn(dy, *ctx.saved_tensors, -1), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """train.rotary without a copy of the halves."""
    return Rotate.apply(x, cos[:, :, None], sin[:, :, None])


@functools.cache
def flex():
    """`flex_attention`, compiled; uncompiled it would make (T, T) matrices."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # two shapes: of training and of evaluation


@functools.lru_cache(maxsize=1)  # all layers ask for that of the same batch
def block_mask(documents: Tensor):
    """FlexAttention's mask: position i sees j where j is not later and of the same document.

    Ids ascend, so the first and last ones of two blocks of positions say whether all, some or none of these see each
    other. `create_block_mask` asks every position, and is compiled anew for each shape of a batch.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size, t = 128, documents.shape[1]
    index = torch.arange(0, t, size, device=documents.device)
    first, last = documents[:, index, None], documents[:, (index + size - 1).clamp(max=t - 1), None]
    earlier, itself = index[:, None] > index, index[:, None] == index
    full = earlier & (first.mT == last) & (index[:, None] + size <= t)  # (B, blocks of queries, blocks of keys)
    partial = itself | earlier & (first <= last.mT) & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many there are in each row, (B, 1, n), and which, before the others, (B, 1, n, n)."""
        return blocks.sum(-1).int()[:, None], blocks.int().argsort(descending=True, stable=True).int()[:, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=size, seq_lengths=(t, t),
        mask_mod=lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]))


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """train.attention without a (T, T) mask: each document by itself on a CPU, FlexAttention on CUDA."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.is_cuda:
        return flex()(q, k, v, block_mask=block_mask(documents))
    rows = []
    for i, ids in enumerate(documents):
        ends = [0, *(ids.diff().nonzero()[:, 0] + 1).tolist(), len(ids)]
        parts = ([x[i : i + 1, :, start:end] for x in (q, k, v)] for start, end in itertools.pairwise(ends))
        rows.append(torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2))
    return torch.cat(rows)


# == LOSS =============================================================================================================


class CrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy`, a few rows at a time: the logits never exist as a whole.

    Gradients are made on the way, while a row's logits are at hand, as Liger-Kernel (Hsu et al. 2024,
    arXiv:2410.10989) does. They are divided by the number of targets last, so that float16 holds them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        learns, few = any(ctx.needs_input_grad), max(1, 2 ** (24 if kind == "cpu" else 27) // len(weight))
        few = min(few, 2**14) if dtype == torch.float16 else few  # whose largest number is 65504, below some sums
        w, count = weight.to(dtype), (targets != IGNORE_INDEX).sum()
        dhidden, dweight = (torch.zeros_like(v) if learns else None for v in (hidden, weight))
        total = hidden.new_zeros((), dtype=torch.float32)
        for i in range(0, len(hidden), few):
            h, t = hidden[i : i + few].to(dtype), targets[i : i + few, None]
            logp = (h @ w.T).float().log_softmax(-1)  # (rows, V)
            real = t != IGNORE_INDEX
            total -= logp.gather(1, t.clamp(min=0)).mul_(real).sum()
            if learns:
                d = logp.exp_().scatter_add_(1, t.clamp(min=0), -torch.ones_like(t, dtype=logp.dtype))
                d = d.mul_(real).to(dtype)
                dhidden[i : i + few] = d @ w
                dweight.addmm_(d.T, h) if dtype == dweight.dtype else dweight.add_(d.T @ h)
        ctx.save_for_backward(dhidden, dweight, count)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight, count = ctx.saved_tensors
        return dhidden * (dloss / count), dweight * (dloss / count), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """train.linear_cross_entropy without all the logits at once."""
    if not torch.is_grad_enabled():  # which a function cannot see: it would make gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return CrossEntropy.apply(hidden, weight, targets)


# == TABLES ===========================================================================================================


CPU = Ops("CPU functions with hand-written backward passes", rms_norm, causal_conv, ssd_scan, swiglu, rotary,
          attention, linear_cross_entropy)


def pick_ops(device: torch.device, dtype: torch.dtype, asked: str) -> Ops:
    """The table to compute with on `device` with matrix products in `dtype`, as --kernels asks for it.

    UserError where "triton" is asked for and cannot be had.
    """
    if asked == "triton" and device.type != "cuda":
        raise UserError(f"--kernels triton: needs --device cuda, not {device.type}; use --kernels auto")
    if asked == "plain" or device.type not in ("cpu", "cuda"):
        return PLAIN
    if device.type == "cpu":
        return CPU
    return cuda_ops(asked)


def cuda_ops(asked: str) -> Ops:
    """Triton's table; where it does not work, the plain functions with the reason in their name."""
    has_flex = importlib.util.find_spec("triton") is not None
    plain = PLAIN._replace(linear_cross_entropy=linear_cross_entropy)
    if has_flex:
        plain = plain._replace(attention=attention)
    try:
        from extras.triton_kernels import make_ops

        return make_ops(plain, strict=asked == "triton")
    except Exception as error:  # a package built for another torch fails in many ways
        why = f"{type(error).__name__}: {reason(error)}"
        if asked == "triton":
            raise UserError(f"--kernels triton: {why}; use --kernels auto") from None
        with_flex = " with FlexAttention" if has_flex else ""
        return plain._replace(name=f"plain PyTorch{with_flex}, slower than Triton's kernels, which do not work: {why}")


@functools.cache
def pick_dtype(device: torch.device) -> torch.dtype:
    """What --dtype auto means: bfloat16 where it is at least 1.5 times as fast as float32, else float32.

    A GPU is asked, a CPU is timed with a product of each kind: one without bfloat16 in hardware imitates it, and takes
    44 to 499 times as long (pytorch #146508).
    """
    if device.type != "cpu":
        return train.pick_dtype.plain(device)
    a, b = torch.randn(512, 256), torch.randn(256, 512)

    def seconds(dtype: torch.dtype) -> float:
        x, y, taken = a.to(dtype), b.to(dtype), []
        for _ in range(5):
            start = time.perf_counter()
            x @ y
            taken.append(time.perf_counter() - start)
            if taken[-1] > 0.02:  # imitated
                break
        return min(taken)

    return torch.bfloat16 if seconds(torch.float32) > 1.5 * seconds(torch.bfloat16) else torch.float32
