"""The report in a real browser: silent, sealed, drawn, and answering to pointer and keyboard in both themes.

Chromium is driven over its own pipe by `scripts/chromium.py`. Set AXE_JS to a copy of axe.min.js to run axe as well.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from assay.base.views import Bars, Distribution, Heatmap, Lines, Prompt, Scatter, Table, Text, Tokens
from assay.studies.report.scale import decimals, fixed

ROOT = Path(__file__).parents[2]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chromium = _load(ROOT / "scripts" / "chromium.py")
sample = _load(Path(__file__).with_name("report_sample.py"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

VIEWS = [view for view in sample.sample_views() if not isinstance(view, Prompt | Text)]
CHARTS = [view for view in VIEWS if not isinstance(view, Table)]
BY_ID = {view.id: view for view in VIEWS}
SETTLED = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Audits.issueAdded")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(sample.sample_report(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.Chromium() as running:
        yield running


@pytest.fixture(scope="module")
def first_page(browser: Any, report: Path) -> Any:
    return browser.open(report)


@pytest.fixture
def page(first_page: Any) -> Any:
    """One light page, for tests that leave it as it was."""
    first_page.front()
    return first_page


def requests(page: Any) -> list[str]:
    return [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]


def complaints(page: Any) -> list[Any]:
    return [event["params"] for event in page.events if event["method"] in SETTLED]


def rect(page: Any, selector: str) -> dict[str, float]:
    """The element's place in the viewport, after scrolling it to the middle."""
    found = page.evaluate(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
        "e.scrollIntoView({block: 'center', inline: 'nearest'});"
        "const r = e.getBoundingClientRect(); return {x: r.x, y: r.y, width: r.width, height: r.height}; })()"
    )
    page.settle()
    assert found["width"] > 0
    assert found["height"] > 0
    return dict(found)


def geometry(page: Any, view_id: str) -> dict[str, Any]:
    items = json.loads(page.evaluate("document.querySelector('#data').textContent"))
    return dict(next(item["geometry"] for item in items if item["id"] == f"fig-{view_id}"))


def hover(page: Any, view_id: str, x: float, y: float) -> str:
    """The tooltip at a place given in the chart's own pixels."""
    frame = rect(page, f"#fig-{view_id} .plot svg")
    wide = page.evaluate(f"document.querySelector('#fig-{view_id} .plot svg').viewBox.baseVal.width")
    zoom = frame["width"] / wide
    page.hover(frame["x"] + x * zoom, frame["y"] + y * zoom)
    return tip(page)


def tip(page: Any) -> str:
    return str(page.evaluate("(e => e.hidden ? '' : e.innerText)(document.querySelector('#tip'))"))


def pixel(scale: dict[str, Any], value: float) -> float:
    (low, high), (start, end) = scale["d"], scale["r"]
    return float(start + (value - low) / (high - low) * (end - start))


# --- silent and sealed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_asks_for_nothing_but_itself_and_says_nothing(browser: Any, report: Path, dark: bool) -> None:
    page = browser.open(report, dark=dark)
    for view in CHARTS:
        rect(page, f"#fig-{view.id} .plot")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.settle()
    assert requests(page) == [report.as_uri()]
    assert complaints(page) == []


def test_the_policy_stops_what_a_page_could_be_made_to_ask_for(browser: Any, report: Path) -> None:
    page = browser.open(report)
    asked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert asked == "refused"
    refused = [p for p in complaints(page) if "Content Security Policy" in json.dumps(p)]
    assert refused


def test_hostile_texts_do_nothing(browser: Any, tmp_path: Path) -> None:
    hostile = _load(Path(__file__).with_name("test_report.py"))
    path = tmp_path / "hostile.html"
    path.write_text(hostile.hostile_report(), encoding="utf-8")
    page = browser.open(path)
    assert page.evaluate("window.pwned") is None
    assert requests(page) == [path.as_uri()]
    assert complaints(page) == []
    heat = geometry(page, "heat")["at"]
    shown = hover(page, "heat", heat[0] + heat[2] * 0.5, heat[1] + heat[3] * 0.5)
    assert "<script>" in shown
    assert page.evaluate("document.querySelectorAll('#tip script, #tip img').length") == 0
    assert page.evaluate("window.pwned") is None


