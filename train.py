"""Train a hybrid Mamba-2 / attention GPT from scratch on one machine, on ARC tasks or on FineWeb-Edu token shards.

    python train.py --dataset arc --batch-size 16                    # laptop: 8 minutes; CUDA: 60 minutes
    python train.py --dataset arc --batch-size 16 --resume --out-dir runs/arc --max-minutes 16
    python train.py --dataset fineweb --preset gpt2 --batch-size 32  # wants token shards in data/
    torchrun --standalone --nproc-per-node 4 train.py --dataset arc --preset base --batch-size 8

tokens (B, T)
   |  embedding (+ where in which grid, + the input cells around the cell to predict: ARC)
   |
   +--> RMSNorm --> Mamba-2 or attention --+     one block for every letter of --pattern: M or A
   |<--------------------------------------+
   +--> RMSNorm --> SwiGLU ----------------+
   |<--------------------------------------+
   |
RMSNorm --> head --> logits (B, T, V)

Sections, in order (grep -n '^# == ' train.py):
    MODEL  GRIDS  DATA  CONFIG  OPTIMIZER  CHECKPOINT  RUNTIME  EVALUATE  TRAIN  CLI

Letters: B batch, T time, D width, H heads, P channels of a head, G groups, N state size, Q chunk length, C chunks,
V vocabulary. Mamba-2 is Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060).
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a target that carries no loss
ROW, IN, OUT, END = 10, 11, 12, 13  # ARC tokens; 0-9 are the colours
ARC_VOCAB = 16  # what the head predicts: the fourteen above, padded
END_OF_TEXT = 50256  # GPT-2's token before each document
UNKNOWN_TASK = 16  # first token of a sequence whose task has no vector of its own; 17, 18, ... name tasks
HERE = Path(__file__).resolve().parent


def option(default: Any, text: str, *choices: str) -> Any:
    """A dataclass field with the help text, and perhaps the choices, of its command-line flag."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


# == MODEL ============================================================================================================


@dataclass
class ModelConfig:
    """Sizes of the model. The defaults make a plain text model; `grid` turns on what only ARC has."""

    vocab_size: int = 50304
    block_size: int = option(1024, "longest sequence, in tokens (4096 for arc; 1024 for its nano and for fineweb)")
    d_model: int = option(768, "width of the residual stream, in channels")
    pattern: str = option("MMAMMMAMMMAM", "one letter a layer: M for Mamba-2, A for attention")
    n_head: int = option(12, "attention heads")
    d_state: int = option(64, "Mamba-2 state size N, per channel")
    headdim: int = option(64, "Mamba-2 channels in a head, P")
    d_ff: int = option(1536, "hidden width of the SwiGLU")
    dropout: float = option(0.0, "dropout on what each mixer and MLP adds, 0 to 1")
    d_conv: int = 4
    expand: int = 2
    ngroups: int = 1
    chunk_size: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    document_token: int = -1  # tokens from this one on open a document that sees none before it; -1: no such token
    grid: bool = False  # ARC: positions and neighbourhoods recovered from the grid tokens
    n_tasks: int = 0  # ARC: tasks with a token of their own

    def validate(self) -> list[str]:
        """Everything that is wrong with these sizes, in the words of the flags; empty when the model can be built."""
        found = []
        for name in ("vocab_size", "block_size", "d_model", "n_head", "d_state", "headdim", "d_ff", "chunk_size",
                     "d_conv", "expand", "ngroups"):
            if not 1 <= getattr(self, name) < 2**31:
                found.append(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1, below 2^31")
        if not (0 < self.norm_eps < 1 and 0 < self.rope_theta < math.inf and len(self.pattern) <= 1000):
            found.append("norm_eps, rope_theta or the length of --pattern make no model")
        if not self.pattern or set(self.pattern) - set("MA"):
            found.append(f"--pattern {self.pattern!r} must be letters M (Mamba-2) and A (attention), such as MAMA")
        if not 0 <= self.dropout < 1:
            found.append(f"--dropout {self.dropout} must be at least 0 and below 1")
        if found:
            return found
        d_inner = self.expand * self.d_model
        if "M" in self.pattern and d_inner % self.headdim:
            found.append(f"--headdim {self.headdim} must divide {self.expand} x --d-model = {d_inner}")
        elif "M" in self.pattern and d_inner // self.headdim % self.ngroups:
            found.append(f"ngroups {self.ngroups} must divide the number of heads, {d_inner // self.headdim}")
        if "A" in self.pattern and self.d_model % self.n_head:
            found.append(f"--n-head {self.n_head} must divide --d-model {self.d_model}")
        elif "A" in self.pattern and (self.d_model // self.n_head) % 2:
            found.append(f"--d-model / --n-head is {self.d_model // self.n_head}; rotary positions need it even")
        elif "A" in self.pattern and self.grid and self.d_model // self.n_head < 8:
            found.append(f"--d-model / --n-head is {self.d_model // self.n_head}; grid positions need at least 8")
        return found


def slabs(*tensors: Tensor | None):
    """Views of the tensors (rows, d), some rows at a time, so that all that is made of them stays in the CPU's cache.

    Elsewhere all rows come at once. None stays None.
    """
    rows = max(1, 2**17 // tensors[0].shape[1]) if tensors[0].device.type == "cpu" else 2**62
    return zip(*(itertools.repeat(None) if t is None else t.split(rows) for t in tensors), strict=False)


class Normalize(torch.autograd.Function):
    """RMSNorm in few passes over memory: only its inputs and one number a group and token are kept for the backward.

    h = x, or x * silu(z) with a gate; y = h / rms(h) * weight, the mean square taken over each of `groups` equal parts.
    x, z (tokens, d) float32, weight (d,).
    """

    @staticmethod
    def forward(ctx, x, z, weight, eps, groups):
        y, scale = torch.empty_like(x), x.new_empty(len(x), groups, 1)
        for xs, zs, ys, ss in slabs(x, z, y, scale):
            h = (xs if zs is None else F.silu(zs).mul_(xs)).unflatten(-1, (groups, -1))
            torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=ss)
            ss.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
            torch.mul((h * ss).flatten(-2), weight, out=ys)
        ctx.save_for_backward(x, z, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, weight, scale = ctx.saved_tensors
        dx, dz, dweight = torch.empty_like(x), None if z is None else torch.empty_like(z), torch.zeros_like(weight)
        for xs, zs, ss, dys, dxs, dzs in slabs(x, z, scale, dy, dx, dz):
            gate = None if zs is None else F.silu(zs)
            n = (xs if zs is None else gate * xs).unflatten(-1, (ss.shape[-2], -1)) * ss
            dweight += (dys * n.flatten(-2)).sum(0)
            dn = (dys * weight).view_as(n)
            dh = torch.addcmul(dn, n, (dn * n).mean(-1, keepdim=True), value=-1).mul_(ss).flatten(-2)
            if zs is None:
                dxs.copy_(dh)
            else:
                torch.mul(dh, gate, out=dxs)
                torch.ops.aten.silu_backward.grad_input(dh.mul_(xs), zs, grad_input=dzs)
        return dx, dz, dweight, None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, or each of its groups (Zhang & Sennrich 2019), in float32."""

    def __init__(self, d: int, eps: float = 1e-5, groups: int = 1):
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Norm of x (..., d), or of x * silu(z) when a gate z is given (Mamba-2's norm, `norm_before_gate=False`)."""
        if x.device.type != "cpu":  # where one kernel does it, and torch.compile joins the rest
            h = x.float() if z is None else x.float() * F.silu(z.float())
            h = h.unflatten(-1, (self.groups, -1))
            return (F.rms_norm(h, h.shape[-1:], eps=self.eps).flatten(-2) * self.weight).to(x.dtype)
        rows = (v if v is None else v.float().reshape(-1, v.shape[-1]) for v in (x, z))
        return Normalize.apply(*rows, self.weight, self.eps, self.groups).view(x.shape).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, 1, 1, head_dim / 2) of rotary positions (Su et al. 2021) over one or three axes.

    positions is (B, T, 1), or (B, T, 3) with column, row and number of the grid; three axes share the pairs of
    channels 5 : 5 : 6 and, being at most a few dozen long, use base 100 instead of theta.
    """
    pairs = head_dim // 2
    share = [pairs] if positions.shape[-1] == 1 else [pairs * 5 // 16, pairs * 5 // 16, pairs - 2 * (pairs * 5 // 16)]
    base = theta if len(share) == 1 else 100.0
    frequency = [base ** (-i / n) for n in share for i in range(n)]
    axis = [a for a, n in enumerate(share) for _ in range(n)]
    angles = positions[..., axis].float() * torch.tensor(frequency, device=positions.device)  # (B, T, pairs)
    return angles.cos()[:, :, None, None], angles.sin()[:, :, None, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, 2, n_head, head_dim) by its angles; channel i is paired with i + head_dim / 2, as in Llama."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def same_document(documents: Tensor):
    """FlexAttention's mask function: position i sees j where j is not later and of the same document."""
    return lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j])


@functools.cache
def flex() -> tuple[Any, Any]:
    """`flex_attention` and `create_block_mask`, compiled; uncompiled they would make (T, T) matrices."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


class Documents:
    """Which positions of a batch may see each other: those of one document; ids (B, T) int64 ascend from 0."""

    def __init__(self, ids: Tensor):
        self.ids, (b, t), self.mask = ids, ids.shape, None
        if ids.is_cuda:
            self.mask = flex()[1](same_document(ids), b, None, t, t, device=ids.device)
        elif ids.device.type == "cpu":
            cuts = [[0, *(row.diff().nonzero()[:, 0] + 1).tolist(), t] for row in ids]
            self.spans = [(i, slice(*ends)) for i, row in enumerate(cuts) for ends in itertools.pairwise(row)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention inside each document, all (B, n_head, T, head_dim)."""
        if self.mask is not None:
            return flex()[0](q, k, v, block_mask=self.mask)
        if self.ids.device.type != "cpu":
            t = torch.arange(q.shape[2], device=q.device)
            seen = same_document(self.ids)(torch.arange(len(q), device=q.device)[:, None, None], 0, t[:, None], t)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        parts: list[list[Tensor]] = [[] for _ in q]
        for row, span in self.spans:
            one = slice(row, row + 1)
            args = (x[one, :, span] for x in (q, k, v))
            parts[row].append(F.scaled_dot_product_attention(*args, is_causal=True))
        return torch.cat([torch.cat(row, dim=2) for row in parts])


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and, for decoding, a key/value cache."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
                documents: Documents | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)
        q, k = rotate(qkv[:, :, :2], rope).permute(2, 0, 3, 1, 4)  # 2 x (B, n_head, T, head_dim)
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is None or not cache.stepping:
            if documents is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = documents.attend(q, k, v)
            if cache is not None:
                room = (0, 0, 0, cache.capacity - T)
                cache[self] = F.pad(k, room), F.pad(v, room)
        else:  # one token a row, written over the pads behind that row's prompt
            keys, values = cache[self]
            row = torch.arange(B, device=x.device)
            keys[row, :, cache.index], values[row, :, cache.index] = k[:, :, 0], v[:, :, 0]
            seen = torch.arange(cache.longest, device=x.device) <= cache.index[:, None]  # (B, longest)
            keys, values = keys[:, :, : cache.longest], values[:, :, : cache.longest]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


