"""What goes to stderr, and how much of it: lines, each `requant: ...`, at three levels.

quiet: errors only. normal: errors, warnings, what takes long, what was decided on the way. verbose: also the files that
are read, the threads, and what each stage took. Results are on stdout at every level.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from requant.errors import UsageError, printable

QUIET, NORMAL, VERBOSE = -1, 0, 1
PROGRESS = ("auto", "bar", "plain", "json", "none")
ERASE = "\r\x1b[K"  # the line of a bar


@dataclass(slots=True)
class Settings:
    """What the options -q, -v, --progress and --debug said; the one state that all that is said depends on."""

    level: int = NORMAL
    progress: str = "auto"
    debug: bool = False
    bars: int = 0  # bars that are being drawn

    def words(self) -> list[str]:
        """The options that give another process the same settings."""
        level = {QUIET: ["--quiet"], NORMAL: [], VERBOSE: ["--verbose"]}[self.level]
        return [*level, f"--progress={self.progress}"]


settings = Settings()


def reset() -> None:
    """As if no option had been given."""
    settings.level, settings.progress, settings.debug = NORMAL, "auto", False


def set_level(level: int) -> None:
    """Take -q or -v. Raises UsageError where the other was given."""
    if settings.level == -level:
        raise UsageError("--quiet and --verbose cannot be given together")
    settings.level = level


def log(text: str, level: int = NORMAL) -> None:
    """A line on stderr, unless less is to be said; a bar that stands there makes room."""
    if settings.level < level:
        return
    write(f"{ERASE if settings.bars else ''}requant: {printable(text)}\n")


def write(text: str) -> None:
    """`text` as it is, on stderr, which may be full, closed or None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """While a bar stands on stderr; it is gone afterwards."""
    settings.bars += 1
    try:
        yield
    finally:
        settings.bars -= 1
        write(ERASE)