# --- drawn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", CHARTS, ids=lambda view: str(view.id))
def test_every_chart_is_drawn_with_its_marks(page: Any, view: Any) -> None:
    frame = rect(page, f"#fig-{view.id} .plot")
    assert frame["width"] > 200
    assert frame["height"] > 30
    marks = {
        Heatmap: ".cells path",
        Lines: "path.line",
        Bars: "path.bar",
        Scatter: ".points circle",
        Distribution: "path.hist, path.draw",
        Tokens: ".tok .w",
    }[type(view)]
    boxes = page.evaluate(
        f"[...document.querySelectorAll('#fig-{view.id} {marks.replace(', ', f', #fig-{view.id} ')}')]"
        ".map(e => { const r = e.getBoundingClientRect(); const s = getComputedStyle(e);"
        " return [r.width, r.height, s.fill, s.stroke, s.visibility]; })"
    )
    expected = {
        Heatmap: 2,
        Lines: len(getattr(view, "series", ())),
        Bars: len(getattr(view, "labels", ())),
        Scatter: len(getattr(view, "labels", ())),
        Distribution: len(getattr(view, "null", ())),
        Tokens: len(getattr(view, "tokens", ())),
    }[type(view)]
    assert len(boxes) >= expected
    for width, height, fill, stroke, visibility in boxes:
        assert width > 0 or height > 0
        assert visibility == "visible"
        assert (fill, stroke) != ("none", "none")


@pytest.mark.parametrize("width", [1280, 820, 390, 320])
def test_the_page_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    page = browser.open(report, width=width, height=640)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("view", [v for v in CHARTS if isinstance(v, Heatmap)], ids=lambda view: str(view.id))
def test_labels_of_a_heatmap_do_not_overlap(page: Any, view: Heatmap) -> None:
    rect(page, f"#fig-{view.id} .plot")
    for kind, low, high in (("r", "top", "bottom"), ("c", "left", "right")):
        spans = page.evaluate(
            f"[...document.querySelectorAll('#fig-{view.id} svg text.{kind}:not(.off)')]"
            f".map(e => [e.getBoundingClientRect().{low}, e.getBoundingClientRect().{high},"
            " e.hasAttribute('transform')])"
        )
        assert spans
        for (_, end, turned), (start, _, _) in itertools.pairwise(spans):
            assert turned or start >= end - 2.5  # boxes of rows include the space above and below the digits


def test_without_scripts_the_charts_are_there_and_no_dead_button(browser: Any, report: Path) -> None:
    page = browser.open(report)
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    before = len(page.events)
    page.call("Page.reload")
    browser.wait(lambda: any(e["method"] == "Page.loadEventFired" for e in page.events[before:]), "reloading")
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    for selector, shown in (("#fig-denoising-residual svg", True), ("button", False), ("#theme", False)):
        node = page.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        if shown:
            assert page.call("DOM.getBoxModel", nodeId=node)["model"]["height"] > 100
        else:
            with pytest.raises(RuntimeError):
                page.call("DOM.getBoxModel", nodeId=node)


def test_print_shows_the_charts_and_hides_the_controls(browser: Any, report: Path) -> None:
    page = browser.open(report, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.settle()
    display = "getComputedStyle(document.querySelector('{}')).display"
    assert page.evaluate(display.format("nav")) in ("none", "block")
    assert page.evaluate(display.format(".side")) == "none"
    assert page.evaluate(display.format(".buttons")) == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.querySelector('#fig-lens-difference svg').getBoundingClientRect().height") > 100


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view_id", "row", "column"), [("denoising-residual", 12, 9), ("noising-heads", 19, 6), ("long-prompt", 30, 59)]
)
def test_a_cell_under_the_pointer_shows_its_row_column_and_value(
    page: Any, view_id: str, row: int, column: int
) -> None:
    view = BY_ID[view_id]
    left, top, width, height = geometry(page, view_id)["at"]
    shown = hover(page, view_id, left + (column + 0.5) * width, top + (row + 0.5) * height)
    places = decimals([value for values in view.values for value in values])
    assert shown.startswith(f"{fixed(view.values[row][column], places)} {view.unit}")
    assert view.rows[row] in shown.split("\n")
    assert view.columns[column].strip() in shown
    lit = page.evaluate(f"[...document.querySelectorAll('#fig-{view_id} text.lit')].map(e => e.textContent)")
    assert view.rows[row] in lit
    assert page.evaluate(f"document.querySelectorAll('#fig-{view_id} .over .cross').length") == 2


