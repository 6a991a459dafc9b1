"""The best words of a codebook for the weights of a tile at given scales: the inner loops of the IQ search.

Rounding each weight of a word to a level gives a cell; the NEAREST words of the cell (neighbours.py) lie side by side,
so that the loop over them vectorizes.

x, w: (sub, LANES) float32, sub-block j in column j; t: (ROWS, LANES) float32, its rows named in search.py and below.
"""

from typing import NamedTuple

import numpy as np

from requant.formats.bits import bits_to_float
from requant.formats.encoders.neighbours import NEAREST
from requant.formats.encoders.search import (
    BASE_LS,
    HUGE,
    LANES,
    LAST_ERROR,
    LL,
    LOW,
    MIN,
    ONE,
    SPAN,
    SUM_W,
    SUM_X,
    TRY_INVERSE,
    TRY_SCALE,
    XL,
    ZERO,
)
from requant.formats.jit import kernel

# rows of t that stand for something else here
COST, AT, LEVEL = LOW, SPAN, MIN
BEST_D = BASE_LS  # LS, ERROR and BEST_D are those of the words kept
TRY_SUM, TRY_OTHER, TRY_ERROR = SUM_W, SUM_X, LAST_ERROR
SMALLEST, LARGEST = np.float32(1e-30), np.float32(1e30)  # scales beyond do not fit a half, nor have they an inverse
MINUS = np.uint16(0x8000)  # in a word's number: delta is subtracted


class Shape(NamedTuple):
    """The parameters of a format in the search; all formats have the same field types, so one kernel serves them."""

    sub: int  # weights that share a scale
    dim: int  # weights of a word
    low: np.float32  # level c = 0 .. top is low + step * c, about
    step: np.float32
    bend: np.float32  # low, low + step, low + 2 * (step + bend) where there are three levels
    top: int
    delta: np.float32  # added to or subtracted from a word; 0 where weights have signs instead
    per_delta: int  # words that share the choice
    even: bool  # whether the minuses of eight weights must be an even number
    scale_top: int  # integer scales 0 .. scale_top
    unit: np.float32  # of d
    first: np.float32  # candidates for the largest weight, in multiples of the top level
    stride: np.float32


@kernel
def inverse_of(scale):
    return ONE / scale if SMALLEST < scale < LARGEST else ZERO


@kernel
def find_cells(x, delta, shape, t, cells):
    """Find the cell of every word's weights at TRY_SCALE with `delta` added; cells: (n_words, LANES) int32."""
    low, inverse, high = shape.low + delta, ONE / shape.step, np.float32(shape.top)
    base = np.int32(shape.top + 1)
    for j in range(LANES):
        t[TRY_INVERSE, j] = inverse_of(t[TRY_SCALE, j])
    for g in range(cells.shape[0]):
        for j in range(LANES):
            cells[g, j] = 0
        for i in range(g * shape.dim, (g + 1) * shape.dim):
            for j in range(LANES):
                code = np.rint((x[i, j] * t[TRY_INVERSE, j] - low) * inverse)
                code = min(code if code > ZERO else ZERO, high)  # a NaN is a cell too
                cells[g, j] = cells[g, j] * base + np.int32(code)


@kernel
def pick_of_4(x, w, values, cells, count, t, keys):
    """Find the best word of every cell as a key: the bits of its weighted squared error, its place in the lowest four.

    Positive floats have the order of their bits, so that a minimum over integers finds it. values: (n_cells, 4,
    NEAREST) int8; cells, keys: (n_words, LANES) int32.
    """
    for g in range(cells.shape[0]):
        i = 4 * g
        for j in range(count):
            scale, cell = t[TRY_SCALE, j], cells[g, j]
            x0, x1, x2, x3 = x[i, j], x[i + 1, j], x[i + 2, j], x[i + 3, j]
            w0, w1, w2, w3 = w[i, j], w[i + 1, j], w[i + 2, j], w[i + 3, j]
            best = np.int32(0x7FFFFFFF)
            for k in range(NEAREST):
                m0 = x0 - scale * np.float32(values[cell, 0, k])
                m1 = x1 - scale * np.float32(values[cell, 1, k])
                m2 = x2 - scale * np.float32(values[cell, 2, k])
                m3 = x3 - scale * np.float32(values[cell, 3, k])
                error = (w0 * m0 * m0 + w1 * m1 * m1) + (w2 * m2 * m2 + w3 * m3 * m3)
                key = np.int32(np.float32(error).view(np.int32) & np.int32(-NEAREST))
                best = min(best, np.int32(key | np.int32(k)))
            keys[g, j] = best


