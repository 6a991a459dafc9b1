"""Axes of the page's charts with their ticks, and labels placed so that none overlaps another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from requant.report.html import tag, text

CHARACTER = 6.6  # pixels; a little wider than a digit at 11 pixels
HEIGHT = 13
_AROUND = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_DISTANCES = (9, 18, 30, 44, 60, 78, 98)  # pixels; from the second on, a line connects point and label
_NICE = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Return whether the two overlap."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def holds(self, other: Box) -> bool:
        """Return whether `other` is inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values `low` to `high` onto pixels `start` to `end`; `log`: logarithmic; ticks are in `unit`s."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    unit: float = 1

    def at(self, value: float) -> float:
        """Return the pixel of a value; values beyond an end are drawn at that end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (self.end - self.start) * min((value - low) / (high - low), 1.0)

    def ticks(self, n: int) -> list[float]:
        """Return about `n` round values; on a logarithmic axis powers of ten, with 2 and 5 between if those are few."""
        if not self.log:
            raw = (self.high - self.low) / self.unit / n
            power = 10.0 ** math.floor(math.log10(raw))
            step = power * next(k for k in _NICE if k * power >= raw * 0.999) * self.unit
            return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        tens = [v for p in powers if self.low <= (v := 10.0**p) <= self.high]
        if len(tens) > n:
            return tens[:: -(-len(tens) // n)]
        if len(tens) >= 3:
            return tens
        return [v for p in powers for k in (1, 2, 5) if self.low <= (v := k * 10.0**p) <= self.high]


@dataclass(frozen=True, slots=True)
class Label:
    """A word as plain text beside the point (x, y); the lowest `priority` is placed first."""

    word: str
    x: float
    y: float
    kind: str = ""
    priority: int = 1


def place_labels(candidates: Sequence[Label], frame: Box, obstacles: Iterable[Box]) -> str:
    """Return markup of the labels that have a place without an overlap; the others are left out."""
    taken = [*obstacles, *(square_around(one.x, one.y, 4) for one in candidates)]
    found = []
    for one in sorted(candidates, key=lambda label: (label.priority, label.x, label.y)):
        placed = next((p for p in _label_boxes(one) if frame.holds(p) and not any(p.meets(t) for t in taken)), None)
        if placed is not None:
            taken.append(placed)
            found.append(_draw_label(one, placed))
    return "".join(found)


def square_around(x: float, y: float, reach: float) -> Box:
    """Return the square about a point."""
    return Box(x - reach, y - reach, x + reach, y + reach)


def cover_line(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Return boxes that cover a line through `points`."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        n = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0)) / 6))
        found += [square_around(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n, 2) for k in range(n + 1)]
    return found


def _label_boxes(label: Label) -> Iterable[Box]:
    width = CHARACTER * len(label.word)
    for distance in _DISTANCES:
        for across, down in _AROUND:
            reach = distance / math.hypot(across, down)
            x, y = label.x + across * reach, label.y + down * (reach + (HEIGHT / 2 if not across else 0))
            left = x - width / 2 if not across else x if across > 0 else x - width
            yield Box(left, y - HEIGHT / 2, left + width, y + HEIGHT / 2)


def _draw_label(label: Label, box: Box) -> str:
    x, y = (box.left + box.right) / 2, box.bottom - 3.5
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class_": f"label {label.kind}".strip()}
    word = tag("text", text(label.word), **place, text_anchor="middle")
    near_x = min(max(label.x, box.left), box.right)
    near_y = min(max(label.y, box.top), box.bottom)
    if math.hypot(near_x - label.x, near_y - label.y) <= _DISTANCES[0] + 1:
        return word
    ends = {"x1": f"{label.x:.1f}", "y1": f"{label.y:.1f}", "x2": f"{near_x:.1f}", "y2": f"{near_y:.1f}"}
    return tag("line", **ends, class_="leader") + word
