"""Regular files opened, read and written: anything else is refused before it is opened, and every failure is ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from requant.common.serialization import MISSING
from requant.errors import (
    FILE_NAME,
    BadInput,
    InputOutputError,
    OutputRefused,
    SourceChanged,
    brief,
    missing,
    printable,
)

NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOLCK}  # by the file system

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
            raise BadInput(path, f"is {kind}, not a regular file", hint=_inside(path))
        # without O_NONBLOCK a FIFO put there since the stat would block the open for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from error
    kind = irregular(os.fstat(descriptor))
    if kind is not None:
        os.close(descriptor)
        raise BadInput(path, f"is {kind}, not a regular file")
    return descriptor


def _inside(folder: Path) -> str | None:
    """What to do instead of opening a folder as a model."""
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in os.scandir(folder))
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        if ggufs:
            return f"give a file in it, such as {brief(ggufs[0], FILE_NAME)}"
        if any(name.endswith(".safetensors") for name in names):
            return "convert it to GGUF first: llama.cpp's convert_hf_to_gguf.py"
    return None


def _cannot_open(path: Path, error: OSError | ValueError) -> BadInput:
    if isinstance(error, ValueError):  # Python's own check: a NUL byte in the path
        return BadInput(path, "is not a usable path")
    if isinstance(error, MISSING):
        return missing(path)
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


def write_from(path: Path, descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data` (bytes, contiguous) at `offset`; safe from any thread.

    Raises InputOutputError naming the bytes of `path` that could not be written.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            what = f"writing {len(data) - done} bytes at offset {offset + done} failed: {error.strerror}"
            raise InputOutputError(path, what, hint=room_hint(error, path)) from error


def room_hint(error: OSError, path: Path) -> str | None:
    """What to do about an `error` in writing `path` that more room would cure, or None."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"free some space in {printable(str(path.parent))} and run it again to resume"
    if error.errno == errno.EFBIG:
        return "the file system or a limit (ulimit -f) forbids files this large; run it again to resume"
    return None


def open_or_make(path: Path, what: str, inputs: frozenset[Identity] = frozenset()) -> int:
    """A descriptor for reading and writing the regular file at `path`, made if need be, which is `what` (a noun).

    Raises OutputRefused where anything else stands there or one of `inputs` does, InputOutputError.
    """
    try:
        status = path.lstat() if os.path.lexists(path) else None
        kind = None if status is None else irregular(status)
        if status is not None and (kind is not None or identity(status) in inputs):
            is_not = f"is {kind}, not {what}" if kind else f"is one of the inputs, not {what}"
            raise OutputRefused(path, is_not, hint="it stands where the unfinished output goes; move it away")
        # the umask applies: other users may read the model as they may any file made here
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(path, flags | (os.O_EXCL if status is None else 0), 0o666)
    except FileExistsError as error:
        raise OutputRefused(path, "has just been made by another run") from error
    except OSError as error:
        if not path.parent.exists():
            raise no_folder(path.parent) from error
        raise InputOutputError(path, f"cannot be created: {error.strerror}") from error


def no_folder(folder: Path) -> InputOutputError:
    """That an output's folder is not there."""
    return InputOutputError(folder, "there is no such folder", hint="make it first: mkdir -p")


def lock(path: Path, descriptor: int, warnings: list[str]) -> bool:
    """Whether the file is ours alone from now on; True, with a warning, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise InputOutputError(path, f"cannot be locked: {error.strerror}") from error
        warnings.append("the output's file system has no locks: do not start a second run on it")
    return True


def identities(*paths: Path | None) -> frozenset[Identity]:
    """Of the files that are there: no output may be one of them."""
    found = set()
    for path in paths:
        with suppress(OSError, ValueError):
            if path is not None:
                found.add(identity(path.stat()))
    return frozenset(found)
