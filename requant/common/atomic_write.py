"""Atomic writes of small files: the path holds either the old content or all of the new."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from requant.common.files import Identity, identity, irregular_kind, missing_folder
from requant.errors import InputOutputError, OutputRefused

_HEAD = 200  # bytes of a file that contain its schema


def check_writable(path: Path, *, force: bool, inputs: frozenset[Identity], own: str | None = None) -> None:
    """Raise what `write_text` would raise, before any long work.

    An existing file is refused unless `force` is set or it is a record with the schema `own`; one of `inputs` is always
    refused. Raises OutputRefused, or InputOutputError for a folder that cannot be written.
    """
    target = _resolve_target(path)
    _check_target(path, target, force, inputs, own)
    _write_part(target, b"").unlink()


def write_text(path: Path, text: str, *, force: bool, inputs: frozenset[Identity], own: str | None = None) -> None:
    """Write `text` as UTF-8 to `path`. Raises as `check_writable` does."""
    write_bytes(path, text.encode(), force=force, inputs=inputs, own=own)


def write_bytes(path: Path, data: bytes, *, force: bool, inputs: frozenset[Identity], own: str | None = None) -> None:
    """Write `data` to `path`. Raises as `check_writable` does."""
    target = _resolve_target(path)
    _check_target(path, target, force, inputs, own)
    part = _write_part(target, data)
    try:
        _check_target(path, target, force, inputs, own)
        part.replace(target)
    except OSError as error:
        raise InputOutputError(path, f"cannot be put in place: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def has_schema(path: Path, schema: str) -> bool:
    """Return whether the file at `path` can be read and is a record of that schema."""
    try:
        with path.open("rb") as file:  # it may be a model of any size
            return f'"schema": "{schema}"'.encode() in file.read(_HEAD)
    except (OSError, ValueError):
        return False


def _resolve_target(path: Path) -> Path:
    """Resolve `path`: of a symbolic link the target is replaced, not the link."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL byte
        raise OutputRefused(path, "is not a usable path") from error


def _check_target(path: Path, target: Path, force: bool, inputs: frozenset[Identity], own: str | None) -> None:
    try:
        status = target.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputOutputError(path, f"cannot be written: {error.strerror}") from error
    kind = irregular_kind(status)
    if kind is not None:
        raise OutputRefused(path, f"is {kind}, not a regular file", hint="choose another output")
    if identity(status) in inputs:
        raise OutputRefused(path, "is one of the inputs", hint="--force does not help; choose another output")
    if not force and not (own is not None and has_schema(target, own)):
        raise OutputRefused(path, "already exists", hint="--force replaces it")


def _write_part(target: Path, data: bytes) -> Path:
    """Write `data` to a new file beside `target`, on disk; its name is new even where a killed run left one."""
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not target.parent.exists():
            raise missing_folder(target.parent) from error
        raise InputOutputError(target, f"cannot be written: {error.strerror}") from error
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123, the descriptor is the lock
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise InputOutputError(target, f"cannot be written: {error.strerror}") from error
        raise
    return part
