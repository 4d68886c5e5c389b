"""extras/memory.py: pieces of a batch on threads of their own, and batches that fit the memory at hand."""

import contextlib
import os
import random
import threading
import time

import pytest
import torch
from helpers import one_thread, random_tasks, runtime, tiny_model  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data.files import UserError
from extras import memory
from train import IGNORE_INDEX, ArcDataLoader, Optimizers, TrainConfig, validation_loss

with_one_or_two_cores = pytest.mark.parametrize("cpus", [1, 2])


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
        x, y = torch.randint(0, 16, (2, len(lengths), max(lengths)), generator=generator)
        y[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = IGNORE_INDEX
        y[0, 0] = 1
        for row, length in enumerate(lengths):
            x[row, length:], y[row, length:] = 0, IGNORE_INDEX
        found.append((x, y))
    return found


def a_batch(rows=7, length=20):
    """Rows of different lengths."""
    x = torch.randint(0, 16, (rows, length), generator=torch.Generator().manual_seed(rows))
    return x, x.roll(-1, 1).masked_fill(torch.arange(length) >= torch.arange(4, 4 + 2 * rows, 2)[:, None], IGNORE_INDEX)


def pieces(count, dtype=torch.float32):
    """A runtime that computes a micro-batch in so many pieces."""
    found = runtime()
    found.pieces, found.dtype = count, dtype
    return found


def loss_and_gradients(model, batch, place, mean_loss=memory.mean_loss):
    """Both in one tensor."""
    loss = mean_loss(model, batch, place)
    found = torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters())])
    model.zero_grad()
    return found


# == THE SAME NUMBERS =================================================================================================


@settings(max_examples=25)
@given(batches(), st.integers(1, 7), st.sampled_from([1, 2, 4]), st.booleans())
def test_pieces_equal_the_whole(batch, count, cpus, grid):
    model = tiny_model("MA", grid, vocab_size=16)
    expected = loss_and_gradients(model, batch, runtime(), train.mean_loss.plain)
    loss = pytest.approx(expected[0].item(), rel=1e-6)
    with cores(cpus):
        found = loss_and_gradients(model, batch, pieces(count))
        assert found[0] == loss and (found[1:] - expected[1:]).norm() <= 1e-6 * expected[1:].norm()
        assert memory.mean_loss(model, batch, pieces(count), learn=False) == loss
        assert all(p.grad is None for p in model.parameters())


def trimmed(x, y):
    """The rows that have targets, up to the last of these."""
    ends = [max([t + 1 for t, target in enumerate(row) if target != IGNORE_INDEX], default=0) for row in y.tolist()]
    return [(a[:n].tolist(), b[:n].tolist()) for a, b, n in zip(x, y, ends, strict=True) if n]


