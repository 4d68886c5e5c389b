"""How many passes answers take by where their drafts come from, and how fast they come beside training.

    python bench/answers.py runs/arc --compare 50            # held-out outputs of a run, in 16 views each

Speeds are tokens per second of processor time, so that a busy machine changes them little: of answers that are grids,
prompts read included, and of training steps on the run's own batches, in turn with them. `--compare` answers are given
one token at a time, too, and have to be the same.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import solve  # noqa: E402
import train  # noqa: E402
from arc_data.tasks import load_arc  # noqa: E402
from data.files import UserError, run_script  # noqa: E402
from extras import decode  # noqa: E402
from extras import views as v  # noqa: E402
from extras.runs import load_model  # noqa: E402


def timed(work: Any, *arguments: Any) -> tuple[Any, float]:
    """What some work returns, and the seconds of processor time that it took."""
    start = time.process_time()
    return work(*arguments), time.process_time() - start


def one_by_one(model: train.GPT, prompts: list[np.ndarray], most: int) -> list[tuple[Any, float]]:
    """Answers and log-probabilities, one token at a time, 32 prompts together."""
    found = []
    for i in range(0, len(prompts), 32):
        new, logp = decode.generate(model, *decode.padded(prompts[i : i + 32], "cpu"), most, train.END)
        found += [(train.decode_grid(row), value) for row, value in zip(new.tolist(), logp.tolist(), strict=True)]
    return found


def learn(model: train.GPT, optimizers: train.Optimizers, batches: list, cfg: train.TrainConfig,
          runtime: train.Runtime) -> int:
    """Training steps on some batches: how many tokens they had."""
    for batch in batches:
        train.optimizer_step(model, optimizers, [batch], cfg.max_lr, cfg, runtime)
    return sum(int((x != 0).cumsum(1).argmax(1).add(1).sum()) for x, _ in batches)  # without padding


def measure(args: argparse.Namespace) -> None:
    run = solve.read_run(args.run)
    cfg, model = run.cfg, load_model(args.run, run.model_cfg)[0]
    cfg.device, cfg.dtype = "cpu", "float32"
    runtime = train.Runtime.start(cfg, distributed=False)
    model.use(runtime.ops)
    learner = copy.deepcopy(model)
    optimizers = train.Optimizers(learner, cfg)
    train.fit_to_memory(learner, optimizers, cfg, runtime)  # as a run begins: pieces for all cores
    torch.set_num_threads(1)  # of each piece: threads that wait would count as processor time
    arc = load_arc(solve.data_path(solve.Settings(), run), cfg.holdout, cfg.max_grid, cfg.demonstrations)
    kind = dict(task_tokens=run.task_tokens, packed=cfg.packed)
    loader = train.ArcDataLoader(arc.tasks, cfg.batch_size, run.model_cfg.block_size, **kind)
    most = cfg.max_grid * (cfg.max_grid + 1) + 1
    questions = [v.Question(q.name, q.pairs[:-1], [q.pairs[-1][0]]) for q in arc.questions[: args.outputs]]
    views = [[v.make_view(0, q, k) for k in range(args.views)] for q in questions]
    prompts = [[v.view_prompt(q, 0, view, run.model_cfg.block_size, run.task_tokens)[0] for view in shown]
               for q, shown in zip(questions, views, strict=True)]
    if not questions:
        raise UserError(f"{args.run} was trained with --holdout 0: there is nothing to ask; give another run")
    print(f"{len(questions)} held-out outputs, {args.views} views; {runtime.describe()}")

    tokens = learned = 0
    passes, given, took = defaultdict(list), [[] for _ in questions], defaultdict(float)
    for numbers in [range(i, min(j, args.views)) for i, j in itertools.pairwise([*v.ROUNDS, args.views])]:
        voted = [v.vote(answers, q.inputs[0])[0] for q, answers in zip(questions, given, strict=True)]
        asked, counts = [(i, k) for i in range(len(questions)) for k in numbers], []
        drafts = [train.encode_grid(views[i][k].show(voted[i][0].grid)) if voted[i] else None for i, k in asked]
        found, seconds = timed(decode.answer_prompts, model.eval(), [prompts[i][k] for i, k in asked], runtime, most,
                               1 << 15, drafts, counts)
        took["answers"] += seconds
        for (i, k), draft, (grid, logp), count in zip(asked, drafts, found, counts, strict=True):
            query = train.encode_grid(views[i][k].show(questions[i].inputs[0]))
            copied = np.array_equal(decode.guess_answer(prompts[i][k]), query)
            source = "voted" if draft is not None else "copy of the input" if copied else "last output"
            passes[source if grid is not None else "no grid"].append(count)
            given[i].append((None if grid is None else views[i][k].undo(grid), logp))
            tokens += 0 if grid is None else len(train.encode_grid(grid)) + 1
        batches = list(itertools.islice(loader, 3))
        number, seconds = timed(learn, learner, optimizers, batches, cfg, runtime)
        took["training"], learned = took["training"] + seconds, learned + number
    passes["all grids"] = sum((counts for source, counts in passes.items() if source != "no grid"), [])
    for source, n in [(source, n) for source, n in passes.items() if n]:
        print(f"{source:<18}{len(n):>6} answers, passes: mean {np.mean(n):.2f}, median {np.median(n):g}, most {max(n)}")
    speed, training = tokens / took["answers"], learned / took["training"]
    print(f"{speed:,.0f} tokens/s answered, {training:,.0f} in training: {speed / training:.2f}")
    if args.compare:
        compare(model.eval(), runtime, prompts, most, args.compare)


def compare(model: train.GPT, runtime: train.Runtime, prompts: list[list[np.ndarray]], most: int, count: int) -> None:
    """The first so many answers both ways."""
    asked = [p for shown in zip(*prompts, strict=True) for p in shown][:count]
    slow, seconds = timed(one_by_one, model, asked, most)
    fast, fewer = timed(decode.answer_prompts, model, asked, runtime, most, 1 << 15)
    same = [a is b or a is not None and b is not None and np.array_equal(a, b)
            for (a, _), (b, _) in zip(slow, fast, strict=True)]
    off = max((abs(p - q) for (a, p), (_, q) in zip(slow, fast, strict=True) if a is not None), default=0.0)
    print(f"one at a time     {sum(same)} of {len(same)} answers the same, log-probabilities within {off:.1e}; "
          f"{seconds / fewer:.1f} times the processor time")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a nano run on ARC")
    parser.add_argument("--outputs", type=int, default=40, metavar="N", help="held-out outputs (default: 40)")
    parser.add_argument("--views", type=int, default=16, metavar="N", help="views of each (default: 16)")
    parser.add_argument("--compare", type=int, default=0, metavar="N", help="answers given both ways (default: 0)")
    return run_script("answers.py", lambda: measure(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
