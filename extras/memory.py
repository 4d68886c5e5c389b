"""A micro-batch in pieces: as many as fit the memory at hand, computed by all cores of a CPU at once.

`mean_loss`, `build_model` and `fit_to_memory` are the twins of train.py's.

Why threads of our own: an operator that PyTorch shares out to two threads waits for both, some 6,000 times in a step.
Beside one other busy process, which takes the processor from one of them again and again, that costs nine tenths of the
speed. Here every core computes pieces of the batch from end to end, with operators that use one thread, and waits for
the others once a step.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import train
from arc_data.layout import HINTS, OUT
from data.files import UserError, out_of_memory
from train import GPT, IGNORE_INDEX, PLAIN, ModelConfig, Optimizers, Runtime, TrainConfig

Batch = tuple[Tensor, Tensor]  # x and y, both (B, T) int64


# == WHAT THIS MACHINE HAS ============================================================================================


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
    with contextlib.suppress(KeyError, ValueError):  # processes that torchrun has started here
        return min(found) / max(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    return min(found)


@functools.cache
def cores() -> int:
    """Cores that this process may keep busy: OMP_NUM_THREADS, or else its affinity and its container's quota."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with contextlib.suppress(OSError, ValueError):  # "max 100000" without a quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        found.append(math.ceil(int(quota) / int(period)))
    return max(1, min(found))


@functools.cache
def pool() -> ThreadPoolExecutor:
    """One thread for each core; PyTorch's operators use no further ones there."""
    return ThreadPoolExecutor(cores(), "piece", initializer=torch.set_num_threads, initargs=(1,))


given_up = threading.Event()  # nobody needs what the threads do any more


def on_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """work(item) for all items on the threads of the pool, in the order of the items; the first error is raised when
    all have ended. What takes long looks at `given_up`: a signal interrupts the thread that waits here, no other."""
    futures = [pool().submit(work, item) for item in items]
    try:
        while futures:
            yield futures[0].result()
            del futures[0]  # with what it holds
    except BaseException:
        given_up.set()
        wait([future for future in futures if not future.cancel()])
        given_up.clear()
        raise


def within_memory(work: Callable[[int], Any], batch_tokens: int, say: Callable[[str], None]) -> tuple[Any, int]:
    """work(batch_tokens), again with half as many where memory does not suffice; and how many it was then."""
    while True:
        try:
            return work(batch_tokens), batch_tokens
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or batch_tokens < 1024:
                raise
        batch_tokens //= 2
        say(f"out of memory; going on with batches of {batch_tokens:,} tokens")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# == PIECES ===========================================================================================================


def split_batches(batches: list[Batch], pieces: int, trim: bool) -> list[Batch]:
    """Each micro-batch cut into so many of fewer rows. With `trim`, rows of similar length go together, and a piece
    ends with its last supervised token, because what comes behind that changes no loss. A piece without any is left
    out, because a mean over nothing is not a number."""
    found = []
    for x, y in batches:
        last = torch.arange(1, y.shape[1] + 1).mul(y != IGNORE_INDEX).amax(1)  # (B,)
        if trim:
            order = last.argsort(descending=True, stable=True)
            x, y, last = x[order], y[order], last[order]
        for part in torch.arange(len(x)).chunk(pieces):
            if end := int(last[part].max()):
                found.append((x[part, : end if trim else None], y[part, : end if trim else None]))
    return found


def shares_out(network: nn.Module, runtime: Runtime) -> bool:
    """Whether pieces are computed at once. Not with dropout: its random numbers come from one generator, in order."""
    alone = runtime.world == 1 and runtime.device.type == "cpu" and cores() > 1
    return alone and isinstance(network, GPT) and not (network.training and network.config.dropout)


def mean_loss(network: nn.Module, batches: list[Batch], runtime: Runtime, learn: bool = True) -> Tensor:
    """The mean loss over all supervised tokens; if `learn`, its scaled gradients. In more pieces if memory runs out."""
    rows = max(len(x) for x, _ in batches)
    while True:
        trim = runtime.device.type == "cpu"
        pieces = split_batches(batches, runtime.pieces, trim) if trim or runtime.pieces > 1 else batches
        try:
            if len(pieces) > 1 and shares_out(network, runtime):
                return shared_mean_loss(network, pieces, runtime, learn)
            return train.mean_loss.plain(network, pieces, runtime, learn)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or runtime.world > 1:  # the other ranks would wait for this one
                raise
        network.zero_grad(set_to_none=True)
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        use_less_memory(network, runtime, rows)


def shared_mean_loss(model: GPT, pieces: list[Batch], runtime: Runtime, learn: bool) -> Tensor:
    """The same of pieces on all cores. Gradients are added in the order of the pieces, whoever is done first."""
    counts = [int((y != IGNORE_INDEX).sum()) for _, y in pieces]
    params = [p for p in model.parameters() if p.requires_grad]

    def compute(i: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (x, y), share = pieces[i], counts[i] / sum(counts)
        with torch.set_grad_enabled(learn), runtime.autocast():  # both are a thread's own
            loss = model(x, y)[1] * share
            scaled = runtime.scaler.scale(loss)
        return loss.detach(), torch.autograd.grad(scaled, params, allow_unused=True) if learn else ()

    mean = runtime.scaler.scale(torch.zeros(()))  # sets the scale up, before threads do it at once
    for loss, grads in on_threads(compute, (i for i, count in enumerate(counts) if count)):
        mean += loss
        for p, grad in zip(params, grads, strict=False):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)
    return mean


# == FITTING ==========================================================================================================


