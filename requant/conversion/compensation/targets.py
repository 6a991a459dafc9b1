"""Targets of the rounding: weights that undo what the quantized model lacks so far, as far as held-out windows agree.

With the sums of `moments`, W x + d is best met from y by W + (W c + d) (h + r diag(h))^-1. That overfits with a small
ridge r, so the ridge of each matrix is chosen by how well the solution from one half of the windows suits the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from requant.common.threads import for_each, run_indexed
from requant.conversion.compensation.factors import Inverses, factorize, invert_triangle, solve_rows
from requant.conversion.compensation.moments import Moments, column_scale
from requant.formats.codec import Floats
from requant.model.forward.tape import Array

Result = TypeVar("Result")

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # relative to each column's own second moment
LARGE_RIDGES, LARGE = (1.0, 10.0, 100.0), 4096  # of matrices with more columns, where a factor takes long
DAMPING = 0.03  # of the feedback, relative likewise
SEARCH_DAMPING = 0.1  # of the search after it, which otherwise fits what only these tokens have
_ROWS = 256  # of a factor that are copied at a time
_SAMPLED_ROWS = 192  # of a matrix, by which its ridge is chosen


@dataclass(frozen=True, slots=True)
class Feedback:
    """The factor (n, n) of `encode_compensated`, upper triangular, and the importance of its scale search (n,)."""

    factor: Floats
    importance: Floats


@dataclass(frozen=True, slots=True)
class Solver:
    """The Cholesky factor of moments whose columns were divided by `scale`."""

    factor: Array
    inverses: Inverses
    scale: Array

    @classmethod
    def of(cls, h: Array, ridge: float) -> Solver | None:
        """Factorize h + ridge diag(h); None where that fails."""
        scale = column_scale(h)
        if scale is None:
            return None
        a = _scaled(h, scale, ridge, np.float32)
        try:
            inverses = factorize(a)
        except np.linalg.LinAlgError:
            return None
        return cls(a, inverses, scale.astype(np.float32))

    def solve(self, wanted: Array) -> Array:
        """Return wanted (h + ridge diag(h))^-1; wanted: (n_rows, n)."""
        change: Array = solve_rows(self.factor, self.inverses, wanted / self.scale) / self.scale
        return change


def sample_rows(n: int) -> Array:
    """Return the rows, evenly spread, by which the ridge of a matrix of `n` rows is chosen."""
    return np.arange(0, n, max(1, n // _SAMPLED_ROWS))


def choose_ridges(
    halves: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Sequence[Array]]], threads: int | None
) -> list[float | None]:
    """Return the ridge of each matrix with the least error on the half that it was not solved on; None: no target.

    halves: h of both, of each block of columns. wanted: of each matrix, half and block W c + d for its sampled rows.
    """
    n = max(len(h) for h in halves[0])
    ridges = RIDGES if n <= LARGE else LARGE_RIDGES
    gains = np.full((len(ridges), 2, len(wanted)), np.inf)
    joined = [[np.concatenate(rows) for rows in zip(*(pair[half] for pair in wanted), strict=True)] for half in (0, 1)]
    starts = np.cumsum([0, *(len(pair[0][0]) for pair in wanted[:-1])])

    def work(index: int) -> None:
        ridge, half = divmod(index, 2)
        total = np.zeros(len(starts))
        for block, (h, other) in enumerate(zip(halves[half], halves[1 - half], strict=True)):
            solver = Solver.of(h, ridges[ridge])
            if solver is None:
                return
            own, others = joined[half][block], joined[1 - half][block]
            change = solver.solve(own)
            missed = change @ other - 2 * others
            total += np.add.reduceat(np.einsum("ij,ij->i", change, missed, dtype=np.float64), starts)
        gains[ridge, half] = total

    for_each(work, 2 * len(ridges), threads if n <= LARGE else 1)
    total = np.nan_to_num(gains.sum(axis=1), nan=np.inf)
    best = total.argmin(axis=0)
    return [ridges[k] if total[k, i] < 0 else None for i, k in enumerate(best)]


def find_feedback(h: Array) -> Feedback | None:
    """Return the feedback of rounding with the moments `h` (n, n), damped; None where no column is used."""
    scale = column_scale(h)
    if scale is None:
        return None

    def work() -> Feedback | None:
        a = _scaled(h[::-1, ::-1], scale[::-1], DAMPING, np.float64)
        try:
            inverses = factorize(a)
        except np.linalg.LinAlgError:
            return None
        importance = (np.diag(a)[::-1] * scale) ** 2
        invert_triangle(a, inverses)
        factor, n = np.empty(h.shape, np.float32), len(h)
        for start in range(0, n, _ROWS):  # from the end of `a`, which gives back its memory as the factor is filled
            stop = min(start + _ROWS, n)
            np.divide(a[n - stop : n - start][::-1, ::-1], scale, out=factor[start:stop], casting="same_kind")
            a.resize((n - stop, n), refcheck=False)
        return Feedback(factor, (importance / importance.mean()).astype(np.float32))

    return run_alone(work)


@contextlib.contextmanager
def damped(parts: Iterable[Moments]) -> Iterator[None]:
    """Have moments damped, in place, for the search after the feedback."""
    kept = [(moments.h, np.diag(moments.h).copy()) for moments in parts]
    for h, own in kept:
        np.fill_diagonal(h, own * np.float32(1 + SEARCH_DAMPING))
    yield
    for h, own in kept:
        np.fill_diagonal(h, own)


def run_alone(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, run with one BLAS thread, so that it does not depend on their number."""
    (found,) = run_indexed(lambda _: work(), 1, 1)
    return found


def _scaled(h: Array, scale: Array, ridge: float, dtype: type) -> Array:
    """Return h with unit diagonal plus the ridge."""
    a: Array = h.astype(dtype, order="C")
    a /= scale.astype(dtype)[:, None]
    a /= scale.astype(dtype)
    a[np.diag_indices(len(a))] += dtype(ridge)
    return a
