"""Writer of a conversion's tensors, piece by piece in threads; it takes over what earlier runs wrote.

A recorded piece is read again; where its bytes are not those recorded, it is made again. Either way the output and
all figures are those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from requant.common.serialization import parse_record, to_plain
from requant.common.threads import in_order
from requant.container.journal import Line
from requant.container.output import Output
from requant.container.remote import Readable
from requant.container.source import Source
from requant.conversion.chunks import (
    Chunk,
    EncodedChunk,
    Piece,
    TensorJob,
    hash_rows,
    lost_weights_fault,
    read_chunk,
    split_into_pieces,
    write_chunk,
)
from requant.conversion.record import Anomalies, Compensation, Converted, SourceDigest
from requant.errors import BadInput, InputOutputError, NumericFault, SourceChanged, quote
from requant.formats import codec
from requant.formats.codec import Bytes

_CHECK_EVERY = 64  # chunks between two checks of the source for changes
_HEX = 64  # digits of a SHA-256
NOT_AS_RECORDED = "tensor {} is not as it was recorded; it is made again"

Sums = NDArray[np.float64]  # (4,), sums over rows of the columns of codec.row_errors


@dataclass(frozen=True, slots=True)
class WrittenPiece:
    """A piece as it stands in the output.

    sha256: of its bytes, in hex. source_sha256: of the rows of the source that it was made from. errors: None for a
    copy. compensation: of its tensor. tensor_sha256: with the last piece of a tensor, the digest of all bytes of the
    tensor. is_new: not from an earlier run.
    """

    piece: Piece
    sha256: str
    source_sha256: str
    errors: Sums | None
    anomalies: Anomalies
    compensation: Compensation | None = None
    tensor_sha256: str | None = None
    is_new: bool = True

    @property
    def line(self) -> Line:
        """Its record in the journal."""
        errors = None if self.errors is None else [float(e) for e in self.errors]
        digests = {"sha256": self.sha256, "source_sha256": self.source_sha256}
        line = {**self.piece.place, **digests, "errors": errors, "odd": to_plain(self.anomalies)}
        return line if self.compensation is None else line | {"compensation": to_plain(self.compensation)}


def find_recorded(piece: Piece, lines: Mapping[tuple[str, int], Line]) -> WrittenPiece | None:
    """The piece as it is recorded in `lines`; None where it is not, or where its record is not valid."""
    line = lines.get((piece.name, piece.number), {})
    if any(line.get(key) != value for key, value in piece.place.items()):
        return None
    sha256, source_sha256, errors = (line.get(key) for key in ("sha256", "source_sha256", "errors"))
    try:
        anomalies = parse_record(Anomalies, line.get("odd"), "odd", "")
        found = line.get("compensation")
        compensation = None if found is None else parse_record(Compensation, found, "compensation", "")
    except BadInput:
        return None
    if not _is_digest(sha256) or not _is_digest(source_sha256) or (errors is None) != piece.job.choice.copied:
        return None
    if errors is None:
        return WrittenPiece(piece, sha256, source_sha256, None, anomalies, is_new=False)
    if not isinstance(errors, list) or len(errors) != 4 or not all(type(e) is float and e >= 0 for e in errors):
        return None
    return WrittenPiece(piece, sha256, source_sha256, np.array(errors), anomalies, compensation, is_new=False)


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == _HEX


def index_records(records: Iterable[Line]) -> dict[tuple[str, int], Line]:
    """The records of pieces by tensor and number."""
    found = {}
    for line in records:
        tensor, number = line.get("tensor"), line.get("piece")
        if isinstance(tensor, str) and type(number) is int:
            found[tensor, number] = line
    return found


def write_pieces(
    source: Source,
    output: Output,
    jobs: Sequence[TensorJob],
    *,
    threads: int,
    progress: Callable[[int], None],
    info: Callable[[str], None],
) -> Generator[WrittenPiece, None, None]:
    """Write the pieces of `jobs`, in order, in threads of this process, or read them again as earlier runs left them.

    `progress` is called with the source bytes of each chunk, `info` with a line on what must be made again. Raises
    SourceChanged where the source is not that of the earlier runs, and instead of NumericFault where it has changed
    meanwhile.
    """
    origin = None if output.is_published else source
    lines = index_records(output.records)
    pieces = ((piece, find_recorded(piece, lines)) for job in jobs for piece in split_into_pieces(job))
    steps = ((piece, before, chunk) for piece, before in pieces for chunk in piece.chunks)

    def carry_over(step: tuple[Piece, WrittenPiece | None, Chunk]) -> tuple[Piece, WrittenPiece | None, EncodedChunk]:
        piece, before, chunk = step
        made = write_chunk(source, output, chunk) if before is None else read_chunk(origin, output, chunk)
        return piece, before, made

    builder = PieceBuilder()
    with contextlib.closing(in_order(carry_over, steps, threads)) as results:
        try:
            for i, (piece, before, done) in enumerate(results, start=1):
                if i % _CHECK_EVERY == 0:
                    source.check_unchanged()
                progress(done.chunk.n_rows * piece.job.tensor.row_bytes)
                builder.add(piece, done)
                if done.chunk is not piece.chunks[-1]:
                    continue
                if before is not None and origin is not None and builder.source_sha256 != before.source_sha256:
                    check_source_rows(origin, piece, before.source_sha256)
                if before is not None and builder.sha256 != before.sha256:
                    info(NOT_AS_RECORDED.format(quote(piece.name)))
                    for chunk in piece.chunks:
                        builder.add(piece, write_chunk(source, output, chunk))
                    yield builder.build(piece, None)
                else:
                    yield builder.build(piece, before)
        except NumericFault:
            source.check_unchanged()
            raise


class WrittenTensors:
    """The tensors that are in `output`, from this run or an earlier one."""

    def __init__(self, output: Output) -> None:
        self._output, self._lines = output, index_records(output.records)

    def has(self, job: TensorJob) -> bool:
        """Return whether an earlier run wrote all of the job's tensor, and it still reads as it was recorded."""
        for piece in split_into_pieces(job):
            before, digest = find_recorded(piece, self._lines), hashlib.sha256()
            if before is None:
                return False
            for chunk in piece.chunks:
                digest.update(read_chunk(None, self._output, chunk).data.reshape(-1).data)
            if digest.hexdigest() != before.sha256:
                return False
        return True

    def read(self, job: TensorJob) -> Bytes:
        """Return the bytes of the job's tensor, (n_rows, row_bytes)."""
        return read_chunk(None, self._output, Chunk(job, 0, job.tensor.n_rows)).data

    def read_rows(self, job: TensorJob, rows: NDArray[np.int64]) -> Bytes:
        """Return the bytes of some rows of the job's tensor, (n, row_bytes)."""
        return np.concatenate([read_chunk(None, self._output, Chunk(job, int(row), 1)).data for row in rows])


