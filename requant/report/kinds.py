"""Kinds of reports, told by the ending of a file's name."""

from __future__ import annotations

from pathlib import Path

from requant.errors import UsageError, printable

PAGE, CARD, PICTURES = ".html", ".md", (".png", ".svg")
KINDS = (PAGE, CARD, *PICTURES)


def check_kind(path: Path) -> None:
    """Raise UsageError unless the name ends in that of a kind of report."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"'{printable(str(path))}' says no kind of report; end it in {', '.join(KINDS)}")