class CausalConv(torch.autograd.Function):
    """silu(bias + sum over k of weight[k] * x[t - K + 1 + k]) as shifted multiply-adds.

    On a CPU the backward of a depthwise `conv1d` takes fifty times as long (bench/LOG.md).

    x (B, T, D), weight (K, D), bias (D,), seq_idx (B, T) or None: taps do not reach into another sequence.
    """

    @staticmethod
    def within(v: Tensor, back: int, seq_idx: Tensor | None) -> Tensor:
        """v (B, T - back, D), zero where `back` positions lie between two sequences."""
        return v if seq_idx is None else v * (seq_idx[:, back:] == seq_idx[:, :-back])[..., None]

    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx):
        y = torch.addcmul(bias, x, weight[-1])
        for back in range(1, min(len(weight), x.shape[1])):
            y[:, back:].addcmul_(CausalConv.within(x[:, :-back], back, seq_idx), weight[-1 - back])
        ctx.save_for_backward(x, weight, seq_idx, y)
        return F.silu(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, seq_idx, y = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(dy, y)
        dx, dweight = dy * weight[-1], torch.zeros_like(weight)
        dweight[-1] = (dy * x).sum((0, 1))
        for back in range(1, min(len(weight), x.shape[1])):
            late = CausalConv.within(dy[:, back:], back, seq_idx)
            dx[:, :-back].addcmul_(late, weight[-1 - back])
            dweight[-1 - back] = (late * x[:, :-back]).sum((0, 1))
        return dx, dweight, dy.sum((0, 1)), None


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
        c = x.shape[1]
        few = max(1, 2**17 // x[:, 0].numel()) if x.device.type == "cpu" else c
        chunks = [slice(i, min(i + few, c)) for i in range(0, c, few)]
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
        """(R, Q, H, P) -> (R * H, Q, P), the rows of a product a head."""
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
            # 2. the state before each chunk: the only sequential part, one multiply-add a chunk
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
    """Pure-PyTorch twin of `mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`: same arguments and meaning.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t];  y[t] = C[t] h[t] + D x[t], for every head, in float32, any length.
    x (B, T, H, P), dt (B, T, H), A (H,), B and C (B, T, G, N), D (H,), dt_bias (H,), seq_idx (B, T) ascending ids from
    0 (the state starts anew where the id changes; an initial state belongs to id 0), initial_states (B, H, P, N).
    Returns y (B, T, H, P) and, if asked for, the state after the last position (B, H, P, N).
    """
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


class Mamba2(nn.Module):
    """The Mamba-2 mixer. Parameter names, shapes and row order are those of `mamba_ssm.Mamba2`: either loads the other.

    `scan` is `ssd_scan`, or upstream's Triton kernel with the same arguments; `fused` is upstream's kernel for all
    between the projections, the last included, or None (see `Kernels`).
    """

    scan, fused = staticmethod(ssd_scan), None

    def __init__(self, d_model, d_state=64, d_conv=4, expand=2, headdim=64, ngroups=1, chunk_size=64, norm_eps=1e-5):
        super().__init__()
        self.d_state, self.d_conv, self.headdim = d_state, d_conv, headdim
        self.ngroups, self.chunk_size = ngroups, chunk_size
        self.d_inner = expand * d_model
        self.nheads = self.d_inner // headdim
        self.d_xbc = self.d_inner + 2 * ngroups * d_state  # channels that go through the convolution
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_xbc + self.nheads, bias=False)  # rows z, x, B, C, dt
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, d_conv, groups=self.d_xbc, padding=d_conv - 1)
        dt = torch.exp(torch.rand(self.nheads) * math.log(0.1 / 0.001) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(self.d_inner, norm_eps, ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """u (B, T, D) -> (B, T, D). With a cache: fill it from a padded prompt, or advance it by one token."""
        zxbcdt = self.in_proj(u)
        if self.fused and cache is None:
            return self.fused(
                zxbcdt, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, -self.A_log.exp(), D=self.D,
                chunk_size=self.chunk_size, seq_idx=seq_idx if seq_idx is None else seq_idx.int(),
                rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps, outproj_weight=self.out_proj.weight,
                headdim=self.headdim, ngroups=self.ngroups, norm_before_gate=False)
        z, xbc, dt = zxbcdt.split([self.d_inner, self.d_xbc, self.nheads], dim=-1)
        with torch.autocast(u.device.type, enabled=False):
            if cache is None:
                y = self.mix(self.convolve(xbc, seq_idx), dt, seq_idx)
            elif cache.stepping:
                y = self.step(xbc[:, 0], dt[:, 0], cache)
            else:
                real = torch.arange(u.shape[1], device=u.device) < cache.lengths[:, None]
                dt = dt.masked_fill(~real[..., None], -1e4)  # softplus makes it 0: a pad leaves the state alone
                y, state = self.mix(self.convolve(xbc), dt, return_final_states=True)
                tail = cache.lengths[:, None] + torch.arange(1 - self.d_conv, 0, device=u.device)  # (B, d_conv - 1)
                recent = xbc.gather(1, tail.clamp(min=0)[..., None].expand(-1, -1, self.d_xbc))
                cache[self] = recent.masked_fill((tail < 0)[..., None], 0).float(), state.float()
            y = self.norm(y.to(z.dtype), z)
        return self.out_proj(y)

    def convolve(self, xbc: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Causal depthwise convolution and SiLU, (B, T, d_xbc) -> same."""
        return CausalConv.apply(xbc, self.conv1d.weight[:, 0].T.contiguous(), self.conv1d.bias, seq_idx).to(xbc.dtype)

    def heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved channels (..., d_xbc) as x (..., H, P), B and C (..., G, N)."""
        x, b, c = xbc.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], dim=-1)
        return x.unflatten(-1, (self.nheads, -1)), *(v.unflatten(-1, (self.ngroups, -1)) for v in (b, c))

    def mix(self, xbc: Tensor, dt: Tensor, seq_idx: Tensor | None = None, return_final_states: bool = False):
        """The scan over convolved x, B and C: (B, T, d_xbc), (B, T, H) -> (B, T, d_inner), and the last state."""
        x, b, c = self.heads(xbc)
        out = self.scan(x, dt, -self.A_log.exp(), b, c, self.chunk_size, D=self.D, dt_bias=self.dt_bias,
                        dt_softplus=True, seq_idx=seq_idx, return_final_states=return_final_states)
        return (out[0].flatten(2), out[1]) if return_final_states else out.flatten(2)

    def step(self, xbc: Tensor, dt: Tensor, cache: Cache) -> Tensor:
        """One token: xbc (B, d_xbc), dt (B, H) -> (B, 1, d_inner); mirrors `Mamba2.step` upstream, state in float32."""
        recent, state = cache[self]  # (B, d_conv - 1, d_xbc), (B, H, P, N)
        window = torch.cat([recent, xbc[:, None].float()], dim=1)
        xbc = F.silu((window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias)
        x, b, c = self.heads(xbc)
        b, c = (v.repeat_interleave(self.nheads // self.ngroups, 1) for v in (b, c))  # (B, H, N)
        dt = F.softplus(dt.float() + self.dt_bias)
        decay = torch.exp(-dt * self.A_log.exp())[..., None, None]
        state = state * decay + (x * dt[..., None])[..., None] * b[:, :, None]
        cache[self] = window[:, 1:], state
        return ((state @ c[..., None])[..., 0] + self.D[:, None] * x).flatten(1)[:, None]


class Gate(torch.autograd.Function):
    """silu(gate) * up of (tokens, gate and up side by side), of which only these are kept for the backward pass."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        y = both.new_empty(len(both), both.shape[1] // 2)
        for vs, ys in slabs(both, y):
            gate, up = vs.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=ys)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (both,) = ctx.saved_tensors
        dboth = torch.empty_like(both)
        for vs, dys, ds in slabs(both, dy, dboth):
            (gate, up), (dgate, dup) = vs.chunk(2, dim=-1), ds.chunk(2, dim=-1)
            torch.mul(dys, F.silu(gate), out=dup)
            torch.ops.aten.silu_backward.grad_input(dys * up, gate, grad_input=dgate)
        return dboth


class SwiGLU(nn.Module):
    """down(silu(gate) * up), with gate and up in one product (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)  # rows: gate, then up
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        if x.device.type == "cpu":
            return self.down(Gate.apply(both.flatten(0, -2)).view(*x.shape[:-1], -1))
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)); `film` scales and shifts both norms' results."""

    def __init__(self, cfg: ModelConfig, letter: str):
        super().__init__()
        self.norm1 = RMSNorm(cfg.d_model, cfg.norm_eps)
        if letter == "A":
            self.mixer = Attention(cfg)
        else:
            self.mixer = Mamba2(cfg.d_model, cfg.d_state, cfg.d_conv, cfg.expand, cfg.headdim, cfg.ngroups,
                                cfg.chunk_size, cfg.norm_eps)
        self.norm2 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.d_model, cfg.d_ff)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None = None,
                documents: Documents | None = None, film: Film | None = None) -> Tensor:
        h = self.norm1(x)
        h = film.apply(h, 0) if film else h
        if isinstance(self.mixer, Attention):
            h = self.mixer(h, rope, cache, documents)
        else:
            h = self.mixer(h, documents and documents.ids, cache)
        x = x + self.dropout(h)
        h = self.norm2(x)
        return x + self.dropout(self.mlp(film.apply(h, 1) if film else h))


class Film(NamedTuple):
    """What a task does to one block: a scale and a shift for each of its two norms (Perez et al. 2018,
    arXiv:1709.07871).

    table (tasks, 4 * D), tasks (B, 1) or (B, T) int64: the row of the table that each position, or all, go by.
    """

    table: Tensor
    tasks: Tensor

    def apply(self, x: Tensor, norm: int) -> Tensor:
        """x (B, T, D), the result of the block's first (0) or second (1) norm."""
        scale, shift = (F.embedding(self.tasks, part) for part in self.table.chunk(4, dim=1)[2 * norm :][:2])
        return x * (1 + scale) + shift


class GridLayout(NamedTuple):
    """Where each token stands, recovered from the tokens alone; every field is (B, T) int64.

    A grid opens with IN or OUT. Its opening mark stands at row 0, column 0, the cells of row r at columns 1, 2, ...,
    and a ROW token already at column 0 of the row it opens: the cell to be predicted next is always one to the right.
    """

    col: Tensor
    row: Tensor
    grid: Tensor  # 0 for the first grid, 1 for the next; an output's is its input's plus one
    start: Tensor  # index of the mark that opened this grid; -1 before the first
    output: Tensor  # 1 in an output, 0 elsewhere
    source: Tensor  # of the grid before this one: index of its mark, its rows, its tokens a row (width + 1)
    source_rows: Tensor
    source_stride: Tensor

    @staticmethod
    def of(tokens: Tensor, documents: Tensor | None = None) -> GridLayout:
        """The layout of whole sequences, tokens (B, T); each of the `documents` (B, T) starts anew."""
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        first = index == 0 if documents is None else F.pad(documents.diff(dim=1), (1, 0), value=1) > 0
        mark = (tokens == IN) | (tokens == OUT)
        opened = torch.where(mark | first, index, 0).cummax(1).values  # where this grid, or else the document, begins
        start = opened.masked_fill(~mark.gather(1, opened), -1)
        grid, ends = mark.cumsum(1), (tokens == ROW).cumsum(1)
        origin = torch.where(first, index, 0).cummax(1).values
        grid = grid - grid.gather(1, origin) + mark.gather(1, origin).long() - 1
        row = ends - ends.gather(1, opened)
        col = index - torch.where(mark | (tokens == ROW) | first, index, 0).cummax(1).values
        output = (tokens.gather(1, opened) == OUT).long()
        source = start.gather(1, (opened - 1).clamp(min=0)).masked_fill(opened == origin, -1)
        rows = ends.gather(1, opened) - ends.gather(1, source.clamp(min=0))
        stride = (opened - source - 1) // rows.clamp(min=1)
        return GridLayout(col, row, grid, start, output, source, rows, stride)

    def at(self, index: Tensor) -> GridLayout:
        """The layout of one position in each row, index (B,); fields become (B, 1)."""
        return GridLayout(*(f.gather(1, index[:, None]) for f in self))

    def advance(self, token: Tensor, index: Tensor) -> GridLayout:
        """The layout of the next token (B,), which stands at position index (B,); self is that of the one before."""
        token, index = token[:, None], index[:, None]
        mark, end = (token == IN) | (token == OUT), token == ROW
        stride = (index - self.start - 1) // self.row.clamp(min=1)
        return GridLayout(
            col=(self.col + 1).masked_fill(mark | end, 0),
            row=(self.row + end).masked_fill(mark, 0),
            grid=self.grid + mark,
            start=torch.where(mark, index, self.start),
            output=torch.where(mark, token == OUT, self.output),
            source=torch.where(mark, self.start, self.source),
            source_rows=torch.where(mark, self.row, self.source_rows),
            source_stride=torch.where(mark, stride, self.source_stride),
        )

    def neighbourhood(self, tokens: Tensor) -> Tensor:
        """Colours of the 3 x 3 input cells around the cell that an output position predicts next, (B, T, 9).

        tokens is the whole sequence so far, (B, any length). 10 stands for "no such cell", and everywhere outside of
        outputs.
        """
        offset = torch.tensor([(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)], device=tokens.device)
        row, col = self.row[..., None] + offset[:, 0], self.col[..., None] + offset[:, 1]
        inside = (row >= 0) & (row < self.source_rows[..., None])
        inside &= (col >= 0) & (col < self.source_stride[..., None] - 1)
        inside &= (self.output == 1)[..., None] & (self.source >= 0)[..., None]
        index = self.source[..., None] + 1 + row * self.source_stride[..., None] + col
        cells = tokens.gather(1, index.clamp(0, tokens.shape[1] - 1).flatten(1)).view(index.shape)
        return torch.where(inside, cells, 10).clamp(max=10)


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of a linear head, a few rows at a time: the logits never exist as a whole.

    Gradients are made on the way, while a row's logits are at hand, as Liger-Kernel (Hsu et al. 2024,
    arXiv:2410.10989) does. hidden (tokens, D), weight (V, D), targets (tokens,) with IGNORE_INDEX.
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


class Cache(dict):
    """What decoding carries from token to token: the state of every mixer, and where every row stands."""

    def __init__(self, tokens: Tensor, lengths: Tensor, room: int):
        """tokens (B, T) are prompts of lengths (B,), padded on the right; `room` tokens will follow each."""
        super().__init__()
        self.lengths, self.capacity = lengths, tokens.shape[1] + room
        self.tokens = F.pad(tokens, (0, room))  # (B, capacity), grows over the pads
        self.stepping = False  # False while the prompts are read, True afterwards
        self.index = lengths  # (B,) position of the token to be fed next
        self.longest = tokens.shape[1]  # no row is longer
        self.layout: GridLayout | None = None  # of the token fed last
        self.films: list[Film | None] = []  # what each row's task does to the blocks

    def append(self, token: Tensor) -> None:
        """Put one token (B,) behind every row, to be fed next."""
        self.index = self.index + 1 if self.stepping else self.lengths
        self.longest, self.stepping = self.longest + 1, True
        self.tokens[torch.arange(len(token), device=token.device), self.index] = token

    def keep(self, rows: Tensor) -> None:
        """Forget every row but these, a mask (B,)."""
        self.tokens, self.lengths, self.index = self.tokens[rows], self.lengths[rows], self.index[rows]
        self.layout = self.layout and GridLayout(*(f[rows] for f in self.layout))
        self.films = [film and film._replace(tasks=film.tasks[rows]) for film in self.films]
        for mixer, states in self.items():
            self[mixer] = tuple(s[rows] for s in states)


