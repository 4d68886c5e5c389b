"""Answers from carried states: a prompt is read once, and what stands behind it costs a pass over new tokens only.

`generate` and `answer_prompts` are the twins of train.py's. `generate` goes token by token. `answer_prompts` guesses
a whole answer and lets the model correct the guess (`draft_answers`): the very same tokens, in a tenth of the passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arc_data.layout import Seen
from data.files import UserError
from data.shards import bytes_per_token, load_tokenizer, read_meta
from extras.memory import cores, given_up, on_threads
from train import END, GPT, IN, OUT, ROW, Data, Grid, Runtime, decode_grid

# == STATES ===========================================================================================================


class Place(NamedTuple):
    """Where the tokens of a pass stand."""

    slots: Tensor  # (R,) int64: the rows of `Carried` that they belong to
    at: Tensor  # (R, W) int64: their positions in these
    rope: tuple[Tensor, Tensor]  # rotary angles of these
    first: Tensor  # (R,): position of the first token that they may see
    reading: Tensor | None  # (R,) while a prompt is read: how many of its tokens states go on to; else None


class MambaState:
    """What a Mamba-2 mixer carries: the last inputs of its convolution (S, K - 1, C) and its state (S, H, P, N)."""

    def __init__(self, mixer: Any, slots: int, capacity: int):
        self.mixer, self.passed, device = mixer, None, mixer.A_log.device
        self.tail = torch.zeros(slots, mixer.conv1d.weight.shape[2] - 1, mixer.d_xbc, device=device)
        self.state = torch.zeros(slots, mixer.nheads, mixer.sizes[0] // mixer.nheads, mixer.d_state, device=device)

    def feed(self, u: Tensor, place: Place, wanted: bool) -> Tensor | None:
        """What the mixer makes of the next tokens u (R, W, D), if that is wanted; see `advance` for the state."""
        mixer, before = self.mixer, self.tail.shape[1]
        z, xbc, dt = mixer.in_proj(u).split(mixer.sizes, dim=-1)
        with torch.autocast(u.device.type, enabled=False):
            raw = torch.cat([self.tail[place.slots].to(xbc.dtype), xbc], dim=1)  # (R, K - 1 + W, C)
            x, B, C = (v[:, before:] for v in mixer.convolve(raw))
            self.passed = place.slots, raw, x, B, dt
            if not wanted:
                return self.advance(place.reading)
            if place.reading is not None:
                pads = torch.arange(u.shape[1], device=u.device) >= place.reading[:, None]
                y, state = mixer.scan(x, B, C, dt.masked_fill(pads[..., None], -1e4), return_final_states=True)
                self.advance(place.reading, state)
            elif u.shape[1] > 1:
                y = mixer.scan(x, B, C, dt, initial_states=self.state[place.slots])
            else:  # a scan over one token is its state
                self.advance(torch.ones_like(place.slots))
                y = (self.state[place.slots] @ C.float().mT)[..., 0] + mixer.D[:, None] * x[:, 0]  # (R, H, P)
            y = mixer.norm(y.reshape(z.shape).to(z.dtype), gate=z)
        return mixer.out_proj(y)

    def advance(self, count: Tensor, state: Tensor | None = None) -> None:
        """Go on to the first `count` (R,) of the tokens fed last, if that has not been done yet, and to their state."""
        if self.passed is None:
            return
        (slots, raw, x, B, dt), self.passed = self.passed, None
        self.state[slots] = self.state_behind(slots, x, B, dt, count) if state is None else state
        last = count[:, None] + torch.arange(self.tail.shape[1], device=x.device)
        self.tail[slots] = raw.gather(1, last[..., None].expand(-1, -1, raw.shape[2])).float()

    def state_behind(self, slots: Tensor, x: Tensor, B: Tensor, dt: Tensor, count: Tensor) -> Tensor:
        """The state (R, H, P, N) behind `count` (R,) tokens: the recurrence of `ssd_scan` alone, dt = 0 behind them."""
        new = torch.arange(x.shape[1], device=x.device) < count[:, None]
        dt = F.softplus(dt.float() + self.mixer.dt_bias) * new[..., None]  # (R, W, H)
        decay = (dt * (-self.mixer.A_log.exp() / math.log(2))).cumsum(1)  # exp2: exp is slow where its result is 0
        weight = (decay[:, -1:] - decay).exp2_() * dt
        added = (x.float() * weight[..., None]).flatten(2).mT @ B[:, :, 0].float()  # (R, H * P, N)
        before = self.state[slots]
        return torch.addcmul(added.view_as(before), before, decay[:, -1].exp2()[..., None, None])

    def forget(self, slots: Tensor) -> None:
        """Start anew there."""
        self.tail[slots], self.state[slots] = 0, 0


class AttentionState:
    """What an attention carries: keys and values (S, H, capacity, P), each at its position."""

    def __init__(self, mixer: Any, slots: int, capacity: int):
        self.mixer, self.sizes, self.keys, self.values = mixer, (slots, capacity), None, None

    def feed(self, u: Tensor, place: Place, wanted: bool) -> Tensor | None:
        """What the attention makes of the next tokens u (R, W, D), if that is wanted."""
        q, k, v = self.mixer.project(u, place.rope)  # (R, H, W, P) each
        if self.keys is None:
            slots, capacity = self.sizes
            self.keys, self.values = (k.new_zeros(slots, k.shape[1], capacity, k.shape[3]) for _ in range(2))
        if place.reading is not None:
            self.keys[place.slots, :, : k.shape[2]], self.values[place.slots, :, : k.shape[2]] = k, v
            if not wanted:
                return None
            y = self.mixer.ops.attention(q, k, v)
        else:  # what was guessed wrongly is written over before it is seen
            where = place.slots[:, None], slice(None), place.at
            self.keys[where], self.values[where] = k.transpose(1, 2), v.transpose(1, 2)
            index = torch.arange(int(place.at.max()) + 1, device=u.device)
            seen = (index <= place.at[..., None]) & (index >= place.first[:, None, None])  # (R, W, longest)
            k, v = (cache[place.slots, :, : len(index)] for cache in (self.keys, self.values))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        return self.mixer.out_proj(y.transpose(1, 2).flatten(2))

    def advance(self, count: Tensor) -> None:
        """Nothing to do."""

    def forget(self, slots: Tensor) -> None:
        """Nothing to do: `Place.first` says what may be seen."""


class Carried:
    """Rows of tokens (S, capacity), in slots, and what every mixer carries behind the first `fed` (S,) of each."""

    def __init__(self, model: GPT, slots: int, capacity: int):
        device = model.head.weight.device
        self.model, self.tokens = model, torch.zeros(slots, capacity + 1, dtype=torch.long, device=device)
        self.fed, self.first = torch.zeros(2, slots, dtype=torch.long, device=device)
        kinds = [MambaState if hasattr(b.mixer, "conv1d") else AttentionState for b in model.blocks]
        self.layers = [kind(b.mixer, slots, capacity + 1) for kind, b in zip(kinds, model.blocks, strict=True)]
        self.seen: Seen | None = None  # what hints have found in the prompts
        self.films = [tuple(f and f._replace(table=f.table.new_zeros(slots, f.table.shape[1])) for f in films)
                      for films in model.films(self.tokens[:1, :1], None)]

    def read(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """Put prompts (R, T), padded on the right to `lengths` (R,), into slots (R,); all but their last tokens are
        fed."""
        self.tokens[slots, : tokens.shape[1]] = tokens
        self.fed[slots], self.first[slots] = lengths - 1, 0
        for layer in self.layers:
            layer.forget(slots)
        for kept, new in zip(self.films, self.model.films(tokens[:, :1], None), strict=True):
            for film, other in zip(kept, new, strict=True):
                if film:
                    film.table[slots] = other.table
        at = torch.arange(max(1, int(lengths.max()) - 1), device=tokens.device).expand(len(tokens), -1)
        seen = Seen(lengths - 1) if self.model.config.recall else None
        self.through(slots, at, seen, reading=True)
        if seen:
            self.remember(slots, seen)

    def remember(self, slots: Tensor, new: Seen) -> None:
        """Keep what was seen of prompts, for the passes over the answers to them."""
        if self.seen is None:
            count = len(self.fed)
            self.seen = Seen(new.end.new_zeros(count), new.places.new_empty(len(new.places), count, 0),
                             new.tallies.new_empty(*new.tallies.shape[:2], count))
        width = max(v.places.shape[2] for v in (self.seen, new))
        kept, places = (F.pad(v.places, (0, width - v.places.shape[2]), value=-1) for v in (self.seen, new))
        kept[:, slots], self.seen.places = places, kept
        self.seen.end[slots], self.seen.tallies[..., slots] = new.end, new.tallies

    def recall(self, slots: Tensor) -> Seen | None:
        """What was seen of the prompts in slots (R,)."""
        if self.seen is None:
            return None
        places = self.seen.places[:, slots]
        most = int((places[1] >= 0).sum(1).max())
        return Seen(self.seen.end[slots], places[..., :most], self.seen.tallies[..., slots])

    def through(self, slots: Tensor, at: Tensor, seen: Seen | None, reading: bool = False) -> Tensor | None:
        """The tokens at positions `at` (R, W) through all blocks: (R, W, D) after the last norm.

        While reading, states go on to `fed` at once, and what the last block says is not wanted.
        """
        if given_up.is_set():
            raise KeyboardInterrupt
        model = self.model
        known = self.tokens[slots, : int(at.max()) + 2]  # with what follows the last one: later positions may recall it
        x, rope = model.inputs(known, None, at, seen)
        place = Place(slots, at, rope, self.first[slots], self.fed[slots] if reading else None)
        for block, layer, films in zip(model.blocks, self.layers, self.films, strict=True):
            films = [film and film._replace(tasks=slots[:, None]) for film in films]
            wanted = not (reading and block is model.blocks[-1])
            y = layer.feed(block.norm1(x, film=films[0]), place, wanted)
            if not wanted:
                return None
            x = x + y
            x = x + block.mlp(block.norm2(x, film=films[1]))
        return model.norm(x)

    def feed(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R, W, V) of what follows each of the next `width` tokens, and their positions (R, W);
        those that do not fit stand at the last position, a spare one."""
        at = self.fed[slots, None] + torch.arange(width, device=slots.device)
        at = at.clamp(max=self.tokens.shape[1] - 1)
        return self.model.head(self.through(slots, at, self.recall(slots))).float().log_softmax(-1), at

    def advance(self, slots: Tensor, count: Tensor) -> None:
        """Go on to the first `count` (R,) of the tokens fed last, which were those of `slots`."""
        for layer in self.layers:
            layer.advance(count)
        self.fed[slots] += count

    def append(self, slots: Tensor, token: Tensor) -> None:
        """Put a token (R,) behind each row. One that opens a document sees none of what stands before it."""
        self.tokens[slots, self.fed[slots]] = token
        if self.model.config.document_token >= 0 and (opens := token >= self.model.config.document_token).any():
            opened = slots[opens]
            self.first[opened] = self.fed[opened]
            for layer in self.layers:
                layer.forget(opened)


