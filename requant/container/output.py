"""Output: OUT.part, filled by positional writes from any thread and published in one step when it is whole.

The first bytes stay zero until the end, so that nothing takes an unfinished file for a model. The journal that lets
an interrupted run resume belongs here, beside the part file; without it an unpublished part is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from requant.container.files import Identity, identity, irregular
from requant.container.header import read_header
from requant.errors import BadInput, InputOutputError, OutputRefused, printable
from requant.units import format_size

if TYPE_CHECKING:
    import numpy as np

_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOLCK}


class Output:
    """An output of `size` bytes at `path`. Use as a context manager: leaving it unpublished removes the part file.

    Opening checks everything before a byte is written: raises OutputRefused where `path` is taken (`force` allows
    replacing a regular file), is one of `inputs` (which nothing allows) or is being written by another run, and
    InputOutputError where there is no room or no permission. A symbolic link is followed to its target.
    `warnings` are the guarantees that the file system cannot give.
    """

    def __init__(self, path: Path, size: int, *, force: bool, inputs: frozenset[Identity]) -> None:
        self.path, self.size, self.warnings = Path(path), size, list[str]()
        self._force, self._inputs = force, inputs
        self._target = Path(os.path.realpath(path))
        self._part = self._target.with_name(self._target.name + ".part")
        self._check_target()
        _check_space(self._target.parent, size, self._part)
        self._descriptor = self._create()
        try:
            self._check_target()  # again: another run may have published it just before our lock
            self._reserve()
        except BaseException:
            self._discard()
            raise

    @property
    def part(self) -> Path:
        """The file being filled."""
        return self._part

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write_at(self, offset: int, data: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Write `data`, bytes or a contiguous array of plain numbers, at `offset`; safe from any thread.

        Raises InputOutputError naming the bytes that could not be written.
        """
        view = memoryview(data)  # type: ignore[arg-type]
        view = view.cast("B") if view.nbytes else memoryview(b"")  # a view with a zero in its shape cannot be cast
        assert 0 <= offset <= offset + len(view) <= self.size, (offset, len(view), self.size)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                what = f"writing {len(view) - done} bytes at offset {offset + done} failed: {error.strerror}"
                raise InputOutputError(self._part, what, hint=_hint(error, self._target.parent)) from error

    def publish(self, header: bytes) -> None:
        """Write the header, last of all, read it back strictly, and give the file its name in one atomic step.

        Raises OutputRefused where the name has been taken meanwhile, InputOutputError where the system fails or
        reads back something else than was written.
        """
        self._sync(self._descriptor, self._part)  # no header on disk before the data it vouches for
        self.write_at(0, header)
        self._sync(self._descriptor, self._part)
        self._read_back(header)
        if not self._is_part(self._descriptor):
            raise InputOutputError(self._part, "was moved or replaced while it was being written")
        self._check_target()
        try:
            self._rename()
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            raise InputOutputError(self._target, f"cannot be put in place: {error.strerror}") from error
        self._close()
        self._sync_folder()

    def _check_target(self) -> None:
        """Refuse a target that must not be replaced; run again before publishing."""
        try:
            status = self._target.stat()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        kind = irregular(status)
        if kind is not None:
            raise OutputRefused(self.path, f"is {kind}, not a regular file", hint="choose another output")
        if identity(status) in self._inputs:
            what = f"is one of the inputs ({printable(str(self._target))})"
            raise OutputRefused(self.path, what, hint="--force does not help; choose another output")
        if not self._force:
            raise self._taken()

    def _unusable(self, error: OSError | ValueError) -> BadInput:
        if isinstance(error, ValueError):
            return OutputRefused(self.path, "is not a usable path")
        if error.errno == errno.ELOOP:
            return OutputRefused(self.path, "is a loop of symbolic links")
        return InputOutputError(self.path, f"cannot be written: {error.strerror}")

    def _taken(self) -> OutputRefused:
        return OutputRefused(self.path, "already exists", hint="--force replaces it")

    def _create(self) -> int:
        """A locked descriptor of a part file that this run has made."""
        try:
            self._remove_stale_part()
            # the umask applies: other users may read the model as they may any file made here
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._part, flags, 0o666)
        except FileExistsError as error:
            raise self._busy() from error
        except OSError as error:
            raise InputOutputError(self._part, f"cannot be created: {error.strerror}") from error
        if not self._lock(descriptor) or not self._is_part(descriptor):
            os.close(descriptor)
            raise self._busy()
        return descriptor

    def _is_part(self, descriptor: int) -> bool:
        """Whether the part file's name still stands for the open file; true to the end where its lock is held."""
        try:
            return identity(self._part.lstat()) == identity(os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _remove_stale_part(self) -> None:
        """Remove the part file of a run that is dead, which is one whose lock is free."""
        try:
            status = self._part.lstat()
        except FileNotFoundError:
            return
        kind = irregular(status)
        if kind is not None or identity(status) in self._inputs:
            what = f"is {kind}, not a regular file" if kind else "is one of the inputs"
            raise OutputRefused(self._part, what, hint="it stands where the unfinished output goes; move it away")
        descriptor = os.open(self._part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # the name is looked at again: its last owner may have published, and a new one begun, before the lock
            if not self._lock(descriptor) or not self._is_part(descriptor):
                raise self._busy()
            # not truncated but removed: its name may be a second link to a file that somebody wants
            self._part.unlink()
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Whether the file is ours alone; True, with a warning, where the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise InputOutputError(self._part, f"cannot be locked: {error.strerror}") from error
            self.warnings.append("the output's file system has no locks: do not start a second run on it")
        return True

    def _busy(self) -> OutputRefused:
        return OutputRefused(self.path, f"another run is writing it, in {printable(self._part.name)}")

    def _reserve(self) -> None:
        """Allocate the whole size, so that a full disk shows now and not after hours."""
        try:
            if self.size:
                os.posix_fallocate(self._descriptor, 0, self.size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise self._no_room(error) from error
            try:
                os.ftruncate(self._descriptor, self.size)
            except OSError as second:
                raise self._no_room(second) from second

    def _no_room(self, error: OSError) -> InputOutputError:
        what = f"{format_size(self.size)} cannot be reserved: {error.strerror}"
        return InputOutputError(self._part, what, hint=_hint(error, self._target.parent))

    def _sync(self, descriptor: int, path: Path) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:  # never tried again: the kernel may have dropped the pages and call the next one good
            raise InputOutputError(path, f"flushing to disk failed: {error.strerror}") from error

    def _read_back(self, header: bytes) -> None:
        try:
            parsed = read_header(self._part, self._descriptor)
            same = os.pread(self._descriptor, len(header), 0) == header
        except (BadInput, OSError) as error:
            raise InputOutputError(self._part, f"does not read back as a sound GGUF file: {error}") from error
        if not same or parsed.data_start != len(header) or parsed.file_size != self.size:
            raise InputOutputError(self._part, "does not read back as it was written")

    def _rename(self) -> None:
        if self._force:
            os.replace(self._part, self._target)  # noqa: PTH105, atomic
            return
        try:
            os.link(self._part, self._target)  # unlike a rename, a link never replaces what appeared meanwhile
        except FileExistsError:
            raise
        except OSError:
            self.warnings.append("the output's file system has no hard links: its name was checked, then taken")
            if os.path.lexists(self._target):
                raise self._taken() from None
            os.rename(self._part, self._target)  # noqa: PTH104
            return
        self._part.unlink()

    def _sync_folder(self) -> None:
        try:
            folder = os.open(self._target.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        except OSError:
            return  # a folder that may be written but not read; the file itself is safe
        try:
            self._sync(folder, self._target.parent)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        """Remove the part file if it is still the one this run made, then let go of the lock."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._is_part(self._descriptor):
                    self._part.unlink()
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def _check_space(folder: Path, need: int, part: Path) -> None:
    """Raise InputOutputError where `folder` has less than `need` bytes free, a part to be overwritten counted in."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise InputOutputError(folder, f"cannot be written to: {error.strerror}") from error
    if not status.f_blocks:
        return  # some network file systems do not say
    have = status.f_bavail * status.f_frsize
    with contextlib.suppress(OSError):
        have += part.lstat().st_blocks * 512
    if need > have:
        what = f"needs {format_size(need)} free but has {format_size(have)}"
        raise InputOutputError(folder, what, hint="free some space or choose another folder")


def _hint(error: OSError, folder: Path) -> str | None:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"free some space in {printable(str(folder))} and run it again"
    if error.errno == errno.EFBIG:
        return "the file system or a limit (ulimit -f) forbids files this large"
    return None
