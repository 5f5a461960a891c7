"""Colours of the report, computed in OKLCH so that equal steps of a value are equal steps to the eye.

Every level of a palette has a shade for light pages and one for dark pages; the style sheet carries both
(`light-dark()`), so a chart needs only the name of its level. The diverging palette runs from blue (negative) through
the page's own grey to orange (positive), which stay apart for every common colour-vision deficiency; both ends have
the same lightness. Text on a level is black or white, whichever contrasts more; that is always at least 4.5 to 1.

Source: B. Ottosson, "A perceptual color space for image processing" (2020), for OKLCH; WCAG 2.2 for contrast.
"""

from __future__ import annotations

import math
from functools import cache

LEVELS = 20
"""Steps from the middle of the diverging palette to either end; the sequential palette has as many steps."""

_BLACK, _WHITE = "#000000", "#ffffff"

# The middle of every palette: nearly the grey of the page. Lightness, chroma, hue.
_MIDDLE = {"light": (0.968, 0.0, 90.0), "dark": (0.272, 0.007, 245.0)}

# Each path ends at this lightness and chroma; its hue runs from the first to the second.
_PATHS = {
    ("light", "p"): (0.520, 0.160, 78.0, 42.0),
    ("light", "n"): (0.450, 0.130, 235.0, 258.0),
    ("light", "s"): (0.410, 0.080, 165.0, 205.0),
    ("dark", "p"): (0.800, 0.135, 40.0, 66.0),
    ("dark", "n"): (0.800, 0.105, 262.0, 235.0),
    ("dark", "s"): (0.860, 0.110, 205.0, 178.0),
}


def oklch_to_hex(lightness: float, chroma: float, hue: float) -> str:
    """Return the sRGB colour of an OKLCH one, with less chroma where sRGB cannot show it.

    Example:
        >>> oklch_to_hex(1.0, 0.0, 0.0), oklch_to_hex(0.0, 0.0, 0.0)
        ('#ffffff', '#000000')
    """
    angle = math.radians(hue)
    return _oklab_to_hex(lightness, chroma * math.cos(angle), chroma * math.sin(angle))


def _oklab_to_hex(lightness: float, a: float, b: float) -> str:
    for step in range(21):
        rgb = _linear_rgb(lightness, a * (1 - step / 20), b * (1 - step / 20))
        if all(-1e-4 <= channel <= 1 + 1e-4 for channel in rgb):
            break
    return "#" + "".join(f"{round(255 * _encode(min(1.0, max(0.0, channel)))):02x}" for channel in rgb)


def _linear_rgb(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _encode(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, between 0 (black) and 1 (white), as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """Return the WCAG contrast ratio of two colours, between 1 and 21."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def ink(background: str) -> str:
    """Return the text colour, black or white, that contrasts more with a background."""
    return _BLACK if contrast(_BLACK, background) >= contrast(_WHITE, background) else _WHITE


@cache
def shade(theme: str, level: str) -> str:
    """Return the colour of a level (`z`, `p1`..`p20`, `n1`..`n20`, `s0`..`s20`) on `light` or `dark` pages."""
    path, step = ("p", 0) if level == "z" else (level[0], int(level[1:]))
    light, chroma, first, last = _PATHS[theme, path]
    grey, tint, tone = _MIDDLE[theme]
    t = step / LEVELS
    hue, away = math.radians(first + (last - first) * t), chroma * t**0.75
    base = math.radians(tone)
    a = tint * (1 - t) * math.cos(base) + away * math.cos(hue)
    b = tint * (1 - t) * math.sin(base) + away * math.sin(hue)
    return _oklab_to_hex(grey + (light - grey) * t, a, b)


def levels() -> list[str]:
    """Return the name of every level: diverging, then sequential."""
    steps = range(1, LEVELS + 1)
    return ["z", *(f"n{i}" for i in steps), *(f"p{i}" for i in steps), "s0", *(f"s{i}" for i in steps)]


def level(value: float, limit: float, diverging: bool, low: float = 0.0) -> str:
    """Return the level of a value on a scale that ends at `limit` (diverging: at `-limit` and `limit`).

    Example:
        >>> level(-3.0, 3.0, True), level(0.0, 3.0, True), level(1.0, 1.0, False)
        ('n20', 'z', 's20')
    """
    if diverging:
        step = round(LEVELS * min(1.0, abs(value) / limit)) if limit > 0 else 0
        return "z" if step == 0 else f"{'p' if value > 0 else 'n'}{step}"
    span = limit - low
    return f"s{round(LEVELS * min(1.0, max(0.0, (value - low) / span))) if span > 0 else 0}"


def stylesheet() -> str:
    """Return the rules that give every level its shade (`--c`) and the colour of text on it (`--k`), in both themes."""
    rules = []
    for name in levels():
        light, dark = shade("light", name), shade("dark", name)
        rules.append(f".assay .{name}{{--c:light-dark({light},{dark});--k:light-dark({ink(light)},{ink(dark)})}}")
    return "\n".join(rules)
