"""Progress of long work on stderr: a bar, plain lines or JSON lines, with the rate and the time that is left.

A JSON line is one object: schema, stage, done, total (null where it is not known), unit, seconds (since the stage
began), rate (units a second over the last minute) and eta (seconds), both null while nothing is known; in a batch also
job, the output or model that it is about. The first line of a stage says 0, the last what was reached.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from requant.cli import console as speech
from requant.cli.console import QUIET, VERBOSE, settings
from requant.common.units import format_duration, format_size

SCHEMA = "requant.progress/1"
JOB = "REQUANT_WORKER_JOB"  # in the environment: what a worker of a batch is at
EVERY = {"bar": 0.2, "plain": 10.0, "auto": 10.0, "json": 0.5}  # seconds between two looks
SILENCE = 10.0  # seconds after which a JSON line comes even where nothing was done
BEGINS, GOES_ON, ENDS = range(3)  # when a stage is shown
_WINDOW = 60.0  # seconds that the rate is taken over
_BAR, _LEAST_BAR = 24, 6  # characters at most, and where a bar says something


@dataclass(slots=True)
class Meter:
    """How far a stage is; `advance` may be called from any thread."""

    stage: str
    total: int | None
    unit: str
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    _marks: deque[tuple[float, int]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, n: int) -> None:
        """`n` more units are done."""
        with self._lock:
            now = time.monotonic()
            self._marks.append((now, self.done))
            self.done += n
            while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
                self._marks.popleft()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.begun

    @property
    def rate(self) -> float | None:
        """Units a second, over the last minute; None before the first."""
        with self._lock:
            if not self._marks or not self.done:
                return None
            since, before = self._marks[0]
            whole = len(self._marks) < 2 or before == 0
            seconds = time.monotonic() - (self.begun if whole else since)
            return (self.done - (0 if whole else before)) / max(seconds, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds that are left, at that rate."""
        rate = self.rate
        return None if self.total is None or not rate else max(0, self.total - self.done) / rate


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """While the stage `what` is at work, of `total` units if that is known; yields what takes units done."""
    meter = Meter(what, total, unit.strip())
    how = mode()
    show = {"bar": _bar, "plain": _plain, "auto": _rarely, "json": _Lines().show}.get(how)
    with contextlib.ExitStack() as stack:
        if show is not None:
            if how == "bar":
                stack.enter_context(speech.drawing())
            show(meter, BEGINS)
            stack.callback(show, meter, ENDS)
            stack.enter_context(_ticking(lambda: show(meter, GOES_ON), EVERY[how]))
        yield meter.advance
    if how != "plain":
        speech.log(_ended(meter), VERBOSE)


def mode() -> str:
    """What --progress means here; auto is then lines that come rarely."""
    how = settings.progress
    if how != "auto":
        return how
    if settings.level <= QUIET:
        return "none"
    drawn = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return "bar" if drawn else "auto"


@contextlib.contextmanager
def _ticking(show: Callable[[], None], seconds: float) -> Iterator[None]:
    """`show` every so many seconds, in a thread of its own: a stage that hangs is seen to."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            show()

    thread = threading.Thread(target=run, daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread to be had: the work goes on unseen
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join(1)


def _bar(meter: Meter, _: int) -> None:
    width, figures = _columns() - 1, _figures(meter)
    parts = [meter.stage, figures]
    if meter.total:
        share = min(1.0, meter.done / meter.total)
        parts = [meter.stage, f"{100 * share:3.0f} %", figures]
        room = min(_BAR, width - len("  ".join(parts)) - len("[]  "))
        full = round(room * share)
        if room >= _LEAST_BAR:
            parts.insert(2, f"[{'#' * full}{'-' * (room - full)}]")
    speech.write(speech.ERASE + "  ".join(parts)[:width])


def _columns() -> int:
    """Of the terminal that stderr is, which stdout need not be."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _plain(meter: Meter, when: int) -> None:
    job = os.environ.get(JOB)
    speech.log(f"{job + ': ' if job else ''}{_told(meter, when)}", QUIET)


def _rarely(meter: Meter, when: int) -> None:
    if when == GOES_ON:
        _plain(meter, when)


def _told(meter: Meter, when: int) -> str:
    if when == ENDS:
        return _ended(meter)
    if when == BEGINS:
        return f"{meter.stage} {_amount(meter.total, meter.unit)}" if meter.total else meter.stage
    share = f"{min(100, 100 * meter.done // meter.total)} %, " if meter.total else ""
    return f"{meter.stage} {share}{_figures(meter)}"


class _Lines:
    """JSON lines, one only where there is something new, or nothing was said for long."""

    def __init__(self) -> None:
        self.said: tuple[float, int] | None = None

    def show(self, meter: Meter, when: int) -> None:
        now = time.monotonic()
        new = self.said is None or self.said[1] != meter.done or now - self.said[0] > SILENCE
        if new or when != GOES_ON:
            self.said = now, meter.done
            speech.write(as_json(meter) + "\n")


def as_json(meter: Meter) -> str:
    """The line that --progress json writes."""
    import json  # only where it is wanted, as it takes its time

    rate, eta, job = meter.rate, meter.eta, os.environ.get(JOB)
    line = {
        "schema": SCHEMA,
        "stage": meter.stage,
        "done": meter.done,
        "total": meter.total,
        "unit": "bytes" if meter.unit == "B" else meter.unit,
        "seconds": round(meter.seconds, 3),
        "rate": None if rate is None else float(f"{rate:.4g}"),
        "eta": None if eta is None else round(eta, 1),
    }
    return json.dumps(line | ({"job": job} if job else {}))


def _figures(meter: Meter) -> str:
    """Done, rate and time left; where only time is known, that."""
    if meter.total is None and not meter.done:
        return format_duration(meter.seconds)
    rate, eta = meter.rate, meter.eta
    parts = [_count(meter)]
    if rate is not None:
        parts.append(f"{format_size(rate)}/s" if meter.unit == "B" else f"{rate:.3g} {meter.unit}/s")
    parts.append(format_duration(meter.seconds) if eta is None else f"{format_duration(eta)} left")
    return ", ".join(parts)


def _count(meter: Meter) -> str:
    of = "" if meter.total is None else f" of {_amount(meter.total, meter.unit)}"
    if meter.unit == "B":
        return f"{format_size(meter.done)}{of}"
    return f"{meter.done}{of if of else f' {meter.unit}'}"


def _amount(n: int, unit: str) -> str:
    return format_size(n) if unit == "B" else f"{n} {unit}"


def _ended(meter: Meter) -> str:
    amount = f", {_amount(meter.done, meter.unit)}" if meter.done else ""
    return f"{meter.stage} took {meter.seconds:.2f} s{amount}"
