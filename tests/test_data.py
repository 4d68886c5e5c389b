"""The two loaders: what a batch holds, in which order batches come, and what they may never show."""

import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import parse_pairs, random_grid, random_tasks, same_pairs, sequence, task_json, write_shard, write_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arc_data.tasks import SHARE_EVALUATION_PAIRS, Task, apply_symmetry, base_task, canonical_hash, load_arc, read_split
from data.files import UserError
from train import END, IGNORE_INDEX, UNKNOWN_TASK, ArcDataLoader, FineWebLoader, next_batches, pair_length

ROOMY = 4096  # a block size that every small task fits


def whole(x, y):
    """The unpadded sequences of a batch, each with its last token, which only y holds."""
    found = []
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        last = max(t for t, v in enumerate(target) if v != IGNORE_INDEX)
        found.append([*row[: last + 1], target[last]])
    return found


def rows_of_steps(loaders):
    """The rows of each optimizer step of what is left of an epoch, over all ranks, in no order inside a step."""
    epochs, accum = [list(loader) for loader in loaders], loaders[0].accum
    batches = [[whole(*b) for b in together] for together in zip(*epochs, strict=True)]  # or ranks fall out of step
    rows = [list(itertools.chain(*together)) for together in batches]
    return [sorted(itertools.chain(*rows[i : i + accum])) for i in range(0, len(rows), accum)]


def same(one, other):
    """Whether two lists of batches are equal."""
    return len(one) == len(other) and all(torch.equal(a, b)
                                          for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a few windows of text, in shards of 38 and 19, which eight rows do not divide."""
    return write_text(tmp_path_factory.mktemp("text"), tokens=620)


@pytest.fixture(scope="module", params=["arc", "fineweb"])
def make(request, text):
    """A function that makes a small loader of either kind."""

    def make(train=True, **options):
        options = dict(batch_size=2) | options
        if request.param == "arc":
            return ArcDataLoader(random_tasks(23), block_size=ROOMY, train=train, **options)
        return FineWebLoader(text, "train" if train else "val", block_size=16, **options)

    return make


# == WHAT A BATCH OF ARC TASKS HOLDS ==================================================================================


def recoloured(one, other):
    """Whether one permutation of the colours, which keeps black, turns one list of grids into the other."""
    if [g.shape for g in one] != [g.shape for g in other]:
        return False
    cells = (np.concatenate([g.ravel() for g in grids]).tolist() for grids in (one, other))
    table = set(zip(*cells, strict=True)) | {(0, 0)}
    return len(table) == len({a for a, _ in table}) == len({b for _, b in table})


def views(task, shown):
    """The symmetries under which `shown` is all of the task's pairs, in some order, with one recolouring."""
    for s, order in itertools.product(range(8), itertools.permutations(task.pairs)):
        if recoloured([apply_symmetry(g, s) for pair in order for g in pair], [g for pair in shown for g in pair]):
            yield s, order


def test_training_shows_all_pairs_of_a_task_in_one_view_and_supervises_every_output():
    """Rows are padded on the right to the longest, with zeros in x and IGNORE_INDEX in y."""
    tasks = {frozenset(canonical_hash(p) for p in t.pairs): t for t in random_tasks(12, pairs=(2, 4))}
    loader, found, padded = ArcDataLoader(list(tasks.values()), 4, ROOMY), [], 0
    for x, y in loader:
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, x.shape[1])
        sequences = whole(x, y)
        assert max(map(len, sequences)) == x.shape[1] + 1
        for row, target, s in zip(x.tolist(), y.tolist(), sequences, strict=True):
            pads, pairs = x.shape[1] - len(s) + 1, parse_pairs(s)
            assert row == [*s[:-1], *[0] * pads] and target[len(s) - 1 :] == [IGNORE_INDEX] * pads
            outputs = [sequence([(o[:0], o)])[3:].tolist() for _, o in pairs]  # without task token, IN and OUT
            assert [v for v in target if v != IGNORE_INDEX] == list(itertools.chain(*outputs))
            assert all(target[t] in (s[t + 1], IGNORE_INDEX) for t in range(len(s) - 1))
            task = tasks[frozenset(canonical_hash(p) for p in pairs)]
            assert list(views(task, pairs)), "not the whole task under one symmetry and one permutation of colours"
            found.append(task.name)
            padded += pads
    assert sorted(found) == sorted(t.name for t in tasks.values()) and padded == loader.padding > 0


