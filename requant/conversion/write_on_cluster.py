"""What the workers of a cluster do for a conversion: pieces written to the shared output, peaks looked for.

A task is a piece: rows of a tensor that become bytes at a known place. A worker opens source and output by itself and
flushes what it wrote before it says so; only digests and errors travel. A worker that was taken for dead may write once
more: the same bytes at the same place, which does no harm. Of a tensor of several pieces the digest is taken by one
more task, which finds any piece that did not arrive on the storage as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant.common.cluster import Cluster, Step
from requant.container.output import Output
from requant.container.remote import Reader, RemoteOutput, RemoteSource, Writer, remote_outputs, remote_sources
from requant.container.source import Source
from requant.conversion.chunks import (
    COPY_BYTES,
    Piece,
    TensorJob,
    find_peak,
    naming_tensor,
    pieces_of,
    read_chunk,
    write_chunk,
)
from requant.conversion.record import Anomalies
from requant.conversion.write import NOT_AS_RECORDED, Tell, WrittenPiece, group_lines, read_recorded, write_pieces
from requant.errors import InputOutputError, NumericFault, quoted
from requant.formats.codec import Floats


@dataclass(frozen=True, slots=True)
class _Rows:
    """A piece as another machine reads it; importance: its job's, of the matrices from `first` of `n` on only."""

    origin: RemoteSource
    piece: Piece
    importance: Floats | None = None
    first: int = 0
    n: int = 0

    def whole(self) -> Piece:
        """The piece with the importance in its place; that of matrices which it does not touch is 0."""
        if self.importance is None:
            return self.piece
        importance = np.zeros((self.n, self.importance.shape[1]), np.float32)
        importance[self.first : self.first + len(self.importance)] = self.importance
        return _with(self.piece, importance)


@dataclass(frozen=True, slots=True)
class _Task:
    """A piece to be written; sha256: as an earlier run recorded it, then written only where it is not so."""

    rows: _Rows
    target: RemoteOutput
    sha256: str | None


