"""Faults on order: the n-th call of a function of the system fails, or something happens just before it.

In this process `injected` does it for a while; in one of its own `preamble` is Python for commands.start(before=...).
"""

import contextlib
import errno
import fcntl
import io
import os
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_MODULES = {"flock": fcntl, "open": io}  # open: what Path.open calls; all others are of os
_BY_DESCRIPTOR = {
    *("pread", "preadv", "pwrite", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "flock", "fstat"),
}
_NAMES = {"os": os, "resource": resource, "signal": signal, "time": time, "Path": Path}

# pieces of a few rows, each flushed as it comes, so that the smallest model has many records
SMALL = {"requant.container.output.COMMIT_BYTES": 1, "requant.conversion.chunks.CHUNK_WEIGHTS": 1024}
SMALL |= {"requant.conversion.chunks.PIECE_BYTES": 2000}


@dataclass(frozen=True)
class Fault:
    """What happens at the `nth` call of `call` for a file whose path has `on` (a regular expression) in it.

    error: the name of the errno that the call fails with; `always` from then on, else once. do: Python that is run
    before the call, where `path` is the file's.
    """

    call: str
    error: str | None = None
    nth: int = 1
    on: str = ""
    do: str | None = None
    always: bool = False


class Count:
    """How often a faulty function was called for a path that matches, and whether the fault was met."""

    def __init__(self):
        self.calls, self.lock = 0, threading.Lock()

    def next(self):
        with self.lock:
            self.calls += 1
            return self.calls


def _path(fault, arguments):
    if fault.call in _BY_DESCRIPTOR:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{arguments[0]}")  # noqa: PTH115
        return ""
    if fault.call in ("link", "replace", "rename"):
        return os.fsdecode(arguments[1])
    return str(arguments[0]) if isinstance(arguments[0], int) else os.fsdecode(arguments[0])


def _faulty(fault, real, count):
    def call(*arguments, **options):
        path = _path(fault, arguments)
        if re.search(fault.on, path):
            n = count.next()
            if n == fault.nth and fault.do is not None:
                exec(fault.do, _NAMES | {"path": path})
            if fault.error is not None and (n == fault.nth or (fault.always and n > fault.nth)):
                number = getattr(errno, fault.error)
                raise OSError(number, os.strerror(number), path or None)
        return real(*arguments, **options)

    return call


def _place(call):
    return _MODULES.get(call, os), {"os_open": "open"}.get(call, call)


def install(*faults):
    """Put the `faults` in place for good; what they count."""
    counts = []
    for fault in faults:
        module, name = _place(fault.call)
        counts.append(Count())
        setattr(module, name, _faulty(fault, getattr(module, name), counts[-1]))
    return counts


@contextlib.contextmanager
def injected(*faults):
    """The `faults` are in place; yields what they count."""
    places = {(id(module), name): (module, name, getattr(module, name)) for module, name in map(_place_of, faults)}
    try:
        yield install(*faults)
    finally:
        for module, name, real in places.values():
            setattr(module, name, real)


def _place_of(fault):
    return _place(fault.call)


def make_small():
    """Set what is in SMALL, in this process."""
    for path, value in SMALL.items():
        module, name = path.rsplit(".", 1)
        __import__(module)
        setattr(sys.modules[module], name, value)


def preamble(*faults, small=True, then=""):
    """Python that puts the `faults` in place in a process of its own, with small pieces, and runs `then`."""
    here = str(Path(__file__).parent)
    lines = [f"import sys; sys.path.insert(0, {here!r})", "import shim", "from shim import Fault"]
    lines += ["shim.make_small()"] if small else []
    lines += [f"shim.install({', '.join(map(repr, faults))})"] if faults else []
    return "\n".join([*lines, then])
