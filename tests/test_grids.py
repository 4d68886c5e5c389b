"""Grids as tokens: there and back, symmetries, colours, and where every token stands."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import one_thread, random_grid, sequence  # noqa: F401
from hypothesis import example, given
from hypothesis import strategies as st

from arc_data.layout import END, HINTS, IN, OUT, ROW, SIGHTS, GridLayout
from arc_data.tasks import apply_symmetry, canonical_hash, random_colours, read_split
from extras.views import View
from train import UNKNOWN_TASK, decode_grid, encode_grid, encode_pairs, pair_length


def make_grid(height, width, seed):
    return np.random.default_rng(seed).integers(0, 10, (height, width)).astype(np.uint8)


seeds = st.integers(0, 1000)
grids = st.builds(make_grid, st.integers(1, 30), st.integers(1, 30), seeds)
small_grids = st.builds(make_grid, st.integers(1, 5), st.integers(1, 5), seeds)


@pytest.fixture(scope="module")
def official(arc_dir, arc2_dir):
    """Every task of both versions: (name, demonstrations, tests)."""
    splits = [read_split(folder, split) for folder in (arc_dir, arc2_dir) for split in ("training", "evaluation")]
    assert [len(s) for s in splits] == [400, 400, 1000, 120]
    return [(name, task["train"], task["test"]) for split in splits for name, task in split.items()]


# == THERE AND BACK ===================================================================================================


def test_every_official_task_encodes_and_decodes_to_itself(official):
    for name, demonstrations, tests in official:
        for query, answer in tests:
            pairs = [*demonstrations, (query, answer)]
            tokens, answers = encode_pairs(pairs, UNKNOWN_TASK)
            assert tokens.dtype == np.int64 and np.array_equal(tokens, sequence(pairs)), name
            prompt, shown = encode_pairs([*demonstrations, (query, None)], UNKNOWN_TASK)
            assert np.array_equal(tokens[: len(prompt)], prompt) and prompt[-1] == OUT, name
            assert np.array_equal(answers[: len(shown)], shown) and answers[len(prompt) :].all(), name
            assert np.array_equal(decode_grid(tokens[len(prompt) :]), answer), name
            assert len(tokens) == 1 + sum(map(pair_length, pairs))


def test_the_sequence_is_the_one_that_the_design_draws():
    pairs = [(np.array([[1, 2]]), np.array([[3], [4]])), (np.array([[5]]), np.array([[6, 7]]))]
    tokens, answer = encode_pairs(pairs, 19)
    assert tokens.tolist() == [19, IN, 1, 2, ROW, OUT, 3, ROW, 4, ROW, END, IN, 5, ROW, OUT, 6, 7, ROW, END]
    assert tokens[answer].tolist() == [3, ROW, 4, ROW, END, 6, 7, ROW, END]
    assert encode_grid(np.array([[0, 9], [9, 0]])).tolist() == [0, 9, ROW, 9, 0, ROW]


@given(pair=st.tuples(grids, grids), symmetry=st.integers(0, 7))
def test_the_length_of_a_pair_is_known_before_it_is_turned(pair, symmetry):
    tokens, _ = encode_pairs([tuple(apply_symmetry(g, symmetry) for g in pair)], UNKNOWN_TASK)
    assert len(tokens) == 1 + pair_length(pair, turned=symmetry % 2)


@example(make_grid(30, 30, 0), [])  # the largest
@example(make_grid(1, 1, 0), [5, IN, END, 3])
@given(grids, st.lists(st.integers(0, 16), max_size=9))
def test_an_answer_is_read_back_up_to_its_end(grid, behind):
    tokens = [*encode_grid(grid).tolist(), END, *behind]
    assert np.array_equal(decode_grid(tokens), grid) and decode_grid(torch.tensor(tokens)).dtype == np.uint8


def spelled(tokens):
    """The rows that an answer spells, or None: read token by token, as a person would."""
    rows, row = [], []
    for t in tokens:
        if t == END:
            right = rows and not row and {len(r) for r in rows} == {len(rows[0])}
            return rows if right and 1 <= len(rows) <= 30 and 1 <= len(rows[0]) <= 30 else None
        if t == ROW:
            rows, row = [*rows, row], []
        elif t < 10:
            row = [*row, t]
        else:
            return None
    return None


NO_GRIDS = {
    "no end": [1, 2, ROW],
    "nothing": [],
    "only end": [END],
    "an empty row": [ROW, END],
    "two empty rows": [ROW, ROW, END],
    "no row mark": [1, 2, END],
    "last row without mark": [1, 2, ROW, 3, 4, END],
    "ragged": [1, 2, ROW, 3, ROW, END],
    "empty last row": [1, ROW, ROW, END],
    "31 rows": [1, ROW] * 31 + [END],
    "31 columns": [1] * 31 + [ROW, END],
    **{f"token {t} inside": [1, t, ROW, END] for t in (IN, OUT, 14, 15, UNKNOWN_TASK)},
}


@pytest.mark.parametrize("what", NO_GRIDS)
def test_what_is_no_grid_is_refused(what):
    assert decode_grid(NO_GRIDS[what]) is None


@given(st.lists(st.sampled_from([0, 3, 9, ROW, ROW, END, IN, 15, UNKNOWN_TASK]), max_size=9)
       | st.lists(st.sampled_from([[1, ROW], [2, 3, ROW], [END], [OUT]]), max_size=5).map(lambda v: sum(v, [])))
def test_only_what_spells_a_grid_is_one(tokens):
    found = decode_grid(tokens)
    assert (None if found is None else found.tolist()) == spelled(tokens)


# == SYMMETRIES AND COLOURS ===========================================================================================


@given(grids, st.integers(0, 7), seeds)
def test_every_symmetry_and_every_permutation_of_colours_has_its_inverse(grid, symmetry, seed):
    view = View(symmetry, random_colours(np.random.default_rng(seed)), [])
    assert view.colours[0] == 0 and sorted(view.colours) == list(range(10)), "black stays black"
    assert np.array_equal(view.undo(view.show(grid)), grid) and np.array_equal(view.show(view.undo(grid)), grid)


def test_the_symmetries_are_the_eight_of_the_square():
    grid = np.arange(6).reshape(2, 3)
    images = [apply_symmetry(grid, s).tolist() for s in range(8)]
    assert images[0] == grid.tolist()
    assert sorted(images) == sorted(f(g).tolist() for g in (grid, grid.T) for f in (
        lambda g: g, lambda g: g[::-1], lambda g: g[:, ::-1], lambda g: g[::-1, ::-1]))


def test_colour_permutations_are_many():
    rng = np.random.default_rng(3)
    tables = [random_colours(rng) for _ in range(50)]
    assert len({t.tobytes() for t in tables}) > 45
    assert {int(t[1]) for t in tables} == set(range(1, 10)), "colour 1 never becomes some of the nine"


# == NAMES OF PAIRS ===================================================================================================


@given(small_grids, small_grids, st.permutations(range(10)))  # black may change too
def test_a_pair_has_one_name_under_all_symmetries_and_colourings(question, answer, colours):
    images = [tuple(np.array(colours, np.uint8)[apply_symmetry(g, s)] for g in (question, answer)) for s in range(8)]
    assert {canonical_hash(image) for image in images} == {canonical_hash((question, answer))}


def test_different_pairs_have_different_names():
    rng = np.random.default_rng(5)
    grid, other = random_grid(rng, 5, 5), random_grid(rng, 5, 5)
    flat = np.arange(6, dtype=np.uint8)
    pairs = [(grid, other), (other, grid), (grid, grid), (grid, other[:4]), (grid, np.fliplr(other)), (grid, other.T)]
    pairs += [(flat.reshape(shape), flat.reshape(shape)) for shape in ((1, 6), (2, 3))]
    pairs += [(flat.reshape(1, 6), flat.reshape(2, 3)), (flat.reshape(2, 3), flat.reshape(1, 6))]
    for row, col in itertools.product(range(5), range(5)):
        changed = other.copy()
        changed[row, col] = (changed[row, col] + 1) % 10
        pairs.append((grid, changed))
    assert len({canonical_hash(p) for p in pairs}) == len(pairs)


def test_official_pairs_of_one_name_are_the_same_pair(official):
    """Checked by trying all symmetries and reading off the recolouring."""

    def equal(one, other):
        for s in range(8):
            images = [apply_symmetry(g, s) for g in one]
            if [g.shape for g in images] == [g.shape for g in other]:
                cells = (np.concatenate([g.ravel() for g in both]).tolist() for both in (images, other))
                table = set(zip(*cells, strict=True))
                if len(table) == len({a for a, _ in table}) == len({b for _, b in table}):
                    return True
        return False

    named = defaultdict(list)
    for _, demonstrations, tests in official[:800]:
        for pair in demonstrations + tests:
            named[canonical_hash(pair)].append(pair)
    repeated = [pairs for pairs in named.values() if len(pairs) > 1]
    assert repeated, "ARC-1 repeats some pairs"
    assert all(equal(pairs[0], other) for pairs in repeated for other in pairs[1:])


# == WHERE EVERY TOKEN STANDS =========================================================================================

strings = st.lists(st.sampled_from([0, 0, 1, 5, 9, ROW, ROW, ROW, IN, OUT, OUT, END, 15, UNKNOWN_TASK]), min_size=1,
                   max_size=60)


def walk(tokens):
    """GridLayout by walking along the tokens, one dict per position."""
    here = dict(col=0, row=0, grid=-1, start=-1, output=0, source=-1, source_rows=0, source_stride=0)
    places = []
    for i, t in enumerate(tokens):
        if t in (IN, OUT):
            width = (i - here["start"] - 1) // max(here["row"], 1)
            source = dict(source=here["start"], source_rows=here["row"], source_stride=width)
            here = source | dict(col=0, row=0, grid=here["grid"] + 1, start=i, output=int(t == OUT))
        elif t == ROW:
            here = here | dict(col=0, row=here["row"] + 1)
        elif i:
            here = here | dict(col=here["col"] + 1)
        stride = (i - here["col"] - max(here["start"], 0)) // here["row"] if here["row"] else 99
        places.append(here | dict(stride=stride, begin=0))
    return places


def cells_seen(here, tokens):
    """The 25 cells that a position sees, looked up one by one."""
    r, c, h, w = here["row"], here["col"], here["source_rows"], here["source_stride"] - 1

    def look(row, col, start, height, width):
        there = here["output"] and here["source"] >= 0 and 0 <= row < height and 0 <= col < width
        return min(tokens[start + 1 + row * (width + 1) + col], 10) if there else 10

    turned = [(h - 1 - r, c), (r, w - 1 - c), (h - 1 - r, w - 1 - c), (c, r), (h - 1 - c, w - 1 - r), (h - 1 - c, r),
              (c, w - 1 - r)]
    tiled = [(r % max(h, 1), c % max(w, 1)), (r // max(h, 1), c // max(w, 1)), (r // 2, c // 2), (r // 3, c // 3)]
    around = [(r + i, c + j) for i, j in itertools.product((-1, 0, 1), repeat=2)]
    written = [(r - 1, c - 1), (r - 1, c), (r - 1, c + 1), (r, c - 2), (r, c - 1)]
    return [*(look(*place, here["source"], h, w) for place in around + turned + tiled),
            *(look(*place, here["start"], r + 1, here["stride"] - 1) for place in written)]


def names_of(cells):
    """The colours named in the order in which they come; black and "no cell" keep their names."""
    return [c if c in (0, 10) else f"the {list(dict.fromkeys(cells)).index(c)}th" for c in cells]


def recalled(t, places, tokens, seen):
    """What the outputs went on with at earlier positions that look like position t, by looking at all of them."""
    found = []
    for alike, sight in itertools.product((list, names_of), SIGHTS):
        said, here = [], [seen[t][k] for k in sight]
        for s in range(t - 1, -1, -1):
            there = [seen[s][k] for k in sight]
            if places[t]["output"] and places[s]["output"] and alike(there) == alike(here):
                token = min(tokens[s + 1], 14)
                said.append(here[there.index(token)] if token in there else token)
        found.append([*said, 14, 14][:2])
    return [said[back] for back in range(2) for said in found]


def assert_hints_equal_a_walk(tokens, positions):
    """The cells, what is recalled and the votes, each looked up position by position."""
    places, whole = walk(tokens), torch.tensor([tokens])
    layout = GridLayout.of(whole)
    for field, found in zip(GridLayout._fields, layout, strict=True):
        assert found[0].tolist() == [here[field] for here in places], field
    seen = [cells_seen(here, tokens[: t + 1] + [99] * 3000) for t, here in enumerate(places)]
    assert not any(99 in cells for cells in seen)
    said = [recalled(t, places, tokens, seen) for t in range(max(positions) + 1)]
    one_hot, votes = layout.hints(whole, torch.tensor([positions]), True)[0].split([HINTS - 30, 30], dim=-1)
    assert HINTS - 30 == 15 * len(seen[0] + said[0])
    for t, found, shares in zip(positions, one_hot.view(len(positions), -1, 15), votes, strict=True):
        assert found.sum(-1).eq(1).all() and found.argmax(-1).tolist() == seen[t] + said[t], t
        score = np.zeros((2, 15))
        for k, token in enumerate(said[t]):
            before = [said[s][k] == tokens[s + 1] for s in range(t) if places[s]["output"] and said[s][k] < 14]
            odds = np.log((sum(before) + 0.4) / (len(before) - sum(before) + 0.4))
            score[:, token] += [max(odds, 0) ** power * (places[t]["output"] and token < 14) for power in (1, 4)]
        shared = score / np.maximum(score.sum(1, keepdims=True), 1e-6)
        assert shares.tolist() == pytest.approx(shared.ravel(), abs=1e-4)


@given(strings)
def test_layout_and_hints_equal_a_walk_along_any_string_and_look_only_back(string):
    assert_hints_equal_a_walk([UNKNOWN_TASK, *string], list(range(len(string) + 1)))


def test_hints_of_official_tasks_equal_a_walk(official):
    rng = np.random.default_rng(0)
    short = [pairs for _, demonstrations, tests in official if len(sequence(pairs := demonstrations + tests[:1])) < 200]
    for i in rng.choice(len(short), 6, replace=False):
        tokens = sequence(short[i]).tolist()
        assert_hints_equal_a_walk(tokens, sorted(rng.choice(len(tokens) - 1, 12, replace=False).tolist()))


@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_one_cell_follows_each_symmetry_of_the_input(symmetry, height, width, random):
    grid = np.array([[random.randrange(10) for _ in range(width)] for _ in range(height)], dtype=np.uint8)
    tokens = torch.from_numpy(sequence([(grid, apply_symmetry(grid, symmetry))]))[None]
    layout, following = GridLayout.of(tokens), tokens[:, 1:]
    said = (layout.output[:, :-1] == 1) & (following < 10)
    seen = layout.cells(tokens)[[4, *range(9, 16)], :, :-1]
    assert ((seen == following) | ~said).flatten(1).all(1).any()


def test_layout_of_official_tasks_says_where_each_cell_stands(official):
    """Row, column and grid of every token, and the input's cells around the one to predict, written out by hand."""
    for _, demonstrations, tests in official[::120]:
        pairs = demonstrations + tests[:1]
        tokens = torch.from_numpy(sequence(pairs))[None]
        found, near, at = GridLayout.of(tokens), torch.full((tokens.shape[1], 9), 10), 1
        for number, grid in enumerate(g for pair in pairs for g in pair):
            (height, width), (source, _) = grid.shape, pairs[number // 2]
            places = [(0, 0), *((r + c // width, (c + 1) % (width + 1)) for r in range(height)
                                for c in range(width + 1)), *[(height, 1)] * (number % 2)]  # the last one is END's
            where = slice(at, at + len(places))
            assert list(zip(found.row[0, where].tolist(), found.col[0, where].tolist(), strict=True)) == places
            assert (found.grid[0, where] == number).all() and (found.output[0, where] == number % 2).all()
            if number % 2:  # of an output, the source is the input before it
                mark = at - 1 - source.size - source.shape[0]
                where = [found.source, found.source_rows, found.source_stride]
                assert [int(f[0, at]) for f in where] == [mark, source.shape[0], source.shape[1] + 1]
                around = np.pad(source, ((1, 34), (1, 34)), constant_values=10)
                for i, (r, c) in enumerate(places):
                    near[at + i] = torch.from_numpy(around[r : r + 3, c : c + 3].flatten())
            at += len(places)
        assert at == tokens.shape[1] and torch.equal(found.cells(tokens)[:9, 0].T, near)
