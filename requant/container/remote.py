"""Files on storage that several machines share, named so that each can open them and see that they are the right ones.

Paths must be the same everywhere. Devices are numbered by each machine for itself and say nothing; a source is known by
its size, its time and its header, an unfinished output by its size, its inode and the zeros where its header will be.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from requant.common.files import irregular, open_regular, read_into, write_from
from requant.container.part import BLANK
from requant.container.source import Source, SourceTensor
from requant.errors import BadInput, InputOutputError, SourceChanged

if TYPE_CHECKING:
    import numpy as np

_HINT = "source and output must be on storage that driver and workers share, under the same path"


class Readable(Protocol):
    """What rows are read from: a Source, or one file of it on another machine."""

    @property
    def path(self) -> Path:
        """The file, or the first of them."""

    @property
    def files(self) -> Sequence[Path] | Mapping[int, Path]:
        """Its files by number."""

    @property
    def preserved(self) -> Container[str]:
        """Tensors that stay as they are whatever they hold."""

    def read_rows(self, tensor: SourceTensor, first_row: int, n_rows: int) -> np.ndarray:
        """As `Source.read_rows`."""


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """A file of a source, which is the `index`-th of them, as the driver opened it."""

    path: Path
    index: int
    size: int
    mtime_ns: int
    data_start: int
    header_sha256: str
    preserved: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoteOutput:
    """A file of an output that is being filled, the `index`-th of them, as the driver made it."""

    path: Path
    index: int
    size: int
    inode: int


def remote_sources(source: Source) -> tuple[RemoteSource, ...]:
    """The files of `source`, for others."""
    return tuple(
        RemoteSource(
            path=f.path.absolute(),
            index=i,
            size=f.status.st_size,
            mtime_ns=f.status.st_mtime_ns,
            data_start=f.header.data_start,
            header_sha256=f.header.sha256,
            preserved=tuple(source.preserved),
        )
        for i, f in enumerate(source.opened)
    )


def remote_outputs(index: int, path: Path) -> RemoteOutput:
    """The file of an output at `path`, for others."""
    status = path.stat()
    return RemoteOutput(path.absolute(), index, status.st_size, status.st_ino)


class Reader:
    """A file of a source opened on another machine, for rows of its tensors. Use as a context manager."""

    def __init__(self, origin: RemoteSource) -> None:
        self.path, self._origin = origin.path, origin
        self.files: Mapping[int, Path] = {origin.index: origin.path}
        self.preserved = origin.preserved
        try:
            self._descriptor = open_regular(origin.path)
        except BadInput as error:  # no fault of the file's: this machine sees another storage
            raise InputOutputError(error.path, f"on {platform.node()}: {error.what}", hint=_HINT) from error
        try:
            self.check_unchanged()
            status = os.fstat(self._descriptor)
            found = _digest(origin.path, origin.data_start, status.st_ino, status.st_size, status.st_mtime_ns)
            if found != origin.header_sha256:
                raise SourceChanged(origin.path, f"has another header on {platform.node()}", hint=_HINT)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read_rows(self, tensor: SourceTensor, first_row: int = 0, n_rows: int | None = None) -> np.ndarray:
        """As `Source.read_rows`."""
        import numpy as np

        assert tensor.file == self._origin.index
        n = tensor.n_rows - first_row if n_rows is None else n_rows
        rows = np.empty((n, tensor.row_bytes if tensor.n_rows else 0), np.uint8)
        if rows.size:
            offset = self._origin.data_start + tensor.info.offset + first_row * tensor.row_bytes
            read_into(self.path, self._descriptor, rows.reshape(-1).data, offset)
        return rows

    def check_unchanged(self) -> None:
        """Raise SourceChanged, naming the field, if the file is not as the driver opened it."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise SourceChanged(self.path, f"cannot be looked at on {platform.node()}: {error.strerror}") from error
        wanted = self._origin
        for name, before, after in (("size", wanted.size, now.st_size), ("mtime_ns", wanted.mtime_ns, now.st_mtime_ns)):
            if before != after:
                what = f"changed while it was being read: {name} was {before}, now {after} on {platform.node()}"
                raise SourceChanged(self.path, what)


class Writer:
    """A file of an unfinished output opened on another machine, never made. Use as a context manager.

    What is written, one range from its start on, is kept until `sync` writes it in one go. With O_DSYNC an NFS client
    sends just these bytes; else it may send whole pages, and with them what it remembers of other machines' bytes.
    """

    def __init__(self, target: RemoteOutput) -> None:
        self.path, self._target = target.path, target
        self._offset, self._data = 0, bytearray()
        flags = os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptor = os.open(target.path, flags)
        except OSError as error:
            what = f"cannot be opened on {platform.node()}: {error.strerror}"
            raise InputOutputError(target.path, what, hint=_HINT) from error
        status = os.fstat(self._descriptor)
        same = irregular(status) is None and (status.st_size, status.st_ino) == (target.size, target.inode)
        if not same or os.pread(self._descriptor, len(BLANK), 0) != BLANK:
            os.close(self._descriptor)
            raise InputOutputError(target.path, f"is not the unfinished output on {platform.node()}", hint=_HINT)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write_at(self, file: int, offset: int, data: np.ndarray) -> None:
        """Have `data` at `offset`, where the last ended, when `sync` has returned."""
        if not self._data:
            self._offset = offset
        assert (file, offset) == (self._target.index, self._offset + len(self._data))
        self._data += data.reshape(-1).data

    def read_at(self, file: int, offset: int, target: memoryview) -> None:
        """As `Output.read_at`."""
        assert file == self._target.index
        read_into(self.path, self._descriptor, target, offset)

    def sync(self) -> None:
        """Write what was given, and wait until it is on disk. Raises InputOutputError."""
        assert len(BLANK) <= self._offset <= self._offset + len(self._data) <= self._target.size
        with memoryview(self._data) as data:
            write_from(self.path, self._descriptor, data, self._offset)
        self._data = bytearray()


@functools.lru_cache(maxsize=1024)  # shards; once a worker is enough, a header has up to 24 MiB
def _digest(path: Path, n_bytes: int, *_: int) -> str:
    descriptor = open_regular(path)
    try:
        data = bytearray(n_bytes)
        read_into(path, descriptor, memoryview(data), 0)
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).hexdigest()
