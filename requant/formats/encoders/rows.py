"""Kernels over rows of weights: the first non-finite one, blocks without importance, errors of a reconstruction."""

import numpy as np

from requant.formats.jit import kernel

_LANES = 64  # partial sums side by side; their order is fixed, so the result does not depend on the CPU
ENERGY, ERROR, WEIGHTED_ENERGY, WEIGHTED_ERROR = 0, 1, 2, 3


@kernel
def first_nonfinite(x):
    """Return the flat index of the first NaN or infinity in x: (n_rows, n) float32; -1 without one."""
    for r in range(x.shape[0]):
        bad = 0
        for i in range(x.shape[1]):
            bad += not (abs(x[r, i]) <= np.float32(3.4028235e38))
        if bad:
            for i in range(x.shape[1]):
                if not abs(x[r, i]) <= np.float32(3.4028235e38):
                    return r * x.shape[1] + i
    return -1


@kernel
def mark_unweighted(x, importance, floor, out):
    """x: (n, N) and importance: (k, N) float32, block b has row b % k -> out: (n,) bool.

    True where a block has weights that are not 0, but none of these has an importance above `floor`.
    """
    for b in range(x.shape[0]):
        w = b % importance.shape[0]
        some, weighted = False, False
        for i in range(x.shape[1]):
            if x[b, i] != np.float32(0.0):
                some = True
                if importance[w, i] > floor:
                    weighted = True
                    break
        out[b] = some and not weighted


@kernel
def vanishes(x, y):
    """Return whether the product of two float32, a subnormal number, is zero in the arithmetic of this thread."""
    return x * y == np.float32(0.0)


@kernel
def sum_errors(x, y, importance, out):
    """x, y: (n_rows, n) float32, importance: (n,) -> out: (n_rows, 4) float64.

    Columns: sum x^2, sum (x - y)^2, and both again weighted by the importance.
    """
    n = x.shape[1]
    sums = np.empty((4, _LANES), np.float64)
    energy, error, weighted_energy, weighted_error = (
        sums[ENERGY],
        sums[ERROR],
        sums[WEIGHTED_ENERGY],
        sums[WEIGHTED_ERROR],
    )
    for r in range(x.shape[0]):
        sums[:] = 0.0
        for first in range(0, n, _LANES):
            last = min(first + _LANES, n)
            xs, ys, ws = x[r, first:last], y[r, first:last], importance[first:last]
            for k in range(last - first):  # two loops over few arrays: LLVM gives up on one over all of them
                v = np.float64(xs[k])
                miss = v - np.float64(ys[k])
                energy[k] += v * v
                error[k] += miss * miss
            for k in range(last - first):
                v, w = np.float64(xs[k]), np.float64(ws[k])
                miss = v - np.float64(ys[k])
                weighted_energy[k] += w * (v * v)
                weighted_error[k] += w * (miss * miss)
        for c in range(4):
            out[r, c] = sums[c].sum()
