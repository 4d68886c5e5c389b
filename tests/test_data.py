"""The two loaders: what a batch holds, in which order batches come, and what they may never show."""

import itertools
import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    MAGIC,
    parse_pairs,
    random_grid,
    random_tasks,
    same_pairs,
    sequence,
    task_json,
    write_shard,
    write_text,
)

from train import (
    END,
    IGNORE_INDEX,
    SHARE_EVALUATION_PAIRS,
    UNKNOWN_TASK,
    ArcDataLoader,
    DataError,
    FineWebLoader,
    Task,
    apply_symmetry,
    canonical_hash,
    load_arc,
    next_batches,
    origin,
    pair_length,
    read_split,
)

ROOMY = 4096  # a block size that every small task fits


def whole(x, y):
    """The unpadded sequences of a batch, each with its last token, which only y holds."""
    found = []
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        last = max(t for t, v in enumerate(target) if v != IGNORE_INDEX)
        found.append([*row[: last + 1], target[last]])
    return found


def rows_of_steps(loaders, accum):
    """The rows of each optimizer step of an epoch over all ranks, in no order inside a step."""
    epochs = [list(loader) for loader in loaders]
    assert len({len(e) for e in epochs}) == 1, "ranks fall out of step"
    rows = [list(itertools.chain(*(whole(*e[i]) for e in epochs))) for i in range(len(epochs[0]))]
    return [sorted(itertools.chain(*rows[i : i + accum])) for i in range(0, len(rows), accum)]


def same(one, other):
    """Whether two lists of batches are equal."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b)
        for p, q in zip(one, other, strict=True)
        for a, b in zip(p, q, strict=True)
    )


def make(kind, tmp_path, train=True, **options):
    """A small loader of either kind."""
    options = dict(batch_size=2) | options
    if kind == "arc":
        return ArcDataLoader(random_tasks(23), block_size=ROOMY, train=train, **options)
    folder = tmp_path / "text"
    if not folder.exists():
        write_text(folder, tokens=620)
    return FineWebLoader(folder, "train" if train else "val", block_size=16, **options)


both = pytest.mark.parametrize("kind", ["arc", "fineweb"])

# ---------------------------------------------------------------------------------------------------------------------
# What a batch of ARC tasks holds


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_int64_and_padded_to_the_longest_with_zeros_and_ignored_targets(train):
    loader = ArcDataLoader(random_tasks(12), 4, ROOMY, train=train)
    padded = 0
    for x, y in loader:
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, x.shape[1])
        lengths = [len(s) - 1 for s in whole(x, y)]
        assert max(lengths) == x.shape[1]
        for row, target, length in zip(x, y, lengths, strict=True):
            assert (row[length:] == 0).all() and (target[length:] == IGNORE_INDEX).all()
            padded += x.shape[1] - length
    assert padded == loader.padding > 0


def test_targets_are_the_next_tokens_of_the_answer():
    """Evaluation: x and y are one sequence, shifted; `x[1:] + [0]` on a tensor would add and not append."""
    tasks = random_tasks(9)
    batches = list(ArcDataLoader(tasks, 3, ROOMY, train=False, task_tokens={tasks[2].name: 18}))
    for i, task in enumerate(tasks):
        x, y = (part[i % 3] for part in batches[i // 3])
        s = sequence(task.pairs, 18 if i == 2 else UNKNOWN_TASK)
        answer = pair_length(task.pairs[-1]) - 2 - task.pairs[-1][0].size - task.pairs[-1][0].shape[0]
        assert x[: len(s) - 1].tolist() == s[:-1].tolist()
        assert y[: len(s) - 1].tolist() == [IGNORE_INDEX] * (len(s) - 1 - answer) + s[-answer:].tolist()


def test_training_supervises_every_output_and_nothing_else():
    for x, y in ArcDataLoader(random_tasks(12), 4, ROOMY):
        for target, s in zip(y.tolist(), whole(x, y), strict=True):
            supervised = [v for v in target if v != IGNORE_INDEX]
            outputs = [sequence([(o[:0], o)])[3:].tolist() for _, o in parse_pairs(s)]  # without task token, IN and OUT
            assert supervised == list(itertools.chain(*outputs))
            assert all(target[t] in (s[t + 1], IGNORE_INDEX) for t in range(len(s) - 1))


def recolouring(one, other):
    """The colours that turn one list of grids into another, or None where none do or where black changes."""
    if [g.shape for g in one] != [g.shape for g in other]:
        return None
    table = set(zip(*(np.concatenate([g.ravel() for g in grids]).tolist() for grids in (one, other)), strict=True)) | {
        (0, 0)
    }
    return table if len(table) == len({a for a, _ in table}) == len({b for _, b in table}) else None


def views(task, shown):
    """The symmetries under which `shown` is all of the task's pairs, in some order, with one recolouring."""
    for s in range(8):
        for order in itertools.permutations(task.pairs):
            one = [apply_symmetry(g, s) for pair in order for g in pair]
            if recolouring(one, [g for pair in shown for g in pair]):
                yield s, order


