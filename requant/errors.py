"""Errors, one class per exit code, and the escaping of strings from files.

A message names the fault, the figure found and the limit, and what to do next; strings that come from a file are
escaped with `printable`, or `brief` in tables and messages, before they enter one.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

# characters shown in a table or a message: of a name, of a file's name, of a note in a plan or in losses
SHOWN, FILE_NAME, REMARK = 80, 255, 1000
# characters that Python calls printable but that are invisible: the fillers of Hangul, the blank of Braille, and
# those that Unicode lists as Default_Ignorable_Code_Point
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
_MARKS = ("Mn", "Me")  # categories of marks that are drawn over the character before them
_LEFTWARD = ("R", "AL", "AN")  # bidirectional classes that move their neighbours
_MOST_MARKS = 2  # on one character


def printable(text: str) -> str:
    """Escape with backslashes all that a terminal could act on (controls, bidi, surrogates) or not show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and c not in _INVISIBLE else _escape(c) for c in text)


def brief(text: str, most: int = SHOWN) -> str:
    """Shorten `text` from a file to `most` characters, and escape it for a table or a message.

    Besides the escapes of `printable`: spaces in a row or at an end, which look like the gap between two columns,
    right-to-left characters, and marks without a base or piled up.
    """
    cut = text if len(text) <= most else text[:most] + "..."
    if not cut.isascii():
        cut = _escape_movers(cut)
    return _SPACES.sub(lambda _: "\\x20", printable(cut))


def _escape_movers(text: str) -> str:
    shown, marks = [], _MOST_MARKS
    for c in text:
        marks = marks + 1 if unicodedata.category(c) in _MARKS else 0 if c != " " else _MOST_MARKS
        safe = marks <= _MOST_MARKS and unicodedata.bidirectional(c) not in _LEFTWARD
        shown.append(c if safe else _escape(c))
    return "".join(shown)


def _escape(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


class RequantError(Exception):
    """Base of all errors; `exit_code` is that of the command line."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line, with everything that is not printable escaped."""
        return printable(super().__str__())

    def __reduce__(self) -> Any:
        """Pickle the message and the data: an error may come from another machine."""
        return _rebuild_error, (type(self), self.args, self.__dict__)


def _rebuild_error(kind: type[RequantError], args: tuple[Any, ...], data: dict[str, Any]) -> RequantError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(data)
    return error


class UsageError(RequantError):
    """The request makes no sense, whatever the files hold."""

    exit_code = 2


class BadInput(RequantError):
    """A file is not valid or does not fit.

    `path` is the file, `what` the fault; `got`, `limit` or `expected`, and `hint` complete the line where they help.
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

    def with_hint(self, hint: str | None) -> BadInput:
        """Return the same error with another hint."""
        figures = {"got": self.got, "limit": self.limit, "expected": self.expected}
        return type(self)(self.path, self.what, **figures, hint=hint)


class InfeasibleBudget(RequantError):
    """Even the smallest candidate of every tensor does not fit, or, if not `proven`, no plan was found in time."""

    exit_code = 4

    def __init__(self, budget: int, smallest: int, message: str, *, proven: bool = True) -> None:
        self.budget, self.smallest, self.proven = budget, smallest, proven  # in the unit of the limit
        super().__init__(message)


class OutputRefused(BadInput):
    """The output path is taken or is one of the inputs, or a file that is not ours has the name of one of our own."""

    exit_code = 5


class InputOutputError(BadInput):
    """The operating system failed to read or write; `what` ends in its own message."""

    exit_code = 6


class SourceChanged(BadInput):
    """A source file was modified while it was being read."""

    exit_code = 7


class NumericFault(BadInput):
    """Numbers failed a check: non-finite weights, or a reconstruction error beyond the type's ceiling."""

    exit_code = 8


class RequantWarning(UserWarning):
    """Something unusual that does not stop the run; the command line prints it on stderr."""


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_HUB = re.compile(  # an address or a name of Hugging Face: repository, and perhaps a file
    r"(?:hf:/*|(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/+)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?::[\w.-]+|(?:/(?:resolve|blob|raw|tree)/[^/]+)?/?(?P<file>[^?]*))(?:\?.*)?"
)
_REPOSITORY = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)(?<!\.json)(?<!\.txt)(?<!\.toml)(?::[\w.-]+)?"
)
_LOOKED_AT = 1000  # files of a folder among which to look for a similar name
_SEPARATORS = re.compile(r"[-._ ]")
_WORD = 300  # characters of a word to compare with others
_SUGGESTED = 50  # words to list; ggml has fewer types


