"""Grids as tokens: there and back, symmetries, colours, and where every token stands."""

import itertools
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import one_thread, sequence  # noqa: F401
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


def test_the_sequence_is_the_one_that_the_design_draws():
    pairs = [(np.array([[1, 2]]), np.array([[3], [4]])), (np.array([[5]]), np.array([[6, 7]]))]
    tokens, answer = encode_pairs(pairs, 19)
    assert tokens.tolist() == [19, IN, 1, 2, ROW, OUT, 3, ROW, 4, ROW, END, IN, 5, ROW, OUT, 6, 7, ROW, END]
    assert tokens[answer].tolist() == [3, ROW, 4, ROW, END, 6, 7, ROW, END]


@given(st.lists(st.tuples(grids, grids), min_size=1, max_size=3), st.integers(0, 7))
def test_pairs_begin_with_their_prompt_and_have_a_length_known_before_they_are_turned(pairs, symmetry):
    turned = [tuple(apply_symmetry(g, symmetry) for g in pair) for pair in pairs]
    tokens, answers = encode_pairs(turned, UNKNOWN_TASK)
    assert tokens.dtype == np.int64 and np.array_equal(tokens, sequence(turned))
    assert len(tokens) == 1 + sum(pair_length(pair, turned=symmetry % 2) for pair in pairs)
    prompt, shown = encode_pairs([*turned[:-1], (turned[-1][0], None)], UNKNOWN_TASK)
    assert np.array_equal(tokens[: len(prompt)], prompt) and prompt[-1] == OUT
    assert np.array_equal(answers[: len(prompt)], shown) and answers[len(prompt) :].all()


def spelled(tokens):
    """The rows that an answer spells up to its END, or None: read as text."""
    text = "".join("0123456789/<>."[t] if t < 14 else "x" for t in tokens)
    found = re.match(r"((?:\d+/)+)\.", text)
    rows = [[int(colour) for colour in row] for row in found[1].split("/")[:-1]] if found else [[]]
    right = len({len(row) for row in rows}) == 1 and 1 <= len(rows[0]) <= 30 and len(rows) <= 30
    return rows if right else None


def answer(grid, behind):
    return [*encode_grid(grid).tolist(), END, *behind]


@example(answer(make_grid(30, 30, 0), []))
@example([1, ROW] * 31 + [END])
@example([1] * 31 + [ROW, END])
@example([1, 2, ROW, 3, 4, 5, END])
@example([1, 2, ROW, 3, ROW, END])
@given(st.builds(answer, grids, st.lists(st.integers(0, 16), max_size=9))
       | st.lists(st.sampled_from([0, 3, 9, ROW, ROW, END, IN, 15, UNKNOWN_TASK]), max_size=9)
       | st.lists(st.sampled_from([[1, ROW], [2, 3, ROW], [END], [14], [OUT]]), max_size=5).map(lambda v: sum(v, [])))
def test_only_what_spells_a_grid_is_one(tokens):
    found = decode_grid(torch.tensor(tokens))
    assert (None if found is None else found.tolist()) == spelled(tokens)
    assert found is None or found.dtype == np.uint8


@given(grids, st.integers(0, 7), seeds)
def test_every_symmetry_and_every_permutation_of_colours_has_its_inverse(grid, symmetry, seed):
    view = View(symmetry, random_colours(np.random.default_rng(seed)), [])
    assert view.colours[0] == 0 and sorted(view.colours) == list(range(10)), "black stays black"
    assert np.array_equal(view.undo(view.show(grid)), grid) and np.array_equal(view.show(view.undo(grid)), grid)


def test_the_symmetries_are_the_eight_of_the_square_and_every_colour_becomes_every_other():
    grid = np.arange(6).reshape(2, 3)
    images = [apply_symmetry(grid, s).tolist() for s in range(8)]
    assert images[0] == grid.tolist()
    assert sorted(images) == sorted(g[::i, ::j].tolist() for g in (grid, grid.T) for i in (1, -1) for j in (1, -1))
    rng = np.random.default_rng(3)
    tables = np.array([random_colours(rng) for _ in range(100)])
    assert all(set(column) == set(range(1, 10)) for column in tables.T[1:].tolist())
    assert len({table.tobytes() for table in tables}) > 95


