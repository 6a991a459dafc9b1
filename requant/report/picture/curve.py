"""The chart of loss against bytes in a plan's picture: the lower bound, the plan, and llama-quantize's mixtures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from requant.planning.plan import Plan
from requant.report.picture.parts import drawable_text
from requant.report.view import NO_LOSS, Dot, LossCurve, sample_curve
from requant.scoring.losses import NATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_LINE, _CHOSEN, _MIXTURE, _FAINT = "#0072b2", "#d55e00", "#555555", "#767676"
_BOLD: dict[str, Any] = {"fontsize": 8.5, "color": _CHOSEN, "fontweight": "bold"}
_SMALL: dict[str, Any] = {"fontsize": 7, "color": _MIXTURE}
_NAME = 24  # characters
_AROUND = (
    *((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)),
    *((1, 0.5), (0.5, 1), (-1, -0.5), (-0.5, -1), (1, -0.5), (-0.5, 1), (-1, 0.5), (0.5, -1)),
)
_DISTANCES = (6, 12, 20, 30, 42, 56, 72)  # points; from the second on, a line connects dot and label
_OFFSETS = [(x * distance, y * distance) for distance in _DISTANCES for x, y in _AROUND]
_LED = 9  # points; labels farther from their dot have a line
_NEARER = 1.5  # a label must be this many times as far from any other dot
_ROOM = 0.08  # of the range, on either side
Point = tuple[float, float]
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def drawable_curve(curve: LossCurve | None) -> LossCurve | None:
    """Return the curve if it has more than one loss that a logarithmic scale can show, else None."""
    return curve if curve is not None and sum(p.loss > 0 for p in curve.points) > 1 else None


def draw_curve(axes: Axes, curve: LossCurve, plan: Plan) -> None:
    """Draw the curve around the dots; without dots all of it."""
    whole = (*curve.points, *curve.dots)
    scale, unit = next((u for u in _UNITS if max(d.n_bytes for d in whole) >= u[0]), _UNITS[-1])
    low, high = _size_range(curve)
    curve = _fit_log_scale(replace(curve, points=tuple(sample_curve(curve, low, high)) or curve.points))
    dots, points = curve.dots, curve.points
    line = [p.n_bytes / scale for p in points], [p.loss for p in points]
    axes.plot(*line, color=_LINE, lw=1.4, zorder=2, label="lower bound, seldom reached")
    if curve.mixtures:
        places = [dot.n_bytes / scale for dot in curve.mixtures], [dot.loss for dot in curve.mixtures]
        axes.plot(*places, "o", ms=3.6, color=_MIXTURE, zorder=3, label="llama-quantize's mixtures")
    if curve.chosen is not None:
        x, y = curve.chosen.n_bytes / scale, curve.chosen.loss
        axes.plot(x, y, "D", ms=7, color=_CHOSEN, mec="white", mew=0.8, zorder=4)
    axes.set_yscale("log")
    axes.set_xlim(low / scale, high / scale)
    _set_loss_limits(axes, points if len(dots) < 2 else (*points, *dots))
    _set_ticks(axes)
    what = "predicted KL divergence" if plan.loss_unit == NATS else "predicted"
    pool = "bytes in VRAM" if curve.pool == "VRAM" else "bytes of all tensors"
    axes.set_xlabel(f"{pool}, {unit}", labelpad=2)
    axes.set_title(f"Loss: {what}, {plan.loss_unit}", loc="left", fontsize=9.5, fontweight="bold", pad=5)
    axes.grid(color="#e4e4e4", lw=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    below = -0.42 / (axes.bbox.height / axes.figure.dpi)  # inches
    how: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, below), "ncols": 2, "frameon": False}
    axes.legend(**how, fontsize=7.5, borderaxespad=0, borderpad=0, handlelength=1.4)
    _label_dots(axes, curve, scale, list(zip(*line, strict=True)))


def _fit_log_scale(curve: LossCurve) -> LossCurve:
    """Return the curve with losses of 0, which have no logarithm, at the lower end and named so."""
    none = NO_LOSS * max(d.loss for d in (*curve.dots, *curve.points))
    points = tuple(p for p in curve.points if p.loss > none)
    floor = min(d.loss for d in (*curve.dots, *points) if d.loss > none) / 3
    points += tuple(Dot("", p.n_bytes, floor) for p in curve.points[len(points) :][:1])

    def placed(dot: Dot) -> Dot:
        return dot if dot.loss > none else Dot(f"{dot.name}: no loss", dot.n_bytes, floor)

    chosen = None if curve.chosen is None else placed(curve.chosen)
    return replace(curve, points=points, chosen=chosen, mixtures=tuple(map(placed, curve.mixtures)))


def _size_range(curve: LossCurve) -> Point:
    """Return the least and the largest bytes on the chart: those of the dots, with some room; without dots of all."""
    seen = [d.n_bytes for d in (curve.dots if len(curve.dots) > 1 else curve.points)]
    low, high = min(seen), max(seen)
    room = _ROOM * max(high - low, 0.05 * high)
    return low - room, high + 2 * room


def _set_loss_limits(axes: Axes, seen: Sequence[Dot]) -> None:
    least, most = (math.log10(f(d.loss for d in seen)) for f in (min, max))
    room = _ROOM * max(most - least, 0.3)
    axes.set_ylim(10 ** (least - room), 10 ** (most + room))


def _set_ticks(axes: Axes) -> None:
    """Set ticks with plain figures, as matplotlib's own labels are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    wide = math.log10(high / low) > 2.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.tick_params(length=2.5, pad=2)


