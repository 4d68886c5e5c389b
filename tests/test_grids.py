"""Grids as tokens: there and back, symmetries, colours, and where every token stands."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import parse_grids, random_grid, same_pairs, sequence

from train import (
    END,
    IN,
    OUT,
    ROW,
    UNKNOWN_TASK,
    GridLayout,
    apply_symmetry,
    canonical_hash,
    decode_grid,
    encode_answer,
    encode_grid,
    encode_task,
    inverse_colours,
    inverse_symmetry,
    pair_length,
    random_colours,
    read_split,
)


@pytest.fixture(scope="module")
def official(arc_dir, arc2_dir):
    """Every task of both versions: (name, demonstrations, tests)."""
    splits = [read_split(folder, split) for folder in (arc_dir, arc2_dir) for split in ("training", "evaluation")]
    assert [len(s) for s in splits] == [400, 400, 1000, 120]
    return [(name, task["train"], task["test"]) for split in splits for name, task in split.items()]


# ---------------------------------------------------------------------------------------------------------------------
# There and back


def test_every_official_task_encodes_and_decodes_to_itself(official):
    for name, demonstrations, tests in official:
        for query, answer in tests:
            prompt = encode_task(demonstrations, query)
            assert prompt.dtype == np.int64 and prompt[0] == UNKNOWN_TASK and prompt[-1] == OUT
            *shown, (mark, asked) = parse_grids(prompt[:-1])
            assert mark == IN and np.array_equal(asked, query), name
            shown = [grid for _, grid in shown]
            assert same_pairs(list(zip(shown[::2], shown[1::2], strict=True)), demonstrations), name
            assert np.array_equal(decode_grid(encode_answer(answer)), answer), name
            pieces = sum(pair_length(p) for p in [*demonstrations, (query, answer)])
            assert len(prompt) + len(encode_answer(answer)) == 1 + pieces


def test_the_sequence_is_the_one_that_the_design_draws():
    pairs = [(np.array([[1, 2]]), np.array([[3], [4]])), (np.array([[5]]), np.array([[6, 7]]))]
    prompt = encode_task(pairs[:1], pairs[1][0], 19)
    assert prompt.tolist() == [19, IN, 1, 2, ROW, OUT, 3, ROW, 4, ROW, END, IN, 5, ROW, OUT]
    assert encode_answer(pairs[1][1]).tolist() == [6, 7, ROW, END]
    assert encode_grid(np.array([[0, 9], [9, 0]])).tolist() == [0, 9, ROW, 9, 0, ROW]


def test_what_follows_the_end_is_not_read():
    assert decode_grid([1, 2, ROW, END, 5, IN, END, 3]).tolist() == [[1, 2]]
    assert decode_grid(torch.tensor([4, ROW, END])).tolist() == [[4]]


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
    "IN inside": [1, IN, ROW, END],
    "OUT inside": [1, OUT, ROW, END],
    "spare token 14": [14, ROW, END],
    "spare token 15": [15, ROW, END],
    "task token": [UNKNOWN_TASK, ROW, END],
    "31 rows": [1, ROW] * 31 + [END],
    "31 columns": [1] * 31 + [ROW, END],
}


@pytest.mark.parametrize("what", NO_GRIDS)
def test_what_is_no_grid_is_refused(what):
    assert decode_grid(NO_GRIDS[what]) is None


def test_the_largest_grid_is_accepted():
    grid = np.random.default_rng(0).integers(0, 10, (30, 30)).astype(np.uint8)
    assert np.array_equal(decode_grid(encode_answer(grid)), grid)


# ---------------------------------------------------------------------------------------------------------------------
# Symmetries and colours


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 3), (3, 2), (4, 4), (30, 7)])
def test_every_symmetry_has_its_inverse(shape):
    grid = np.random.default_rng(1).integers(0, 10, shape)
    for s in range(8):
        assert np.array_equal(apply_symmetry(apply_symmetry(grid, s), inverse_symmetry(s)), grid)
        assert np.array_equal(apply_symmetry(apply_symmetry(grid, inverse_symmetry(s)), s), grid)


def test_the_symmetries_are_the_eight_of_the_square():
    grid = np.arange(6).reshape(2, 3)
    images = [apply_symmetry(grid, s).tolist() for s in range(8)]
    expected = [g.tolist() for g in (grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1])]
    expected += [g.tolist() for g in (grid.T, grid.T[::-1], grid.T[:, ::-1], grid.T[::-1, ::-1])]
    assert images[0] == grid.tolist() and sorted(images) == sorted(expected)


def test_every_colour_permutation_has_its_inverse_and_keeps_black():
    grid = np.random.default_rng(2).integers(0, 10, (5, 7)).astype(np.uint8)
    rng = np.random.default_rng(3)
    tables = [random_colours(rng) for _ in range(50)]
    for colours in tables:
        assert colours[0] == 0 and sorted(colours) == list(range(10))
        assert np.array_equal(inverse_colours(colours)[colours[grid]], grid)
        assert np.array_equal(colours[inverse_colours(colours)[grid]], grid)
    assert len({t.tobytes() for t in tables}) > 45
    assert {int(t[1]) for t in tables} == set(range(1, 10)), "colour 1 never becomes some of the nine"


# ---------------------------------------------------------------------------------------------------------------------
# Names of pairs


def test_a_pair_has_one_name_under_all_symmetries_and_colourings():
    rng = np.random.default_rng(4)
    for _ in range(20):
        pair = random_grid(rng, 5), random_grid(rng, 5)
        names = {canonical_hash(pair)}
        for s in range(8):
            colours = rng.permutation(10).astype(np.uint8)  # black too
            names.add(canonical_hash(tuple(colours[apply_symmetry(g, s)] for g in pair)))
        assert len(names) == 1


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
                cells = zip(
                    *(np.concatenate([g.ravel() for g in grids]).tolist() for grids in (images, other)), strict=True
                )
                table = set(cells)
                if len(table) == len({a for a, _ in table}) == len({b for _, b in table}):
                    return True
        return False

    named = defaultdict(list)
    for _, demonstrations, tests in official[:800]:
        for pair in demonstrations + tests:
            named[canonical_hash(pair)].append(pair)
    twins = [pairs for pairs in named.values() if len(pairs) > 1]
    assert twins, "ARC-1 repeats some pairs"
    assert all(equal(pairs[0], other) for pairs in twins for other in pairs[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Where every token stands

FIELDS = GridLayout._fields


def slow_layout(tokens):
    """GridLayout by walking along the tokens, one dict a position."""
    here = dict(col=0, row=0, grid=-1, start=-1, output=0, source=-1, source_rows=0, source_stride=0)
    rows = []
    for i, t in enumerate(tokens):
        if t in (IN, OUT):
            width = (i - here["start"] - 1) // max(here["row"], 1)
            source = dict(source=here["start"], source_rows=here["row"], source_stride=width)
            here = source | dict(col=0, row=0, grid=here["grid"] + 1, start=i, output=int(t == OUT))
        elif t == ROW:
            here = here | dict(col=0, row=here["row"] + 1)
        elif i:
            here = here | dict(col=here["col"] + 1)
        rows.append(here)
    return rows


def random_strings(count, length, seed=0):
    rng = np.random.default_rng(seed)
    p = np.array([1.0] * 10 + [4, 1.5, 1.5, 0.5, 0.2, 0.2, 0.2])
    tokens = rng.choice(17, size=(count, length), p=p / p.sum())
    tokens[:, 0] = UNKNOWN_TASK
    return torch.from_numpy(tokens)


@pytest.fixture(scope="module")
def some(official):
    """A few official tasks of all sizes, as lists of pairs."""
    return [demonstrations + tests[:1] for _, demonstrations, tests in official[::120]]


def test_layout_equals_a_walk_along_random_strings():
    tokens = random_strings(count=40, length=80)
    found = GridLayout.of(tokens)
    for b, row in enumerate(tokens.tolist()):
        expected = slow_layout(row)
        for field in FIELDS:
            assert getattr(found, field)[b].tolist() == [here[field] for here in expected], field


def test_layout_of_official_tasks_says_where_each_cell_stands(some):
    for pairs in some:
        tokens = sequence(pairs)
        found = GridLayout.of(torch.from_numpy(tokens)[None])
        at = 1
        for number, grid in enumerate(g for pair in pairs for g in pair):
            height, width = grid.shape
            rows = [(0, 0)] + [(r + c // width, (c + 1) % (width + 1)) for r in range(height) for c in range(width + 1)]
            rows += [(height, 1)] * (number % 2)  # END
            where = slice(at, at + len(rows))
            assert list(zip(found.row[0, where].tolist(), found.col[0, where].tolist(), strict=True)) == rows
            assert (found.grid[0, where] == number).all() and (found.start[0, where] == at).all()
            assert (found.output[0, where] == number % 2).all()
            if number % 2:  # of an output, the source is the input before it
                source, inside = pairs[number // 2][0], [int(f[0, at]) for f in found[-3:]]
                assert inside == [at - 1 - source.size - source.shape[0], source.shape[0], source.shape[1] + 1]
            at += len(rows)
        assert at == len(tokens)


def test_neighbourhood_is_the_input_around_the_cell_to_predict(some):
    for pairs in some:
        tokens = torch.from_numpy(sequence(pairs))[None]
        layout = GridLayout.of(tokens)
        found = layout.neighbourhood(tokens)[0]
        at, expected = 1, torch.full((tokens.shape[1], 9), 10)
        for question, answer in pairs:
            at += 1 + question.shape[0] * (question.shape[1] + 1)  # now at OUT
            around = np.full((34 + question.shape[0], 34 + question.shape[1]), 10)
            around[1 : question.shape[0] + 1, 1 : question.shape[1] + 1] = question
            places = [(r, c) for r in range(answer.shape[0]) for c in range(answer.shape[1] + 1)]
            for r, c in [*places, (answer.shape[0], 0), (answer.shape[0], 1)]:  # what OUT, cells, ROWs and END predict
                expected[at] = torch.from_numpy(around[r : r + 3, c : c + 3].flatten())
                at += 1
        assert at == tokens.shape[1] and torch.equal(found, expected)


def test_neighbourhood_in_random_strings_looks_only_back():
    tokens = random_strings(count=40, length=80, seed=1)
    found = GridLayout.of(tokens).neighbourhood(tokens)
    looked = 0
    for b, row in enumerate(tokens.tolist()):
        for t, here in enumerate(slow_layout(row)):
            expected = [10] * 9
            for k, (dr, dc) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
                r, c, stride = here["row"] + dr, here["col"] + dc, here["source_stride"]
                if here["output"] and here["source"] >= 0 and 0 <= r < here["source_rows"] and 0 <= c < stride - 1:
                    index = here["source"] + 1 + r * stride + c
                    assert index < t
                    expected[k] = min(row[index], 10)
                    looked += 1
            assert found[b, t].tolist() == expected
    assert looked > 100


def test_layout_token_by_token_equals_the_layout_of_the_whole(some):
    longest = max(len(s) for s in map(sequence, some))
    tokens = torch.zeros(len(some) + 20, min(longest, 1200), dtype=torch.long)
    for i, pairs in enumerate(some):
        s = torch.from_numpy(sequence(pairs))[: tokens.shape[1]]
        tokens[i, : len(s)] = s
    tokens[len(some) :] = random_strings(20, tokens.shape[1], seed=2)
    whole = GridLayout.of(tokens)
    near = whole.neighbourhood(tokens)
    here = whole.at(torch.zeros(len(tokens), dtype=torch.long))
    for t in range(1, tokens.shape[1]):
        index = torch.full((len(tokens),), t)
        here = here.advance(tokens[:, t], index)
        for field, f, expected in zip(FIELDS, here, whole.at(index), strict=True):
            assert torch.equal(f.long(), expected), f"{field} at {t}"
        if t % 7 == 0:
            assert torch.equal(here.neighbourhood(tokens[:, : t + 1])[:, 0], near[:, t])


def test_layout_starts_anywhere():
    """`at` picks one position of each row, as the end of a padded prompt."""
    tokens = random_strings(count=8, length=50, seed=3)
    index = torch.tensor([0, 1, 5, 10, 20, 30, 40, 48])
    here = GridLayout.of(tokens).at(index).advance(tokens.gather(1, index[:, None] + 1)[:, 0], index + 1)
    expected = GridLayout.of(tokens).at(index + 1)
    assert all(torch.equal(f.long(), e) for f, e in zip(here, expected, strict=True))
