"""Heatmaps: one path a colour, so that a grid of two thousand cells stays a few kilobytes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from assay.base.views import Heatmap
from assay.studies.report import colour
from assay.studies.report.charts.chart import SMALL, Chart, rect_path, svg
from assay.studies.report.scale import decimals, short, thin
from assay.studies.report.svg import el, label, num, text, text_width

_FULL_LABELS = 150  # grids with no more cells print every value; larger ones only the strongest
_STRONGEST = 8
_APART = 3  # rows above and below in which a peak is the strongest
_FAINT = 0.1  # no number for less than this share of the strongest
_BAR = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    names: list[str]
    columns: list[str]
    left: float
    top: float
    cell_w: float
    cell_h: float
    angle: int  # degrees by which column labels are turned, because they would not fit
    right: float

    @property
    def grid_w(self) -> float:
        return self.cell_w * len(self.columns)

    @property
    def grid_h(self) -> float:
        return self.cell_h * len(self.names)


def natural_width(view: Heatmap) -> float:
    """Return the pixels a heatmap would like: cells that can be told apart and labels that can be read."""
    tokens = max((text_width(label(c, view.column_tokens), SMALL) for c in view.columns), default=0)
    rows = max((text_width(label(r, view.row_tokens), SMALL) for r in view.rows), default=0) + 28
    return rows + max(22.0, tokens * 0.35 if view.column_tokens else tokens + 4) * len(view.columns)


def _layout(view: Heatmap, width: float) -> _Layout:
    names = [label(name, view.row_tokens) for name in view.rows]
    columns = [label(name, view.column_tokens) for name in view.columns]
    left = math.ceil(max((text_width(name, SMALL) for name in names), default=0) + 10 + (18 if view.row_title else 0))
    widest = max((text_width(name, SMALL) for name in columns), default=0)
    n, m = max(1, len(columns)), max(1, len(names))
    most = max(52.0 if n > 6 else 80.0, min(120.0, widest + 8))
    cell_w, angle, right = min(most, (width - left) / n), 0, 0.0
    if view.column_tokens and widest + 6 > cell_w:
        angle = 45 if cell_w >= 16 else 60 if cell_w >= 12 else 90
        lean = math.cos(math.radians(angle))  # the last labels lean out of the grid
        right = max(0.0, max(text_width(c, SMALL) * lean - (n - 1 - j) * cell_w for j, c in enumerate(columns)) - 4)
        cell_w = min(most, (width - left - right) / n)
    cell_w = float(int(cell_w)) if cell_w >= 20 else int(cell_w * 2) / 2 or 0.5
    cell_h = 26.0 if m <= 8 else 20.0 if m <= 16 else 16.0 if m <= 40 else float(int(max(6.0, 640.0 / m)))
    top = (widest * math.sin(math.radians(angle)) + 16 if angle else 20.0) + (18 if view.column_title else 0)
    sizes = {"left": float(left), "top": float(math.ceil(top)), "cell_w": cell_w, "cell_h": cell_h, "right": right}
    return _Layout(names=names, columns=columns, angle=angle, **sizes)


def draw_heatmap(view: Heatmap, width: float) -> Chart:
    """Return a grid with its labels, the strongest values written into their cells, and the key to its colours."""
    lay = _layout(view, width)
    known = [v for row in view.values for v in row if v is not None]
    limit, low = _limits(known, view.diverging)
    body = [_axes(view, lay), _cells(view, lay, limit, low), _numbers(view, lay, limit, low)]
    bottom = lay.top + lay.grid_h
    missing = len(known) < len(view.rows) * len(view.columns)
    beside = max(text_width(view.unit, SMALL), 95.0 if missing else 0.0) + 12
    bar = max(60.0, min(_BAR, width - lay.left - beside))
    body.append(_key(view, lay, bar, limit, low, bottom + 16, missing))
    total = max(lay.left + lay.grid_w + lay.right, lay.left + bar + beside) + 2
    geometry = {
        "k": "heat",
        "at": [round(v, 2) for v in (lay.left, lay.top, lay.cell_w, lay.cell_h)],
        "labels": [lay.names, lay.columns],
        "dp": decimals(known),
        "key": {"d": [-limit if view.diverging else low, limit], "r": [lay.left, lay.left + bar], "y": bottom + 16},
    }
    summary = _summary(view)
    return Chart(
        markup=svg(body, min(total, width), bottom + 50, summary),
        geometry=geometry,
        summary=summary,
        height=bottom + 50,
    )


def _limits(known: list[float], diverging: bool) -> tuple[float, float]:
    if diverging:
        return max((abs(v) for v in known), default=0.0) or 1.0, 0.0
    high, low = max(known, default=1.0), min(known, default=0.0)
    low = 0.0 if low >= 0 and low < 0.5 * high else low
    return (high, low) if high > low else (low + 1.0, low)


def _axes(view: Heatmap, lay: _Layout) -> str:
    out = []
    every = thin(len(lay.names), lay.cell_h, SMALL + 1)
    for i, name in enumerate(lay.names):
        y = lay.top + (i + 0.5) * lay.cell_h + 3.8
        hidden = " off" if i % every else ""
        out.append(text(name, lay.left - 7, y, class_=f"t end r{hidden}", data_i=i))
    every = thin(len(lay.columns), lay.cell_w, _need(lay))
    for j, name in enumerate(lay.columns):
        x, y = lay.left + (j + 0.5) * lay.cell_w, lay.top - 7
        hidden = " off" if j % every else ""
        x += 3 if lay.angle else 0
        turn = f"rotate(-{lay.angle} {num(x)} {num(y)})" if lay.angle else None
        kind = "t" if lay.angle else "t mid"
        out.append(text(name, x, y, class_=f"{kind} c{hidden}", data_i=j, transform=turn))
    if view.column_title:
        out.append(text(view.column_title, lay.left + lay.grid_w / 2, 11, class_="a mid"))
    if view.row_title:
        y = lay.top + lay.grid_h / 2
        out.append(text(view.row_title, 11, y, class_="a mid", transform=f"rotate(-90 11 {num(y)})"))
    return "".join(out)


def _need(lay: _Layout) -> float:
    """Return the pixels from one column label to the next that keep them apart."""
    if lay.angle:
        return (SMALL - 0.5) / math.sin(math.radians(lay.angle)) - 2
    return max((text_width(c, SMALL) for c in lay.columns), default=0) + 4


def _cells(view: Heatmap, lay: _Layout, limit: float, low: float) -> str:
    """Return the cells as thick strokes, one path a colour: half as long as rectangles would be."""
    gap = 1.0 if min(lay.cell_w, lay.cell_h) >= 8 else 0.0
    across = f"h{num(lay.cell_w - gap)}"
    strokes: dict[str, list[str]] = defaultdict(list)
    holes: list[str] = []
    for i, row in enumerate(view.values):
        y = lay.top + i * lay.cell_h
        for j, value in enumerate(row):
            x = lay.left + j * lay.cell_w
            if value is None:
                holes.append(rect_path(x + 0.5, y + 0.5, lay.cell_w - gap - 1, lay.cell_h - gap - 1))
            else:
                middle = y + (lay.cell_h - gap) / 2
                name = colour.level(value, limit, view.diverging, low)
                strokes[name].append(f"M{num(x)} {num(middle)}{across}")
    out = [el("path", d="".join(parts), class_=name) for name, parts in sorted(strokes.items())]
    if holes:
        out.append(el("path", d="".join(holes), class_="hole"))
    return el("g", "".join(out), class_="cells", stroke_width=lay.cell_h - gap)


def _numbers(view: Heatmap, lay: _Layout, limit: float, low: float) -> str:
    if lay.cell_h < 13:
        return ""
    out = []
    for i, j, value in _worth_a_number(view, lay.cell_w - 2, low):
        shown = short(value, 2)
        if text_width(shown, 9.5) <= lay.cell_w:
            x, y = lay.left + (j + 0.5) * lay.cell_w - 0.5, lay.top + (i + 0.5) * lay.cell_h + 3
            out.append(text(shown, x, y, class_=f"n mid {colour.level(value, limit, view.diverging, low)}"))
    return "".join(out)


def _worth_a_number(view: Heatmap, room: float, low: float) -> list[tuple[int, int, float]]:
    """Return all cells of a small grid in which they fit; of another the strongest peaks of its columns."""
    cells = [(i, j, v) for i, row in enumerate(view.values) for j, v in enumerate(row) if v is not None]
    if len(cells) <= _FULL_LABELS and all(text_width(short(value, 2), 9.5) <= room for _, _, value in cells):
        return cells
    middle = 0.0 if view.diverging else low
    size = {(i, j): abs(value - middle) for i, j, value in cells}
    least = _FAINT * max(size.values())
    peaks = [
        (i, j, value)
        for i, j, value in cells
        if size[i, j] >= max(least, *(size.get((i + d, j), 0.0) for d in range(-_APART, _APART + 1)))
    ]
    return sorted(peaks, key=lambda cell: -size[cell[:2]])[:_STRONGEST]


def _key(view: Heatmap, lay: _Layout, bar: float, limit: float, low: float, y: float, missing: bool) -> str:
    steps = 2 * colour.LEVELS + 1 if view.diverging else colour.LEVELS + 1
    start = -limit if view.diverging else low
    out = []
    for s in range(steps):
        value = start + (limit - start) * s / (steps - 1)
        name = colour.level(value, limit, view.diverging, low)
        x = lay.left + bar * s / steps
        out.append(el("path", d=rect_path(x, y, bar / steps + 0.3, 9), class_=f"f {name}"))
    for value, x, anchor in (
        (start, lay.left, ""),
        ((start + limit) / 2, lay.left + bar / 2, "mid"),
        (limit, lay.left + bar, "end"),
    ):
        out.append(text(short(value), x, y + 23, class_=f"t {anchor}"))
    side = lay.left + bar + 10
    out.append(text(view.unit, side, y + 8.5, class_="a"))
    if missing:
        out.append(el("path", d=rect_path(side, y + 14, 12, 9), class_="hole"))
        out.append(text("not measured", side + 17, y + 23, class_="a"))
    return el("g", "".join(out), class_="key")


def _summary(view: Heatmap) -> str:
    cells = [(v, i, j) for i, row in enumerate(view.values) for j, v in enumerate(row) if v is not None]
    size = f"{view.title}: heatmap, {len(view.rows)} rows by {len(view.columns)} columns"
    if not cells:
        return f"{size}, nothing measured."
    parts = []
    for word, (value, i, j) in (("largest", max(cells)), ("smallest", min(cells))):
        row = f"{view.row_title or 'row'} {label(view.rows[i], view.row_tokens)}"
        column = f"{view.column_title or 'column'} {label(view.columns[j], view.column_tokens)}"
        parts.append(f"{word} {short(value)} at {row}, {column}")
    return f"{size}; {'; '.join(parts)}."