def test_evaluation_shows_tasks_as_they_stand_and_supervises_the_last_output():
    """Never shuffled or augmented. x and y are one sequence, shifted; `x[1:] + [0]` would add and not append."""
    tasks = random_tasks(10)
    for seed in (0, 1):
        loader = ArcDataLoader(tasks, 4, ROOMY, train=False, seed=seed, task_tokens={tasks[2].name: 18})
        for _ in range(2):  # epochs
            batches = list(loader)
            assert [len(x) for x, _ in batches] == [4, 4, 2]
            for i, task in enumerate(tasks):
                x, y = (part[i % 4].tolist() for part in batches[i // 4])
                s, (question, _) = sequence(task.pairs, 18 if i == 2 else UNKNOWN_TASK).tolist(), task.pairs[-1]
                answer, pads = pair_length(task.pairs[-1]) - 2 - question.size - len(question), len(x) - len(s) + 1
                assert x == s[:-1] + [0] * pads
                assert y == [IGNORE_INDEX] * (len(s) - 1 - answer) + s[-answer:] + [IGNORE_INDEX] * pads


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


@pytest.mark.parametrize("train", [True, False])
def test_beyond_the_block_whole_demonstrations_are_left_out_and_counted(train):
    tasks, block, shown = random_tasks(40, pairs=(3, 6), largest=7), 120, []
    loader = ArcDataLoader(tasks, 1, block, train=train, seed=3)
    named = {canonical_hash(p): t for t in tasks for p in t.pairs}
    for x, y in loader:
        (s,) = whole(x, y)
        pairs = parse_pairs(s)  # fails where a grid is cut
        found = {canonical_hash(p) for p in pairs}
        task = named[canonical_hash(pairs[0])]
        assert s[-1] == END and x.shape[1] <= block and sum(map(pair_length, pairs)) == len(s) - 1
        left = [p for p in task.pairs if canonical_hash(p) not in found]
        assert found <= {canonical_hash(p) for p in task.pairs} and len(left) == len(task.pairs) - len(pairs)
        # kept while they fit: with the largest that is left out the row would be too long
        assert not left or x.shape[1] + max(map(pair_length, left)) > block
        assert train or same_pairs(pairs[-1:], loader.tasks[len(shown)].pairs[-1:])
        shown.append((task.name, len(left)))
    assert 0 < sum(n > 0 for _, n in shown) <= loader.shortened < len(loader.tasks)
    assert train or loader.shortened == sum(n > 0 for _, n in shown)
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
    with pytest.raises(UserError, match="--block-size 50"):
        ArcDataLoader(tasks[2:3], 2, 50)


def test_padding_is_under_15_percent_of_official_training_tokens(arc_dir):
    loader = ArcDataLoader(load_arc(arc_dir, 40, 30, "both").tasks, 16, 4096)
    assert list(loader) and loader.padding / loader.tokens < 0.15 and not loader.too_long


# == ORDER, EPOCHS AND RESUMING, OF BOTH LOADERS ======================================================================


SLICES = st.sampled_from([(b, a, 8 // (b * a)) for b in (1, 2, 4, 8) for a in (1, 2, 4, 8) if b * a <= 8])


@settings(max_examples=8)
@example((8, 1, 1), (1, 2, 4), 2, 1)
@example((1, 1, 8), (2, 4, 1), 0, 2)
@given(SLICES, SLICES, st.integers(0, 9), st.integers(0, 2))
def test_ranks_and_micro_batches_are_slices_of_one_order_that_a_resume_keeps(make, before, after, seed, steps):
    """Eight rows in any (micro-batch, accumulation, ranks), and from any step on in any other."""

    def ranks(batch_size, accum, world):
        sizes = dict(batch_size=batch_size, grad_accum_steps=accum, world_size=world, seed=seed)
        return [make(rank=rank, **sizes) for rank in range(world)]

    expected, began, others = rows_of_steps(ranks(8, 1, 1)), ranks(*before), ranks(*after)
    assert len(expected) > 1 and all(len(step) == 8 for step in expected)
    for loader in began:
        list(itertools.islice(loader, steps * loader.accum))
    assert len({json.dumps(loader.state_dict()) for loader in began}) == 1, "ranks disagree on where they are"
    for loader in others:
        loader.load_state_dict(began[0].state_dict())
    assert rows_of_steps(others) == expected[steps:] and rows_of_steps(ranks(*before)) == expected


def test_state_in_the_middle_of_an_epoch_goes_on_exactly(make):
    loader = make(seed=4, grad_accum_steps=2)
    batches, states, iterator = [], [], iter(loader)
    for _ in range(3 * len(list(make(grad_accum_steps=2)))):
        states.append(json.loads(json.dumps(loader.state_dict())))  # plain numbers
        try:
            batches.append(next(iterator))
        except StopIteration:
            iterator = iter(loader)
            batches.append(next(iterator))
    assert states[-1]["epoch"] == 2
    for k, state in enumerate(states):
        other = make(seed=4, grad_accum_steps=2)
        other.load_state_dict(state)
        found = [b for _ in range(3) for b in other][: len(batches) - k]
        assert same(found, batches[k:]), f"after {k} batches"


def test_next_batches_goes_on_over_the_ends_of_epochs(make):
    loader, other = make(grad_accum_steps=3), make(grad_accum_steps=3)
    expected = [b for _ in range(3) for b in other]
    iterator, found = iter(loader), []
    while len(found) < len(expected):
        batches, iterator = next_batches(loader, iterator)
        assert len(batches) == 3
        found += batches
    assert same(found, expected) and loader.epoch == 2


@pytest.mark.parametrize("stop", [0, 2, 6])
def test_a_narrowed_loader_is_of_the_tasks_in_focus_from_the_next_epoch_on(stop):
    """Wherever the run is stopped and goes on; an epoch of 12 tasks has 6 batches, one of the 4 in focus has 2."""
    tasks = random_tasks(12)

    def make():
        loader = ArcDataLoader(tasks, 2, ROOMY, task_tokens={t.name: 17 + i for i, t in enumerate(tasks)})
        loader.focus = {t.name for t in tasks[:4]} | {"not here"}
        return loader

    loader, batches = make(), []
    iterator = iter(loader)
    for step in range(12):
        if step == stop:
            state, loader = loader.state_dict(), make()
            loader.load_state_dict(state)
            iterator = iter(loader)
        loader.narrow = step > 2
        found, iterator = next_batches(loader, iterator)
        batches.append(found[0][0])
    alone = make()
    assert all(torch.equal(x, y) for x, (y, _) in zip(batches[:6], alone, strict=True))
    assert len({tuple(row) for x in batches[:6] for row in x.tolist()}) == 12
    known = {row[0] for x in batches[6:] for row in x.tolist()} - {UNKNOWN_TASK}
    assert known <= {17, 18, 19, 20} and loader.epoch >= 3


def test_few_tasks_still_fill_an_effective_batch():
    loader = ArcDataLoader(random_tasks(3), 4, ROOMY, grad_accum_steps=2)
    assert [len(x) for x, _ in loader] == [4, 4]


# == NOTHING OF AN ANSWER THAT WILL BE SCORED ==========================================================================


def equal_tasks(one, other):
    names = [[t.name for t in tasks] for tasks in (one, other)]
    return names[0] == names[1] and all(same_pairs(a.pairs, b.pairs) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def official(arc_dir):
    return load_arc(arc_dir, 40, 30, "both")


@pytest.fixture(scope="module")
def alone(arc_dir):
    """With training tasks to learn from, alone."""
    return load_arc(arc_dir, 40, 30, "training")


def test_evaluation_answers_are_never_read(arc_dir, official, tmp_path):
    """Scrambled, null or missing ones make no difference to anything."""
    rng = np.random.default_rng(0)
    shutil.copytree(arc_dir / "training", tmp_path / "training")
    (tmp_path / "evaluation").mkdir()
    for file in (arc_dir / "evaluation").glob("*.json"):
        task = json.loads(file.read_text(encoding="utf-8"))
        for test in task["test"]:
            if (kind := rng.integers(3)) == 0:
                del test["output"]
            else:
                test["output"] = random_grid(rng, 30).tolist() if kind == 1 else None
        (tmp_path / "evaluation" / file.name).write_text(json.dumps(task), encoding="utf-8")
    found = load_arc(tmp_path, 40, 30, "both")
    assert equal_tasks(found.tasks, official.tasks) and equal_tasks(found.questions, official.questions)
    assert same_pairs(list(zip(found.answers, strict=True)), list(zip(official.answers, strict=True)))
    assert found.pairs == official.pairs and found.report == official.report


def test_answers_of_held_out_tasks_go_to_the_scorer_only(arc_dir, official, alone):
    on_disk, held = read_split(arc_dir, "training"), {q.name for q in alone.questions}
    assert len(held) == 40
    for found in (official, alone):
        assert found.pairs == sorted({canonical_hash(p) for t in found.tasks for p in t.pairs})
        for question, answer in zip(found.questions, found.answers, strict=True):
            task = on_disk[question.name]
            assert same_pairs(question.pairs[:-1], task["train"]) and question.pairs[-1][1] is None
            assert any(same_pairs([(question.pairs[-1][0], answer)], [p]) for p in task["test"])
    others = {n: t["train"] + t["test"] for n, t in on_disk.items() if n not in {*held, *SHARE_EVALUATION_PAIRS}}
    shown = {name: on_disk[name]["train"] for name in held}
    shown |= {name: task["train"] for name, task in read_split(arc_dir, "evaluation").items()}
    for found, expected in ((official, others | shown), (alone, others)):
        tasks = {t.name: t.pairs for t in found.tasks}
        assert tasks.keys() == expected.keys() and all(same_pairs(tasks[name], expected[name]) for name in expected)


def test_a_held_out_answer_that_is_also_learned_is_not_asked(official, alone):
    """One official answer equals, up to symmetry and colours, a demonstration that only "both" learns from."""
    kept = [q for q, answer in zip(alone.questions, alone.answers, strict=True)
            if canonical_hash((q.pairs[-1][0], answer)) not in official.pairs]
    assert equal_tasks(kept, official.questions) and len(kept) == len(alone.questions) - 1


def test_official_training_tasks_that_repeat_evaluation_tests_are_left_out(arc_dir, official):
    names = {t.name for t in official.tasks} | {q.name for q in official.questions}
    assert not names & set(SHARE_EVALUATION_PAIRS)
    training, evaluation = read_split(arc_dir, "training"), read_split(arc_dir, "evaluation")
    asked = {canonical_hash(p) for t in evaluation.values() for p in t["test"]}
    learned = {canonical_hash(p) for t in official.tasks if t.name in training for p in t.pairs}
    assert not asked & learned
    for name in SHARE_EVALUATION_PAIRS:
        assert asked & {canonical_hash(p) for part in training[name].values() for p in part}


def test_holdout_is_chosen_by_name_alone_and_max_grid_keeps_small_tasks(arc_dir, alone):
    held = {q.name for q in alone.questions}
    assert held < {q.name for q in load_arc(arc_dir, 60, 30, "training").questions}
    most = {q.name for q in load_arc(arc_dir, 10_000, 30, "training").questions}
    assert held < most and len(most) < 398 / 2  # however many are asked for, tasks to learn from are left
    none = load_arc(arc_dir, 0, 30, "training")
    assert not none.questions and not none.answers and len(none.tasks) == 398
    small = load_arc(arc_dir, 40, 10, "both")
    assert all(max(g.shape) <= 10 for t in small.tasks for p in t.pairs for g in p)
    assert len(small.tasks) + int(re.search(r"left out: (\d+) tasks", small.report)[1]) == 798


# == TEXT SHARDS ======================================================================================================


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


def test_every_window_comes_exactly_once_per_epoch_in_a_new_order(counting):
    loader, expected = FineWebLoader(counting, "train", 4, 16), [*range(0, 480, 16), *range(1000, 1272, 16),
                                                                 *range(2000, 2144, 16)]  # fmt: skip
    for x, y in loader:
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
        assert torch.equal(y, x + 1) and (x[:, 1:] == x[:, :-1] + 1).all()  # consecutive tokens, and the next ones
    in_memory = [v for shard in loader.shards for v in vars(shard).values() if isinstance(v, np.ndarray)]
    assert len(loader.shards) == 3 and not in_memory
    epochs = [windows(loader) for _ in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert expected not in epochs and len({tuple(e) for e in epochs}) == 3
    seeds = [windows(FineWebLoader(counting, "train", 4, 16, seed=s)) for s in range(9)]
    assert len({e[0] // 1000 for e in seeds}) > 1 and seeds[0] != seeds[1]  # shards are shuffled, too
    validation = FineWebLoader(counting, "val", 2, 16)
    assert [windows(validation) for _ in range(2)] == [list(range(5000, 5080, 16))] * 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_shard_is_refused_by_name(split, tmp_path):
    """Whatever is in a file, tests/test_data_files.py asks; here, that no loader passes over one of a folder."""
    path = write_shard(write_text(tmp_path) / f"bad_{split}_000009.npy", np.zeros(900))
    FineWebLoader(tmp_path, split, 1, 16)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=str(path)):
        FineWebLoader(tmp_path, split, 1, 16)


def test_a_token_outside_the_vocabulary_is_refused_by_file(tmp_path):
    write_text(tmp_path)
    path = write_shard(tmp_path / "bad_train_000009.npy", np.full(900, 61))
    assert sum(1 for _ in FineWebLoader(tmp_path, "train", 1, 16, vocab_size=62))
    with pytest.raises(UserError, match=f"{path}.* 61 .*vocabulary of 61"):
        list(FineWebLoader(tmp_path, "train", 1, 16, vocab_size=61))


def test_too_little_text_is_refused(tmp_path):
    write_shard(tmp_path / "t_train_0.npy", np.zeros(40))
    write_shard(tmp_path / "t_val_0.npy", np.zeros(10))
    FineWebLoader(tmp_path, "train", 2, 16)
    with pytest.raises(UserError, match=f"{tmp_path}.*--batch-size or --block-size"):
        FineWebLoader(tmp_path, "train", 3, 16)
    with pytest.raises(UserError, match="val"):
        FineWebLoader(tmp_path, "val", 1, 16)


def test_generated_tasks_share_their_original_s_token_and_its_fate(tmp_path):
    """`<task>-r000` is held out with <task>, is never a question itself, and speaks of the same task."""
    (tmp_path / "training").mkdir()
    for task, kind in itertools.product(range(12), ("", "-r000", "-r001")):
        (made,) = random_tasks(1, seed=100 * task + len(kind) + ord(kind[-1:] or "0"), pairs=(3, 3))
        file = tmp_path / "training" / f"task{task:02}{kind}.json"
        file.write_text(json.dumps(task_json(made.pairs)), encoding="utf-8")
    data = load_arc(tmp_path, holdout=3, max_grid=30, demonstrations="training")
    held = {q.name for q in data.questions}
    assert len(held) == 3 and not any("-r" in name for name in held)
    assert len(data.tasks) == 9 * 3 and not held & {t.name.split("-")[0] for t in data.tasks}
    names = sorted({base_task(t.name) for t in data.tasks})
    loader = ArcDataLoader(data.tasks, 27, 512, task_tokens={name: 40 + i for i, name in enumerate(names)})
    tokens = {}
    for plan in (plan for batch in loader.batches() for row in batch for plan in row):
        tokens.setdefault(base_task(loader.tasks[plan.task].name), set()).add(plan.token)
    assert all(len(found - {UNKNOWN_TASK}) <= 1 for found in tokens.values()) and max(map(max, tokens.values())) >= 40
