"""Kinds of reports, told by a file's extension."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from requant.errors import UsageError, printable

PAGE, CARD, PICTURES = ".html", ".md", (".png", ".svg")
KINDS = (PAGE, CARD, *PICTURES)


def check_kind(path: Path) -> None:
    """Raise UsageError unless the name ends in that of a kind of report."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"'{printable(str(path))}' says no kind of report; end it in {', '.join(KINDS)}")


def check_library(kinds: Iterable[str]) -> None:
    """Raise UsageError, naming the extra, if one of the kinds is a picture and matplotlib is not installed."""
    if not set(PICTURES).isdisjoint(kinds) and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib, which is not installed; pip install 'requant[report]'")