class GPT(nn.Module):
    """The hybrid: a stack of blocks, one for every letter of `cfg.pattern`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if found := cfg.validate():
            raise ValueError("; ".join(found))
        self.config, self.remat = cfg, False  # remat: make activations again in the backward pass, a block at a time
        self.embed = nn.Embedding(UNKNOWN_TASK + 1 + cfg.n_tasks if cfg.grid else cfg.vocab_size, cfg.d_model)
        if cfg.grid:
            self.embed_col, self.embed_row = nn.Embedding(32, cfg.d_model), nn.Embedding(32, cfg.d_model)
            self.embed_role = nn.Embedding(2, cfg.d_model)
            self.embed_near = nn.Linear(9 * 11, cfg.d_model, bias=False)
            self.film = nn.Linear(cfg.d_model, 4 * cfg.d_model * len(cfg.pattern), bias=False)
        self.blocks = nn.ModuleList(Block(cfg, letter) for letter in cfg.pattern)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():  # leaves A_log, D, dt_bias, norms and the convolution as they are
            if p.dim() == 2:
                deep = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(cfg.pattern)) if deep else 0.02)
        if cfg.grid:
            nn.init.zeros_(self.film.weight)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    def films(self, tokens: Tensor, documents: Documents | None) -> list[Film | None]:
        """What the task that is named first in each row of tokens (B, T), or each document, does to every block."""
        if not self.config.grid:
            return [None] * len(self.blocks)
        if documents is None:
            tasks, vectors = torch.arange(len(tokens), device=tokens.device)[:, None], self.embed(tokens[:, 0])
        else:
            index = torch.arange(tokens.shape[1], device=tokens.device)
            first = torch.where(tokens >= self.config.document_token, index, 0).cummax(1).values
            tasks, vectors = (tokens.gather(1, first) - UNKNOWN_TASK).clamp(min=0), self.embed.weight[UNKNOWN_TASK:]
        return [Film(table, tasks) for table in self.film(vectors).chunk(len(self.blocks), dim=1)]

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, D) after the last norm; with a stepping cache, the tokens appended last (B, 1).

        Prompts, which come with a cache, are one document each.
        """
        stepping, documents = cache is not None and cache.stepping, None
        if cache is None and self.config.document_token >= 0:
            opens = (tokens >= self.config.document_token).cumsum(1)
            documents = Documents(opens - opens[:, :1])
        index = cache.index[:, None] if stepping else torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embed(tokens)
        if self.config.grid:
            if stepping:
                layout = cache.layout.advance(tokens[:, 0], cache.index)
            else:
                layout = GridLayout.of(tokens, documents and documents.ids)
            if cache is not None:
                cache.layout = layout if stepping else layout.at(cache.lengths - 1)
            near = F.one_hot(layout.neighbourhood(cache.tokens if stepping else tokens), 11).flatten(2).to(x.dtype)
            col, row, grid = (f.clamp(0, 31) for f in layout[:3])
            x = x + self.embed_col(col) + self.embed_row(row) + self.embed_role(layout.output) + self.embed_near(near)
            positions = torch.stack([col, row, grid], dim=-1)
        else:
            positions = index[..., None]
        rope = rotary_angles(positions, self.config.d_model // self.config.n_head, self.config.rope_theta)
        films = cache.films if stepping else self.films(tokens, documents)
        if cache is not None:
            cache.films = films
        for block, film in zip(self.blocks, films, strict=True):
            if self.remat and self.training:
                x = checkpoint(block, x, rope, None, documents, film, use_reentrant=False)
            else:
                x = block(x, rope, cache, documents, film)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) and no loss; or, given targets (B, T), the mean cross-entropy in nats over those that are
        not IGNORE_INDEX, and no logits, which never exist as a whole."""
        hidden = self.hidden(tokens)
        if targets is None:
            return self.head(hidden), None
        return None, CrossEntropy.apply(hidden.flatten(0, 1), self.head.weight, targets.flatten())

    @torch.no_grad()
    def stream(self, tokens: Tensor, lengths: Tensor | None = None, max_new_tokens: int = 128, stop: int = -1,
               choose: Any = None):
        """Continue prompts (B, T), padded on the right to `lengths` (B,), one token at a time from carried states.

        `choose` makes tokens (R,) of log-probabilities (R, V); without it the likeliest is taken. Yields, token by
        token, the rows that have not said `stop` before (R,), what they say now (R,) and its log-probability (R,).
        """
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        cache, rows = Cache(tokens, lengths, max_new_tokens), torch.arange(len(tokens), device=tokens.device)
        hidden, done = self.hidden(tokens, cache)[rows, lengths - 1], torch.zeros_like(rows, dtype=torch.bool)
        for i in range(max_new_tokens):
            logp = self.head(hidden).float().log_softmax(-1)  # (R, V)
            token = choose(logp) if choose else logp.argmax(-1)
            yield rows[~done], token[~done], logp.gather(1, token[:, None])[:, 0][~done]
            done |= token == stop
            going = len(done) - int(done.sum()) if stop >= 0 else len(done)
            if not going or i + 1 == max_new_tokens:
                break
            if 2 * going <= len(done):  # half of the rows are idle: go on without them
                cache.keep(~done)
                rows, token, done = rows[~done], token[~done], done[~done]
            cache.append(token)
            hidden = self.hidden(token[:, None], cache)[:, 0]

    def generate(self, tokens: Tensor, lengths: Tensor | None = None, max_new_tokens: int = 128, stop: int = -1,
                 choose: Any = None) -> tuple[Tensor, Tensor]:
        """All that `stream` yields: the new tokens (B, <= max_new_tokens), where a row that has said `stop` repeats
        it, and the summed log-probability of each row's tokens (B,)."""
        new, total = tokens.new_full((len(tokens), max_new_tokens), stop), tokens.new_zeros(len(tokens)).float()
        count = 0
        for rows, token, logp in self.stream(tokens, lengths, max_new_tokens, stop, choose):
            new[rows, count] = token
            total[rows] += logp
            count += 1
        return new[:, :count], total


# == GRIDS ============================================================================================================

Grid = np.ndarray  # (height, width) uint8, colours 0 to 9, at most 30 x 30
Pair = tuple[Grid, Grid]  # input and output


def encode_grid(grid: Grid) -> np.ndarray:
    """Cells row by row, ROW after each: (height x (width + 1),) int64."""
    cells = np.full((grid.shape[0], grid.shape[1] + 1), ROW, dtype=np.int64)
    cells[:, :-1] = grid
    return cells.ravel()


def decode_grid(tokens: Any) -> Grid | None:
    """The grid that an answer spells, up to its END; None where it is no grid of 1 to 30 rows and columns."""
    tokens = [int(t) for t in tokens]
    if END not in tokens:
        return None
    rows: list[list[int]] = [[]]
    for t in tokens[: tokens.index(END)]:
        if t == ROW:
            rows.append([])
        elif t < 10:
            rows[-1].append(t)
        else:
            return None
    if rows.pop() or not 1 <= len(rows) <= 30 or not 1 <= len(rows[0]) <= 30 or len({len(r) for r in rows}) > 1:
        return None
    return np.array(rows, dtype=np.uint8)


def encode_task(demonstrations: list[Pair], test_input: Grid, task_token: int = UNKNOWN_TASK) -> np.ndarray:
    """The prompt X: the task's token, IN input OUT output END for every demonstration, IN test-input OUT. int64."""
    parts: list[Any] = [[task_token]]
    for grid_in, grid_out in demonstrations:
        parts += [[IN], encode_grid(grid_in), [OUT], encode_answer(grid_out)]
    return np.concatenate([*parts, [IN], encode_grid(test_input), [OUT]])


def encode_answer(grid: Grid) -> np.ndarray:
    """The answer Y: the cells with their ROW tokens, then END. int64."""
    return np.append(encode_grid(grid), END)


def pair_length(pair: Pair, turned: int = 0) -> int:
    """Tokens of one pair with its marks; `turned` 1 by a quarter turn, which makes columns of its rows."""
    return 3 + sum(g.size + g.shape[turned] for g in pair)


def apply_symmetry(grid: Grid, symmetry: int) -> Grid:
    """One of the 8 symmetries of the square: 0-3 quarter turns, 4-7 the same, then mirrored left to right."""
    grid = np.rot90(grid, symmetry % 4)
    return np.fliplr(grid) if symmetry >= 4 else grid


def inverse_symmetry(symmetry: int) -> int:
    """The symmetry that undoes `symmetry`: the opposite turn; a mirrored one undoes itself."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def random_colours(rng: np.random.Generator) -> np.ndarray:
    """A permutation of the ten colours that keeps black (0), as a table (10,): `colours[grid]` applies it."""
    return np.append(0, 1 + rng.permutation(9)).astype(np.uint8)


def inverse_colours(colours: np.ndarray) -> np.ndarray:
    """The table that undoes `colours`."""
    return np.argsort(colours).astype(np.uint8)


def canonical_hash(pair: Pair) -> str:
    """A name for a pair that is the same for all its symmetries and colourings (16 hexadecimal digits)."""
    forms = []
    for symmetry in range(8):
        grids = [apply_symmetry(g, symmetry) for g in pair]
        cells = np.concatenate([g.ravel() for g in grids])
        values, first, inverse = np.unique(cells, return_index=True, return_inverse=True)
        rank = np.empty(len(values), np.uint8)
        rank[np.argsort(first)] = np.arange(len(values))  # colours numbered in order of appearance
        forms.append(bytes(sum((g.shape for g in grids), ())) + rank[inverse].tobytes())
    return hashlib.sha256(min(forms)).hexdigest()[:16]


# == DATA =============================================================================================================

SHARE_EVALUATION_PAIRS = ("40853293", "caa06a1f")  # official ARC-1 training tasks that repeat pairs of evaluation tasks
MOST_BAD = 5  # steps in a row without finite numbers that end a run
TASK_DROPOUT = 0.3  # share of training sequences that do not say which task they belong to


class DataError(Exception):
    """A file that cannot be used: the message names it, says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """The first line of an error, for a message of ours; its kind where it says nothing."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def from_here(path: Path) -> Path:
    """A path as one types it: from the current folder, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_ordinary(path: Path) -> None:
    """OSError where something other than a file has this name, such as a pipe that nobody may ever write to."""
    if path.exists() and not path.is_file():
        raise OSError("not an ordinary file")


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text; OSError where it is no ordinary file."""
    check_ordinary(path)
    return path.read_text(encoding="utf-8", errors=errors)


class Task(NamedTuple):
    """A task's name and its pairs; of a question, the last pair's output is None and its answer kept elsewhere."""

    name: str
    pairs: list[tuple[Grid, Grid | None]]

    def largest(self) -> int:
        """The longest side of any of its grids."""
        return max(side for pair in self.pairs for g in pair if g is not None for side in g.shape)


def origin(name: str) -> str:
    """The task that a generated one stands for: arc_data/prepare.py names those `<task>-r000`, `<task>-r001`, ..."""
    return re.sub(r"-r\d{3,}$", "", name)


def read_grid(value: Any, where: str) -> Grid:
    """A grid out of parsed JSON, or DataError."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise DataError(f"{where} is not a list of rows")
    if not 1 <= len(value) <= 30 or not 1 <= len(value[0]) <= 30:
        raise DataError(f"{where} has {len(value)} rows of {len(value[0]) if value else 0}; sides must be 1 to 30")
    if any(len(row) != len(value[0]) for row in value):
        raise DataError(f"{where} is ragged: its rows differ in length")
    for cell in (c for row in value for c in row):
        if type(cell) is not int or not 0 <= cell <= 9:
            raise DataError(f"{where} has a cell {str(cell)[:20]!r}; colours are the integers 0 to 9")
    return np.array(value, dtype=np.uint8)


def read_task(path: Path) -> dict[str, list[tuple[Grid, Grid | None]]]:
    """One task file in the official layout: {"train": pairs, "test": pairs}; a test output may be missing (None)."""
    path = Path(path)
    try:
        path.stem.encode()  # a name that is not UTF-8 could not be written to config.json
        task = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({reason(error)})") from None
    pairs: dict[str, list] = {}
    for part in ("train", "test"):
        listed = task.get(part) if isinstance(task, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(p, dict) for p in listed):
            raise DataError(f'{path}: "{part}" must be a list of at least one {{"input": …, "output": …}}')
        pairs[part] = []
        for i, pair in enumerate(listed):
            where = f"{path}: {part} {i}"
            hidden = part == "test" and pair.get("output") is None
            output = None if hidden else read_grid(pair.get("output"), f"{where} output")
            pairs[part].append((read_grid(pair.get("input"), f"{where} input"), output))
    return pairs


def read_split(folder: Path, split: str) -> dict[str, dict]:
    """All tasks of one split, by name, in the order of their names."""
    files = sorted((folder / split).glob("[!.]*.json")) if (folder / split).is_dir() else []
    if not files:
        raise DataError(f"{folder / split}: no task files (*.json) there; --data-dir wants a folder with training/ and "
                        "evaluation/, as `python arc_data/prepare.py` writes it")
    return {f.stem: read_task(f) for f in files}


@dataclass
class ArcData:
    """What a run may learn from, and what it is asked while it trains. Answers go to the scorer and nowhere else."""

    tasks: list[Task]  # every output is supervised
    questions: list[Task]  # held-out training tasks, one a test input
    answers: list[Grid]
    left_out: int  # tasks too large for --max-grid


