"""Remote files: sources and outputs on shared storage that each machine opens by path and checks for identity.

Paths must be the same everywhere. Device numbers differ between machines; a source is identified by its size, time and
header, an unfinished output by its size, its inode and the zeros where its header will be.
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

from requant.common.files import irregular_kind, open_regular, read_into, write_from
from requant.container.part import BLANK
from requant.errors import BadInput, InputOutputError, SourceChanged

if TYPE_CHECKING:
    import numpy as np

    from requant.container.source import Source, SourceTensor

_HINT = "source and output must be on storage that driver and workers share, under the same path"


class Readable(Protocol):
    """A source of rows: a Source, or one file of it on another machine."""

    @property
    def path(self) -> Path:
        """The file, or the first of them."""

    @property
    def files(self) -> Sequence[Path] | Mapping[int, Path]:
        """Its files by number."""

    @property
    def preserved(self) -> Container[str]:
        """Tensors that are copied even where they are not finite."""

    def read_rows(self, tensor: SourceTensor, first_row: int, n_rows: int) -> np.ndarray:
        """Read rows as `Source.read_rows` does."""


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """The `index`-th file of a source, as the driver opened it."""

    path: Path
    index: int
    size: int
    mtime_ns: int
    data_start: int
    header_sha256: str
    preserved: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoteOutput:
    """The `index`-th file of an unfinished output, as the driver made it."""

    path: Path
    index: int
    size: int
    inode: int


def remote_sources(source: Source) -> tuple[RemoteSource, ...]:
    """Describe the files of `source` for other machines."""
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


def remote_output(index: int, path: Path) -> RemoteOutput:
    """Describe the file of an output at `path` for other machines."""
    status = path.stat()
    return RemoteOutput(path.absolute(), index, status.st_size, status.st_ino)


class RemoteReader:
    """A file of a source opened on another machine to read rows of its tensors. Use as a context manager."""

    def __init__(self, origin: RemoteSource) -> None:
        self.path, self._origin = origin.path, origin
        self.files: Mapping[int, Path] = {origin.index: origin.path}
        self.preserved = origin.preserved
        try:
            self._descriptor = open_regular(origin.path)
        except BadInput as error:  # the file is sound, but this machine sees another storage
            raise InputOutputError(error.path, f"on {platform.node()}: {error.what}", hint=_HINT) from error
        try:
            self.check_unchanged()
            status = os.fstat(self._descriptor)
            found = _hash_header(origin.path, origin.data_start, status.st_ino, status.st_size, status.st_mtime_ns)
            if found != origin.header_sha256:
                raise SourceChanged(origin.path, f"has another header on {platform.node()}", hint=_HINT)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read_rows(self, tensor: SourceTensor, first_row: int = 0, n_rows: int | None = None) -> np.ndarray:
        """Read rows as `Source.read_rows` does."""
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


class RemoteWriter:
    """An existing file of an unfinished output opened on another machine. Use as a context manager.

    One contiguous range is buffered; `sync` writes it in one call. With O_DSYNC an NFS client sends just these bytes;
    otherwise it may send whole pages, and with them stale copies of other machines' bytes.
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
        same = irregular_kind(status) is None and (status.st_size, status.st_ino) == (target.size, target.inode)
        if not same or os.pread(self._descriptor, len(BLANK), 0) != BLANK:
            os.close(self._descriptor)
            raise InputOutputError(target.path, f"is not the unfinished output on {platform.node()}", hint=_HINT)

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write_at(self, file: int, offset: int, data: np.ndarray) -> None:
        """Keep `data` for `sync` to write at `offset`, where the last data ended."""
        if not self._data:
            self._offset = offset
        assert (file, offset) == (self._target.index, self._offset + len(self._data))
        self._data += data.reshape(-1).data

    def read_at(self, file: int, offset: int, target: memoryview) -> None:
        """Fill `target` as `Output.read_at` does."""
        assert file == self._target.index
        read_into(self.path, self._descriptor, target, offset)

    def sync(self) -> None:
        """Write the kept data, and wait until it is on disk. Raises InputOutputError."""
        assert len(BLANK) <= self._offset <= self._offset + len(self._data) <= self._target.size
        with memoryview(self._data) as data:
            write_from(self.path, self._descriptor, data, self._offset)
        self._data = bytearray()


@functools.lru_cache(maxsize=1024)  # shards; a header has up to 24 MiB, so each worker hashes it once
def _hash_header(path: Path, n_bytes: int, *_: int) -> str:
    descriptor = open_regular(path)
    try:
        data = bytearray(n_bytes)
        read_into(path, descriptor, memoryview(data), 0)
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).hexdigest()
