"""Rows of text in aligned columns, and wrapped lines with a label."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

GAP = "  "
WIDTH = 100  # columns where the output is no terminal


def display_width(text: str) -> int:
    """Return the columns of printable `text` on a terminal: wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in ("W", "F") for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def grid(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return lines of aligned columns; the columns in `right` are flush right."""
    sizes = [max(display_width(row[k]) for row in rows) for k in range(len(rows[0]))] if rows else []

    def place(cell: str, k: int) -> str:
        space = " " * (sizes[k] - display_width(cell))
        return space + cell if k in right else cell + space

    return [GAP.join(place(cell, k) for k, cell in enumerate(row)).rstrip() for row in rows]


def fit_grid(rows: Sequence[Sequence[str]], width: int, right: Sequence[int], spare: Sequence[int]) -> list[str]:
    """Return the grid; columns in `spare` are left out one after the other until it fits `width`."""
    left = list(range(len(rows[0])))
    for column in (None, *spare):
        left = [k for k in left if k != column]
        lines = grid([[row[k] for k in left] for row in rows], [i for i, k in enumerate(left) if k in right])
        if max(map(display_width, lines)) <= width:
            break
    return lines


def label_lines(lines: Iterable[tuple[str, str]], width: int, label_width: int = 12) -> list[str]:
    """Return lines with labels on the left, wrapped into the right column; a repeated label is left blank."""
    result, last = [], ""
    for label, text in lines:
        shown = label if label != last else ""
        wrapped = textwrap.wrap(text, max(width - label_width, 20), break_on_hyphens=False) or [""]
        result.append(f"{shown:<{label_width}}{wrapped[0]}".rstrip())
        result.extend(" " * label_width + more for more in wrapped[1:])
        last = label
    return result