def check_source_rows(source: Readable, piece: Piece, sha256: str) -> None:
    """Read the piece's rows of the source again. Raises SourceChanged unless their digest is `sha256`."""
    if hash_rows(source, piece) != sha256:
        what = f"changed since the unfinished output was begun: tensor {quote(piece.name)} has other bytes"
        raise SourceChanged(source.files[piece.job.tensor.file], what, hint="run it again: all of it is made again")


class PieceBuilder:
    """The running digest of a tensor, and the digests and errors of its current piece."""

    def __init__(self) -> None:
        self._before = self._whole = self._piece = hashlib.sha256()
        self._source = hashlib.sha256()
        self._errors, self._anomalies = np.zeros(4), Anomalies()

    @property
    def sha256(self) -> str:
        """The digest of the piece, in hex."""
        return self._piece.hexdigest()

    @property
    def source_sha256(self) -> str:
        """The digest of the piece's rows of the source, in hex."""
        return self._source.hexdigest()

    def add(self, piece: Piece, done: EncodedChunk) -> None:
        """Add a chunk. The first chunk of a piece starts its digest, also when the piece is made a second time."""
        if done.chunk is piece.chunks[0]:
            self._piece, self._source = hashlib.sha256(), hashlib.sha256()
            self._errors, self._anomalies = np.zeros(4), Anomalies()
            self._whole = self._before.copy() if piece.number else self._piece  # in piece 0 both digests are one
        data = done.data.reshape(-1).data
        self._piece.update(data)
        self._source.update(done.source)
        if self._whole is not self._piece:
            self._whole.update(data)
        self._anomalies += done.anomalies
        if done.errors is not None:
            self._errors += done.errors

    def build(self, piece: Piece, before: WrittenPiece | None) -> WrittenPiece:
        """Return the piece, now complete; its errors are those of the run that encoded it."""
        self._before = self._whole
        tensor = self._whole.hexdigest() if piece.is_last else None
        if before is not None:
            return replace(before, tensor_sha256=tensor)
        errors = None if piece.job.choice.copied else self._errors
        compensation = None if piece.job.encoded is None else piece.job.encoded.figures
        return WrittenPiece(piece, self.sha256, self.source_sha256, errors, self._anomalies, compensation, tensor)


def collect_tensors(source: Source, output: Output, pieces: Iterable[WrittenPiece]) -> Iterator[Converted]:
    """Put the tensors together from `pieces`, and record each new piece in the journal of `output`.

    Raises NumericFault where the error of a tensor is above the ceiling of its format.
    """
    total, anomalies, digests = np.zeros(4), Anomalies(), list[SourceDigest]()
    for written in pieces:
        piece = written.piece
        if written.is_new:
            _check_scales(source, written)
            output.record(written.line, piece.n_bytes)
        if piece.number == 0:
            total, anomalies, digests = np.zeros(4), Anomalies(), []
        digests.append(SourceDigest(piece.n_rows, piece.job.leaf_rows, written.source_sha256))
        total = total if written.errors is None else total + written.errors
        anomalies += written.anomalies
        if written.tensor_sha256 is not None:
            made = _describe_tensor(source, written, total, written.tensor_sha256)
            yield replace(made, odd=None if anomalies == Anomalies() else anomalies, source=tuple(digests))


def _check_scales(source: Source, written: WrittenPiece) -> None:
    """Raise InputOutputError where the rows that the scales were found from are not those that were encoded."""
    piece, job = written.piece, written.piece.job
    if job.scales is not None and job.source_sha256[piece.number] != written.source_sha256:
        what = f"two reads of the same rows of tensor {quote(piece.name)} differ"
        raise InputOutputError(source.files[job.tensor.file], what, hint="check disk and memory, then run it again")


def _describe_tensor(source: Source, written: WrittenPiece, total: Sums, sha256: str) -> Converted:
    job, compensation, error = written.piece.job, written.compensation, codec.relative_error(total[None, :])
    limit = codec.ceiling(total[0], job.tensor.n_weights, job.format)
    made = Converted(
        name=job.tensor.name,
        source_type=job.tensor.format.name,
        type=job.format.name,
        n_bytes=job.format.n_bytes(job.tensor.n_weights),
        rmse=error,
        rmse_unweighted=math.sqrt(total[1] / total[0]) if total[0] > 0 else 0.0,
        sha256=sha256,
        weighted=job.importance is not None,
        compensation=compensation,
    )
    if not job.choice.copied and not made.is_compensated and not error <= limit:
        raise lost_weights_fault(job, "relative error", error, limit, source.files[job.tensor.file])
    return made
