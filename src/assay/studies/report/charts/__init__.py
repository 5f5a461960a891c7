"""Drawing: a view becomes SVG that needs no script to be seen, and the geometry that the page's script reads back.

Every drawer has the same form, `draw(view, width) -> Chart`, and draws no wider than `width` pixels.
"""

from __future__ import annotations

from assay.base.views import Bars, Distribution, Heatmap, Lines, Prompt, Scatter, Table, Tokens, View
from assay.studies.report.charts.bars import draw_bars
from assay.studies.report.charts.chart import FULL, HALF, Chart
from assay.studies.report.charts.distribution import draw_distribution
from assay.studies.report.charts.heatmap import draw_heatmap, natural_width
from assay.studies.report.charts.lines import draw_lines
from assay.studies.report.charts.scatter import draw_scatter
from assay.studies.report.charts.words import draw_prompt, draw_tokens

__all__ = ["FULL", "HALF", "Chart", "draw", "fits_half", "half_height"]


def draw(view: View, width: float) -> Chart | None:
    """Return the chart of a view, or None for a view that is its own table or text."""
    match view:
        case Heatmap():
            return draw_heatmap(view, width)
        case Lines():
            return draw_lines(view, width)
        case Bars():
            return draw_bars(view, width)
        case Scatter():
            return draw_scatter(view, width)
        case Distribution():
            return draw_distribution(view, width)
        case Tokens():
            return draw_tokens(view)
        case Prompt():
            return draw_prompt(view)
        case _:
            return None


def fits_half(view: View) -> bool:
    """Return whether a view reads well in half the width of the page."""
    match view:
        case Heatmap():
            return natural_width(view) <= HALF
        case Lines():
            return len(view.x) <= 40 and len(view.series) <= 4
        case Bars():
            return len(view.labels) <= 40 and max(map(len, view.labels), default=0) <= 18
        case Scatter():
            return True
        case Distribution():
            return len(view.null) <= 4
        case Table():
            widest = [max([len(name), *(len(str(row[j])) for row in view.rows)]) for j, name in enumerate(view.columns)]
            return sum(7 * length + 24 for length in widest) <= HALF and len(view.rows) <= 15
        case _:
            return False


def half_height(view: View) -> float:
    """Return the pixels a view takes from top to bottom when it is drawn in half the width of the page."""
    if isinstance(view, Table):
        return 60.0 + 29.0 * len(view.rows)
    chart = draw(view, HALF)
    return chart.height if chart else 0.0
