"""Notebook cards: the way up to `report.notebook`, which draws a result for its `_repr_html_`."""

from __future__ import annotations

from importlib import import_module


def html(result: object) -> str:
    """The HTML card of a result, as `report.notebook.html` draws it."""
    card: str = import_module("requant.report.notebook").html(result)
    return card
