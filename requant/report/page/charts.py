"""Charts of the report page as SVG: loss against bytes, and predicted against measured error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from requant.common.units import format_size
from requant.conversion.record import Converted
from requant.errors import brief
from requant.planning.plan import Choice, Plan
from requant.report.html import head_cells, number_cell, table, tag, text
from requant.report.page.axes import Axis, Box, Label, cover_line, place_labels, square_around
from requant.report.view import Dot, LossCurve, sample_curve

WIDE, NARROW = (690, 430), (340, 340)  # pixels, for a screen and for a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 44
_DECADES = 1e6  # largest over smallest loss on the chart; near a copy of the source the loss falls to 0
_MARGIN = 0.06  # of the range, on either side
Point = tuple[float, float]
Pair = tuple[Choice, Converted]


def curve_charts(plan: Plan, curve: LossCurve) -> str:
    """Return the chart for a screen and the one for a phone; the style sheet shows one of them."""
    return "".join(_curve_chart(plan, curve, size, kind) for size, kind in ((WIDE, "wide"), (NARROW, "narrow")))


def _curve_chart(plan: Plan, curve: LossCurve, size: tuple[int, int], kind: str) -> str:
    across, up = _curve_axes(curve, size)
    line = [(across.at(p.n_bytes), up.at(p.loss)) for p in sample_curve(curve, across.low, across.high)]
    path = tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in line), class_="frontier")
    marks = [_draw_dot(across, up, dot, "mixture") for dot in curve.mixtures]
    wanted = [Label(brief(dot.name), across.at(dot.n_bytes), up.at(dot.loss)) for dot in curve.mixtures]
    if curve.chosen is not None:
        marks.append(_draw_dot(across, up, curve.chosen, "chosen"))
        at = across.at(curve.chosen.n_bytes), up.at(curve.chosen.loss)
        wanted.append(Label(curve.chosen.name, *at, "strong", 0))
    edge, lines = "", cover_line(line)
    if curve.room is not None and across.low < curve.room < across.high:
        x = across.at(curve.room)
        edge = tag("line", x1=f"{x:.1f}", y1=up.end, x2=f"{x:.1f}", y2=up.start, class_="edge")
        lines += cover_line([(x, up.end), (x, up.start)])
        wanted.append(Label("budget", x, up.start - 16, "edge-name", 0))
    frame = Box(across.start, up.end, across.end, up.start)
    words = place_labels(wanted, frame, lines)
    title = tag("title", f"Predicted loss of {text(plan.source)} against bytes of {curve.pool}")
    grid = _grid_lines(across, up, size, _round_size, (f"bytes of {curve.pool}", "predicted loss"))
    data_x, data_y = (f"{axis.low:.17g} {axis.high:.17g} {axis.start} {axis.end}" for axis in (across, up))
    cross = tag("circle", r="4", class_="cursor", visibility="hidden")
    content = title, grid, edge, path, cross, *marks, words
    return _draw_svg(size, *content, class_=f"chart curve {kind}", data_x=data_x, data_y=data_y)


def _curve_axes(curve: LossCurve, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Return axes about the named dots, or about the whole curve."""
    dots = curve.dots or curve.points
    low, high = min(d.n_bytes for d in dots), max(d.n_bytes for d in dots)
    room = max(_MARGIN * (high - low), 0.02 * high, 1)
    unit = next((u for u in (2**30, 2**20, 2**10) if high >= u), 1)
    across = Axis(max(low - room, 0), high + room, _LEFT, size[0] - _RIGHT, unit=unit)
    seen = [d.loss for d in (*curve.dots, *sample_curve(curve, across.low, across.high)) if d.loss > 0] or [1.0]
    least = max(min(seen), max(seen) / _DECADES)
    return across, Axis(least / 1.6, max(seen) * 1.8, size[1] - _BOTTOM, _TOP, log=True)


