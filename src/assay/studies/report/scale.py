"""Axes and numbers of the charts: scales from values to pixels, round ticks, and numbers as a reader expects them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A map from values to pixels, linear or logarithmic.

    Args:
        low: The value drawn at `start`.
        high: The value drawn at `end`.
        start: Pixel of `low`.
        end: Pixel of `high`.
        log: Whether equal ratios, not equal differences, are equal distances.

    Example:
        >>> Scale(low=0, high=10, start=0, end=100)(2.5)
        25.0
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start if high == low else self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Return round values between `low` and `high`, about `count` of them."""
        return log_ticks(self.low, self.high, count) if self.log else ticks(self.low, self.high, count)

    def to_dict(self) -> dict[str, Any]:
        """Return the scale as the page's script reads it."""
        return {"d": [self.low, self.high], "r": [round(self.start, 2), round(self.end, 2)], "log": self.log}


def step(span: float, count: int) -> float:
    """Return the round step (1, 2 or 5 times a power of ten) that cuts `span` into about `count` parts.

    Example:
        >>> step(10.0, 5), step(0.7, 6)
        (2.0, 0.2)
    """
    raw = span / max(1, count)
    power = math.floor(math.log10(raw))
    for multiple in (1, 2, 5):
        if raw <= multiple * 10.0**power * 1.0001:
            return float(f"{multiple}e{power}")
    return float(f"1e{power + 1}")


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round values within `[low, high]`.

    Example:
        >>> ticks(-0.3, 4.2, 5)
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if not high > low:
        return [low]
    size = step(high - low, count)
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [float(f"{i * size:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Return values 1, 2, 5 times powers of ten within `[low, high]`, or the powers alone when there are many.

    Example:
        >>> log_ticks(1, 100)
        [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{m}e{p}") for p in powers for m in (1, 2, 5)]
    inside = [value for value in every if low * 0.9999 <= value <= high * 1.0001]
    if len(inside) > max(count, 3):
        inside = [value for value in inside if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
    return inside


def domain(values: Iterable[float | None], *, zero: bool = False, pad: float = 0.04) -> tuple[float, float]:
    """Return the range of values with a margin; no margin beyond zero when zero is its end."""
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    margin = (high - low) * pad
    return (low if zero and low == 0.0 else low - margin), (high if zero and high == 0.0 else high + margin)


def decimals(values: Iterable[float | None], digits: int = 4) -> int:
    """Return the decimals that show the largest of the values with `digits` significant digits (0 to 6).

    Example:
        >>> decimals([0.31, 4.2]), decimals([1500.0]), decimals([1.0, 7.0])
        (3, 0, 0)
    """
    known = [abs(value) for value in values if value is not None]
    if all(value == int(value) and value < 1e6 for value in known):
        return 0
    top = max(known, default=0.0)
    return 0 if top == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(top))))


def fixed(value: float | None, places: int) -> str:
    """Return a number with so many decimals, or two significant digits where it is too small for them.

    Example:
        >>> fixed(-1.5, 2), fixed(0.00012, 2), fixed(None, 2), fixed(12345.6, 0)
        ('−1.50', '0.00012', '–', '12,346')
        >>> fixed(0.0000123, 6), fixed(0.0, 6)
        ('1.2e−5', '0')
    """
    if value is None:
        return "–"
    if 0 < abs(value) < max(1e-4, 0.5 * 10**-places):
        return _exponent(value, 1) if abs(value) < 1e-4 else short(value, 2)
    if value == 0 and places >= 5:
        return "0"
    if abs(value) >= 1e7:
        return _exponent(value, 3)
    return f"{value:,.{places}f}".replace("-", "−")


def short(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits and no needless zeros.

    Example:
        >>> short(3.14159), short(-0.5), short(1234.5), short(0.0000321), short(2.0)
        ('3.14', '−0.5', '1,234', '3.21e−5', '2')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 7:
        return _exponent(value, digits - 1)
    places = max(0, digits - 1 - size)
    text = f"{value:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if places else text).replace("-", "−")


def _exponent(value: float, digits: int) -> str:
    mantissa, power = f"{value:.{digits}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}".replace("-", "−")


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the labels of an axis, all with the same decimals."""
    if not values:
        return []
    if any(value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e6) for value in values):
        return [short(value) for value in values]
    places = max(len(f"{value:.10f}".rstrip("0").split(".")[1]) for value in values)
    return [f"{value:,.{places}f}".replace("-", "−") for value in values]


def log_tick_labels(values: Sequence[float]) -> list[str]:
    """Return the labels of a logarithmic axis, each as short as it can be."""
    return [short(value) for value in values]


def thin(count: int, room: float, need: float) -> int:
    """Return n such that every n-th of `count` labels fits, each with `room` pixels and needing `need`.

    Example:
        >>> thin(30, 18.0, 12.0), thin(30, 5.0, 12.0)
        (1, 5)
    """
    if room >= need or count <= 1:
        return 1
    least = need / room
    return next((n for n in (2, 5, 10, 20, 25, 50, 100, 200, 500) if n >= least), count)
