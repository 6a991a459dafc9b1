"""Atomic writes of small files: the path holds either the old content or all of the new.

The new content is written to a file without a name, which a run that is killed cannot leave behind. Where the file
system has no such files, it is X.XXXXXXXX.part (8 hex digits, new), and a run that is killed may leave it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from requant.common.files import NOT_SUPPORTED, begin_output, create_file, irregular_kind, missing_folder
from requant.common.inputs import is_input, mode_in, restrict
from requant.errors import InputOutputError, OutputRefused

_HEAD = 200  # bytes of a file that contain its schema
_UNNAMED: int = getattr(os, "O_TMPFILE", 0)
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS}  # of a file system or kernel without
_NO_LINKS = NOT_SUPPORTED | {errno.EMLINK}
_BLOCK = 2**20

IsOwn = Callable[[Path], bool]  # whether an existing file may be replaced without `force`


class _NoLinks(Exception):
    """The file system cannot give a name to a file without one."""


def check_writable(path: Path, *, force: bool, is_own: IsOwn | None = None) -> None:
    """Raise what `write_text` would raise, before any long work.

    An existing file is refused unless `force` is set or `is_own` says so of it; an input is always refused. Raises
    OutputRefused, or InputOutputError for a folder that cannot be written.
    """
    target = _resolve_target(path)
    _check_target(path, target, force, is_own)
    with _open_new(target):
        pass


def write_text(path: Path, text: str, *, force: bool, is_own: IsOwn | None = None) -> None:
    """Write `text` as UTF-8 to `path`. Raises as `check_writable` does."""
    write_bytes(path, text.encode(), force=force, is_own=is_own)


def write_bytes(path: Path, data: bytes, *, force: bool, is_own: IsOwn | None = None) -> None:
    """Write `data` to `path`. Raises as `check_writable` does."""

    def fill(file: IO[bytes]) -> None:
        file.write(data)

    write_file(path, fill, force=force, is_own=is_own)


def write_file(path: Path, fill: Callable[[IO[bytes]], None], *, force: bool, is_own: IsOwn | None = None) -> None:
    """Write what `fill` writes to `path`. Raises as `check_writable` does."""
    target = _resolve_target(path)
    check = partial(_check_target, path, target, force, is_own)
    check()
    try:
        _write_new(path, target, fill, check)
    except _NoLinks:
        _write_new(path, target, fill, check, unnamed=False)


def _write_new(
    path: Path,
    target: Path,
    fill: Callable[[IO[bytes]], None],
    check: Callable[[], os.stat_result | None],
    *,
    unnamed: bool = True,
) -> None:
    """Write a new file and give it its name; `unnamed`: raise _NoLinks where the file system cannot do that."""
    with _open_new(target, unnamed=unnamed) as (descriptor, named):
        try:
            with open(descriptor, "wb", closefd=False) as file:
                fill(file)
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise InputOutputError(target, f"cannot be written: {error.strerror}") from error
        replaced = check()
        try:
            restrict(descriptor, replaced)
            _put_in_place(descriptor, named, target, replaced is not None)
        except FileExistsError as error:
            raise _taken(path) from error
        except OSError as error:
            if named is None and error.errno in _NO_LINKS:
                raise _NoLinks from error
            raise InputOutputError(path, f"cannot be put in place: {error.strerror}") from error


def has_schema(path: Path, schema: str) -> bool:
    """Return whether the file at `path` can be read and is a record of that schema."""
    return f'"schema": "{schema}"'.encode() in read_head(path, _HEAD)


def read_head(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of the file at `path`, which may be a model of any size; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except (OSError, ValueError):
        return b""


def _resolve_target(path: Path) -> Path:
    """Resolve `path`: of a symbolic link the target is replaced, not the link."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL byte
        raise OutputRefused(path, "is not a usable path") from error


def _check_target(path: Path, target: Path, force: bool, is_own: IsOwn | None) -> os.stat_result | None:
    """Return the status of the file that will be replaced, None without one. Raises OutputRefused, InputOutputError."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputOutputError(path, f"cannot be written: {error.strerror}") from error
    kind = irregular_kind(status)
    if kind is not None:
        raise OutputRefused(path, f"is {kind}, not a regular file", hint="choose another output")
    if is_input(status):
        raise OutputRefused(path, "is one of the inputs", hint="--force does not help; choose another output")
    if not force and not (is_own is not None and is_own(path)):
        raise _taken(path)
    return status


def _taken(path: Path) -> OutputRefused:
    return OutputRefused(path, "already exists", hint="--force replaces it")


@contextlib.contextmanager
def _open_new(target: Path, *, unnamed: bool = True) -> Iterator[tuple[int, Path | None]]:
    """Open a new file in the folder of `target`, and yield its descriptor and its name, None where it has none."""
    named = None
    try:
        descriptor = _open_unnamed(target.parent) if unnamed else None
        if descriptor is None:
            named = _temporary(target)
            descriptor = create_file(named)
    except OSError as error:
        if not target.parent.exists():
            raise missing_folder(target.parent) from error
        raise InputOutputError(target, f"cannot be written: {error.strerror}") from error
    try:
        yield descriptor, named
    finally:
        os.close(descriptor)
        if named is not None:
            named.unlink(missing_ok=True)


def _open_unnamed(folder: Path) -> int | None:
    """Open a file without a name in `folder`; None where the file system has no such files. Raises OSError."""
    if not _UNNAMED:
        return None
    try:
        descriptor = os.open(folder, _UNNAMED | os.O_RDWR | os.O_CLOEXEC, mode_in(folder))
    except OSError as error:
        if error.errno in _NO_UNNAMED and folder.is_dir():
            return None
        raise
    if not os.path.exists(_name_of(descriptor)):  # noqa: PTH110, without /proc it can get no name
        os.close(descriptor)
        return None
    begin_output(descriptor)
    return descriptor


def _name_of(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")


def _put_in_place(descriptor: int, named: Path | None, target: Path, replaces: bool) -> None:
    """Give the file its name in one step; without `replaces` it never replaces what has just appeared there."""
    if not replaces:
        _link(descriptor, target) if named is None else _link_or_replace(named, target)
        return
    if named is not None:
        os.replace(named, target)  # noqa: PTH105
        return
    named = target.with_name(f"{target.name}.part")
    try:
        _link(descriptor, named)
    except FileExistsError:
        if not _has_content_of(descriptor, named):  # else a run was killed between this link and the renaming
            named = _temporary(target)
            _link(descriptor, named)
    try:
        os.replace(named, target)  # noqa: PTH105
    except OSError:
        named.unlink(missing_ok=True)
        raise


def _link_or_replace(named: Path, target: Path) -> None:
    try:
        os.link(named, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.replace(named, target)  # noqa: PTH105


def _link(descriptor: int, path: Path) -> None:
    # with a descriptor of a folder, Python calls linkat with AT_SYMLINK_FOLLOW, which such a file needs
    os.link(_name_of(descriptor), path, src_dir_fd=descriptor, follow_symlinks=True)


def _has_content_of(descriptor: int, path: Path) -> bool:
    """Return whether an earlier run left the file at `path`: a regular file of one name with the same bytes."""
    status = path.lstat()
    if irregular_kind(status) or is_input(status) or status.st_nlink > 1:
        return False
    size = os.fstat(descriptor).st_size
    if status.st_size != size:
        return False
    with path.open("rb") as file:
        return all(file.read(_BLOCK) == os.pread(descriptor, _BLOCK, at) for at in range(0, size, _BLOCK))