# == ONE TOKEN AT A TIME ==============================================================================================


def last_documents(model: GPT, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) of `lengths` (B,) without the documents before the last one, which it does not see."""
    if model.config.document_token < 0:
        return tokens, lengths
    index = torch.arange(tokens.shape[1], device=tokens.device)
    opens = (tokens >= model.config.document_token) & (index < lengths[:, None])
    start = torch.where(opens, index, 0).amax(1)
    return tokens.gather(1, (start[:, None] + index).clamp(max=tokens.shape[1] - 1)), lengths - start


@torch.no_grad()
def stream(model: GPT, tokens: Tensor, lengths: Tensor, max_new_tokens: int, stop: int = -1,
           choose: Callable | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `generate` collects. Yields, token by token, the rows that have not said `stop` before (R,), what they say
    now (R,) and its log-probability (R,)."""
    tokens, lengths = last_documents(model, tokens, lengths)
    rows = torch.arange(len(tokens), device=tokens.device)
    carried = Carried(model, len(tokens), tokens.shape[1] + max_new_tokens)
    carried.read(rows, tokens, lengths)
    for _ in range(max_new_tokens):
        logp = carried.feed(rows, 1)[0][:, 0]  # (R, V)
        carried.advance(rows, torch.ones_like(rows))
        token = choose(logp) if choose else logp.argmax(-1)
        yield rows, token, logp.gather(1, token[:, None])[:, 0]
        carried.append(rows, token)
        rows = rows[token != stop]
        if not len(rows):
            return


