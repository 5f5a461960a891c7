"""What every drawer returns, and the axes that several of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from assay.studies.report.scale import Scale, log_tick_labels, thin, tick_labels
from assay.studies.report.svg import el, num, text, text_width

FULL = 900.0
"""Pixels a chart has when it stands alone."""

HALF = 416.0
"""Pixels a chart has beside another."""

SMALL = 11.0
"""Size of tick labels, in pixels; the style sheet sets the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn view.

    Args:
        markup: SVG or HTML, complete without any script.
        geometry: What the script needs to find a value under the pointer; `k` names the kind.
        summary: What a screen reader says of the chart.
        legend: Name, style class and marker of each series, when the chart does not name them itself.
        height: Its pixels from top to bottom.
    """

    markup: str
    geometry: dict[str, Any]
    summary: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    height: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The rectangle in which values are drawn."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Return its width in pixels."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Return its height in pixels."""
        return self.bottom - self.top

    def to_list(self) -> list[float]:
        """Return x, y, width and height, as the script reads them."""
        return [round(v, 2) for v in (self.left, self.top, self.width, self.height)]


def svg(body: list[str], width: float, height: float, summary: str) -> str:
    """Return the whole drawing with its size and its name for screen readers."""
    box = f"0 0 {num(width)} {num(height)}"
    least = next((f"w{limit}" for limit in (360, 480, 640) if width <= limit), "w900")  # how far the page may shrink it
    attributes = {"width": float(width), "height": float(height), "class_": least, "role": "img", "aria_label": summary}
    return el("svg", "".join(body), viewBox=box, **attributes)


def rect_path(x: float, y: float, width: float, height: float) -> str:
    """Return the path of one rectangle; many of one colour make one element."""
    return f"M{num(x)} {num(y)}h{num(width)}v{num(height)}h{num(-width)}z"


def y_axis(scale: Scale, frame: Frame, title: str) -> str:
    """Return horizontal grid lines with their labels left of the frame, and the title above the frame's corner."""
    values = scale.ticks(max(3, int(frame.height / 48)))
    out = []
    for value, name in zip(values, tick_labels(values), strict=True):
        y = scale(value)
        d = f"M{num(frame.left)} {num(y)}H{num(frame.right)}"
        out.append(el("path", d=d, class_="zero" if value == 0 else "grid"))
        out.append(text(name, frame.left - 7, y + 3.8, class_="t end"))
    if title:
        out.append(text(title, 0, frame.top - 12, class_="a"))
    return "".join(out)


def x_axis(scale: Scale, frame: Frame, title: str, *, grid: bool = False) -> str:
    """Return the ticks of a numeric x axis below the frame, and its title centred under them."""
    values = scale.ticks(max(3, int(frame.width / 80)))
    names = log_tick_labels(values) if scale.log else tick_labels(values)
    out = []
    for value, name in zip(values, names, strict=True):
        x = scale(value)
        d = f"M{num(x)} {num(frame.top)}V{num(frame.bottom)}" if grid else f"M{num(x)} {num(frame.bottom)}v4"
        out.append(el("path", d=d, class_="zero" if grid and value == 0 else "grid" if grid else "tickmark"))
        out.append(text(name, x, frame.bottom + 17, class_="t mid"))
    out.append(axis_title(title, frame, frame.bottom + 36))
    return "".join(out)


def x_labels(positions: list[float], names: list[str], frame: Frame, title: str) -> str:
    """Return the ticks of an ordered category axis, as many as fit."""
    room = (positions[-1] - positions[0]) / max(1, len(positions) - 1) if len(positions) > 1 else frame.width
    every = thin(len(names), room, max((text_width(name, SMALL) for name in names), default=0) + 8)
    out = []
    for i in range(0, len(names), every):
        out.append(el("path", d=f"M{num(positions[i])} {num(frame.bottom)}v4", class_="tickmark"))
        out.append(text(names[i], positions[i], frame.bottom + 17, class_="t mid"))
    out.append(axis_title(title, frame, frame.bottom + 36))
    return "".join(out)


def axis_title(title: str, frame: Frame, y: float) -> str:
    """Return the title of an x axis, centred on the frame."""
    return text(title, (frame.left + frame.right) / 2, y, class_="a mid") if title else ""


def tick_room(scale_low: float, scale_high: float, height: float) -> float:
    """Return the pixels that the labels of a y axis need left of the frame."""
    scale = Scale(low=scale_low, high=scale_high, start=height, end=0)
    names = tick_labels(scale.ticks(max(3, int(height / 48))))
    return max((text_width(name, SMALL) for name in names), default=10) + 10
