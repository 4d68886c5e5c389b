"""Training recipes side by side at equal compute, on tasks small enough for one CPU core.

    python bench/recipe.py prepare --one-d ~/1D-ARC/dataset      # tasks to runs/recipe; without --one-d only `small`
    python bench/recipe.py run --data small --variants base token-only --seeds 0 1 2 --minutes 4
    python bench/recipe.py run --data 1d --variants base token-only --seeds 0 1 2 --minutes 4
    python bench/recipe.py table                                 # what bench/LOG.md shows

`small`: ARC-1 *training* tasks with grids up to 10 x 10, a fifth held out. `1d`: 1D-ARC (khalil-research/1D-ARC), a
fifth of each family held out ("known" families), and three families held out whole ("new"). ARC's evaluation tasks
are never read. As in a record run, the demonstrations of held-out tasks, never their tests, are learned from.

Every run is a process of its own with one thread, and its minutes are minutes of CPU time: whatever else runs on the
machine, or a pause of the process, takes no step away. Each adds one line to results.jsonl, and is not done again.
`exact` is the share of test outputs that one greedy answer gets right, `voted` the share that the most frequent answer
over 8 views does.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import solve  # noqa: E402
import train  # noqa: E402
from solve import Question  # noqa: E402
from train import GPT, IGNORE_INDEX, OUT, ArcDataLoader, DataError, GridLayout, Task  # noqa: E402

COMMON = "--preset nano --holdout 0 --eval-every 0 --save-every 0 --device cpu --batch-size 16 --demonstrations both"
SIDES = {"small": 10, "1d": 30}  # longest side of a grid
ANSWER = {"small": 10 * 11 + 1, "1d": 30 * 2 + 1}  # tokens of the longest answer; a row of 30 may stand upright
VIEWS = 8
NEW_FAMILIES = 3


# == VARIANTS =========================================================================================================


class AnswerOnly(ArcDataLoader):
    """Only the last output of a sequence is supervised."""

    def sequence(self, row):
        x, y = super().sequence(row)
        y[: np.flatnonzero(x == OUT)[-1]] = IGNORE_INDEX
        return x, y


class SinglePair(ArcDataLoader):
    """Every pair is a sequence of its own, behind its task's token."""

    def __init__(self, tasks, *args, **more):
        super().__init__([Task(t.name, [pair]) for t in tasks for pair in t.pairs], *args, **more)


class Mixed(ArcDataLoader):
    """Three sequences in ten are one pair behind its task's token."""

    def plan(self, row):
        pairs, symmetry, colours, token, total = super().plan(row)
        task = self.tasks[row]
        if self.rng(1 + len(self.tasks) + row).random() < 0.3:
            pairs, token = pairs[-1:], self.task_tokens.get(task.name, token)
            total = train.pair_length(task.pairs[pairs[0]], turned=symmetry % 2)
        return pairs, symmetry, colours, token, total


class NoTaskToken(ArcDataLoader):
    """Every sequence begins with the token of an unknown task."""

    def __init__(self, *args, task_tokens=None, **more):
        super().__init__(*args, **more)


class Upright(ArcDataLoader):
    """Grids are neither turned nor mirrored."""

    def plan(self, row):
        pairs, _, colours, token, _ = super().plan(row)
        lengths = [train.pair_length(self.tasks[row].pairs[i]) for i in pairs]
        while len(pairs) > 1 and sum(lengths) > self.block_size:
            pairs, lengths = pairs[1:], lengths[1:]
        return pairs, 0, colours, token, sum(lengths)


class Doubled(ArcDataLoader):
    """Half of the times, a task whose grids then still fit is shown with every cell as 2 x 2 cells."""

    def __init__(self, tasks, *args, **more):
        super().__init__(tasks, *args, **more)
        most = max(t.largest() for t in self.tasks)
        self.plain = self.tasks
        self.large = [self.double(t) if 2 * t.largest() <= most else t for t in self.tasks]

    @staticmethod
    def double(task):
        return Task(task.name, [tuple(g.repeat(2, 0).repeat(2, 1) for g in pair) for pair in task.pairs])

    def batches(self):
        larger = self.rng(1 + len(self.plain)).random(len(self.plain)) < 0.5
        self.tasks = [b if twice else a for a, b, twice in zip(self.plain, self.large, larger, strict=True)]
        return super().batches()


