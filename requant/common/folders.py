"""Folders of outputs: free space, and the flush of file names to disk."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from requant.common.files import NOT_SUPPORTED
from requant.common.units import format_size
from requant.errors import InputOutputError, printable


def sync_folder(path: Path) -> bool:
    """Wait until the names in the folder are on disk; return whether that is possible. Raises InputOutputError."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM}:
            raise InputOutputError(path, f"cannot be opened: {error.strerror}") from error
        return False  # a folder that may be written but not read; the file itself is safe
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise InputOutputError(path, f"flushing to disk failed: {error.strerror}") from error
        return False
    finally:
        os.close(folder)
    return True


def nearest_folder(folder: Path) -> Path:
    """Return `folder`, or the nearest one above it. Raises InputOutputError where a folder cannot be made in it."""
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        code = errno.EEXIST if found == folder else errno.ENOTDIR
        raise InputOutputError(folder, f"cannot be made: {os.strerror(code)}")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputOutputError(folder, f"cannot be made: {os.strerror(errno.EACCES)}")
    return found


def check_space(folder: Path, need: int, parts: list[Path]) -> None:
    """Raise InputOutputError where `folder` has less than `need` bytes free; those of `parts` count as free."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise InputOutputError(folder, f"cannot be written to: {error.strerror}") from error
    if not status.f_blocks:
        return  # some network file systems do not report it
    have = status.f_bavail * status.f_frsize
    for part in parts:
        with contextlib.suppress(OSError):
            have += part.lstat().st_blocks * 512
    if need > have:
        what = f"needs {format_size(need)} free but has {format_size(have)}"
        where = f"free some space on {printable(str(_mount_of(folder)))} or choose another folder"
        raise InputOutputError(folder, what, hint=where)


def _mount_of(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_mount() or path == path.parent)
