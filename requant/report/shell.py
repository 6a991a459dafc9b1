"""Words as a shell takes them, with nothing that a terminal acts on: a line that can be copied as it is seen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from requant.errors import printable


def join_words(words: Iterable[str]) -> str:
    """One line of `words` for sh, bash or zsh."""
    return " ".join(shlex.quote(word) if printable(word) == word else _quote_bytes(word) for word in words)


def file_argument(name: str | Path) -> str:
    """The file's name as no program takes it for an option."""
    return f"./{name}" if str(name).startswith("-") else str(name)


def _quote_bytes(word: str) -> str:
    """`word` in dollar-single-quotes (POSIX.1-2024), what cannot be shown as the octal bytes of its UTF-8."""
    return "$'" + "".join(_quote_character(c) for c in word) + "'"


def _quote_character(c: str) -> str:
    if c in "\\'":
        return f"\\{c}"
    if printable(c) == c:
        return c
    lone = "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass"  # a byte of a path that is no UTF-8
    return "".join(f"\\{byte:03o}" for byte in c.encode("utf-8", lone))