class HeldOutTwice(ArcDataLoader):
    """While the learning rate falls, what the held-out tasks may teach comes twice an epoch."""

    names: set[str] = set()  # of the held-out tasks
    progress = 0.0  # of the run, 0 to 1

    def __init__(self, tasks, *args, **more):
        super().__init__(tasks, *args, **more)
        self.plain = self.tasks

    def batches(self):
        falls = self.train and self.progress >= 1 - train.TrainConfig.decay_frac
        self.tasks = self.plain + [t for t in self.plain if falls and t.name in self.names]
        return super().batches()


PLAIN_SCHEDULE = train.schedule


def watched_schedule(progress, warmup_frac, decay_frac):
    """The schedule, which tells `HeldOutTwice` how far the run is."""
    HeldOutTwice.progress = progress
    return PLAIN_SCHEDULE(progress, warmup_frac, decay_frac)


class TokenOnly(GPT):
    """The task's vector is its first token's and no more; it does not scale and shift every block."""

    def __init__(self, cfg):
        super().__init__(cfg)
        del self.film

    def films(self, tokens, documents):
        return [None] * len(self.blocks)


class TaskEverywhere(TokenOnly):
    """The task's vector is added to every token of its sequence instead."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.embed_role.register_forward_hook(lambda module, args, out: out + self.embed(self.first))

    def hidden(self, tokens, cache=None):
        self.first = (cache.tokens if cache is not None and cache.stepping else tokens)[:, :1]
        return super().hidden(tokens, cache)


class Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, x):
        return 0.0


class NoNeighbourhood(GPT):
    """No cells of the input at an output's positions."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.embed_near = Nothing()


class NoNeighbours(GridLayout):
    """A layout that does not look them up, which saves the time."""

    def neighbourhood(self, tokens):
        return tokens.new_zeros(*self.col.shape, 0)


class Flat(GPT):
    """Knows the index of a token and nothing of grids."""

    def __init__(self, cfg):
        super().__init__(cfg)
        for name in ("embed_col", "embed_row", "embed_role", "embed_near", "film"):
            delattr(self, name)
        self.config = dataclasses.replace(cfg, grid=False)


class FirstRows(nn.Module):
    """A head made of an embedding's first rows."""

    def __init__(self, embed, count):
        super().__init__()
        self.embed, self.count = [embed], count  # in a list, so that its weight is not counted twice

    @property
    def weight(self):
        return self.embed[0].weight[: self.count]

    def forward(self, x):
        return F.linear(x, self.weight)


