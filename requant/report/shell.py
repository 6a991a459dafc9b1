"""Command lines to copy: quoted for a shell, without characters that a terminal acts on."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from requant.errors import printable


def join_words(words: Iterable[str]) -> str:
    """Return one line of `words` for sh, bash or zsh."""
    return " ".join(map(_quote_word, words))


def file_argument(name: str | Path) -> str:
    """Return the file's name, with `./` before a hyphen so that no program takes it for an option."""
    return f"./{name}" if str(name).startswith("-") else str(name)


def _quote_word(word: str) -> str:
    """Return `word` in quotes; if it is not printable, dollar-single-quotes (POSIX.1-2024) with bytes in octal."""
    return shlex.quote(word) if printable(word) == word else f"$'{''.join(map(_quote_character, word))}'"


def _quote_character(c: str) -> str:
    if c in "\\'":
        return f"\\{c}"
    if printable(c) == c:
        return c
    return "".join(f"\\{byte:03o}" for byte in encode_character(c))


def encode_character(c: str) -> bytes:
    """Return the UTF-8 of a character of a path, whose surrogates stand for bytes that are no UTF-8."""
    return c.encode("utf-8", "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass")
