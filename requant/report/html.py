"""TODO."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from math import log
from typing import Any

from requant.errors import REMARK, SHOWN, brief

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;", "`": "&#96;"})


_LINE = "1px solid color-mix(in srgb, currentColor 25%, transparent)"


_COLOURS = ("#4c8bd6", "#d68a3c", "#58a55c", "#a06cc8", "#c8555b", "#5aa9a6")  # legible on white and on black


_WIDTH, _HEIGHT = 480, 48  # of a picture, in pixels


def escape(text: object, most: int = REMARK) -> str:
    """`text` as the text of an element or the value of a quoted attribute, whatever it holds: controls are escaped."""
    return brief(str(text), most).translate(_ENTITIES)


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values; what is None or empty is left out."""
    cells = (
        f'<tr><th style="text-align:left;padding:0 1em 0 0">{escape(name)}</th>'
        f'<td style="text-align:left;padding:0">{escape(value)}</td></tr>'
        for name, value in rows
        if value not in (None, "")
    )
    return f'<table style="border-collapse:collapse">{"".join(cells)}</table>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """A table; the first `left` columns are text, the others figures."""

    def line(cells: Sequence[object], tag: str) -> str:
        aligned = ("left" if i < left else "right" for i in range(len(cells)))
        style = f"white-space:nowrap;padding:0.1em 1em 0.1em 0;border-bottom:{_LINE};text-align:"
        return "".join(f'<{tag} style="{style}{a}">{escape(c)}</{tag}>' for a, c in zip(aligned, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<table style="border-collapse:collapse">{top}<tbody>{body}</tbody></table>'


def columns(title: str, values: Sequence[tuple[str, float, str]]) -> str:
    """A column for each (name, value, what it is), as high as its value; hovering tells what it is."""
    if not values:
        return ""
    top, width = max(*(value for _, value, _ in values), 1e-300), _WIDTH / len(values)
    bars = "".join(
        f'<rect x="{i * width:.2f}" y="{_HEIGHT * (1 - value / top):.2f}" width="{max(width - 1, 0.5):.2f}"'
        f' height="{_HEIGHT * value / top:.2f}" fill="{_COLOURS[0]}"><title>{escape(f"{name}: {said}")}</title></rect>'
        for i, (name, value, said) in enumerate(values)
    )
    return _picture(title, bars, _HEIGHT)


def stack(title: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar made of (name, size, what it is), as wide as their sizes, with a legend below it."""
    whole, at, bars, legend = sum(max(size, 0) for _, size, _ in parts) or 1, 0.0, "", []
    for i, (name, size, said) in enumerate(parts):
        width = _WIDTH * max(size, 0) / whole
        colour = "currentColor" if name == "free" else _COLOURS[i % len(_COLOURS)]
        opacity = ' fill-opacity="0.15"' if name == "free" else ""
        hover = f"<title>{escape(f'{name}: {said}')}</title>"
        bars += f'<rect x="{at:.2f}" y="0" width="{width:.2f}" height="14" fill="{colour}"{opacity}>{hover}</rect>'
        legend.append(f'<span style="color:{colour}">&#9632;</span> {escape(name)} {escape(said)}')
        at += width
    return _picture(title, bars, 14) + f'<div style="font-size:0.85em">{" &#160; ".join(legend)}</div>'


def line(title: str, points: Sequence[tuple[float, float, str]]) -> str:
    """Points (x, y, what it is) joined by a line, y above 0 and on a logarithmic scale."""
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
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOURS[0]}"><title>{escape(said)}</title></circle>'
        for (x, y), (_, _, said) in zip(placed, points, strict=True)
    )
    return _picture(title, f'<polyline points="{path}" fill="none" stroke="{_COLOURS[0]}"/>{dots}', height)


def card(title: str, *parts: str) -> str:
    """Parts under a title, those that are empty left out."""
    body = "".join(f'<div style="margin-top:0.5em">{part}</div>' for part in parts if part)
    return f'<div style="max-width:60em;overflow-x:auto"><strong>{escape(title)}</strong>{body}</div>'


def _picture(title: str, shapes: str, height: int) -> str:
    box = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" preserveAspectRatio="none"'
    style = "max-width:100%;height:auto"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" style="{style}" {box}>'
    return f'<div style="font-size:0.85em">{escape(title)}</div>{head}{shapes}</svg>'


# what would end a script element or open a comment in it, and what old JavaScript took for the end of a line
_IN_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def text(value: object, most: int = SHOWN) -> str:
    """`value`, `most` characters of it, as text of an element: what may be seen of it, escaped."""
    return escape(value, most)


def tag(name: str, *content: str, **attributes: object) -> str:
    """The element `name` with `content`, which is markup already, and `attributes`, which are escaped here.

    An attribute that is None or False is left out, True stands without a value; `class_` is class, `_` a hyphen.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{html.escape(str(value))}"')
    return f"<{' '.join(words)}>{''.join(content)}</{name}>"


def script_json(data: Any) -> str:
    """`data` as JSON that ends no script element, ASCII."""
    return json.dumps(data, separators=(",", ":")).translate(_IN_SCRIPT)