def test_a_cell_that_was_not_measured_says_so(page: Any) -> None:
    left, top, width, height = geometry(page, "noising-heads")["at"]
    assert hover(page, "noising-heads", left + width / 2, top + height / 2).startswith("not measured")


def test_the_same_cell_lights_up_in_the_chart_beside_it(page: Any) -> None:
    left, top, width, height = geometry(page, "denoising-heads")["at"]
    hover(page, "denoising-heads", left + 6.5 * width, top + 19.5 * height)
    assert page.evaluate("document.querySelectorAll('#fig-noising-heads .over .cell').length") == 1
    assert page.evaluate("document.querySelectorAll('#fig-denoising-residual .over .cell').length") == 0


def test_lines_show_every_series_with_its_interval(page: Any) -> None:
    about = geometry(page, "sufficiency")
    view = BY_ID["sufficiency"]
    shown = hover(page, "sufficiency", about["xs"][5] + 2, about["box"][1] + 20)
    assert f"{view.x_title} 13" in shown
    for series in view.series:
        assert series.name in shown
        assert fixed(series.values[5], about["dp"]) in shown
        assert fixed(series.low[5], about["dp"]) in shown


def test_bars_points_draws_and_words_show_their_values(page: Any) -> None:
    bars = geometry(page, "direct-attribution")
    top, height = bars["bands"][6]
    shown = hover(page, "direct-attribution", bars["box"][0] + 5, top + height / 2)
    assert shown.startswith("L22H7: −0.63")
    assert "−0.71" in shown
    assert "toward the foil" in shown

    view, points = BY_ID["fast-against-exact"], geometry(page, "fast-against-exact")
    i = view.labels.index("L19H6")
    shown = hover(page, "fast-against-exact", pixel(points["x"], view.x[i]), pixel(points["y"], view.y[i]))
    assert shown.startswith("L19H6")
    assert fixed(view.x[i], points["dp"][0]) in shown

    draws = geometry(page, "random-sets")
    row = draws["rows"][0]
    low, high, number = row["bins"][4]
    shown = hover(page, "random-sets", pixel(draws["x"], (low + high) / 2), row["y"] + 30)
    assert shown.startswith("random sets of the same size")
    assert f"{number} of 100 draws" in shown
    assert fixed(0.81, draws["dp"]) in shown

    word = rect(page, "#fig-token-attribution .tok:nth-of-type(10) .w")
    page.hover(word["x"] + word["width"] / 2, word["y"] + word["height"] / 2)
    assert tip(page).startswith("·John: 1.31")


def test_a_card_shows_the_draws_of_its_control(page: Any) -> None:
    frame = rect(page, "#finding-2 .plot svg")
    page.hover(frame["x"] + frame["width"] * 0.2, frame["y"] + 70)
    shown = tip(page)
    assert "random sets" in shown
    assert "of 100 draws" in shown


# --- keyboard --------------------------------------------------------------------------------------------------------


def test_every_chart_can_be_read_by_keyboard(browser: Any, report: Path) -> None:
    page = browser.open(report)
    for view in CHARTS:
        page.evaluate(f"document.querySelector('#fig-{view.id} .plot').focus()")
        page.press("Home")
        first = tip(page)
        assert first, view.id
        page.press("ArrowDown" if isinstance(view, Bars) else "ArrowRight")
        second = tip(page)
        assert second != first, view.id
        said = page.evaluate("document.querySelector('#say').textContent")
        assert second.split("\n")[0].strip() in said
        page.press("Escape")
        assert tip(page) == ""


