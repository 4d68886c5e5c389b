"""Decoding speed against the length of the context: hybrid, all attention, all Mamba, alone and in a batch.

    python bench/decode.py                                  # four minutes on one core; needs requirements-dev.txt
    python bench/decode.py --device cuda --contexts 512 4096 16384 --batch-sizes 1 16 64

The three models have as many parameters as each other. Contexts are random tokens; speeds are new tokens a second, of
all rows together, from the median time between one token and the next. Models and contexts take turns.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import peers  # noqa: E402

MODELS = ("hybrid", "attention", "mamba")


def measure(size: peers.Size, contexts: list[int], batches: list[int], tokens: int, rounds: int,
            device: str) -> list[dict[str, Any]]:
    """Medians over the rounds: prefill and decoding, tokens a second, of each model, context and batch."""
    import torch

    runtime = peers.choose_kernels(device)
    torch.manual_seed(0)
    models = {name: peers.build(name, size, max(contexts) + tokens).to(runtime.device).eval() for name in MODELS}
    for model in models.values():
        runtime.kernels.use(model)
    runs: dict[tuple, list[dict[str, float]]] = {}
    for _, batch, context, name in itertools.product(range(rounds), batches, contexts, MODELS):
        prompt = torch.randint(0, size.vocab, (batch, context), device=runtime.device)
        with runtime.autocast():
            runs.setdefault((batch, context, name), []).append(peers.decoding(models[name], prompt, tokens, device))
    return [{"model": name, "context": context, "batch": batch,
             **{key: statistics.median(run[key] for run in found) for key in found[0]}}
            for (batch, context, name), found in runs.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """A row a batch and context; the last columns say what a context costs beside the shortest one."""
    speed = {(row["batch"], row["context"], row["model"]): row["decoding"] for row in rows}
    shortest = min(row["context"] for row in rows)
    lines = [["batch", "context", *(f"{name}, tokens/s" for name in MODELS), *(f"{name}, kept" for name in MODELS)]]
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in rows):
        found = [speed[batch, context, name] for name in MODELS]
        kept = [v / speed[batch, shortest, name] for v, name in zip(found, MODELS, strict=True)]
        lines.append([str(batch), str(context), *(f"{v:,.0f}" for v in found), *(f"{v:.0%}" for v in kept)])
    return peers.show(lines)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = peers.Parser(prog="decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=peers.positive, default=[512, 1024, 2048, 4096], metavar="N",
                        help="lengths of the prompts (default: 512 1024 2048 4096)")
    parser.add_argument("--batch-sizes", nargs="+", type=peers.positive, default=[1, 4], metavar="N",
                        help="prompts at a time (default: 1 4)")
    parser.add_argument("--tokens", type=peers.positive, default=32, metavar="N", help="new tokens (default: 32)")
    parser.add_argument("--rounds", type=peers.positive, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--size", choices=peers.SIZES, help="of the models (default: small; gpt2 on CUDA)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (default: bench/results/, by date)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print, keep the numbers."""
    import train

    out = args.out or peers.results(f"decode-{args.device}")
    peers.checked(args.device, out)
    if args.tokens < 2:
        raise ValueError("--tokens 1: there is no time between one token and the next; give at least 2")
    name = args.size or ("gpt2" if args.device == "cuda" else "small")
    size = peers.SIZES[name]
    rows = measure(size, sorted(args.contexts), sorted(args.batch_sizes), args.tokens, args.rounds, args.device)
    print(table(rows))
    train.write_json(out, peers.about(args.device) | {"size": size._asdict(), "rows": rows})
    print(f"\nwritten to {out}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 after one line about bad input."""
    args = make_parser().parse_args(argv)
    return peers.guarded("decode.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
