"""Faster functions for the table that a model computes with: for a CPU, and the choice of those for CUDA.

Each has the arguments and the meaning of the function of the same name in train.py. The CPU's have backward passes
written by hand and go through memory a few rows at a time, so that all that is made of these stays in the cache. They
keep nothing between calls, so that several threads may use them at once.
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import math
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
            y[rows] = h.mul(ss).mul_(w) if shift is None else torch.addcmul(shift, h * ss, w)
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
            n = (xs if z is None else silu * xs).mul(ss)
            dn = dys * n
            total = dn.sum(0)
            dweight += total * more
            if shift is not None:
                dtable[task] += torch.cat([total * weight, dys.sum(0)])
            dh = (dys * w).addcmul_(n, torch.mv(dn, w).div_(len(w))[:, None], value=-1).mul_(ss)
            if z is None:
                dx[rows] = dh
            else:
                dx[rows] = dh * silu
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
    def shifted(v: Tensor, seq_idx: Tensor | None, back: int, rows: slice, times: slice) -> tuple[int, Tensor]:
        """v at `back` before `times`, zero where that is another sequence, and how many of the times have none."""
        none = max(0, back - times.start)
        now, then = slice(times.start + none, times.stop), slice(times.start + none - back, times.stop - back)
        v = v[rows, then].float()
        if seq_idx is not None and back:
            v = v * (seq_idx[rows, then] == seq_idx[rows, now])[..., None]
        return none, v

    @staticmethod
    def before_silu(x, weight, bias, seq_idx, rows, times):
        """What goes into the SiLU at those rows and times."""
        y = torch.addcmul(bias, x[rows, times].float(), weight[-1])
        for back in range(1, min(len(weight), times.stop)):
            none, v = CausalConv.shifted(x, seq_idx, back, rows, times)
            y[:, none:].addcmul_(v, weight[-1 - back])
        return y

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in tiles(*x.shape):
            y[at] = F.silu(CausalConv.before_silu(x, weight, bias, seq_idx, *at))
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, seq_idx = ctx.saved_tensors
        dx, dweight, dbias = torch.zeros(x.shape, dtype=torch.float32), torch.zeros_like(weight), torch.zeros_like(bias)
        for rows, times in tiles(*x.shape):
            pre = CausalConv.before_silu(x, weight, bias, seq_idx, rows, times)
            d = torch.ops.aten.silu_backward(dy[rows, times].float(), pre)
            dbias += d.sum((0, 1))
            for back in range(min(len(weight), times.stop)):
                none, v = CausalConv.shifted(x, seq_idx, back, rows, times)
                dweight[-1 - back] += (d[:, none:] * v).sum((0, 1))
                late = d[:, none:] if seq_idx is None or not back else d[:, none:] * (
                    seq_idx[rows, times.start + none - back : times.stop - back] ==
                    seq_idx[rows, times.start + none : times.stop])[..., None]
                dx[rows, times.start + none - back : times.stop - back].addcmul_(late, weight[-1 - back])
        return dx.to(x.dtype), dweight, dbias, None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """train.causal_conv, a few rows at a time."""
    return CausalConv.apply(x, weight.T.contiguous(), bias, seq_idx)


# == SCAN =============================================================================================================


class ChunkScan(torch.autograd.Function):
    """The state space dual form of Mamba-2 on whole chunks, with a backward written as matrix products.

    Mirrors `ssd_minimal_discrete` of the paper (listing 1) and `_mamba_chunk_scan_combined_fwd/bwd` upstream. Goes
    through the chunks a few at a time, so that all it makes of them stays in the processor's cache; only the states
    between chunks are kept for the backward pass, which makes the rest again.

    x (B, C, Q, H, P), dt and da = dt * A (B, C, Q, H), Bm and Cm (B, C, Q, N), D (B, H), seq_idx (B, C, Q) or None,
    initial (B, N, H * P) or None. Returns y like x and the final state (B, N, H * P).
    """

    @staticmethod
    def slabs(x: Tensor, seq_idx: Tensor | None) -> list[tuple[slice, Tensor | None, Tensor | None]]:
        """A few chunks at a time: which, their seq_idx (R, Q) and that of the position before each (R, 1)."""
        chunks = list(slabs(x.shape[1], x[:, 0].numel()))
        if seq_idx is None:
            return [(s, None, None) for s in chunks]
        before = torch.cat([seq_idx[:, :1, :1], seq_idx[:, :-1, -1:]], dim=1)
        return [(s, seq_idx[:, s].flatten(0, 1), before[:, s].flatten(0, 1)) for s in chunks]

    @staticmethod
    def decays(da: Tensor, seq: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decay into each position, from each to its chunk's end, over a chunk, and L, from each to each later one.

        da (R, Q, H) -> (R, Q, H, 1), (R, Q, H, 1), (R, H, 1), (R, H, Q, Q). Nothing passes from another sequence.
        """
        a = da.cumsum(1).div_(math.log(2))  # exp2, because exp takes ten times as long where its result is 0
        into, onward, over = a.exp2(), (a[:, -1:] - a).exp2_(), a[:, -1].exp2()
        mask = torch.full((1, 1, *[a.shape[1]] * 2), -math.inf, device=a.device).triu_(1)
        if seq is not None:
            into *= (seq == before)[..., None]
            onward *= (seq == seq[:, -1:])[..., None]
            over *= seq[:, -1:] == before
            mask = mask.masked_fill((seq[:, :, None] != seq[:, None, :])[:, None], -math.inf)
        a = a.mT.contiguous()  # (R, H, Q)
        return into[..., None], onward[..., None], over[..., None], (a[..., None] - a[:, :, None]).add_(mask).exp2_()

    @staticmethod
    def heads(v: Tensor) -> Tensor:
        """(R, Q, H, P) -> (R * H, Q, P), the rows of one product per head."""
        return v.transpose(1, 2).reshape(-1, v.shape[1], v.shape[3])

    @staticmethod
    def forward(ctx, x, dt, da, Bm, Cm, D, seq_idx, initial):
        (b, c, q, h, p), n = x.shape, Bm.shape[-1]
        H = x.new_zeros(b, n, h * p) if initial is None else initial
        y, states = torch.empty_like(x), x.new_empty(b, c, n, h * p)  # the state before each chunk
        for s, seq, before in ChunkScan.slabs(x, seq_idx):
            xs, Bs, Cs, ys = x[:, s].flatten(0, 1), Bm[:, s].flatten(0, 1), Cm[:, s].flatten(0, 1), y[:, s]
            into, onward, over, L = ChunkScan.decays(da[:, s].flatten(0, 1), seq, before)
            u = xs * dt[:, s].flatten(0, 1)[..., None]
            # 1. what each chunk adds to the state by its end
            S = torch.bmm(Bs.mT, (u * onward).flatten(2))  # (R, N, H * P)
            # 2. the state before each chunk: the only sequential part, one multiply-add per chunk
            wide = over.expand(-1, -1, p).reshape(b, -1, 1, h * p)
            for i, add in enumerate(S.unflatten(0, (b, -1)).unbind(1), s.start):
                states[:, i] = H
                H = torch.addcmul(add, H, wide[:, i - s.start])
            # 3. what that state says to each position of the chunk
            out = torch.bmm(Cs, states[:, s].flatten(0, 1)).view(u.shape).mul_(into)
            # 4. what positions of the same chunk say to each other
            M = L.mul_(torch.bmm(Cs, Bs.mT)[:, None])
            out += torch.bmm(M.flatten(0, 1), ChunkScan.heads(u)).view(-1, h, q, p).transpose(1, 2)
            torch.addcmul(out.view(ys.shape), x[:, s], D[:, None, None, :, None], out=ys)
        ctx.save_for_backward(x, dt, da, Bm, Cm, D, seq_idx, states)
        return y, H

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, da, Bm, Cm, D, seq_idx, states = ctx.saved_tensors
        b, c, q, h, p = x.shape
        dx, ddt, dda, dB, dC, dD = (torch.empty_like(v) for v in (x, dt, da, Bm, Cm, D))
        dH, dD = torch.zeros_like(states[:, 0]) if dfinal is None else dfinal, dD.zero_()  # gradient of the state
        for s, seq, before in reversed(ChunkScan.slabs(x, seq_idx)):
            xs, dts, Bs, Cs, dys, Hs = (v[:, s].flatten(0, 1) for v in (x, dt, Bm, Cm, dy, states))
            into, onward, over, L = ChunkScan.decays(da[:, s].flatten(0, 1), seq, before)
            u = xs * dts[..., None]
            # 3. from each position to the state before its chunk
            E = dys * into
            dCs, dS = torch.bmm(E.flatten(2), Hs.mT), torch.bmm(Cs.mT, E.flatten(2))
            dsum = E.mul_(torch.bmm(Cs, Hs).view(E.shape)).sum(-1)  # (R, Q, H), gradient of the sum of dt * A
            # 2. from each chunk to those before it: dS becomes the gradient of the state at the end of each
            wide = over.expand(-1, -1, p).reshape(b, -1, 1, h * p)
            for i, at in reversed(list(enumerate(dS.unflatten(0, (b, -1)).unbind(1)))):
                dH, end = torch.addcmul(at, dH, wide[:, i]), dH
                at.copy_(end)
            dsum[:, -1] += (dS * Hs).sum(1).mul_(wide.flatten(0, 2)).unflatten(1, (h, p)).sum(-1)
            # 1. from the end of a chunk to its positions
            W, du = u * onward, torch.bmm(Bs, dS).view(u.shape)
            dBs = torch.bmm(W.flatten(2), dS.mT)
            through = W.mul_(du).sum(-1)
            dsum -= through
            dsum[:, -1] += through.sum(1)
            # 4. inside each chunk
            CB, dyh = torch.bmm(Cs, Bs.mT)[:, None], ChunkScan.heads(dys)
            dM = torch.bmm(dyh, ChunkScan.heads(u).mT).view(L.shape).mul_(L)
            dCB, M = dM.sum(1), L.mul_(CB)
            du = du.mul_(onward).add_(torch.bmm(M.flatten(0, 1).mT, dyh).view(-1, h, q, p).transpose(1, 2))
            dM *= CB
            dsum += (dM.sum(3) - dM.sum(2)).mT
            dC[:, s], dB[:, s] = (v.view(b, -1, *v.shape[1:]) for v in (dCs + dCB @ Bs, dBs + dCB.mT @ Cs))
            ddt[:, s] = (du * xs).sum(-1).view(b, -1, q, h)
            dda[:, s] = dsum.flip(1).cumsum(1).flip(1).view(b, -1, q, h)
            dD += (dys * xs).view(b, -1, h, p).sum((1, 3))
            torch.addcmul((du * dts[..., None]).view(b, -1, q, h, p), dy[:, s], D[:, None, None, :, None], out=dx[:, s])
        return dx, ddt, dda, dB, dC, dD, None, dH if ctx.needs_input_grad[7] else None


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
             dt_bias: Tensor | None = None, dt_softplus: bool = False, seq_idx: Tensor | None = None,
             initial_states: Tensor | None = None, return_final_states: bool = False):
    """train.ssd_scan with its backward pass written by hand."""
    (b, t, h, p), g = x.shape, B.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    D = dt.new_zeros(h) if D is None else D.float()
    q = min(chunk_size, t)
    pad = -t % q  # a step of length zero neither decays the state nor adds to it

    def rows(v: Tensor) -> Tensor:
        """(B, T, H or G, ...) -> (B * G, C, Q, H / G or 1, ...): each group a row of its own."""
        v = F.pad(v.float(), (0, 0) * (v.dim() - 2) + (0, pad)) if pad else v.float()
        v = v.unflatten(2, (g, -1)).movedim(2, 1)
        return v.reshape(b * g, -1, q, *v.shape[3:])

    if seq_idx is not None:
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(b, pad)], dim=1).repeat_interleave(g, 0).view(b * g, -1, q)
    if initial_states is not None:  # (B, H, P, N) -> (B * G, N, H / G * P)
        initial_states = initial_states.float().reshape(b * g, h // g * p, -1).mT
    y, final = ChunkScan.apply(rows(x), rows(dt), rows(dt * A), rows(B).squeeze(3), rows(C).squeeze(3),
                               D.view(g, -1).repeat(b, 1), seq_idx, initial_states)
    y = y.view(b, g, t + pad, h // g, p)[:, :, :t].movedim(1, 2).reshape(b, t, h, p).to(x.dtype)
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
    """`flex_attention` and `create_block_mask`, compiled; uncompiled they would make (T, T) matrices."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


@functools.lru_cache(maxsize=1)  # all layers ask for that of the same batch
def block_mask(documents: Tensor):
    """FlexAttention's mask: position i sees j where j is not later and of the same document."""
    b, t = documents.shape
    return flex()[1](lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]), b, None, t, t,
                     device=documents.device)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """train.attention without a (T, T) mask: each document by itself on a CPU, FlexAttention on CUDA."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.is_cuda:
        return flex()[0](q, k, v, block_mask=block_mask(documents))
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
    arXiv:2410.10989) does.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        learns, few = any(ctx.needs_input_grad), max(1, 2 ** (24 if kind == "cpu" else 27) // len(weight))
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
                d = d.mul_(real / count).to(dtype)
                dhidden[i : i + few] = d @ w
                dweight.addmm_(d.T, h) if dtype == dweight.dtype else dweight.add_(d.T @ h)
        ctx.save_for_backward(dhidden, dweight)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss, dweight * dloss, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """train.linear_cross_entropy without all the logits at once."""
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
    plain = PLAIN._replace(linear_cross_entropy=linear_cross_entropy, attention=attention if has_flex else PLAIN.attention)
    try:
        from extras.triton_kernels import make_ops

        return make_ops(plain)
    except Exception as error:  # a package built for another torch fails in many ways
        why = f"{type(error).__name__}: {reason(error)}"
        if asked == "triton":
            raise UserError(f"--kernels triton: {why}; use --kernels auto") from None
        with_flex = " with FlexAttention" if has_flex else ""
        return plain._replace(name=f"plain PyTorch{with_flex}, slower than Triton's kernels, which do not work: {why}")
