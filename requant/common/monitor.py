"""Monitor of a command: takes progress, warnings and lines for the user; silent, a callback, or the terminal."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from requant.errors import RequantWarning

Advance = Callable[[int], None]  # called with the units done since the last call


class ShowProgress(Protocol):
    """A function whose context manager shows the progress of a piece of work while it is entered."""

    def __call__(self, what: str, total: int | None, unit: str = "B") -> AbstractContextManager[Advance]:
        """Show the work called `what`; total: units in all, if known; unit: `B` for bytes, else with a space."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of work: `done` of `total` units (None: not known), "B" for bytes, else " layers" and such."""

    what: str
    done: int
    total: int | None
    unit: str


def _warn(*texts: str) -> None:
    for text in texts:
        if sys.version_info >= (3, 12):
            warnings.warn(text, RequantWarning, skip_file_prefixes=(str(Path(__file__).parent),))
        else:
            warnings.warn(text, RequantWarning, stacklevel=3)


def _log(text: str) -> None:
    import logging  # here: most commands do without

    logging.getLogger("requant").info("%s", text)


@contextmanager
def _show_nothing(what: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    yield lambda _: None


@dataclass(frozen=True, slots=True)
class Monitor:
    """Outlets of a command for its progress, warnings and lines; by default Python's warnings and its log `requant`.

    progress: entered, and advanced, in the thread that called the command. info: takes a line for the user. resumable:
    entered while another run can resume the work.
    """

    progress: ShowProgress = _show_nothing
    warn: Callable[..., None] = _warn
    info: Callable[[str], None] = _log
    resumable: Callable[[], AbstractContextManager[None]] = nullcontext

    def working(self, what: str) -> AbstractContextManager[Advance]:
        """Show work that may take long and reports no progress."""
        return self.progress(what, None, "")


SILENT = Monitor()


def report_to(callback: Callable[[Progress], object] | None) -> Monitor:
    """Return a monitor that calls `callback` with the progress: when work begins, and after each step."""
    if callback is None:
        return SILENT

    @contextmanager
    def progress(what: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        lock, done = threading.Lock(), 0

        def advance(n: int) -> None:
            nonlocal done
            with lock:
                done += n
                callback(Progress(what, done, total, unit))

        advance(0)
        yield advance

    return Monitor(progress=progress)
