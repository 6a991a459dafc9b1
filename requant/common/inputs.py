"""Inputs of a command or call: all files that it has opened for reading.

No output may be one of them, under whatever name, or have a permission that one of them lacks.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

Identity = tuple[int, int]  # (st_dev, st_ino), the same for all paths of a file
_READ_WRITE = 0o666
_OWNER = 0o600  # always allowed: whoever runs requant has read the inputs


@dataclass(frozen=True, slots=True)
class _Input:
    path: Path
    status: os.stat_result


_Inputs = dict[Identity, _Input]
_all: ContextVar[_Inputs | None] = ContextVar("all", default=None)  # of the command or call
_part: ContextVar[_Inputs | None] = ContextVar("part", default=None)  # of the part of it that makes one output
_own: ContextVar[bool] = ContextVar("own", default=False)


def identity(status: os.stat_result) -> Identity:
    """The device and inode of a stat result."""
    return status.st_dev, status.st_ino


@contextmanager
def collect_inputs() -> Iterator[None]:
    """Collect the inputs of one command or call, also those of its threads; within another one, add to its inputs."""
    if _all.get() is not None:
        yield
        return
    token = _all.set({})
    try:
        yield
    finally:
        _all.reset(token)


@contextmanager
def collect_part() -> Iterator[None]:
    """Let the permissions of new files depend only on what is opened from here on, as for one output of several."""
    token = _part.set({})
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def own_files() -> Iterator[None]:
    """Open files that the command or call itself writes, which are no inputs."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


def add_input(path: Path, status: os.stat_result) -> None:
    """Add a regular file that is opened for reading to the inputs, if they are collected."""
    for inputs in (_all.get(), _part.get()):
        if inputs is not None and not _own.get() and stat.S_ISREG(status.st_mode):
            inputs[identity(status)] = _Input(path, status)


def add_inputs(*given: object) -> None:
    """Add the files that will be read, so that an output that is one of them is refused before any long work.

    Of `given` only paths count, of these only files that exist.
    """
    for path in given:
        if isinstance(path, Path):
            with suppress(OSError, ValueError):
                add_input(path, path.stat())


def is_input(status: os.stat_result) -> bool:
    """Return whether the file is one of the inputs."""
    return identity(status) in (_all.get() or ())


def find_input(status: os.stat_result) -> Path | None:
    """Return the path by which the file was opened for reading; None for a file that was not."""
    found = (_all.get() or {}).get(identity(status))
    return None if found is None else found.path


def forget_input(status: os.stat_result) -> None:
    """Forget an input that has gone, whose inode a new file has got."""
    for inputs in (_all.get(), _part.get()):
        if inputs is not None:
            inputs.pop(identity(status), None)


def mode_in(folder: Path) -> int:
    """Return the permissions of a new file in `folder`, from which the umask is still to be taken. Raises OSError."""
    status = folder.stat()
    return _limit_mode(status.st_gid if status.st_mode & stat.S_ISGID else os.getegid())


def restrict(descriptor: int, replaced: os.stat_result | None = None) -> bool:
    """Take from the open file the permissions that an input, or the file that it replaces, lacks.

    Return whether the file system did it. Raises OSError.
    """
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    allowed = mode & _limit_mode(status.st_gid, *(() if replaced is None else (replaced,)))
    if allowed == mode:
        return True
    with suppress(PermissionError):
        os.fchmod(descriptor, allowed)
    return stat.S_IMODE(os.fstat(descriptor).st_mode) == allowed


def _limit_mode(group: int, *others: os.stat_result) -> int:
    """Return the permissions that a file of `group` may have: none that an input, or one of `others`, lacks.

    Where the groups differ, the members of `group` count as others do.
    """
    inputs = _all.get() if _part.get() is None else _part.get()
    mode = _READ_WRITE
    for status in (*(found.status for found in tuple((inputs or {}).values())), *others):
        own = status.st_mode
        of_all = own & own >> 3 & 0o6  # what both its group and all others may do
        mode &= _OWNER | (own & 0o66 if status.st_gid == group else of_all << 3 | of_all)
    return mode
