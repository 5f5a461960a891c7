"""What is printed reads well in a narrow terminal and without colour."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from assay.base.findings import Control, Finding, Findings
from assay.base.method import Plan, PlannedStep, StepSpec
from assay.base.stats import Interval
from assay.cli.present import control_text, estimate_text, findings_table, show_outcome, show_plan
from assay.cli.progress import watching
from assay.studies.events import Event
from assay.studies.run import Outcome

FINDING = Finding(
    claim="Head [L9H6] writes the answer",
    estimate=3.14159,
    unit="logits",
    n=16,
    interval=Interval(low=2.5, high=12345.6, level=0.95, method="bca"),
    controls=(Control(name="random sets", description="", null=(1.0, 2.0, 3.0, 4.0), p=0.2, side="greater"),),
    verdict="not distinguishable from control",
)


def text_of(renderable: object, width: int, *, terminal: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=terminal, color_system="standard" if terminal else None).print(
        renderable
    )
    return stream.getvalue()


def test_an_estimate_stands_with_its_interval_or_the_reason_there_is_none() -> None:
    assert estimate_text(FINDING) == "3.14 logits\n[2.5, 12346]"
    wide = Finding(**{**fields(FINDING), "interval": Interval(low=1, high=2, level=0.9, method="bca")})
    assert estimate_text(wide) == "3.14 logits\n[1, 2] (90%)"
    single = Finding(**{**fields(FINDING), "interval": None, "interval_note": "one prompt"})
    assert estimate_text(single, "(a)") == "3.14 logits (a)"


def test_reasons_for_no_interval_are_given_once() -> None:
    findings = [
        Finding(**{**fields(FINDING), "interval": None, "interval_note": note, "estimate": float(place)})
        for place, note in enumerate(["one prompt", "exact", "one prompt"])
    ]
    outcome = Outcome(findings=Findings(findings=(FINDING, *findings)), key="k", cached=True, steps=(), seconds=0.1)
    stream = io.StringIO()
    show_outcome(outcome, quiet=False, console=Console(file=stream, width=120))
    shown = stream.getvalue()
    for text in (
        "0 logits (a)",
        "1 logits (b)",
        "2 logits (a)",
        "(a) no interval: one prompt\n",
        "(b) no interval: exact\n",
    ):
        assert shown.count(text) == 1


def fields(finding: Finding) -> dict[str, object]:
    return {name: getattr(finding, name) for name in finding.__dataclass_fields__}


def test_a_control_says_where_the_estimate_stands() -> None:
    assert control_text(FINDING.controls[0]) == "random sets: above 75% of 4 draws, p = 0.2"
    assert control_text(Control(name="weights", description="", null=(1.0,))) == "weights: 1 draws"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_findings_are_complete_at_any_width(width: int) -> None:
    shown = text_of(findings_table(Findings(findings=(FINDING,))), width)
    assert max(map(len, shown.splitlines())) <= width
    words = shown.replace("│", " ").split()
    for word in ("[L9H6]", "distinguishable", "3.14", "12346]", "16", "75%"):
        assert word in words


def test_verdicts_are_words_first_and_colour_second() -> None:
    for verdict in ("supported", "contradicted"):
        finding = Finding(**{**fields(FINDING), "verdict": verdict})
        plain = text_of(findings_table(Findings(findings=(finding,))), 120)
        colour = text_of(findings_table(Findings(findings=(finding,))), 120, terminal=True)
        assert verdict in plain
        assert "\x1b" not in plain
        assert f"m{verdict}" in colour


def test_a_plan_that_is_partly_cached_says_what_is_left() -> None:
    cheap = StepSpec(name="lens", inputs={}, forwards=2, seconds=1.0)
    dear = StepSpec(name="patching", inputs={}, forwards=1234, bytes=3 << 20, seconds=90.0)
    plan = Plan(
        steps=(PlannedStep(step=cheap, key="a", cached=True), PlannedStep(step=dear, key="b", cached=False)), study="s"
    )
    stream = io.StringIO()
    show_plan(plan, Console(file=stream, width=100))
    shown = stream.getvalue()
    assert "1 of 2 steps would run, in about 1 min 30 s." in shown
    (left,) = (line for line in shown.splitlines() if line.startswith("to run"))
    assert left.split()[2:] == ["1,234", "0", "0", "3.0", "MiB", "90.0"]


EVENTS = [
    Event(kind="phase", message="loading [x]"),
    Event(
        kind="plan",
        plan=Plan(steps=(PlannedStep(step=StepSpec(name="a", inputs={}), key="k", cached=False),)),
    ),
    Event(kind="start", step="a", index=1, count=1),
    Event(kind="progress", step="a", index=1, count=1, done=1, total=2, message="half"),
    Event(kind="notice", message="discarded [something]"),
    Event(kind="finish", step="a", index=1, count=1, seconds=2.0),
    Event(kind="cached", step="b", index=2, count=2, seconds=2.0),
    Event(kind="done"),
]


@pytest.mark.parametrize(("terminal", "term"), [(True, "xterm"), (True, "dumb"), (False, "xterm")])
def test_progress_is_shown_with_and_without_a_terminal(terminal: bool, term: str) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal, _environ={"TERM": term})
    with watching("tally", quiet=False, console=console) as watcher:
        for event in EVENTS:
            watcher(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for text in ("[1/1] a: done in 2.0 s", "[2/2] b: from the cache", "discarded [something]", "loading [x]"):
        assert text in shown
    assert ("\x1b[2K" in stream.getvalue()) == (terminal and term != "dumb")


def test_quiet_progress_still_says_what_was_damaged() -> None:
    stream = io.StringIO()
    with watching("tally", quiet=True, console=Console(file=stream, width=80)) as watcher:
        for event in EVENTS:
            watcher(event)
    assert stream.getvalue() == "note: discarded [something]\n"