@dataclass(frozen=True, slots=True)
class _Wrote:
    """What became of a task; errors: those of `WrittenPiece`, None where an earlier run's bytes were found."""

    sha256: str
    errors: tuple[float, ...] | None
    odd: Anomalies
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor whose pieces, of so many bytes, follow each other in the output from `offset` on."""

    name: str
    target: RemoteOutput
    offset: int
    sizes: tuple[int, ...]


def write_pieces_on_cluster(
    cluster: Cluster,
    source: Source,
    output: Output,
    jobs: Sequence[TensorJob],
    *,
    progress: Callable[[int], None],
    tell: Tell,
) -> Generator[WrittenPiece, None, None]:
    """As `write_pieces`, by the workers of `cluster`; `progress` is called with the source bytes of each piece.

    Raises what `Cluster.run` raises, and InputOutputError where a worker sees another storage than this process.
    """
    if output.is_published:  # there is nothing to write, and no unfinished output that workers could look at
        yield from write_pieces(source, output, jobs, threads=1, progress=progress, tell=tell)
        return
    held: WrittenPiece | None = None  # the last piece of a tensor whose digest is still to come
    try:
        with contextlib.closing(cluster.run(_steps(source, output, jobs))) as steps:
            for step in steps:
                if held is not None:
                    yield replace(held, tensor_sha256=step.result)
                    held = None
                    continue
                written = _written(step.about, step.result, tell)
                piece = written.piece
                progress(sum(chunk.n_rows for chunk in piece.chunks) * piece.job.tensor.row_bytes)
                if piece.is_last and piece.number:
                    held = written
                else:
                    yield written
    except (NumericFault, InputOutputError):
        source.check_unchanged()
        raise


def find_peaks_on_cluster(
    cluster: Cluster, source: Source, pieces: Iterable[Piece]
) -> Generator[list[float], None, None]:
    """The peak of every chunk of each of `pieces`, in their order."""
    origins = remote_sources(source)
    rows = (_Rows(origins[piece.job.tensor.file], _with(piece, None)) for piece in pieces)
    return cluster.in_order(_peaks, rows, lambda found: f"tensor {quoted(found.piece.name)}")


def _steps(source: Source, output: Output, jobs: Sequence[TensorJob]) -> Iterator[Step]:
    """A step for each piece, and one for the digest of each tensor that has several."""
    origins = remote_sources(source)
    targets = [remote_outputs(i, path) for i, path in enumerate(output.part_files)]
    lines = group_lines(output.records)
    for job in jobs:
        name, pieces = f"tensor {quoted(job.tensor.name)}", list[Step]()
        sizes = []
        for piece in pieces_of(job):
            before = read_recorded(piece, lines)
            rows = _cut(origins[job.tensor.file], piece)
            task = _Task(rows, targets[job.file], None if before is None else before.sha256)
            pieces.append(Step(_write, task, name, about=(piece, before)))
            sizes.append(piece.n_bytes)
            yield pieces[-1]
        if len(pieces) > 1:
            tensor = _Tensor(job.tensor.name, targets[job.file], job.offset, tuple(sizes))
            yield Step(_digest, tensor, name, after=tuple(pieces))


def _cut(origin: RemoteSource, piece: Piece) -> _Rows:
    """The piece with no more of the importance than its rows need: that of hundreds of experts is megabytes."""
    whole = piece.job.importance
    if whole is None:
        return _Rows(origin, piece)
    n = len(whole)
    first, last = (piece.chunks[i].first_row * n // piece.job.tensor.n_rows for i in (0, -1))
    return _Rows(origin, _with(piece, None), whole[first : last + 1], first, n)


def _with(piece: Piece, importance: Floats | None) -> Piece:
    job = replace(piece.job, importance=importance)
    return Piece(piece.number, tuple(replace(chunk, job=job) for chunk in piece.chunks))


def _written(about: tuple[Piece, WrittenPiece | None], found: _Wrote, tell: Tell) -> WrittenPiece:
    piece, before = about
    if before is not None and found.is_new:
        tell(NOT_AS_RECORDED.format(quoted(piece.name)))
    whole = found.sha256 if piece.is_last and not piece.number else None
    if before is not None and not found.is_new:
        return replace(before, tensor_sha256=whole)
    errors = None if found.errors is None else np.array(found.errors)
    return WrittenPiece(piece, found.sha256, errors, found.odd, whole)


def _write(task: _Task) -> _Wrote:
    """On a worker: write the piece, if it is not there, and wait until it is on disk."""
    piece = task.rows.whole()
    with Writer(task.target) as output, Reader(task.rows.origin) as source:
        if task.sha256 is not None:
            digest = hashlib.sha256()
            for chunk in piece.chunks:
                digest.update(read_chunk(output, chunk).data.reshape(-1).data)
            if digest.hexdigest() == task.sha256:
                return _Wrote(task.sha256, None, Anomalies(), is_new=False)
        digest, errors, odd = hashlib.sha256(), np.zeros(4), Anomalies()
        try:
            for chunk in piece.chunks:
                done = write_chunk(source, output, chunk)
                digest.update(done.data.reshape(-1).data)
                errors += 0 if done.errors is None else done.errors
                odd += done.odd
        finally:
            source.check_unchanged()  # numbers that make no sense may come from a file that is being replaced
        with naming_tensor(piece.job):
            output.sync()
    figures = None if piece.job.choice.copied else tuple(errors.tolist())
    return _Wrote(digest.hexdigest(), figures, odd, is_new=True)


def _digest(tensor: _Tensor, *wrote: _Wrote) -> str:
    """On a worker: the digest of a whole tensor, each piece of which must read back as it was written elsewhere."""
    whole, offset = hashlib.sha256(), tensor.offset
    with Writer(tensor.target) as output:
        for n_bytes, written in zip(tensor.sizes, wrote, strict=True):
            digest = hashlib.sha256()
            for start in range(offset, offset + n_bytes, COPY_BYTES):
                data = memoryview(bytearray(min(COPY_BYTES, offset + n_bytes - start)))
                output.read_at(tensor.target.index, start, data)
                digest.update(data)
                whole.update(data)
            offset += n_bytes
            if digest.hexdigest() != written.sha256:
                what = f"tensor {quoted(tensor.name)} does not read back on {platform.node()} as it was written"
                raise InputOutputError(output.path, what, hint="do all workers see the same storage?")
    return whole.hexdigest()


def _peaks(rows: _Rows) -> list[float]:
    """On a worker: the largest magnitude in each chunk of a piece."""
    with Reader(rows.origin) as source:
        return [find_peak(source, chunk) for chunk in rows.piece.chunks]
