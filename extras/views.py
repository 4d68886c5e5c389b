"""An ARC task in many views: symmetries, colours and orders of the demonstrations. All answer; four judge."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train
from arc_data.tasks import Grid, Pair, Task, apply_symmetry, as_json, random_colours
from data.files import write_json
from extras.decode import answer_logprobs, answer_prompts
from extras.memory import within_memory
from train import END, GPT, Data, Runtime, TrainConfig, encode_grid, make_prompt, score_answers

ROUNDS = 0, 2, 6  # first view of each round; a later one is given what has most votes by then as a draft
LONGEST = 30 * 31 + 1  # tokens of the largest answer
VIEWS = 8  # of each output in the last evaluation of a run
JUDGES = 4  # views, the first, that judge what all have answered: more cost more and found hardly more


# == VIEWS ============================================================================================================


class Question(NamedTuple):
    """What a model may see of a task."""

    name: str
    demonstrations: list[Pair]
    inputs: list[Grid]  # one a test output


class View(NamedTuple):
    """One way to show a task: every grid turned and recoloured, the demonstrations in this order."""

    symmetry: int
    colours: np.ndarray
    order: list[int]

    def show(self, grid: Grid) -> Grid:
        """A grid of the task as this view has it."""
        return self.colours[apply_symmetry(grid, self.symmetry)]

    def undo(self, grid: Grid) -> Grid:
        """The grid that `show` would turn into this one."""
        back = {1: 3, 3: 1}.get(self.symmetry, self.symmetry)  # every other symmetry is its own inverse
        return apply_symmetry(np.argsort(self.colours).astype(np.uint8)[grid], back)


def make_view(seed: int, question: Question, k: int) -> View:
    """View k of a task, a function of (seed, name of the task, k). View 0 is the task as it stands.

    Eight views in a row have the eight symmetries; colours and order are random, black stays black.
    """
    n = len(question.demonstrations)
    if k == 0:
        return View(0, np.arange(10, dtype=np.uint8), list(range(n)))
    rng = np.random.default_rng([seed, k, *question.name.encode()])
    return View(k % 8, random_colours(rng), rng.permutation(n).tolist())


def view_prompt(question: Question, test: int, view: View, block_size: int,
                task_tokens: dict[str, int]) -> tuple[np.ndarray, int]:
    """The prompt of one test input in one view, and how many demonstrations did not fit block_size."""
    pairs = [tuple(view.show(g) for g in question.demonstrations[i]) for i in view.order]
    query = Task(question.name, [*pairs, (view.show(question.inputs[test]), None)])
    prompt = make_prompt(query, block_size, task_tokens)
    return prompt, len(pairs) - int((prompt == END).sum())


# == VOTES ============================================================================================================


class Candidate(NamedTuple):
    """An answer that some views agree on."""

    grid: Grid
    votes: int
    logprob: float  # mean over those views of the log-probability of the whole answer, in nats


def vote(answers: Iterable[tuple[Grid | None, float]], query: Grid) -> tuple[list[Candidate], dict[str, int]]:
    """Candidates, best first, and how many answers were "malformed" and how many "copies" of the input `query`.

    `answers` are (grid, summed log-probability of its tokens), mapped back from their views. Most votes win. Among
    equals the higher sum over their views of the log-probability does (with equal votes the order of the means is the
    same): every view has a say in it, where the maximum would ask only the surest one. What is still equal goes by
    shape and cells. Nothing depends on the order of the answers.
    """
    found: dict[tuple, tuple[Grid, list[float]]] = {}
    dropped = {"malformed": 0, "copies": 0}
    for grid, logprob in answers:
        if grid is None:
            dropped["malformed"] += 1
        elif np.array_equal(grid, query):
            dropped["copies"] += 1
        else:
            found.setdefault((grid.shape, grid.tobytes()), (grid, []))[1].append(logprob)
    means = {key: math.fsum(logprobs) / len(logprobs) for key, (_, logprobs) in found.items()}
    best = sorted(found, key=lambda key: (-len(found[key][1]), -means[key], key))
    return [Candidate(found[key][0], len(found[key][1]), means[key]) for key in best], dropped


def two_attempts(candidates: list[list[list[int]]], query: Grid) -> tuple[Grid, Grid]:
    """The best two candidates (grids as lists). A missing second repeats the first; without any, both are the input.

    Every output needs two grids in Kaggle's layout, and a copy of the input can never be right by chance.
    """
    grids = [np.array(grid, dtype=np.uint8) for grid in candidates[:2]] or [query]
    return grids[0], grids[-1]


# == ANSWERS ==========================================================================================================


def extent(grid: Grid) -> int:
    """Tokens of a grid as an answer, in whichever view it is longest."""
    return grid.size + max(grid.shape) + 1


def answer_limit(question: Question) -> int:
    """Tokens after which an answer cannot be right any more, far above what the demonstrations suggest.

    Three times the longest grid of the task, or more where its outputs have more than three times their inputs' cells.
    It holds for every official task, and a model that finds no end is stopped before it has filled a 30 x 30 grid.
    """
    longest = max(map(extent, [*question.inputs, *(g for pair in question.demonstrations for g in pair)]))
    growth = max(grid_out.size / grid_in.size for grid_in, grid_out in question.demonstrations)
    return min(LONGEST, math.ceil(longest * max(3.0, growth)))


class Shown:
    """One test input of a task in its views, and the answers to them so far."""

    def __init__(self, question: Question, test: int, views: int, seed: int, block_size: int, tokens: dict[str, int]):
        self.query, self.limit = question.inputs[test], answer_limit(question)
        self.views = [make_view(seed, question, k) for k in range(views)]
        prompts = [view_prompt(question, test, view, block_size, tokens) for view in self.views]
        self.prompts, self.left_out = [prompt for prompt, _ in prompts], sum(dropped for _, dropped in prompts)
        self.answers: list[tuple[Grid | None, float]] = []  # mapped back from their views

    def vote(self) -> tuple[list[Candidate], dict[str, int]]:
        """See `vote`."""
        return vote(self.answers, self.query)

    def candidates(self) -> list[Candidate]:
        """The best first."""
        return self.vote()[0]


def answer_in_views(model: GPT, shown: list[Shown], runtime: Runtime, batch_tokens: int) -> None:
    """Answer all in all their views. The first views of all come first: what has most votes then is the draft, as the
    later view shows it."""
    limit, count = max(s.limit for s in shown), len(shown[0].views)
    for start, stop in itertools.pairwise([*(first for first in ROUNDS if first < count), count]):
        best = [s.candidates()[:1] for s in shown]
        asked = [(i, k) for i in range(len(shown)) for k in range(start, stop)]
        drafts = [encode_grid(shown[i].views[k].show(best[i][0].grid)) if best[i] else None for i, k in asked]
        prompts = [shown[i].prompts[k] for i, k in asked]
        for (i, k), (grid, logprob) in zip(asked, answer_prompts(model, prompts, runtime, limit, batch_tokens, drafts),
                                           strict=True):
            fits = grid is not None and grid.size + len(grid) < shown[i].limit  # the others may have a larger one
            shown[i].answers.append((shown[i].views[k].undo(grid) if fits else None, logprob))


def rescored(model: GPT, shown: list[Shown], runtime: Runtime, batch_tokens: int) -> list[list[Candidate]]:
    """The candidates of each output by the sum, over its first views, of their log-probabilities: a product of experts,
    in which a candidate that one view thinks impossible loses (Franzen et al. 2025, arXiv:2505.07859)."""
    best = [s.candidates() for s in shown]
    asked = [(i, k) for i, s in enumerate(shown) for k in range(len(s.views))[:JUDGES] if len(best[i]) > 1]
    answers = [[np.append(encode_grid(shown[i].views[k].show(c.grid)), END) for c in best[i]] for i, k in asked]
    totals = [np.zeros(len(candidates)) for candidates in best]
    found = answer_logprobs(model, [shown[i].prompts[k] for i, k in asked], answers, runtime, batch_tokens)
    for (i, _), logprobs in zip(asked, found, strict=True):
        totals[i] += logprobs
    orders = [np.argsort(-total, kind="stable") for total in totals]
    return [[candidates[j] for j in order] for candidates, order in zip(best, orders, strict=True)]


def answer_questions(model: GPT, data: Data, cfg: TrainConfig, runtime: Runtime, folder: Path,
                     last: bool) -> dict[str, float]:
    """Scores of greedy answers to the held-out questions; at the end of a run, of the best answer in 8 views and of
    the best two.

    `predictions.json` then has the attempt that is right, or else the first.
    """
    if not last:
        return train.answer_questions.plain(model, data, cfg, runtime, folder, last)
    questions = [Question(name, pairs[:-1], [pairs[-1][0]]) for name, pairs in data.questions]

    def answered(batch_tokens: int) -> list[list[Candidate]]:
        shown = [Shown(q, 0, VIEWS, 0, model.config.block_size, data.task_tokens) for q in questions]
        answer_in_views(model, shown, runtime, batch_tokens)
        return rescored(model, shown, runtime, batch_tokens)

    best, _ = within_memory(answered, 1 << 19 if runtime.device.type == "cuda" else 1 << 15, runtime.say)
    attempts = [two_attempts([c.grid for c in b], q.inputs[0]) for b, q in zip(best, questions, strict=True)]
    right = [[np.array_equal(grid, truth) for grid in two] for two, truth in zip(attempts, data.answers, strict=True)]
    names, entries = [task.name for task in data.questions], []
    for i, (task, two, hits) in enumerate(zip(data.questions, attempts, right, strict=True)):
        second = hits[1] and not hits[0]
        entries.append(as_json(task) | {"test": names[:i].count(task.name), "attempt": 1 + second,
                                        "prediction": two[second].tolist(), "truth": data.answers[i].tolist()})
    write_json(folder / "predictions.json", entries)
    return score_answers([two[0] for two in attempts], data.answers) | {"pass@2": sum(map(any, right)) / len(right)}
