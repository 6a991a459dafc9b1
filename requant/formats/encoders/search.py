"""What the scale searches of the linear formats share: tiles of sub-blocks side by side.

LANES sub-blocks lie in the columns of a tile, so that the innermost loop runs over lanes and vectorizes while every
sum inside a sub-block stays in order: the bytes do not depend on the CPU's vector width.

A trial (affine.py, symmetric.py) quantizes a tile with some 1 / scale and min, solves for the scale and min that suit
those codes best, and keeps them where the error fell. Candidates over the range come first, then trials from the best
fit so far (alternating least squares), then the integer scales of a super-block are re-chosen by their true error and
its half-precision factors refitted. An error is compared through its complement, the part of sum(w x^2) explained.

x, w: (n, LANES) float32, sub-block j in column j; t: (ROWS, LANES) float32, its rows named below.
"""

import numpy as np

from requant.formats.jit import kernel

LANES = 64
# rows of t: what is known of each lane
LOW, SPAN, PEAK, SUM_W, SUM_X = 0, 1, 2, 3, 4
TRY_INVERSE, TRY_MIN, TRY_LS, TRY_LM = 5, 6, 7, 8
L, LL, XL = 9, 10, 11  # sums of w q, w q^2, w x q for the codes of the trial
GAIN, SCALE, MIN = 12, 13, 14
D, DMIN, LS, LM, ERROR, LAST_ERROR = 15, 16, 17, 18, 19, 20
BASE_LS, BASE_LM = 21, 22
TRY_SCALE = 23
ROWS = 24

ZERO, ONE = np.float32(0.0), np.float32(1.0)
HUGE = np.float32(3.0e38)


@kernel
def buffers(n):
    """Empty x, w and t for sub-blocks of `n` weights."""
    return np.empty((n, LANES), np.float32), np.empty((n, LANES), np.float32), np.zeros((ROWS, LANES), np.float32)


@kernel
def load(subs, importance, first, x, w):
    """Tile of the sub-blocks from `first` on: subs (m, n), importance (k, n) that repeats every k sub-blocks."""
    _load_tile(subs, first, x)
    if first == 0 or LANES % importance.shape[0] != 0:  # else the last tile's weights are right already
        _load_tile(importance, first, w)


@kernel
def _load_tile(rows, first, tile):
    """rows: (m, n), cyclic -> tile: (n, LANES), tile[i, j] = rows[(first + j) % m, i]."""
    m, n = rows.shape
    for j in range(LANES):
        r = first + j
        if r >= m:  # rarely; a division for each lane would make loading a quarter slower
            r %= m
        for i in range(n):
            tile[i, j] = rows[r, i]


def is_flat(importance):
    """Whether every weight counts the same."""
    return bool((importance == importance[0, 0]).all())