def count_weights(cfg: ModelConfig) -> int:
    """Parameters of such a model. Computed, because making it, even without data, may take memory or seconds."""
    d, d_inner = cfg.d_model, cfg.expand * cfg.d_model
    heads, d_xbc = d_inner // cfg.headdim, d_inner + 2 * cfg.d_state
    mamba = d * (d_inner + d_xbc + heads) + d_xbc * (cfg.d_conv + 1) + 3 * heads + d_inner * (d + 1)
    mixer = {"A": 4 * d * d, "M": mamba}
    blocks = sum(mixer[letter] + 3 * d * cfg.d_ff + 2 * d for letter in cfg.pattern)
    tables = cfg.vocab_size * (1 if cfg.tie_embeddings else 2) if not cfg.grid else (
        train.UNKNOWN_TASK + 1 + cfg.n_tasks + cfg.vocab_size + 32 + 32 + 2 + 4 * d * len(cfg.pattern)
        + (HINTS if cfg.recall else 9 * 11))
    return blocks + d * (tables + 1)


def check_room(model_cfg: ModelConfig) -> None:
    """UserError if not even the weights of such a model fit in memory."""
    needed = 4 * count_weights(model_cfg)
    if needed > (free := free_memory()):
        raise UserError(f"a model of these sizes has {needed / 1e9:,.1f} GB of weights where {free / 1e9:,.1f} GB of "
                        "memory are free; lower --d-model, --d-ff or the number of layers")


def build_model(model_cfg: ModelConfig, cfg: TrainConfig, runtime: Runtime) -> GPT:
    """The model with fresh weights, ready to compute; UserError if it does not fit in memory."""
    check_room(model_cfg)
    return train.build_model.plain(model_cfg, cfg, runtime)


def no_room(model: GPT) -> UserError:
    """What to say if nothing is left to reduce."""
    return UserError(f"one sequence of {model.config.block_size} tokens does not fit in memory, even with --remat; "
                     "lower --block-size, --d-model or the number of layers")


def use_less_memory(model: nn.Module, runtime: Runtime, rows: int) -> None:
    """Half as many sequences at a time, then recomputed activations; UserError if nothing is left to reduce."""
    model = getattr(model, "module", model)  # of DistributedDataParallel
    if runtime.pieces < rows:
        runtime.pieces *= 2
    elif not model.remat:
        model.remat = True
    else:
        raise no_room(model)
    again = ", activations recomputed in the backward pass (--remat)" if model.remat else ""
    runtime.say(f"memory      too small for that: {math.ceil(rows / runtime.pieces)} sequences at a time{again}; the "
                "effective batch stays as it is")


def worst_batch(rows: int, length: int) -> Tensor:
    """Tokens (rows, length) that take as much memory as any: for ARC all of an output, whose positions have hints."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    tokens[:, 0] = OUT
    return tokens


def activation_bytes(model: GPT, length: int = 0) -> int:
    """What the backward pass of one sequence keeps, apart from the weights; float32, measured. length: block_size."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tokens = worst_batch(1, length or model.config.block_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(tokens, tokens)[1]
    del loss
    return sum(size for where, size in kept.items() if where not in weights)


def fit_to_cpu(model: GPT, cfg: TrainConfig, runtime: Runtime) -> None:
    """Measure one sequence and compute the rest: a process that took too much would be killed instead of told."""
    rows, shared = cfg.batch_size, shares_out(model, runtime)
    if shared and rows > 1:
        runtime.pieces = min(rows, 2 * cores())
        torch.set_num_threads(1)  # also for what is left to this thread
    room = free_memory() - 4 * sum(p.nbytes for p in model.parameters())  # gradients, the optimizers' state, transients
    longest, short = model.config.block_size, min(256, model.config.block_size)
    least = activation_bytes(model, short) * longest // short
    if least > room * len(model.blocks):
        raise no_room(model)
    if 16 * rows * longest > room:  # x and y
        raise UserError(f"{rows} sequences of {longest} tokens do not fit in memory; lower --batch-size, and raise "
                        "--grad-accum-steps instead")
    one = full = least if least > room else activation_bytes(model)  # measuring takes as much
    at_once = min(cores(), min(rows, runtime.pieces) * cfg.grad_accum_steps) if shared else 1
    while math.ceil(rows / runtime.pieces) * at_once * one * 1.5 > room:
        use_less_memory(model, runtime, rows)
        if model.remat:  # one block's activations and transients come again in the backward pass
            one = activation_bytes(model) + 3 * full // len(model.blocks)


def fit_to_memory(model: GPT, optimizers: Optimizers, cfg: TrainConfig, runtime: Runtime) -> None:
    """One step on the largest batch there can be, before the clock starts; on a CPU one sequence's forward pass.

    Triton's kernels are compiled and tuned here, before ranks wait for each other, and micro-batches are cut until
    they fit in memory. Weights, optimizers and random numbers are left as they were; call it before a checkpoint is
    restored.
    """
    cuda = runtime.device.type == "cuda"
    with torch.random.fork_rng([runtime.device] if cuda else []):
        if runtime.device.type == "cpu":
            fit_to_cpu(model, cfg, runtime)
        else:
            if runtime.ops is not PLAIN:
                runtime.say("            compiling kernels, which takes minutes the first time")
            tokens = worst_batch(cfg.batch_size, model.config.block_size)
            alone = dataclasses.replace(runtime, world=1)
            buckets = [torch.empty_like(p) for p in model.parameters()] if runtime.world > 1 else []
            mean_loss(model, [(tokens, tokens)], alone)
            optimizers.step(0.0)
            mean_loss(model, [(tokens, tokens)], alone, learn=False)  # as evaluations do
            del buckets
            runtime.pieces = int(runtime.all_max(alone.pieces)[0])
    for optimizer in optimizers.all:
        optimizer.state.clear()
    model.zero_grad(set_to_none=True)
