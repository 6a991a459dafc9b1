"""Second moments of the inputs of a stage, in the quantized model and against the original one.

Of a token t, x are the inputs in the original model, y those in the quantized one, d is what the residual stream of the
latter lacks, and a the token's weight. Sums are float32, in an order that does not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from requant.common.threads import for_each
from requant.model.forward.tape import Array

CHECK = 2  # the part of a text on which results are compared; 0 and 1 are the halves that they are made from
LEAST_WINDOWS = 3
_CHECK_EVERY = 8  # windows, of which one is for the comparison
_COLUMNS = 256  # of a sum that are a thread's task
_FLOOR = 1e-6  # of the mean: the least second moment of a column


def split_windows(n: int) -> Array:
    """Return the part of each of `n` windows: 0, 1 or CHECK."""
    parts = np.arange(n) % 2
    parts[_CHECK_EVERY - 1 :: _CHECK_EVERY] = CHECK
    if n < _CHECK_EVERY:
        parts[-1] = CHECK
    return parts


@dataclass(slots=True)
class Moments:
    """Sums over tokens for the columns `at` of the inputs: h of a y y', c of a (x - y) y', and by name d of a d y'.

    c: None where there is no target. d: of matrices that write to the stream, where `at` is all of their columns.
    """

    at: slice
    h: Array
    c: Array | None = None
    d: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def zeros(cls, at: slice, writers: Mapping[str, int]) -> Moments:
        """Return empty sums; writers: the rows of the matrices that write to the stream, by name."""
        n = at.stop - at.start
        d = {name: np.zeros((n_rows, n), np.float32) for name, n_rows in writers.items()}
        return cls(at, np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), d)

    def wanted(self, rows: Array, name: str, which: Array | slice) -> Array:
        """Return W c + d for `rows` of the matrix `name`, which are its rows `which`, with all their columns."""
        assert self.c is not None
        found: Array = rows[:, self.at] @ self.c
        return found + self.d[name][which] if name in self.d else found

    def add(self, a: Array, pair: tuple[Array, Array, Array], threads: int | None) -> None:
        """Add tokens of the weights a (n_tokens, 1); pair: x and y with all their columns, and d."""
        x, y, lacking = pair
        own = y[:, self.at]
        add_squares(self.h, a, own, threads)
        assert self.c is not None
        add_products(self.c, (x[:, self.at] - own) * a, own, threads)
        for total in self.d.values():
            add_products(total, lacking * a, own, threads)

    def add_target(self, other: Moments) -> None:
        """Add c and d of other tokens, which are dropped there."""
        if self.c is not None and other.c is not None:
            self.c += other.c
            other.c = None
        for name in list(other.d):
            self.d[name] += other.d.pop(name)


def add_products(total: Array, left: Array, right: Array, threads: int | None) -> None:
    """Add left' right to `total` (m, n); left (n_tokens, m), right (n_tokens, n)."""
    starts = range(0, total.shape[0], _COLUMNS)

    def work(index: int) -> None:
        rows = slice(starts[index], starts[index] + _COLUMNS)
        total[rows] += left[:, rows].T @ right

    for_each(work, len(starts), threads)


def add_squares(total: Array, a: Array, y: Array, threads: int | None) -> None:
    """Add sum_t a_t y_t y_t' to the lower triangle of `total` (n, n); a (n_tokens, 1), y (n_tokens, n)."""
    weighed, starts = y * a, range(0, total.shape[0], _COLUMNS)

    def work(index: int) -> None:
        rows = slice(starts[index], starts[index] + _COLUMNS)
        total[rows, : rows.stop] += weighed[:, rows].T @ y[:, : rows.stop]

    for_each(work, len(starts), threads)


def mirror(total: Array) -> None:
    """Copy the lower triangle of `total` (n, n) to the upper one."""
    for start in range(0, len(total), _COLUMNS):
        rows = slice(start, start + _COLUMNS)
        corner = np.tril(total[rows, rows])
        total[rows, rows] = corner + np.tril(corner, -1).T
        total[:start, rows] = total[rows, :start].T


def column_scale(h: Array) -> Array | None:
    """Return the root of the diagonal of `h`, (n,), with a floor for columns that are never used.

    None where no column is used, or the sums are not finite.
    """
    diagonal = np.diag(h).astype(np.float64)
    mean = diagonal.mean()
    if not mean > 0 or not np.isfinite(mean):
        return None
    scale: Array = np.sqrt(np.maximum(diagonal, _FLOOR * mean))
    return scale