@given(small_grids, small_grids, st.permutations(range(10)))  # black may change too
def test_a_pair_has_one_name_under_all_symmetries_and_colourings(question, answer, colours):
    images = [tuple(np.array(colours, np.uint8)[apply_symmetry(g, s)] for g in (question, answer)) for s in range(8)]
    assert {canonical_hash(image) for image in images} == {canonical_hash((question, answer))}


def akin(one, other):
    """Whether a symmetry and a recolouring lead from one pair to the other."""
    for images in ([apply_symmetry(g, s) for g in one] for s in range(8)):
        if [g.shape for g in images] == [g.shape for g in other]:
            before, after = (np.concatenate([g.ravel() for g in pair]).tolist() for pair in (images, other))
            if len(set(before)) == len(set(after)) == len(set(zip(before, after, strict=True))):
                return True
    return False


def test_different_pairs_have_different_names():
    """All pairs of grids of one or two cells in three colours, or of four in two."""
    shapes = [(1, 1, 3), (1, 2, 3), (2, 1, 3), (2, 2, 2), (1, 4, 2)]
    small = [np.array(cells, np.uint8).reshape(height, width) for height, width, colours in shapes
             for cells in itertools.product(range(colours), repeat=height * width)]
    named = defaultdict(list)
    for pair in itertools.product(small, repeat=2):
        named[canonical_hash(pair)].append(pair)
    assert all(akin(pairs[0], other) for pairs in named.values() for other in pairs[1:])


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
    """The 25 cells that the last of these tokens sees, looked up one by one."""
    r, c, h, w = here["row"], here["col"], here["source_rows"], max(here["source_stride"] - 1, 0)

    def look(row, col, start, height, width):
        there = here["output"] and here["source"] >= 0 and 0 <= row < height and 0 <= col < width
        return min(tokens[start + 1 + row * (width + 1) + col], 10) if there else 10

    turned = []  # by each symmetry but that which leaves all cells in their places
    for image in (apply_symmetry(np.arange(h * w).reshape(h, w), s) for s in (6, 4, 2, 7, 5, 3, 1)):
        inside = r < image.shape[0] and c < image.shape[1]
        turned.append(divmod(int(image[r, c]), w) if inside else (-1, -1))
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


def layout_of(tokens):
    """The layout of these tokens, every field of which equals a walk's, and that walk."""
    places, layout = walk(tokens), GridLayout.of(torch.tensor([tokens]))
    for field, found in zip(GridLayout._fields, layout, strict=True):
        assert found[0].tolist() == [here[field] for here in places], field
    return layout, places


def assert_hints_equal_a_walk(tokens, positions):
    """The cells, what is recalled and the votes, each looked up position by position."""
    layout, places = layout_of(tokens)
    seen = [cells_seen(here, tokens[: t + 1]) for t, here in enumerate(places)]
    said = [recalled(t, places, tokens, seen) for t in range(max(positions) + 1)]
    hints = layout.hints(torch.tensor([tokens]), torch.tensor([positions]), True)
    one_hot, votes = hints[0].split([HINTS - 30, 30], dim=-1)
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


@given(st.lists(st.sampled_from([0, 0, 1, 5, 9, ROW, ROW, ROW, IN, OUT, OUT, END, 15, UNKNOWN_TASK]), min_size=1,
                max_size=60))
def test_layout_and_hints_equal_a_walk_along_any_string_and_look_only_back(string):
    assert_hints_equal_a_walk([UNKNOWN_TASK, *string], list(range(len(string) + 1)))


def test_layout_and_hints_of_official_tasks_equal_a_walk(arc_dir):
    rng = np.random.default_rng(0)
    tasks = read_split(arc_dir, "training").values()
    sequences = [sequence(task["train"] + task["test"][:1]).tolist() for task in tasks]
    for tokens in sequences[::80]:
        layout_of(tokens)
    short = [tokens for tokens in sequences if len(tokens) < 200]
    for i in rng.choice(len(short), 5, replace=False):
        positions = rng.choice(len(short[i]) - 1, 12, replace=False)
        assert_hints_equal_a_walk(short[i], sorted(positions.tolist()))
