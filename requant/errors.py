"""Every failure a user can cause, one class per exit code.

A message says what is wrong, with the figure found and the limit, and what to do next; strings that come
from a file are escaped with `printable` before they enter one.
"""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """`text` with everything a terminal could act on (controls, bidi, surrogates) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class RequantError(Exception):
    """Base of all of them; `exit_code` is what the command line returns."""

    exit_code = 1

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

    `path` is the file, `what` the finding; `got`, `limit` and `hint` complete the line where they help.
    """

    exit_code = 3

    def __init__(
        self, path: object, what: str, *, got: object = None, limit: object = None, hint: str | None = None
    ) -> None:
        self.path, self.what, self.got, self.limit, self.hint = str(path), what, got, limit, hint
        figures = ", ".join(f"{k} {v}" for k, v in (("got", got), ("limit", limit)) if v is not None)
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
