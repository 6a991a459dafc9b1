"""Compensated encoding of one tensor, and its comparison with plain rounding on held-out windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
class MatrixWork:
    """One matrix of a tensor to be encoded with compensation; without `feedback` it is rounded plainly.

    moments: of its inputs, in which it is called `name`. parts: held-out tokens. lookup: the error per squared error of
    a weight in each column (n,), of an embedding. ridge: of its target, None to round its own weights.
    """

    feedback: Feedback | None
    moments: Moments | None = None
    name: str = ""
    parts: Sequence[CheckPart] = ()
    lookup: Array | None = None
    ridge: float | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a matrix in the units of the file: `rows` as they are, `target` as they are to be rounded, if they are.

    h: for the search after the feedback, None without one.
    """

    name: str
    format: BlockFormat
    effort: Effort
    rows: Floats
    target: Array | None
    feedback: Feedback | None
    importance: Floats | None
    h: Array | None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Rows encoded with compensation, None where that cannot be, and plainly; rounding: of `encode_compensated`."""

    blocks: Bytes | None
    plain: Bytes
    rounding: Array | None


@dataclass(frozen=True, slots=True)
class TensorEncoder:
    """A tensor to be encoded both ways, as `work` says for each matrix; those bytes are taken that err less.

    units: of each matrix, the factor from the weights in the file to those that the model has. best: search on after
    the feedback. cluster: its workers encode; what is encoded is computed here, so that the bytes are the same.
    """

    source: Source
    job: TensorJob
    units: Floats
    work: Sequence[MatrixWork]
    best: bool
    threads: int
    cluster: Cluster | None = None

    def encode(self) -> EncodedTensor:
        """Return all bytes of the tensor."""
        job, n = self.job, self.job.tensor.n_rows // len(self.work)
        step = max(1, CHUNK_WEIGHTS // job.tensor.n_per_row)
        blocks, taken, sums = list[Bytes](), list[bool](), np.zeros((len(self.work), 5))
        for matrix, work in enumerate(self.work):
            solver = None
            if work.ridge is not None and work.moments is not None:
                solver = run_alone(partial(Solver.of, work.moments.h, work.ridge))
            places = [slice(a, min(a + step, n)) for a in range(0, n, step)]

            def make(place: slice, matrix: int = matrix, solver: Solver | None = solver) -> _Rows:
                return self._make_rows(matrix, place, solver)

            with damped(work.moments):
                pairs = self._encode_rows(make, places)

            def measure(
                i: int, matrix: int = matrix, pairs: Sequence[_Pair] = pairs, at: Sequence[slice] = places
            ) -> Array:
                return self._measure_rows(matrix, at[i], pairs[i])

            with contextlib.closing(run_indexed(measure, len(places), self.threads)) as found:
                sums[matrix] = np.sum(list(found), axis=0)
            most = codec.ceiling(0.0, 0, job.format) ** 2 * n
            error, plain_error, _, _, rounding = sums[matrix]
            taken.append(work.feedback is not None and bool(error < plain_error) and bool(rounding <= most))
            blocks += [pair.blocks if taken[-1] and pair.blocks is not None else pair.plain for pair in pairs]
        return EncodedTensor(np.concatenate(blocks), tuple(taken), _describe(sums, taken, self.work))

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
        job, n = self.job, self.job.tensor.n_rows // len(self.work)
        data = self.source.read_rows(job.tensor, matrix * n + place.start, place.stop - place.start)
        rows = codec.dequantize(data, job.tensor.format)
        if job.scales is not None:
            rows /= job.scales[matrix if len(job.scales) > 1 else 0]
        return rows

    def _make_rows(self, matrix: int, place: slice, solver: Solver | None) -> _Rows:
        job, work, unit = self.job, self.work[matrix], np.float32(self.units[matrix])
        own = None if job.importance is None else job.importance[matrix if len(job.importance) > 1 else 0]
        rows = self._read_rows(matrix, place)
        target: Array | None = None if work.feedback is None else rows
        if work.feedback is not None and work.moments is not None and solver is not None:
            target = rows + solver.solve(work.moments.wanted(rows * unit, work.name, place)) / unit
        h = work.moments.h if self.best and work.moments is not None else None
        return _Rows(job.tensor.name, job.format, job.effort, rows, target, work.feedback, own, h)

    def _measure_rows(self, matrix: int, place: slice, pair: _Pair) -> Array:
        """Return errors on held-out tokens: of compensated, plain and exact rows; the energy, and the rounding.

        Exact rows err by what their inputs lack. The energy is that of the result. The rounding is the sum over rows of
        its own relative error, infinite where it loses a row.
        """
        work, unit, fmt = self.work[matrix], np.float32(self.units[matrix]), self.job.format
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
    if task.feedback is None or task.target is None:
        return _Pair(None, plain, None)
    factor, importance = task.feedback.factor, task.feedback.importance
    search = {} if task.h is None else {"polish": task.h}
    blocks, rounding = encode_compensated(task.format, task.target, factor, importance, effort=task.effort, **search)
    return _Pair(blocks, plain, rounding)


def _describe(sums: Array, taken: Sequence[bool], work: Sequence[MatrixWork]) -> Compensation:
    """Return the figures of a tensor from the sums of its matrices."""
    own = np.where(taken, sums[:, 0], sums[:, 1])
    error, plain_error, inherited, energy = np.column_stack([own, sums[:, 1:4]]).sum(axis=0)
    known = energy > 0 and bool(np.isfinite([error, plain_error, inherited, energy]).all())

    def relative(found: float) -> float | None:
        return float(np.sqrt(found / energy)) if known else None

    return Compensation(
        error=relative(error),
        plain_error=relative(plain_error),
        inherited_error=relative(inherited),
        n_matrices=len(work),
        n_plain=list(taken).count(False),
        n_unseen=sum(each.feedback is None for each in work),
        ridge=work[0].ridge if len(work) == 1 and taken[0] else None,
    )