def _draw_dot(across: Axis, up: Axis, dot: Dot, kind: str) -> str:
    """Return a ring for a mixture, a filled diamond for the plan."""
    x, y = across.at(dot.n_bytes), up.at(dot.loss)
    title = tag("title", f"{text(dot.name)}: {format_size(dot.n_bytes)}, predicted loss {dot.loss:.3g}")
    hit = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="11", class_="hit")
    if kind == "mixture":
        shape = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="4")
    else:
        shape = tag("path", d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z")
    return tag("g", title, hit, shape, class_=kind, tabindex="0", role="img")


def error_chart(pairs: Sequence[Pair], index: dict[str, int]) -> str:
    """Return predicted against measured relative error of each encoded tensor, and the line of equal errors."""
    size = NARROW
    values = [v for c, t in pairs for v in (c.rmse, t.rmse)]
    low, high = min(values) / 1.25, max(values) * 1.25
    across = Axis(low, high, _LEFT, size[0] - _RIGHT, log=True)
    up = Axis(low, high, size[1] - _BOTTOM, _TOP, log=True)
    at, dots, clusters = [], [], dict[str, list[Point]]()
    for c, t in pairs:
        x, y = across.at(c.rmse), up.at(t.rmse)
        at.append((x, y))
        dots.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.5", data_i=index[c.name]))
        clusters.setdefault(c.type, []).append((x, y))
    same = tag("line", x1=across.start, y1=up.start, x2=across.end, y2=up.end, class_="same")
    wanted = [Label(name, *_centre_of(points), "kind") for name, points in clusters.items()]
    diagonal = [(across.start, up.start), (across.end, up.end)]
    frame = Box(across.start, up.end, across.end, up.start)
    words = place_labels(wanted, frame, [*cover_line(diagonal), *(square_around(x, y, 4) for x, y in at)])
    title = tag("title", "Predicted against measured relative error of each tensor")
    grid = _grid_lines(across, up, size, lambda v: f"{v:.3g}", ("predicted error", "measured error"))
    return _draw_svg(size, title, grid, same, tag("g", *dots, class_="dots"), words, class_="chart errors")


def error_table(pairs: Sequence[Pair]) -> str:
    """Return the median errors of each type, and the tensor whose measured error is farthest from the predicted one."""
    heads = ("type", "tensors", "predicted, median", "measured, median", "farthest ratio", "of")
    groups: dict[str, list[Pair]] = {}
    for c, t in pairs:
        groups.setdefault(c.type, []).append((c, t))
    rows = []
    for name, found in sorted(groups.items(), key=lambda group: -median(t.rmse for _, t in group[1])):
        far, made = max(((t.rmse / c.rmse, t) for c, t in found), key=lambda item: abs(math.log(item[0])))
        middles = (f"{median(values):.4f}" for values in zip(*((c.rmse, t.rmse) for c, t in found), strict=True))
        cells = map(number_cell, (str(len(found)), *middles, f"{far:.3f}"))
        rows.append(tag("tr", tag("th", text(name), scope="row"), *cells, tag("td", tag("code", text(made.name)))))
    return table(head_cells(heads, range(1, 5)), rows, class_="data")


def _centre_of(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _grid_lines(
    across: Axis, up: Axis, size: tuple[int, int], label: Callable[[float], str], names: tuple[str, str]
) -> str:
    """Return lines at the ticks with their figures, and the names of the axes."""
    parts = []
    for value in across.ticks(6 if size == WIDE else 4):
        x = f"{across.at(value):.1f}"
        parts.append(tag("line", x1=x, y1=up.end, x2=x, y2=up.start, class_="grid"))
        parts.append(tag("text", label(value), x=x, y=up.start + 16, text_anchor="middle"))
    for value in up.ticks(6):
        y = up.at(value)
        parts.append(tag("line", x1=across.start, y1=f"{y:.1f}", x2=across.end, y2=f"{y:.1f}", class_="grid"))
        parts.append(tag("text", f"{value:.3g}", x=across.start - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    middle = (across.start + across.end) / 2
    parts.append(tag("text", names[0], x=f"{middle:.1f}", y=size[1] - 8, text_anchor="middle", class_="axis"))
    turned = f"translate(11 {(up.start + up.end) / 2:.1f}) rotate(-90)"
    parts.append(tag("text", names[1], transform=turned, text_anchor="middle", class_="axis"))
    return tag("g", *parts, class_="axes", aria_hidden="true")


def _round_size(n_bytes: float) -> str:
    number, unit = format_size(n_bytes).split()
    return f"{float(number):g} {unit}"


def _draw_svg(size: tuple[int, int], *content: str, **attributes: object) -> str:
    width, height = size
    return tag("svg", *content, viewBox=f"0 0 {width} {height}", width=width, height=height, role="group", **attributes)