class Tied(GPT):
    """The head is the embedding of the sixteen tokens that can be answered."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.head = FirstRows(self.embed, cfg.vocab_size)


def torch_muon(params, lr, weight_decay):
    """torch's Muon at AdamW's scale, as NorMuon has it."""
    return torch.optim.Muon(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def cosine(progress, warmup_frac, decay_frac):
    """The same warm-up, then half a cosine to 0."""
    return max(0.0, min((progress + 1e-3) / (warmup_frac + 1e-3), (1 + math.cos(math.pi * min(1.0, progress))) / 2))


class Variant(NamedTuple):
    """A recipe: flags of train.py behind the common ones, and names of train.py that stand for something else."""

    text: str
    flags: str = ""
    patch: dict[str, Any] = {}
    context: bool = True  # the demonstrations are in the prompt
    still: tuple[str, ...] = ()  # what the views leave as it is, because training does


VARIANTS = {
    "base": Variant("the default recipe: MAMA, task token with scale and shift, grid positions and neighbourhood, "
                    "NorMuon, every output"),
    "mma": Variant("one attention layer in four, second from the end; d_ff for equal parameters",
                   "--pattern MMAM --d-ff 316"),
    "aaaa": Variant("attention only; d_ff for equal parameters", "--pattern AAAA --d-ff 400"),
    "mmmm": Variant("Mamba-2 only; d_ff for equal parameters", "--pattern MMMM --d-ff 288"),
    "answer-only": Variant("loss on the last output of a sequence only", patch={"ArcDataLoader": AnswerOnly}),
    "single-pair": Variant("a sequence is one pair behind its task's token, which is never dropped, in training and at "
                           "the test; 64 a step, as many outputs as base", "--batch-size 64",
                           {"ArcDataLoader": SinglePair, "TASK_DROPOUT": 0.0}, context=False),
    "mixed-70-30": Variant("three sequences in ten are one pair behind its task's token",
                           patch={"ArcDataLoader": Mixed}),
    "held-out-twice": Variant("while the learning rate falls, the demonstrations of held-out tasks come twice an epoch",
                              patch={"ArcDataLoader": HeldOutTwice, "schedule": watched_schedule}),
    "task-kept": Variant("no sequence goes without its task's token", patch={"TASK_DROPOUT": 0.0}),
    "no-task-token": Variant("every task is unknown: demonstrations only", patch={"ArcDataLoader": NoTaskToken}),
    "token-only": Variant("the task is its first token; it scales and shifts no block", patch={"GPT": TokenOnly}),
    "task-everywhere": Variant("the task's vector is added to every token instead", patch={"GPT": TaskEverywhere}),
    "adamw": Variant("AdamW for all parameters", "--optimizer adamw --max-lr 2e-3"),
    "torch-muon": Variant("torch.optim.Muon in NorMuon's place", patch={"NorMuon": torch_muon}),
    "no-neighbourhood": Variant("without the 3 x 3 input cells around the cell to predict",
                                patch={"GPT": NoNeighbourhood, "GridLayout": NoNeighbours}),
    "flat-positions": Variant("index in the sequence for row, column and grid; no neighbourhood either",
                              patch={"GPT": Flat}),
    "ema": Variant("measures an average over the last twentieth of the steps", "--ema 0.05"),
    "dropout": Variant("dropout on what each mixer and MLP adds", "--dropout 0.1"),
    "cosine": Variant("half a cosine in place of stable and decay", patch={"schedule": cosine}),
    "batch-8": Variant("half the batch", "--batch-size 8"),
    "batch-32": Variant("twice the batch", "--batch-size 32"),
    "scale-2": Variant("half of the times twice the size, where it fits", patch={"ArcDataLoader": Doubled}),
    "tied": Variant("head and embedding share their sixteen rows", patch={"GPT": Tied}),
    "lr-2.5e-3": Variant("half the learning rate", "--max-lr 2.5e-3"),
    "lr-1e-2": Variant("twice the learning rate", "--max-lr 1e-2"),
    "no-colours": Variant("colours are not permuted, nor in the views",
                          patch={"random_colours": lambda rng: np.arange(10, dtype=np.uint8)}, still=("colours",)),
    "no-symmetries": Variant("grids are not turned or mirrored, nor in the views", patch={"ArcDataLoader": Upright},
                             still=("symmetry",)),
    "training-only": Variant("does not learn from the demonstrations of held-out tasks", "--demonstrations training"),
}


# == DATA =============================================================================================================

Parts = dict[str, dict[str, list]]  # task name -> {"train": pairs, "test": pairs}


def by_hash(names: Any) -> list[str]:
    """Names in an order that has nothing to do with what they say."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def fresh_tests(tasks: Parts) -> Parts:
    """Tasks without the tests that recur, up to symmetry and colours, as a demonstration or an earlier test."""
    seen = {train.canonical_hash(pair) for task in tasks.values() for pair in task["train"]}
    kept = {}
    for name, task in sorted(tasks.items()):
        tests = []
        for pair in task["test"]:
            if (key := train.canonical_hash(pair)) not in seen:
                tests.append(pair)
                seen.add(key)
        if tests:
            kept[name] = {"train": task["train"], "test": tests}
    return kept


def fresh_demonstrations(tasks: Parts) -> Parts:
    """Tasks without the demonstrations that another task, or their own, has already; those left with two or more."""
    seen: set[str] = set()
    kept = {}
    for name, task in sorted(tasks.items()):
        pairs = []
        for pair in task["train"]:
            if (key := train.canonical_hash(pair)) not in seen:
                pairs.append(pair)
                seen.add(key)
        if len(pairs) > 1:
            kept[name] = {"train": pairs, "test": task["test"]}
    return kept


