"""Rounding column by column with feedback: the error of each column is taken off the columns that follow.

Rows do not depend on one another. They lie in the lanes of tiles, so that the innermost loop vectorizes while every sum
of a row stays in order: the bytes depend neither on the CPU nor on the rows beside it.

x: (n_tiles, n_in, LANES) float32, row r of weights in lane r % LANES of tile r // LANES.
e: (n_tiles, PANEL, LANES) float32, errors of the columns since `panel`, each over its diagonal element of u.
u: (n_in, n_in) float32, upper triangular.
"""

import numpy as np

from requant.formats.encoders.fit import IQ4, LINEAR
from requant.formats.encoders.iq4 import code_of_iq4, level_of_iq4
from requant.formats.encoders.levels import code_of_fp4, level_of_fp4
from requant.formats.encoders.search import LANES, ZERO
from requant.formats.jit import kernel

PANEL = 256  # columns whose errors reach those beyond together
STEP = 8  # columns whose errors are taken off together; divides every block
STRIP = 64  # columns of a tile, 16 KiB, that stay in the cache while they take the errors


@kernel
def subtract(x, e, u, panel, first, last, begin, end):
    """Take the errors e[first:last], whole STEPs, off the columns `begin` to `end` of a tile."""
    for strip in range(begin, end, STRIP):
        for i in range(first, last, STEP):
            r = panel + i
            e0, e1, e2, e3 = e[i], e[i + 1], e[i + 2], e[i + 3]
            e4, e5, e6, e7 = e[i + 4], e[i + 5], e[i + 6], e[i + 7]
            for k in range(strip, min(strip + STRIP, end)):
                u0, u1, u2, u3 = u[r, k], u[r + 1, k], u[r + 2, k], u[r + 3, k]
                u4, u5, u6, u7 = u[r + 4, k], u[r + 5, k], u[r + 6, k], u[r + 7, k]
                v = x[k]
                for j in range(LANES):
                    v[j] = (
                        ((((((v[j] - u0 * e0[j]) - u1 * e1[j]) - u2 * e2[j]) - u3 * e3[j]) - u4 * e4[j]) - u5 * e5[j])
                        - u6 * e6[j]
                    ) - u7 * e7[j]


@kernel
def spread_errors(x, e, u, panel, last, begin, end):
    """Take the errors of the columns from `panel` to `panel` + `last` off the columns `begin` to `end`."""
    for t in range(x.shape[0]):
        for first in range(0, last, PANEL):  # what stays in the cache while all columns take it
            subtract(x[t], e[t], u, panel, first, min(first + PANEL, last), begin, end)


@kernel
def round_column(w, e, diagonal, kind, low, high, factors, codes):
    """Round the column w (LANES,): its codes, its errors over the diagonal element of u into e.

    factors: (3, LANES), the scale, its inverse and the minimum of each row; w becomes the values of the codes.
    """
    scale, inverse, least = factors[0], factors[1], factors[2]
    if kind == LINEAR:
        for j in range(LANES):
            q = np.rint((w[j] + least[j]) * inverse[j])
            q = min(q if q > low else low, high)  # a NaN is a code too
            codes[j] = np.uint8(np.int32(q - low))
            v = scale[j] * q - least[j]
            e[j] = (w[j] - v) / diagonal
            w[j] = v
    elif kind == IQ4:
        for j in range(LANES):
            q = w[j] * inverse[j]
            codes[j] = code_of_iq4(q)
            v = scale[j] * level_of_iq4(q)
            e[j] = (w[j] - v) / diagonal
            w[j] = v
    else:
        for j in range(LANES):
            q = w[j] * inverse[j]
            codes[j] = code_of_fp4(q)
            size = scale[j] * level_of_fp4(abs(q))
            v = size if q > ZERO else -size
            e[j] = (w[j] - v) / diagonal
            w[j] = v


@kernel
def _add_squares(w, e, diagonal, sums):
    """Add the squares of a column's weights and of its errors to sums (2, LANES), from the values in w."""
    energy, error = sums[0], sums[1]
    for j in range(LANES):
        miss = np.float64(e[j]) * np.float64(diagonal)
        weight = np.float64(w[j]) + miss
        energy[j] += weight * weight
        error[j] += miss * miss


@kernel
def round_columns(x, e, u, place, levels, factors, codes, sums):
    """Round the columns of one block to the `levels` of a format; place: `panel` and the first column of the block.

    factors: (n_tiles, n_subs, 3, LANES) float32, for the sub-blocks of the block. Out: codes (n_tiles, N, LANES) uint8;
    sums (n_tiles, 2, LANES) float64, to which the squares of weights and errors are added; x holds the values.
    """
    panel, first = place
    sub = codes.shape[1] // factors.shape[1]
    low, high = np.float32(levels.low), np.float32(levels.high)
    for t in range(x.shape[0]):
        for begin in range(first, first + codes.shape[1], STEP):
            subtract(x[t], e[t], u, panel, first - panel, begin - panel, begin, begin + STEP)
            for i in range(begin, begin + STEP):
                errors, at, diagonal = e[t, i - panel], i - first, u[i, i]
                round_column(x[t, i], errors, diagonal, levels.kind, low, high, factors[t, at // sub], codes[t, at])
                _add_squares(x[t, i], errors, diagonal, sums[t])
                for k in range(i + 1, begin + STEP):
                    share, v = u[i, k], x[t, k]
                    for j in range(LANES):
                        v[j] -= share * errors[j]
