"""Findings as cards: the claim, its number and interval, and each control drawn on the estimate's own axis."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

from assay.base.findings import Control, Cost, Finding
from assay.studies.report.charts.distribution import strips
from assay.studies.report.scale import short
from assay.studies.report.svg import text_width

WIDTH = 416.0
"""Pixels of a card's drawing."""

VERDICTS = {
    "supported": "yes",
    "not distinguishable from control": "same",
    "contradicted": "no",
    "not testable": "open",
}
"""Style class of each verdict."""


def card(finding: Finding, index: int) -> dict[str, Any]:
    """Return what the card's template shows."""
    known = math.isfinite(finding.estimate)
    drawing, geometry = _drawing(finding) if known else ("", None)
    return {
        "id": f"finding-{index + 1}",
        "claim": finding.claim,
        "verdict": finding.verdict,
        "style": VERDICTS[finding.verdict],
        "known": known,
        "estimate": short(finding.estimate) if known else "not measured",
        "unit": finding.unit,
        "interval": _interval(finding),
        "note": finding.interval_note,
        "n": f"{finding.n:,}",
        "drawing": Markup(drawing),
        "geometry": geometry,
        "controls": [_control(finding, control) for control in finding.controls],
        "waiver": finding.control_waived if not finding.controls else None,
        "cost": cost_text(finding.cost),
        "tags": finding.tags,
        "detail": json.dumps(finding.detail, indent=1, ensure_ascii=False, default=str) if finding.detail else "",
    }


def _interval(finding: Finding) -> str:
    interval = finding.interval
    if interval is None:
        return ""
    return f"{100 * interval.level:g} % interval {short(interval.low)} to {short(interval.high)}"


def _drawing(finding: Finding) -> tuple[str, dict[str, Any] | None]:
    nulls: dict[str, tuple[float, ...]] = {}
    notes: dict[str, str] = {}
    for control in finding.controls:
        if control.null:
            name = _fit(control.name, 200.0)
            name = name if name not in nulls else f"{name} ({len(nulls) + 1})"
            nulls[name] = control.null
            count = f"n = {len(control.null)}"
            notes[name] = count if control.p is None else f"{count}, {p_text(control)}"
    if not nulls:
        return "", None
    ends = None if finding.interval is None else (finding.interval.low, finding.interval.high)
    drawing, geometry, *_ = strips(
        nulls,
        finding.estimate,
        unit=finding.unit,
        width=WIDTH,
        title=finding.claim,
        interval=ends,
        notes=notes,
    )
    return drawing, geometry


def _fit(name: str, width: float) -> str:
    while len(name) > 4 and text_width(name, 11.5) > width:
        name = f"{name[:-2].rstrip()}…"
    return name


def _control(finding: Finding, control: Control) -> dict[str, str]:
    place = place_text(finding.estimate, control).replace(" = ", "\u00a0=\u00a0")  # "p = 0.01" stays on one line
    description = control.description.strip()
    if description and description[-1] not in ".!?":
        description += "."
    return {"name": control.name, "description": description, "place": place}


def place_text(estimate: float, control: Control) -> str:
    """Return where the estimate stands among a control's draws, in words, with p.

    Example:
        >>> control = Control(name="random sets", description="same size", null=(0.1, 0.2, 0.3), p=0.25)
        >>> place_text(1.0, control)
        'Above all 3 draws; p = 0.25, the least 3 draws allow.'
    """
    n = len(control.null)
    parts = []
    if n and math.isfinite(estimate):
        match control.side:
            case "less":
                word, k = "below", sum(estimate < value for value in control.null)
            case "two":
                word, k = "larger in size than", sum(abs(estimate) > abs(value) for value in control.null)
            case _:
                word, k = "above", sum(estimate > value for value in control.null)
        whole = "the one draw" if n == 1 else f"all {n} draws"
        parts.append(f"{word} {whole if k == n else f'{k} of {n} draws'}")
    if control.p is not None:
        floor = n > 0 and control.p <= control.min_p * (1 + 1e-9)
        parts.append(p_text(control) + (f", the least {n} draws allow" if floor else ""))
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def p_text(control: Control) -> str:
    """Return p as text, such as "p = 0.0099"."""
    return f"p = {short(control.p, 2)}"


def cost_text(cost: Cost) -> str:
    """Return a cost as text; what is zero is left out.

    Example:
        >>> cost_text(Cost(forwards=1200, backwards=1, seconds=75.0, peak_bytes=2_000_000_000))
        '1,200 forwards, 1 backward, 1 min 15 s, 2 GB at its peak'
    """
    parts = []
    for number, word in ((cost.forwards, "forward"), (cost.backwards, "backward")):
        if number:
            parts.append(f"{number:,} {word}{'' if number == 1 else 's'}")
    if cost.seconds:
        parts.append(seconds_text(cost.seconds))
    if cost.peak_bytes:
        parts.append(f"{bytes_text(cost.peak_bytes)} at its peak")
    return ", ".join(parts)


def seconds_text(seconds: float) -> str:
    """Return a duration as text.

    Example:
        >>> seconds_text(0.25), seconds_text(75), seconds_text(7300)
        ('0.25 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{short(seconds, 2 if seconds < 10 else 3)} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def bytes_text(count: float) -> str:
    """Return a number of bytes as text, in powers of 1000.

    Example:
        >>> bytes_text(123), bytes_text(98_300_000)
        ('123 B', '98.3 MB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{short(size)} {units[0]}"
