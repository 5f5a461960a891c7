"""Nulls and the estimate among them: a strip a null, all on one axis, so that "beside its control" can be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from assay.base.views import Distribution
from assay.studies.report.charts.chart import SMALL, Chart, Frame, rect_path, svg
from assay.studies.report.scale import Scale, decimals, domain, short, tick_labels
from assay.studies.report.svg import el, num, text, text_width

_FEW = 15  # no more draws than this are drawn one by one


def draw_distribution(view: Distribution, width: float) -> Chart:
    """Return one strip for each null, named and counted, and a line through all of them at the estimate."""
    markup, geometry, summary, height = strips(
        view.null, view.estimate, unit=view.unit, width=width, title=view.title, strip=58.0 if width < 600 else 64.0
    )
    return Chart(markup=markup, geometry=geometry, summary=summary, height=height)


def strips(
    null: Mapping[str, Sequence[float]],
    estimate: float | None,
    *,
    unit: str,
    width: float,
    title: str,
    strip: float = 52.0,
    interval: tuple[float, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any], str, float]:
    """Return the drawing of nulls beside an estimate, its geometry, its description and its height.

    Args:
        null: The draws of each null by name.
        estimate: The claimed value, if it could be measured.
        unit: The unit of all of them.
        width: Pixels to draw in.
        title: What is shown, for screen readers.
        strip: Pixels of height for each null.
        interval: The ends of the estimate's interval.
        notes: What to write after a null's name; its 95 % range when absent.
    """
    values = [v for draws in null.values() for v in draws]
    ends = [v for v in (estimate, *(interval or ())) if v is not None]
    low, high = domain([*values, *ends], pad=0.05)
    top = 34.0
    frame = Frame(left=4.0, top=top, right=width - 4, bottom=top + strip * len(null) + 2)
    scale = Scale(low=low, high=high, start=frame.left + 4, end=frame.right - 4)
    tops = [top + strip * i for i in range(len(null))]
    areas = [(y + 20, y + strip - 4) for y in tops]
    body, rows = [_axis(scale, frame, areas, unit), _estimate(estimate, interval, scale, frame)], []
    for y, (name, draws) in zip(tops, null.items(), strict=True):
        heading = notes[name] if notes and name in notes else spread(draws)
        drawn, bins = _strip(draws, scale, y + 20, strip - 24)
        body.append(drawn)
        body.append(_heading(name, heading, frame, y + 13))
        rows.append({"name": name, "y": round(y, 1), "h": strip, "n": len(draws), "note": heading, "bins": bins})
    geometry: dict[str, Any] = {"k": "dist", "box": frame.to_list(), "x": scale.to_dict(), "rows": rows}
    geometry |= {"estimate": estimate, "dp": decimals([*values, *ends])}
    parts = [f"{name}: {len(draws)} draws, {spread(draws)}" for name, draws in null.items()]
    summary = f"{title}: estimate {short(estimate)} {unit} beside {'; '.join(parts) or 'no null'}."
    height = frame.bottom + (38 if unit else 22)
    return svg(body, width, height, summary), geometry, summary, height


def spread(draws: Sequence[float]) -> str:
    """Return the size and the middle 95 % of a null as text.

    Example:
        >>> spread([0.0, 2.0, 4.0])
        'n = 3, 95 % in 0.1 to 3.9'
    """
    if not draws:
        return "no draws"
    return f"n = {len(draws)}, 95 % in {short(quantile(draws, 0.025), 2)} to {short(quantile(draws, 0.975), 2)}"


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile, interpolated linearly between the two nearest values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    i = int(place)
    return ordered[i] + (place - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i])


def _strip(draws: Sequence[float], scale: Scale, y: float, height: float) -> tuple[str, list[list[float]]]:
    base = y + height
    if not draws:
        return "", []
    out = el("path", d=f"M{num(scale.start)} {num(base)}H{num(scale.end)}", class_="grid")
    if len(draws) <= _FEW:
        ticks = "".join(f"M{num(scale(v))} {num(base - height * 0.55)}v{num(height * 0.5)}" for v in sorted(draws))
        return out + el("path", d=ticks, class_="draw"), [[v, v, 1] for v in sorted(draws)]
    low, high = min(draws), max(draws)
    size = max((high - low) / 20, (scale.high - scale.low) / 90) or 1.0
    count = max(1, round((high - low) / size + 0.5))
    counts = [0] * count
    for value in draws:
        counts[min(count - 1, int((value - low) / size))] += 1
    paths, bins = [], []
    for i, number in enumerate(counts):
        if number:
            x0, x1 = scale(low + i * size), scale(low + (i + 1) * size)
            tall = max(1.0, height * number / max(counts))
            paths.append(rect_path(x0, base - tall, max(x1 - x0 - 0.8, 0.8), tall))
            bins.append([float(f"{low + i * size:.6g}"), float(f"{low + (i + 1) * size:.6g}"), number])
    a, b = (num(scale(quantile(draws, q))) for q in (0.025, 0.975))
    out += el("path", d=f"M{a} {num(base + 2.5)}H{b}", class_="range")
    return out + el("path", d="".join(paths), class_="hist"), bins


def _heading(name: str, note: str, frame: Frame, y: float) -> str:
    room = frame.width - text_width(name, SMALL + 0.5) - 10
    shown = next((part for part in (note, note.split(",")[0]) if text_width(part, SMALL) < room), "")
    more = el("tspan", str(escape(shown)), dx=9.0, class_="t") if shown else ""
    return el("text", str(escape(name)) + more, x=frame.left, y=y, class_="l halo")


def _axis(scale: Scale, frame: Frame, areas: list[tuple[float, float]], unit: str) -> str:
    values = scale.ticks(max(2, int(frame.width / 80)))
    out = []
    for value, name in zip(values, tick_labels(values), strict=True):
        x = scale(value)
        d = "".join(f"M{num(x)} {num(a)}V{num(b)}" for a, b in areas)
        out.append(el("path", d=d, class_="zero" if value == 0 else "grid"))
        out.append(text(name, x, frame.bottom + 15, class_="t mid"))
    if unit:
        out.append(text(unit, (frame.left + frame.right) / 2, frame.bottom + 31, class_="a mid"))
    return "".join(out)


def _estimate(estimate: float | None, interval: tuple[float, float] | None, scale: Scale, frame: Frame) -> str:
    if estimate is None:
        return ""
    x, y = scale(estimate), frame.top - 8
    out = ""
    if interval is not None:
        a, b = num(scale(interval[0])), num(scale(interval[1]))
        out += el("path", d=f"M{a} {num(y)}H{b}M{a} {num(y - 3.5)}v7M{b} {num(y - 3.5)}v7", class_="whisker")
    out += el("path", d=f"M{num(x)} {num(y)}V{num(frame.bottom)}", class_="estimate")
    out += el("path", d=f"M{num(x)} {num(y - 4.5)}l4.5 4.5l-4.5 4.5l-4.5 -4.5z", class_="estimate-dot")
    name = f"estimate {short(estimate)}"
    w = text_width(name, SMALL)
    place = min(max(x, frame.left + w / 2), frame.right - w / 2)
    return out + text(name, place, y - 11, class_="l mid strong")
