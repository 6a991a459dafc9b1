"""Writer of a conversion's tensors on a cluster: workers write pieces to the shared output and find peaks.

A task is a piece: rows of a tensor that become bytes at a known place. A worker opens source and output by itself and
flushes what it wrote before it reports it; only digests and errors travel. A worker that was taken for dead may write
once more: the same bytes at the same place, which does no harm. The digest of a tensor of several pieces is computed by
one more task, which finds any piece that did not arrive on the storage as it was written.
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
from requant.container.remote import (
    RemoteOutput,
    RemoteReader,
    RemoteSource,
    RemoteWriter,
    remote_output,
    remote_sources,
)
from requant.container.source import Source
from requant.conversion.chunks import (
    COPY_BYTES,
    Piece,
    TensorJob,
    find_peaks,
    name_tensor_in_errors,
    read_chunk,
    split_into_pieces,
    write_chunk,
)
from requant.conversion.record import Anomalies
from requant.conversion.write import (
    NOT_AS_RECORDED,
    PieceBuilder,
    WrittenPiece,
    check_source_rows,
    find_recorded,
    index_records,
    write_pieces,
)
from requant.errors import InputOutputError, NumericFault, quote
from requant.formats.codec import Floats


@dataclass(frozen=True, slots=True)
class _PackedPiece:
    """A piece for another machine; importance: of its job, only for the matrices from `first` of `n` on."""

    origin: RemoteSource
    piece: Piece
    importance: Floats | None = None
    first: int = 0
    n: int = 0

    def unpack(self) -> Piece:
        """Return the piece with its importance, which is 0 for the matrices that it does not touch."""
        if self.importance is None:
            return self.piece
        importance = np.zeros((self.n, self.importance.shape[1]), np.float32)
        importance[self.first : self.first + len(self.importance)] = self.importance
        return _replace_importance(self.piece, importance)


@dataclass(frozen=True, slots=True)
class _WriteTask:
    """A piece to write; recorded: its digest and that of its source, as an earlier run recorded them, or None.

    A piece that still has its digest is not written.
    """

    packed: _PackedPiece
    target: RemoteOutput
    recorded: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class _WriteResult:
    """The result of a `_WriteTask`; errors: those of `WrittenPiece`, None where the bytes are of an earlier run."""

    sha256: str
    source_sha256: str
    errors: tuple[float, ...] | None
    anomalies: Anomalies
    is_new: bool


@dataclass(frozen=True, slots=True)
class _HashTask:
    """A tensor to hash; its pieces, of `sizes` bytes, follow each other in the output from `offset` on."""

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
    info: Callable[[str], None],
) -> Generator[WrittenPiece, None, None]:
    """Write as `write_pieces` does, by the workers of `cluster`; `progress` gets the source bytes of each piece.

    Raises what `Cluster.run` raises, and InputOutputError where a worker sees another storage than this process.
    """
    if output.is_published:  # nothing to write, and no unfinished output for workers to open
        yield from write_pieces(source, output, jobs, threads=1, progress=progress, info=info)
        return
    held: WrittenPiece | None = None  # the last piece of a tensor whose digest is still to come
    try:
        with contextlib.closing(cluster.run(_make_steps(source, output, jobs))) as steps:
            for step in steps:
                if held is not None:
                    yield replace(held, tensor_sha256=step.result)
                    held = None
                    continue
                written = _unpack_result(step.about, step.result, info)
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
) -> Generator[tuple[list[float], str], None, None]:
    """The result of `find_peaks` for each of `pieces`, in their order."""
    origins = remote_sources(source)
    packed = (_PackedPiece(origins[piece.job.tensor.file], _replace_importance(piece, None)) for piece in pieces)
    return cluster.in_order(_find_peaks, packed, lambda found: f"tensor {quote(found.piece.name)}")


def _make_steps(source: Source, output: Output, jobs: Sequence[TensorJob]) -> Iterator[Step]:
    """Return a step for each piece, and one for the digest of each tensor of several pieces."""
    origins = remote_sources(source)
    targets = [remote_output(i, path) for i, path in enumerate(output.part_files)]
    lines = index_records(output.records)
    for job in jobs:
        name, pieces = f"tensor {quote(job.tensor.name)}", list[Step]()
        sizes = []
        for piece in split_into_pieces(job):
            before = find_recorded(piece, lines)
            packed = _pack_piece(origins[job.tensor.file], piece)
            recorded = None if before is None else (before.sha256, before.source_sha256)
            task = _WriteTask(packed, targets[job.file], recorded)
            pieces.append(Step(_write_piece, task, name, about=(piece, before)))
            sizes.append(piece.n_bytes)
            yield pieces[-1]
        if len(pieces) > 1:
            tensor = _HashTask(job.tensor.name, targets[job.file], job.offset, tuple(sizes))
            yield Step(_hash_tensor, tensor, name, after=tuple(pieces))


def _pack_piece(origin: RemoteSource, piece: Piece) -> _PackedPiece:
    """Return the piece with only the importance that its rows need: that of hundreds of experts is megabytes."""
    whole = piece.job.importance
    if whole is None:
        return _PackedPiece(origin, piece)
    n = len(whole)
    first, last = (piece.chunks[i].first_row * n // piece.job.tensor.n_rows for i in (0, -1))
    return _PackedPiece(origin, _replace_importance(piece, None), whole[first : last + 1], first, n)


def _replace_importance(piece: Piece, importance: Floats | None) -> Piece:
    job = replace(piece.job, importance=importance)
    return Piece(piece.number, tuple(replace(chunk, job=job) for chunk in piece.chunks))


def _unpack_result(
    about: tuple[Piece, WrittenPiece | None], found: _WriteResult, info: Callable[[str], None]
) -> WrittenPiece:
    piece, before = about
    if before is not None and found.is_new:
        info(NOT_AS_RECORDED.format(quote(piece.name)))
    whole = found.sha256 if piece.is_last and not piece.number else None
    if before is not None and not found.is_new:
        return replace(before, tensor_sha256=whole)
    errors = None if found.errors is None else np.array(found.errors)
    digests = found.sha256, found.source_sha256
    return WrittenPiece(piece, *digests, errors, found.anomalies, tensor_sha256=whole)


def _write_piece(task: _WriteTask) -> _WriteResult:
    """Write the piece on a worker, if it is not there, and wait until it is on disk."""
    piece = task.packed.unpack()
    with RemoteWriter(task.target) as output, RemoteReader(task.packed.origin) as source:
        builder = PieceBuilder()
        if task.recorded is not None:
            sha256, source_sha256 = task.recorded
            for chunk in piece.chunks:
                builder.add(piece, read_chunk(source, output, chunk))
            if builder.source_sha256 != source_sha256:
                check_source_rows(source, piece, source_sha256)
            if builder.sha256 == sha256:
                return _WriteResult(sha256, source_sha256, None, Anomalies(), is_new=False)
        try:
            for chunk in piece.chunks:
                builder.add(piece, write_chunk(source, output, chunk))
        finally:
            source.check_unchanged()  # implausible numbers may come from a file that is being replaced
        with name_tensor_in_errors(piece.job):
            output.sync()
    made = builder.build(piece, None)
    figures = None if made.errors is None else tuple(made.errors.tolist())
    return _WriteResult(made.sha256, made.source_sha256, figures, made.anomalies, is_new=True)


def _hash_tensor(tensor: _HashTask, *results: _WriteResult) -> str:
    """Hash a whole tensor on a worker. Raises InputOutputError where a piece does not read back as it was written."""
    whole, offset = hashlib.sha256(), tensor.offset
    with RemoteWriter(tensor.target) as output:
        for n_bytes, written in zip(tensor.sizes, results, strict=True):
            digest = hashlib.sha256()
            for start in range(offset, offset + n_bytes, COPY_BYTES):
                data = memoryview(bytearray(min(COPY_BYTES, offset + n_bytes - start)))
                output.read_at(tensor.target.index, start, data)
                digest.update(data)
                whole.update(data)
            offset += n_bytes
            if digest.hexdigest() != written.sha256:
                what = f"tensor {quote(tensor.name)} does not read back on {platform.node()} as it was written"
                raise InputOutputError(output.path, what, hint="do all workers see the same storage?")
    return whole.hexdigest()


def _find_peaks(packed: _PackedPiece) -> tuple[list[float], str]:
    with RemoteReader(packed.origin) as source:
        return find_peaks(source, packed.piece)
