"""Sums over rows of weights: the first that is not finite, and the error of a reconstruction."""

import numpy as np

from requant.jit import kernel

_LANES = 16  # partial sums side by side; their order is fixed, so the result does not depend on the CPU
ENERGY, ERROR, WEIGHTED_ENERGY, WEIGHTED_ERROR = 0, 1, 2, 3


@kernel
def first_nonfinite(x):
    """x: (n_rows, n) float32 -> flat index of the first NaN or infinity, -1 without one."""
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
def sum_errors(x, y, importance, out):
    """x, y: (n_rows, n) float32, importance: (n,) -> out: (n_rows, 4) float64.

    Columns: sum x^2, sum (x - y)^2, and both again weighted by the importance.
    """
    n = x.shape[1]
    sums = np.empty((4, _LANES), np.float64)
    for r in range(x.shape[0]):
        sums[:] = 0.0
        for first in range(0, n, _LANES):
            for k in range(min(_LANES, n - first)):
                v, w = x[r, first + k], importance[first + k]
                energy, miss = v * v, (v - y[r, first + k]) * (v - y[r, first + k])
                sums[ENERGY, k] += energy
                sums[ERROR, k] += miss
                sums[WEIGHTED_ENERGY, k] += w * energy
                sums[WEIGHTED_ERROR, k] += w * miss
        for c in range(4):
            total = 0.0
            for k in range(_LANES):
                total += sums[c, k]
            out[r, c] = total
