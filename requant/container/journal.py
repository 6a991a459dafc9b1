"""The journal of an unfinished output: records of the pieces that are on disk, from which the next run resumes.

Lines of `CRC32 JSON`, each an object of one kind. `owner`: a run that has worked on the output. `head`: source, plan
and request, all of which must be the same in the run that resumes. Every other line is a record. A torn or damaged line
ends the journal: it and the lines after it are dropped. The open file is locked, so that only one run has it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.common.files import lock_file, read_into, write_from
from requant.common.inputs import identity
from requant.common.sidecars import Sidecar
from requant.container.shards import whole_name
from requant.errors import InputOutputError, OutputRefused, printable

Line = dict[str, Any]

_FIRST_LINE = b'{"owner": {"pid": '  # after its checksum and a space, with which it may end
_MAX_HEAD = 1 << 20  # bytes in which a journal has a whole line
_MAX_JOURNAL = 1 << 28  # bytes; a model of a trillion weights has a tenth of that


@dataclass(frozen=True, slots=True)
class JournalContents:
    """The contents of a journal: its head, records and last owner, its valid bytes, and the number of dropped lines."""

    head: Line | None = None
    records: tuple[Line, ...] = ()
    owner: Line | None = None
    n_bytes: int = 0
    n_dropped: int = 0

    def file_names(self) -> list[str]:
        """The names that the files of the unfinished output will get, in order."""
        return [name for name, _ in self.files()]

    def files(self) -> list[tuple[str, int]]:
        """The names and the sizes of the files of the unfinished output, in order."""
        listed = (self.head or {}).get("files")
        found = [f for f in listed if isinstance(f, list) and len(f) > 1] if isinstance(listed, list) else []
        return [
            (f[0], f[1])
            for f in found
            if isinstance(f[0], str) and f[0] == Path(f[0]).name not in ("", "..") and isinstance(f[1], int)
        ]

    def difference(self, head: Line) -> str | None:
        """Describe the first value of another `head` that differs in this one; None where all are the same."""
        own = {key: (self.head or {}).get(key) for key in head}
        return _find_difference(own, json.loads(json.dumps(head)), "")


def _find_difference(old: object, new: object, where: str) -> str | None:
    """Describe the first difference between two JSON values, or return None."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else f"{where} was {_show_value(old)}, now {_show_value(new)}"
    found = (_find_difference(old.get(k), new.get(k), f"{where} {printable(str(k))}".strip()) for k in {**new, **old})
    return next((line for line in found if line is not None), None)


def _show_value(value: object) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Journal:
    """The journal at `path` of the output `out`, opened and locked; `past` are the contents of earlier runs.

    was_there: an earlier run left it, even if nothing in it can be read.

    Raises OutputRefused where another run has it, and where the file is no journal or that of another output;
    InputOutputError. Closing leaves the file if it has a head.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self.warnings, self.was_there = path, list[str](), path.exists()
        self._descriptor = Sidecar(path, "a journal", _is_journal).open_or_make()
        try:
            self.past = self._read()
            if not lock_file(path, self._descriptor, self.warnings) or not self._is_named():
                raise OutputRefused(out, f"another run is writing it: {_show_owner(self.past.owner)}")
            self.past = self._read()  # again: the last owner may have added lines before it released the lock
            self._check_output(out)
            self.has_head, self._end = self.past.head is not None, self.past.n_bytes
            os.ftruncate(self._descriptor, self._end)
            self.append([{"owner": _describe_owner()}], sync=False)
        except OSError as error:
            self._release()
            raise InputOutputError(path, f"cannot be written: {error.strerror}") from error
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, head: Line) -> None:
        """Clear it, and write the head."""
        self.clear()
        self.has_head = True
        self.append([{"head": head}])

    def clear(self) -> None:
        """Remove all contents, also on disk. Raises InputOutputError."""
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise InputOutputError(self.path, f"cannot be written: {error.strerror}") from error
        self._end, self.has_head, self.past = 0, False, JournalContents()
        self.append([{"owner": _describe_owner()}])

    def append(self, lines: Iterable[Line], *, sync: bool = True) -> None:
        """Write `lines`, and wait until they are on disk. Raises InputOutputError."""
        data = b"".join(map(_encode_line, lines))
        write_from(self.path, self._descriptor, memoryview(data), self._end)
        self._end += len(data)
        if sync:
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                raise InputOutputError(self.path, f"flushing to disk failed: {error.strerror}") from error

    def close(self) -> None:
        """Release the lock; a journal without a head is removed. May be called more than once."""
        if self._descriptor >= 0 and not self.has_head:
            self.remove()
        self._release()

    def remove(self) -> None:
        """Delete the file and release the lock."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0 and self._is_named():
                self.path.unlink()
        self._release()

    def _release(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _check_output(self, out: Path) -> None:
        """Raise OutputRefused where the head is that of an output of another name."""
        for name in self.past.file_names():
            if _stem(name) != _stem(out.name):
                what = f"is the journal of another output, {printable(name)}"
                raise OutputRefused(self.path, what, hint="move it away, or give the output its name")

    def _is_named(self) -> bool:
        """Return whether the path still names the open file: its last owner may have removed it before our lock."""
        try:
            return identity(self.path.lstat()) == identity(os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _read(self) -> JournalContents:
        data = bytearray(min(os.fstat(self._descriptor).st_size, _MAX_JOURNAL))
        read_into(self.path, self._descriptor, memoryview(data), 0)
        return _parse_journal(bytes(data))


def _stem(name: str) -> str:
    """Return what the names of an output and of its shards share."""
    return whole_name(name).removesuffix(".gguf")


def _is_journal(descriptor: int) -> bool:
    """Return whether an open file has a line of a journal, or is empty or zero, as a killed run may leave it."""
    data = os.pread(descriptor, _MAX_HEAD, 0)
    if not any(data) or (re.match(rb"[0-9a-f]{8} ", data) and _FIRST_LINE.startswith(data[9:][: len(_FIRST_LINE)])):
        return True
    return any(_parse_line(line) is not None for line in data.split(b"\n"))


def _parse_journal(data: bytes) -> JournalContents:
    head, owner, records, n_bytes, n_sound = None, None, list[Line](), 0, 0
    pieces = data.split(b"\n")
    for piece in pieces[:-1]:  # the last one is empty or a torn line
        line = _parse_line(piece)
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
    return JournalContents(head, tuple(records), owner, n_bytes, n_dropped)


def _parse_line(line: bytes) -> Line | None:
    text = line[9:]
    if line[:9] != _checksum(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _encode_line(line: Line) -> bytes:
    text = json.dumps(line, allow_nan=False).encode()
    return _checksum(text) + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text)


def _describe_owner() -> Line:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "started": started}


def _show_owner(owner: Line | None) -> str:
    if owner is None:
        return "it has just begun"
    pid, host, started = (printable(str(owner.get(key)))[:40] for key in ("pid", "host", "started"))
    return f"process {pid} on {host}, started {started}"