def generate(model: GPT, tokens: Tensor, lengths: Tensor, max_new_tokens: int, stop: int = -1,
             choose: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Twin of train.generate: each new token costs a pass over itself alone."""
    new, total = tokens.new_full((len(tokens), max_new_tokens), stop), torch.zeros(len(tokens), device=tokens.device)
    count = 0
    for rows, token, logp in stream(model, tokens, lengths, max_new_tokens, stop, choose):
        new[rows, count] = token
        total[rows] += logp
        count += 1
    return new[:, :count], total


# == A WHOLE ANSWER AT A TIME =========================================================================================

MARGIN = 8  # tokens that a draft has at least
REACH = 32  # tokens of a draft that a pass takes at least, and four more for each one that the pass before confirmed
PASS = {"cpu": 200, "cuda": 1 << 14}  # tokens that take as long as a pass of none; CUDA: a guess


def padded(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor (B, longest), padded on the right with 0, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), max(1, int(lengths.max())), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return tokens.to(device), lengths.to(device)


class Drafts:
    """Answers in the making: each slot of `carried.tokens` holds a prompt, the confirmed part of its answer, a draft.

    `start`, `end` and `limit` (S,) are the positions where the answer begins, where the draft ends and where the answer
    has to end; a pass takes at most `reach` (S,) tokens of a draft.
    """

    def __init__(self, carried: Carried, stop: int):
        self.carried, self.stop = carried, stop
        self.start, self.end, self.limit, self.reach = (torch.zeros_like(carried.fed) for _ in range(4))

    def open(self, slots: Tensor, prompts: list[np.ndarray], drafts: list[np.ndarray], most: int) -> None:
        """Read prompts into slots (R,), with drafts of answers that have at most `most` tokens."""
        tokens, start = padded(prompts, slots.device)
        guess, size = padded([draft[: most - 1] for draft in drafts], slots.device)
        self.carried.read(slots, tokens, start)
        self.put(slots, start[:, None] + torch.arange(guess.shape[1], device=slots.device), guess)
        self.start[slots], self.end[slots], self.limit[slots] = start, start + size, start + most
        self.reach[slots] = most

    def put(self, slots: Tensor, at: Tensor, tokens: Tensor) -> None:
        """Write tokens (R, W) at positions (R, W) of slots (R,)."""
        self.carried.tokens[slots[:, None], at.clamp(max=self.carried.tokens.shape[1] - 1)] = tokens

    def confirm(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: which of slots (R,) are done, and the log-probability of what has been confirmed of each (R,)."""
        carried, begin, end = self.carried, self.carried.fed[slots] + 1, self.end[slots]  # of the drafts, positions
        logp, at = carried.feed(slots, int(torch.minimum(end - begin, self.reach[slots]).max()) + 1)
        best, says = logp.max(-1)  # (R, W)
        index, never = torch.arange(at.shape[1], device=at.device), self.carried.tokens.shape[1]
        size = (end - begin).clamp(max=at.shape[1] - 1)  # tokens of the draft in this pass
        fed = index <= size[:, None]  # (R, W): the last confirmed token and these
        right = (says[:, :-1] == carried.tokens[slots[:, None], at[:, 1:]]) & fed[:, 1:]
        n = torch.minimum(right.cumprod(1).sum(1) + 1, self.limit[slots] - begin)  # tokens confirmed
        stops = torch.where((says == self.stop) & fed, index, never)
        done = stops.amin(1) < n
        n = torch.where(done, stops.amin(1) + 1, n)
        self.put(slots, torch.where(fed, at + 1, never), says)
        carried.advance(slots, n)
        behind = torch.where(index >= n[:, None], stops, never).amin(1)  # where the new draft says stop
        self.end[slots] = torch.minimum(end + (size == end - begin), begin + behind)
        self.reach[slots] = REACH + 4 * n
        return done | (begin + n == self.limit[slots]), (best * (index < n[:, None])).sum(1)

    def lengthen(self, slots: Tensor) -> None:
        """Guess on where drafts are about to run out: what stands a grid row above.

        A row is as long as the last whole one of the draft; while there is none, the last token is repeated.
        """
        tokens, start, end = self.carried.tokens[slots], self.start[slots, None], self.end[slots, None]
        index = torch.arange(tokens.shape[1], device=tokens.device)
        marks = torch.where((tokens == ROW) & (index >= start) & (index < end), index, -1)
        last = marks.amax(1, keepdim=True)
        before = torch.where(marks < last, marks, -1).amax(1, keepdim=True).maximum(start - 1)
        stride = torch.where(last < 0, 1, last - before)
        room = (MARGIN + 1 + self.carried.fed[slots, None] - end).clamp(min=0)
        new = index[: int(room.max())].expand(len(slots), -1)
        self.put(slots, torch.where(new < room, end + new, len(index)), tokens.gather(1, end - stride + new % stride))
        self.end[slots] = torch.minimum(end + room, self.limit[slots, None] - 1)[:, 0]

    def parts(self, slots: Tensor) -> list[Tensor]:
        """Slots (R,) in passes whose drafts are about equally long, where that spares more padding than it costs."""
        size, order = torch.minimum(self.end - self.carried.fed, self.reach + 1)[slots].sort(descending=True)
        slots, size = slots[order], size.tolist()
        cost = [i * size[0] + (len(size) - i) * size[i] for i in range(1, len(size))]
        if not cost or min(cost) + PASS.get(slots.device.type, 200) >= len(size) * size[0]:
            return [slots]
        cut = cost.index(min(cost)) + 1
        return [*self.parts(slots[:cut]), *self.parts(slots[cut:])]

    def hopeless(self, slots: Tensor, most: int) -> Tensor:
        """Whether what is confirmed of the answers in slots (R,) cannot become a grid of at most 30 x 30 any more."""
        said, index = self.answers(slots, most), torch.arange(most, device=slots.device)
        known = (self.carried.fed + 1 - self.start)[slots]
        stride = torch.where(said == ROW, index, most).amin(1) + 1  # tokens a row; more than there are without a ROW
        ends = (index + 1) % stride[:, None] == 0
        wrong = torch.where(ends, said != ROW, said > 9) & (index < known[:, None])
        return wrong.any(1) | (torch.minimum(stride, known) > 31) | (known > 30 * stride)

    def answers(self, slots: Tensor, most: int) -> Tensor:
        """What is confirmed of the answers in slots (R,), and `stop` behind it: (R, most)."""
        at = self.start[slots, None] + torch.arange(most, device=slots.device)
        return self.carried.tokens[slots[:, None], at].masked_fill(at > self.carried.fed[slots, None], self.stop)


@torch.no_grad()
def draft_answers(model: GPT, prompts: list[np.ndarray], drafts: list[np.ndarray], max_new_tokens: int, stop: int,
                  batch_tokens: int = 1 << 15, grids: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What `generate` answers to prompts, without `choose`, in fewer passes if the drafts (without `stop`) are good.

    A pass goes over the last confirmed token and the draft behind it. What the model says there is confirmed up to and
    including the first token that the draft has not; what it says behind that is the next draft. At most `batch_tokens`
    of prompts and answers are carried at a time; where half of the rows are done, the next prompts take their places.
    With `grids`, an answer ends, too, where it cannot become a grid any more.

    Returns tokens (B, max_new_tokens), log-probabilities (B,) and how many passes each answer took (B,).
    """
    device, capacity = model.head.weight.device, max(map(len, prompts)) + max_new_tokens
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    count = max(1, min(len(prompts), batch_tokens // capacity))
    made = Drafts(Carried(model, count, capacity), stop)
    row = torch.zeros(count, dtype=torch.long, device=device)  # the prompt in each slot
    slots, free = row[:0], torch.arange(count, device=device)
    new, total = row.new_full((len(prompts), max_new_tokens), stop), torch.zeros(len(prompts), device=device)
    taken = torch.zeros_like(new[:, 0])
    while waiting or len(slots):
        while waiting and len(free) and 2 * len(slots) <= count:
            n = min(len(free), len(waiting), max(1, batch_tokens // 4 // len(prompts[waiting[0]])))
            (chunk, waiting), (taking, free) = (waiting[:n], waiting[n:]), (free[:n], free[n:])
            made.open(taking, [prompts[i] for i in chunk], [drafts[i] for i in chunk], max_new_tokens)
            row[taking], slots = torch.tensor(chunk, device=device), torch.cat([slots, taking])
        made.lengthen(slots)
        going = []
        for part in made.parts(slots):
            done, logp = made.confirm(part)
            total[row[part]] += logp
            taken[row[part]] += 1
            done |= made.hopeless(part, max_new_tokens) if grids else False
            new[row[part[done]]] = made.answers(part[done], max_new_tokens)
            going, free = [*going, part[~done]], torch.cat([free, part[done]])
        slots = torch.cat(going)
    return new, total, taken


def guess_answer(prompt: np.ndarray) -> np.ndarray:
    """A first draft: the test input where outputs have the shapes of their inputs, else the last output shown."""
    grids = np.split(prompt, np.flatnonzero((prompt == IN) | (prompt == OUT)))[1:-1]
    ends = [np.flatnonzero(grid == ROW) for grid in grids]
    same = all(map(np.array_equal, ends[:-1:2], ends[1::2]))
    return (grids[-1] if same else grids[-2][:-1])[1:]  # without the mark, without END


def on_cores(work: Callable, prompts: list[np.ndarray], runtime: Any, batch_tokens: int) -> list:
    """work(indices, batch_tokens) for shares of the prompts, one for each core of a CPU: results in prompt order."""
    parts = max(1, min(cores() if runtime.device.type == "cpu" else 1, len(prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    shares = [order[i::parts] for i in range(parts)] if prompts else []

    def begin(share: list[int]) -> Any:
        with runtime.autocast():  # a thread's own
            return work(share, batch_tokens // parts)

    found = (on_threads if parts > 1 else map)(begin, shares)
    results = dict(pair for share, part in zip(shares, found, strict=True) for pair in zip(share, part, strict=True))
    return [results[i] for i in range(len(prompts))]


def answer_prompts(model: GPT, prompts: list[np.ndarray], runtime: Any, max_new_tokens: int, batch_tokens: int,
                   drafts: list[np.ndarray | None] | None = None,
                   passes: list[int] | None = None) -> list[tuple[Grid | None, float]]:
    """Twin of train.answer_prompts, from the drafts given, or else `guess_answer`'s.

    What cannot become a grid is not answered to its end, and its log-probability is that of the part answered.
    `passes` gets the number of passes of each answer.
    """
    drafts = drafts or [None] * len(prompts)
    drafts = [guess_answer(p) if draft is None else draft for p, draft in zip(prompts, drafts, strict=True)]

    def work(share: list[int], batch_tokens: int) -> Iterator[tuple]:
        found = draft_answers(model, [prompts[i] for i in share], [drafts[i] for i in share], max_new_tokens, END,
                              batch_tokens, grids=True)
        return zip(*(v.tolist() for v in found), strict=True)

    answers = on_cores(work, prompts, runtime, batch_tokens)
    if passes is not None:
        passes += [taken for *_, taken in answers]
    return [(decode_grid(tokens), logp) for tokens, logp, _ in answers]


def answer_logprobs(model: GPT, prompts: list[np.ndarray], answers: list[list[np.ndarray]], runtime: Any,
                    batch_tokens: int) -> list[list[float]]:
    """Log-probabilities of several answers (END included) to each prompt: each prompt is read once, and an answer costs
    one pass over itself."""

    @torch.no_grad()
    def work(share: list[int], batch_tokens: int) -> list[list[float]]:
        found: dict[int, list[float]] = {i: [] for i in share}
        while share:
            longest = max((len(answer) for i in share for answer in answers[i]), default=1)
            count = max(1, min(len(share), batch_tokens // (len(prompts[share[-1]]) + longest)))
            chunk, share = share[-count:], share[:-count]
            tokens, lengths = padded([prompts[i] for i in chunk], model.head.weight.device)
            carried = Carried(model, count, tokens.shape[1] + longest)
            carried.read(torch.arange(count, device=tokens.device), tokens, lengths)
            for turn in range(max(len(answers[i]) for i in chunk)):
                slots = torch.tensor([s for s, i in enumerate(chunk) if turn < len(answers[i])], device=tokens.device)
                said, size = padded([answers[i][turn] for i in chunk if turn < len(answers[i])], tokens.device)
                at = lengths[slots, None] + torch.arange(said.shape[1], device=tokens.device)
                carried.tokens[slots[:, None], at] = said
                logp = carried.feed(slots, said.shape[1])[0].gather(2, said[..., None])[..., 0]
                total = (logp * (at < (lengths[slots] + size)[:, None])).sum(1)
                for s, value in zip(slots.tolist(), total.tolist(), strict=True):
                    found[chunk[s]].append(value)
        return list(found.values())

    return on_cores(work, prompts, runtime, batch_tokens)


@functools.cache
def tokenizer_at_hand(name: str) -> Any:
    """The tokenizer, or why there is none, a str: a vocabulary may have to be downloaded, which is tried once."""
    try:
        return load_tokenizer(name)
    except UserError as error:
        return str(error)


def describe_text(model: GPT, data: Data, runtime: Runtime, loss: float) -> dict[str, Any]:
    """The loss in bits per byte of what `evaluate` reads, and a "sample": the first 24 tokens of that, and 48 drawn
    behind them, the same draw every time. Where the tokenizer cannot be had, the sample says why."""
    text = np.concatenate([s[: 128 * data.val.block_size] for s in data.val.shards])[: 128 * data.val.block_size]
    meta = read_meta(data.val.files[0].parent)
    tokenizer = tokenizer_at_hand(meta["tokenizer"]) if meta else ""
    if isinstance(tokenizer, str):
        return {"sample": f"none: {tokenizer}"} if meta else {}
    prompt, generator = text[:24].astype(np.int64), torch.Generator().manual_seed(0)

    def choose(logp: Tensor) -> Tensor:
        logp = logp.nan_to_num(neginf=-1e9)  # of a model that went astray
        p = (logp[:, : tokenizer.n_vocab].cpu() / 0.8).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logp.device)

    tokens = torch.from_numpy(prompt)[None].to(runtime.device)
    with runtime.autocast():
        new, _ = generate(model, tokens, torch.full_like(tokens[:, 0], len(prompt)), 48, choose=choose)
    return {"bits_per_byte": loss / math.log(2) / bytes_per_token(tokenizer, text),
            "sample": " | ".join(tokenizer.decode(part.tolist()) for part in (prompt, new[0]))}
