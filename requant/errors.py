"""Every failure a user can cause, one class per exit code; and how strings from files may be shown.

A message says what is wrong, with the figure found and the limit, and what to do next; strings that come
from a file are escaped with `printable`, or `brief` in tables and messages, before they enter one.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

# characters of it in a table or a message: of a name, of the name of a file, of a remark in a plan or in losses
SHOWN, FILE_NAME, REMARK = 80, 255, 1000
# letters, marks and symbols that Python calls printable, but of which nothing is seen: the fillers of Hangul, the
# blank of Braille, and what Unicode lists as Default_Ignorable_Code_Point
_INVISIBLE = frozenset(
    map(
        chr,
        [
            *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0, 0x1D159),
            *(*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
        ],
    )
)
_SPACES = re.compile("^ | (?= )| $")
_MARKS = ("Mn", "Me")  # categories of what is drawn over the character before it
_LEFTWARD = ("R", "AL", "AN")  # bidirectional classes that move what stands beside them
_MOST_MARKS = 2  # on one character


def printable(text: str) -> str:
    """`text` with all that a terminal could act on (controls, bidi, surrogates) or not show as backslash escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and c not in _INVISIBLE else _escaped(c) for c in text)


def brief(text: str, most: int = SHOWN) -> str:
    """`text` from a file as it may stand in a table or a message: printable, `most` characters of it, in its place.

    What would look like the gap between two columns, move its neighbours or draw over them is escaped: spaces in a
    row or at an end, right-to-left characters, marks without a base or piled up.
    """
    cut = text if len(text) <= most else text[:most] + "..."
    if not cut.isascii():
        cut = _in_place(cut)
    return _SPACES.sub(lambda _: "\\x20", printable(cut))


def _in_place(text: str) -> str:
    shown, marks = [], _MOST_MARKS
    for c in text:
        marks = marks + 1 if unicodedata.category(c) in _MARKS else 0 if c != " " else _MOST_MARKS
        safe = marks <= _MOST_MARKS and unicodedata.bidirectional(c) not in _LEFTWARD
        shown.append(c if safe else _escaped(c))
    return "".join(shown)


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


class RequantError(Exception):
    """Base of all of them; `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, on one line and printable whatever it was made of."""
        return printable(super().__str__())

    def __reduce__(self) -> Any:
        """By message and data, as it was made: an error may come from another machine."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[RequantError], args: tuple[Any, ...], data: dict[str, Any]) -> RequantError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(data)
    return error


class UsageError(RequantError):
    """The request makes no sense, whatever the files hold."""

    exit_code = 2


class BadInput(RequantError):
    """A file is not what it should be.

    `path` is the file, `what` the finding; `got`, `limit` or `expected`, and `hint` complete the line where they help.
    """

    exit_code = 3

    def __init__(
        self,
        path: object,
        what: str,
        *,
        got: object = None,
        limit: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.path, self.what, self.hint = str(path), what, hint
        self.got, self.limit, self.expected = got, limit, expected
        shown = ("got", got), ("limit", limit), ("expected", expected)
        figures = ", ".join(f"{k} {brief(str(v), REMARK)}" for k, v in shown if v is not None)
        message = f"{printable(self.path)}: {what}" + (f" ({figures})" if figures else "")
        super().__init__(message + (f"; {hint}" if hint else ""))


class InfeasibleBudget(RequantError):
    """Even the smallest candidate of every tensor does not fit; `proven`: or none was found in time."""

    exit_code = 4

    def __init__(self, budget: int, smallest: int, message: str, *, proven: bool = True) -> None:
        self.budget, self.smallest, self.proven = budget, smallest, proven  # in the unit of the limit
        super().__init__(message)


class OutputRefused(BadInput):
    """The output path is taken, or is one of the inputs."""

    exit_code = 5


class InputOutputError(BadInput):
    """The operating system failed to read or write; `what` ends in its own words."""

    exit_code = 6


class SourceChanged(BadInput):
    """A source file was modified while it was being read."""

    exit_code = 7


class NumericFault(BadInput):
    """Numbers failed a check: non-finite weights, or a reconstruction error beyond the type's ceiling."""

    exit_code = 8


class RequantWarning(UserWarning):
    """Something that is odd and was gone on with; the command line says it on stderr."""


_LOOKED_AT = 1000  # files of a folder among which one is sought that may have been meant


_WORD = 300  # characters of a word that others are compared with


_SUGGESTED = 50  # more words than ggml has types


def nearest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the `known` words that are like `word`, the likest first, in whatever case; nothing is escaped."""
    by_case = {name.casefold(): name for name in known}
    return [by_case[key] for key in get_close_matches(word[:_WORD].casefold(), by_case, n=n, cutoff=0.6)]


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean A or B?`, or the known words, the first of many, when nothing is near."""
    known = [brief(name) for name in known]
    near = nearest(word, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(known[:_SUGGESTED])}" + ", ..." * (len(known) > _SUGGESTED)


def missing(path: Path) -> BadInput:
    """That the file at `path`, which was named, is not there, with the one that may have been meant."""
    if path.is_symlink():
        return BadInput(path, "links to a file that is not there")
    return BadInput(path, "no such file", hint=_beside(path))


def _beside(path: Path) -> str | None:
    """Which file in the folder of `path` may have been meant, of those that end alike where there are some."""
    try:
        with os.scandir(path.parent) as entries:
            names = sorted(entry.name for entry in islice(entries, _LOOKED_AT) if entry.is_file())
    except (OSError, ValueError):
        return "there is no such folder"
    alike = [name for name in names if Path(name).suffix.lower() == path.suffix.lower()]
    near = nearest(path.name, alike, 1) or nearest(path.name, names, 1)
    if near:
        return f"did you mean {brief(str(path.with_name(near[0])), FILE_NAME)}?"
    ggufs = [brief(name, FILE_NAME) for name in alike if name.lower().endswith(".gguf")]
    return f"there is {', '.join(ggufs[:3])}" if ggufs else None


def quoted(text: str) -> str:
    """`text` from a file as it may stand in a message: escaped, in quotes, the beginning of it."""
    return f"'{brief(text)}'"
