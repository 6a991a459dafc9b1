"""Opening and reading regular files: anything else is refused before it is opened, and every failure is ours."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from requant.errors import BadInput, InputOutputError, SourceChanged

Identity = tuple[int, int]  # (st_dev, st_ino): what makes two paths the same file

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}


def identity(status: os.stat_result) -> Identity:
    """The device and inode of a stat result."""
    return status.st_dev, status.st_ino


def irregular(status: os.stat_result) -> str | None:
    """What the thing is when it is no regular file ("a FIFO"), else None."""
    kind = stat.S_IFMT(status.st_mode)
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "not a regular file")


def open_regular(path: Path) -> int:
    """A descriptor for reading `path`, which the caller closes.

    Raises BadInput for a missing path, a dangling link and anything but a regular file; InputOutputError for
    the rest, such as missing permission.
    """
    try:
        kind = irregular(path.stat())
        if kind is not None:
            raise BadInput(path, f"is {kind}, not a regular file")
        # without O_NONBLOCK a FIFO put there since the stat would block the open for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from error
    kind = irregular(os.fstat(descriptor))
    if kind is not None:
        os.close(descriptor)
        raise BadInput(path, f"is {kind}, not a regular file")
    return descriptor


def _cannot_open(path: Path, error: OSError | ValueError) -> BadInput:
    if isinstance(error, ValueError):  # Python's own check: a NUL byte in the path
        return BadInput(path, "is not a usable path")
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return BadInput(path, "links to a file that is not there" if path.is_symlink() else "no such file")
    if error.errno == errno.ELOOP:
        return BadInput(path, "is a loop of symbolic links")
    return InputOutputError(path, f"cannot be opened: {error.strerror}")


def read_into(path: object, descriptor: int, target: memoryview, offset: int) -> None:
    """Fill `target` (bytes, writable, contiguous) with the file's bytes from `offset` on; safe from any thread.

    Raises SourceChanged where the file ends too early and InputOutputError where the system fails; `path` is for
    their messages.
    """
    done = 0
    while done < len(target):
        try:
            n = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            what = f"reading {len(target) - done} bytes at offset {offset + done} failed: {error.strerror}"
            raise InputOutputError(path, what) from error
        if n == 0:
            what = f"shrank while it was being read: {len(target) - done} bytes at offset {offset + done} are gone"
            raise SourceChanged(path, what, got=os.fstat(descriptor).st_size)
        done += n
