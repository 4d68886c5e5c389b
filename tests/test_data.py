"""The two loaders: what a batch holds, in which order batches come, and what they may never show."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import differences, parse_pairs, random_grid, random_tasks, same_pairs, sequence, write_shard, write_text
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


def hashes(pairs):
    return [canonical_hash(pair) for pair in pairs]


@pytest.fixture(scope="module", params=["arc", "fineweb"])
def make(request, tmp_path_factory):
    """A function that makes a small loader of either kind; its 26 windows of text are no multiple of eight."""
    text = write_text(tmp_path_factory.mktemp("text"), tokens=290)

    def make(**options):
        options = dict(batch_size=2) | options
        if request.param == "arc":
            return ArcDataLoader(random_tasks(23), block_size=ROOMY, **options)
        return FineWebLoader(text, "train", block_size=16, **options)

    return make


# == WHAT A BATCH OF ARC TASKS HOLDS ==================================================================================


def expected_row(pairs, token, learned, width):
    """x and y of a task by the definition; the last so many of its outputs are to be learned."""
    s, y, end = sequence(pairs, token).tolist(), [IGNORE_INDEX] * width, 1
    for left, pair in zip(range(len(pairs), 0, -1), pairs, strict=True):
        end += pair_length(pair)
        first = end - pair[1].size - len(pair[1]) - 1  # behind the mark OUT
        if left <= learned:
            y[first - 1 : end - 1] = s[first:end]
    return s[:-1] + [0] * (width + 1 - len(s)), y


def views(task, shown):
    """(symmetry, order of its pairs) under which `shown` is the whole task, in other colours but for black."""
    for s, order in itertools.product(range(8), itertools.permutations(task.pairs)):
        pairs = zip(itertools.chain(*order), itertools.chain(*shown), strict=True)
        grids = [(apply_symmetry(g, s), other) for g, other in pairs]
        if all(g.shape == other.shape for g, other in grids):
            colours = {(0, 0)}.union(*(zip(g.flat, other.flat, strict=True) for g, other in grids))
            if len(colours) == len({a for a, _ in colours}) == len({b for _, b in colours}):
                yield s, order


def test_training_shows_all_pairs_of_a_task_in_one_view_and_supervises_every_output():
    tasks = {frozenset(hashes(t.pairs)): t for t in random_tasks(12, pairs=(2, 4))}
    loader, found, padded = ArcDataLoader(list(tasks.values()), 4, ROOMY), [], 0
    for x, y in loader:
        sequences, width = whole(x, y), x.shape[1]
        assert x.dtype == y.dtype == torch.int64 and len(x) == 4 and max(map(len, sequences)) == width + 1
        for row, target, s in zip(x.tolist(), y.tolist(), sequences, strict=True):
            pairs = parse_pairs(s)
            assert (row, target) == expected_row(pairs, UNKNOWN_TASK, len(pairs), width)
            task = tasks[frozenset(hashes(pairs))]
            assert list(views(task, pairs)), "not the whole task under one symmetry and one permutation of colours"
            found.append(task.name)
            padded += width + 1 - len(s)
    assert sorted(found) == sorted(t.name for t in tasks.values()) and padded == loader.padding > 0


def test_evaluation_shows_tasks_as_they_stand_and_supervises_the_last_output():
    tasks = random_tasks(10)
    for seed in (0, 1):
        loader = ArcDataLoader(tasks, 4, ROOMY, train=False, seed=seed, task_tokens={tasks[2].name: 18})
        for _ in range(2):  # epochs
            batches = list(loader)
            assert [len(x) for x, _ in batches] == [4, 4, 2]
            for i, task in enumerate(tasks):
                x, y = (part[i % 4].tolist() for part in batches[i // 4])
                assert (x, y) == expected_row(task.pairs, 18 if i == 2 else UNKNOWN_TASK, 1, len(x))


def test_each_epoch_draws_new_flips_colours_and_orders_over_everything_there_is():
    rng = np.random.default_rng(0)
    task = Task("one", [(random_grid(rng, 4, 3), random_grid(rng, 4, 3)) for _ in range(3)])

    def draw(seed):
        loader = ArcDataLoader([task], 1, ROOMY, seed=seed, task_tokens={"one": 17})
        return [whole(*batch)[0] for _ in range(120) for batch in loader]

    drawn = draw(seed=1)
    assert drawn == draw(seed=1) and drawn != draw(seed=2)
    seen = [next(views(task, parse_pairs(s))) for s in drawn]
    symmetries = Counter(s for s, _ in seen)
    assert sorted(symmetries) == list(range(8)) and max(symmetries.values()) < 40
    assert len({tuple(hashes(order)) for _, order in seen}) == 6
    assert len({tuple(s) for s in drawn}) > 110
    tokens = Counter(s[0] for s in drawn)
    assert sorted(tokens) == [UNKNOWN_TASK, 17] and 60 < tokens[17] < 110  # the task token is left out at times


@pytest.mark.parametrize("train", [True, False])
def test_beyond_the_block_whole_demonstrations_are_left_out_and_counted(train):
    tasks, block, names, shortened = random_tasks(40, pairs=(3, 6), largest=7), 120, [], 0
    loader = ArcDataLoader(tasks, 1, block, train=train, seed=3)
    named = {canonical_hash(p): t for t in tasks for p in t.pairs}
    for x, y in loader:
        (s,) = whole(x, y)
        pairs = parse_pairs(s)  # fails where a grid is cut
        shown, task = hashes(pairs), named[canonical_hash(pairs[0])]
        left = [p for p in task.pairs if canonical_hash(p) not in shown]
        assert s[-1] == END and x.shape[1] <= block
        assert set(shown) <= set(hashes(task.pairs)) and len(left) == len(task.pairs) - len(pairs)
        # kept while they fit: with the largest that is left out the row would be too long
        assert not left or x.shape[1] + max(map(pair_length, left)) > block
        assert train or same_pairs(pairs[-1:], loader.tasks[len(names)].pairs[-1:])
        names.append(task.name)
        shortened += bool(left)
    assert 0 < shortened < len(names) and shortened <= loader.shortened < len(names)
    assert train or shortened == loader.shortened
    assert sorted(names) == sorted(t.name for t in loader.tasks)


def test_no_turn_of_a_wide_pair_exceeds_the_block_and_what_never_fits_is_named():
    """A 1 x 20 grid takes 21 tokens, but 40 after a quarter turn."""
    rng = np.random.default_rng(0)
    tasks = [Task(f"wide{w}", [tuple(rng.integers(0, 10, (2, 1, w)).astype(np.uint8))] * 2) for w in range(10, 20)]
    loader = ArcDataLoader(tasks, 1, 3 + 2 * 2 * 15)
    assert loader.too_long == ["wide16", "wide17", "wide18", "wide19"] and len(loader.tasks) == 6
    assert max(x.shape[1] for _ in range(12) for x, _ in loader) <= loader.block_size
    with pytest.raises(UserError, match="--block-size 63"):
        ArcDataLoader(tasks[-2:], 1, 63)


def test_padding_is_under_15_percent_of_official_training_tokens(official):
    loader = ArcDataLoader(official.tasks, 16, 4096)
    assert list(loader) and loader.padding / loader.tokens < 0.15 and not loader.too_long


# == ORDER, EPOCHS AND RESUMING, OF BOTH LOADERS ======================================================================


def steps_of(loaders, count):
    """The rows of each of the next optimizer steps, over all ranks, however many epochs that takes."""
    iterators = [iter(loader) for loader in loaders]
    for _ in range(count):
        together = []
        for i, loader in enumerate(loaders):
            batches, iterators[i] = next_batches(loader, iterators[i])
            together.append(batches)
        yield [row for micro in zip(*together, strict=True) for batch in micro for row in whole(*batch)]


SLICES = st.sampled_from([(b, a, 8 // (b * a)) for b in (1, 2, 4, 8) for a in (1, 2, 4, 8) if b * a <= 8])


@settings(max_examples=12)
@example((8, 1, 1), (1, 2, 4), 2, 1)
@example((1, 1, 8), (2, 4, 1), 0, 2)
@example((1, 2, 4), (1, 2, 4), 4, 5)
@given(SLICES, SLICES, st.integers(0, 9), st.integers(0, 6))
def test_ranks_and_micro_batches_are_slices_of_one_order_that_a_resume_keeps(make, before, after, seed, steps):
    """Eight rows in any (micro-batch, accumulation, ranks), and from any step of any epoch on in any other."""

    def ranks(batch_size, accum, world):
        sizes = dict(batch_size=batch_size, grad_accum_steps=accum, world_size=world, seed=seed)
        return [make(rank=rank, **sizes) for rank in range(world)]

    (plain,) = ranks(8, 1, 1)
    expected = [whole(*batch) for _ in range(4) for batch in plain]
    began, others = ranks(*before), ranks(*after)
    assert len(expected) > 7 and all(len(step) == 8 for step in expected)
    assert list(steps_of(began, steps)) == expected[:steps]
    (state,) = {json.dumps(loader.state_dict()) for loader in began}  # plain numbers, the same on every rank
    for loader in others:
        loader.load_state_dict(json.loads(state))
    assert list(steps_of(others, len(expected) - steps)) == expected[steps:]
    assert {loader.epoch for loader in others} == {3}


@pytest.mark.parametrize("stop", [0, 2, 6])
def test_a_narrowed_loader_is_of_the_tasks_in_focus_from_the_next_batch_on(stop):
    """Wherever it is stopped and goes on: inside an epoch of 12 tasks, 6 batches; one of the 4 in focus has 2."""
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
    assert not differences(batches[:3], [x for x, _ in make()][:3])
    known = {row[0] for x in batches[3:] for row in x.tolist()} - {UNKNOWN_TASK}
    assert known <= {17, 18, 19, 20} and loader.epoch >= 3


def test_few_tasks_still_fill_an_effective_batch():
    assert [len(x) for x, _ in ArcDataLoader(random_tasks(3), 4, ROOMY, grad_accum_steps=2)] == [4, 4]


# == NOTHING OF AN ANSWER THAT WILL BE SCORED ==========================================================================


def equal_tasks(one, other):
    same_names = [t.name for t in one] == [t.name for t in other]
    return same_names and all(same_pairs(a.pairs, b.pairs) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def official(arc_dir):
    return load_arc(arc_dir, 40, 30, "both")


@pytest.fixture(scope="module")
def alone(arc_dir):
    """With training tasks to learn from, alone."""
    return load_arc(arc_dir, 40, 30, "training")


@pytest.fixture(scope="module")
def disk(arc_dir):
    return {split: read_split(arc_dir, split) for split in ("training", "evaluation")}


def test_evaluation_answers_are_never_read(arc_dir, official, tmp_path):
    """Scrambled, null or missing ones make no difference to anything."""
    rng = np.random.default_rng(0)
    (tmp_path / "training").symlink_to(arc_dir / "training")
    (tmp_path / "evaluation").mkdir()
    for file in (arc_dir / "evaluation").glob("*.json"):
        task = json.loads(file.read_text(encoding="utf-8"))
        for test in task["test"]:
            del test["output"]
            test |= [{}, {"output": None}, {"output": random_grid(rng, 30).tolist()}][rng.integers(3)]
        (tmp_path / "evaluation" / file.name).write_text(json.dumps(task), encoding="utf-8")
    found = load_arc(tmp_path, 40, 30, "both")
    assert equal_tasks(found.tasks, official.tasks) and equal_tasks(found.questions, official.questions)
    assert all(map(np.array_equal, found.answers, official.answers)) and len(found.answers) == len(official.answers)
    assert found.pairs == official.pairs and found.report == official.report


def test_answers_of_held_out_tasks_go_to_the_scorer_only(disk, official, alone):
    training, held = disk["training"], {q.name for q in alone.questions}
    others = {n: t["train"] + t["test"] for n, t in training.items() if n not in {*held, *SHARE_EVALUATION_PAIRS}}
    shown = {name: task["train"] for name, task in [*disk["evaluation"].items(), *((n, training[n]) for n in held)]}
    assert len(held) == 40 and alone.pairs == sorted({h for t in alone.tasks for h in hashes(t.pairs)})
    for found, expected in ((official, others | shown), (alone, others)):
        assert equal_tasks(found.tasks, [Task(name, expected[name]) for name in sorted(expected)])
        for question, answer in zip(found.questions, found.answers, strict=True):
            task, (query, hidden) = training[question.name], question.pairs[-1]
            assert same_pairs(question.pairs[:-1], task["train"]) and hidden is None
            assert any(same_pairs([(query, answer)], [p]) for p in task["test"])


def test_a_held_out_answer_that_is_also_learned_is_not_asked(official, alone):
    """One official answer equals, up to symmetry and colours, a demonstration that only "both" learns from."""
    kept = [q for q, answer in zip(alone.questions, alone.answers, strict=True)
            if canonical_hash((q.pairs[-1][0], answer)) not in official.pairs]
    assert equal_tasks(kept, official.questions) and len(kept) == len(alone.questions) - 1


def test_official_training_tasks_that_repeat_evaluation_tests_are_left_out(disk, alone):
    asked = {h for t in disk["evaluation"].values() for h in hashes(t["test"])}
    assert not asked & {*alone.pairs, *(h for q in alone.questions for h in hashes(q.pairs[:-1]))}
    for name in SHARE_EVALUATION_PAIRS:
        assert asked & {h for pairs in disk["training"][name].values() for h in hashes(pairs)}
        assert name not in {t.name for t in alone.tasks + alone.questions}


def test_tasks_are_held_out_by_name_together_with_what_was_generated_from_them(tmp_path):
    """`<task>-r000` is held out with <task>, is never a question itself, and has the same token."""
    names = [f"task{task:02}{kind}" for task in range(12) for kind in ("", "-r000", "-r001")]
    made = dict(zip(names, random_tasks(36, pairs=(3, 3)), strict=True))
    (tmp_path / "training").mkdir()
    for name, task in made.items():
        pairs = [{"input": question.tolist(), "output": answer.tolist()} for question, answer in task.pairs]
        text = json.dumps({"train": pairs[:2], "test": pairs[2:]})
        (tmp_path / "training" / f"{name}.json").write_text(text, encoding="utf-8")
    held = [{q.name for q in load_arc(tmp_path, count, 30, "training").questions} for count in (0, 1, 2, 99)]
    assert held[0] < held[1] < held[2] < held[3] < set(names[::3]) and len(held[3]) == 3  # of twelve, a quarter
    small = load_arc(tmp_path, 0, 5, "training")
    assert [t.name for t in small.tasks] == [name for name, task in made.items() if task.largest() <= 5]
    assert f"left out: {36 - len(small.tasks)} tasks" in small.report and 0 < len(small.tasks) < 36
    data = load_arc(tmp_path, 3, 30, "training")
    assert [t.name for t in data.tasks] == [name for name in names if name[:6] not in held[3]]
    known = {name: 40 + i for i, name in enumerate(names[::3])}
    loader, tokens = ArcDataLoader(data.tasks, 27, 512, task_tokens=known), set()
    for plan in (plan for batch in loader.batches() for row in batch for plan in row):
        assert plan.token in (known[base_task(loader.tasks[plan.task].name)], UNKNOWN_TASK)
        tokens.add(plan.token)
    assert len(tokens) > 5


# == TEXT SHARDS ======================================================================================================


def windows(loader):
    """The first token of each window of an epoch."""
    return [int(row[0]) for x, _ in loader for row in x]


def test_every_window_comes_exactly_once_per_epoch_in_a_new_order(tmp_path):
    """Of shards in both formats, of 30, 17, 9 and 5 windows, whose tokens say where they stand."""
    for name, first, tokens in (("train_1.npy", 0, 16 * 30 + 1), ("train_2.bin", 1000, 16 * 17 + 15),
                                ("train_3.bin", 2000, 16 * 9 + 1), ("val_0.bin", 5000, 16 * 5 + 1)):  # fmt: skip
        write_shard(tmp_path / name, np.arange(first, first + tokens))
    loader = FineWebLoader(tmp_path, "train", 4, 16)
    for x, y in loader:
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 16)
        assert torch.equal(y, x + 1) and (x[:, 1:] == x[:, :-1] + 1).all()  # consecutive tokens, and the next ones
    in_memory = [v for shard in loader.shards for v in vars(shard).values() if isinstance(v, np.ndarray)]
    assert len(loader.shards) == 3 and not in_memory
    epochs = [windows(loader) for _ in range(3)]
    expected = [*range(0, 480, 16), *range(1000, 1272, 16), *range(2000, 2144, 16)]
    assert all(sorted(epoch) == expected != epoch for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    seeds = [windows(FineWebLoader(tmp_path, "train", 4, 16, seed=s)) for s in range(9)]
    assert len({e[0] // 1000 for e in seeds}) > 1 and seeds[0] != seeds[1]  # shards are shuffled, too
    validation = FineWebLoader(tmp_path, "val", 2, 16)
    assert [windows(validation) for _ in range(2)] == [list(range(5000, 5080, 16))] * 2


def test_text_that_cannot_be_used_is_refused_by_file(tmp_path):
    """Whatever may be wrong with a file, tests/test_data_files.py asks; here, that no loader passes over one."""
    good = write_shard(write_text(tmp_path) / "t_val_000001.npy", np.zeros(900))
    bad = write_shard(tmp_path / "t_train_000009.npy", np.full(900, 61))
    assert list(FineWebLoader(tmp_path, "train", 187 + 93 + 56, 16, vocab_size=62))
    with pytest.raises(UserError, match=f"{bad}.* 61 .*vocabulary of 61"):
        list(FineWebLoader(tmp_path, "train", 1, 16, vocab_size=61))
    for split, rows, block in (("train", 337, 16), ("val", 1, 900)):
        with pytest.raises(UserError, match=f"{tmp_path}: .* {split} .*--batch-size or --block-size"):
            FineWebLoader(tmp_path, split, rows, block)
    for path, split in ((bad, "train"), (good, "val")):
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(UserError, match=str(path)):
            FineWebLoader(tmp_path, split, 1, 16)
