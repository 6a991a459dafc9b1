"""OUT.part: one file of an output, filled by positional writes from any thread and put in place when it is whole.

Its first bytes stay zero until it is sealed, so that nothing takes an unfinished file for a model, and a lock on it
keeps a second run away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from requant.common.files import (
    NOT_SUPPORTED,
    irregular_kind,
    lock_file,
    read_into,
    room_hint,
    write_from,
)
from requant.common.folders import check_space, sync_folder
from requant.common.inputs import Identity, identity, is_input, restrict
from requant.common.open_files import OpenFile
from requant.common.sidecars import Sidecar
from requant.common.units import format_size
from requant.container.header import Header, read_header
from requant.errors import BadInput, InputOutputError, OutputRefused, printable

if TYPE_CHECKING:
    import numpy as np

    from requant.container.layout import Layout

BLANK = bytes(24)  # the fixed part of a GGUF header


def resolve_target(path: Path) -> Path:
    """Resolve the path of an output: of a symbolic link its target.

    Raises OutputRefused for what is no regular file, before anything is made beside it.
    """
    try:
        target = Path(os.path.realpath(path))
        kind = irregular_kind(target.stat())
    except ValueError as error:  # a NUL byte
        raise OutputRefused(path, "is not a usable path") from error
    except OSError:
        return target
    if kind is not None:
        raise OutputRefused(path, f"is {kind}, not a regular file", hint="choose another output")
    return target


class PartFile:
    """A file of `size` bytes that will be at `path`. Use as a context manager: leaving it unpublished removes it.

    Opening checks everything before a byte is written: raises OutputRefused where `path` is taken (`force` allows
    replacing a regular file), is one of the inputs (which nothing allows) or is being written by another run, and where
    the part file is not ours; InputOutputError where there is no room or no permission. A symbolic link is followed to
    its target. `warnings` are the guarantees that the file system cannot give.

    keep: the contents that an earlier run left in the part file stay until `begin`, `found` tells whether they have the
    right size; leaving does not remove the file, `abandon` does if it is of this run, `discard` if it is of any run.
    """

    def __init__(self, path: Path, size: int, *, force: bool, keep: bool = False) -> None:
        self.path, self.size, self.warnings = Path(path), size, list[str]()
        self._force, self._keep = force, keep
        self.target = resolve_target(path)
        self.file = self.target.with_name(self.target.name + ".part")
        self._check_target()
        self._sync_error: InputOutputError | None = None
        self._opened = self._acquire()
        n_found = self._n_bytes()
        self.found, self._is_new = keep and n_found == size > 0, not n_found
        try:
            self._check_target()  # again: another run may have published it just before our lock
            if not keep:
                check_space(self.target.parent, size, [self.file])
                self.begin()
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keep:
            self.close()
        else:
            self.abandon()

    def begin(self, *, known: bool = False) -> None:
        """Replace the file found by an empty one with room for the whole size.

        Raises OutputRefused as `check_ours` does, InputOutputError where there is no room.
        """
        if self._n_bytes():
            self.check_ours(known=known)
            # removed, not truncated: its name may be a second link to a file that somebody wants
            self.file.unlink()
            old, self._opened = self._opened, self._acquire()
            old.close()
        self._is_new = True
        self._reserve()

    def check_size(self) -> None:
        """Raise InputOutputError where a limit of the process forbids a file of this size."""
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if most != resource.RLIM_INFINITY and self.size > most:
            raise self._no_room(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))

    def resume(self, *, known: bool) -> None:
        """Keep the contents found, without the header that the earlier run may have written. Raises as `begin` does."""
        self.check_ours(known=known)
        self.blank()

    def check_ours(self, *, known: bool) -> None:
        """Raise OutputRefused where the file found is not an unfinished output.

        known: a journal shows that an earlier run wrote it. Without one only an empty file is taken, and one that has
        the final name too.
        """
        if not known and self._n_bytes() and not self._is_target():
            hint = "it stands where the unfinished output goes; move it away"
            raise OutputRefused(self.file, "is not an unfinished output of this command", hint=hint)

    def is_blank(self) -> bool:
        """Return whether the file begins like an output without its header."""
        with self._opened.use() as descriptor:
            return not any(os.pread(descriptor, len(BLANK), 0))

    def has_part_of(self, layout: Layout) -> bool:
        """Return whether the file begins with bytes of its header, with any digests, and zeros.

        A run that stopped while it wrote the header leaves it so.
        """
        header, (start, stop) = layout.header, layout.digests
        with self._opened.use() as descriptor:
            found = os.pread(descriptor, len(header), 0)
        rest = found[:start] + header[start:stop] + found[stop:]
        return len(found) == len(header) and all(map(_is_zero_or, rest, header))

    def has_bytes(self, offset: int, n_bytes: int, sha256: object) -> bool:
        """Return whether the file has `n_bytes` at `offset` whose digest, in hex, is `sha256`."""
        if not 0 <= offset < offset + n_bytes <= self._n_bytes():
            return False
        data = bytearray(n_bytes)
        self.read_at(offset, memoryview(data))
        return hashlib.sha256(data).hexdigest() == sha256

    def abandon(self) -> None:
        """Release the lock, and remove the file if `begin` made it."""
        if self._is_new:
            self.remove()
        else:
            self.close()

    def remove(self) -> None:
        """Remove the file, if it is still the one that was opened, and release the lock."""
        if not self._opened.is_closed:
            with contextlib.suppress(OSError), self._opened.use() as descriptor:
                if self._is_part(descriptor):
                    self.file.unlink()
            self.close()

    def write_at(self, offset: int, data: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Write `data`, bytes or a contiguous array of plain numbers, at `offset`; safe from any thread.

        Raises InputOutputError naming the bytes that could not be written.
        """
        view = memoryview(data)  # type: ignore[arg-type]
        view = view.cast("B") if view.nbytes else memoryview(b"")  # a view with a zero in its shape cannot be cast
        assert 0 <= offset <= offset + len(view) <= self.size, (offset, len(view), self.size)
        with self._opened.use() as descriptor:
            write_from(self.file, descriptor, view, offset)

    def read_at(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on; safe from any thread. Raises as `read_into`."""
        with self._opened.use() as descriptor:
            read_into(self.file, descriptor, target, offset)

    def sync(self) -> None:
        """Wait until the data is on disk. Raises InputOutputError; the caller must not try again.

        After a failure the kernel may have dropped the pages and report success for the next attempt.
        """
        with self._opened.use() as descriptor:
            self._flush(descriptor)

    def blank(self) -> None:
        """Remove the header that an earlier run may have written, and the final name, if it has that too."""
        if self._is_target():
            self.target.unlink()
            sync_folder(self.target.parent)  # before the header goes: no name may be that of half a file
        self.write_at(0, BLANK)

    def seal(self, header: bytes) -> None:
        """Write the header, last of all, and read it back strictly.

        Raises InputOutputError where the system fails or the header does not read back as it was written.
        """
        self.sync()  # no header on disk before the data it vouches for
        self.write_at(0, header)
        self.sync()
        found = self._read_back(header)
        if found.data_start != len(header) or found.file_size != self.size:
            raise InputOutputError(self.file, "does not read back as it was written")

    def put_in_place(self) -> None:
        """Give the sealed file its name in one atomic step, and wait until the folder is on disk.

        Raises OutputRefused where the name has been taken meanwhile, InputOutputError where the system fails.
        """
        with self._opened.use() as descriptor:
            if not self._is_part(descriptor):
                raise InputOutputError(self.file, "was moved or replaced while it was being written")
        replaced = self._check_target()
        try:
            with self._opened.use() as descriptor:
                is_restricted = restrict(descriptor, replaced)
            if not is_restricted:
                self.warnings.append("the output's file system keeps no permissions: others may read the output")
            self._rename()
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            raise InputOutputError(self.target, f"cannot be put in place: {error.strerror}") from error
        self.close()
        if not sync_folder(self.target.parent):
            self.warnings.append("the output's file system flushes no folders: a power cut may undo the new name")

    def publish(self, header: bytes) -> None:
        """Seal it and put it in place."""
        self.seal(header)
        self.put_in_place()

    def _check_target(self) -> os.stat_result | None:
        """Refuse a target that must not be replaced, and return its status; run again before publishing."""
        try:
            status = self.target.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        kind = irregular_kind(status)
        if kind is not None:
            raise OutputRefused(self.path, f"is {kind}, not a regular file", hint="choose another output")
        if is_input(status):
            what = f"is one of the inputs ({printable(str(self.target))})"
            raise OutputRefused(self.path, what, hint="--force does not help; choose another output")
        if not self._force:
            raise self._taken()
        return status

    def _unusable(self, error: OSError | ValueError) -> BadInput:
        if isinstance(error, ValueError):
            return OutputRefused(self.path, "is not a usable path")
        if error.errno == errno.ELOOP:
            return OutputRefused(self.path, "is a loop of symbolic links")
        return InputOutputError(self.path, f"cannot be written: {error.strerror}")

    def _taken(self) -> OutputRefused:
        return OutputRefused(self.path, "already exists", hint="--force replaces it")

    def _acquire(self) -> OpenFile:
        """Open and lock the part file, made if missing. Raises OutputRefused where another run has it."""
        identities: list[Identity] = []

        def make() -> int:
            descriptor = self._open_locked()
            identities.append(identity(os.fstat(descriptor)))
            return descriptor

        def remake() -> int:
            descriptor = self._open_locked()
            if identity(os.fstat(descriptor)) != identities[0]:
                os.close(descriptor)
                raise InputOutputError(self.file, "was moved or replaced while it was being written")
            return descriptor

        return OpenFile(make, remake, self._flush)  # its data is on disk before it is closed: a failure shows only once

    def _open_locked(self) -> int:
        names = 2 if self._is_target() else 1
        descriptor = Sidecar(self.file, "an unfinished output", names=names).open_or_make()
        try:
            # check the name again: its last owner may have published, and a new one begun, before the lock
            if lock_file(self.file, descriptor, self.warnings) and self._is_part(descriptor):
                return descriptor
            raise OutputRefused(self.path, f"another run is writing it, in {printable(self.file.name)}")
        except BaseException:
            os.close(descriptor)
            raise

    def _flush(self, descriptor: int) -> None:
        try:
            if self._sync_error is not None:
                raise self._sync_error
            os.fdatasync(descriptor)
        except OSError as error:
            self._sync_error = InputOutputError(self.file, f"flushing to disk failed: {error.strerror}")
            raise self._sync_error from error

    def _n_bytes(self) -> int:
        with self._opened.use() as descriptor:
            return os.fstat(descriptor).st_size

    def _is_part(self, descriptor: int) -> bool:
        """Return whether the part file's name is still that of the open file, as it must be while the lock is held."""
        try:
            return identity(self.file.lstat()) == identity(os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _is_target(self) -> bool:
        """Return whether .part and target are hard links to one file: a run stopped between link and removal."""
        with contextlib.suppress(OSError):
            return self.file.samefile(self.target)
        return False

    def _reserve(self) -> None:
        """Allocate the whole size, so that a full disk fails now and not after hours."""
        with self._opened.use() as descriptor:
            try:
                if self.size:
                    os.posix_fallocate(descriptor, 0, self.size)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise self._no_room(error) from error
                try:
                    os.ftruncate(descriptor, self.size)
                except OSError as second:
                    raise self._no_room(second) from second
                self.warnings.append("the output's file system reserves no space: a full disk may show late")

    def _no_room(self, error: OSError) -> InputOutputError:
        what = f"{format_size(self.size)} cannot be reserved: {error.strerror}"
        return InputOutputError(self.file, what, hint=room_hint(error, self.file))

    def _read_back(self, header: bytes) -> Header:
        try:
            with self._opened.use() as descriptor:
                parsed = read_header(self.file, descriptor)
                same = os.pread(descriptor, len(header), 0) == header
        except (BadInput, OSError) as error:
            raise InputOutputError(self.file, f"does not read back as a sound GGUF file: {error}") from error
        if not same:
            raise InputOutputError(self.file, "does not read back as it was written")
        return parsed

    def _rename(self) -> None:
        if self._force:
            os.replace(self.file, self.target)  # noqa: PTH105, atomic
            return
        try:
            os.link(self.file, self.target)  # unlike a rename, a link never replaces what appeared meanwhile
        except OSError as error:
            if error.errno not in NOT_SUPPORTED | {errno.EMLINK}:
                raise
            self.warnings.append("the output's file system has no hard links: its name was checked, then taken")
            if os.path.lexists(self.target):
                raise self._taken() from None
            os.rename(self.file, self.target)  # noqa: PTH104
            return
        self.file.unlink()

    def close(self) -> None:
        """Release the lock, and leave the file; may be called more than once."""
        self._opened.close()


def check_place(path: Path, size: int, *, force: bool, has_journal: bool, discards: bool = False) -> None:
    """Raise what would keep a PartFile of `size` bytes from being made at `path`, and leave no file there.

    has_journal: an earlier run left its journal there. discards: what it left is to be discarded.
    """
    part = PartFile(path, size, force=force, keep=True)
    try:
        if not discards:
            part.check_ours(known=has_journal and part.is_blank())
        part.check_size()
    finally:
        part.abandon()


def _is_zero_or(found: int, expected: int) -> bool:
    return found in (0, expected)
