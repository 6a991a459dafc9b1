"""The meters of a stage on tqdm: a bar, plain lines, or JSON lines, with the rate and the time left."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from requant.cli import console
from requant.common.units import format_duration, format_size

SCHEMA = "requant.progress/1"
SILENCE = 10.0  # seconds after which a line comes even where nothing was done
BEGINS, GOES_ON, ENDS = range(3)  # when a stage is shown
_SAMPLE, _SMOOTHING = 1.0, 0.05  # of the rate: seconds of a sample at least, and the weight of the last one
_COLUMNS = 80  # where a terminal does not tell, or tells 0


class Bar(tqdm):  # type: ignore[misc]
    """A bar on stderr, erased at the end; `format_dict` also has the time left, and the figures with our units."""

    monitor_interval = 0  # no thread of tqdm's: ours redraws a stage that hangs, too

    def __init__(self, stage: str, total: int | None, unit: str, **options: Any) -> None:
        share = "{percentage:3.0f} %  [{bar}]  " if total else ""
        layout = {
            "bar_format": f"{{desc}}  {share}{{figures}}",
            "ascii": "-#",
            "position": 0,
            "ncols": _COLUMNS,
            "nrows": 20,
        }
        sampling = {"mininterval": _SAMPLE, "miniters": 1, "smoothing": _SMOOTHING}
        where = {"file": console.STDERR, "leave": False, "disable": False}
        super().__init__(desc=stage, total=total, unit=unit, **layout, **sampling, **where, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return the facts that tqdm draws, with `eta`, `figures`, and the mean rate before the first sample."""
        facts: dict[str, Any] = super().format_dict
        n, total, seconds = facts["n"], facts["total"], facts["elapsed"]
        facts["rate"] = rate = facts["rate"] or (n / seconds if n and seconds > 0 else None)
        facts["eta"] = None if total is None or not rate else max(0, total - n) / rate
        facts["figures"] = _figures(facts)
        return facts | {"n": min(n, total) if total else n, "ncols": _columns() - 1}

    def advance(self, n: int) -> None:
        """Count `n` more units; any thread may call it."""
        with self.get_lock():
            self.update(n)

    def show(self, _: int) -> None:
        """Draw the stage as it begins, goes on or ends."""
        self.refresh()


class Lines(Bar):
    """Lines that `write` puts on stderr at BEGINS, GOES_ON and ENDS.

    Between the first and the last at most one comes in `every` seconds, where more was done or after SILENCE.
    """

    def __init__(self, write: Callable[[Bar, int], None], every: float, *stage: Any) -> None:
        self.write_line, self.every, self.last = write, every, (0.0, 0)  # last: time and count of the last line
        super().__init__(*stage, gui=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if one is due."""
        silent = time.monotonic() - self.last[0]
        if silent >= self.every and (self.n != self.last[1] or silent >= SILENCE):
            self.show(GOES_ON)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines stay."""

    def show(self, when: int) -> None:
        """Write the line of the stage as it begins, goes on or ends."""
        with self.get_lock():
            self.last = time.monotonic(), self.n
            self.write_line(self, when)


@contextlib.contextmanager
def open_meter(how: str, every: float, *stage: Any) -> Iterator[Bar]:
    """Show a stage (name, total, unit) in the mode `how` of --progress, a line in `every` seconds."""
    tqdm.set_lock(threading.RLock())  # tqdm's own would be one between processes
    meter = Bar(*stage) if how == "bar" else Lines(_WRITERS[how], every, *stage)
    settings = console.settings
    before = settings.make_room
    if how == "bar":
        settings.make_room = functools.partial(Bar.external_write_mode, console.STDERR)
    try:
        meter.show(BEGINS)
        yield meter
    finally:
        meter.show(ENDS)
        meter.close()
        settings.make_room = before


def end_of(meter: Bar) -> str:
    """Return the line that tells what a stage took."""
    amount = f", {_amount(meter.n, meter.unit)}" if meter.n else ""
    return f"{meter.desc} took {meter.format_dict['elapsed']:.2f} s{amount}"


def as_json(meter: Bar) -> str:
    """Return the line of --progress json."""
    facts, job = meter.format_dict, os.environ.get(console.JOB)
    rate, eta = facts["rate"], facts["eta"]
    line = {
        "schema": SCHEMA,
        "stage": meter.desc,
        "done": meter.n,
        "total": meter.total,
        "unit": "bytes" if meter.unit == "B" else meter.unit,
        "seconds": round(facts["elapsed"], 3),
        "rate": None if rate is None else float(f"{rate:.4g}"),
        "eta": None if eta is None else round(eta, 1),
    }
    return json.dumps(line | ({"job": job} if job else {}))


def _write_json(meter: Bar, _: int) -> None:
    console.write(as_json(meter) + "\n")


def _write_plain(meter: Bar, when: int) -> None:
    job = os.environ.get(console.JOB)
    console.log(f"{job + ': ' if job else ''}{_describe(meter, when)}", console.QUIET)


def _write_rarely(meter: Bar, when: int) -> None:
    if when == GOES_ON:
        _write_plain(meter, when)


def _write_nothing(meter: Bar, when: int) -> None:
    pass


_WRITERS = {"json": _write_json, "plain": _write_plain, "auto": _write_rarely, "none": _write_nothing}


def _describe(meter: Bar, when: int) -> str:
    if when == ENDS:
        return end_of(meter)
    if when == BEGINS:
        return f"{meter.desc} {_amount(meter.total, meter.unit)}" if meter.total else str(meter.desc)
    share = f"{min(100, 100 * meter.n // meter.total)} %, " if meter.total else ""
    return f"{meter.desc} {share}{meter.format_dict['figures']}"


def _columns() -> int:
    """Return the width of the terminal that stderr is, which stdout need not be."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    return _COLUMNS


def _figures(facts: dict[str, Any]) -> str:
    """Return the amount done, the rate and the time left; where only time is known, that."""
    n, total, unit, rate, eta = (facts[key] for key in ("n", "total", "unit", "rate", "eta"))
    if total is None and not n:
        return format_duration(facts["elapsed"])
    of = "" if total is None else f" of {_amount(total, unit)}"
    parts = [f"{format_size(n)}{of}" if unit == "B" else f"{n}{of or f' {unit}'}"]
    if rate is not None:
        parts.append(f"{format_size(rate)}/s" if unit == "B" else f"{rate:.3g} {unit}/s")
    parts.append(format_duration(facts["elapsed"]) if eta is None else f"{format_duration(eta)} left")
    return ", ".join(parts)


def _amount(n: int, unit: str) -> str:
    return format_size(n) if unit == "B" else f"{n} {unit}"