def test_training_shows_all_pairs_of_a_task_under_one_symmetry_and_one_recolouring():
    tasks = {frozenset(canonical_hash(p) for p in t.pairs): t for t in random_tasks(12, pairs=(2, 4))}
    found = []
    for x, y in ArcDataLoader(list(tasks.values()), 4, ROOMY):
        for s in whole(x, y):
            pairs = parse_pairs(s)
            task = tasks[frozenset(canonical_hash(p) for p in pairs)]
            assert list(views(task, pairs)), "not the whole task under one symmetry and one permutation of colours"
            found.append(task.name)
    assert sorted(found) == sorted(t.name for t in tasks.values())


def test_each_epoch_draws_new_flips_colours_and_orders_over_everything_there_is():
    rng = np.random.default_rng(0)
    task = Task("one", [(random_grid(rng, 4, 3), random_grid(rng, 4, 3)) for _ in range(3)])

    def draw(seed, epochs=120):
        loader = ArcDataLoader([task], 1, ROOMY, seed=seed, task_tokens={"one": 17})
        return [whole(*batch)[0] for _ in range(epochs) for batch in loader]

    drawn = draw(seed=1)
    assert drawn == draw(seed=1) and drawn != draw(seed=2)
    seen = [next(views(task, parse_pairs(s))) for s in drawn]
    symmetries = Counter(s for s, _ in seen)
    assert sorted(symmetries) == list(range(8)) and max(symmetries.values()) < 40
    assert {canonical_hash(order[-1]) for _, order in seen} == {canonical_hash(p) for p in task.pairs}
    assert len({canonical_hash(order[0]) + canonical_hash(order[1]) for _, order in seen}) == 6
    assert len({tuple(s) for s in drawn}) > 110
    named = sum(s[0] == 17 for s in drawn)
    assert {s[0] for s in drawn} == {UNKNOWN_TASK, 17} and 60 < named < 110  # the task token is left out at times


def test_evaluation_is_never_shuffled_or_augmented():
    tasks = random_tasks(10)
    loaders = [ArcDataLoader(tasks, 4, ROOMY, train=False, seed=seed) for seed in (0, 1)]
    epochs = [list(loader) for loader in loaders for _ in range(2)]
    assert all(same(epochs[0], other) for other in epochs[1:])
    shown = [parse_pairs(s) for x, y in epochs[0] for s in whole(x, y)]
    assert all(same_pairs(pairs, task.pairs) for pairs, task in zip(shown, tasks, strict=True))
    assert [len(x) for x, _ in epochs[0]] == [4, 4, 2]


