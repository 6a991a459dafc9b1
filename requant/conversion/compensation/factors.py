"""Cholesky factors by blocks, in place: a large matrix and its factor are never in memory together."""

from __future__ import annotations

import numpy as np

from requant.model.forward.tape import Array

_BLOCK = 256


def factorize(a: Array) -> None:
    """Replace the symmetric `a` (n, n) by its lower Cholesky factor; only its lower triangle is read.

    Raises LinAlgError where it is not positive definite.
    """
    for here in _blocks(len(a)):
        done = slice(0, here.start)
        a[here, here] -= a[here, done] @ a[here, done].T
        a[here, here] = np.linalg.cholesky(a[here, here])
        inverse = np.linalg.inv(a[here, here])
        for rows in _blocks(len(a), here.stop):
            a[rows, here] = (a[rows, here] - a[rows, done] @ a[here, done].T) @ inverse.T
        a[here, here.stop :] = 0


def invert_triangle(a: Array) -> None:
    """Replace the lower triangle `a` (n, n) by its inverse."""
    for here in reversed(_blocks(len(a))):
        below = slice(here.stop, len(a))
        inverse = np.tril(np.linalg.inv(a[here, here]))
        a[here, here] = inverse
        a[below, here] = a[below, below] @ (a[below, here] @ -inverse)


def solve_rows(factor: Array, rows: Array) -> Array:
    """Return x (m, n) with x @ (factor @ factor.T) = rows."""
    x = rows.copy()
    blocks = _blocks(len(factor))
    for here in blocks:
        done = slice(0, here.start)
        x[:, here] = (x[:, here] - x[:, done] @ factor[here, done].T) @ np.linalg.inv(factor[here, here]).T
    for here in reversed(blocks):
        after = slice(here.stop, len(factor))
        x[:, here] = (x[:, here] - x[:, after] @ factor[after, here]) @ np.linalg.inv(factor[here, here])
    return x


def _blocks(n: int, first: int = 0) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n)) for start in range(first, n, _BLOCK)]
