"""Regular files: identity, opening, locks, reads and writes at an offset; every failure is a RequantError."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path

from requant.common.inputs import add_input, forget_input, mode_in, restrict
from requant.errors import (
    FILE_NAME,
    MISSING,
    BadInput,
    InputOutputError,
    OutputRefused,
    SourceChanged,
    brief,
    missing_file,
    printable,
)

NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOLCK}  # by the file system

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}


def identify_content(path: Path, max_hashed: int) -> str | tuple[int, int]:
    """Return what tells whether a file has the same content as before: the SHA-256 of its bytes, in hex.

    For a file of more than `max_hashed` bytes it is (size, mtime in ns). Raises OSError, ValueError.
    """
    status = path.stat()
    if status.st_size > max_hashed:
        return status.st_size, status.st_mtime_ns
    return hash_file(path)


def irregular_kind(status: os.stat_result) -> str | None:
    """Name what is no regular file ("a FIFO"); None for a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "not a regular file")


def open_regular(path: Path) -> int:
    """Open `path` for reading, as an input; the caller closes the descriptor.

    Raises BadInput for a missing path, a dangling link and anything but a regular file; InputOutputError for other
    failures, such as missing permission.
    """
    try:
        kind = irregular_kind(path.stat())
        if kind is not None:
            raise BadInput(path, f"is {kind}, not a regular file", hint=_suggest_inside(path))
        # without O_NONBLOCK a FIFO that appeared since the stat would block the open for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _open_error(path, error) from error
    status = os.fstat(descriptor)
    kind = irregular_kind(status)
    if kind is not None:
        os.close(descriptor)
        raise BadInput(path, f"is {kind}, not a regular file")
    add_input(path, status)
    return descriptor


def _suggest_inside(folder: Path) -> str | None:
    """Suggest what to do where a folder is given as a model."""
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in os.scandir(folder))
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        if ggufs:
            return f"give a file in it, such as {brief(ggufs[0], FILE_NAME)}"
        if any(name.endswith(".safetensors") for name in names):
            return "convert it to GGUF first: llama.cpp's convert_hf_to_gguf.py"
    return None


def _open_error(path: Path, error: OSError | ValueError) -> BadInput:
    if isinstance(error, ValueError):  # Python's own check: a NUL byte in the path
        return BadInput(path, "is not a usable path")
    if isinstance(error, MISSING):
        return missing_file(path)
    if error.errno == errno.ELOOP:
        return BadInput(path, "is a loop of symbolic links")
    hint = "raise the limit on open files: ulimit -n 4096" if error.errno == errno.EMFILE else None
    return InputOutputError(path, f"cannot be opened: {error.strerror}", hint=hint)


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
    """Suggest how to make room after an `error` in writing `path`; None for other errors."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"free some space in {printable(str(path.parent))} and run it again to resume"
    if error.errno == errno.EFBIG:
        return "the file system or a limit (ulimit -f) forbids files this large; run it again to resume"
    return None


def create_file(path: Path) -> int:
    """Create the file at `path` for reading and writing, with the permissions of an output.

    Raises OutputRefused where a file has appeared there, InputOutputError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, mode_in(path.parent))
        begin_output(descriptor)
    except FileExistsError as error:
        raise OutputRefused(path, "has just been made by another run") from error
    except OSError as error:
        if not path.parent.exists():
            raise missing_folder(path.parent) from error
        raise InputOutputError(path, f"cannot be created: {error.strerror}") from error
    return descriptor


def begin_output(descriptor: int) -> None:
    """Tell a new, open file from the inputs, and take from it the permissions that one of them lacks."""
    forget_input(os.fstat(descriptor))
    restrict(descriptor)


def missing_folder(folder: Path) -> InputOutputError:
    """The error for an output's folder that does not exist."""
    return InputOutputError(folder, "there is no such folder", hint="make it first: mkdir -p")


def lock_file(path: Path, descriptor: int, warnings: list[str]) -> bool:
    """Lock an open file, and return whether that succeeded; True, with a warning, where there are no locks.

    Raises InputOutputError for failures other than another run's lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise InputOutputError(path, f"cannot be locked: {error.strerror}") from error
        warnings.append("the output's file system has no locks: do not start a second run on it")
    return True


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
