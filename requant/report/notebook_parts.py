"""HTML parts of a notebook card, styled inline because a notebook has no style sheet of ours: tables, small charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log

from requant.common.units import format_size
from requant.errors import REMARK, brief
from requant.report.html import table, tag, text

_LINE = "1px solid color-mix(in srgb, currentColor 25%, transparent)"
_COLOURS = ("#4c8bd6", "#d68a3c", "#58a55c", "#a06cc8", "#c8555b", "#5aa9a6")  # legible on white and on black
_WIDTH, _HEIGHT = 480, 48  # of a chart, in pixels
_SMALL = "font-size:0.85em"
_TABLE = "border-collapse:collapse"


def fact_table(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values; None and '' are left out."""
    cells = (
        tag(
            "tr",
            tag("th", text(name, REMARK), style="text-align:left;padding:0 1em 0 0"),
            tag("td", text(value, REMARK), style="text-align:left;padding:0"),
        )
        for name, value in rows
        if value not in (None, "")
    )
    return tag("table", *cells, style=_TABLE)


def figure_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table whose first column is text and the others figures."""
    body = (tag("tr", *_aligned_cells("td", row)) for row in rows)
    return table(_aligned_cells("th", head), body, style=_TABLE)


def _aligned_cells(name: str, cells: Sequence[object]) -> Iterable[str]:
    style = f"white-space:nowrap;padding:0.1em 1em 0.1em 0;border-bottom:{_LINE};text-align:"
    return (tag(name, text(c, REMARK), style=style + ("right" if i else "left")) for i, c in enumerate(cells))


def layer_chart(title: str, values: Mapping[int, float], form: str) -> str:
    """Return a chart with a column for each layer, whose value hovering shows in this form."""
    if not values:
        return ""
    top, step, bars = max(*values.values(), 1e-300), _WIDTH / len(values), []
    for i, (layer, value) in enumerate(sorted(values.items())):
        words = f"layer {layer}: {form.format(value)}"
        y, height = f"{_HEIGHT * (1 - value / top):.2f}", f"{_HEIGHT * value / top:.2f}"
        bars.append(_rectangle(words, i * step, y, max(step - 1, 0.5), height, fill=_COLOURS[0]))
    return _titled_chart(title, _HEIGHT, *bars)


def stacked_bar(title: str, parts: Sequence[tuple[str, int]]) -> str:
    """Return one bar of names and bytes, each part as wide as its size, with a legend below it."""
    whole, at, bars, legend = sum(max(size, 0) for _, size in parts) or 1, 0.0, [], []
    for i, (name, size) in enumerate(parts):
        width = _WIDTH * max(size, 0) / whole
        free = name == "free"
        colour = "currentColor" if free else _COLOURS[i % len(_COLOURS)]
        opacity = "0.15" if free else None
        bars.append(_rectangle(f"{name}: {format_size(size)}", at, 0, width, 14, fill=colour, fill_opacity=opacity))
        square = tag("span", "&#9632;", style=f"color:{colour}")
        legend.append(f"{square} {text(name, REMARK)} {format_size(size)}")
        at += width
    return _titled_chart(title, 14, *bars) + tag("div", " &#160; ".join(legend), style=_SMALL)


def _rectangle(words: str, x: float, y: object, width: float, height: object, **style: object) -> str:
    """Return a rectangle; hovering over it shows the words."""
    title = tag("title", text(words, REMARK))
    return tag("rect", title, x=f"{x:.2f}", y=y, width=f"{width:.2f}", height=height, **style)


def line_chart(title: str, points: Sequence[tuple[float, float, str]]) -> str:
    """Return a line through points (x, y, description), y above 0 and on a logarithmic scale."""
    if len(points) < 2:
        return ""
    ys = [log(y) for _, y, _ in points]
    (left, right), (low, high) = (min(p[0] for p in points), max(p[0] for p in points)), (min(ys), max(ys))
    height = 3 * _HEIGHT
    placed = [
        (4 + (_WIDTH - 8) * (x - left) / ((right - left) or 1), 4 + (height - 8) * (high - y) / ((high - low) or 1))
        for (x, _, _), y in zip(points, ys, strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = (
        tag("circle", tag("title", text(description, REMARK)), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=_COLOURS[0])
        for (x, y), (_, _, description) in zip(placed, points, strict=True)
    )
    return _titled_chart(title, height, f'<polyline points="{path}" fill="none" stroke="{_COLOURS[0]}"/>', *dots)


def card(title: str, *parts: str) -> str:
    """Return the parts under a title; '' is left out."""
    body = (tag("div", part, style="margin-top:0.5em") for part in parts if part)
    return tag("div", tag("strong", text(title, REMARK)), *body, style="max-width:60em;overflow-x:auto")


def _titled_chart(title: str, height: int, *shapes: str) -> str:
    chart = tag(
        "svg",
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_label=brief(title, REMARK),
        style="max-width:100%;height:auto",
        viewBox=f"0 0 {_WIDTH} {height}",
        width=_WIDTH,
        height=height,
        preserveAspectRatio="none",
    )
    return tag("div", text(title, REMARK), style=_SMALL) + chart