@pytest.mark.parametrize("train", [True, False])
def test_beyond_the_block_whole_demonstrations_are_left_out_and_counted(train):
    tasks = random_tasks(40, pairs=(3, 6), largest=7)
    block = 120
    loader = ArcDataLoader(tasks, 1, block, train=train, seed=3)
    named = {canonical_hash(p): t for t in tasks for p in t.pairs}
    shown = []
    for x, y in loader:
        (s,) = whole(x, y)
        assert x.shape[1] <= block
        pairs = parse_pairs(s)  # fails where a grid is cut
        task = named[canonical_hash(pairs[0])]
        assert s[-1] == END and {canonical_hash(p) for p in pairs} <= {canonical_hash(p) for p in task.pairs}
        assert sum(map(pair_length, pairs)) == len(s) - 1
        left = [p for p in task.pairs if canonical_hash(p) not in {canonical_hash(q) for q in pairs}]
        assert len(left) == len(task.pairs) - len(pairs)
        # kept while they fit: with the two largest that are left out the row would be too long
        assert not left or x.shape[1] + max(map(pair_length, left)) > block
        shown.append((task.name, len(left)))
    if not train:
        assert all(same_pairs(parse_pairs(whole(x, y)[0])[-1:], t.pairs[-1:])
                   for (x, y), t in zip(loader, loader.tasks, strict=True))  # fmt: skip
        loader.dropped //= 2
    assert loader.dropped == sum(n for _, n in shown) > 0
    assert any(n == 0 for _, n in shown), "the block is too small to tell"
    assert sorted(name for name, _ in shown) == sorted(t.name for t in loader.tasks)


def test_no_turn_of_a_wide_pair_exceeds_the_block():
    """A 1 x 20 grid takes 21 tokens, but 40 after a quarter turn."""
    rng = np.random.default_rng(0)
    tasks = [Task(f"wide{w}", [tuple(rng.integers(0, 10, (2, 1, w)).astype(np.uint8))] * 2) for w in range(10, 20)]
    loader = ArcDataLoader(tasks, 1, 3 + 2 * 2 * 15)
    assert loader.too_long == ["wide16", "wide17", "wide18", "wide19"]
    assert max(x.shape[1] for _ in range(12) for x, _ in loader) <= loader.block_size


def test_tasks_too_long_for_the_block_are_named_and_none_left_is_an_error():
    tasks = random_tasks(5, largest=4) + random_tasks(1, seed=9, largest=4, pairs=(2, 2))
    rng = np.random.default_rng(0)
    tasks[2] = Task("huge", [(random_grid(rng, 30, 20), random_grid(rng, 30, 20))] * 3)
    loader = ArcDataLoader(tasks, 2, 400)
    assert loader.too_long == ["huge"] and "huge" not in [t.name for t in loader.tasks]
    with pytest.raises(DataError, match="--block-size 50"):
        ArcDataLoader(tasks[2:3], 2, 50)


def test_padding_is_under_15_percent_of_official_training_tokens(arc_dir):
    for demonstrations, holdout in (("training", 0), ("both", 40)):
        tasks = load_arc(arc_dir, holdout, 30, demonstrations).tasks
        loader = ArcDataLoader(tasks, 16, 4096)
        for _ in range(2):
            for _batch in loader:
                pass
        assert loader.padding / loader.tokens < 0.15, f"{loader.padding / loader.tokens:.1%} with {len(tasks)} tasks"
        assert not any(loader.too_long)


# ---------------------------------------------------------------------------------------------------------------------
# Order, epochs and resuming, for both loaders


@both
def test_order_is_a_function_of_seed_and_epoch(kind, tmp_path):
    one, twin, other = (make(kind, tmp_path, seed=seed) for seed in (5, 5, 6))
    epochs = [list(one) for _ in range(3)]
    assert all(same(epoch, list(twin)) for epoch in epochs)
    assert not any(same(a, b) for a, b in itertools.combinations(epochs, 2))
    assert not same(epochs[0], list(other))


