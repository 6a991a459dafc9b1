"""Rows of text in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


def grid(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns; the columns in `right` are flush right."""
    sizes = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))] if rows else []

    def place(cell: str, k: int) -> str:
        return cell.rjust(sizes[k]) if k in right else cell.ljust(sizes[k])

    return [GAP.join(place(cell, k) for k, cell in enumerate(row)).rstrip() for row in rows]
