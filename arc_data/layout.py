"""Where every token of a task stands in its grid, and what can be looked up for the cell that comes next.

Everything is recovered from the tokens alone, looks only back, and is computed for a whole batch at once. An example,
the second output of a task that mirrors its input, half written (`train.encode_pairs` says how grids become tokens):

    IN 1 2 ROW OUT 2 1 ROW END  IN 5 7 ROW OUT 7 . . .
                                               ^ row 0, column 1, grid 3, an output; its source is the grid 5 7

To predict the token behind that 7, the model sees the cells 5, 7 and "none" of the source in the same place and around
it, 5 in the mirrored place, and the 7 to the left. In the first output the cell in the mirrored place came next, so, up
to a change of colours, the mirrored cell is recalled: 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROW, IN, OUT, END = 10, 11, 12, 13  # tokens; 0-9 are the colours
SIGHTS = [  # columns of `GridLayout.cells` that are looked for together
    [*range(9)],  # the 3 x 3 around the place
    [4],  # the place itself
    [1, 3, 4, 5, 7],  # with its four neighbours
    [4, *range(9, 14)],  # with where it is mirrored
    [4, *range(16, 20)],  # with where it is tiled and enlarged
    [*range(20, 25)],  # what is written before it
    [4, *range(20, 25)],  # that and the place
    [*range(9), *range(20, 25)],  # that and the 3 x 3
    [3, 4, 5, 24],  # along the row
    [1, 4, 7, 21],  # along the column
]
HINTS = 15 * (25 + 4 * len(SIGHTS) + 2)  # one-hot cells and recalled tokens, and two votes


@dataclass
class Seen:
    """What `hints` has found at the outputs of prompts, for the answers to them, which are made a few tokens at a time.

    The first call, over prompts of `end` (B,) tokens, fills in the rest. M is the number of their outputs' positions.
    """

    end: Tensor
    places: Tensor | None = None  # (1 + 3 * len(SIGHTS), B, M): see `recalled`
    tallies: Tensor | None = None  # (2, 4 * len(SIGHTS), B): how often each sight recalled anything, and was right


def true_first(mask: Tensor) -> Tensor:
    """Indices (B, M) of each row's true positions in `mask` (B, T), in order; a row with fewer ends with false ones."""
    return mask.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(mask.sum(1).max()))]