@given(batches(), st.integers(1, 7))
def test_rows_are_sorted_and_cut_behind_their_last_target_only(batch, count):
    """Each is in one piece, but those without a target may be in none."""
    for x, y in batch:
        parts = memory.split_batches([(x, y)], count, trim=True)
        assert len(parts) <= count and all(trimmed(*part) for part in parts)
        found = [row for part in parts for row in trimmed(*part)]
        assert [len(a) for a, _ in found] == sorted((len(a) for a, _ in found), reverse=True)
        assert sorted(found) == sorted(trimmed(x, y))


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_the_same_bits_whichever_thread_is_first(count):
    """Each piece waits for a random time before it begins."""
    model, rng = tiny_model("MA", grid=True), random.Random(count)
    model.register_forward_pre_hook(lambda *_: time.sleep(rng.uniform(0, 0.002)))
    found = []
    for cpus in (2, 4, 2, 4):
        with cores(cpus):
            found.append(loss_and_gradients(model, [a_batch()], pieces(count)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn", [True, False])
def test_threads_compute_in_the_precision_asked_for_and_share_out_evaluation_too(dtype, learn):
    model, seen = tiny_model("MA", grid=True), []

    def look(*_):
        precision = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_num_threads()
        seen.append((threading.current_thread().name[:5], precision))

    model.register_forward_pre_hook(look)
    with cores(2):
        if learn:
            memory.mean_loss(model, [a_batch()], pieces(4, dtype))
        else:
            validation_loss(model, ArcDataLoader(random_tasks(8), 4, 4096, train=False), pieces(2, dtype))
    assert seen == [("piece", (dtype == torch.bfloat16, learn, 1))] * 4


# == MEMORY THAT RUNS OUT =============================================================================================


def limit(model, rows, error):
    """The model fails on more rows than that at a time."""

    def refuse(model, args):
        if len(args[0]) > rows:
            raise error("out of memory, pretended")

    model.register_forward_pre_hook(refuse)


@with_one_or_two_cores
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_batches_are_halved_until_they_fit_or_one_line_says_what_to_do(cpus, error, capsys):
    model, place = tiny_model("MA", vocab_size=16), pieces(1)
    expected = memory.mean_loss(model, [a_batch(8)], place)
    limit(model, 2, error)
    with cores(cpus):
        for _ in range(2):  # the second time they are halved already
            assert memory.mean_loss(model, [a_batch(8)], place) == pytest.approx(expected.item(), rel=1e-6)
        said = capsys.readouterr().out.splitlines()
        assert place.pieces == 4 and len(said) == 2
        assert "2 sequences at a time" in said[1] and "effective batch" in said[1]
        limit(model, 0, error)
        with pytest.raises(UserError, match="one sequence of 512 tokens .*--block-size"):
            memory.mean_loss(model, [a_batch(8)], place)
    assert model.remat and "--remat" in capsys.readouterr().out.splitlines()[-1]


@with_one_or_two_cores
def test_other_errors_are_not_taken_for_memory(cpus):
    model = tiny_model("MA", vocab_size=16)
    limit(model, 0, lambda text: RuntimeError("pretended"))
    with cores(cpus), pytest.raises(RuntimeError, match="pretended"):
        memory.mean_loss(model, [a_batch(8)], pieces(2))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fitting_leaves_weights_optimizers_and_random_numbers(dropout):
    model = tiny_model("MA", grid=True, dropout=dropout).train()
    cfg, before = TrainConfig(batch_size=6), {k: v.clone() for k, v in model.state_dict().items()}
    optimizers, state, place = Optimizers(model, cfg), torch.get_rng_state(), pieces(1)
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
    monkeypatch.setattr(memory, "free_memory", lambda: weights + 5 * 1.5 * one)
    model.remat, place = False, pieces(1)
    with cores(64):  # four sequences are at most four pieces at once
        memory.fit_to_cpu(model, cfg, place)
    assert (place.pieces, model.remat) == (4, False)
    model.config.block_size = 2**31 - 1  # must not be tried
    with cores(1), pytest.raises(UserError, match="--block-size"):
        memory.fit_to_cpu(model, cfg, pieces(1))


@pytest.mark.parametrize("sizes", [dict(d_model=2**31 - 2), dict(d_ff=2**31 - 1), dict(d_model=2**17, n_head=2)])
def test_a_model_that_is_too_large_is_refused_before_it_is_made(sizes):
    with pytest.raises(UserError, match="GB of weights where .* lower --d-model"):
        memory.check_room(train.ModelConfig(pattern="A", **sizes))


# == WHAT THE MACHINE HAS =============================================================================================


def pretend(monkeypatch, folder, files, name, value):
    """Put files (path, text or None) in the place of the system's, and set a variable of the environment."""
    monkeypatch.setattr(memory, "Path", lambda path: folder / path[1:])
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (folder / path).write_text(text)
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("threads, affinity, quota, expected", [
    (None, 8, None, 8), ("", 8, "max 100000\n", 8), (None, 8, "nonsense", 8), (None, 8, "150000 100000\n", 2),
    (None, 8, "1000 100000\n", 1), ("many", 2, "400000 100000\n", 2), ("3", 8, "150000 100000\n", 3), ("0", 8, None, 1),
])  # fmt: skip
def test_cores_are_those_that_the_process_may_use(threads, affinity, quota, expected, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, {"sys/fs/cgroup/cpu.max": quota}, "OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    assert memory.cores.__wrapped__() == expected


@pytest.mark.parametrize("limit, processes, expected", [
    (None, None, 4096),
    ("max", "", 4096),
    ("3000", "0", 2300),  # of which 1000 are taken, but 300 of these are files read before
    ("9000", "nonsense", 4096),
    ("3000", "4", 575),
])  # fmt: skip
def test_free_memory_is_that_of_the_system_or_the_container(limit, processes, expected, tmp_path, monkeypatch):
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n", "sys/fs/cgroup/memory.max": limit,
             "sys/fs/cgroup/memory.current": "1000\n", "sys/fs/cgroup/memory.stat": "anon 700\ninactive_file 300\n"}
    pretend(monkeypatch, tmp_path, files, "LOCAL_WORLD_SIZE", processes)
    assert memory.free_memory() == expected
