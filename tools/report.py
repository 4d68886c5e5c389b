"""One web page of solved ARC tasks, in one file that needs no network: to look at, to send to somebody, to print.

    from report import write_report
    write_report("runs/arc/report.html", outputs, scores, "runs/arc on ARC-AGI-1 evaluation")

`solve.py` writes it. How the page looks and behaves stands in the template beside this file, report.html.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from plot import ARC_COLOURS, share_right
from train import replacing

TEMPLATE = Path(__file__).resolve().with_suffix(".html")
NEARLY = 0.95  # share of cells from which an answer of the right shape is nearly right
VERDICTS = ["solved", "nearly", "failed", "unknown"]


def write_report(path: Path | str, outputs: list[dict], scores: dict[str, Any], title: str) -> None:
    """Write the page; a reader of `path` sees all of it or none.

    `outputs`, one a test output, grids as lists of lists of the ints 0-9:
        {"task": name, "test": index, "demonstrations": [{"input": grid, "output": grid}, ...], "input": grid,
         "attempts": [grid or None, grid or None], "truth": grid or None, "seen": whether the run was supervised on it,
         "candidates": [{"grid": grid, "votes": int, "logprob": float}, ...], "views": int, "valid": int}
    `scores`: {"pass@1": {"arc_prize": share, "per_output": share, "all_outputs": share}, "pass@2": likewise, and
    whatever else is to be shown beside them, such as counts and settings}.
    Names and title may be any text. Raises OSError where the file cannot be written.
    """
    data = {"title": title, "scores": scores, "outputs": sorted(map(judged, outputs), key=rank),
            "colours": ARC_COLOURS, "nearly": NEARLY}
    template = TEMPLATE.read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"title": html.escape(title), "script": f"sha256-{digest}", "data": embedded(data)}
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)  # one pass: what is put in stays as it is
    with replacing(Path(path)) as file:
        file.write(page.encode("utf-8", "replace"))


def judged(output: dict) -> dict:
    """The output with `shares`, of the cells that each attempt has right (None: unknown), and `verdict`, one word."""
    truth = output["truth"]
    if truth is None:
        return output | {"shares": [None] * len(output["attempts"]), "verdict": "unknown"}
    shares = [0.0 if attempt is None else share_right(np.array(attempt), np.array(truth))
              for attempt in output["attempts"]]
    if truth in output["attempts"]:
        verdict = "solved"
    else:
        near = [share >= NEARLY and np.shape(attempt) == np.shape(truth)
                for attempt, share in zip(output["attempts"], shares, strict=True)]
        verdict = "nearly" if any(near) else "failed"
    return output | {"shares": shares, "verdict": verdict}


def rank(output: dict) -> tuple:
    """The order on the page: what counts before what was seen in training, then the best first."""
    share = max((share for share in output["shares"] if share is not None), default=0)
    return output["seen"], VERDICTS.index(output["verdict"]), -share, output["task"], output["test"]


def embedded(value: Any) -> str:
    """Compact ASCII JSON that no text in it can lead out of a script element. Numbers that are not finite become null.

    Only strings can hold these three signs, and there JSON has another way to write them; without them neither an end
    tag nor a comment can begin.
    """
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def finite(value: Any) -> Any:
    """The same nest of lists and dicts, with None for floats that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
