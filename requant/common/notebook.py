"""Notebook cards: access to `report.notebook`, which draws a result for its `_repr_html_`."""

from __future__ import annotations

from importlib import import_module


def html(result: object) -> str:
    """Draw the HTML card of a result by `report.notebook.html`."""
    card: str = import_module("requant.report.notebook").html(result)
    return card
