"""Sidecar: a file of requant's own beside an output, with a name made from the output's.

A file that merely has that name is not ours. A sidecar is opened, taken over and removed only here, and only where it
is a regular file with one name, none of the inputs, and looks like what an earlier run on the same output wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from requant.common.files import create_file, irregular_kind
from requant.common.inputs import identity, is_input
from requant.errors import InputOutputError, OutputRefused

_HINT = "it stands where requant's own file goes; move it away"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The sidecar at `path`; `what` is a noun for it, `is_ours` looks at an open file, `names` it may have (links).

    Every method raises OutputRefused where a file is there that is not ours, and InputOutputError.
    """

    path: Path
    what: str
    is_ours: Callable[[int], bool] = lambda _: True
    names: int = 1

    def open(self) -> int | None:
        """Open it for reading and writing; None where there is none."""
        try:
            self._check(self.path.lstat())
            # without O_NONBLOCK a FIFO that has just appeared would block
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputOutputError(self.path, f"cannot be opened: {error.strerror}") from error
        try:
            self._check(os.fstat(descriptor))
            if not self.is_ours(descriptor):
                raise self._refuse(f"is not {self.what}")
        except OSError as error:
            os.close(descriptor)
            raise InputOutputError(self.path, f"cannot be read: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open_or_make(self) -> int:
        """Open it for reading and writing, made if missing."""
        descriptor = self.open()
        return create_file(self.path) if descriptor is None else descriptor

    def check(self) -> None:
        """Raise where a file is there that is not ours."""
        descriptor = self.open()
        if descriptor is not None:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove it, if it is there."""
        descriptor = self.open()
        if descriptor is None:
            return
        try:
            if identity(self.path.lstat()) == identity(os.fstat(descriptor)):
                self.path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputOutputError(self.path, f"cannot be removed: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _check(self, status: os.stat_result) -> None:
        kind = irregular_kind(status)
        if kind is not None:
            raise self._refuse(f"is {kind}, not {self.what}")
        if is_input(status):
            raise self._refuse(f"is one of the inputs, not {self.what}")
        if status.st_nlink > self.names:
            raise self._refuse(f"has another name (a hard link), and is not {self.what}")

    def _refuse(self, what: str) -> OutputRefused:
        return OutputRefused(self.path, what, hint=_HINT)