class GridLayout(NamedTuple):
    """Where each token stands in its grid, recovered from the tokens alone; every field is (B, T) int64.

    The tokens of the grid IN a b ROW c d ROW have columns 0 1 2 0 1 2 0 and rows 0 0 0 1 1 1 2: a ROW counts as column
    0 of the row that it begins. So the next cell always stands one column to the right of the token that predicts it.
    """

    col: Tensor
    row: Tensor
    grid: Tensor  # -1 before the first grid, 0 in it, 1 in the next; an output's is its input's plus one
    output: Tensor  # 1 in an output, 0 elsewhere
    source: Tensor  # index of the mark (IN or OUT) of the grid before this one; -1: there is none
    source_rows: Tensor  # the number of rows of that grid
    source_stride: Tensor  # its tokens per row, width + 1; right if it is an input, because an output ends with END
    start: Tensor  # index of the mark of this grid; -1: none is open
    stride: Tensor  # its tokens per row, which are known from its second row on
    begin: Tensor  # index of the first token of the document

    @staticmethod
    def of(tokens: Tensor, documents: Tensor | None = None) -> GridLayout:
        """The layout of whole sequences, tokens (B, T); each of the `documents` (B, T) starts anew."""
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        first = index == 0 if documents is None else F.pad(documents.diff(dim=1), (1, 0), value=1) > 0
        mark, end = (tokens == IN) | (tokens == OUT), tokens == ROW

        def latest(where: Tensor) -> Tensor:
            """For each position, the index of the last one up to it where `where` is true."""
            return torch.where(where, index, 0).cummax(1).values

        begin = latest(first)  # where the document of each token begins
        opened = latest(mark | first)  # the mark of its grid, or the document's beginning if no grid is open yet
        marks, ends = mark.cumsum(1), end.cumsum(1)
        grid = marks - (marks - mark.long()).gather(1, begin) - 1  # marks of earlier documents do not count
        row = ends - ends.gather(1, opened)
        col = index - latest(mark | end | first)
        output = (tokens.gather(1, opened) == OUT).long()
        start = opened.masked_fill(~mark.gather(1, opened), -1)  # the mark of this grid
        source = start.gather(1, (opened - 1).clamp(min=0)).masked_fill(opened == begin, -1)
        rows = ends.gather(1, opened) - ends.gather(1, source.clamp(min=0))
        stride = torch.where(row > 0, (index - col - opened) // row.clamp(min=1), 99)  # 99: not known yet
        source_stride = (opened - source - 1) // rows.clamp(min=1)
        return GridLayout(col, row, grid, output, source, rows, source_stride, start, stride, begin)

    def cells(self, tokens: Tensor) -> Tensor:
        """Colours of the cells that the next cell of an output is most likely to depend on, (25, B, T).

        Of the input: the 3 x 3 around its place, then where the 7 other symmetries of the square put it, then what it
        would repeat if the output tiled the input or enlarged it. Of the output: three above, two to the left. 10 means
        that there is no such cell, or no output here. `tokens` are whole sequences.
        """
        r, c, h, w = self.row, self.col, self.source_rows.clamp(min=1), (self.source_stride - 1).clamp(min=1)
        around = [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        turned = [(h - 1 - r, c), (r, w - 1 - c), (h - 1 - r, w - 1 - c), (c, r), (h - 1 - c, w - 1 - r),
                  (h - 1 - c, r), (c, w - 1 - r)]
        tiled = [(r % h, c % w), (r // h, c // w), (r // 2, c // 2), (r // 3, c // 3)]
        written = [(r - 1, c - 1), (r - 1, c), (r - 1, c + 1), (r, c - 2), (r, c - 1)]

        def look(places: list, start: Tensor, height: Tensor, stride: Tensor) -> Tensor:
            row, col = (torch.stack(v) for v in zip(*places, strict=True))
            inside = (row >= 0) & (row < height) & (col >= 0) & (col < stride - 1)
            inside &= (self.output == 1) & (self.source >= 0)
            index = (start + 1 + row * stride + col).clamp(0, tokens.shape[1] - 1)
            found = tokens.expand(len(index), -1, -1).gather(2, index)
            return torch.where(inside, found, 10).clamp(max=10)  # a grid that a model wrote may hold other tokens

        return torch.cat([look(around + turned + tiled, self.source, self.source_rows, self.source_stride),
                          look(written, self.start, r + 1, self.stride)])

    def recalled(self, after: Tensor, cells: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        """Which token came next where earlier outputs of this task looked like here, (4 * len(SIGHTS), B, T); 14: none.
        For `seen` prompts also the `places` of these positions, behind those of the prompts: what came next, the keys
        by which it is found, and which column held it.

        First the token that came after the last position with the same `cells` (25, B, T), for each of SIGHTS, columns
        of these; then after the last one with the same cells up to a change of colours, with the token's colour changed
        alike; then both for the last but one. `after` (B, T) are the tokens that come after each position. Attention
        can learn such a lookup (induction heads, Olsson et al. 2022, arXiv:2209.11895), but takes far more steps.
        """
        before = 0 if seen is None or seen.places is None else seen.places.shape[2]
        index, bits = torch.arange(after.shape[1], device=after.device), 2 ** torch.arange(25, device=after.device)
        # A colour's set of columns, as bits, names it however it is called: {0, 3} means columns 0 and 3 look alike.
        holding = torch.zeros_like(cells[:11])
        holding.scatter_add_(0, cells, bits[:, None, None].expand_as(cells))
        same = holding.gather(0, cells)  # for each column those that hold its colour
        same = same + (cells == 0) * 2**25 + (cells == 10) * 2**26  # two bits more: black stays black, and "none" none
        sets = after.new_tensor([sum(2**i for i in sight) for sight in SIGHTS])[:, None, None]
        sight, column = after.new_tensor([(s, i) for s, sight in enumerate(SIGHTS) for i in sight]).T
        weights = after.new_tensor([pow(5**27, i + 1, 2**62) for i in range(25)])  # of a hash of all that a sight sees
        views = torch.stack([cells[column], same[column] & (sets[sight] + 3 * 2**25)]) * weights[column, None, None]
        keys = self.begin.repeat(2, len(SIGHTS), 1, 1).index_add_(1, sight, views)  # another document has other keys
        keys = keys.flatten(0, 1) & (2**62 - 1)
        keys = torch.where(self.output == 1, keys, -1 - before - index)  # equal in outputs only
        holders = holding.gather(0, after.clamp(max=10)[None]) * (after < 11) & sets  # columns with what comes next
        holder = (holders & -holders).clamp(min=1).float().log2().round().long()  # the first of them: the lowest bit
        holder = torch.where(holders > 0, holder, -1)  # -1: none has it, as after the last row or for a new colour
        places = torch.cat([after[None], keys, holder]) if seen else None
        if before:
            places = torch.cat([seen.places, places], dim=2)
            after, keys, holder = places[0], places[1 : -len(SIGHTS)], places[-len(SIGHTS) :]
        equal, order = keys.sort(dim=2, stable=True)  # equal ones stand side by side, in the order of their positions
        found = []
        for back in (1, 2):
            place = torch.where(equal[..., back:] == equal[..., :-back], order[..., :-back], -1)
            place = torch.full_like(keys, -1).scatter(2, order[..., back:], place)[..., before:]
            there = place.clamp(min=0)
            said, other = after.expand(len(place), -1, -1).gather(2, there).chunk(2)
            there = holder.gather(2, there[len(SIGHTS) :])
            other = torch.where(there < 0, other, cells.gather(0, there.clamp(min=0)))  # what that column holds here
            found.append(torch.where(place < 0, 14, torch.cat([said, other])))
        return torch.cat(found), places

    def votes(self, after: Tensor, said: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """All that is `recalled` (K, B, T) together: shares of the 14 tokens, (2 * 15, B, T), the 15th without meaning.
        And the `tallies` up to the last position, with those of `seen`.

        What a sight says weighs as much as it was right so far in this task: by log-odds, then by their fourth power.
        """
        counts = (said < 14) & (self.output == 1)
        right = counts & (said == after)
        total, good = (v.float().cumsum(2) - v.float() for v in (counts, right))  # up to the position before
        opens = F.pad(self.begin.diff(dim=1) != 0, (1, 0), value=True)  # the first position of each document
        first = torch.where(opens, torch.arange(after.shape[1], device=after.device), 0).cummax(1).values
        total, good = (v - v.gather(2, first.expand_as(v)) for v in (total, good))  # of this document
        if seen and seen.tallies is not None:
            total, good = total + seen.tallies[0, ..., None], good + seen.tallies[1, ..., None]
        odds = ((good + 0.4) / (total - good + 0.4)).log().clamp(min=0) * counts
        score = [torch.zeros(15, *after.shape, device=after.device).scatter_add_(0, said, w) for w in (odds, odds**4)]
        shares = torch.cat([v / v.sum(0).clamp(min=1e-6) for v in score])
        return shares, torch.stack([total[..., -1] + counts[..., -1], good[..., -1] + right[..., -1]])

    def hints(self, tokens: Tensor, at: Tensor, recall: bool, seen: Seen | None = None) -> Tensor:
        """All of this at the positions `at` (B, W), one-hot, and the votes: (B, W, HINTS). Without `recall` the cells
        around the next one alone, (B, W, 99), as runs of earlier versions have it. `tokens` (B, T) are this layout's.

        Nothing is looked up but in outputs, so that their positions alone are gone through; given what has been `seen`
        of prompts, only those behind these.
        """
        asked = self.output
        if seen:
            index = torch.arange(tokens.shape[1], device=tokens.device)
            asked = asked * ((index < seen.end[:, None]) == (seen.places is None))
        outputs = true_first(asked)
        here = GridLayout(*(v.gather(1, outputs) for v in self._replace(output=asked)))
        cells, after = here.cells(tokens), F.pad(tokens[:, 1:], (0, 1)).gather(1, outputs).clamp(max=14)
        looks, votes, kinds, none = cells[:9], cells.new_zeros(0, *outputs.shape), 11, [10] * 9
        if recall:
            said, places = here.recalled(after, cells, seen)
            votes, tallies = here.votes(after, said, seen)
            looks, kinds, none = torch.cat([cells, said]), 15, [10] * len(cells) + [14] * len(said)
            if seen and seen.places is None:
                seen.places, seen.tallies = places, tallies
        place = (asked.cumsum(1) - 1).clamp(min=0).gather(1, at)  # among the outputs' positions
        looks, votes = (v.gather(2, place.expand(len(v), -1, -1)).movedim(0, 2) for v in (looks, votes))
        inside = self.output.gather(1, at)[..., None] == 1
        where = torch.where(inside, looks, looks.new_tensor(none)) + kinds * torch.arange(len(none), device=at.device)
        found = torch.zeros(*at.shape, kinds * len(none) + votes.shape[2], device=at.device).scatter_(2, where, 1.0)
        found[..., kinds * len(none) :] = votes * inside
        return found
