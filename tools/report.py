"""One web page of solved ARC tasks, in one file that needs no network: to look at, to send to somebody, to print.

    from tools.report import write_report
    write_report("runs/arc/report.html", outputs, scores, "runs/arc on ARC-AGI-1 evaluation")

`solve.py` writes it. The template beside this file, report.html, says how the page looks and behaves.
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

from data.files import replacing
from tools.plot import ARC_COLOURS, share_right

TEMPLATE = Path(__file__).resolve().with_suffix(".html")
NEARLY = 0.95  # share of cells from which an answer of the right shape is nearly right
VERDICTS = ["solved", "nearly", "failed", "unknown"]


def write_report(path: Path | str, outputs: list[dict], scores: dict[str, Any], title: str) -> None:
    """Write the page; a reader of `path` sees all of it or none. Raises OSError if the file cannot be written.

    `outputs` has one entry per test output, with grids as lists of lists of the integers 0 to 9:
        {"task": name, "test": index, "demonstrations": [{"input": grid, "output": grid}, ...], "input": grid,
         "attempts": [grid or None, grid or None], "truth": grid or None, "seen": whether the run was supervised on it,
         "candidates": [{"grid": grid, "votes": int, "logprob": float}, ...], "views": int, "valid": int}
    `scores` has "pass@1" and "pass@2", each {"arc_prize": share, "per_output": share, "all_outputs": share}, and
    whatever else is to be shown beside them, such as counts and settings. Names and title may be any text.
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


def entries(records: dict[str, dict], questions: list, truths: dict[str, list], seen: dict[str, list[bool]],
            views: int) -> list[dict]:
    """What `write_report` shows, out of solve.py's records, questions, answers and marks of what was learned from."""
    found = []
    for q in questions:
        shown = [{"input": i.tolist(), "output": o.tolist()} for i, o in q.demonstrations]
        for i, (query, output) in enumerate(zip(q.inputs, records[q.name]["outputs"], strict=True)):
            truth, grids = truths[q.name][i], [c["grid"] for c in output["candidates"]]
            found.append({
                "task": q.name, "test": i, "demonstrations": shown, "input": query.tolist(),
                "attempts": [*grids, None, None][:2], "truth": truth if truth is None else truth.tolist(),
                "seen": seen[q.name][i], "candidates": output["candidates"], "views": views,
                "valid": views - output["malformed"] - output["copies"],
            })
    return found


def judged(output: dict) -> dict:
    """The output with `shares`, of the cells that each attempt has right (None: unknown), and `verdict`, one word."""
    truth, attempts = output["truth"], output["attempts"]
    if truth is None:
        return output | {"shares": [None] * len(attempts), "verdict": "unknown"}
    shares = [share_right(None if attempt is None else np.array(attempt), np.array(truth)) for attempt in attempts]
    near = any(share >= NEARLY and np.shape(attempt) == np.shape(truth)
               for attempt, share in zip(attempts, shares, strict=True))
    return output | {"shares": shares, "verdict": "solved" if truth in attempts else "nearly" if near else "failed"}


def rank(output: dict) -> tuple:
    """The order on the page: outputs that count before those seen in training, and the best first."""
    share = max((share for share in output["shares"] if share is not None), default=0)
    return output["seen"], VERDICTS.index(output["verdict"]), -share, output["task"], output["test"]


def embedded(value: Any) -> str:
    """Compact ASCII JSON that cannot end the script element it stands in. Non-finite numbers become null.

    An end tag or a comment needs one of the signs <, > and &. In JSON only strings can hold them, as escapes, too.
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
