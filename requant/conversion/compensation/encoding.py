"""Compensated encoding of one tensor, and its comparison with plain rounding on held-out windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from requant.common.cluster import Cluster
from requant.common.threads import run_indexed
from requant.container.source import Source
from requant.conversion.chunks import EncodedTensor, TensorJob
from requant.conversion.compensation.moments import Moments
from requant.conversion.compensation.targets import Feedback, Solver, damped, run_alone
from requant.conversion.record import Compensation
from requant.errors import quote
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import CHUNK_WEIGHTS, Bytes, Floats
from requant.formats.feedback import encode_compensated
from requant.model.forward.tape import Array


@dataclass(frozen=True, slots=True)
class CheckPart:
    """Held-out tokens of a matrix: inputs y in the quantized model and x in the original, weights a (n_tokens, 1).

    d: what the residual stream lacks, (n_tokens, n_rows), for matrices that write to it.
    """

    y: Array
    x: Array
    a: Array
    d: Array | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Columns with moments of their own; without `feedback` they are rounded plainly."""

    moments: Moments
    feedback: Feedback | None


@dataclass(frozen=True, slots=True)
class MatrixWork:
    """One matrix of a tensor to be encoded with compensation; without `blocks` it is rounded plainly.

    blocks: all of its columns, usually in one. name: of the matrix in their moments. parts: held-out tokens. lookup:
    the error per squared error of a weight in each column (n,), of an embedding. ridge: of its target, None to round
    its own weights.
    """

    blocks: Sequence[Block] = ()
    name: str = ""
    parts: Sequence[CheckPart] = ()
    lookup: Array | None = None
    ridge: float | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a matrix in the units of the file: `rows` as they are, `target` as they are to be rounded by `blocks`.

    blocks: columns with their feedback, and h for the search after it, None without one.
    """

    name: str
    format: BlockFormat
    effort: Effort
    rows: Floats
    target: Array
    blocks: Sequence[tuple[slice, Feedback, Array | None]]
    importance: Floats | None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Rows encoded with compensation, None where that cannot be, and plainly; rounding: of `encode_compensated`."""

    blocks: Bytes | None
    plain: Bytes
    rounding: Array | None


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """The bytes of a matrix (n_rows, row_bytes), whether they are compensated, and the sums of `_measure_rows`.

    is_unseen: too few tokens reach it.
    """

    blocks: Bytes
    taken: bool
    sums: Array
    ridge: float | None
    is_unseen: bool


