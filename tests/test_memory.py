"""extras/memory.py: pieces of a batch on threads of their own, and batches that fit the memory at hand."""

import contextlib
import itertools
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import one_thread, random_tasks, runtime, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data.files import UserError
from extras import memory
from train import IGNORE_INDEX, ArcDataLoader, Optimizers, TrainConfig, validation_loss


@contextlib.contextmanager
def cores(count):
    """As if this process had so many cores."""
    memory.pool.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cores", lambda: count)
        yield
        memory.pool().shutdown()
    memory.pool.cache_clear()


@st.composite
def batches(draw):
    """One or two micro-batches, rows padded on the right; a row may have no supervised token, but not all of them."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        x = torch.randint(0, 16, (len(lengths), max(lengths)), generator=generator)
        y = torch.randint(0, 16, x.shape, generator=generator)
        y[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = IGNORE_INDEX
        y[0, 0] = 1
        for row, length in enumerate(lengths):
            x[row, length:], y[row, length:] = 0, IGNORE_INDEX
        found.append((x, y))
    return found


def pieces(count, dtype=torch.float32):
    """A runtime that computes a micro-batch in so many pieces."""
    found = runtime()
    found.pieces, found.dtype = count, dtype
    return found


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def a_batch(rows=7, length=20):
    """Rows of different lengths."""
    x = torch.randint(0, 16, (rows, length), generator=torch.Generator().manual_seed(rows))
    return x, x.roll(-1, 1).masked_fill(torch.arange(length) >= torch.arange(4, 4 + 2 * rows, 2)[:, None], IGNORE_INDEX)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


@settings(max_examples=40)
@given(batches(), st.integers(1, 7), st.sampled_from([1, 2, 4]), st.booleans())
def test_pieces_equal_the_whole(batch, count, cpus, grid):
    model = tiny_model("MA", grid, vocab_size=16)
    expected, wanted = train.mean_loss.plain(model, batch, runtime()), gradients(model)
    with cores(cpus):
        assert memory.mean_loss(model, batch, pieces(count)) == pytest.approx(expected.item(), rel=1e-6)
        assert (gradients(model) - wanted).norm() <= 1e-6 * wanted.norm()
        assert memory.mean_loss(model, batch, pieces(count), learn=False) == pytest.approx(expected.item(), rel=1e-6)
        assert all(p.grad is None for p in model.parameters())


@given(batches(), st.integers(1, 7))
def test_rows_are_sorted_and_cut_behind_their_last_target_only(batch, count):
    for x, y in batch:
        wanted = sorted((x[i, : 1 + t.nonzero().max()].tolist(), y[i, : 1 + t.nonzero().max()].tolist())
                        for i, t in enumerate(y != IGNORE_INDEX) if t.any())  # fmt: skip
        parts = memory.split_batches([(x, y)], count, trim=True)
        found = [(a, b) for part in parts for a, b in zip(*part, strict=True)]
        assert all((b != IGNORE_INDEX).any() for _, b in parts)
        lengths = [1 + int((b != IGNORE_INDEX).nonzero().max()) for _, b in found if (b != IGNORE_INDEX).any()]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted((a[:n].tolist(), b[:n].tolist()) for (a, b), n in zip(found, lengths, strict=False)) == wanted


@settings(max_examples=15)
@given(st.integers(2, 7), st.integers(0, 1000))
def test_the_same_bits_whichever_thread_is_first(count, seed):
    """Each piece waits for a random time before it begins."""
    model, found, rng = tiny_model("MA", grid=True), [], random.Random(seed)
    model.register_forward_pre_hook(lambda *_: time.sleep(rng.uniform(0, 0.002)))
    for cpus in (2, 4, 2):
        with cores(cpus):
            loss = memory.mean_loss(model, [a_batch()], pieces(count))
            found.append(torch.cat([loss[None], gradients(model)]))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("cpus", [1, 2])
def test_dropout_is_reproducible(cpus):
    model, found = tiny_model("MA", dropout=0.3, vocab_size=16).train(), []
    with cores(cpus):
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            loss = memory.mean_loss(model, [a_batch()], pieces(3))
            found.append(torch.cat([loss[None], gradients(model)]))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def seen_by(model, what):
    """What holds while each piece is computed, beside the name of its thread."""
    found = []
    model.register_forward_pre_hook(lambda *_: found.append((threading.current_thread().name[:5], what())))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn", [True, False])
def test_threads_compute_in_the_precision_asked_for(dtype, learn):
    model = tiny_model("MA", grid=True)
    found = seen_by(model, lambda: (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_num_threads()))
    with cores(2):
        memory.mean_loss(model, [a_batch()], pieces(4, dtype), learn)
    assert found == [("piece", (dtype == torch.bfloat16, learn, 1))] * 4


def test_evaluation_is_shared_out_too():
    model, loader = tiny_model(grid=True), ArcDataLoader(random_tasks(10), 4, 4096, train=False)
    expected, found = validation_loss(model, loader, pieces(1)), seen_by(model, lambda: None)
    with cores(2):
        assert validation_loss(model, loader, pieces(2)) == pytest.approx(expected, rel=1e-6)
    assert found == [("piece", None)] * 6


# ---------------------------------------------------------------------------------------------------------------------
# Memory that runs out


def limit(model, rows, error=torch.OutOfMemoryError):
    """The model fails on more rows than that at a time; how many it was given each time."""
    seen, plain = [], model.forward

    def forward(x, y=None):
        seen.append(len(x))
        if len(x) > rows:
            raise error("out of memory, pretended")
        return plain(x, y)

    model.forward = forward
    return seen


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_batches_are_halved_until_they_fit(cpus, error, capsys):
    expected = memory.mean_loss(tiny_model("MA", vocab_size=16), [a_batch(8)], pieces(1))
    model, place = tiny_model("MA", vocab_size=16), pieces(1)
    limit(model, 2, error)
    with cores(cpus):
        for _ in range(2):  # the second time they are halved already
            assert memory.mean_loss(model, [a_batch(8)], place) == pytest.approx(expected.item(), rel=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert place.pieces == 4 and len(said) == 2 and "2 sequences at a time" in said[1] and "effective batch" in said[1]


@pytest.mark.parametrize("cpus", [1, 2])
def test_if_nothing_is_left_to_reduce_one_line_says_what_to_do(cpus, capsys):
    model, place = tiny_model("MA", vocab_size=16), pieces(1)
    limit(model, 0)
    with cores(cpus), pytest.raises(UserError, match="one sequence of 512 tokens .*--block-size"):
        memory.mean_loss(model, [a_batch(8)], place)
    assert model.remat and "--remat" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("cpus", [1, 2])
def test_other_errors_are_not_taken_for_memory(cpus):
    model = tiny_model("MA", vocab_size=16)
    seen = limit(model, 0, lambda text: RuntimeError("pretended"))
    with cores(cpus), pytest.raises(RuntimeError, match="pretended"):
        memory.mean_loss(model, [a_batch(8)], pieces(2))
    assert set(seen) == {4}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fitting_leaves_weights_optimizers_and_random_numbers(dropout):
    model = tiny_model("MA", grid=True, dropout=dropout).train()
    cfg, before = TrainConfig(batch_size=6), {k: v.clone() for k, v in model.state_dict().items()}
    optimizers, state = Optimizers(model, cfg), torch.get_rng_state()
    place = pieces(1)
    with cores(2):
        memory.fit_to_memory(model, optimizers, cfg, place)
    assert place.pieces == (1 if dropout else 4)  # dropout's random numbers come from one generator, in order
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(o.state for o in optimizers.all)


def test_a_cpu_with_ever_less_memory(monkeypatch, capsys):
    """The whole batch, fewer sequences, activations made again, and one line of advice."""
    model, cfg = tiny_model("MAMAMAMA", grid=True, block_size=256), TrainConfig(batch_size=4)
    one, weights = memory.activation_bytes(model), 4 * sum(p.nbytes for p in model.parameters())
    found = []
    for share in (9, 2.5, 1.2, 0.8, 0.01):
        monkeypatch.setattr(memory, "free_memory", lambda share=share: weights + share * 1.5 * one)
        model.remat, place = False, pieces(1)
        with cores(1), contextlib.suppress(UserError):
            memory.fit_to_cpu(model.train(), cfg, place)
            found.append((place.pieces, model.remat))
    assert found == [(1, False), (2, False), (4, False), (4, True)]
    assert capsys.readouterr().out.count("memory ") == 6
    model.config.block_size = 2**31 - 1  # must not be tried
    with cores(1), pytest.raises(UserError, match="--block-size"):
        memory.fit_to_cpu(model, cfg, pieces(1))


@pytest.mark.parametrize("sizes", [dict(d_model=2**31 - 2), dict(d_ff=2**31 - 1), dict(d_model=2**17, n_head=2)])
def test_a_model_that_is_too_large_is_refused_before_it_is_made(sizes):
    with pytest.raises(UserError, match="GB of weights where .* lower --d-model"):
        memory.check_room(train.ModelConfig(pattern="A", **sizes))


# ---------------------------------------------------------------------------------------------------------------------
# What the machine has


@pytest.mark.parametrize(
    "threads, affinity, quota, expected",
    [
        (None, 8, None, 8),
        (None, 8, "max 100000\n", 8),
        (None, 8, "150000 100000\n", 2),
        (None, 2, "400000 100000\n", 2),
        (None, 8, "1000 100000\n", 1),
        (None, 8, "nonsense", 8),
        ("3", 8, "150000 100000\n", 3),
        ("0", 8, None, 1),
        ("", 8, None, 8),
        ("many", 2, None, 2),
    ],
)
def test_cores_are_those_that_the_process_may_use(threads, affinity, quota, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    plain = Path.read_text

    def read_text(self, *args, **more):
        if str(self) != "/sys/fs/cgroup/cpu.max":
            return plain(self, *args, **more)
        if quota is None:
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.cores.__wrapped__() == expected


@pytest.mark.parametrize("processes", [None, "", "0", "1", "nonsense"])
def test_free_memory_whatever_the_environment(processes, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    whole = memory.free_memory()
    assert 2**20 < whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory() == pytest.approx(whole / 4, rel=0.5)


def test_every_row_is_in_one_piece():
    for rows, count in itertools.product(range(1, 9), range(1, 12)):
        parts = memory.split_batches([a_batch(rows)], count, trim=True)
        assert sum(len(x) for x, _ in parts) == rows and len(parts) <= count and min(len(x) for x, _ in parts) > 0
