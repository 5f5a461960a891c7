"""Writing SVG: elements with escaped attributes, and the width of a text before any browser has drawn it."""

from __future__ import annotations

import unicodedata
from typing import Any

from markupsafe import escape

from assay.base.labels import token_label

_NARROW = set("ijl.,:;'|!()[]{}·ft` I/\\")
_WIDE = set("mwMW@%—")


def num(value: float) -> str:
    """Return a coordinate with at most one decimal.

    Example:
        >>> num(3.0), num(2.449)
        ('3', '2.4')
    """
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def el(name: str, content: str = "", /, **attributes: Any) -> str:
    """Return one element; `content` is markup, attributes are escaped.

    Trailing underscores are dropped and others become hyphens, so `class_` and `text_anchor` can be written; an
    attribute that is None is left out.

    Example:
        >>> el("text", "a", x=1.04, class_="tick", text_anchor=None)
        '<text x="1" class="tick">a</text>'
    """
    out = []
    for key, value in attributes.items():
        if value is not None:
            text = num(value) if isinstance(value, float) else str(escape(value))
            out.append(f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{text}"')
    return f"<{name}{''.join(out)}/>" if content == "" else f"<{name}{''.join(out)}>{content}</{name}>"


def text(content: str, x: float, y: float, **attributes: Any) -> str:
    """Return a text element; `content` is plain text and is escaped."""
    return el("text", str(escape(content)), x=float(x), y=float(y), **attributes)


def text_width(content: str, size: float = 12.0) -> float:
    """Return about how many pixels a text takes in a wide sans-serif face of a size; never much too small."""
    total = 0.0
    for char in content:
        if char in _NARROW:
            total += 0.38
        elif char in _WIDE:
            total += 0.92
        elif unicodedata.east_asian_width(char) in "WF":
            total += 1.05
        else:
            total += 0.70 if char.isupper() else 0.62
    return total * size


def label(content: str, token: bool, longest: int = 18) -> str:
    """Return a label as the chart shows it: visible spaces for a token, and cut in the middle when very long."""
    shown = token_label(content) if token else " ".join(content.split())
    return shown if len(shown) <= longest else f"{shown[: longest - 6]}…{shown[-5:]}"
