"""The report as a file: complete, sealed, escaped, small, and readable without a script or a screen."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.base.errors import FindingError
from assay.base.findings import Control, Finding, Findings
from assay.base.labels import token_label
from assay.base.stats import Interval
from assay.base.views import (
    Bars,
    Distribution,
    Heatmap,
    Lines,
    Prompt,
    Scatter,
    Series,
    Table,
    Text,
    Tokens,
    View,
)
from assay.studies.report import card_html, colour, render
from assay.studies.report.charts import FULL, HALF, draw
from assay.studies.report.page import resource, styles


def _sample() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_sample", Path(__file__).with_name("report_sample.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """What a page consists of: its elements with their attributes, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self._inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data
        else:
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def sample() -> ModuleType:
    return _sample()


@pytest.fixture(scope="module")
def source(sample: ModuleType) -> str:
    return str(sample.sample_report())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_names_no_other_file_and_no_address(source: str, page: Page) -> None:
    linked = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster") and value is not None
    ]
    assert linked
    assert all(value.startswith(("#", "data:image/svg+xml,")) for value in linked)
    without_namespace = source.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//cdn|@import|url\(", without_namespace)


def test_the_policy_forbids_everything_but_the_page_s_own_scripts_and_styles(page: Page) -> None:
    metas = page.named("meta")
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert "unsafe" not in policy
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in page.raw["script"]]
    data = [i for i, attributes in enumerate(page.named("script")) if attributes.get("type") == "application/json"]
    assert [h for i, h in enumerate(hashes) if i not in data] == rules["script-src"]
    (style,) = page.raw["style"]
    assert [f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"] == rules["style-src"]
    assert not any("style" in attributes for _, attributes in page.elements)


def test_every_view_has_its_chart_table_code_and_data(sample: ModuleType, page: Page) -> None:
    views = [view for view in sample.sample_views() if not isinstance(view, Prompt | Text)]
    assert len(views) >= 15
    data = {item["id"]: item for item in json.loads(page.raw["script"][1])}
    ids = [attributes.get("id") for attributes in page.named("figure")]
    assert ids == [f"fig-{view.id}" for view in views]
    for view in views:
        item = data[f"fig-{view.id}"]
        columns, rows = view.table()
        assert item["columns"] == list(columns)
        assert len(item["rows"]) == len(rows)
        assert item["python"] == view.python
        for mine, theirs in zip(item["rows"], rows, strict=True):
            assert mine == [pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for v in theirs]
    drawn = [a["data-chart"] for a in page.named("div") if "data-chart" in a]
    assert [f"fig-{v.id}" for v in views if not isinstance(v, Table)] == [
        c for c in drawn if c and c.startswith("fig-")
    ]


def test_a_table_twin_on_the_page_has_as_many_cells_as_the_view(sample: ModuleType, page: Page) -> None:
    views = [view for view in sample.sample_views() if not isinstance(view, Prompt | Text)]
    expected = sum(len(columns) * (len(rows) + 1) for columns, rows in (view.table() for view in views))
    assert len(page.named("td")) + len(page.named("th")) == expected


def test_the_page_says_everything_a_finding_says(sample: ModuleType, page: Page) -> None:
    for finding in sample.sample_findings():
        assert finding.claim in page.text
        assert finding.verdict in page.text
        assert f"n = {finding.n}" in page.text
        for control in finding.controls:
            assert control.name in page.text
            assert control.description in page.text
            assert f"n = {len(control.null)}" in page.text
        if finding.control_waived:
            assert finding.control_waived in page.text
        if finding.interval is None:
            assert finding.interval_note in page.text
    assert "95 % interval 0.74 to 0.88" in page.text
    assert "Above all 100 draws; p = 0.0099, the least 100 draws allow." in page.text
    assert "2,416 forwards, 1 min 1 s, 1.9 GB at its peak" in page.text


def test_the_header_shows_the_question_and_the_provenance_its_hashes(sample: ModuleType, page: Page) -> None:
    assert "".join(token_label(token) for token in sample.CLEAN[:9]) in page.text
    assert "·Johncorrupt: ·Mary" in page.text
    assert "Why ·Mary rather than ·John?" in page.text
    assert "2f1c" * 16 in page.text
    assert "2 min 21 s" in page.text
    assert "12,482" in page.text
    assert '"answer": " Mary"' in "".join(page.texts)


def test_a_report_of_twenty_views_stays_small(source: str) -> None:
    assert len(source.encode()) < 400_000


def test_the_same_findings_give_the_same_file(sample: ModuleType, source: str) -> None:
    assert sample.sample_report() == source


def test_ids_are_unique_and_every_reference_resolves(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        href = attributes.get("href") or ""
        if href.startswith("#"):
            assert href[1:] in ids
        for name in ("aria-labelledby", "aria-describedby"):
            assert all(part in ids for part in (attributes.get(name) or "").split())


def test_views_with_one_id_are_refused() -> None:
    text = Text(id="a", section="s", title="t", paragraphs=["x"])
    with pytest.raises(FindingError, match=r"different id.*\['a'\]"):
        render(Findings(findings=(), views=(text, text)), title="t")


# --- hostile texts ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "' onmouseover='window.pwned=1",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#x41;",
    "<!--<script>",
    "\u202egnirts",
    "\u2028\u2029\x00\x1b[31m",
    "]]></text><script>window.pwned=1</script>",
]


def hostile_findings() -> Findings:
    """Every text that a user or a tokenizer can bring, made as hostile as it can be."""
    n = len(HOSTILE)
    values = [i - 4.5 for i in range(n)]

    def about(name: str, i: int) -> dict[str, Any]:
        word = HOSTILE[i % n]
        return {"id": name, "section": HOSTILE[(i + 1) % n], "title": word, "caption": word, "python": f"x = {word!r}"}

    views: list[View] = [
        Prompt(**about("prompt", 0), tokens=HOSTILE, contrast=HOSTILE[::-1], answer=HOSTILE[0], foil=HOSTILE[1]),
        Heatmap(
            **about("heat", 1),
            rows=HOSTILE,
            columns=HOSTILE,
            values=[values] * n,
            column_tokens=True,
            row_title=HOSTILE[0],
            column_title=HOSTILE[1],
            unit=HOSTILE[2],
        ),
        Lines(
            **about("lines", 2), x=HOSTILE, series=[Series(name=w, values=values) for w in HOSTILE], y_title=HOSTILE[0]
        ),
        Bars(**about("bars", 3), labels=HOSTILE, values=values, groups=HOSTILE, unit=HOSTILE[1], label_tokens=True),
        Scatter(**about("scatter", 4), x=values, y=values, labels=HOSTILE, x_title=HOSTILE[0], y_title=HOSTILE[1]),
        Distribution(**about("dist", 5), null=dict.fromkeys(HOSTILE, values), estimate=9.0, unit=HOSTILE[0]),
        Tokens(**about("tokens", 6), tokens=HOSTILE, values=values, unit=HOSTILE[0]),
        Table(**about("table", 7), columns=HOSTILE, rows=[HOSTILE]),
        Text(**about("text", 8), paragraphs=HOSTILE),
    ]
    finding = Finding(
        claim=HOSTILE[0],
        estimate=1.0,
        unit=HOSTILE[1],
        interval=Interval(low=0.5, high=1.5, method=HOSTILE[2]),
        interval_note=HOSTILE[3],
        n=3,
        controls=tuple(Control(name=w, description=w, null=(0.1, 0.2), p=0.5) for w in HOSTILE),
        verdict="supported",
        tags=tuple(HOSTILE),
        detail={word: word for word in HOSTILE},
    )
    return Findings(
        findings=(finding,),
        views=tuple(views),
        summary=tuple(HOSTILE),
        warnings=tuple(HOSTILE),
        artifacts={HOSTILE[0]: {}},
    )


def hostile_report() -> str:
    return render(
        hostile_findings(),
        title=HOSTILE[0],
        subtitle=HOSTILE[1],
        spec={"prompt": HOSTILE[0], "answer": HOSTILE[1], HOSTILE[2]: HOSTILE},
        provenance={HOSTILE[0]: HOSTILE[1], "model": HOSTILE[2], "versions": {HOSTILE[3]: HOSTILE[4]}},
        limits=HOSTILE,
    )


def test_hostile_texts_stay_texts() -> None:
    page = Page(hostile_report())
    assert len(page.named("script")) == 3
    assert page.raw["script"][0] == resource("theme.js")
    assert page.raw["script"][2] == resource("report.js")
    assert page.named("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    data = json.loads(page.raw["script"][1])
    assert {item["id"] for item in data} >= {"fig-heat", "fig-table", "finding-1"}
    table = next(item for item in data if item["id"] == "fig-table")
    assert table["rows"] == [HOSTILE]
    for word in HOSTILE[:7]:
        assert " ".join(word.split()) in page.text


def test_a_card_alone_escapes_too() -> None:
    page = Page(card_html(hostile_findings().findings[0]))
    assert page.named("script") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE[0] in page.text
    assert page.named("svg")


# --- what there may be to draw ---------------------------------------------------------------------------------------

numbers = st.one_of(st.none(), st.floats(-1e60, 1e60), st.sampled_from([0.0, -0.0, 1.0, 1e-12]))
count = st.integers(0, 9)


@st.composite
def any_view(draw_from: st.DrawFn) -> View:
    about = {"id": "v", "section": "s", "title": "t"}
    n, m = draw_from(count), draw_from(count)

    def column(size: int) -> list[float | None]:
        return draw_from(st.lists(numbers, min_size=size, max_size=size))

    labels = [str(i) * draw_from(st.integers(1, 30)) for i in range(n)]
    match draw_from(st.sampled_from(["heatmap", "lines", "bars", "scatter", "distribution", "tokens"])):
        case "heatmap":
            grid = [column(m) for _ in range(n)]
            tokens, diverging = draw_from(st.booleans()), draw_from(st.booleans())
            columns = [" word"] * m
            return Heatmap(
                **about, rows=labels, columns=columns, values=grid, column_tokens=tokens, diverging=diverging
            )
        case "lines":
            series = [Series(name=str(i), values=column(n), low=column(n), high=column(n)) for i in range(m)]
            log = draw_from(st.booleans())
            x = labels if not log and draw_from(st.booleans()) else [10.0**i for i in range(n)]
            return Lines(**about, x=x, series=series, log_x=log)
        case "bars":
            return Bars(**about, labels=labels, values=column(n), low=column(n), high=column(n), groups=labels)
        case "scatter":
            return Scatter(**about, x=column(n), y=column(n), labels=labels, identity_line=draw_from(st.booleans()))
        case "distribution":
            null = {label: [v for v in column(m * 4) if v is not None] for label in labels}
            return Distribution(**about, null=null, estimate=draw_from(numbers))
        case _:
            return Tokens(**about, tokens=labels, values=column(n))


@given(any_view(), st.sampled_from([HALF, FULL]))
def test_whatever_was_measured_can_be_drawn(view: View, width: float) -> None:
    chart = draw(view, width)
    assert chart is not None
    assert "nan" not in chart.markup
    assert "inf" not in chart.markup.replace("infinite", "")
    json.dumps(chart.geometry, allow_nan=False)
    for box in re.findall(r'viewBox="0 0 (\S+) (\S+)"', chart.markup):
        assert 0 < float(box[0]) <= width + 0.1
        assert float(box[1]) > 0
    render(Findings(findings=(), views=(view,)), title="t")


@pytest.mark.parametrize("log", [False, True])
def test_lines_without_a_point_are_an_empty_chart(log: bool) -> None:
    chart = draw(Lines(id="v", section="s", title="t", x=[], series=[], log_x=log), FULL)
    assert chart is not None
    assert "<svg" in chart.markup


def test_half_of_a_surrogate_pair_does_not_break_the_file() -> None:
    view = Tokens(id="t", section="s", title="\ud83d", tokens=["\ud83d"], values=[1.0])
    render(Findings(findings=(), views=(view,)), title="\ud83d").encode("utf-8")


def test_a_report_of_nothing_still_says_so() -> None:
    page = Page(render(Findings(findings=()), title="Nothing"))
    assert "Nothing" in page.text
    assert page.named("figure") == []


def test_neighbours_that_fit_share_a_row(page: Page) -> None:
    half = [a["id"] for a in page.named("figure") if "half" in (a.get("class") or "").split()]
    assert half[:2] == ["fig-next-tokens", "fig-next-token-bars"]
    assert ["fig-denoising-residual", "fig-noising-residual", "fig-denoising-heads", "fig-noising-heads"] == half[2:6]
    assert "fig-long-prompt" not in half


def test_a_long_table_is_cut_on_the_page_and_whole_in_the_data() -> None:
    view = Table(id="t", section="s", title="t", columns=["i"], rows=[[i] for i in range(1000)])
    page = Page(render(Findings(findings=(), views=(view,)), title="t"))
    assert "400 more rows are in the CSV" in page.text
    assert len(json.loads(page.raw["script"][1])[0]["rows"]) == 1000


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_number_in_a_cell_contrasts_with_it(theme: str) -> None:
    for level in colour.levels():
        background = colour.shade(theme, level)
        assert colour.contrast(colour.ink(background), background) >= 4.5


def _simulate(hex_colour: str, kind: str) -> tuple[float, ...]:
    """The colour as it looks without one kind of cone, in linear RGB (Machado et al. 2009, severity 1)."""
    matrices = {
        "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    }
    rgb = [int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return tuple(sum(a * b for a, b in zip(row, linear, strict=True)) for row in matrices[kind])


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signs_stay_apart_for_every_colour_vision(theme: str, kind: str) -> None:
    for step in (8, 14, 20):
        plus = _simulate(colour.shade(theme, f"p{step}"), kind)
        minus = _simulate(colour.shade(theme, f"n{step}"), kind)
        apart = sum((a - b) ** 2 for a, b in zip(plus, minus, strict=True)) ** 0.5
        assert apart > 0.1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", ["p", "n", "s"])
def test_lightness_changes_one_way_along_a_palette(theme: str, path: str) -> None:
    shades = [colour.luminance(colour.shade(theme, f"{path}{i}" if i or path == "s" else "z")) for i in range(21)]
    darker = [b < a for a, b in itertools.pairwise(shades)]
    assert all(darker) if theme == "light" else not any(darker)


def _variables() -> dict[str, tuple[str, str]]:
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", styles("card.css", "style.css"))
    return {name: (light, dark) for name, light, dark in found}


@pytest.mark.parametrize("theme", [0, 1])
def test_texts_and_lines_of_the_page_contrast_as_wcag_asks(theme: int) -> None:
    variables = _variables()
    for background in ("paper", "card", "wash"):
        for text in ("ink", "soft", "accent"):
            assert colour.contrast(variables[text][theme], variables[background][theme]) >= 4.5, (text, background)
    for mark in ("pos", "neg", "axis", "accent"):
        assert colour.contrast(variables[mark][theme], variables["card"][theme]) >= 3 - 0.01, mark
    series = re.findall(r"\.q\d \{ --s: light-dark\((#\w{6}), (#\w{6})\)", styles("card.css", "style.css"))
    assert len(series) == 7
    for pair in series:
        assert colour.contrast(pair[theme], variables["card"][theme]) >= 3


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys; import assay.studies.report as r; from assay.base.findings import Findings;"
        "r.render(Findings(findings=()), title='t'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
