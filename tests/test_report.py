"""tools/report.py: the page holds what it was given, fetches nothing, runs no text of others, works in a browser."""

import html.parser
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tools import plot
from tools.report import judged, write_report

HOSTILE = [
    "</script><script>document.title = 'broken'</script>", "\"><img src=x onerror=\"document.title = 'broken'\">",
    "<!--<script>", "]]>\u2028\u2029\x00\ud800&lt;", "{{data}} {{title}} ${title} \\u003c", "../../etc/passwd",
    "%E0%A4%A", "", "'; DROP--", "cards", "a b#c?d", "ü" * 300, "javascript:document.title='broken'",
]
SHARES = {"arc_prize": 0.4375, "per_output": 0.25, "all_outputs": 0.125}
SCORES = {"pass@1": SHARES, "pass@2": SHARES, "tasks": 8, "outputs": 9, "split": "evaluation", "views": 16,
          "settings": {"seed": 7, "ids": ["a"]}}
TRUTH = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1], [2, 2, 2, 2, 2]]  # twenty cells


def wrong(cells: int) -> list:
    """The truth with so many cells changed."""
    grid = np.array(TRUTH)
    grid.flat[:cells] = (grid.flat[:cells] + 1) % 10
    return grid.tolist()


def output(task: str = "a", attempts: tuple = (TRUTH, None), truth: list | None = TRUTH, **more) -> dict:
    """One test output as solve.py gives it."""
    candidates = [{"grid": grid, "votes": 5 - i, "logprob": -0.5 - 20 * i} for i, grid in enumerate(attempts) if grid]
    return {"task": task, "test": 0, "demonstrations": [{"input": [[1, 2]], "output": [[3], [4]]}] * 2,
            "input": [[0, 1], [2, 3]], "attempts": list(attempts), "truth": truth, "seen": False,
            "candidates": candidates, "views": 16, "valid": 9} | more


# 2 solved, 2 nearly, 2 failed, 1 of unknown truth, 1 seen; the second test of one task; a third candidate
OUTPUTS = [output("nothing", (None, None)), output("shape", ([[0, 1, 2]], wrong(1)[:3])),
           output("near", (wrong(1), None)), output("first", (TRUTH, wrong(3))),
           output("second", (wrong(2), TRUTH)), output("second", (wrong(9), wrong(1)), test=1),
           output("open", truth=None), output("seen", seen=True)]
OUTPUTS[3]["candidates"].append({"grid": [[1]], "votes": 1, "logprob": -700.0})
ORDER = ["first", "second", "near", "second", "shape", "nothing", "open", "seen"]  # the best first, what was seen last