@kernel
def level_costs(x, w, delta, shape, t, base, cost):
    """Compute what level c = 0, 1, 2 costs a weight, a polynomial: its share of base + cost[0] c' + cost[1] c'**2.

    c' = c * 4**(i % 8), as a mask cuts it out of a word's codes. cost: (2, sub, LANES), base: a row for each word.
    """
    q0, q1 = shape.low, shape.low + shape.step
    q2 = q1 + shape.step + shape.bend + shape.bend
    three, four, half = np.float32(3.0), np.float32(4.0), np.float32(0.5)
    a, b = (four * q1 - three * q0 - q2) * half, (q0 + q2) * half - q1  # q = q0 + a c + b c^2
    aa, bb = (four * q1 * q1 - three * q0 * q0 - q2 * q2) * half, (q0 * q0 + q2 * q2) * half - q1 * q1  # and q^2
    for i in range(x.shape[0]):
        place = np.float32(0.25 ** (i % 8))
        if i % 8 == 0:
            for j in range(LANES):
                base[i // 8, j] = ZERO
        for j in range(LANES):
            scale = t[TRY_SCALE, j]
            v = x[i, j] - scale * delta
            miss, ws, v2 = v - scale * q0, w[i, j] * scale * place, v + v
            base[i // 8, j] += w[i, j] * miss * miss
            cost[0, i, j] = ws * (scale * aa - v2 * a)
            cost[1, i, j] = ws * place * (scale * bb - v2 * b)


@kernel
def pick_of_8(codes, cells, count, base, cost, keys):
    """Find keys as pick_of_4, of words of eight with three levels, by their costs; codes: (n_cells, NEAREST)."""
    for g in range(cells.shape[0]):
        i = 8 * g
        for j in range(count):
            cell, start = cells[g, j], base[g, j]
            a0, a1, a2, a3 = cost[0, i, j], cost[0, i + 1, j], cost[0, i + 2, j], cost[0, i + 3, j]
            a4, a5, a6, a7 = cost[0, i + 4, j], cost[0, i + 5, j], cost[0, i + 6, j], cost[0, i + 7, j]
            b0, b1, b2, b3 = cost[1, i, j], cost[1, i + 1, j], cost[1, i + 2, j], cost[1, i + 3, j]
            b4, b5, b6, b7 = cost[1, i + 4, j], cost[1, i + 5, j], cost[1, i + 6, j], cost[1, i + 7, j]
            best = np.int32(0x7FFFFFFF)
            for k in range(NEAREST):
                code = np.int32(codes[cell, k])
                c0, c1 = np.float32(np.int32(code & np.int32(0x3))), np.float32(np.int32(code & np.int32(0xC)))
                c2, c3 = np.float32(np.int32(code & np.int32(0x30))), np.float32(np.int32(code & np.int32(0xC0)))
                c4, c5 = np.float32(np.int32(code & np.int32(0x300))), np.float32(np.int32(code & np.int32(0xC00)))
                c6, c7 = np.float32(np.int32(code & np.int32(0x3000))), np.float32(np.int32(code & np.int32(0xC000)))
                error = (c0 * (a0 + b0 * c0) + c1 * (a1 + b1 * c1)) + (c2 * (a2 + b2 * c2) + c3 * (a3 + b3 * c3))
                error += (c4 * (a4 + b4 * c4) + c5 * (a5 + b5 * c5)) + (c6 * (a6 + b6 * c6) + c7 * (a7 + b7 * c7))
                key = np.int32(np.float32(start + error).view(np.int32) & np.int32(-NEAREST))
                best = min(best, np.int32(key | np.int32(k)))
            keys[g, j] = best


@kernel
def find_errors(keys, shape, minus, t):
    """Sum TRY_ERROR of the words picked; minus (n_words, LANES): whether delta is subtracted, per_delta words alike."""
    for j in range(LANES):
        t[TRY_ERROR, j] = ZERO
    for start in range(0, minus.shape[0], shape.per_delta):
        for j in range(LANES):
            t[TRY_SUM, j] = ZERO
            t[TRY_OTHER, j] = ZERO if shape.delta != ZERO else HUGE
        for g in range(start, start + shape.per_delta):
            for j in range(LANES):
                t[TRY_SUM, j] += bits_to_float(np.uint32(keys[0, g, j] & np.int32(-NEAREST)))
                t[TRY_OTHER, j] += bits_to_float(np.uint32(keys[1, g, j] & np.int32(-NEAREST)))
        for g in range(start, start + shape.per_delta):
            for j in range(LANES):
                minus[g, j] = t[TRY_OTHER, j] < t[TRY_SUM, j]
        for j in range(LANES):
            t[TRY_ERROR, j] += min(t[TRY_SUM, j], t[TRY_OTHER, j])


@kernel
def keep_words(near, cells, keys, minus, j, best):
    """Store the words picked for lane `j` in best, with MINUS where delta is subtracted; near: (n_cells, NEAREST)."""
    for g in range(best.shape[0]):
        m = np.int32(minus[g, j])
        word = near[cells[m, g, j], keys[m, g, j] & np.int32(NEAREST - 1)]
        best[g, j] = word | np.uint16(m << 15)


@kernel
def sum_levels(x, w, words, best, count, shape, q, t):
    """Compute the sums LL and XL over the levels of the words in best; the levels are left in q (sub, LANES)."""
    for g in range(best.shape[0]):
        for j in range(count):
            delta = -shape.delta if best[g, j] & MINUS else shape.delta
            word = best[g, j] & np.uint16(0x7FFF)
            for n in range(shape.dim):
                q[g * shape.dim + n, j] = words[word, n] + delta
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            wq = w[i, j] * q[i, j]
            t[LL, j] += wq * q[i, j]
            t[XL, j] += wq * x[i, j]
