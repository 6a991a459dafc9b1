"""Progress of long work on stderr: a bar, plain lines or JSON lines, with the rate and the time that is left.

A JSON line is one object: schema, stage, done, total (null where it is not known), unit, seconds (since the stage
began), rate (units a second, smoothed) and eta (seconds), both null while nothing is known; in a batch also job, the
output or model that it is about. The first line of a stage has done 0, the last the number that was reached.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from requant.cli import console
from requant.cli.console import QUIET, VERBOSE, settings

EVERY = {"plain": 10.0, "auto": 10.0, "json": 0.5}  # seconds between two lines
_TICK = 0.2  # seconds between two looks at a stage


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Show the stage `what` of `total` units, if that is known; yields the function that counts units done."""
    how = mode()
    if how == "none" and settings.level < VERBOSE:
        yield lambda _: None
        return
    from requant.cli import meters  # tqdm, which takes its time

    with meters.open_meter(how, EVERY.get(how, 0.0), what, total, unit.strip()) as meter, _ticking(meter.refresh):
        yield meter.advance
    if how != "plain":
        console.log(meters.end_of(meter), VERBOSE)


def mode() -> str:
    """Return the mode of --progress in force; auto stands for lines that come rarely."""
    how = settings.progress
    if how != "auto":
        return how
    if settings.level <= QUIET:
        return "none"
    drawn = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return "bar" if drawn else "auto"


@contextlib.contextmanager
def _ticking(show: Callable[[], object]) -> Iterator[None]:
    """Call `show` at every tick, in a thread of its own, so that a stage that hangs is seen."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(_TICK):
            show()

    thread = threading.Thread(target=run, daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started: the work goes on unseen
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join(1)