@dataclass(frozen=True, slots=True)
class TensorEncoder:
    """A tensor to be encoded both ways, matrix by matrix; those bytes are taken that err less.

    units: of each matrix, the factor from the weights in the file to those that the model has. best: search on after
    the feedback. cluster: its workers encode; what is encoded is computed here, so that the bytes are the same.
    """

    source: Source
    job: TensorJob
    units: Floats
    best: bool
    threads: int
    cluster: Cluster | None = None

    @property
    def n_rows(self) -> int:
        """Rows of a matrix."""
        return self.job.tensor.n_rows // len(self.units)

    def encode(self, matrix: int, work: MatrixWork) -> EncodedMatrix:
        """Return all bytes of a matrix."""
        step, solvers = max(1, CHUNK_WEIGHTS // self.job.tensor.n_per_row), list[Solver | None]()
        if work.ridge is not None:
            solvers = [run_alone(partial(Solver.of, block.moments.h, work.ridge)) for block in work.blocks]
        places = [slice(a, min(a + step, self.n_rows)) for a in range(0, self.n_rows, step)]
        with damped(block.moments for block in work.blocks):
            pairs = self._encode_rows(lambda place: self._make_rows(matrix, work, place, solvers), places)

        def measure(i: int) -> Array:
            return self._measure_rows(matrix, work, places[i], pairs[i])

        with contextlib.closing(run_indexed(measure, len(places), self.threads)) as found:
            sums = np.sum(list(found), axis=0)
        most = codec.ceiling(0.0, 0, self.job.format) ** 2 * self.n_rows
        error, plain_error, _, _, rounding = sums
        taken = pairs[0].blocks is not None and bool(error < plain_error) and bool(rounding <= most)
        chosen = [pair.blocks if taken and pair.blocks is not None else pair.plain for pair in pairs]
        return EncodedMatrix(np.concatenate(chosen), taken, sums, work.ridge, is_unseen=not work.blocks)

    def _encode_rows(self, make: Callable[[slice], _Rows], places: Sequence[slice]) -> list[_Pair]:
        if self.cluster is None:
            run = run_indexed(lambda i: _encode_both(make(places[i])), len(places), self.threads)
        else:
            tasks = run_indexed(lambda i: make(places[i]), len(places), self.threads)
            run = self.cluster.in_order(_encode_both, tasks, lambda rows: f"tensor {quote(rows.name)}")
        with contextlib.closing(run) as pairs:
            return list(pairs)

    def _read_rows(self, matrix: int, place: slice) -> Floats:
        """Return rows of a matrix in the units of the file."""
        job = self.job
        data = self.source.read_rows(job.tensor, matrix * self.n_rows + place.start, place.stop - place.start)
        rows = codec.dequantize(data, job.tensor.format)
        if job.scales is not None:
            rows /= job.scales[matrix if len(job.scales) > 1 else 0]
        return rows

    def _make_rows(self, matrix: int, work: MatrixWork, place: slice, solvers: Sequence[Solver | None]) -> _Rows:
        job, unit = self.job, np.float32(self.units[matrix])
        own = None if job.importance is None else job.importance[matrix if len(job.importance) > 1 else 0]
        rows = self._read_rows(matrix, place)
        target = rows.copy() if solvers else rows
        for block, solver in zip(work.blocks, solvers, strict=False):
            if solver is not None:
                change = solver.solve(block.moments.wanted(rows * unit, work.name, place)) / unit
                target[:, block.moments.at] += change
        blocks = [
            (block.moments.at, block.feedback, block.moments.h if self.best else None)
            for block in work.blocks
            if block.feedback is not None
        ]
        return _Rows(job.tensor.name, job.format, job.effort, rows, target, blocks, own)

    def _measure_rows(self, matrix: int, work: MatrixWork, place: slice, pair: _Pair) -> Array:
        """Return errors on held-out tokens: of compensated, plain and exact rows; the energy, and the rounding.

        Exact rows err by what their inputs lack. The energy is that of the result. The rounding is the sum over rows of
        its own relative error, infinite where it loses a row.
        """
        unit, fmt = np.float32(self.units[matrix]), self.job.format
        weights, sums = self._read_rows(matrix, place) * unit, np.zeros(5)
        plain = codec.dequantize(pair.plain, fmt) * unit
        tried = (plain if pair.blocks is None else codec.dequantize(pair.blocks, fmt) * unit, plain, weights)
        for part in work.parts:
            result = part.x @ weights.T
            sums[3] += np.sum(part.a * result * result, dtype=np.float64)
            if part.d is not None:
                result += part.d[:, place]
            for i, each in enumerate(tried):
                missed = part.y @ each.T - result
                sums[i] += np.sum(part.a * missed * missed, dtype=np.float64)
        if work.lookup is not None:
            for i, each in enumerate((*tried, weights * 2)):  # the last is the energy
                sums[i] += float(((each - weights) ** 2 @ work.lookup).sum(dtype=np.float64))
        if pair.rounding is not None:
            lost = not (pair.rounding < codec.row_limit(fmt) ** 2).all()
            sums[4] = np.inf if lost else pair.rounding.sum()
        return sums


def _encode_both(task: _Rows) -> _Pair:
    """Encode rows both ways; a task of a cluster's worker."""
    plain = codec.quantize(task.rows, task.format, task.importance, task.effort)
    if not task.blocks:
        return _Pair(None, plain, None)
    blocks, rounding = plain.copy(), np.zeros(len(plain))
    for at, feedback, h in task.blocks:
        how: dict[str, Any] = {"effort": task.effort} | ({} if h is None else {"polish": h})
        target = np.ascontiguousarray(task.target[:, at])
        found, own = encode_compensated(task.format, target, feedback.factor, feedback.importance, **how)
        blocks[:, task.format.n_bytes(at.start) : task.format.n_bytes(at.stop)] = found
        rounding += own * (target.shape[1] / task.target.shape[1])
    return _Pair(blocks, plain, rounding)


def encode_matrices(encoders: Sequence[TensorEncoder], work: Iterable[MatrixWork]) -> list[EncodedTensor]:
    """Return all bytes of tensors whose matrices are encoded by the same work, which is made for one after another."""
    found = [[encoder.encode(i, each) for encoder in encoders] for i, each in enumerate(work)]
    return [_join(matrices) for matrices in zip(*found, strict=True)]


def _join(matrices: Sequence[EncodedMatrix]) -> EncodedTensor:
    taken = tuple(matrix.taken for matrix in matrices)
    return EncodedTensor(np.concatenate([matrix.blocks for matrix in matrices]), taken, _describe(matrices))


def _describe(matrices: Sequence[EncodedMatrix]) -> Compensation:
    """Return the figures of a tensor from the sums of its matrices."""
    sums, taken = np.stack([matrix.sums for matrix in matrices]), [matrix.taken for matrix in matrices]
    own = np.where(taken, sums[:, 0], sums[:, 1])
    error, plain_error, inherited, energy = np.column_stack([own, sums[:, 1:4]]).sum(axis=0)
    known = energy > 0 and bool(np.isfinite([error, plain_error, inherited, energy]).all())

    def relative(found: float) -> float | None:
        return float(np.sqrt(found / energy)) if known else None

    return Compensation(
        error=relative(error),
        plain_error=relative(plain_error),
        inherited_error=relative(inherited),
        n_matrices=len(matrices),
        n_plain=taken.count(False),
        n_unseen=sum(matrix.is_unseen for matrix in matrices),
        ridge=matrices[0].ridge if len(matrices) == 1 and taken[0] else None,
    )
