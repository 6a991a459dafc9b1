"""The lines of stderr, each `requant: ...`, at three levels, and the settings that all of them follow.

quiet: errors only. normal: errors, warnings, what takes long, what was decided on the way. verbose: also the files that
are read, the threads, and what each stage took. Results are on stdout at every level.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from requant.errors import UsageError, printable

QUIET, NORMAL, VERBOSE = -1, 0, 1
JOB = "REQUANT_WORKER_JOB"  # in the environment of a batch's worker: the output or model that it is at
PROGRESS = ("auto", "bar", "plain", "json", "none")


@dataclass(slots=True)
class Settings:
    """The options -q, -v, --progress and --debug as given; the one state that stderr depends on.

    make_room: entered while a line is written, so that a bar on that line is away for as long. write_error: takes the
    message of an error in place of stderr.
    """

    level: int = NORMAL
    progress: str = "auto"
    debug: bool = False
    make_room: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    write_error: Callable[[str], object] | None = None

    def words(self) -> list[str]:
        """Return the options that give another process the same settings."""
        level = {QUIET: ["--quiet"], NORMAL: [], VERBOSE: ["--verbose"]}[self.level]
        return [*level, f"--progress={self.progress}"]


settings = Settings()


def reset() -> None:
    """Forget the options that were given."""
    settings.level, settings.progress, settings.debug = NORMAL, "auto", False


def set_progress(how: str) -> None:
    """Take --progress. Raises UsageError where it was given before the command and differs."""
    if settings.progress not in (PROGRESS[0], how):
        raise UsageError(f"--progress is given twice, as {settings.progress} and as {how}; give it once")
    settings.progress = how


def set_level(level: int) -> None:
    """Take -q or -v. Raises UsageError where the other was given."""
    if settings.level == -level:
        raise UsageError("--quiet and --verbose cannot be given together")
    settings.level = level


def log(text: str, level: int = NORMAL) -> None:
    """Write a line on stderr, unless the settings ask for less."""
    if settings.level >= level:
        with settings.make_room():
            write(f"requant: {printable(text)}\n")


def log_error(message: str) -> None:
    """Write the message of an error on stderr, or where the settings send it."""
    if settings.write_error is None:
        log(f"error: {message}", QUIET)
    else:
        settings.write_error(printable(message))


def write(text: str) -> None:
    """Write `text` as it is on stderr, which may be full, closed or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


class _Stderr:
    """stderr as a file: the one of the moment, and no error of writing."""

    write = staticmethod(write)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""


STDERR = _Stderr()
