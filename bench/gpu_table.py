"""The table of a GPU's day, out of the files that bench/gpu_day.sh left.

    python bench/gpu_table.py bench/results/2026-01-31-gpu

What is missing is said to be missing. The table is also written to table.md in that folder.
"""
from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import peers  # noqa: E402

Row = tuple[str, str, str]  # what, aim, measured


def load(path: Path) -> dict[str, Any]:
    """A results file; nothing where the piece left none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def pieces(folder: Path) -> list[Row]:
    """How each piece ended, and after how long; the last words of one that failed."""
    rows = []
    for line in (folder / "pieces.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split("\t")
        log = folder / f"{name}.log"
        words = [text.strip() for text in log.read_text("utf-8", "replace").splitlines()] if log.exists() else []
        said = next((text for text in reversed(words) if text), "")[:100]
        ended = {"0": "well", "unstarted": "NOT STARTED: no time left", "124": "OUT OF TIME", "137": "OUT OF TIME"}
        text = ended.get(status, f"FAILED with status {status}") + (f": {said}" if status not in ended else "")
        rows.append((f"piece {name}", "", f"{text} ({seconds} s)"))
        if name == "tests" and status == "0":
            rows.append(("GPU tests and kernel parity", "all pass", said.strip("= ")))
    return rows


def training(folder: Path) -> list[Row]:
    """Speed and MFU of our models, beside the others', and what torch.compile changes."""
    found, rows = load(folder / "peers.json").get("rows", []), []
    at = {(row["model"], row["length"]): row for row in found}
    for (model, length), row in at.items():
        if "error" in row:
            rows.append((f"{model}, T {length}", "", row["error"]))
            continue
        base = at.get(("hybrid", length), {}).get("training")
        ratio = f"; hybrid is {base / row['training']:.2f}x" if base and model != "hybrid" else ""
        own = model in ("hybrid", "mamba")
        rows.append((f"training {model}, T {length}", "MFU 50%" if own else "", f"{row['training']:,.0f} tokens/s, MFU "
                     f"{row['mfu']:.0%}, {row['peak_gb']:.1f} GB{ratio}"))
    for row in load(folder / "compile.json").get("rows", []):
        plain = at.get((row["model"], row["length"]), {}).get("training")
        if "training" in row and plain:
            rows.append((f"--compile, {row['model']}, T {row['length']}", "", f"{row['training']:,.0f} tokens/s, "
                         f"{row['training'] / plain:.2f}x without"))
    return rows


def memory(folder: Path) -> list[Row]:
    """Peak memory by batch size, with and without --remat."""
    rows = []
    for part in ("text", "arc"):
        found = load(folder / f"memory-{part}.json")
        for batch in dict.fromkeys(row["batch"] for row in found.get("rows", [])):
            said = []
            for row in (row for row in found["rows"] if row["batch"] == batch):
                mfu = f", MFU {row['mfu']:.0%}" if row.get("mfu") else ""
                text = row.get("error") or f"{row['gb']:.2f} GB, {row['tokens_per_second']:,.0f} tokens/s{mfu}"
                said.append(f"{'--remat ' if row['remat'] else ''}{text}")
            given = found["model"]
            what = f"{given['dataset']} {given['preset']}, {batch} x {given['block_size']}"
            aim = "12 GB" if part == "text" and batch == 32 else ""
            rows.append((what, aim, "; ".join(said)))
    return rows


def arc(folder: Path) -> list[Row]:
    """The median speed of the second half of a minute of train.py, and MFU of parameters alone."""
    import torch

    import train

    config, metrics = load(folder / "arc-config.json"), folder / "arc-metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lines = [line for line in lines if "loss" in line]
    if not config or not lines:
        return []
    names = {f.name for f in dataclasses.fields(train.ModelConfig)}
    with torch.device("meta"):
        model = train.GPT(train.ModelConfig(**{k: v for k, v in config["model"].items() if k in names}))
    parameters = peers.count(model)
    speed = statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 2 :])
    rows = [r for r in load(folder / "peers.json").get("rows", []) if "peak_flops" in r]
    share = ""
    if rows:
        peak = rows[0]["nominal_flops"] or rows[0]["peak_flops"]
        share = f", {6 * parameters * speed / peak:.0%} of the peak (parameters alone)"
    what = f"train.py, ARC {config['train']['preset']}, {parameters:,} parameters"
    return [(what, "", f"{speed:,.0f} tokens/s{share}, {len(lines)} steps, loss {lines[-1]['loss']:.3f}")]


def decoding(folder: Path) -> list[Row]:
    """A row a batch and model: new tokens a second at each context."""
    rows = load(folder / "decode.json").get("rows", [])
    found = []
    for batch, model in dict.fromkeys((row["batch"], row["model"]) for row in rows):
        speeds = {row["context"]: row["decoding"] for row in rows if (row["batch"], row["model"]) == (batch, model)}
        first, last = speeds[min(speeds)], speeds[max(speeds)]
        said = ", ".join(f"{v:,.0f} at {t}" for t, v in speeds.items())
        found.append((f"decoding {model}, batch {batch}, tokens/s", "keeps 95%", f"{said} (keeps {last / first:.0%})"))
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, 2 where the folder is none of gpu_day.sh's."""
    parser = peers.Parser(prog="gpu_table.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what bench/gpu_day.sh wrote")
    folder = parser.parse_args(argv).folder
    if not (folder / "pieces.tsv").exists():
        print(f"gpu_table.py: {folder}: no pieces.tsv there; give the folder that bench/gpu_day.sh wrote",
              file=sys.stderr)
        return 2
    about = load(folder / "peers.json")
    rows = [r for part in (pieces, training, memory, arc, decoding) for r in part(folder)]
    head = [f"{about[key]}" for key in ("machine", "torch", "commit") if key in about]
    text = f"{' · '.join(head)}\n\n" * bool(head) + peers.show([["what", "aim", "measured"], *map(list, rows)])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
