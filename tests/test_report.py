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
]  # fmt: skip
SHARES = {"arc_prize": 0.4375, "per_output": 0.25, "all_outputs": 0.125}
SCORES = {"pass@1": SHARES, "pass@2": SHARES, "tasks": 8, "outputs": 9, "split": "evaluation", "views": 16,
          "settings": {"seed": 7, "ids": ["a"]}}  # fmt: skip
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
            "candidates": candidates, "views": 16, "valid": 9} | more  # fmt: skip


def outputs_of_all_kinds() -> list[dict]:
    """2 solved, 2 nearly, 2 failed, 1 of unknown truth, 1 seen; the second test of one task; a third candidate."""
    other = {"grid": [[1]], "votes": 1, "logprob": -700.0}
    third = output("first", (TRUTH, wrong(3)))
    return [output("nothing", (None, None)), output("shape", ([[0, 1, 2]], wrong(1)[:3])),
            output("near", (wrong(1), None)), third | {"candidates": [*third["candidates"], other]},
            output("second", (wrong(2), TRUTH)), output("second", (wrong(9), wrong(1)), test=1),
            output("open", truth=None), output("seen", seen=True)]  # fmt: skip


ORDER = ["first", "second", "near", "second", "shape", "nothing", "open", "seen"]  # the best first, what was seen last


