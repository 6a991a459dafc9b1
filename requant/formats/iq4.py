"""Search for x = scale * level[q] with IQ4's levels: a half per block (IQ4_NL) or integer scales of one (IQ4_XS)."""

import numpy as np

from requant.formats.levels import (
    IQ4,
    SMALLEST_PEAK,
    F,
    iq4_code,
    level_sums,
    level_trial,
    measure_peak,
    repeat_trials,
    to_half,
)
from requant.formats.search import (
    BASE_LS,
    DMIN,
    ERROR,
    GAIN,
    HUGE,
    LANES,
    LAST_ERROR,
    LL,
    LM,
    LOW,
    LS,
    MIN,
    ONE,
    PEAK,
    SCALE,
    SPAN,
    TRY_INVERSE,
    TRY_LM,
    TRY_LS,
    XL,
    ZERO,
    D,
    L,
)
from requant.jit import kernel

# rows of t that stand for something else here
TRY_GAIN, BEST_LL, BEST_XL, FITTED = LAST_ERROR, ERROR, DMIN, MIN
KEPT_GAIN, KEPT_D, KEPT_LS, KEPT_LL, KEPT_XL = LOW, SPAN, LM, L, TRY_LM
LOWEST, HIGHEST = F(-127.0), F(113.0)  # of the levels
NOTHING = F(-1e30)  # explained; eight of it can be added


@kernel
def _search(x, w, n_candidates, first, step, t):
    """Best SCALE, of either sign, per lane for IQ4's levels.

    The candidates put the largest magnitude at -127 - first, -127 - first - step, ... and, with the other sign, as far
    beyond 113.
    """
    measure_peak(x, t)
    for c in range(n_candidates):
        beyond = F(first) + F(step) * F(c)
        for side in (LOWEST - beyond, HIGHEST + beyond):
            for j in range(LANES):
                t[TRY_INVERSE, j] = side / t[PEAK, j] if abs(t[PEAK, j]) > SMALLEST_PEAK else ZERO
            level_trial(x, w, IQ4, t)
    repeat_trials(x, w, IQ4, 1, t)


@kernel
def iq4_blocks(x, w, n_candidates, first, step, t):
    """The half D per lane: x = D * level; the candidates as in _search."""
    _search(x, w, n_candidates, first, step, t)
    for j in range(LANES):
        t[D, j] = to_half(t[SCALE, j])
        t[LS, j] = ONE


@kernel
def _try_integer_scales(x, w, t):
    """What the scales D * TRY_LS explain, per lane, into TRY_GAIN."""
    for j in range(LANES):
        t[SCALE, j] = t[D, j] * t[TRY_LS, j]
        t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] != ZERO else ZERO
    level_sums(x, w, IQ4, t)
    for j in range(LANES):
        t[TRY_GAIN, j] = t[SCALE, j] * (F(2.0) * t[XL, j] - t[SCALE, j] * t[LL, j])


@kernel
def _start(n_subs, end, low, high, t):
    """D of each super-block of `n_subs` lanes that makes its largest scale `end`, and LS to match."""
    for g in range(0, LANES, n_subs):
        largest = ZERO
        for j in range(g, g + n_subs):
            if abs(t[FITTED, j]) > abs(largest):
                largest = t[FITTED, j]
        d = to_half(largest / end)
        for j in range(g, g + n_subs):
            t[D, j] = d
            t[LS, j] = min(max(np.rint(t[FITTED, j] / d), low), high) if d != ZERO else ZERO


@kernel
def _refine(x, w, low, high, t):
    """Re-choose LS among itself and its neighbours, by true error; GAIN, BEST_LL and BEST_XL are of the choice."""
    for j in range(LANES):
        t[GAIN, j] = -HUGE
        t[BEST_LL, j] = ZERO
        t[BEST_XL, j] = ZERO
        t[BASE_LS, j] = t[LS, j]
    for a in range(-1, 2):
        for j in range(LANES):
            t[TRY_LS, j] = min(max(t[BASE_LS, j] + F(a), low), high)
        _try_integer_scales(x, w, t)
        for j in range(LANES):
            if t[TRY_GAIN, j] > t[GAIN, j]:
                t[GAIN, j] = t[TRY_GAIN, j]
                t[LS, j] = t[TRY_LS, j]
                t[BEST_LL, j] = t[LL, j]
                t[BEST_XL, j] = t[XL, j]


@kernel
def _group_sum(row, first, n):
    total = ZERO
    for j in range(first, first + n):
        total += row[j]
    return total


@kernel
def _keep_better(n_subs, t):
    """Keep the super-blocks that the last start suits better than those before."""
    for g in range(0, LANES, n_subs):
        if _group_sum(t[GAIN], g, n_subs) > _group_sum(t[KEPT_GAIN], g, n_subs):
            for j in range(g, g + n_subs):
                t[KEPT_GAIN, j] = t[GAIN, j]
                t[KEPT_D, j] = t[D, j]
                t[KEPT_LS, j] = t[LS, j]
                t[KEPT_LL, j] = t[BEST_LL, j]
                t[KEPT_XL, j] = t[BEST_XL, j]


@kernel
def _refit(x, w, n_subs, t):
    """LS as kept, and D solved anew for its codes, where that explains more than the D that was kept."""
    for g in range(0, LANES, n_subs):
        aa = xa = ZERO
        for j in range(g, g + n_subs):
            aa += t[KEPT_LS, j] * t[KEPT_LS, j] * t[KEPT_LL, j]
            xa += t[KEPT_LS, j] * t[KEPT_XL, j]
        d = to_half(xa / aa) if aa > ZERO else t[KEPT_D, g]
        for j in range(g, g + n_subs):
            t[D, j] = d
            t[LS, j] = t[KEPT_LS, j]
            t[TRY_LS, j] = t[KEPT_LS, j]
    _try_integer_scales(x, w, t)
    for g in range(0, LANES, n_subs):
        if _group_sum(t[TRY_GAIN], g, n_subs) <= _group_sum(t[KEPT_GAIN], g, n_subs):
            for j in range(g, g + n_subs):
                t[D, j] = t[KEPT_D, j]


@kernel
def iq4_super_blocks(x, w, scale_top, n_subs, n_candidates, first, step, t):
    """LS in -scale_top .. scale_top - 1 per lane and the half D per super-block of `n_subs` lanes: x = D * LS * level.

    The candidates as in _search. D starts from the largest scale at either end of LS, for which end has the spare
    integer matters.
    """
    _search(x, w, n_candidates, first, step, t)
    low, high = -F(scale_top), F(scale_top - 1)
    for j in range(LANES):
        t[FITTED, j] = t[SCALE, j]
        t[KEPT_GAIN, j] = NOTHING
    for end in (low, high):
        _start(n_subs, end, low, high, t)
        _refine(x, w, low, high, t)
        _keep_better(n_subs, t)
    _refit(x, w, n_subs, t)


@kernel
def iq4_codes(subs, first, t, codes):
    """Codes of sub-blocks subs[first:first + LANES], row-major: of the level nearest for scale D * LS."""
    for j in range(min(LANES, subs.shape[0] - first)):
        scale = t[D, j] * t[LS, j]
        inverse = ONE / scale if scale != ZERO else ZERO
        for i in range(subs.shape[1]):
            codes[j, i] = iq4_code(subs[first + j, i] * inverse)