def _label_dots(axes: Axes, curve: LossCurve, scale: float, line: Sequence[Point]) -> None:
    """Write the names of the dots without overlaps; a name without a free place is left out."""
    dots = curve.dots
    pixels = axes.figure.dpi / 72  # of a point
    places = [tuple(axes.transData.transform((dot.n_bytes / scale, dot.loss))) for dot in dots]
    marks = [_box_around(at, pixels * (5 if d == curve.chosen else 2.5)) for d, at in zip(dots, places, strict=True)]
    path = axes.transData.transform(line).tolist() if line else []
    curve_boxes = [box for a, b in pairwise(path) for box in _line_boxes(a, b)]
    taken: list[Bbox] = []
    left = list(range(len(dots)))
    for strict in (True, False):  # if dots touch each other, a line may begin across another dot
        for i in list(left):
            style = _BOLD if dots[i] == curve.chosen else _SMALL
            name = drawable_text(dots[i].name, _NAME)
            size = _text_size(axes, name, style)
            for x, y in _OFFSETS:
                at = places[i][0] + x * pixels, places[i][1] + y * pixels
                box = _text_box(at, size, (x, y))
                lead = list(_line_boxes(places[i], at)) if _needs_leader((x, y)) else []
                free = _is_inside(box, axes.bbox) and _are_apart([box], [*marks, *taken, *curve_boxes])
                clear = _are_apart(lead, marks[:i] + marks[i + 1 :]) if lead else strict and _is_nearest(box, i, places)
                if free and _are_apart(lead, taken) and (clear or (lead and not strict)):
                    _write_label(axes, (dots[i].n_bytes / scale, dots[i].loss), name, (x, y), style)
                    taken += [box, *lead]
                    left.remove(i)
                    break


def _write_label(axes: Axes, at: Point, name: str, offset: Point, style: dict[str, Any]) -> None:
    x, y = map(_sign, offset)
    ends = (1 - x) / 2, (1 - y) / 2  # of the label: where the line meets it
    arrow = {"arrowstyle": "-", "lw": 0.5, "color": _FAINT, "shrinkA": 0, "shrinkB": 3, "relpos": ends}
    sides = {"ha": ("center", "left", "right")[x], "va": ("center", "bottom", "top")[y]}
    how: dict[str, Any] = {"textcoords": "offset points", "zorder": 5, **sides, **style}
    axes.annotate(name, at, offset, arrowprops=arrow if _needs_leader(offset) else None, **how)


def _text_size(axes: Axes, name: str, style: dict[str, Any]) -> Point:
    """Return width and height of the name in pixels."""
    text = axes.text(0, 0, name, **style)
    found = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
    text.remove()
    return found.width, found.height


def _needs_leader(offset: Point) -> bool:
    return max(map(abs, offset)) > _LED


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _text_box(at: Point, size: Point, offset: Point) -> Bbox:
    """Return the box of a label of that size on the offset's side of `at`."""
    from matplotlib.transforms import Bbox

    left, low = (p - s * (1 - _sign(o)) / 2 for p, s, o in zip(at, size, offset, strict=True))
    return Bbox.from_bounds(left, low, *size).padded(2.0)


def _box_around(at: Point, half: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(at[0] - half, at[1] - half, at[0] + half, at[1] + half)


def _line_boxes(a: Sequence[float], b: Sequence[float]) -> Iterator[Bbox]:
    """Yield small squares along the line from `a` to `b`, in pixels."""
    n = min(max(1, int(math.hypot(b[0] - a[0], b[1] - a[1]) / 4)), 2000)
    for i in range(n):
        yield _box_around((a[0] + (b[0] - a[0]) * i / n, a[1] + (b[1] - a[1]) * i / n), 1.5)


def _is_nearest(box: Bbox, own: int, places: Sequence[Point]) -> bool:
    """Return whether the label is clearly nearer to its own dot than to any other."""

    def distance(at: Point) -> float:
        return math.hypot(max(box.x0 - at[0], at[0] - box.x1, 0), max(box.y0 - at[1], at[1] - box.y1, 0))

    limit = _NEARER * distance(places[own])
    return all(distance(at) > limit for i, at in enumerate(places) if i != own and at != places[own])


def _are_apart(boxes: Sequence[Bbox], others: Sequence[Bbox]) -> bool:
    return not any(box.overlaps(other) for box in boxes for other in others)


def _is_inside(box: Bbox, frame: Any) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
