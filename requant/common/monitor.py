"""Who is told how far work is: nobody, a function of the caller's, or the command line's terminal."""

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

Advance = Callable[[int], None]  # takes units done since the last call


class Progressing(Protocol):
    """What shows how far a piece of work is: entered when it begins, left when it ends."""

    def __call__(self, what: str, total: int | None, unit: str = "B") -> AbstractContextManager[Advance]:
        """what: the work in a word; total: units in all, if known; unit: `B` for bytes, else with its space."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work is: `done` of `total` units (None: not known), "B" for bytes, else " layers" and such."""

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
    import logging  # which most commands do without

    logging.getLogger("requant").info("%s", text)


@contextmanager
def _silent(what: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    yield lambda _: None


@dataclass(frozen=True, slots=True)
class Monitor:
    """Where the stages say what they are at; by default warnings are Python's, what is told is logged as `requant`.

    progress: entered in the thread that called the stage, where its steps are counted too. resumable: entered while
    what is done can be gone on with by another run.
    """

    progress: Progressing = _silent
    warn: Callable[..., None] = _warn
    tell: Callable[[str], None] = _log
    resumable: Callable[[], AbstractContextManager[None]] = nullcontext

    def working(self, what: str) -> AbstractContextManager[Advance]:
        """While something is at work that may take long and does not say how far it is."""
        return self.progress(what, None, "")


SILENT = Monitor()


def call_back(callback: Callable[[Progress], object] | None) -> Monitor:
    """A monitor whose progress is given to `callback`: once when work begins, then as it goes on."""
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
