"""Bar charts: one row a value, with its label on the left and its number on the right."""

from __future__ import annotations

from assay.base.views import Bars
from assay.studies.report.charts.chart import SMALL, Chart, Frame, rect_path, svg
from assay.studies.report.scale import Scale, decimals, domain, fixed, short, tick_labels
from assay.studies.report.svg import el, label, num, text, text_width


def draw_bars(view: Bars, width: float) -> Chart:
    """Return signed horizontal bars from zero, with intervals as whiskers, in their groups."""
    names = [label(name, view.label_tokens, 26) for name in view.labels]
    every = [*view.values, *(view.low or ()), *(view.high or ())]
    places = decimals(view.values, 3)
    shown = [fixed(v, places) for v in view.values]
    row = 22.0 if len(names) <= 30 else 17.0 if len(names) <= 80 else 13.0
    left = max((text_width(name, SMALL + 0.5) for name in names), default=0) + 12
    right = width - max((text_width(s, SMALL) for s in shown), default=0) - 14
    low, high = domain(every, zero=True, pad=0.03)
    bands, headings, bottom = _rows(view, row)
    frame = Frame(left=left, top=6.0, right=right, bottom=bottom)
    scale = Scale(low=low, high=high, start=frame.left, end=frame.right)
    body = [_axis(scale, frame, view.unit)]
    body += [text(name, 0, y + 13, class_="h") for name, y in headings]
    thick = round(row * 0.64)
    for i, (value, y) in enumerate(zip(view.values, bands, strict=True)):
        middle = y + row / 2
        body.append(text(names[i], left - 9, middle + 4, class_="l end"))
        body.append(text(shown[i], width - 2, middle + 4, class_="v end"))
        if value is not None:
            x0, x1 = sorted((scale(0.0), scale(value)))
            style = "pos" if value >= 0 else "neg"
            d = rect_path(x0, middle - thick / 2, max(x1 - x0, 0.6), thick)
            body.append(el("path", d=d, class_=f"bar {style}"))
        body.append(_whisker(view, i, middle, scale))
    summary = _summary(view, names)
    geometry = {
        "k": "bars",
        "box": frame.to_list(),
        "bands": [[round(y, 1), row] for y in bands],
        "x": scale.to_dict(),
        "labels": names,
        "at": 2 if view.groups else 1,
        "dp": decimals(every),
    }
    height = bottom + (42 if view.unit else 24)
    return Chart(markup=svg(body, width, height, summary), geometry=geometry, summary=summary, height=height)


def _rows(view: Bars, row: float) -> tuple[list[float], list[tuple[str, float]], float]:
    """Return the top of each bar's row, the headings with theirs, and the end of the last."""
    y, bands, headings, before = 8.0, [], [], None
    for i in range(len(view.labels)):
        group = view.groups[i] if view.groups else None
        if group is not None and group != before:
            y += 8 if before is not None else 0
            headings.append((group, y))
            y += 20
        before = group
        bands.append(y)
        y += row
    return bands, headings, y + 4


def _axis(scale: Scale, frame: Frame, unit: str) -> str:
    values = scale.ticks(max(2, int(frame.width / 75)))
    out = []
    for value, name in zip(values, tick_labels(values), strict=True):
        x = num(scale(value))
        out.append(el("path", d=f"M{x} {num(frame.top)}V{num(frame.bottom)}", class_="zero" if value == 0 else "grid"))
        out.append(text(name, scale(value), frame.bottom + 16, class_="t mid"))
    if unit:
        out.append(text(unit, (frame.left + frame.right) / 2, frame.bottom + 34, class_="a mid"))
    return "".join(out)


def _whisker(view: Bars, i: int, y: float, scale: Scale) -> str:
    if view.low is None or view.high is None:
        return ""
    low, high = view.low[i], view.high[i]
    if low is None or high is None:
        return ""
    a, b = num(scale(low)), num(scale(high))
    return el("path", d=f"M{a} {num(y)}H{b}M{a} {num(y - 3)}v6M{b} {num(y - 3)}v6", class_="whisker")


def _summary(view: Bars, names: list[str]) -> str:
    known = [(v, name) for v, name in zip(view.values, names, strict=True) if v is not None]
    if not known:
        return f"{view.title}: bar chart, nothing measured."
    (top, top_name), (least, least_name) = max(known), min(known)
    ends = f"largest {top_name} {short(top)}, smallest {least_name} {short(least)}"
    return f"{view.title}: bar chart of {len(names)} values; {ends}."
