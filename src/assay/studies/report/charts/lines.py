"""Line charts: series told apart by colour, marker and name; intervals as bands."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from assay.base.views import Lines, Series
from assay.studies.report.charts.chart import SMALL, Chart, Frame, svg, tick_room, x_axis, x_labels, y_axis
from assay.studies.report.scale import Scale, decimals, domain, short
from assay.studies.report.svg import el, num, text, text_width

SERIES = 7
"""Colours and markers before they repeat."""

_GAP = 15.0
_MARKED = 45  # points up to which each has a marker


def draw_lines(view: Lines, width: float) -> Chart:
    """Return the series over x, each named at its end where there is room and in a legend where there is not."""
    height = 250.0 if width < 600 else 290.0
    every = [v for s in view.series for part in (s.values, s.low or (), s.high or ()) for v in part]
    low, high = domain(every, zero=view.zero, pad=0.06)
    names = max((text_width(s.name, SMALL) for s in view.series), default=0)
    named = len(view.series) <= 6 and width >= 600 and names <= 0.32 * width
    right = width - (names + 22 if named else 12)
    top = 30.0 if view.y_title else 10.0
    frame = Frame(left=tick_room(low, high, height), top=top, right=right, bottom=top + height)
    y = Scale(low=low, high=high, start=frame.bottom, end=frame.top)
    xs, axis = _x(view, frame)
    body = [y_axis(y, frame, view.y_title), axis]
    body += [_band(s, i, xs, y) for i, s in enumerate(view.series)]
    body += [_line(s, i, xs, y, markers=len(xs) <= _MARKED) for i, s in enumerate(view.series)]
    if named:
        body.append(_names(view, xs, y, frame))
    summary = _summary(view)
    bottom = frame.bottom + (44 if view.x_title else 24)
    geometry = {
        "k": "lines",
        "box": frame.to_list(),
        "xs": [round(x, 1) for x in xs],
        "y": y.to_dict(),
        "series": _columns(view),
        "dp": decimals(every),
    }
    shapes = [marker(i, 12, 5) if len(xs) <= _MARKED else "" for i in range(len(view.series))]
    legend = (
        []
        if named
        else [(s.name, _style(i), shape) for i, (s, shape) in enumerate(zip(view.series, shapes, strict=True))]
    )
    return Chart(
        markup=svg(body, width, bottom, summary), geometry=geometry, summary=summary, legend=legend, height=bottom
    )


def _style(index: int) -> str:
    """Return the style classes of a series; after seven colours the lines are dashed."""
    return f"q{index % SERIES + 1}" + (" dash" if index // SERIES % 2 else "")


def _columns(view: Lines) -> list[dict[str, Any]]:
    """Return where each series stands in the view's table: its value, and the ends of its interval."""
    out, column = [], 1
    for i, series in enumerate(view.series):
        interval = series.low is not None
        out.append({"name": series.name, "q": _style(i), "at": column, "band": interval})
        column += 3 if interval else 1
    return out


def _x(view: Lines, frame: Frame) -> tuple[list[float], str]:
    if any(isinstance(value, str) for value in view.x):
        gap = frame.width / max(1, len(view.x))
        positions = [frame.left + gap * (i + 0.5) for i in range(len(view.x))]
        return positions, x_labels(positions, [str(value) for value in view.x], frame, view.x_title)
    values = [float(value) for value in view.x]
    low, high = min(values, default=1.0), max(values, default=10.0)
    if low == high:
        low, high = (low / 2, high * 2) if view.log_x else (low - 1, high + 1)
    scale = Scale(low=low, high=high, start=frame.left + 8, end=frame.right - 8, log=view.log_x)
    return [scale(value) for value in values], x_axis(scale, frame, view.x_title)


def _band(series: Series, index: int, xs: list[float], y: Scale) -> str:
    if series.low is None or series.high is None:
        return ""
    out: list[str] = []
    run: list[tuple[float, float, float]] = []
    for x, low, high in [*zip(xs, series.low, series.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None:
            run.append((x, y(low), y(high)))
        elif run:
            ends = [f"{num(x)} {num(top)}" for x, _, top in run] + [f"{num(x)} {num(b)}" for x, b, _ in reversed(run)]
            out.append(f"M{'L'.join(ends)}z")
            run = []
    return el("path", d="".join(out), class_=f"band {_style(index)}") if out else ""


def _line(series: Series, index: int, xs: list[float], y: Scale, *, markers: bool) -> str:
    points = [None if v is None else (x, y(v)) for x, v in zip(xs, series.values, strict=True)]
    d, pen = "", "M"
    for point in points:
        d, pen = (d, "M") if point is None else (f"{d}{pen}{num(point[0])} {num(point[1])}", "L")
    style = _style(index)
    out = el("path", d=d, class_=f"line {style}") if d else ""
    if markers:
        shapes = "".join(marker(index, *point) for point in points if point)
        out += el("path", d=shapes, class_=f"dot {style}") if shapes else ""
    return out


def marker(index: int, x: float, y: float, size: float = 3.0) -> str:
    """Return the path of the marker of a series: disc, square, triangle or diamond."""
    a = num(size)
    match index % 4:
        case 0:
            return f"M{num(x - size)} {num(y)}a{a} {a} 0 1 0 {num(2 * size)} 0a{a} {a} 0 1 0 {num(-2 * size)} 0z"
        case 1:
            s = size * 0.9
            return f"M{num(x - s)} {num(y - s)}h{num(2 * s)}v{num(2 * s)}h{num(-2 * s)}z"
        case 2:
            s = size * 1.2
            return f"M{num(x)} {num(y - s)}L{num(x + s)} {num(y + s * 0.8)}H{num(x - s)}z"
        case _:
            s = size * 1.25
            return f"M{num(x)} {num(y - s)}L{num(x + s)} {num(y)}L{num(x)} {num(y + s)}L{num(x - s)} {num(y)}z"


def _names(view: Lines, xs: list[float], y: Scale, frame: Frame) -> str:
    ends = []
    for i, series in enumerate(view.series):
        last = next((v for v in reversed(series.values) if v is not None), None)
        if last is not None:
            ends.append([y(last), i])
    ends.sort()
    for before, after in pairwise(ends):  # push down what would overlap
        after[0] = max(after[0], before[0] + _GAP)
    over = (ends[-1][0] - frame.bottom) if ends else 0.0
    if over > 0:
        limit = frame.bottom
        for end in reversed(ends):
            end[0] = min(end[0], limit)
            limit = end[0] - _GAP
    out = []
    for place, index in ends:
        i = int(index)
        out.append(el("path", d=marker(i, frame.right + 7, place, 3.5), class_=f"dot {_style(i)}"))
        out.append(text(view.series[i].name, frame.right + 16, place + 3.8, class_="l"))
    return "".join(out)


def _summary(view: Lines) -> str:
    parts, positions = [], [_at(x) for x in view.x]
    for series in view.series:
        known = [(x, v) for x, v in zip(positions, series.values, strict=True) if v is not None]
        if known:
            (x0, first), (x1, last) = known[0], known[-1]
            parts.append(f"{series.name} goes from {short(first)} at {x0} to {short(last)} at {x1}")
    return f"{view.title}: line chart of {view.y_title or 'values'} by {view.x_title or 'x'}; {'; '.join(parts)}."


def _at(x: object) -> str:
    return short(x) if isinstance(x, int | float) else str(x)