class Page(html.parser.HTMLParser):
    """The elements of a page, as (tag, attributes), and the text directly inside each, by its id or else its tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements, self.text, self.inside = [], {}, None
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        self.text[self.inside] = self.text.get(self.inside, "") + data

    def data(self) -> dict:
        return json.loads(self.text["data"])


def written(tmp_path: Path, outputs: list, scores: dict = SCORES, title: str = "a run") -> Page:
    write_report(tmp_path / "report.html", outputs, scores, title)
    return Page(tmp_path / "report.html")


# == the file =========================================================================================================


def test_the_page_holds_what_it_was_given_the_best_first(tmp_path):
    given = outputs_of_all_kinds()
    page = written(tmp_path, given, title="run & <arc>")
    data = page.data()
    assert data["title"] == "run & <arc>" == page.text["title"] and data["scores"] == SCORES
    assert data["colours"] == plot.ARC_COLOURS and [item["task"] for item in data["outputs"]] == ORDER
    held = [{key: item[key] for key in given[0]} for item in data["outputs"]]
    assert sorted(map(json.dumps, held)) == sorted(map(json.dumps, given))


def test_the_page_reaches_for_nothing(tmp_path):
    page = written(tmp_path, outputs_of_all_kinds())
    reached = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    assert reached == ["data:,"]
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|\bfetch\(|XMLHttp|import\(|\{\{", page.source)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_adds_no_element_and_comes_back_unchanged(tmp_path, name):
    plain = written(tmp_path, [output("a")])
    page = written(tmp_path, [output(name, split=name)], SCORES | {name: name}, name)
    assert page.elements == plain.elements
    data = page.data()
    assert data["title"] == data["outputs"][0]["task"] == data["scores"][name] == name
    assert page.text["data"].isascii() and not set("<>&") & set(page.text["data"])
    assert page.text.get("title", "") == name.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(
    "attempts, truth, verdict",
    [((TRUTH, wrong(1)), TRUTH, "solved"), ((None, TRUTH), TRUTH, "solved"), ((wrong(1), None), TRUTH, "nearly"),
     ((wrong(2), wrong(2)), TRUTH, "failed"), ((wrong(4), wrong(1)), TRUTH, "nearly"), ((None, None), TRUTH, "failed"),
     (([[1] * 30] * 29, None), [[1] * 30] * 30, "failed"), ((TRUTH, None), None, "unknown")],
)  # fmt: skip
def test_verdicts(attempts, truth, verdict):
    """19 of 20 cells are 95 %, and 29 of 30 rows are more, but not the right shape."""
    assert judged(output(attempts=attempts, truth=truth))["verdict"] == verdict


def test_an_empty_list_and_numbers_that_json_cannot_hold(tmp_path):
    assert written(tmp_path, [], {}).data()["outputs"] == []
    odd = output(candidates=[{"grid": TRUTH, "votes": 1, "logprob": -math.inf}])
    data = written(tmp_path, [odd], {"pass@1": {"arc_prize": math.nan}}).data()
    assert data["outputs"][0]["candidates"][0]["logprob"] is None and data["scores"]["pass@1"]["arc_prize"] is None


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    before = written(tmp_path, [output()]).source
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "report.html", [], {}, "new")
    assert os.listdir(tmp_path) == ["report.html"] and Page(tmp_path / "report.html").source == before


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


class Tab:
    """A page in the browser, and all that it complained of or asked the network for."""

    def __init__(self, browser, path: Path, fragment: str = "", width: int = 1280, **context) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **context)
        self.context.set_default_timeout(120_000)  # of milliseconds: a busy machine can stall for long
        self.page = page = self.context.new_page()
        self.complaints, self.requests = [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.resolve().as_uri() + fragment)
        self.until("document.getElementById('shown').value !== ''")

    def shown(self) -> list[str]:
        """Ids of the tasks whose cards can be seen, in order."""
        return self.page.locator("article:visible h2").all_inner_texts()

    def current(self) -> str:
        """Label of the card that has the focus."""
        return self.page.evaluate("document.activeElement.getAttribute('aria-label')") or ""

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def until(self, expression: str) -> None:
        """Waits for a condition. The page's policy forbids eval, which playwright's own way of waiting needs."""
        end = time.monotonic() + 120
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def says(self) -> str:
        return self.page.locator("#shown").inner_text()


@pytest.fixture
def open_tab(chromium, tmp_path):
    """Opens a page of given outputs; at the end, nothing may have gone wrong in any, nor been fetched."""
    tabs = []

    def open_one(outputs: list, fragment: str = "", scores: dict = SCORES, title: str = "a run", **context) -> Tab:
        path = tmp_path / f"{len(tabs)}.html"
        write_report(path, outputs, scores, title)
        tabs.append(Tab(chromium, path, fragment, **context))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
        tab.context.close()


def test_filters_and_search(open_tab):
    tab = open_tab(outputs_of_all_kinds())
    assert tab.shown() == ORDER and tab.says() == "8 of 8 shown"
    kinds = {"Solved": ["first", "second"], "Nearly": ["near", "second"], "Failed": ["shape", "nothing"],
             "Unknown": ["open"], "Seen": ["seen"]}  # fmt: skip
    for number, (kind, tasks) in enumerate(kinds.items(), 2):
        tab.page.get_by_role("button", name=kind).click()
        assert tab.shown() == tasks and tab.says() == f"{len(tasks)} of 8 shown"
        assert tab.count("button[aria-pressed=true]") == 1 and tab.count(".wall a:visible") == len(tasks)
        tab.page.keyboard.press("1")
        assert tab.shown() == ORDER
        tab.page.keyboard.press(str(number))
        assert tab.shown() == tasks
    tab.page.keyboard.press("2")
    tab.page.fill("#search", "SECO")
    assert tab.shown() == ["second"]
    tab.page.fill("#search", "no such task")
    assert tab.shown() == [] and tab.page.locator("#nothing").is_visible()


def test_keyboard(open_tab):
    tab = open_tab(outputs_of_all_kinds())
    press, visited = tab.page.keyboard.press, []
    for key in ("j", "ArrowRight", "j", "k", "ArrowLeft", "k", "k"):
        press(key)
        visited.append(re.match(r"Task (\w+), test 1", tab.current())[1])
    assert visited == ["first", "second", "near", "second", "first", "first", "first"]
    assert tab.page.url.endswith("#first")
    press("/")
    tab.page.keyboard.type("njk1")  # letters that are commands elsewhere
    assert tab.page.input_value("#search") == "njk1" and tab.shown() == [] and tab.count("svg text") == 10
    press("Escape")
    assert tab.shown() == ORDER and tab.page.evaluate("document.activeElement === document.body")
    press("4")
    press("j")
    press("j")
    assert tab.current().startswith("Task nothing")
    press("Control+1")
    assert tab.says() == "2 of 8 shown", "a browser's own command"
    press("Escape")
    assert tab.says() == "8 of 8 shown"


def test_fragments_open_tasks(open_tab):
    tab = open_tab(outputs_of_all_kinds(), "#near")
    assert tab.current().startswith("Task near")
    tab.page.keyboard.press("2")
    tab.page.evaluate("location.hash = '#second:2'")  # hidden by the filter
    tab.until("document.activeElement.tagName === 'ARTICLE'")
    assert tab.current().startswith("Task second, test 2") and len(tab.shown()) == 8
    tab.page.locator(".wall a").nth(0).click()
    assert tab.current().startswith("Task first")
    assert open_tab(outputs_of_all_kinds(), "#no-such").current() == ""


def test_what_a_card_says(open_tab):
    tab = open_tab(outputs_of_all_kinds())
    said = tab.page.locator("article .verdict").all_inner_texts()
    assert said == ["solved at the first attempt", "solved at the second attempt", "nearly: 95.0 % of cells right",
                    "nearly: 95.0 % of cells right", "failed: wrong shape", "failed: no answer", "truth unknown",
                    "solved at the first attempt"]  # fmt: skip
    cards = tab.page.locator("article")
    captions = cards.nth(0).locator("figcaption").all_inner_texts()
    assert [text.split("\n") for text in captions] == [
        ["Input", "2 × 2"], ["Attempt 1", "✓ right", "5 votes, 60.7 %"],
        ["Attempt 2", "✗ 3 cells wrong", "4 votes, 10⁻⁹"], ["Truth", "4 × 5"],
        ["Answer 3", "✗ 1 × 1, not 4 × 5", "1 vote, 10⁻³⁰⁴"],
    ]  # fmt: skip
    assert cards.nth(7).locator(".badge").inner_text() == "seen in training, not counted" and tab.count(".badge") == 1
    assert cards.nth(6).locator("figcaption").all_inner_texts()[1:] == ["Attempt 1\n5 votes, 60.7 %", "Attempt 2"]


def test_what_the_head_says(open_tab):
    tab = open_tab(outputs_of_all_kinds())
    lead, counts = (tab.page.locator(selector).inner_text() for selector in ("#lead", "#counts"))
    assert lead == "2 of 6\ntest outputs solved, 1 at the first attempt"
    assert counts == "8 tasks · 9 test outputs · 2 nearly · 2 failed · 1 without a known truth · " \
        "1 seen in training, not counted"  # fmt: skip
    told = tab.page.locator("#settings dt, #settings dd").evaluate_all("all => all.map((one) => one.textContent)")
    assert dict(zip(told[::2], told[1::2], strict=True)) == {
        "tasks": "8", "outputs": "9", "split": "evaluation", "views": "16", "seed": "7", "ids": '["a"]'}  # fmt: skip
    rows = tab.page.locator("#scores tr").all_inner_texts()
    assert [re.findall(r"[\d.]+ %", row) for row in rows] == [["43.8 %"] * 2, ["25.0 %"] * 2, ["12.5 %"] * 2]


def test_grids_are_drawn_as_they_are(open_tab):
    """Cells in their colours, marks on the wrong ones, and with n a number in every cell."""
    tab = open_tab([output(attempts=(wrong(2), TRUTH))])
    attempt = tab.page.locator(".test svg").nth(1)
    picture = attempt.evaluate("""svg => [...svg.querySelectorAll('path[fill^="#"]')].map(path => [
        path.getAttribute('fill'), path.getAttribute('d').match(/\\d+ \\d+/g).map(at => at.split(' ').map(Number))])""")
    drawn = np.full((4, 5), -1)
    for colour, cells in picture:
        for x, y in cells:
            drawn[y, x] = plot.ARC_COLOURS.index(colour)
    assert drawn.tolist() == wrong(2)
    marks = attempt.locator("path[stroke='#000']").get_attribute("d")
    assert re.findall(r"M([\d.]+) ([\d.]+)", marks) == [("0.12", "0.12"), ("1.12", "0.12")]
    assert tab.page.locator(".test svg").nth(2).locator("path[stroke='#000']").count() == 0, "marks on a right answer"
    tab.page.keyboard.press("n")
    tab.until("document.querySelectorAll('article svg text').length > 0")
    numbers = attempt.evaluate("""svg => [...svg.querySelectorAll('text')].flatMap(text => [...text.textContent].map(
        (sign, i) => [+text.getAttribute('y').split(' ')[i], +text.getAttribute('x').split(' ')[i], +sign]))""")
    assert [sign for *_, sign in sorted(numbers)] == sum(wrong(2), [])


@pytest.mark.parametrize("width, scheme", [(320, "light"), (375, "dark"), (1280, "light")])
def test_no_width_scrolls_sideways_and_a_card_stops_below_the_bar(open_tab, width, scheme):
    wide = {"input": [[i % 10 for i in range(30)]] * 30, "output": [[1] * 30]}
    large = output("a-task-with-a-rather-long-name" * 9, (wide["input"], wide["output"]), demonstrations=[wide] * 4)
    scores = SCORES | {"a setting": "x" * 200, "nest": {"a": [1, 2]}}
    tab = open_tab([large, *outputs_of_all_kinds()], scores=scores, title="t" * 200, width=width, color_scheme=scheme)
    tab.page.locator("summary").click()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (scheme == "dark")
    tab.page.keyboard.press("j")
    tab.page.keyboard.press("j")
    card, bar = tab.page.locator("article").nth(1).bounding_box(), tab.page.locator("#tools").bounding_box()
    assert 0 < card["y"] - bar["y"] - bar["height"] < 30


def test_hostile_names_do_nothing_and_are_shown_as_they_are(open_tab):
    tab = open_tab([output(name) for name in HOSTILE], scores=SCORES | dict.fromkeys(HOSTILE, HOSTILE[0]),
                   title=HOSTILE[1])
    shown = tab.page.locator("article h2").evaluate_all("all => all.map(one => JSON.stringify(one.textContent))")
    assert sorted(map(json.loads, shown)) == sorted(HOSTILE)
    for name in filter(str.isprintable, HOSTILE):
        tab.page.fill("#search", name)
        assert tab.count("article:visible") >= 1, name
    tab.page.keyboard.press("Escape")
    for _ in HOSTILE:
        tab.page.keyboard.press("j")
    tab.page.locator("article:visible h2 a").last.click()
    assert tab.page.title() == HOSTILE[1] and tab.count("img") == 0 and tab.count("script") == 2


def test_nothing_to_show(open_tab):
    tab = open_tab([], scores={})
    assert tab.page.locator("#nothing").inner_text() == "There are no test outputs." and tab.says() == "0 of 0 shown"
    for key in ("j", "k", "2", "n", "/", "Enter", "Escape"):
        tab.page.keyboard.press(key)
    assert "–" in tab.page.locator("#scores").inner_text()


def test_of_many_cards_only_those_near_the_screen_are_drawn(open_tab):
    tab = open_tab([output(f"t{i:03}") for i in range(150)])
    assert tab.says() == "150 of 150 shown" and tab.count(".wall a") == 150
    drawn = "cards.filter((made) => made.querySelector('.grid path')).length"
    tab.until(f"{drawn} > 0")
    assert tab.page.evaluate(drawn) < 20
    tab.page.keyboard.press("j")
    tab.page.evaluate("cards[100].scrollIntoView()")
    tab.until("cards[100].querySelector('.grid path') !== null")
    assert tab.page.evaluate(drawn) < 40
    tab.page.keyboard.press("j")
    assert tab.current().startswith("Task t100"), "the next is the first on the screen"
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.page.evaluate(drawn) == 150, "a page of paper is drawn whole"