@both
def test_ranks_and_micro_batches_are_slices_of_one_effective_batch(kind, tmp_path):
    for options in ({"seed": 2}, {"seed": 3}):
        expected = rows_of_steps([make(kind, tmp_path, batch_size=8, **options)], 1)
        assert len(expected) > 1 and all(len(step) == 8 for step in expected)
        assert expected == rows_of_steps([make(kind, tmp_path, batch_size=2, grad_accum_steps=4, **options)], 4)
        for batch_size, accum in ((4, 1), (2, 2), (1, 4)):
            sizes = dict(batch_size=batch_size, grad_accum_steps=accum, world_size=2)
            ranks = [make(kind, tmp_path, rank=rank, **sizes, **options) for rank in range(2)]
            assert expected == rows_of_steps(ranks, accum)


@both
def test_state_in_the_middle_of_an_epoch_goes_on_exactly(kind, tmp_path):
    loader = make(kind, tmp_path, seed=4, grad_accum_steps=2)
    batches, states, iterator = [], [], iter(loader)
    for _ in range(3 * len(list(make(kind, tmp_path, grad_accum_steps=2)))):
        states.append(json.loads(json.dumps(loader.state_dict())))  # plain numbers
        try:
            batches.append(next(iterator))
        except StopIteration:
            iterator = iter(loader)
            batches.append(next(iterator))
    assert states[-1]["epoch"] == 2
    for k, state in enumerate(states):
        other = make(kind, tmp_path, seed=4, grad_accum_steps=2)
        other.load_state_dict(state)
        found = [b for _ in range(3) for b in other][: len(batches) - k]
        assert same(found, batches[k:]), f"after {k} batches"