def test_tab_reaches_a_chart_and_shows_where_it_is(browser: Any, report: Path) -> None:
    page = browser.open(report)
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(60):
        page.press("Tab")
        if page.evaluate("document.activeElement.matches('.plot')"):
            break
    assert page.evaluate("document.activeElement.matches('.plot:focus-visible')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert tip(page) != ""
    for _ in range(10):
        page.press("Tab")
        if not page.evaluate("document.activeElement.matches('.plot')"):
            break
    assert tip(page) == ""


def test_arrows_walk_the_grid_of_a_heatmap(browser: Any, report: Path) -> None:
    page = browser.open(report)
    view = BY_ID["denoising-residual"]
    page.evaluate("document.querySelector('#fig-denoising-residual .plot').focus()")
    for key, row, column in (("Home", None, 0), ("End", None, 13), ("ArrowLeft", None, 12)):
        page.press(key)
        assert f"({column})" in tip(page), (key, row)
    start = int(tip(page).split("\n")[2])
    page.press("ArrowUp")
    assert tip(page).split("\n")[2] == view.rows[start - 1]


# --- copying ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clipboard(browser: Any, report: Path) -> Any:
    page = browser.open(report)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)
    return page


def click(page: Any, selector: str) -> None:
    frame = rect(page, selector)
    where = {"x": frame["x"] + frame["width"] / 2, "y": frame["y"] + frame["height"] / 2}
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
    page.settle()


def copied(page: Any) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_copy_as_python_gives_the_snippet_of_each_view(clipboard: Any) -> None:
    for view in VIEWS:
        clipboard.evaluate("navigator.clipboard.writeText('')")
        click(clipboard, f"#fig-{view.id} [data-python]")
        assert copied(clipboard) == view.python
        assert clipboard.evaluate(f"document.querySelector('#fig-{view.id} [data-python]').textContent") == "Copied"


def test_copy_csv_gives_the_table_of_each_view(clipboard: Any) -> None:
    for view in VIEWS:
        click(clipboard, f"#fig-{view.id} [data-csv]")
        columns, rows = view.table()
        lines = list(csv.reader(io.StringIO(copied(clipboard), newline="")))
        assert lines[0] == list(columns)
        assert len(lines) == len(rows) + 1
        for line, row in zip(lines[1:], rows, strict=True):
            for text, value in zip(line, row, strict=True):
                if isinstance(value, float):
                    assert float(text) == pytest.approx(value, rel=1e-5)
                elif isinstance(value, bool):
                    assert text == str(value).lower()
                else:
                    assert text == ("" if value is None else str(value))


# --- themes ----------------------------------------------------------------------------------------------------------


def background(page: Any) -> list[int]:
    value = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in value.removeprefix("rgb(").removesuffix(")").split(",")]


def cell_colour(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.querySelector('#fig-denoising-residual .p20')).stroke"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_follows_the_system_and_the_button_overrules_it(browser: Any, report: Path, dark: bool) -> None:
    page = browser.open(report, dark=dark)
    page.evaluate("localStorage.clear()")
    assert (max(background(page)) < 60) is dark
    first, button = cell_colour(page), page.evaluate("document.querySelector('#theme').textContent.trim()")
    assert button == ("Light" if dark else "Dark")
    click(page, "#theme")
    assert (max(background(page)) < 60) is not dark
    assert cell_colour(page) != first
    assert page.evaluate("document.querySelector('#theme').textContent.trim()") == ("Dark" if dark else "Light")
    again = browser.open(report, dark=dark)
    assert (max(background(again)) < 60) is not dark
    again.evaluate("localStorage.clear()")


def test_navigation_marks_the_section_in_view(browser: Any, report: Path) -> None:
    page = browser.open(report)
    page.evaluate("document.querySelector('#provenance').scrollIntoView()")
    for view_id, name in (("sufficiency", "Sufficiency and necessity"), ("lens-difference", "Logit lens")):
        page.evaluate(f"document.querySelector('#fig-{view_id}').scrollIntoView()")
        page.settle()
        page.settle()
        assert page.evaluate("document.querySelector('nav [aria-current]').textContent") == name


@pytest.mark.skipif("AXE_JS" not in os.environ, reason="set AXE_JS to the path of axe.min.js")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_axe_finds_no_violation(browser: Any, report: Path, width: int, dark: bool) -> None:
    page = browser.open(report, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.evaluate(Path(os.environ["AXE_JS"]).read_text(encoding="utf-8") + ";1")
    found = page.evaluate("axe.run(document).then(r => r.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html]))")
    assert found == []
