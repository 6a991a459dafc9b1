"""Chunks of whole rows on their way from source to output: read, checked, encoded, read back, measured, written.

Where the chunks begin depends on the tensor alone, so any number of threads writes the same bytes and measures the
same errors. No chunk crosses from one expert to the next, because each has its own importance.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from requant.container.remote import Readable
from requant.container.source import SourceTensor
from requant.conversion.record import Anomalies, Compensation
from requant.errors import InputOutputError, NumericFault, quote
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import CHUNK_WEIGHTS, Bytes, Floats
from requant.model.nonfinite import find_nonfinite, nonfinite_fault
from requant.planning.plan import Choice

COPY_BYTES = 2**22
PIECE_BYTES = 2**26  # of the output: a record of the journal, and a task of a cluster's worker


class Writable(Protocol):
    """The target of chunks: an Output, or one file of it on another machine."""

    def write_at(self, file: int, offset: int, data: Bytes) -> None:
        """Write `data` as `Output.write_at` does."""

    def read_at(self, file: int, offset: int, target: memoryview) -> None:
        """Fill `target` as `Output.read_at` does."""


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """All bytes of a tensor (n_rows, row_bytes), encoded before they are written; figures: of the compensation.

    compensated: of each of its matrices, whether its rounding was compensated; others are rounded plainly.
    """

    blocks: Bytes
    compensated: tuple[bool, ...]
    figures: Compensation


@dataclass(frozen=True, slots=True)
class TensorJob:
    """A tensor to write as `format` at `offset` of a file of the output.

    importance: (n_matrices, n_per_row) or None. scales: (1,) or (n_matrices,), by which the weights are divided before
    they are encoded, or None. source_sha256: with scales, the digest in hex of the rows of each piece that they were
    found from. encoded: its bytes, where they are known already.
    """

    tensor: SourceTensor
    choice: Choice
    format: BlockFormat
    file: int
    offset: int
    importance: Floats | None
    effort: Effort
    scales: Floats | None = None
    source_sha256: tuple[str, ...] = ()
    encoded: EncodedTensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output."""
        return self.format.n_bytes(self.tensor.n_per_row)

    @property
    def n_matrices(self) -> int:
        """Number of matrices with importance or a scale of their own; a chunk is of one of them."""
        own = [len(values) for values in (self.importance, self.scales) if values is not None]
        return 1 if self.choice.copied else max(own, default=1)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk; the last one of a matrix may have fewer."""
        return max(1, COPY_BYTES // max(1, self.tensor.row_bytes) if self.choice.copied else self._encoded_rows)

    @property
    def _encoded_rows(self) -> int:
        return CHUNK_WEIGHTS // max(1, self.tensor.n_per_row)

    @property
    def leaf_rows(self) -> int:
        """Rows of the source that are hashed together: every chunk is whole leaves, but for the last of the tensor."""
        n = self.n_matrices
        return self.chunk_rows if n == 1 else math.gcd(self.chunk_rows, self.tensor.n_rows // n)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a job's tensor, all of one matrix; the unit of work of a thread."""

    job: TensorJob
    first_row: int
    n_rows: int

    def select_matrix(self, per_matrix: Floats) -> Floats:
        """Return the item of `per_matrix` (n_matrices or 1, ...) for the matrix of these rows."""
        found: Floats = per_matrix[self.first_row * len(per_matrix) // self.job.tensor.n_rows]
        return found


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk's bytes as written; source: the digests of its rows of the source, as `hash_leaves` returns them.

    errors: (4,) float64, the sums of codec.row_errors over its rows, None for a copy.
    """

    chunk: Chunk
    data: Bytes
    source: bytes
    errors: NDArray[np.float64] | None
    anomalies: Anomalies


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive chunks of a tensor that the journal records together; `number` counts the tensor's pieces."""

    number: int
    chunks: tuple[Chunk, ...]

    @property
    def job(self) -> TensorJob:
        """The job of its tensor."""
        return self.chunks[0].job

    @property
    def name(self) -> str:
        """The name of its tensor."""
        return self.job.tensor.name

    @property
    def n_rows(self) -> int:
        """Rows of its tensor."""
        return sum(chunk.n_rows for chunk in self.chunks)

    @property
    def n_bytes(self) -> int:
        """Bytes in the output."""
        return self.n_rows * self.job.row_bytes

    @property
    def is_last(self) -> bool:
        """Return whether it is the last of its tensor."""
        last = self.chunks[-1]
        return last.first_row + last.n_rows >= self.job.tensor.n_rows

    @property
    def place(self) -> dict[str, int | str]:
        """Its tensor, number, scales, and its file, offset and bytes in the output: the key of its record."""
        offset = self.job.offset + self.chunks[0].first_row * self.job.row_bytes
        where: dict[str, int | str] = {"file": self.job.file, "offset": offset, "bytes": self.n_bytes}
        if self.job.scales is not None:
            where["scales"] = hashlib.sha256(self.job.scales.data).hexdigest()
        return {"tensor": self.name, "piece": self.number, **where}


def split_into_pieces(job: TensorJob) -> Iterator[Piece]:
    """The job's chunks in pieces; where a piece ends depends on the job alone."""
    chunks: list[Chunk] = []
    number = n_bytes = 0
    for chunk in split_into_chunks(job):
        chunks.append(chunk)
        n_bytes += chunk.n_rows * job.row_bytes
        if n_bytes >= PIECE_BYTES:
            yield Piece(number, tuple(chunks))
            chunks, number, n_bytes = [], number + 1, 0
    if chunks:
        yield Piece(number, tuple(chunks))


def split_into_chunks(job: TensorJob) -> Iterator[Chunk]:
    """The job's chunks in the order of the rows; at least one, which may be empty."""
    tensor, most = job.tensor, job.chunk_rows
    n = max(1, tensor.n_rows // job.n_matrices)
    for start in range(0, max(1, tensor.n_rows), n):
        for first in range(start, start + n, most):
            yield Chunk(job, first, min(most, start + n - first, tensor.n_rows))


def hash_leaves(rows: Bytes, leaf_rows: int) -> bytes:
    """Return the SHA-256 of each `leaf_rows` of `rows`, one after the other; the digest of a piece is that of these.

    So a thread hashes what it has read, and the digest of a piece costs the thread that collects them nothing.
    """
    parts = (rows[first : first + leaf_rows] for first in range(0, max(1, len(rows)), leaf_rows))
    return b"".join(hashlib.sha256(part.reshape(-1).data).digest() for part in parts)


def write_chunk(source: Readable, output: Writable, chunk: Chunk) -> EncodedChunk:
    """Read, encode and write the chunk. Raises as `encode_chunk`, and InputOutputError."""
    done, job = encode_chunk(source, chunk), chunk.job
    start = job.offset + chunk.first_row * done.data.shape[1]
    with name_tensor_in_errors(job):
        output.write_at(job.file, start, done.data)
    return done


def encode_chunk(source: Readable, chunk: Chunk) -> EncodedChunk:
    """Read and encode the chunk. Raises NumericFault for weights that are not finite or are lost in the format.

    Copies of tensors in `source.preserved` may hold weights that are not finite.
    """
    job = chunk.job
    data = source.read_rows(job.tensor, chunk.first_row, chunk.n_rows)
    digests = hash_leaves(data, job.leaf_rows)
    if not job.choice.copied:
        encoded, errors, anomalies = _encode(source, data, chunk)
        return EncodedChunk(chunk, encoded, digests, errors, anomalies)
    found = find_nonfinite(data, job.tensor, chunk.first_row)
    if found is not None and job.tensor.name not in source.preserved:
        raise nonfinite_fault(source, job.tensor)
    anomalies = Anomalies() if found is None else Anomalies(found.count, found.first)
    return EncodedChunk(chunk, data, digests, None, anomalies)


@contextlib.contextmanager
def name_tensor_in_errors(job: TensorJob) -> Iterator[None]:
    """Add the tensor's name to the message of an InputOutputError."""
    try:
        yield
    except InputOutputError as error:
        what = f"tensor {quote(job.tensor.name)}: {error.what}"
        raise InputOutputError(error.path, what, hint=error.hint) from error


def read_chunk(source: Readable | None, output: Writable, chunk: Chunk) -> EncodedChunk:
    """Read the chunk as an earlier run wrote it, and its rows of the source where one is given."""
    job, digests = chunk.job, b""
    if source is not None:
        digests = hash_leaves(source.read_rows(job.tensor, chunk.first_row, chunk.n_rows), job.leaf_rows)
    data = np.empty((chunk.n_rows, job.row_bytes if job.tensor.n_rows else 0), np.uint8)
    if data.size:
        output.read_at(job.file, job.offset + chunk.first_row * data.shape[1], data.reshape(-1).data)
    return EncodedChunk(chunk, data, digests, None, Anomalies())


def hash_rows(source: Readable, piece: Piece) -> str:
    """Return the digest, in hex, of the piece's rows of the source."""
    digest, job = hashlib.sha256(), piece.job
    for chunk in piece.chunks:
        digest.update(hash_leaves(source.read_rows(job.tensor, chunk.first_row, chunk.n_rows), job.leaf_rows))
    return digest.hexdigest()


def _encode(source: Readable, data: Bytes, chunk: Chunk) -> tuple[Bytes, NDArray[np.float64], Anomalies]:
    job = chunk.job
    x = codec.dequantize(data, job.tensor.format)
    if codec.first_nonfinite(x) is not None:
        raise nonfinite_fault(source, job.tensor)
    importance = None if job.importance is None else chunk.select_matrix(job.importance)
    scale = 1.0
    if job.scales is not None:
        scale = float(chunk.select_matrix(job.scales))
        x /= np.float32(scale)
    rows = slice(chunk.first_row, chunk.first_row + chunk.n_rows)
    encoded = codec.quantize(x, job.format, importance, job.effort) if job.encoded is None else job.encoded.blocks[rows]
    errors = codec.row_errors(x, codec.dequantize(encoded, job.format), importance)
    errors *= scale**2
    limit = codec.row_limit(job.format)
    # a compensated row trades errors of its weights for less error of its result, and may be far off
    lost = codec.lost_row(np.where(_find_compensated(chunk)[:, None], [1.0, 0.0, 1.0, 0.0], errors), limit)
    if lost is not None:
        path, what = source.files[job.tensor.file], f"row {chunk.first_row + lost} is lost: relative error"
        if not np.isfinite(errors[lost, 1]):
            peak = np.abs(x[lost]).max()
            what = f"row {chunk.first_row + lost} has a weight of {peak:.6g}, which overflows: relative error"
        raise lost_weights_fault(job, what, codec.relative_error(errors[lost : lost + 1, [0, 1, 0, 1]]), limit, path)
    blocks = 0 if importance is None else np.count_nonzero(codec.find_unweighted_blocks(x, job.format, importance))
    return encoded, errors.sum(axis=0), Anomalies(unweighted=int(blocks), vanished=codec.vanished_rows(errors))


def _find_compensated(chunk: Chunk) -> NDArray[np.bool_]:
    """Mark the rows of the chunk whose rounding was compensated, (n_rows,)."""
    found = (False,) if chunk.job.encoded is None else chunk.job.encoded.compensated
    rows = np.arange(chunk.first_row, chunk.first_row + chunk.n_rows)
    return np.array(found)[rows * len(found) // max(1, chunk.job.tensor.n_rows)]


def find_peaks(source: Readable, piece: Piece) -> tuple[list[float], str]:
    """Return the largest magnitude among the weights of each chunk, and the digest of the piece's rows in hex."""
    peaks, digest, tensor = list[float](), hashlib.sha256(), piece.job.tensor
    for chunk in piece.chunks:
        data = source.read_rows(tensor, chunk.first_row, chunk.n_rows)
        digest.update(hash_leaves(data, piece.job.leaf_rows))
        peaks.append(float(np.abs(codec.dequantize(data, tensor.format)).max(initial=0)))
    return peaks, digest.hexdigest()


def lost_weights_fault(job: TensorJob, what: str, error: float, limit: float, path: Path) -> NumericFault:
    """The fault for a tensor that does not survive in the chosen format."""
    what = f"tensor {quote(job.tensor.name)} as {job.format.name}, {what}"
    name, own = job.tensor.name, job.tensor.format.name
    pattern = name if re.fullmatch(r"[\w.\-]+", name) else re.escape(name)
    hint = f"--tensor-type {shlex.quote(f'^{pattern}$={own.lower()}')} keeps it; in a --plan set its type to {own}"
    return NumericFault(path, what, got=f"{error:.3g}", limit=f"{limit:.3g}", hint=hint)
