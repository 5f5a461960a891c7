"""Scatter plots: with an identity line both axes share one scale, and the farthest points are named."""

from __future__ import annotations

from assay.base.views import Scatter
from assay.studies.report.charts.chart import Chart, Frame, svg, tick_room, x_axis, y_axis
from assay.studies.report.scale import Scale, decimals, domain
from assay.studies.report.svg import el, label, num, text, text_width

_NAMED = 6


def draw_scatter(view: Scatter, width: float) -> Chart:
    """Return the points; square when both axes mean the same."""
    width = min(width, 560.0 if view.identity_line else 720.0)
    x_range, y_range = domain(view.x), domain(view.y)
    if view.identity_line:
        x_range = y_range = domain([*view.x, *view.y])
    top = 30.0 if view.y_title else 10.0
    left = tick_room(*y_range, 300.0)
    side = width - left - 12
    height = side if view.identity_line else min(side * 0.8, 400.0)
    frame = Frame(left=left, top=top, right=width - 12, bottom=top + height)
    x = Scale(low=x_range[0], high=x_range[1], start=frame.left, end=frame.right)
    y = Scale(low=y_range[0], high=y_range[1], start=frame.bottom, end=frame.top)
    body = [y_axis(y, frame, view.y_title), x_axis(x, frame, view.x_title, grid=True)]
    if view.identity_line:
        d = f"M{num(frame.left)} {num(frame.bottom)}L{num(frame.right)} {num(frame.top)}"
        body.append(el("path", d=d, class_="identity"))
        place = (frame.right - 8, frame.top + 8)
        body.append(text("y = x", place[0] - 12, place[1] + 6, class_="t end"))
    pairs = enumerate(zip(view.x, view.y, strict=True))
    points = [(i, x(a), y(b)) for i, (a, b) in pairs if a is not None and b is not None]
    size = 3.5 if len(points) <= 400 else 2.5
    dots = "".join(el("circle", cx=px, cy=py, r=size) for _, px, py in points)
    body.append(el("g", dots, class_="points q1"))
    body.append(_names(view, points, frame))
    geometry = {"k": "scatter", "box": frame.to_list(), "x": x.to_dict(), "y": y.to_dict()}
    geometry |= {"dp": [decimals(view.x), decimals(view.y)]}
    axes = f"{view.y_title or 'y'} against {view.x_title or 'x'}"
    summary = f"{view.title}: scatter plot of {len(points)} points, {axes}."
    bottom = frame.bottom + (44 if view.x_title else 24)
    return Chart(markup=svg(body, width, bottom, summary), geometry=geometry, summary=summary, height=bottom)


def _names(view: Scatter, points: list[tuple[int, float, float]], frame: Frame) -> str:
    """Return the names of the points farthest from the identity line, or from the middle, where they do not overlap."""
    if not points:
        return ""
    mx = sum(px for _, px, _ in points) / len(points)
    my = sum(py for _, _, py in points) / len(points)

    def far(point: tuple[int, float, float]) -> float:
        _, px, py = point
        if view.identity_line:  # distance, in pixels, from the diagonal of the square frame
            return abs((px - frame.left) - (frame.bottom - py))
        return float(((px - mx) ** 2 + (py - my) ** 2) ** 0.5)

    ranked = sorted(points, key=lambda point: -far(point))
    ranked = [point for point in ranked[: _NAMED * 2] if far(point) > 0.2 * far(ranked[0])]
    taken: list[tuple[float, float, float, float]] = []
    out = []
    for i, px, py in ranked:
        name = label(view.labels[i], False, 16)
        w = text_width(name, 10)
        for dx, dy in ((6.0, 3.5), (-w - 6.0, 3.5), (-w / 2, -7.0), (-w / 2, 14.0)):
            box = (px + dx, py + dy - 9, px + dx + w, py + dy + 2)
            dots = ((qx - 3, qy - 3, qx + 3, qy + 3) for j, qx, qy in points if j != i)
            if _inside(box, frame) and not any(_overlap(box, other) for other in (*taken, *dots)):
                taken.append(box)
                out.append(text(name, px + dx, py + dy, class_="l halo tiny"))
                break
        if len(out) == _NAMED:
            break
    return "".join(out)


def _inside(box: tuple[float, float, float, float], frame: Frame) -> bool:
    left, top, right, bottom = box
    return left >= frame.left and right <= frame.right + 10 and top >= frame.top and bottom <= frame.bottom


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