class Page(html.parser.HTMLParser):
    """The elements of a page, as (tag, attributes), and the text directly inside each, by its id or else its tag."""

    def __init__(self, folder: Path, outputs: list, scores: dict = SCORES, title: str = "a run") -> None:
        super().__init__()
        self.elements, self.text, self.inside = [], {}, None
        write_report(folder / "report.html", outputs, scores, title)
        self.source = (folder / "report.html").read_text("utf-8")
        self.feed(self.source)
        self.close()
        self.data = json.loads(self.text["data"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        self.text[self.inside] = self.text.get(self.inside, "") + data


# == the file =========================================================================================================


def test_the_page_holds_what_it_was_given_the_best_first_and_reaches_for_nothing(tmp_path):
    page = Page(tmp_path, OUTPUTS, title="run & <arc>")
    assert page.data["title"] == "run & <arc>" == page.text["title"] and page.data["scores"] == SCORES
    assert page.data["colours"] == plot.ARC_COLOURS and [item["task"] for item in page.data["outputs"]] == ORDER
    held = [{key: item[key] for key in OUTPUTS[0]} for item in page.data["outputs"]]
    assert sorted(map(json.dumps, held)) == sorted(map(json.dumps, OUTPUTS))
    reached = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    assert reached == ["data:,"]
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|\bfetch\(|XMLHttp|import\(|\{\{", page.source)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_adds_no_element_and_comes_back_unchanged(tmp_path, name):
    page = Page(tmp_path, [output(name, split=name)], SCORES | {name: name}, name)
    assert page.elements == Page(tmp_path, [output("a")]).elements
    assert page.data["title"] == page.data["outputs"][0]["task"] == page.data["scores"][name] == name
    assert page.text["data"].isascii() and not set("<>&") & set(page.text["data"])
    assert page.text.get("title", "") == name.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("attempts, truth, verdict", [
    ((TRUTH, wrong(1)), TRUTH, "solved"), ((None, TRUTH), TRUTH, "solved"), ((wrong(1), None), TRUTH, "nearly"),
    ((wrong(2), wrong(2)), TRUTH, "failed"), ((wrong(4), wrong(1)), TRUTH, "nearly"), ((None, None), TRUTH, "failed"),
    (([[1] * 30] * 29, None), [[1] * 30] * 30, "failed"), ((TRUTH, None), None, "unknown")])
def test_verdicts(attempts, truth, verdict):
    """19 of 20 cells are 95 %, and 29 of 30 rows are more, but not the right shape."""
    assert judged(output(attempts=attempts, truth=truth))["verdict"] == verdict


def test_numbers_that_json_cannot_hold(tmp_path):
    odd = output(candidates=[{"grid": TRUTH, "votes": 1, "logprob": -math.inf}])
    data = Page(tmp_path, [odd], {"pass@1": {"arc_prize": math.nan}}).data
    assert data["outputs"][0]["candidates"][0]["logprob"] is None and data["scores"]["pass@1"]["arc_prize"] is None


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    before = Page(tmp_path, [output()]).source
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Page(tmp_path, [], {}, "new")
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_text("utf-8") == before


# == in a browser =====================================================================================================


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium: playwright's own, or one that is installed; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with playwright.sync_playwright() as running:
        own = Path(running.chromium.executable_path)
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("needs a browser (playwright install chromium, or chromium of the system)")
        browser = running.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def until(page, expression: str) -> None:
    """Waits for a condition. The page's policy forbids eval, which playwright's own way of waiting needs."""
    end = time.monotonic() + 120
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


@pytest.fixture
def open_tab(chromium, tmp_path):
    """Opens a page of given outputs; at the end, nothing may have gone wrong in any, nor been fetched."""
    tabs, complaints = [], []

    def open_one(outputs: list = OUTPUTS, scores: dict = SCORES, title: str = "a run", fragment: str = "", **context):
        path = tmp_path / f"{len(tabs)}.html"
        write_report(path, outputs, scores, title)
        tabs.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 800}} | context))
        tabs[-1].set_default_timeout(120_000)  # of milliseconds: a busy machine can stall for long
        page = tabs[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
        page.goto(path.resolve().as_uri() + fragment)
        until(page, "document.getElementById('shown').value !== ''")
        return page

    yield open_one
    for tab in tabs:
        tab.close()
    assert complaints == []


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def count(page, selector: str) -> int:
    return page.locator(selector).count()


def shown(page) -> tuple[list[str], str]:
    """The tasks whose cards can be seen, in order, and what the page says of their number."""
    return texts(page, "article:visible h2"), texts(page, "#shown")[0]


def press(page, *keys: str) -> str:
    """The label of the card that has the focus then."""
    for key in keys:
        page.keyboard.press(key)
    return page.evaluate("document.activeElement.getAttribute('aria-label')") or ""


def test_filters_and_search(open_tab):
    page = open_tab()
    assert shown(page) == (ORDER, "8 of 8 shown")
    kinds = {"Solved": ["first", "second"], "Nearly": ["near", "second"], "Failed": ["shape", "nothing"],
             "Unknown": ["open"], "Seen": ["seen"]}
    for number, (kind, tasks) in enumerate(kinds.items(), 2):
        page.get_by_role("button", name=kind).click()
        assert shown(page) == (tasks, f"{len(tasks)} of 8 shown")
        assert count(page, "button[aria-pressed=true]") == 1 and count(page, ".wall a:visible") == len(tasks)
        for key, expected in (("1", ORDER), (str(number), tasks)):
            press(page, key)
            assert shown(page)[0] == expected
    press(page, "2")
    for search, tasks in (("SECO", ["second"]), ("no such task", [])):
        page.fill("#search", search)
        assert shown(page)[0] == tasks and page.locator("#nothing").is_visible() == (not tasks)


def test_keyboard_and_fragments(open_tab):
    page = open_tab(fragment="#near")
    assert press(page).startswith("Task near")
    press(page, "2")
    page.evaluate("location.hash = '#second:2'")  # hidden by the filter
    until(page, "document.activeElement.tagName === 'ARTICLE'")
    assert press(page).startswith("Task second, test 2") and shown(page)[0] == ORDER
    page.locator(".wall a").nth(0).click()
    assert press(page).startswith("Task first")
    page = open_tab(fragment="#no-such")
    assert press(page) == ""
    visited = [press(page, key).split(",")[0] for key in ("j", "ArrowRight", "j", "k", "ArrowLeft", "k", "k")]
    assert visited == [f"Task {name}" for name in ("first", "second", "near", "second", "first", "first", "first")]
    assert page.url.endswith("#first")
    press(page, "/", *"njk1")  # letters that are commands elsewhere
    assert page.input_value("#search") == "njk1" and shown(page)[0] == [] and count(page, "svg text") == 10
    press(page, "Escape")
    assert shown(page)[0] == ORDER and page.evaluate("document.activeElement === document.body")
    assert press(page, "4", "j", "j").startswith("Task nothing")
    for key, number in (("Control+1", 2), ("Escape", 8)):  # the first is a browser's own command
        press(page, key)
        assert shown(page)[1] == f"{number} of 8 shown"


def test_what_head_and_cards_say(open_tab):
    page = open_tab()
    assert texts(page, "#lead") == ["2 of 6\ntest outputs solved, 1 at the first attempt"]
    assert texts(page, "#counts") == ["8 tasks · 9 test outputs · 2 nearly · 2 failed · 1 without a known truth · "
                                      "1 seen in training, not counted"]
    told = page.locator("#settings dt, #settings dd").evaluate_all("all => all.map((one) => one.textContent)")
    assert dict(zip(told[::2], told[1::2], strict=True)) == {
        "tasks": "8", "outputs": "9", "split": "evaluation", "views": "16", "seed": "7", "ids": '["a"]'}
    rows = [re.findall(r"[\d.]+ %", row) for row in texts(page, "#scores tr")]
    assert rows == [["43.8 %"] * 2, ["25.0 %"] * 2, ["12.5 %"] * 2]
    assert texts(page, "article .verdict") == [
        "solved at the first attempt", "solved at the second attempt", "nearly: 95.0 % of cells right",
        "nearly: 95.0 % of cells right", "failed: wrong shape", "failed: no answer", "truth unknown",
        "solved at the first attempt"]
    assert [text.split("\n") for text in texts(page, "article:nth-of-type(1) figcaption")] == [
        ["Input", "2 × 2"], ["Attempt 1", "✓ right", "5 votes, 60.7 %"],
        ["Attempt 2", "✗ 3 cells wrong", "4 votes, 10⁻⁹"], ["Truth", "4 × 5"],
        ["Answer 3", "✗ 1 × 1, not 4 × 5", "1 vote, 10⁻³⁰⁴"]]
    assert texts(page, "article:nth-of-type(7) figcaption")[1:] == ["Attempt 1\n5 votes, 60.7 %", "Attempt 2"]
    assert texts(page, ".badge") == texts(page, "article:nth-of-type(8) .badge") == ["seen in training, not counted"]


def test_grids_are_drawn_as_they_are(open_tab):
    """Cells in their colours, marks on the wrong ones, and with n a number in every cell."""
    page = open_tab([output(attempts=(wrong(2), TRUTH))])
    attempt, right = (page.locator(".test svg").nth(i) for i in (1, 2))
    picture = attempt.evaluate("""svg => [...svg.querySelectorAll('path[fill^="#"]')].map(path => [
        path.getAttribute('fill'), path.getAttribute('d').match(/\\d+ \\d+/g).map(at => at.split(' ').map(Number))])""")
    drawn = np.full((4, 5), -1)
    for colour, cells in picture:
        for x, y in cells:
            drawn[y, x] = plot.ARC_COLOURS.index(colour)
    assert drawn.tolist() == wrong(2)
    marks = attempt.locator("path[stroke='#000']").get_attribute("d")
    assert re.findall(r"M([\d.]+) ([\d.]+)", marks) == [("0.12", "0.12"), ("1.12", "0.12")]
    assert count(right, "path[stroke='#000']") == 0
    press(page, "n")
    until(page, "document.querySelectorAll('article svg text').length > 0")
    numbers = attempt.evaluate("""svg => [...svg.querySelectorAll('text')].flatMap(text => [...text.textContent].map(
        (sign, i) => [+text.getAttribute('y').split(' ')[i], +text.getAttribute('x').split(' ')[i], +sign]))""")
    assert [sign for *_, sign in sorted(numbers)] == sum(wrong(2), [])


@pytest.mark.parametrize("width, scheme", [(320, "light"), (375, "dark"), (1280, "light")])
def test_no_width_scrolls_sideways_and_a_card_stops_below_the_bar(open_tab, width, scheme):
    wide = {"input": [[i % 10 for i in range(30)]] * 30, "output": [[1] * 30]}
    large = output("a-task-with-a-rather-long-name" * 9, (wide["input"], wide["output"]), demonstrations=[wide] * 4)
    scores = SCORES | {"a setting": "x" * 200, "nest": {"a": [1, 2]}}
    viewport = {"width": width, "height": 800}
    page = open_tab([large, *OUTPUTS], scores, "t" * 200, viewport=viewport, color_scheme=scheme)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (scheme == "dark")
    press(page, "j", "j")
    card, bar = page.locator("article").nth(1).bounding_box(), page.locator("#tools").bounding_box()
    assert 0 < card["y"] - bar["y"] - bar["height"] < 30


def test_hostile_names_do_nothing_and_are_shown_as_they_are(open_tab):
    page = open_tab([output(name) for name in HOSTILE], SCORES | dict.fromkeys(HOSTILE, HOSTILE[0]), HOSTILE[1])
    names = page.locator("article h2").evaluate_all("all => all.map(one => JSON.stringify(one.textContent))")
    assert sorted(map(json.loads, names)) == sorted(HOSTILE)
    for name in filter(str.isprintable, HOSTILE):
        page.fill("#search", name)
        assert count(page, "article:visible") >= 1, name
    press(page, "Escape", *"j" * len(HOSTILE))
    page.locator("article:visible h2 a").last.click()
    assert page.title() == HOSTILE[1] and count(page, "img") == 0 and count(page, "script") == 2


def test_nothing_to_show(open_tab):
    page = open_tab([], {})
    assert texts(page, "#nothing") == ["There are no test outputs."] and shown(page) == ([], "0 of 0 shown")
    press(page, "j", "k", "2", "n", "/", "Enter", "Escape")
    assert "–" in texts(page, "#scores")[0]


def test_of_many_cards_only_those_near_the_screen_are_drawn(open_tab):
    page = open_tab([output(f"t{i:03}") for i in range(150)])
    assert shown(page)[1] == "150 of 150 shown" and count(page, ".wall a") == 150
    drawn = "cards.filter((made) => made.querySelector('.grid path')).length"
    until(page, f"{drawn} > 0")
    assert page.evaluate(drawn) < 20
    press(page, "j")
    page.evaluate("cards[100].scrollIntoView()")
    until(page, "cards[100].querySelector('.grid path') !== null")
    assert page.evaluate(drawn) < 40
    assert press(page, "j").startswith("Task t100"), "the next is the first on the screen"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(drawn) == 150, "a page of paper is drawn whole"