@both
def test_state_goes_on_with_other_micro_batches_and_ranks(kind, tmp_path):
    loader = make(kind, tmp_path, batch_size=4, seed=1)
    iterator = iter(loader)
    next(iterator)
    rest = make(kind, tmp_path, batch_size=4, seed=1)
    expected = rows_of_steps([rest], 1)[1:]
    ranks = [make(kind, tmp_path, batch_size=1, grad_accum_steps=2, seed=1, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    assert len(expected) > 1 and rows_of_steps(ranks, 2) == expected


@both
def test_state_of_another_effective_batch_is_refused(kind, tmp_path):
    loader = make(kind, tmp_path, batch_size=4)
    with pytest.raises((DataError, ValueError)):
        make(kind, tmp_path, batch_size=2).load_state_dict(loader.state_dict())


@both
@pytest.mark.parametrize("train", [True, False])
def test_after_an_epoch_a_new_iterator_starts_the_next(kind, train, tmp_path):
    loader = make(kind, tmp_path, train=train)
    lengths = []
    for epoch in range(4):
        assert loader.epoch == epoch
        iterator = iter(loader)
        lengths.append(sum(1 for _ in iterator))
        with pytest.raises(StopIteration):
            next(iterator)
    assert lengths == lengths[:1] * 4 and lengths[0] > 1


@both
def test_next_batches_goes_on_over_the_ends_of_epochs(kind, tmp_path):
    loader = make(kind, tmp_path, grad_accum_steps=3)
    twin = make(kind, tmp_path, grad_accum_steps=3)
    expected = [b for _ in range(3) for b in twin]
    iterator, found = iter(loader), []
    while len(found) < len(expected):
        batches, iterator = next_batches(loader, iterator)
        assert len(batches) == 3
        found += batches
    assert same(found, expected) and loader.epoch == 2


def test_few_tasks_still_fill_an_effective_batch():
    loader = ArcDataLoader(random_tasks(3), 4, ROOMY, grad_accum_steps=2)
    assert [len(x) for x, _ in loader] == [4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing of an answer that will be scored


def equal_tasks(one, other):
    return [t.name for t in one] == [t.name for t in other] and all(
        same_pairs(a.pairs, b.pairs) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def official(arc_dir):
    return load_arc(arc_dir, 40, 30, "both")


@pytest.mark.parametrize("how", ["scrambled", "missing", "null"])
def test_evaluation_answers_are_never_read(arc_dir, official, how, tmp_path):
    rng = np.random.default_rng(0)
    shutil.copytree(arc_dir / "training", tmp_path / "training")
    (tmp_path / "evaluation").mkdir()
    for file in (arc_dir / "evaluation").glob("*.json"):
        task = json.loads(file.read_text(encoding="utf-8"))
        for test in task["test"]:
            if how == "missing":
                del test["output"]
            else:
                test["output"] = random_grid(rng, 30).tolist() if how == "scrambled" else None
        (tmp_path / "evaluation" / file.name).write_text(json.dumps(task), encoding="utf-8")
    found = load_arc(tmp_path, 40, 30, "both")
    assert equal_tasks(found.tasks, official.tasks) and equal_tasks(found.questions, official.questions)
    assert same_pairs(list(zip(found.answers, strict=True)), list(zip(official.answers, strict=True)))
    assert found.left_out == official.left_out


def test_answers_of_held_out_tasks_go_to_the_scorer_only(arc_dir, official):
    on_disk = read_split(arc_dir, "training")
    held = {q.name for q in official.questions}
    assert len(held) == 40 and len(official.questions) == len(official.answers) >= 40
    for question, answer in zip(official.questions, official.answers, strict=True):
        task = on_disk[question.name]
        assert same_pairs(question.pairs[:-1], task["train"]) and question.pairs[-1][1] is None
        assert any(same_pairs([(question.pairs[-1][0], answer)], [p]) for p in task["test"])
    tasks = {t.name: t for t in official.tasks}
    assert all(same_pairs(tasks[name].pairs, on_disk[name]["train"]) for name in held)
    evaluation = read_split(arc_dir, "evaluation")
    assert all(same_pairs(tasks[name].pairs, task["train"]) for name, task in evaluation.items())
    others = on_disk.keys() - held - set(SHARE_EVALUATION_PAIRS)
    assert all(same_pairs(tasks[name].pairs, on_disk[name]["train"] + on_disk[name]["test"]) for name in others)
    assert tasks.keys() == held | evaluation.keys() | others


def test_with_training_demonstrations_alone_nothing_of_held_out_or_evaluation_tasks_is_learned(arc_dir, official):
    found = load_arc(arc_dir, 40, 30, "training")
    assert equal_tasks(found.questions, official.questions)
    held = {q.name for q in found.questions}
    assert {t.name for t in found.tasks} == read_split(arc_dir, "training").keys() - held - set(SHARE_EVALUATION_PAIRS)


def test_official_training_tasks_that_repeat_evaluation_tests_are_left_out(arc_dir, official):
    names = {t.name for t in official.tasks} | {q.name for q in official.questions}
    assert not names & set(SHARE_EVALUATION_PAIRS)
    training, evaluation = read_split(arc_dir, "training"), read_split(arc_dir, "evaluation")
    asked = {canonical_hash(p) for t in evaluation.values() for p in t["test"]}
    learned = {canonical_hash(p) for t in official.tasks if t.name in training for p in t.pairs}
    assert not asked & learned
    for name in SHARE_EVALUATION_PAIRS:
        assert asked & {canonical_hash(p) for part in training[name].values() for p in part}


def test_holdout_is_chosen_by_name_alone_and_max_grid_keeps_small_tasks(arc_dir, official):
    held = {q.name for q in official.questions}
    assert held < {q.name for q in load_arc(arc_dir, 60, 30, "training").questions}
    most = {q.name for q in load_arc(arc_dir, 10_000, 30, "training").questions}
    assert held < most and len(most) < 398 / 2  # however many are asked for, tasks to learn from are left
    none = load_arc(arc_dir, 0, 30, "training")
    assert not none.questions and not none.answers and len(none.tasks) == 398
    small = load_arc(arc_dir, 40, 10, "both")
    assert all(max(g.shape) <= 10 for t in small.tasks for p in t.pairs for g in p)
    assert len(small.tasks) + small.left_out == 798


# ---------------------------------------------------------------------------------------------------------------------
# Text shards


@pytest.fixture
def counting(tmp_path):
    """Shards in both formats whose token at position i is i, so that every window can be told: 30, 17 and 9 windows."""
    write_shard(tmp_path / "a_train_000001.npy", np.arange(0, 481))
    write_shard(tmp_path / "a_train_000002.bin", np.arange(1000, 1000 + 16 * 17 + 15))
    write_shard(tmp_path / "a_train_000003.bin", np.arange(2000, 2000 + 16 * 9 + 1))
    write_shard(tmp_path / "a_val_000000.bin", np.arange(5000, 5000 + 16 * 5 + 1))
    return tmp_path


def windows(loader):
    """The first token of each window of an epoch."""
    return [int(row[0]) for x, _ in loader for row in x]


def test_text_windows_are_consecutive_tokens_and_targets_the_next_ones(counting):
    for x, y in FineWebLoader(counting, "train", 4, 16):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
        assert torch.equal(y, x + 1) and (x[:, 1:] == x[:, :-1] + 1).all()


def test_shards_stay_uint16_memory_maps(counting):
    loader = FineWebLoader(counting, "train", 4, 16)
    assert len(loader.shards) == 3
    for shard in loader.shards:
        assert isinstance(shard, np.memmap) and shard.dtype == np.uint16 and shard.itemsize == 2


def test_every_window_comes_exactly_once_an_epoch_in_a_new_order(counting):
    expected = [*range(0, 480, 16), *range(1000, 1272, 16), *range(2000, 2144, 16)]
    loader = FineWebLoader(counting, "train", 4, 16)
    epochs = [windows(loader) for _ in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert expected not in epochs and len({tuple(e) for e in epochs}) == 3
    assert len({e[0] // 1000 for e in (windows(FineWebLoader(counting, "train", 4, 16, seed=s)) for s in range(9))}) > 1
    assert epochs[0] == windows(FineWebLoader(counting, "train", 4, 16))
    assert epochs[0] != windows(FineWebLoader(counting, "train", 4, 16, seed=1))


def test_validation_shards_are_separate_and_in_order(counting):
    loader = FineWebLoader(counting, "val", 2, 16)
    assert [windows(loader) for _ in range(2)] == [list(range(5000, 5080, 16))] * 2


@pytest.mark.parametrize("accum", [1, 3])
def test_eight_ranks_stay_in_step_over_uneven_shards(counting, accum):
    ranks = [FineWebLoader(counting, "train", 1, 16, grad_accum_steps=accum, rank=r, world_size=8) for r in range(8)]
    for _ in range(2):
        epochs = [[(int(x[0, 0]), rank.state_dict()) for x, _ in rank] for rank in ranks]
        assert len({len(e) for e in epochs}) == 1 and len(epochs[0]) > 1
        assert all([s for _, s in e] == [s for _, s in epochs[0]] for e in epochs)
        seen = [w for e in epochs for w, _ in e]
        assert len(set(seen)) == len(seen) == 56 // (8 * accum) * 8 * accum


def spoil_npy_length(path):
    path.write_bytes(path.read_bytes()[:-10])


def spoil_npy_dtype(path):
    np.save(path, np.arange(900, dtype=np.int64))


def spoil_npy_shape(path):
    np.save(path, np.zeros((30, 30), np.uint16))


def spoil_npy_pickle(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def spoil_bin_length(path):
    path.write_bytes(path.read_bytes()[:-2])


def spoil_bin_longer(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def spoil_bin_magic(path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC + 1, 1, 900
    path.write_bytes(header.tobytes() + bytes(1800))


def spoil_bin_version(path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, 2, 900
    path.write_bytes(header.tobytes() + bytes(1800))


def spoil_bin_header(path):
    path.write_bytes(path.read_bytes()[:500])


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_npy_zip(path):
    with open(path, "wb") as file:
        np.savez(file, tokens=np.zeros(900, np.uint16))


def spoil_npy_damaged_zip(path):
    path.write_bytes(b"PK\x03\x04 was a zip once")


def spoil_npy_bare_pickle(path):
    path.write_bytes(pickle.dumps(list(range(100))))


@pytest.mark.parametrize("spoil", [f for name, f in list(globals().items()) if name.startswith("spoil_")],
                         ids=lambda f: f.__name__[6:].replace("_", " "))  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_shard_is_refused_by_name(spoil, split, tmp_path):
    write_text(tmp_path)
    for ending in (".npy", ".bin") if spoil is spoil_empty else (".bin",) if "_bin" in spoil.__name__ else (".npy",):
        path = write_shard(tmp_path / f"bad_{split}_000009{ending}", np.zeros(900))
        FineWebLoader(tmp_path, split, 1, 16)
        spoil(path)
        with pytest.raises(DataError) as caught:
            FineWebLoader(tmp_path, split, 1, 16)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        path.unlink()


def test_a_token_outside_the_vocabulary_is_refused_by_file(tmp_path):
    write_text(tmp_path)
    path = write_shard(tmp_path / "bad_train_000009.npy", np.full(900, 61))
    assert sum(1 for _ in FineWebLoader(tmp_path, "train", 1, 16, vocab_size=62))
    with pytest.raises(DataError, match="61 .*vocabulary of 61") as caught:
        list(FineWebLoader(tmp_path, "train", 1, 16, vocab_size=61))
    assert str(path) in str(caught.value)


def test_too_little_text_is_refused(tmp_path):
    write_shard(tmp_path / "t_train_0.npy", np.zeros(40))
    write_shard(tmp_path / "t_val_0.npy", np.zeros(10))
    FineWebLoader(tmp_path, "train", 2, 16)
    with pytest.raises(DataError, match="--batch-size or --block-size") as caught:
        FineWebLoader(tmp_path, "train", 3, 16)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="val"):
        FineWebLoader(tmp_path, "val", 1, 16)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_shards_says_where_to_read_on(split, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"data/README\.md") as caught:
            FineWebLoader(folder, split, 1, 16)
        assert str(folder) in str(caught.value)


def test_generated_tasks_share_their_original_s_token_and_its_fate(tmp_path):
    """`<task>-r000` is held out with <task>, is never a question itself, and speaks of the same task."""
    rng = np.random.default_rng(0)
    for task in random_tasks(12, seed=3, pairs=(3, 3)):
        for name in (task.name, f"{task.name}-r000", f"{task.name}-r001"):
            pairs = [(rng.integers(0, 10, (4, 4)), rng.integers(0, 10, (4, 4))) for _ in range(3)]
            path = tmp_path / "training" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(task_json(pairs)), encoding="utf-8")
    data = load_arc(tmp_path, holdout=3, max_grid=30, demonstrations="training")
    held = {q.name for q in data.questions}
    assert len(held) == 3 and not any("-r" in name for name in held)
    assert len(data.tasks) == 9 * 3 and not held & {t.name.split("-")[0] for t in data.tasks}
    names = sorted({origin(t.name) for t in data.tasks})
    loader = ArcDataLoader(data.tasks, 27, 512, task_tokens={name: 40 + i for i, name in enumerate(names)})
    loader.batches()
    tokens = {}
    for task, plan in zip(loader.tasks, loader.plans, strict=True):
        tokens.setdefault(origin(task.name), set()).add(plan[3])
    assert all(len(found - {UNKNOWN_TASK}) <= 1 for found in tokens.values()) and max(map(max, tokens.values())) >= 40