def find_similar(word: str, known: Iterable[str], n: int = 3, least: float = 0.6) -> list[str]:
    """Find up to `n` of the `known` words that are similar to `word` in any case, the best first; none is escaped.

    A word that differs in nothing but dots, dashes and underscores is the only one. `least`: of difflib's ratio.
    """
    by_case = {name.casefold(): name for name in known}
    word = word[:_WORD].casefold()
    same = [name for key, name in by_case.items() if _SEPARATORS.sub("", key) == _SEPARATORS.sub("", word)]
    return same or [by_case[key] for key in get_close_matches(word, by_case, n=n, cutoff=least)]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean A or B?`, or a list of known words where none is similar."""
    known = [brief(name) for name in known]
    near = find_similar(word, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(known[:_SUGGESTED])}" + ", ..." * (len(known) > _SUGGESTED)


def is_address(text: str) -> bool:
    """Return whether `text` begins like an address: `https://`, `hf://`."""
    return _URL.match(text) is not None


def missing_file(path: Path) -> BadInput:
    """The error for a file at `path` that does not exist; its hint suggests another one, or how to fetch it."""
    if path.is_symlink():
        return BadInput(path, "links to a file that is not there")
    text = _URL.sub(r"\1://", str(path), count=1)  # a Path has one slash
    if (hub := _HUB.fullmatch(text)) is not None:
        words = ("hf", "download", hub["repo"], *([hub["file"]] if hub["file"] else []))
        hint = f"fetch it first: {shlex.join(words)}"
        return BadInput(text, "is on Hugging Face, and requant reads files", hint=hint)
    if text.startswith("file:"):
        return BadInput(text, "is an address", hint=f"give the path: {text.removeprefix('file:/')}")
    if is_address(text):
        return BadInput(text, "is an address, and requant reads files", hint="fetch it first, with curl -LO for one")
    if _REPOSITORY.fullmatch(text) and not path.parent.exists():
        hint = f"for a model on Hugging Face, fetch it first: hf download {text.partition(':')[0]}"
        return BadInput(path, "no such file, and there is no such folder", hint=hint)
    return BadInput(path, "no such file", hint=_suggest_beside(path))


def _suggest_beside(path: Path) -> str | None:
    """Suggest a file in the folder of `path`, one with the same suffix if there is any."""
    try:
        with os.scandir(path.parent) as entries:
            names = sorted(entry.name for entry in islice(entries, _LOOKED_AT) if entry.is_file())
    except (OSError, ValueError):
        return "there is no such folder"
    alike = [name for name in names if Path(name).suffix.lower() == path.suffix.lower()]
    near = find_similar(path.name, alike, 1) or find_similar(path.name, names, 1)
    if near:
        return f"did you mean {brief(str(path.with_name(near[0])), FILE_NAME)}?"
    ggufs = [brief(name, FILE_NAME) for name in alike if name.lower().endswith(".gguf")]
    return f"there is {', '.join(ggufs[:3])}" if ggufs else None


def put_path_first(path: object, message: str) -> str:
    """Return `message` of an error with the file that it is about before it, where it does not begin with that file."""
    where = f"{printable(str(path))}: "
    return message if message.startswith(where) else where + message


def quote(text: str) -> str:
    """Quote the beginning of `text` from a file, escaped, for a message."""
    return f"'{brief(text)}'"


MISSING = FileNotFoundError, NotADirectoryError  # errors of a path that leads to no file
