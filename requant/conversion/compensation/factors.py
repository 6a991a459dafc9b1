"""Cholesky factors by blocks, in place: a large matrix and its factor are never in memory together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from requant.model.forward.tape import Array

_BLOCK = 256
_LEAF = 32  # columns of a triangle that is inverted as any matrix

Inverses = Sequence[Array]  # of the blocks on the diagonal of a factor


def factorize(a: Array) -> Inverses:
    """Replace the symmetric `a` (n, n) by its lower Cholesky factor; only its lower triangle is read.

    Raises LinAlgError where it is not positive definite.
    """
    inverses = []
    for here in _blocks(len(a)):
        done = slice(0, here.start)
        a[here, here] -= a[here, done] @ a[here, done].T
        a[here, here] = np.linalg.cholesky(a[here, here])
        inverses.append(_inverse(a[here, here]))
        for rows in _blocks(len(a), here.stop):
            a[rows, here] = (a[rows, here] - a[rows, done] @ a[here, done].T) @ inverses[-1].T
        a[here, here.stop :] = 0
    return inverses


def invert_triangle(a: Array, inverses: Inverses) -> None:
    """Replace the factor `a` (n, n) by its inverse."""
    for here, inverse in reversed(list(zip(_blocks(len(a)), inverses, strict=True))):
        below = slice(here.stop, len(a))
        a[here, here] = inverse
        a[below, here] = a[below, below] @ (a[below, here] @ -inverse)


def solve_rows(factor: Array, inverses: Inverses, rows: Array) -> Array:
    """Return x (m, n) with x @ (factor @ factor.T) = rows."""
    x = rows.copy()
    blocks = list(zip(_blocks(len(factor)), inverses, strict=True))
    for here, inverse in blocks:
        done = slice(0, here.start)
        x[:, here] = (x[:, here] - x[:, done] @ factor[here, done].T) @ inverse.T
    for here, inverse in reversed(blocks):
        after = slice(here.stop, len(factor))
        x[:, here] = (x[:, here] - x[:, after] @ factor[after, here]) @ inverse
    return x


def _inverse(a: Array) -> Array:
    """Return the inverse of a lower triangle, by halves."""
    n = len(a)
    if n <= _LEAF:
        return np.tril(np.linalg.inv(a))
    upper, lower = slice(0, n // 2), slice(n // 2, n)
    out = np.zeros_like(a)
    out[upper, upper], out[lower, lower] = _inverse(a[upper, upper]), _inverse(a[lower, lower])
    out[lower, upper] = out[lower, lower] @ (a[lower, upper] @ -out[upper, upper])
    return out


def _blocks(n: int, first: int = 0) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n)) for start in range(first, n, _BLOCK)]
