"""The steps and the tiles that the scale searches share: sub-blocks lie side by side.

LANES sub-blocks lie in the columns of a tile, so that the innermost loop runs over lanes and vectorizes while every
sum inside a sub-block stays in order: the bytes do not depend on the CPU's vector width.

A trial (affine.py, symmetric.py) quantizes a tile with some 1 / scale and min, solves for the scale and min that suit
those codes best, and keeps them where the error fell. Candidates over the range come first, then trials from the best
fit so far (alternating least squares), then the integer scales of a super-block are re-chosen by their true error and
its half-precision factors refitted. An error is compared through its complement, the part of sum(w x^2) explained.

x, w: (n, LANES) float32, sub-block j in column j; t: (ROWS, LANES) float32, its rows named below.
"""

from typing import NamedTuple

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


class SearchBudget(NamedTuple):
    """The effort of a search; each search uses the fields that it has steps for."""

    candidates: int = 0  # scales over the range; with either sign where scales have one
    repeats: int = 0  # of alternating least squares from the best candidate
    starts: int = 1  # of a super-block's d
    reach: int = 0  # how far an integer scale may move when it is re-chosen
    rounds: int = 1  # of integer scales and d in turn; of codewords and scale in turn
    beside: int = 0  # integer scales that codewords are chosen for


class ScaleSearch(NamedTuple):
    """The codes of a format and the scales to search: what does not change from one tile to the next."""

    top: int  # the largest code
    scale_top: int  # the largest integer scale
    n_subs: int  # sub-blocks of a block; 1 where there are no integer scales
    first: float  # the candidates begin here, in codes ...
    span: float  # ... and cover so many


@kernel
def buffers(n):
    """Return empty x, w and t for sub-blocks of `n` weights."""
    return np.empty((n, LANES), np.float32), np.empty((n, LANES), np.float32), np.zeros((ROWS, LANES), np.float32)


@kernel
def load(subs, importance, first, x, w):
    """Load the tile of sub-blocks from `first` on: subs (m, n), importance (k, n) that repeats every k sub-blocks."""
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


@kernel
def measure_peak(x, t):
    """Find the weight of largest magnitude, into PEAK, and forget the last tile's fit."""
    for j in range(LANES):
        t[PEAK, j] = ZERO
        t[SCALE, j] = ZERO
        t[GAIN, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            t[PEAK, j] = x[i, j] if abs(x[i, j]) > abs(t[PEAK, j]) else t[PEAK, j]


@kernel
def keep_better_fit(t):
    """Fit the scale to the sums of a trial; keep it where it explains more."""
    for j in range(LANES):
        scale = t[XL, j] / t[LL, j] if t[LL, j] > ZERO else ZERO
        gain = scale * t[XL, j]
        if gain > t[GAIN, j]:
            t[GAIN, j] = gain
            t[SCALE, j] = scale


@kernel
def undo_worse_refits(n_subs, t):
    """Put D and DMIN back to BASE_LS and BASE_LM in the super-blocks of `n_subs` lanes whose error has not fallen."""
    for g in range(0, LANES, n_subs):
        before = after = ZERO
        for j in range(g, g + n_subs):
            before += t[ERROR, j]
            after += t[LAST_ERROR, j]
        for j in range(g, g + n_subs):
            if after < before:
                t[ERROR, j] = t[LAST_ERROR, j]
            else:
                t[D, j] = t[BASE_LS, j]
                t[DMIN, j] = t[BASE_LM, j]


def is_flat(importance):
    """Return whether every weight counts the same."""
    return bool((importance == importance[0, 0]).all())
