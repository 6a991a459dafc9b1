"""The journal of an unfinished output: what has been written and is on disk, so that the next run goes on from there.

Lines of `CRC32 JSON`, each an object of one kind. `owner`: a run that has worked on the output. `head`: what binds the
journal to its work; everything in it must be the same in the run that goes on. Every other line is a record. A torn or
damaged line ends the journal: it and what follows are dropped. The open file is locked, so that one run has it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.common.files import identity, lock, open_or_make, read_into, write_from
from requant.errors import InputOutputError, OutputRefused, printable

Line = dict[str, Any]

_MAX_JOURNAL = 1 << 28  # bytes; a model of a trillion weights has a tenth of that


@dataclass(frozen=True, slots=True)
class Past:
    """What a journal holds: its head, its records, the bytes that are sound and the lines that are not."""

    head: Line | None = None
    records: tuple[Line, ...] = ()
    owner: Line | None = None
    n_bytes: int = 0
    n_dropped: int = 0

    def difference(self, head: Line) -> str | None:
        """The first thing of another `head` that is not the same in this one, or None."""
        own = {key: (self.head or {}).get(key) for key in head}
        return _difference(own, json.loads(json.dumps(head)), "")


def _difference(old: object, new: object, where: str) -> str | None:
    """Where two JSON values differ, down to the first thing that does, or None."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else f"{where} was {_shown(old)}, now {_shown(new)}"
    found = (_difference(old.get(k), new.get(k), f"{where} {printable(str(k))}".strip()) for k in {**new, **old})
    return next((line for line in found if line is not None), None)


def _shown(value: object) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Journal:
    """The journal at `path` of the output `out`, opened and locked; `past` is what it held.

    Raises OutputRefused where another run has it, or something else stands there; InputOutputError. Closing it leaves
    the file if it has a head; `remove` does not.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self.warnings = path, list[str]()
        self._descriptor = open_or_make(path, "a journal")
        try:
            self.past = self._read()
            if not lock(path, self._descriptor, self.warnings) or not self._is_named():
                raise OutputRefused(out, f"another run is writing it: {_who(self.past.owner)}")
            self.past = self._read()  # again: what the last owner added before it let go of the lock
            self.has_head, self._end = self.past.head is not None, self.past.n_bytes
            os.ftruncate(self._descriptor, self._end)
            self.append([{"owner": _owner()}], sync=False)
        except OSError as error:
            self._let_go()
            raise InputOutputError(path, f"cannot be written: {error.strerror}") from error
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, head: Line) -> None:
        """Forget what it held, and bind it to `head`."""
        self.forget()
        self.has_head = True
        self.append([{"head": head}])

    def forget(self) -> None:
        """Empty it, also on disk. Raises InputOutputError."""
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise InputOutputError(self.path, f"cannot be written: {error.strerror}") from error
        self._end, self.has_head, self.past = 0, False, Past()
        self.append([{"owner": _owner()}])

    def append(self, lines: Iterable[Line], *, sync: bool = True) -> None:
        """Write `lines`, and wait until they are on disk. Raises InputOutputError."""
        data = b"".join(map(_encoded, lines))
        write_from(self.path, self._descriptor, memoryview(data), self._end)
        self._end += len(data)
        if sync:
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                raise InputOutputError(self.path, f"flushing to disk failed: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the lock; a journal without a head is removed. More than once does no harm."""
        if self._descriptor >= 0 and not self.has_head:
            self.remove()
        self._let_go()

    def remove(self) -> None:
        """Delete the file and let go of the lock."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0 and self._is_named():
                self.path.unlink()
        self._let_go()

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _is_named(self) -> bool:
        """Whether the path still stands for the open file: its last owner may have removed it before our lock."""
        try:
            return identity(self.path.lstat()) == identity(os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _read(self) -> Past:
        data = bytearray(min(os.fstat(self._descriptor).st_size, _MAX_JOURNAL))
        read_into(self.path, self._descriptor, memoryview(data), 0)
        return _past_of(bytes(data))


def _past_of(data: bytes) -> Past:
    head, owner, records, n_bytes, n_sound = None, None, list[Line](), 0, 0
    pieces = data.split(b"\n")
    for piece in pieces[:-1]:  # after the last line end there is nothing, or a torn line
        line = _parsed(piece)
        if line is None:
            break
        if isinstance(line.get("head"), dict):
            head = line["head"]
        elif isinstance(line.get("owner"), dict):
            owner = line["owner"]
        else:
            records.append(line)
        n_sound += 1
        n_bytes += len(piece) + 1
    n_dropped = len(pieces) - n_sound - (not pieces[-1])
    return Past(head, tuple(records), owner, n_bytes, n_dropped)


def _parsed(line: bytes) -> Line | None:
    text = line[9:]
    if line[:9] != _checksum(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _encoded(line: Line) -> bytes:
    text = json.dumps(line, allow_nan=False).encode()
    return _checksum(text) + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text)


def _owner() -> Line:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "started": started}


def _who(owner: Line | None) -> str:
    if owner is None:
        return "it has just begun"
    pid, host, started = (printable(str(owner.get(key)))[:40] for key in ("pid", "host", "started"))
    return f"process {pid} on {host}, started {started}"
