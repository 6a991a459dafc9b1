"""Rows of text in aligned columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

GAP = "  "


def columns(text: str) -> int:
    """What printable `text` takes on a terminal: wide characters two columns, marks over others none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in ("W", "F") for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def grid(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns; the columns in `right` are flush right."""
    sizes = [max(columns(row[k]) for row in rows) for k in range(len(rows[0]))] if rows else []

    def place(cell: str, k: int) -> str:
        space = " " * (sizes[k] - columns(cell))
        return space + cell if k in right else cell + space

    return [GAP.join(place(cell, k) for k, cell in enumerate(row)).rstrip() for row in rows]
