"""A tensor's way from source to output in chunks of whole rows: read, checked, encoded, read back, measured, written.

Where the chunks begin depends on the tensor alone, so any number of threads writes the same bytes and measures the
same errors. No chunk crosses from one expert to the next, as each has its own importance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from requant.container.remote import Readable
from requant.container.source import SourceTensor
from requant.conversion.record import Anomalies
from requant.errors import InputOutputError, NumericFault, quoted
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import CHUNK_WEIGHTS, Bytes, Floats
from requant.model.nonfinite import find_nonfinite, nonfinite_fault
from requant.planning.plan import Choice

# the slowest encoder does 2^20 weights in well under half a second, after which signals are looked at
COPY_BYTES = 2**22
PIECE_BYTES = 2**26  # of the output: what the journal has a record of, and what a worker of a cluster does at a time


class Writable(Protocol):
    """What is written to: an Output, or one file of it on another machine."""

    def write_at(self, file: int, offset: int, data: Bytes) -> None:
        """As `Output.write_at`."""

    def read_at(self, file: int, offset: int, target: memoryview) -> None:
        """As `Output.read_at`."""


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor to write at `offset` of a file of the output as `format`; importance: (n_matrices, n_per_row) or None.

    scales: (1,) or (n_matrices,), what the weights are divided by before they are encoded, or None.
    """

    tensor: SourceTensor
    choice: Choice
    format: BlockFormat
    file: int
    offset: int
    importance: Floats | None
    effort: Effort
    scales: Floats | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output."""
        return self.format.n_bytes(self.tensor.n_per_row)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a job's tensor."""

    job: TensorJob
    first_row: int
    n_rows: int

    def own(self, per_matrix: Floats) -> Floats:
        """What of `per_matrix` (n_matrices or 1, ...) belongs to the matrix that the rows are of."""
        found: Floats = per_matrix[self.first_row * len(per_matrix) // self.job.tensor.n_rows]
        return found


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk's bytes as written; errors: (4,) float64, sums as codec.row_errors has them, None for a copy."""

    chunk: Chunk
    data: Bytes
    errors: NDArray[np.float64] | None
    odd: Anomalies


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks of a tensor, one after the other, that are recorded together; `number` counts the tensor's pieces."""

    number: int
    chunks: tuple[Chunk, ...]

    @property
    def job(self) -> TensorJob:
        """The tensor's."""
        return self.chunks[0].job

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.job.tensor.name

    @property
    def n_bytes(self) -> int:
        """Bytes in the output."""
        return sum(chunk.n_rows for chunk in self.chunks) * self.job.row_bytes

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        last = self.chunks[-1]
        return last.first_row + last.n_rows >= self.job.tensor.n_rows

    @property
    def place(self) -> dict[str, int | str]:
        """Where in the output it is, and of what."""
        offset = self.job.offset + self.chunks[0].first_row * self.job.row_bytes
        where = {"file": self.job.file, "offset": offset, "bytes": self.n_bytes}
        return {"tensor": self.name, "piece": self.number, **where}


def pieces_of(job: TensorJob) -> Iterator[Piece]:
    """The job's chunks in pieces, whose ends depend on the job alone, as those of the chunks do."""
    chunks: list[Chunk] = []
    number = n_bytes = 0
    for chunk in chunks_of(job):
        chunks.append(chunk)
        n_bytes += chunk.n_rows * job.row_bytes
        if n_bytes >= PIECE_BYTES:
            yield Piece(number, tuple(chunks))
            chunks, number, n_bytes = [], number + 1, 0
    if chunks:
        yield Piece(number, tuple(chunks))


def chunks_of(job: TensorJob) -> Iterator[Chunk]:
    """The job's chunks in the order of the rows; at least one, be it empty."""
    tensor, n_matrices = job.tensor, 1
    most = copy_rows(tensor) if job.choice.copied else max(1, CHUNK_WEIGHTS // max(1, tensor.n_per_row))
    if not job.choice.copied:
        n_matrices = max([len(own) for own in (job.importance, job.scales) if own is not None], default=1)
    n = max(1, tensor.n_rows // n_matrices)
    for start in range(0, max(1, tensor.n_rows), n):
        for first in range(start, start + n, most):
            yield Chunk(job, first, min(most, start + n - first, tensor.n_rows))


def copy_rows(tensor: SourceTensor) -> int:
    """Rows of a piece that is only copied or looked at."""
    return max(1, COPY_BYTES // max(1, tensor.row_bytes))


def write_chunk(source: Readable, output: Writable, chunk: Chunk) -> EncodedChunk:
    """Carry the chunk over. Raises NumericFault for weights that do not survive in the format, or are not finite.

    Copies of tensors that the source is to keep may be so.
    """
    job = chunk.job
    data = source.read_rows(job.tensor, chunk.first_row, chunk.n_rows)
    errors, odd = None, Anomalies()
    if job.choice.copied:
        found = find_nonfinite(data, job.tensor, chunk.first_row)
        if found is not None and job.tensor.name not in source.preserved:
            raise nonfinite_fault(source, job.tensor)
        odd = odd if found is None else Anomalies(found.count, found.first)
    else:
        data, errors, odd = _encoded(source, data, chunk)
    start = job.offset + chunk.first_row * data.shape[1]
    with naming_tensor(job):
        output.write_at(job.file, start, data)
    return EncodedChunk(chunk, data, errors, odd)


@contextlib.contextmanager
def naming_tensor(job: TensorJob) -> Iterator[None]:
    """A failure to write names the tensor."""
    try:
        yield
    except InputOutputError as error:
        what = f"tensor {quoted(job.tensor.name)}: {error.what}"
        raise InputOutputError(error.path, what, hint=error.hint) from error


def read_chunk(output: Writable, chunk: Chunk) -> EncodedChunk:
    """The chunk as an earlier run wrote it."""
    job = chunk.job
    data = np.empty((chunk.n_rows, job.row_bytes if job.tensor.n_rows else 0), np.uint8)
    if data.size:
        output.read_at(job.file, job.offset + chunk.first_row * data.shape[1], data.reshape(-1).data)
    return EncodedChunk(chunk, data, None, Anomalies())


def _encoded(source: Readable, data: Bytes, chunk: Chunk) -> tuple[Bytes, NDArray[np.float64], Anomalies]:
    job = chunk.job
    x = codec.dequantize(data, job.tensor.format)
    if codec.first_nonfinite(x) is not None:
        raise nonfinite_fault(source, job.tensor)
    importance = None if job.importance is None else chunk.own(job.importance)
    scale = 1.0
    if job.scales is not None:
        scale = float(chunk.own(job.scales))
        x /= np.float32(scale)
    encoded = codec.quantize(x, job.format, importance, job.effort)
    errors = codec.row_errors(x, codec.dequantize(encoded, job.format), importance)
    errors *= scale**2
    limit = codec.row_limit(job.format)
    lost = codec.lost_row(errors, limit)
    if lost is not None:
        path, what = source.files[job.tensor.file], f"row {chunk.first_row + lost} is lost: relative error"
        raise gate_fault(job, what, codec.relative_error(errors[lost : lost + 1, [0, 1, 0, 1]]), limit, path)
    blocks = 0 if importance is None else np.count_nonzero(codec.find_unweighted_blocks(x, job.format, importance))
    return encoded, errors.sum(axis=0), Anomalies(unweighted=int(blocks), vanished=codec.vanished_rows(errors))


def find_peak(source: Readable, chunk: Chunk) -> float:
    """The largest magnitude among the chunk's weights."""
    job = chunk.job
    data = source.read_rows(job.tensor, chunk.first_row, chunk.n_rows)
    return float(np.abs(codec.dequantize(data, job.tensor.format)).max(initial=0))


def gate_fault(job: TensorJob, what: str, error: float, limit: float, path: Path) -> NumericFault:
    """The fault for a tensor that does not survive in the chosen format."""
    what = f"tensor {quoted(job.tensor.name)} as {job.format.name}, {what}"
    hint = f"--tensor-type '{job.tensor.name}={job.tensor.format.name.lower()}' keeps it, with --restart"
    return NumericFault(path, what, got=f"{error:.3g}", limit=f"{limit:.3g}", hint=hint)