def load_arc(folder: Path, holdout: int, max_grid: int, demonstrations: str) -> ArcData:
    """Read tasks, hold some training tasks out (by a hash of their names), and drop evaluation answers on sight.

    demonstrations is "training", or "both" to learn from the demonstrations of held-out and evaluation tasks too.
    """
    training = read_split(folder, "training")
    training = {name: task for name, task in training.items() if name not in SHARE_EVALUATION_PAIRS}
    found = len(training)
    training = {name: t for name, t in training.items() if Task(name, t["train"] + t["test"]).largest() <= max_grid}
    real = [name for name in training if origin(name) == name]
    by_hash = sorted(real, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(by_hash[: min(holdout, len(by_hash) // 4)])
    tasks = [Task(name, [p for p in t["train"] + t["test"] if p[1] is not None])
             for name, t in training.items() if origin(name) not in held]
    questions, answers = [], []
    for name in sorted(held):
        for query, answer in training[name]["test"]:
            if answer is not None:
                questions.append(Task(name, [*training[name]["train"], (query, None)]))
                answers.append(answer)
    if demonstrations == "both":
        tasks += [Task(name, training[name]["train"]) for name in held]
        evaluation = [Task(name, t["train"]) for name, t in read_split(folder, "evaluation").items()]
        found += len(evaluation)
        tasks += [task for task in evaluation if task.largest() <= max_grid]
    tasks.sort(key=lambda task: task.name)
    if not tasks:
        raise DataError(f"{folder}: no task has grids of at most {max_grid} x {max_grid}; raise --max-grid")
    trained = len({t.name for t in tasks} | {name for name in training if origin(name) in held})
    return ArcData(tasks, questions, answers, found - trained)


def digest(parts: Any) -> str:
    """Sixteen hexadecimal digits for some bytes."""
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


class Loader:
    """Batches in an order that is a function of (seed, epoch), over effective batches.

    An effective batch is batch_size x grad_accum_steps x world_size rows; ranks and micro-batches are slices of it,
    so that neither their number nor their size changes what an optimizer step sees. `iter()` goes on where the loader
    stands and ends with the epoch; the next `iter()` starts the next one. A subclass has `batches()`, the effective
    batches of the epoch as sequences of row numbers, `collate(rows)`, which makes (x, y) of some, both (B, T) int64,
    and `fingerprint`, a name for its data: other data, other name.
    """

    fingerprint = ""

    def __init__(self, batch_size: int, seed: int = 0, grad_accum_steps: int = 1, rank: int = 0, world_size: int = 1):
        self.batch_size, self.seed, self.accum = batch_size, seed, grad_accum_steps
        self.rank, self.world = rank, world_size
        self.effective = batch_size * grad_accum_steps * world_size
        self.epoch = self.position = 0  # position counts this rank's micro-batches
        self.tokens = self.padding = 0  # positions yielded so far, and how many of them were padding
        self.dropped = 0  # demonstrations left out

    def __iter__(self):
        batches = self.batches()
        while self.position < len(batches) * self.accum:
            step, micro = divmod(self.position, self.accum)
            first = (micro * self.world + self.rank) * self.batch_size
            rows = batches[step][first : first + self.batch_size]
            self.position += 1
            yield self.collate(rows)
        self.epoch, self.position = self.epoch + 1, 0

    def cut(self, rows: Any) -> list:
        """Rows in effective batches, the last one perhaps shorter."""
        return [rows[i : i + self.effective] for i in range(0, len(rows), self.effective)]

    def rng(self, key: int = 0) -> np.random.Generator:
        """Random numbers that depend on seed, epoch and key alone; key 0 is for the order, 1 + row for a row."""
        return np.random.default_rng([self.seed, self.epoch, key])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in rows, so that a run may go on with another micro-batch or number of ranks."""
        rows = self.position * self.batch_size * self.world
        return {"epoch": self.epoch, "rows": rows, "effective": self.effective, "data": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; ValueError where the data or the effective batch are others."""
        if state["data"] != self.fingerprint:
            raise ValueError("the tasks or shards are not those it was started with")
        if state["effective"] != self.effective:
            raise ValueError(f"the run's effective batch is {state['effective']} sequences, not {self.effective}")
        self.epoch, self.position = state["epoch"], state["rows"] // (self.batch_size * self.world)


class ArcDataLoader(Loader):
    """ARC tasks as padded token sequences.

    Yields x, the flattened sequence, and y, the next token where it is supervised and IGNORE_INDEX elsewhere; rows are
    padded on the right, to the longest of the batch, with 0 in x and IGNORE_INDEX in y.

    Training: a sequence a task and epoch (those that do not fill a last effective batch wait for the next epoch), all
    its pairs in random order, every output supervised, under one of the 8 symmetries and one permutation of colours.
    Rows of similar length share a batch: windows of `window` effective batches are sorted by length, and the batches
    shuffled afterwards. Evaluation (train=False): tasks as they stand, in order, only the last output supervised.

    `packed`: a row holds as many sequences, one after another, as block_size does, and all rows are block_size long. A
    model whose `document_token` is UNKNOWN_TASK keeps them apart.

    What is longer than block_size loses whole demonstrations (`dropped` counts them), never part of a grid; a task
    of which not even one pair fits is left out (`too_long` names it).
    """

    window = 16

    def __init__(self, tasks: list[Task], batch_size: int, block_size: int, *, train: bool = True,
                 task_tokens: dict[str, int] | None = None, packed: bool = False, **order: int):
        super().__init__(batch_size, **order)
        self.block_size, self.train, self.task_tokens, self.packed = block_size, train, task_tokens or {}, packed
        turns = (0, 1) if train else (0,)
        must = [t.pairs if train else t.pairs[-1:] for t in tasks]  # one of these has to fit
        fits = [min(max(pair_length(p, turned) for turned in turns) for p in pairs) <= block_size for pairs in must]
        self.tasks = [t for t, fit in zip(tasks, fits, strict=True) if fit]
        self.too_long = [t.name for t, fit in zip(tasks, fits, strict=True) if not fit]
        self.fingerprint = digest(t.name.encode() + g.tobytes() for t in self.tasks for p in t.pairs for g in p)
        if not self.tasks:
            raise DataError(f"no task fits --block-size {block_size}; raise it, or lower --max-grid")

    def plan(self, row: int) -> tuple[list[int], int, np.ndarray, int, int]:
        """How a task is shown this epoch: pairs kept, symmetry, colours, task token, length of x."""
        task = self.tasks[row]
        pairs, symmetry, colours = list(range(len(task.pairs))), 0, np.arange(10, dtype=np.uint8)
        token = self.task_tokens.get(origin(task.name), UNKNOWN_TASK)
        if self.train:
            rng = self.rng(1 + row)
            pairs, symmetry, colours = rng.permutation(len(pairs)).tolist(), int(rng.integers(8)), random_colours(rng)
            token = UNKNOWN_TASK if rng.random() < TASK_DROPOUT else token
        lengths = [pair_length(task.pairs[i], turned=symmetry % 2) for i in pairs]
        if self.train and lengths[-1] > self.block_size:  # answer with a pair that fits; the shortest does
            best = int(np.argmin(lengths))
            pairs.append(pairs.pop(best)), lengths.append(lengths.pop(best))
        keep = len(pairs) - 1
        total = lengths[keep]
        while keep > 0 and total + lengths[keep - 1] <= self.block_size:
            keep -= 1
            total += lengths[keep]
        return pairs[keep:], symmetry, colours, token, total

    def pack(self, tasks: list[int]) -> list[tuple[int, ...]]:
        """Rows, each the tasks in it: every task goes into the first of the rows begun last that has room for it."""
        rows: list[tuple[list[int], int]] = []  # tasks, tokens
        for task in tasks:
            length = self.plans[task][-1]
            near = range(max(0, len(rows) - 64), len(rows))
            i = next((i for i in near if rows[i][1] + length <= self.block_size * self.packed), len(rows))
            row, used = rows[i] if i < len(rows) else ([], 0)
            rows[i : i + 1] = [([*row, task], used + length)]
        return [tuple(row) for row, _ in rows]

    def batches(self) -> list[list[tuple[int, ...]]]:
        """Rows of the effective batches of this epoch, each the tasks in it, and the plans of the tasks."""
        self.plans = [self.plan(task) for task in range(len(self.tasks))]
        if not self.train:
            return self.cut(self.pack(range(len(self.tasks))))
        rng = self.rng()
        rows = self.pack(rng.permutation(len(self.tasks)).tolist())
        rows *= math.ceil(self.effective / len(rows))  # few tasks still fill one effective batch
        rows = rows[: len(rows) // self.effective * self.effective]
        found = []
        for i in range(0, len(rows), self.window * self.effective):
            near = rows[i : i + self.window * self.effective]
            found += self.cut(near if self.packed else sorted(near, key=lambda row: self.plans[row[0]][-1]))
        return [found[i] for i in rng.permutation(len(found))]

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y of one task as planned, unpadded."""
        pairs, symmetry, colours, token, _ = self.plans[row]
        tokens: list[Any] = [[token]]
        supervised: list[Any] = [[False]]
        for i in pairs:
            grid_in, grid_out = (colours[apply_symmetry(g, symmetry)] for g in self.tasks[row].pairs[i])
            question, answer = encode_grid(grid_in), encode_answer(grid_out)
            tokens += [[IN], question, [OUT], answer]
            supervised += [np.zeros(len(question) + 2, bool), np.full(len(answer), self.train or i == pairs[-1])]
        s, m = np.concatenate(tokens), np.concatenate(supervised)
        return s[:-1], np.where(m[1:], s[1:], IGNORE_INDEX)

    def collate(self, rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        sequences = [[self.sequence(task) for task in row] for row in rows]
        used = [sum(len(s) for s, _ in row) for row in sequences]
        x = np.zeros((len(rows), self.block_size if self.packed else max(used)), np.int64)
        y = np.full(x.shape, IGNORE_INDEX, np.int64)
        for i, row in enumerate(sequences):
            x[i, : used[i]], y[i, : used[i]] = (np.concatenate(part) for part in zip(*row, strict=True))
        self.tokens += x.size
        self.padding += x.size - sum(used)
        self.dropped += sum(len(self.tasks[task].pairs) - len(self.plans[task][0]) for row in rows for task in row)
        return torch.from_numpy(x), torch.from_numpy(y)


def read_shard(path: Path) -> np.ndarray:
    """A memory map (tokens,) uint16 of one shard: `.npy`, or `.bin` behind a header of 256 int32 (data/README.md)."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError(f"holds {tokens.dtype} of {tokens.ndim} dimensions, not one row of uint16")
            return tokens
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            raise ValueError("does not begin with the header 20240520, 1")
        if path.stat().st_size != 1024 + 2 * int(header[2]):
            raise ValueError(f"has {path.stat().st_size:,} bytes where its header says {1024 + 2 * int(header[2]):,}")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)
    except Exception as error:  # numpy raises many kinds for damaged files
        raise DataError(f"{path}: not a whole token shard ({reason(error)}); make or fetch it again") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """What data/prepare.py wrote about its shards in meta.json; empty where shards came without. DataError if damaged.

    Checked here is what is cheap: that every shard named is there with as many bytes as it should have.
    """
    path = folder / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(read_text(path))
        sizes = {folder / shard["name"]: int(shard["bytes"]) for shard in meta["shards"]}
        if not isinstance(meta["tokenizer"], str) or not 0 < meta["end_of_text"] < meta["vocab_size"] <= 65536:
            raise ValueError(f"a vocabulary of {meta['vocab_size']} with end of text {meta['end_of_text']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: does not describe shards ({reason(error)}); make them again with data/prepare.py, "
                        "or remove it") from None
    for file, size in sizes.items():
        if not file.is_file() or file.stat().st_size != size:
            raise DataError(f"{file}: missing, or not the {size:,} bytes that meta.json names; data/prepare.py, "
                            "started again, mends it")
    return meta


class FineWebLoader(Loader):
    """Windows of block_size + 1 tokens out of shards: x (B, T) the first block_size, y (B, T) the last.

    Shards are memory-mapped uint16. Training goes through the shards in random order and through the windows of each
    in random order; validation takes the windows as they stand. Shards whose name has "val" are for validation.
    """

    def __init__(self, folder: Path, split: str, batch_size: int, block_size: int, vocab_size: int = 65536,
                 **order: int):
        super().__init__(batch_size, **order)
        files = sorted(f for f in Path(folder).glob("*") if f.suffix in (".npy", ".bin"))
        files = [f for f in files if ("val" in f.name) == (split == "val")]
        if not files:
            kind, having = ("validation", "with") if split == "val" else ("training", "without")
            raise DataError(f"{folder}: no {kind} shards (.npy or .bin files {having} \"val\" in their names) there; "
                            "data/README.md says how to make them")
        self.files, self.shards = files, [read_shard(f) for f in files]
        self.train, self.block_size, self.vocab_size = split != "val", block_size, vocab_size
        samples = [s[:: max(1, len(s) // 1000)].tobytes() for s in self.shards]
        self.fingerprint = digest(f"{f.name} {len(s)}".encode() + x
                                  for f, s, x in zip(files, self.shards, samples, strict=True))
        self.windows = [max(0, (len(s) - 1) // block_size) for s in self.shards]
        if sum(self.windows) < (self.effective if self.train else 1):
            raise DataError(f"{folder}: {sum(map(len, self.shards)):,} {split} tokens are fewer than one batch of "
                            f"{self.effective} x {block_size}; lower --batch-size or --block-size")

    def batches(self) -> np.ndarray:
        first = np.concatenate([[0], np.cumsum(self.windows)])
        if not self.train:
            return self.cut(np.arange(first[-1]))
        rng = self.rng()
        order = np.concatenate([first[s] + rng.permutation(self.windows[s]) for s in rng.permutation(len(self.shards))])
        return order[: len(order) // self.effective * self.effective].reshape(-1, self.effective)

    def collate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        ends = np.cumsum(self.windows)
        out = np.empty((len(rows), self.block_size + 1), np.int64)
        for i, row in enumerate(rows):
            shard = int(np.searchsorted(ends, row, side="right"))
            start = (int(row) - (int(ends[shard]) - self.windows[shard])) * self.block_size
            out[i] = self.shards[shard][start : start + self.block_size + 1]
            if out[i].max() >= self.vocab_size:
                raise DataError(f"{self.files[shard]}: token {out[i].max()} in a vocabulary of {self.vocab_size}")
        self.tokens += out[:, 1:].size
        out = torch.from_numpy(out)
        return out[:, :-1], out[:, 1:]


# == CONFIG ===========================================================================================================


@dataclass
class TrainConfig:
    """Everything about a run that is not the model. 0 means "no limit" or "never" where the help says so."""

    dataset: str = option("arc", "what to train on", "arc", "fineweb")
    data_dir: str = option("", "arc: a folder with training/ and evaluation/; fineweb: a folder of token shards "
                           "(default: arc_data/arcagi, data)")
    preset: str = option("", "sizes and budget to start from: nano, small, base (arc) or nano, gpt2 (fineweb) "
                         "(default: small or gpt2 on CUDA, else nano)")
    batch_size: int = option(16, "sequences per micro-batch and device; the effective batch is batch size x "
                             "accumulation x devices")
    grad_accum_steps: int = option(1, "micro-batches per optimizer step")
    max_steps: int = option(0, "optimizer steps to train for, instead of the preset's minutes; 0: no limit but "
                            "--max-minutes")
    max_minutes: float = option(60.0, "wall-clock budget in minutes, kept across a resume; 0: no limit but --max-steps")
    max_lr: float = option(2e-3, "peak learning rate, for both optimizers")
    warmup_frac: float = option(0.02, "share of the run over which the learning rate rises from 0")
    decay_frac: float = option(0.4, "share of the run, at its end, over which the learning rate falls to 0")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and embeddings")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    optimizer: str = option("muon", "for the hidden matrices; everything else is AdamW's", "muon", "adamw")
    ema: float = option(0.0, "evaluate an average of the weights over this share of the steps so far, such as 0.05; "
                        "0: the weights themselves")
    holdout: int = option(40, "arc: training tasks held out to measure on, at most a quarter of them; 0: none")
    max_grid: int = option(30, "arc: keep tasks whose grids are at most this many cells high and wide")
    demonstrations: str = option("both", "arc: learn from training tasks only, or also from the demonstrations of "
                                 "held-out and evaluation tasks (never from their answers)", "training", "both")
    packed: bool = option(False, "arc: several tasks in a row of block_size tokens, which do not see each other, "
                          "instead of one padded task a row (small and base do)")
    reset_at_document: bool = option(False, "fineweb: no document sees the one before it")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "where to compute", "auto", "cpu", "cuda", "mps")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 on CUDA with capability >= 8.0, else float32",
                        "auto", "float32", "bfloat16")
    kernels: str = option("auto", "Mamba-2 scan: mamba-ssm's Triton kernels or PyTorch; auto: Triton on CUDA if it "
                          "loads", "auto", "triton", "torch")
    remat: bool = option(False, "save memory, for about a third more time: make activations again in the backward pass")
    compile: bool = option(False, "torch.compile everything but the Mamba-2 mixers")
    eval_every: int = option(100, "steps between evaluations; 0: only at the end")
    save_every: int = option(100, "steps between checkpoints; 0: none by steps")
    save_minutes: float = option(10.0, "minutes between checkpoints, whatever the steps; 0: none by minutes")
    save_failure: str = option("stop", "when a checkpoint cannot be written, as on a full disk: stop, or warn and go "
                               "on", "stop", "warn")
    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    out_dir: str = option("", "run folder (default: the first free of runs/arc, runs/arc-2, …)")

    def validate(self) -> list[str]:
        """Everything that is wrong with these settings, in the words of the flags."""
        found = []
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                found.append(f"{flag(f.name)} {value!r} must be one of {', '.join(choices)}")
            elif f.name in ("warmup_frac", "decay_frac", "ema"):
                if not 0 <= value <= 1:
                    found.append(f"{flag(f.name)} is {value}; it is a share, from 0 to 1")
            elif type(value) in (int, float):
                low = 1 if f.name in ("batch_size", "grad_accum_steps", "max_grid") else 0
                if not low <= value < 1e12:
                    found.append(f"{flag(f.name)} is {value}; it must be at least {low}")
        if not self.max_steps and not self.max_minutes:
            found.append("--max-steps and --max-minutes are both 0: the run would never end; give one of them")
        if self.preset and self.dataset in PRESETS and self.preset not in PRESETS[self.dataset]:
            found.append(f"--preset {self.preset!r} is none of {self.dataset}'s: {', '.join(PRESETS[self.dataset])}")
        return found


_ARC = dict(vocab_size=ARC_VOCAB, grid=True, tie_embeddings=False, block_size=4096)
_NANO = dict(d_model=128, n_head=4, d_state=32, headdim=32, d_ff=344, chunk_size=32, max_minutes=8.0, max_lr=5e-3,
             eval_every=200, save_every=200)
_LONG = dict(eval_every=500, save_every=500)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "arc": {
        "nano": _ARC | _NANO | dict(pattern="MAMA", block_size=1024, max_grid=10),
        "small": _ARC | _LONG | dict(packed=True, d_model=512, pattern="MAMAMAMA", n_head=8, d_ff=1344),
        "base": _ARC | _LONG | dict(packed=True, d_model=768, pattern="MAMAMAMAMA", n_head=12, d_ff=2048),
    },
    "fineweb": {"nano": _NANO | dict(pattern="MMAM", batch_size=4), "gpt2": _LONG | dict(max_lr=1e-3)},
}


class ConfigError(Exception):
    """Settings that cannot work: one line for each problem, all of them at once."""


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def make_config(given: dict[str, Any], has_gpu: bool) -> tuple[ModelConfig, TrainConfig]:
    """Defaults, then the preset's values, then the flags given; ConfigError with every problem of the result."""
    cfg = TrainConfig(dataset=given.get("dataset", "arc"))
    usual = {"arc": "small", "fineweb": "gpt2"}.get(cfg.dataset, "nano") if has_gpu else "nano"
    cfg.preset = given.get("preset", usual)
    model_cfg = ModelConfig()
    for values in (PRESETS.get(cfg.dataset, {}).get(cfg.preset, {}), given):
        for name, value in values.items():
            setattr(model_cfg if hasattr(model_cfg, name) else cfg, name, value)
    if given.get("max_steps") and "max_minutes" not in given:
        cfg.max_minutes = 0.0  # a step budget asked for is not cut short by the preset's minutes
    if found := model_cfg.validate() + cfg.validate():
        raise ConfigError("\n".join(found))
    return model_cfg, cfg


# == OPTIMIZER ========================================================================================================


def schedule(progress: float, warmup_frac: float, decay_frac: float) -> float:
    """Share of the peak learning rate at a progress from 0 to 1: linear warm-up, stable, linear decay to 0."""
    up = (progress + 1e-3) / (warmup_frac + 1e-3)
    down = (1 - progress) / max(decay_frac, 1e-9)
    return max(0.0, min(1.0, up, down))


class NorMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with a second moment per neuron (NorMuon, Li et al. 2025, arXiv:2510.05491), for matrices.

    The update is the nearest orthogonal matrix to the momentum, each row divided by its running root mean square,
    scaled to 0.2 root mean square so that AdamW's learning rates and weight decay fit (Liu et al. 2025). Iterates in
    bfloat16 on a GPU and float32 elsewhere; matrices of one shape go through together.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, beta2: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))

    @staticmethod
    def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
        """Newton-Schulz iteration on (K, n, m) matrices; singular values end near 1 (0.7 to 1.2)."""
        X = G.bfloat16() if G.is_cuda else G.float()
        X = X.mT if G.shape[-2] > G.shape[-1] else X
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            S = X @ X.mT
            X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
        return (X.mT if G.shape[-2] > G.shape[-1] else X).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (n, m), params in shapes.items():
                states = [self.state[p] for p in params]
                for s, p in zip(states, params, strict=True):
                    if not s:
                        s["momentum"], s["second"] = torch.zeros_like(p), p.new_zeros(n, 1)
                grads, momentum = [p.grad for p in params], [s["momentum"] for s in states]
                torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
                U = self.orthogonalize(torch.stack(torch._foreach_lerp(grads, momentum, group["momentum"])))  # Nesterov
                second = [s["second"] for s in states]
                torch._foreach_lerp_(second, list(U.square().mean(-1, keepdim=True)), 1 - group["beta2"])
                U /= torch.stack(second).sqrt() + 1e-8
                U *= 0.2 * math.sqrt(n * m) / U.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-8)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(U), alpha=-group["lr"])


class Optimizers:
    """NorMuon for hidden matrices, AdamW for the rest. Fused projections are split into the matrices they hold.

    Every number of every parameter is in exactly one group. A part of a matrix is a leaf of its own that shares the
    matrix's memory; `step` hands it its rows of the gradient.
    """

    def __init__(self, model: GPT, cfg: TrainConfig):
        self.parts: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        matrices, decay, plain = [], [], []
        for name, p in model.named_parameters():
            rows = self.rows(model, name, p) if cfg.optimizer == "muon" else []
            for where, to_muon in rows:
                part = p if where == slice(0, len(p)) else nn.Parameter(p.detach()[where])
                if part is not p:
                    self.parts.append((part, p, where))
                (matrices if to_muon else decay).append(part)
            if not rows:
                (decay if p.dim() == 2 else plain).append(p)
        groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=plain, weight_decay=0.0)]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=plain[0].device.type != "mps")
        ]
        if matrices:
            self.all.append(NorMuon(matrices, lr=cfg.max_lr, weight_decay=cfg.weight_decay))
        held = [p for o in self.all for g in o.param_groups for p in g["params"]]
        assert len({id(p) for p in held}) == len(held)
        assert sum(p.numel() for p in held) == sum(p.numel() for p in model.parameters())

    @staticmethod
    def rows(model: GPT, name: str, p: nn.Parameter) -> list[tuple[slice, bool]]:
        """Rows of a hidden matrix that belong together, and whether Muon takes them; empty for anything else."""
        if not name.startswith("blocks.") or p.dim() != 2:
            return []
        mixer = model.blocks[int(name.split(".")[1])].mixer
        if name.endswith("in_proj.weight"):
            bc = mixer.ngroups * mixer.d_state
            sizes = [mixer.d_inner, mixer.d_inner, bc, bc, mixer.nheads]  # z, x, B, C to Muon; dt to AdamW
        else:
            sizes = [len(p) // n for n in [3 if "qkv" in name else 2 if "up" in name else 1] for _ in range(n)]
        ends = np.cumsum(sizes).tolist()
        return [(slice(e - n, e), i < 4) for i, (n, e) in enumerate(zip(sizes, ends, strict=True))]

    def step(self, lr: float) -> None:
        """One step at this learning rate."""
        for part, p, where in self.parts:
            part.grad = p.grad[where]
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for part, _, _ in self.parts:
            part.grad = None

    def state_dict(self) -> list[dict]:
        """The state of both, in order."""
        return [o.state_dict() for o in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore `state_dict()`, but for rates and the like, which are this run's own."""
        for o, s in zip(self.all, states, strict=True):
            o.load_state_dict({"state": s["state"], "param_groups": o.state_dict()["param_groups"]})
            for p, values in o.state.items():
                for name, t in values.items():
                    shape = torch.Size() if name == "step" else p.shape
                    if not isinstance(t, Tensor) or t.dim() != len(shape) or t.shape[:1] != shape[:1]:
                        raise ValueError("the optimizer's state has other shapes than its parameters")


def make_ema(model: GPT, share: float) -> torch.optim.swa_utils.AveragedModel | None:
    """An exponential moving average of the weights over the last `share` of the steps so far, or None for 0."""
    if not share:
        return None

    def average(ema: list[Tensor], now: list[Tensor], n: Tensor) -> None:
        torch._foreach_lerp_(ema, now, 1 / (1 + share * int(n)))

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


# == CHECKPOINT =======================================================================================================


@contextlib.contextmanager
def replacing(path: Path, check: Any = None):
    """Write to a temporary name beside `path`; on leaving, flush to disk and rename, so that `path` is always whole.

    The old file stays until the new one has passed `check(temporary)`; the folder is flushed after the rename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON to a file that is never seen half-written."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def check_content(path: Path) -> None:
    """OSError unless a checkpoint's every record has the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"cut off or damaged: {reason(error)}") from None
    if bad:
        raise OSError(f"damaged at {bad}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Plain tensors and containers, so that `torch.load(weights_only=True)` reads them; DataError where that fails.

    The checkpoint before it stays in place until this one is on disk and has been read back.
    """
    try:
        with replacing(path, check_content) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch hides what its file raised
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        needs, free = sum(t.nbytes for t in tensors_of(state)) / 1e6, shutil.disk_usage(path.parent).free / 1e6
        raise DataError(f"{path}: cannot be written ({reason(cause)}); it needs {needs:,.1f} MB where {free:,.1f} MB "
                        "are free; the checkpoint before it is untouched") from None


def tensors_of(value: Any):
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The last complete checkpoint of a run, on the CPU; DataError where it is none of ours."""
    try:
        check_ordinary(path)
        check_content(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no checkpoint there; start the run again without --resume") from None
    except Exception as error:  # torch raises many kinds for damaged files
        raise DataError(f"{path}: not a readable checkpoint ({reason(error)})") from None
    missing = {"model", "optimizer", "step", "rng", "loader", "config"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise DataError(f"{path}: a checkpoint of another program: it lacks {', '.join(sorted(missing))}")
    return state


def load_config(folder: Path) -> tuple[ModelConfig, TrainConfig]:
    """The recorded settings of a run; DataError where config.json is missing or not ours."""
    path = folder / "config.json"
    try:
        config = json.loads(read_text(path))
        found = ModelConfig(**config["model"]), TrainConfig(**config["train"])
        for settings in found:
            for f in dataclasses.fields(settings):
                value, kind = getattr(settings, f.name), type(f.default)
                if type(value) is not kind and not (kind is float and type(value) is int):
                    raise TypeError(f"{f.name} is {str(value)[:40]!r}, not of type {kind.__name__}")
        if wrong := found[0].validate() + found[1].validate():
            raise ValueError(wrong[0])
        return found
    except FileNotFoundError:
        raise DataError(f"{path}: there is no run in this folder to resume") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not the settings of a run ({reason(error)})") from None


def load_model(folder: Path, model_cfg: ModelConfig) -> tuple[GPT, dict[str, Any]]:
    """The model of a run on the CPU, ready to answer, with the average of its weights where it has one; its checkpoint.

    DataError where config.json and checkpoint.pt do not fit each other, ConfigError where the model is too large.
    """
    state = load_checkpoint(folder / "checkpoint.pt")
    weights = state["model"]
    try:
        if state.get("ema"):
            weights = {name.removeprefix("module."): v for name, v in state["ema"].items() if name != "n_averaged"}
        model = build_model(model_cfg, folder)
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise DataError(f"{folder / 'checkpoint.pt'}: does not fit config.json ({reason(error)})") from None
    return model.eval(), state


# == RUNTIME ==========================================================================================================


class Kernels(NamedTuple):
    """What computes Mamba-2: the scan, upstream's fused kernel or None, and a line that says which and why."""

    scan: Any
    fused: Any
    text: str

    def use(self, model: nn.Module) -> None:
        """Have every Mamba-2 mixer of a model compute with these."""
        for module in model.modules():
            if isinstance(module, Mamba2):
                module.scan, module.fused = self.scan, self.fused


def load_triton() -> Kernels:
    """Upstream's Triton kernels, without upstream's compiled extensions; the fused one if causal-conv1d is installed.

    `import mamba_ssm` would load those extensions, so an empty module with the package's path stands in for it. Raises
    whatever keeps the kernels from loading.
    """
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ImportError("mamba-ssm is not installed (README: Installing mamba-ssm)")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = package
    from mamba_ssm.ops.triton import ssd_combined as upstream

    def scan(*args, seq_idx=None, **kwargs):
        seq_idx = seq_idx if seq_idx is None else seq_idx.int()
        return upstream.mamba_chunk_scan_combined(*args, seq_idx=seq_idx, **kwargs)

    if getattr(upstream, "causal_conv1d_fwd_function", None) is None:
        return Kernels(scan, None, "mamba-ssm Triton kernels")
    return Kernels(scan, upstream.mamba_split_conv1d_scan_combined, "mamba-ssm Triton kernels, fused (causal-conv1d)")


def choose_kernels(kernels: str, device: torch.device) -> Kernels:
    """What is to compute Mamba-2; ConfigError if `triton` is asked for and cannot be had."""
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return Kernels(ssd_scan, None, "PyTorch scan")
    try:
        if device.type != "cuda":
            raise RuntimeError(f"Triton kernels need --device cuda, not {device.type}")
        return load_triton()
    except Exception as error:  # a package built for another torch fails in many ways
        why = f"{type(error).__name__}: {reason(error)}"
        if kernels == "triton":
            raise ConfigError(f"--kernels triton: {why}") from None
        return Kernels(ssd_scan, None, f"PyTorch scan, slower than mamba-ssm's, which did not load: {why}")


@dataclass
class Runtime:
    """Where and with whom this process computes."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    rank: int = 0
    world: int = 1
    local: int = 0  # rank among the processes of this machine
    pieces: int = 1  # a micro-batch of the loader's is computed in so many, as memory has it

    @staticmethod
    def start(cfg: TrainConfig) -> Runtime:
        """Pick device, precision and kernels, and join the other processes of a `torchrun`."""
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in found if found[k]) if cfg.device == "auto" else cfg.device
        if not found[kind]:
            raise ConfigError(f"--device {kind}: PyTorch {torch.__version__} sees none; use --device cpu")
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        bf16 = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = getattr(torch, cfg.dtype) if cfg.dtype != "auto" else torch.bfloat16 if bf16 else torch.float32
        kernels = choose_kernels(cfg.kernels, device)
        if kind == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=2))
        return Runtime(device, dtype, kernels, rank, world, local)

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.main:
            print(text, flush=True)

    def autocast(self) -> Any:
        """Matrix products in `dtype`; a no-op in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes, so that they decide alike."""
        if self.world == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return shared.tolist()

    def total(self, value: int) -> int:
        """The sum over all processes."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(shared)
        return int(shared)

    def describe(self) -> str:
        """One line for the log: device, precision, kernels, versions."""
        cuda = self.device.type == "cuda"
        threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(self.device) if cuda else threads
        many = f"{self.world} x " if self.world > 1 else ""
        kind = f"{many}{self.device.type} ({name}), {str(self.dtype)[6:]}"
        return f"{kind}, {self.kernels.text}, torch {torch.__version__}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    said = any(text in str(error) for text in ("out of memory", "allocate memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and said


def free_memory() -> float:
    """Bytes of main memory that this process may still take; infinite where the system does not say (not Linux)."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's limit, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        found.append(limit - used + int(stat["inactive_file"]))  # files read before can be given back
    return min(found) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def build_model(model_cfg: ModelConfig, folder: Path) -> GPT:
    """The model of a run, with fresh weights; ConfigError where not even these fit in memory."""
    with torch.device("meta"):
        needed = sum(p.nbytes for p in GPT(model_cfg).parameters())
    if needed > (free := free_memory()):
        raise ConfigError(f"{folder}: a model of these sizes has {needed / 1e9:,.1f} GB of weights where "
                          f"{free / 1e9:,.1f} GB of memory are free; lower --d-model, --d-ff or the number of layers")
    return GPT(model_cfg)


class Lock:
    """Holds a run folder until this process ends, however it ends; ConfigError where another process holds it."""

    def __init__(self, folder: Path):
        self.held, nt = None, os.name == "nt"  # Windows has no locks on folders
        self.held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT) if nt else os.open(folder, os.O_RDONLY)
        try:
            if nt:
                import msvcrt

                msvcrt.locking(self.held, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise ConfigError(f"--out-dir {folder}: another process is training there; name another folder") from None
        except (OSError, ImportError):  # a file system or a Python without locks
            pass

    def close(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None

    __del__ = close


class StopFlag:
    """True once Ctrl-C or SIGTERM has come: the loop finishes its step and saves. A second Ctrl-C stops at once."""

    def __enter__(self) -> StopFlag:
        self.up = False
        self.before = {s: signal.signal(s, self.raise_flag) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def raise_flag(self, number: int, frame: Any) -> None:
        self.up = True
        if number == signal.SIGINT:  # SIGTERM may come twice: from a supervisor, and forwarded by torchrun
            signal.signal(number, self.before[number])

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class MetricsLog:
    """`metrics.jsonl`, one object a line; a resume first drops the lines after the checkpoint's step."""

    def __init__(self, path: Path, step: int, redo: bool, mirror: Any = None, held: Any = None, patient: bool = False):
        """Open for appending after `step`; `redo` also drops that step's evaluation, which will be made again.

        `mirror`, a Weights & Biases run, gets every line as well; `held`, the folder's lock, is let go on closing.
        """
        kept = []
        if path.exists():
            for line in read_text(path, errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a line torn by a crash
                    values = json.loads(line)
                    if values["step"] <= step and not (redo and values["step"] == step and "val_loss" in values):
                        kept.append(line + "\n")
        with replacing(path) as file:
            file.write("".join(kept).encode())
        self.file, self.mirror, self.held = open(path, "ab", buffering=0), mirror, held
        self.path, self.patient, self.waiting = path, patient, b""

    def write(self, **values: Any) -> None:
        """One line; numbers that are none, such as a loss that is not finite, become null. DataError on a full disk,
        unless the log is patient: then the line waits and goes out, whole, with a later one."""
        values = {k: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None
                  for k, v in values.items()}
        self.waiting += json.dumps(values).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.patient:
                raise DataError(f"{self.path}: cannot be written ({reason(error)})") from None
        if self.mirror:
            self.mirror.log(values)

    def sync(self) -> None:
        """Have every line on disk: what a checkpoint is about to stand on."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.held:
            self.held.close()
        if self.mirror:
            self.mirror.finish()


def open_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """The Weights & Biases run of this folder, the same one after a resume; ConfigError where it cannot be had."""
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "wandb.id").exists():
            (folder / "wandb.id").write_text(os.urandom(4).hex(), encoding="utf-8")
        run = wandb.init(project="hybrid", name=folder.name, id=(folder / "wandb.id").read_text(encoding="utf-8"),
                         resume="allow", dir=folder, config=config)
        run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back, as a resume may
        return run
    except Exception as error:  # not installed, not logged in, no network
        raise ConfigError(f"--wandb: {reason(error)}; pip install wandb && wandb login, or leave --wandb out") from None


def new_run_folder(cfg: TrainConfig) -> Path:
    """The run folder of a fresh run: the one named, if it holds no run yet, else the first free name under runs/."""
    if cfg.out_dir:
        folder = Path(cfg.out_dir)
        if (folder / "checkpoint.pt").exists():
            raise ConfigError(f"--out-dir {folder} holds a run; add --resume to continue it, or name another folder")
        return folder
    names = (f"runs/{cfg.dataset}" + (f"-{n}" if n > 1 else "") for n in range(1, 1_000_000))
    return next(Path(name) for name in names if not Path(name).exists())


# == EVALUATE =========================================================================================================


@torch.no_grad()
def validation_loss(model: GPT, loader: Loader, runtime: Runtime, batches: int = 1_000_000) -> float:
    """Mean cross-entropy in nats over the supervised tokens of the loader's first batches."""
    loader.epoch = loader.position = 0
    total, count = 0.0, 0
    for x, y in cut(list(itertools.islice(loader, batches)), runtime.pieces):
        with runtime.autocast():
            loss = model(x.to(runtime.device), y.to(runtime.device))[1]
        supervised = int((y != IGNORE_INDEX).sum())
        total, count = total + loss.item() * supervised, count + supervised
    return total / count


def unigram_loss(seen: np.ndarray, asked: np.ndarray) -> float:
    """Nats a token, on `asked`, of the model that knows no context but how often each token occurs in `seen`."""
    size = int(max(seen.max(), asked.max())) + 1
    p = (np.bincount(seen, minlength=size) + 1e-3) / (len(seen) + 1e-3 * size)
    return float(-np.log(p[asked]).mean())


def answer_prompts(model: GPT, prompts: list[np.ndarray], runtime: Runtime, max_new_tokens: int,
                   batch_tokens: int) -> list[tuple[Grid | None, float]]:
    """Greedy answers to prompts, None where the model writes no grid, and their summed log-probabilities.

    Prompts of similar length go together, as many as fit `batch_tokens` with what may be written behind them.
    """
    answers: list[tuple[Grid | None, float]] = [(None, -math.inf)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        n = 1
        while n < len(order) and (n + 1) * (len(prompts[order[n]]) + max_new_tokens) <= batch_tokens:
            n += 1
        chunk, order = order[:n], order[n:]
        lengths = torch.tensor([len(prompts[i]) for i in chunk])
        tokens = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(chunk):
            tokens[row, : len(prompts[i])] = torch.from_numpy(prompts[i])
        with runtime.autocast():
            new, logp = model.generate(tokens.to(runtime.device), lengths.to(runtime.device), max_new_tokens, END)
        for i, row, value in zip(chunk, new.tolist(), logp.tolist(), strict=True):
            answers[i] = decode_grid(row), value
    return answers


def make_prompt(task: Task, block_size: int, task_tokens: dict[str, int]) -> np.ndarray:
    """The prompt of a question, with as many of its last demonstrations as block_size holds, but at least one."""
    pairs, query = task.pairs[:-1], task.pairs[-1][0]
    while len(pairs) > 1 and len(encode_task(pairs, query)) > block_size:
        pairs = pairs[1:]
    return encode_task(pairs, query, task_tokens.get(task.name, UNKNOWN_TASK))


def score_answers(predicted: list[Grid | None], answers: list[Grid]) -> dict[str, float]:
    """Shares, 0 to 1: outputs exactly right, of the right shape, and right cells (none where the shape is wrong)."""
    shape = [p is not None and p.shape == a.shape for p, a in zip(predicted, answers, strict=True)]
    right = [int((p == a).sum()) if s else 0 for p, a, s in zip(predicted, answers, shape, strict=True)]
    return {
        "solve_rate": sum(r == a.size for r, a in zip(right, answers, strict=True)) / len(answers),
        "shape_accuracy": sum(shape) / len(answers),
        "cell_accuracy": sum(right) / sum(a.size for a in answers),
    }


# == TRAIN ============================================================================================================


@dataclass
class Data:
    """What a run reads: training and validation batches and, for ARC, the questions that the solve rate counts."""

    train: Loader
    val: Loader | None
    tasks: list[str] = field(default_factory=list)  # names, in the order of their tokens
    questions: list[Task] = field(default_factory=list)
    answers: list[Grid] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)  # canonical hashes of every pair that may be supervised
    unigram: float = math.nan  # validation loss of the best model without context
    bytes_per_token: float = math.nan  # text: of the validation shard
    tokenizer: Any = None  # text: tiktoken's, where its vocabulary can be had

    @property
    def task_tokens(self) -> dict[str, int]:
        """The token that names each training task."""
        return {name: UNKNOWN_TASK + 1 + i for i, name in enumerate(self.tasks)}


def open_arc(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime, order: dict[str, int]) -> Data:
    """ARC loaders; writes the official tasks to arc_data/ the first time. Sets the number of task tokens."""
    folder = Path(cfg.data_dir) if cfg.data_dir else HERE / "arc_data" / "arcagi"
    if not cfg.data_dir and not folder.is_dir() and runtime.local == 0:
        if subprocess.run([sys.executable, HERE / "arc_data" / "prepare.py", "--version", "arcagi"]).returncode:
            raise DataError(f"{folder}: the ARC tasks could not be written there; see the line above")
    runtime.agree(0)  # the others wait for the files
    arc = load_arc(folder, cfg.holdout, cfg.max_grid, cfg.demonstrations)
    data = Data(train=None, val=None)
    data.tasks = sorted({origin(t.name) for t in arc.tasks})
    model_cfg.n_tasks, model_cfg.document_token = len(data.tasks), UNKNOWN_TASK if cfg.packed else -1
    kind = dict(task_tokens=data.task_tokens, packed=cfg.packed)
    data.train = ArcDataLoader(arc.tasks, cfg.batch_size, model_cfg.block_size, **kind, **order)
    data.pairs = sorted({canonical_hash(p) for t in data.train.tasks for p in t.pairs})
    unseen = [(q, answer) for q, answer in zip(arc.questions, arc.answers, strict=True)
              if canonical_hash((q.pairs[-1][0], answer)) not in data.pairs]  # what was shown proves nothing
    data.questions, data.answers = [q for q, _ in unseen], [answer for _, answer in unseen]
    if unseen:
        answered = [Task(q.name, [*q.pairs[:-1], (q.pairs[-1][0], answer)]) for q, answer in unseen]
        data.val = ArcDataLoader(answered, cfg.batch_size, model_cfg.block_size, train=False, **kind)
        seen = np.concatenate([encode_answer(p[1]) for t in data.train.tasks for p in t.pairs])
        data.unigram = unigram_loss(seen, np.concatenate([encode_answer(a) for a in data.answers]))
    count = sum(len(t.pairs) for t in data.train.tasks)
    held = len({q.name for q in data.questions})
    runtime.say(f"data        {from_here(folder)}: {len(data.train.tasks)} tasks, {count} pairs to learn from; "
                f"{len(data.answers)} outputs of {held} held-out training tasks to measure on\n"
                f"            left out: {arc.left_out} tasks with grids over {cfg.max_grid} x "
                f"{cfg.max_grid}, {len(data.train.too_long)} longer than {model_cfg.block_size} tokens, "
                f"{len(arc.answers) - len(unseen)} held-out outputs that equal a pair to learn from")
    learns = {"both": "training tasks, and the demonstrations of held-out and evaluation tasks, whose answers only "
              "the scorer sees", "training": "training tasks only"}
    runtime.say(f"            --demonstrations {cfg.demonstrations}: learns from {learns[cfg.demonstrations]}")
    return data


def open_text(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime, order: dict[str, int]) -> Data:
    """FineWeb-Edu loaders."""
    folder = Path(cfg.data_dir) if cfg.data_dir else HERE / "data"
    meta = read_meta(folder)
    if meta:
        model_cfg.vocab_size = math.ceil(meta["vocab_size"] / 128) * 128
    model_cfg.document_token = meta.get("end_of_text", END_OF_TEXT) if cfg.reset_at_document else -1
    sizes = (cfg.batch_size, model_cfg.block_size, model_cfg.vocab_size)
    data = Data(train=FineWebLoader(folder, "train", *sizes, **order), val=FineWebLoader(folder, "val", *sizes))
    data.unigram = unigram_loss(*(max(loader.shards, key=len)[:2_000_000] for loader in (data.train, data.val)))
    counts = [f"{sum(map(len, loader.shards)):,}" for loader in (data.train, data.val)]
    runtime.say(f"data        {from_here(folder)}: {counts[0]} training and {counts[1]} validation tokens in "
                f"{len(data.train.files)} + {len(data.val.files)} shards")
    if meta:
        open_tokenizer(data, meta["tokenizer"], runtime)
    return data


def open_tokenizer(data: Data, name: str, runtime: Runtime) -> None:
    """Give `data` the tokenizer of its shards, and count the bytes of the validation shard; says what it lacks."""
    from data.prepare import PrepareError, load_tokenizer

    try:
        data.tokenizer = load_tokenizer(name)
    except (ImportError, PrepareError) as error:
        runtime.say(f"            no bits per byte and no samples: {error}")
        return
    lengths = [len(data.tokenizer.decode_single_token_bytes(i)) for i in range(data.tokenizer.n_vocab - 1)]
    seen = max(data.val.shards, key=len)[:2_000_000]
    lengths = np.array([*lengths, *[0] * (65536 - len(lengths))])  # end-of-text, the last token, spells nothing
    data.bytes_per_token = max(float(lengths[seen].mean()), 1e-9)


def open_data(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime) -> Data:
    """Loaders for the dataset; ranks and micro-batches are slices of one effective batch."""
    order = dict(seed=cfg.seed, grad_accum_steps=cfg.grad_accum_steps, rank=runtime.rank, world_size=runtime.world)
    return (open_arc if cfg.dataset == "arc" else open_text)(model_cfg, cfg, runtime, order)


def continue_text(model: GPT, data: Data, runtime: Runtime) -> str:
    """The first 24 tokens of the validation shard and 48 drawn behind them, the same draw every time."""
    prompt, generator = max(data.val.shards, key=len)[:24].astype(np.int64), torch.Generator().manual_seed(0)

    def choose(logp: Tensor) -> Tensor:
        logp = logp.nan_to_num(neginf=-1e9)  # of a model that went astray
        p = (logp[:, : data.tokenizer.n_vocab].cpu() / 0.8).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logp.device)

    with runtime.autocast():
        new, _ = model.generate(torch.from_numpy(prompt)[None].to(runtime.device), max_new_tokens=48, choose=choose)
    return " | ".join(data.tokenizer.decode(tokens) for tokens in (prompt.tolist(), new[0].tolist()))


def evaluate(model: GPT, data: Data, cfg: TrainConfig, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Validation loss; for ARC, solve rate, shape and cell accuracy, with the answers in `predictions.json`; for text,
    bits per byte and a sample, where the tokenizer is at hand."""
    if data.val is None:
        return {}
    model.eval()
    batches = 1_000_000 if data.questions else math.ceil(128 / cfg.batch_size)  # all questions, or 128 windows of text
    found: dict[str, Any] = {"val_loss": validation_loss(model, data.val, runtime, batches)}
    if data.tokenizer:
        found["bits_per_byte"] = found["val_loss"] / math.log(2) / data.bytes_per_token
        found["sample"] = continue_text(model, data, runtime)
    if data.questions:
        prompts = [make_prompt(task, model.config.block_size, data.task_tokens) for task in data.questions]
        longest = cfg.max_grid * (cfg.max_grid + 1) + 1
        batch_tokens = math.ceil(cfg.batch_size / runtime.pieces) * (model.config.block_size + longest)
        predicted = [grid for grid, _ in answer_prompts(model, prompts, runtime, longest, batch_tokens)]
        found |= score_answers(predicted, data.answers)
        shown = []
        for task, p, a in zip(data.questions, predicted, data.answers, strict=True):
            shown.append({
                "task": task.name, "test": sum(s["task"] == task.name for s in shown),
                "demonstrations": [{"input": i.tolist(), "output": o.tolist()} for i, o in task.pairs[:-1]],
                "input": task.pairs[-1][0].tolist(), "prediction": p if p is None else p.tolist(), "truth": a.tolist(),
            })
        write_json(folder / "predictions.json", shown)
    model.train()
    return found


def accumulate(network: nn.Module, batches: list[tuple[Tensor, Tensor]], runtime: Runtime) -> float:
    """Gradients of the mean loss over all supervised tokens of an effective batch, whatever its slices; that loss.

    Each micro-batch weighs as much as it has supervised tokens; processes exchange gradients on the last one only.
    """
    counts = [int((y != IGNORE_INDEX).sum()) for _, y in batches]
    total, mean = runtime.total(sum(counts)), torch.zeros((), device=runtime.device)
    for i, ((x, y), count) in enumerate(zip(batches, counts, strict=True)):
        wait = runtime.world > 1 and i + 1 < len(batches)
        with network.no_sync() if wait else contextlib.nullcontext():
            with runtime.autocast():
                loss = network(x.to(runtime.device, non_blocking=True), y.to(runtime.device, non_blocking=True))[1]
            (loss * (count * runtime.world / total)).backward()
        mean += loss.detach() * (count / total)
    if runtime.world > 1:
        torch.distributed.all_reduce(mean)
    return mean.item()


def cut(batches: list[tuple[Tensor, Tensor]], pieces: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches, each cut into so many of fewer rows."""
    return [part for x, y in batches for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True)]


def next_batches(loader: Loader, iterator: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """The micro-batches of one optimizer step, and the iterator to go on with: a new one where an epoch ended."""
    batches: list[tuple[Tensor, Tensor]] = []
    while len(batches) < loader.accum:
        try:
            batches.append(next(iterator))
        except StopIteration:
            iterator = iter(loader)
    return batches, iterator


class Ahead:
    """The micro-batches of the next optimizer step, made on a thread while the device computes this one.

    `state`, `tokens` and `padding` are the loader's after the step handed out last, which is what a checkpoint holds.
    """

    def __init__(self, loader: Loader, pinned: bool):
        self.loader, self.iterator, self.pinned = loader, iter(loader), pinned
        self.state, self.tokens, self.padding = loader.state_dict(), loader.tokens, loader.padding
        self.thread = ThreadPoolExecutor(1)
        self.coming = self.thread.submit(self.make)

    def make(self) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any], int, int]:
        batches, self.iterator = next_batches(self.loader, self.iterator)
        if self.pinned:
            batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
        return batches, self.loader.state_dict(), self.loader.tokens, self.loader.padding

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of one step; raises what the loader raised."""
        batches, self.state, self.tokens, self.padding = self.coming.result()
        self.coming = self.thread.submit(self.make)
        return batches


def within_memory(work: Any, model: GPT, runtime: Runtime, rows: int) -> Any:
    """work(), and again in smaller pieces for as long as memory runs out; `rows` are a micro-batch's sequences."""
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or runtime.world > 1:  # other processes would wait for this one
                raise
        model.zero_grad(set_to_none=True)
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        relieve(model, runtime, rows)


def relieve(model: GPT, runtime: Runtime, rows: int) -> None:
    """Need less memory: half as many sequences at a time, then activations made again; ConfigError if that was all."""
    if runtime.pieces < rows:
        runtime.pieces *= 2
    elif not model.remat:
        model.remat = True
    else:
        raise ConfigError(f"one sequence of {model.config.block_size} tokens does not fit in memory, even with "
                          "--remat; lower --block-size, --d-model or the number of layers")
    again = ", activations made again in the backward pass (--remat)" if model.remat else ""
    runtime.say(f"memory      too small for that: {math.ceil(rows / runtime.pieces)} sequences at a time{again}; the "
                "effective batch stays as it is")


def activation_bytes(model: GPT) -> int:
    """What the backward pass of one sequence of block_size tokens keeps, apart from the weights; float32, measured."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tokens = torch.zeros(1, model.config.block_size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(tokens, tokens)[1]
    del loss
    return sum(size for where, size in kept.items() if where not in weights)


def rehearse(model: GPT, optimizers: Optimizers, cfg: TrainConfig, runtime: Runtime) -> None:
    """One step on the largest batch there can be, before the clock starts.

    Triton's kernels are compiled and tuned here, before processes wait for each other, and micro-batches are cut until
    they fit in memory. A CPU's process would be killed instead of told: there one sequence is measured and the rest
    reckoned. Weights, optimizers and random numbers are left as they were; call it before a checkpoint is restored.
    """
    cuda, rows = runtime.device.type == "cuda", cfg.batch_size
    with torch.random.fork_rng([runtime.device] if cuda else []):
        if runtime.device.type == "cpu":
            weights = sum(p.nbytes for p in model.parameters())
            room = free_memory() - 4 * weights  # gradients, two numbers a weight of the optimizers', transients
            one = full = activation_bytes(model)
            while math.ceil(rows / runtime.pieces) * one * 1.5 > room:
                relieve(model, runtime, rows)
                if model.remat:  # and one block's activations and transients come again in the backward pass
                    one = activation_bytes(model) + 3 * full // len(model.blocks)
        else:
            if runtime.kernels.scan is not ssd_scan:
                runtime.say("            compiling the Triton kernels, which takes minutes the first time")
            tokens = torch.zeros(rows, model.config.block_size, dtype=torch.long)
            alone = dataclasses.replace(runtime, world=1)
            buckets = [torch.empty_like(p) for p in model.parameters()] if runtime.world > 1 else []

            def step() -> None:
                accumulate(model, cut([(tokens, tokens)], alone.pieces), alone)
                optimizers.step(0.0)

            within_memory(step, model, alone, rows)
            del buckets
            runtime.pieces = int(runtime.agree(alone.pieces)[0])
    for optimizer in optimizers.all:
        optimizer.state.clear()
    model.zero_grad(set_to_none=True)


def wrap(model: GPT, cfg: TrainConfig, runtime: Runtime) -> nn.Module:
    """The model as the loop calls it: compiled if asked for, and averaging gradients over processes."""
    network: nn.Module = model
    if cfg.compile:
        for module in model.modules():
            if isinstance(module, Mamba2):  # torch.compile over the Triton kernels has given NaN (pytorch #146129)
                module.forward = torch.compiler.disable(module.forward)
        network = torch.compile(model)
    if runtime.world > 1:
        network = nn.parallel.DistributedDataParallel(network)
    return network


def snapshot(model: GPT, optimizers: Optimizers, ema: Any, loader: dict[str, Any], step: int, minutes: float,
             skipped: int, cfg: TrainConfig) -> dict[str, Any]:
    """Everything a resume needs, as plain tensors and containers; no tensor in it depends on the clock."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizers.state_dict(),
        "ema": ema.state_dict() if ema else None,
        "step": step,
        "minutes": minutes,
        "skipped": skipped,
        "rng": {"torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None},
        "loader": loader,
        "config": {"model": dataclasses.asdict(model.config), "train": dataclasses.asdict(cfg)},
    }


def restore(state: dict, folder: Path, model: GPT, optimizers: Optimizers, ema: Any,
            loader: Loader) -> tuple[int, float, int]:
    """Undo `snapshot`: step, minutes spent and steps skipped. DataError where the checkpoint does not fit."""
    try:
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
        loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"]["torch"])
        if torch.cuda.is_initialized() and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        return int(state["step"]), float(state["minutes"]), int(state["skipped"])
    except Exception as error:  # what is whole, but not ours, fails in many ways
        raise DataError(f"{folder / 'checkpoint.pt'}: does not fit the run's settings and data "
                        f"({reason(error)})") from None


def spent(cfg: TrainConfig, step: int, minutes: float) -> float:
    """Share of the run that is over, 0 to 1 and beyond: of its steps or its minutes, whichever is further along."""
    return max(step / (cfg.max_steps or math.inf), minutes / (cfg.max_minutes or math.inf))


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is to be done now."""
    return bool(every) and step % every == 0


def open_run(folder: Path, model_cfg: ModelConfig, cfg: TrainConfig, data: Data, step: int, minutes: float,
             held: Lock | None) -> MetricsLog:
    """The run's folder with its settings, ready for metrics after `step`; ConfigError where it cannot be made.

    `held` is the lock of a run that is resumed; a fresh one takes it here.
    """
    config = {"model": dataclasses.asdict(model_cfg), "train": dataclasses.asdict(cfg), "tasks": data.tasks}
    mirror = open_wandb(folder, config) if cfg.wandb else None
    try:
        folder.mkdir(parents=True, exist_ok=bool(cfg.out_dir or cfg.wandb))  # a free name may be taken by now
        if not held:
            held = Lock(folder)
            new_run_folder(cfg)  # another run may have come and gone while this one began
        write_json(folder / "config.json", config)
        write_json(folder / "supervised_pairs.json", data.pairs)
        again = spent(cfg, step, minutes) >= 1 or due(step, cfg.eval_every)
        return MetricsLog(folder / "metrics.jsonl", step, again, mirror, held, cfg.save_failure == "warn")
    except OSError as error:
        raise ConfigError(f"--out-dir {folder}: cannot be written ({reason(error)})") from None


def finish(folder: Path, data: Data, found: dict[str, float], step: int, minutes: float, skipped: int) -> None:
    """The summary, which `grep` finds, and the pictures."""
    print("---")
    first = {"steps": step, "minutes": minutes} | ({"skipped": skipped} if skipped else {})
    for name, value in {**first, **found, "unigram_loss": data.unigram}.items():
        print(f"{name + ':':<18}{value:.4f}" if isinstance(value, float) else f"{name + ':':<18}{value!r}")
    if data.questions:
        solved = round(found["solve_rate"] * len(data.answers))
        print(f"{'solved:':<18}{solved} of {len(data.answers)} held-out test outputs, exactly, first try")
    if data.train.dropped:
        print(f"{'left out:':<18}{data.train.dropped} demonstrations, in sequences longer than --block-size")
    try:
        import plot

        for picture in plot.plot_run(folder):
            print(f"{'picture:':<18}{picture}")
    except Exception as error:  # a run that ended well does not end in a traceback for a picture
        print(f"{'picture:':<18}none ({reason(error)})")


def finite(model: GPT) -> bool:
    """Whether all weights are numbers."""
    return bool(torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all())


def save(folder: Path, state: dict[str, Any], cfg: TrainConfig, bar: Any) -> bool:
    """Write the checkpoint; where that fails, stop (DataError) or warn, as --save-failure has it. Whether it did."""
    try:
        save_checkpoint(folder / "checkpoint.pt", state)
        return True
    except DataError as error:
        if cfg.save_failure == "stop":
            raise
        bar.write(f"warning     step {state['step']}: {error}", file=sys.stderr)
        return False


def train(model_cfg: ModelConfig, cfg: TrainConfig, folder: Path, state: dict[str, Any] | None = None,
          held: Lock | None = None) -> None:
    """Train in `folder` until the budget is spent or a signal comes; `state` is the checkpoint to go on from, and
    `held` the lock of its folder."""
    from tqdm import tqdm

    runtime = Runtime.start(cfg)
    runtime.say(f"run         {folder}\ndevice      {runtime.describe()}")
    data = open_data(model_cfg, cfg, runtime)
    torch.manual_seed(cfg.seed)
    model = build_model(model_cfg, folder).to(runtime.device)
    model.remat = cfg.remat
    runtime.kernels.use(model)
    optimizers, ema = Optimizers(model, cfg), make_ema(model, cfg.ema)
    size = sum(p.numel() for p in model.parameters())
    runtime.say(f"model       {size:,} parameters, {model_cfg.pattern}; effective batch {data.train.effective} x up to "
                f"{model_cfg.block_size} tokens; {cfg.optimizer} at {cfg.max_lr:g}")
    rehearse(model, optimizers, cfg, runtime)
    step, before, skipped = restore(state, folder, model, optimizers, ema, data.train) if state else (0, 0.0, 0)
    saved, saved_at, state = step if state else None, before, None  # the last checkpoint's step and minutes
    if runtime.rank:  # dropout differs between processes
        torch.manual_seed(hash((cfg.seed, runtime.rank, step)))
    network, averaged = wrap(model, cfg, runtime), ema.module if ema else model
    log = open_run(folder, model_cfg, cfg, data, step, before, held) if runtime.main else None

    ahead, began, found, bad = Ahead(data.train, runtime.device.type == "cuda"), time.monotonic(), {}, 0
    bar = tqdm(total=1.0, disable=not runtime.main, miniters=0, mininterval=1 if sys.stderr.isatty() else 30,
               bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}")
    with bar, StopFlag() as stop, contextlib.closing(log) if log else contextlib.nullcontext():
        while True:
            minutes = before + (time.monotonic() - began) / 60
            minutes, stopping = runtime.agree(minutes, stop.up)
            progress = spent(cfg, step, minutes)
            done = progress >= 1
            evaluates = not stopping and (done or (step > 0 and due(step, cfg.eval_every)))

            # once in a while save: at the start, and before every evaluation, which may take long
            late = cfg.save_minutes and minutes - saved_at >= cfg.save_minutes
            if done or stopping or evaluates or late or due(step, cfg.save_every):
                if not finite(model):
                    raise DataError(f"step {step}: weights are not finite; {folder} holds step {saved}; start again "
                                    "with a lower --max-lr, or resume from there")
                if runtime.main and step != saved:
                    log.sync()
                    state = snapshot(model, optimizers, ema, ahead.state, step, minutes, skipped, cfg)
                    saved, state = step if save(folder, state, cfg, bar) else saved, None
                saved_at = minutes
            if stopping:
                break

            # once in a while evaluate: validation loss, and a few tasks answered
            if evaluates:
                if runtime.main:
                    found = evaluate(averaged, data, cfg, runtime, folder)
                    log.write(step=step, minutes=minutes, **found)
                    shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"\n{v!r}" for k, v in found.items())
                    bar.write(f"step {step:>6}  {minutes:5.1f} min  {shown}")
                runtime.agree(0)  # the others wait
            if done:
                break

            # do one step of the optimization, unless its numbers are none
            start, tokens, padding, batches = time.monotonic(), ahead.tokens, ahead.padding, ahead.take()
            loss = within_memory(lambda batches=batches: accumulate(network, cut(batches, runtime.pieces), runtime),
                                 model, runtime, cfg.batch_size)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
            lr = cfg.max_lr * schedule(progress, cfg.warmup_frac, cfg.decay_frac)
            bad = 0 if math.isfinite(loss + norm) else bad + 1
            if not bad:
                optimizers.step(lr)
                if ema:
                    ema.update_parameters(model)
            skipped += bad > 0
            model.zero_grad(set_to_none=True)
            step += 1
            if runtime.main:
                tokens, padding = ahead.tokens - tokens, ahead.padding - padding
                speed = (tokens - padding) * runtime.world / (time.monotonic() - start)
                log.write(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=speed,
                          padding=padding / tokens, epoch=ahead.state["epoch"], minutes=minutes,
                          **({"skipped": skipped} if bad else {}))
                bar.set_postfix_str(f"step {step}, loss {loss:.3f}, {speed:,.0f} tokens/s, "
                                    f"padding {ahead.padding / ahead.tokens:.0%}", refresh=False)
                bar.update(progress - bar.n)
            if bad == MOST_BAD:
                raise DataError(f"step {step}: loss or gradient were not finite {bad} times in a row; {folder} holds "
                                f"step {saved}; start again with a lower --max-lr, or resume from there")
    if runtime.main and stopping:
        again = f"python train.py --out-dir {shlex.quote(str(folder))} --resume"
        print(f"stopped at step {step} and saved step {saved}; to go on: {again}" if saved != step else
              f"stopped at step {step} and saved; to go on: {again}")
    elif runtime.main:
        finish(folder, data, found, step, minutes, skipped)
    if runtime.world > 1:  # leave together, and before the interpreter takes the gradient buckets apart
        runtime.agree(0)
        del network
        gc.collect()
        torch.distributed.destroy_process_group()


# == CLI ==============================================================================================================

RESUMABLE = ("max_steps", "max_minutes", "eval_every", "save_every", "save_minutes", "save_failure", "batch_size",
             "grad_accum_steps", "data_dir", "device", "dtype", "kernels", "remat", "compile", "wandb")  # may change


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see python {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Flags from the fields of TrainConfig and ModelConfig; only flags that were given end up in the namespace."""
    parser = Parser(
        prog="train.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Train a hybrid Mamba-2 / attention GPT from scratch on ARC tasks or FineWeb-Edu token shards.",
    )
    by_preset = {name for presets in PRESETS.values() for values in presets.values() for name in values}
    for cls, title in ((TrainConfig, "run"), (ModelConfig, "model (default: the preset's)")):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            if "help" not in f.metadata:
                continue
            text, choices, kind = f.metadata["help"].replace("%", "%%"), f.metadata["choices"], type(f.default)
            if "(default" not in text and cls is TrainConfig:
                text += f" (default: {f.default}{', or the preset’s' if f.name in by_preset else ''})"
            if kind is bool:
                group.add_argument(flag(f.name), action="store_true", help=text)
            else:
                metavar = f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
                group.add_argument(flag(f.name), type=kind, metavar=metavar, help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir, with its recorded "
                        "settings; --max-steps or --max-minutes given again extends it; data, device, precision and "
                        "intervals may change too")
    return parser


def resume_config(given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig, Path]:
    """A run's recorded settings, with what a resume may change replaced by the flags given."""
    if not given.get("out_dir"):
        raise ConfigError("--resume needs --out-dir, the folder of the run to go on with")
    folder = Path(given["out_dir"])
    model_cfg, cfg = load_config(folder)
    cfg.out_dir = str(folder)
    for one, other in (("max_steps", "max_minutes"), ("max_minutes", "max_steps")):
        if given.get(one) and other not in given:
            setattr(cfg, other, type(getattr(cfg, other))(0))  # the budget given is the one that counts
    found = []
    for name, value in given.items():
        recorded = getattr(cfg, name) if hasattr(cfg, name) else getattr(model_cfg, name)
        if name in RESUMABLE:
            setattr(cfg, name, value)
        elif name != "out_dir" and value != recorded:
            found.append(f"{flag(name)} {value} cannot change on a resume; the run was started with {recorded}")
    if found := found + model_cfg.validate() + cfg.validate():
        raise ConfigError("\n".join(found))
    return model_cfg, cfg, folder


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the run ended or was saved, 2 with one line for each problem."""
    given = vars(make_parser().parse_args(argv))
    try:
        if given.pop("resume", False):
            model_cfg, cfg, folder = resume_config(given)
            held = Lock(folder) if os.environ.get("RANK", "0") == "0" else None  # before the checkpoint can change
            train(model_cfg, cfg, folder, load_checkpoint(folder / "checkpoint.pt"), held)
        else:
            has_gpu = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
            model_cfg, cfg = make_config(given, has_gpu)
            train(model_cfg, cfg, new_run_folder(cfg))
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"train.py: {line}", file=sys.stderr)
        return 2
    except OSError as error:  # a full or vanished disk
        print(f"train.py: {error.filename or 'a file'}: {error.strerror or reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped at once; the last checkpoint is whole", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            print(f"train.py: out of memory ({reason(error)}); lower --block-size or --d-model", file=sys.stderr)
            return 2
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ("peer" in str(error) or "NCCL" in str(error)):
            print(f"train.py: another process of this run is gone ({reason(error)}); start again with --resume",
                  file=sys.stderr)
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