def read_small(arc: Path) -> tuple[Parts, dict[str, list[str]]]:
    """ARC-1 training tasks up to 10 x 10, and the fifth of their names that is held out."""
    tasks = {name: t for name, t in train.read_split(arc, "training").items()
             if name not in train.SHARE_EVALUATION_PAIRS and Task(name, t["train"] + t["test"]).largest() <= 10}
    kept = fresh_tests(tasks)
    print(f"small: {len(tasks)} tasks; left out: {len(tasks) - len(kept)} whose tests recur elsewhere")
    return kept, {"held-out": sorted(by_hash(kept)[: len(kept) // 5])}


def read_one_d(folder: Path) -> tuple[Parts, dict[str, list[str]]]:
    """1D-ARC without what is too wide or recurs, and the names held out: of known families, and of new ones."""
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise DataError(f"--one-d {folder}: no family folders with task files (*.json) there")
    tasks, family = {}, {}
    for file in files:
        try:
            tasks[file.stem], family[file.stem] = train.read_task(file), file.parent.name
        except DataError as error:
            if "sides must be 1 to 30" not in str(error):
                raise
    kept = fresh_tests(fresh_demonstrations(tasks))
    members = defaultdict(list)
    for name in kept:
        members[family[name]].append(name)
    new = by_hash(members)[:NEW_FAMILIES]
    known = [name for f in sorted(members) if f not in new for name in by_hash(members[f])[len(members[f]) * 4 // 5 :]]
    print(f"1d: {len(files)} tasks; left out: {len(files) - len(tasks)} with sides over 30, "
          f"{len(tasks) - len(kept)} that recur; {len(members)} families left, of which new: {', '.join(sorted(new))}")
    return kept, {"known": sorted(known), "new": sorted(name for f in new for name in members[f])}


def official(task: dict[str, list]) -> dict[str, list]:
    """A task in the official layout, ready for JSON."""
    return {part: [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs] for part, pairs in task.items()}


def write_data(target: Path, tasks: Parts, groups: dict[str, list[str]]) -> None:
    """training/, evaluation/ and groups.json (who of the latter is what) in a folder that is whole or not there."""
    held = {name for names in groups.values() for name in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for split in ("training", "evaluation"):
            (fresh / split).mkdir(parents=True)
        for name, task in tasks.items():
            train.write_json(fresh / ("evaluation" if name in held else "training") / f"{name}.json", official(task))
        train.write_json(fresh / "groups.json", groups)
        fresh.rename(target)
    counts = ", ".join(f"{len(names)} {group}" for group, names in groups.items())
    print(f"wrote {target}: {len(tasks) - len(held)} tasks to learn from; {counts}")


def prepare(out: Path, one_d: Path | None, arc: Path = ROOT / "arc_data" / "arcagi") -> None:
    """Both data folders; those that are there already stay."""
    wanted = ({"1d": lambda: read_one_d(one_d)} if one_d else {}) | {"small": lambda: read_small(arc)}
    for name, read in wanted.items():
        if (out / name).exists():
            print(f"{out / name} is there already; remove it to make it again")
            continue
        if name == "small" and not arc.is_dir():
            if subprocess.run([sys.executable, ROOT / "arc_data" / "prepare.py", "--version", "arcagi"]).returncode:
                raise DataError(f"{arc}: the ARC tasks could not be written there; see the line above")
        write_data(out / name, *read())


# == MEASURE ==========================================================================================================


def read_groups(folder: Path, context: bool) -> dict[str, list[tuple[Question, np.ndarray]]]:
    """The held-out test outputs of each group: a question with one test input, and its answer."""
    tasks = train.read_split(folder, "evaluation")
    groups = json.loads((folder / "groups.json").read_text(encoding="utf-8"))
    return {group: [(Question(name, tasks[name]["train"] if context else [], [query]), answer)
                    for name in names for query, answer in tasks[name]["test"]] for group, names in groups.items()}


def answer_views(model: GPT, questions: list[Question], tokens: dict[str, int], runtime: Any, longest: int,
                 still: tuple[str, ...] = ()) -> list[list[tuple[np.ndarray | None, float]]]:
    """Greedy answers to every question under every view, turned back, with their log-probabilities.

    `still` names what the views leave as it is: "symmetry", "colours".
    """
    views = []
    for question in questions:
        first, *others = (solve.make_view(0, question, k) for k in range(VIEWS))
        views += [first, *(view._replace(**{name: getattr(first, name) for name in still}) for view in others)]
    prompts = [solve.view_prompt(questions[i // VIEWS], 0, view, model.config.block_size, tokens)[0]
               for i, view in enumerate(views)]
    replies = train.answer_prompts(model, prompts, runtime, longest, 16 * model.config.block_size)
    found = [(grid if grid is None else np.ascontiguousarray(view.undo(grid)), logp)
             for view, (grid, logp) in zip(views, replies, strict=True)]
    return [found[i : i + VIEWS] for i in range(0, len(found), VIEWS)]


def measure(model: GPT, data: Any, cfg: Any, runtime: Any, variant: Variant, longest: int) -> dict[str, dict]:
    """Loss and exact answers of each group of held-out outputs."""
    model.eval()
    tokens, found = data.train.task_tokens, {}
    for group, asked in read_groups(Path(cfg.data_dir), variant.context).items():
        questions, answers = [q for q, _ in asked], [answer for _, answer in asked]
        answered = [Task(q.name, [*q.demonstrations, (q.inputs[0], answer)]) for q, answer in asked]
        loader = ArcDataLoader(answered, 16, model.config.block_size, train=False, task_tokens=tokens)
        views = answer_views(model, questions, tokens, runtime, longest, variant.still)
        ranked = [solve.vote(v, q.inputs[0])[0] for v, q in zip(views, questions, strict=True)]
        voted = [candidates[0].grid if candidates else None for candidates in ranked]
        found[group] = {
            "outputs": len(questions),
            "loss": train.validation_loss(model, loader, runtime),
            "exact": train.score_answers([v[0][0] for v in views], answers)["solve_rate"],
            "voted": train.score_answers(voted, answers)["solve_rate"],
        }
    return found


# == RUN ==============================================================================================================


def train_and_measure(out: Path, data: str, name: str, seed: int, minutes: float, extra: str = "") -> dict[str, Any]:
    """One row: train a variant for so many minutes of CPU time and measure it; `extra` flags come last.

    Raises SystemExit where the run was stopped or refused; the reason has been printed.
    """
    variant, row, began = VARIANTS[name], {}, time.process_time()

    def evaluate(model, data_, cfg, runtime, folder):  # once, when the budget is spent, in train.evaluate's place
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["tokens"] = data_.train.tokens - data_.train.padding
        row["groups"] = measure(model, data_, cfg, runtime, variant, ANSWER[data])
        return {}

    def finish(folder, data_, found, step, spent, skipped):  # in place of the summary and its pictures
        row.update(steps=step, tokens_per_second=row["tokens"] / (60 * spent))

    flags = f"{COMMON} --max-grid {SIDES[data]} --max-minutes {minutes:g} --seed {seed} {variant.flags} {extra}"
    folders = ["--data-dir", str(out / data), "--out-dir", str(out / "runs" / f"{data}-{name}-{seed}-{minutes:g}")]
    ours = dict(time=SimpleNamespace(monotonic=time.process_time), evaluate=evaluate, finish=finish,
                save_checkpoint=lambda path, state: None)
    HeldOutTwice.names, HeldOutTwice.progress = {f.stem for f in (out / data / "evaluation").glob("*.json")}, 0.0
    with mock.patch.multiple(train, **ours, **variant.patch):
        if train.main(flags.split() + folders) or "steps" not in row:
            raise SystemExit(1)
    return {"data": data, "variant": name, "seed": seed, "minutes": minutes, **row,
            "cpu_seconds": time.process_time() - began, "flags": variant.flags, "torch": torch.__version__}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows so far; DataError where a line is none."""
    path, rows = out / "results.jsonl", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            row["data"], row["variant"], row["seed"], row["minutes"], row["groups"], row["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} is no result ({train.reason(error)}); remove it") from None
        rows.append(row)
    return rows


def one(out: Path, data: str, name: str, seed: int, minutes: float) -> None:
    """The work of one process: train, measure, add the row; what train.py says goes to a log in `out`/runs."""
    torch.set_num_threads(1)
    log = out / "runs" / f"{data}-{name}-{seed}-{minutes:g}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        row = train_and_measure(out, data, name, seed, minutes)
    with open(out / "results.jsonl", "ab", buffering=0) as file:  # one write, so that two processes may share the file
        file.write(json.dumps(row).encode() + b"\n")
        os.fsync(file.fileno())


def run(out: Path, data: str, names: list[str], seeds: list[int], minutes: float) -> int:
    """Every variant with every seed that has no row yet, one after another; 1 where any failed."""
    if not (out / data / "groups.json").exists():
        raise DataError(f"{out / data}: no tasks there; `python bench/recipe.py prepare` writes them"
                        + (" (with --one-d)" if data == "1d" else ""))
    failed = 0
    for seed, name in [(seed, name) for seed in seeds for name in names]:
        key = (data, name, seed, minutes)
        if not any((r["data"], r["variant"], r["seed"], r["minutes"]) == key for r in read_rows(out)):
            process = multiprocessing.get_context("spawn").Process(target=one, args=(out, *key), daemon=True)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: only we speak on Ctrl-C
            process.start()
            signal.signal(signal.SIGINT, before)
            process.join()
            if process.exitcode:
                failed += 1
                print(f"{data} {name} seed {seed}: failed; see {out}/runs/{data}-{name}-{seed}-{minutes:g}.log")
                continue
        row = next(r for r in read_rows(out) if (r["data"], r["variant"], r["seed"], r["minutes"]) == key)
        shown = "; ".join(f"{group}: loss {f['loss']:.4f}, exact {f['exact']:.1%}, voted {f['voted']:.1%} of "
                          f"{f['outputs']}" for group, f in row["groups"].items())
        print(f"{data} {name} seed {seed}: {row['steps']} steps, {row['tokens_per_second']:,.0f} tokens/s, {shown}",
              flush=True)
    return min(failed, 1)


# == TABLE ============================================================================================================


def spread(values: list[float], form: str) -> str:
    """Mean ± standard error; the mean alone of one value."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


def cell(mine: dict[int, dict], base: dict[int, dict], group: str, figure: str) -> str:
    """A figure of one variant over its seeds, and its difference to base over the seeds that both have."""
    scale, form = (1, ".4f") if figure == "loss" else (100, ".1f")
    values = {seed: scale * row["groups"][group][figure] for seed, row in mine.items()}
    both = [values[seed] - scale * base[seed]["groups"][group][figure] for seed in values if seed in base]
    return spread(list(values.values()), form) + (f" ({spread(both, '+' + form)})" if both and mine is not base else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for every data set and number of minutes a table, its rows in the order of VARIANTS."""
    runs: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        runs[row["data"], row["minutes"]][row["variant"]][row["seed"]] = row
    parts = []
    for (data, minutes), variants in sorted(runs.items()):
        groups = next(iter(next(iter(variants.values())).values()))["groups"]
        columns = [(group, figure) for figure in ("loss", "exact", "voted") for group in groups]
        heads = [f"{figure} {group}" if figure == "loss" else f"{figure} {group}, %" for group, figure in columns]
        outputs = ", ".join(f"{f['outputs']} {group}" for group, f in groups.items())
        lines = [f"`{data}`, {minutes:g} minutes of CPU time a run, test outputs: {outputs}; mean ± standard error "
                 "over seeds (difference to base over the seeds of both)", "",
                 f"| variant | seeds | {' | '.join(heads)} | steps | parameters | command |",
                 "|---" * (5 + len(heads)) + "|"]
        for name in [n for n in VARIANTS if n in variants]:
            mine = variants[name]
            seeds = " ".join(map(str, sorted(mine)))
            cells = [cell(mine, variants.get("base", {}), *column) for column in columns]
            steps = statistics.mean(row["steps"] for row in mine.values())
            command = f"`--data {data} --variants {name} --seeds {seeds} --minutes {minutes:g}`"
            lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {steps:,.0f} | "
                         f"{next(iter(mine.values()))['parameters']:,} | {command} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "Every command begins with `python bench/recipe.py run`."])


# == CLI ==============================================================================================================


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"recipe.py: {message} (see python bench/recipe.py --help)\n")


def positive(text: str) -> float:
    """A number of minutes."""
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """The three commands; the help of `run` lists the variants."""
    width = max(map(len, VARIANTS)) + 2
    listed = "\n".join(f"  {name:<{width}}{v.text}" for name, v in VARIANTS.items())
    parser = Parser(description=__doc__.splitlines()[0], epilog=f"variants:\n{listed}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,run,table}")
    for name, text in (("prepare", "write the tasks"), ("run", "train and measure"), ("table", "print the results")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--out", type=Path, default=Path("runs/recipe"), metavar="FOLDER",
                             help="tasks and results (default: runs/recipe)")
        if name == "prepare":
            command.add_argument("--one-d", type=Path, metavar="FOLDER", help="1D-ARC: a folder of family folders")
        if name == "run":
            command.add_argument("--data", choices=list(SIDES), required=True, help="which tasks")
            command.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS),
                                 metavar="NAME", help="which recipes (default: all)")
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N",
                                 help="of weights, order and augmentation (default: 0 1 2)")
            command.add_argument("--minutes", type=positive, default=4.0, metavar="X",
                                 help="CPU minutes of training (default: 4)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 1 where a run failed, 2 after one line about bad input."""
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process at work is ended too
    try:
        if args.command == "prepare":
            prepare(args.out, args.one_d)
        elif args.command == "run":
            os.environ["OMP_NUM_THREADS"] = "1"
            return run(args.out, args.data, args.variants, args.seeds, args.minutes)
        elif not (args.out / "results.jsonl").exists():
            raise DataError(f"{args.out / 'results.jsonl'}: nothing there; `python bench/recipe.py run` makes it")
        else:
            print(table(read_rows(args.out)))
    except (DataError, OSError) as error:
        print(f"recipe.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recipe.py: stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
