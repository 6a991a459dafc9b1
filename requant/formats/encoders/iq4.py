"""Search for x = scale * level[q] with IQ4's levels: a half per block (IQ4_NL) or integer scales of one (IQ4_XS).

The steps are search.py's and the errors levels.py's. The nearest level is the lowest one plus a difference for each
threshold that is reached, which vectorizes where a table would not; a threshold belongs to the level above, as in ggml.
"""

import numpy as np

from requant.formats.bits import float_to_half, round_to_half
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.levels import SMALLEST_PEAK, F
from requant.formats.encoders.search import (
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
    ScaleSearch,
    buffers,
    keep_better_fit,
    load,
    measure_peak,
)
from requant.formats.jit import kernel

# rows of t that stand for something else here
TRY_GAIN, BEST_LL, BEST_XL, FITTED = LAST_ERROR, ERROR, DMIN, MIN
KEPT_GAIN, KEPT_D, KEPT_LS, KEPT_LL, KEPT_XL = LOW, SPAN, LM, L, TRY_LM
LOWEST, HIGHEST = F(-127.0), F(113.0)  # of the levels
NOTHING = F(-1e30)  # explained; eight of it can be added


@kernel
def level_of_iq4(v):
    """Return the level of IQ4 nearest to `v`."""
    q = F(-127.0)
    q += F(23.0) if v >= F(-115.5) else F(0.0)
    q += F(21.0) if v >= F(-93.5) else F(0.0)
    q += F(18.0) if v >= F(-74.0) else F(0.0)
    q += F(16.0) if v >= F(-57.0) else F(0.0)
    q += F(14.0) if v >= F(-42.0) else F(0.0)
    q += F(13.0) if v >= F(-28.5) else F(0.0)
    q += F(12.0) if v >= F(-16.0) else F(0.0)
    q += F(11.0) if v >= F(-4.5) else F(0.0)
    q += F(12.0) if v >= F(7.0) else F(0.0)
    q += F(12.0) if v >= F(19.0) else F(0.0)
    q += F(13.0) if v >= F(31.5) else F(0.0)
    q += F(15.0) if v >= F(45.5) else F(0.0)
    q += F(16.0) if v >= F(61.0) else F(0.0)
    q += F(20.0) if v >= F(79.0) else F(0.0)
    q += F(24.0) if v >= F(101.0) else F(0.0)
    return q


@kernel
def code_of_iq4(v):
    """Return the place of `v` among the 15 thresholds of level_of_iq4."""
    q = np.int32(v >= F(-115.5)) + np.int32(v >= F(-93.5)) + np.int32(v >= F(-74.0)) + np.int32(v >= F(-57.0))
    q += np.int32(v >= F(-42.0)) + np.int32(v >= F(-28.5)) + np.int32(v >= F(-16.0)) + np.int32(v >= F(-4.5))
    q += np.int32(v >= F(7.0)) + np.int32(v >= F(19.0)) + np.int32(v >= F(31.5)) + np.int32(v >= F(45.5))
    q += np.int32(v >= F(61.0)) + np.int32(v >= F(79.0)) + np.int32(v >= F(101.0))
    return np.uint8(q)


@kernel
def _sums(x, w, t):
    """Compute the sums over the codes that TRY_INVERSE gives."""
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = x[i, j]
            q = level_of_iq4(v * t[TRY_INVERSE, j])
            wq = w[i, j] * q
            t[LL, j] += wq * q
            t[XL, j] += wq * v


@kernel
def _search(x, w, budget, first, span, t):
    """Find the best SCALE, of either sign, per lane for IQ4's levels.

    The candidates put the largest magnitude from -127 - first to -127 - first - span and, with the other sign, as far
    beyond 113; the last trials start from the best fit, as alternating least squares does.
    """
    measure_peak(x, t)
    step = F(span) / F(budget.candidates - 1)
    for c in range(2 * budget.candidates + budget.repeats):
        beyond = F(first) + step * F(c >> 1)
        side = HIGHEST + beyond if c & 1 else LOWEST - beyond
        for j in range(LANES):
            if c >= 2 * budget.candidates:
                t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] != ZERO else ZERO
            else:
                t[TRY_INVERSE, j] = side / t[PEAK, j] if abs(t[PEAK, j]) > SMALLEST_PEAK else ZERO
        _sums(x, w, t)
        keep_better_fit(t)


@kernel
def _try_integer_scales(x, w, t):
    """Compute what the scales D * TRY_LS explain, per lane, into TRY_GAIN."""
    for j in range(LANES):
        t[SCALE, j] = t[D, j] * t[TRY_LS, j]
        t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] != ZERO else ZERO
    _sums(x, w, t)
    for j in range(LANES):
        t[TRY_GAIN, j] = t[SCALE, j] * (F(2.0) * t[XL, j] - t[SCALE, j] * t[LL, j])


@kernel
def _start(n_subs, end, low, high, t):
    """Set D of each super-block of `n_subs` lanes so that its largest scale is `end`, and LS to match."""
    for g in range(0, LANES, n_subs):
        largest = ZERO
        for j in range(g, g + n_subs):
            if abs(t[FITTED, j]) > abs(largest):
                largest = t[FITTED, j]
        d = round_to_half(largest / end)
        for j in range(g, g + n_subs):
            t[D, j] = d
            t[LS, j] = min(max(np.rint(t[FITTED, j] / d), low), high) if d != ZERO else ZERO


@kernel
def _refine(x, w, low, high, reach, t):
    """Re-choose LS among its neighbours up to `reach` away, by true error; GAIN, BEST_LL and BEST_XL go with it."""
    for j in range(LANES):
        t[GAIN, j] = -HUGE
        t[BEST_LL, j] = ZERO
        t[BEST_XL, j] = ZERO
        t[BASE_LS, j] = t[LS, j]
    for a in range(-reach, reach + 1):
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
    """Take LS as kept; solve D anew for its codes, and take that where it explains more than the D kept."""
    for g in range(0, LANES, n_subs):
        aa = xa = ZERO
        for j in range(g, g + n_subs):
            aa += t[KEPT_LS, j] * t[KEPT_LS, j] * t[KEPT_LL, j]
            xa += t[KEPT_LS, j] * t[KEPT_XL, j]
        d = round_to_half(xa / aa) if aa > ZERO else t[KEPT_D, g]
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
def _fit_super_blocks(x, w, scale_top, n_subs, budget, t):
    """Fit LS in -scale_top .. scale_top - 1 and the half D per super-block of `n_subs` lanes to SCALE.

    D starts from the largest scale at either end of LS, because it matters which end has the spare integer, or further
    out.
    """
    low, high = -F(scale_top), F(scale_top - 1)
    for j in range(LANES):
        t[FITTED, j] = t[SCALE, j]
        t[KEPT_GAIN, j] = NOTHING
    for start in range(budget.starts):
        beyond = ONE + F(0.03) * F(start >> 1)
        _start(n_subs, (high if start & 1 else low) * beyond, low, high, t)
        _refine(x, w, low, high, budget.reach, t)
        _keep_better(n_subs, t)
    _refit(x, w, n_subs, t)


@kernel
def _write(subs, start, t, codes):
    """Write the codes of sub-blocks subs[start:start + LANES]: of the level nearest for scale D * LS."""
    for j in range(min(LANES, subs.shape[0] - start)):
        scale = t[D, j] * t[LS, j]
        inverse = ONE / scale if scale != ZERO else ZERO
        for i in range(subs.shape[1]):
            codes[start + j, i] = code_of_iq4(subs[start + j, i] * inverse)


@kernel
def _encode(subs, importance, search, budget, out):
    """Kernel of encode_iq4, with the same arrays; one for both formats."""
    _, scale_top, n_subs, first, span = search
    d, scales, codes = out
    x, w, t = buffers(subs.shape[1])
    for start in range(0, subs.shape[0], LANES):
        load(subs, importance, start, x, w)
        _search(x, w, budget, first, span, t)
        if n_subs == 1:
            for j in range(LANES):
                t[D, j] = round_to_half(t[SCALE, j])
                t[LS, j] = ONE
        else:
            _fit_super_blocks(x, w, scale_top, n_subs, budget, t)
        _write(subs, start, t, codes)
        for j in range(min(LANES, subs.shape[0] - start)):
            scales[start + j] = np.int8(t[LS, j])
        for j in range(0, min(LANES, subs.shape[0] - start), n_subs):
            d[(start + j) // n_subs] = float_to_half(t[D, j])


def encode_iq4(x, importance, n_subs, scale_top, budget, first, span):
    """Fit codes of `x` (n, N) with sub-blocks of N / n_subs weights: x = d * scale * level of IQ4.

    The Fit has scales in -scale_top .. scale_top - 1, int8; with n_subs 1 there are none (all 1). `first` and `span`
    are those of _search.
    """
    n, sub = len(x), x.shape[1] // n_subs
    d, scales = np.empty(n, np.uint16), np.empty(n * n_subs, np.int8)
    codes = np.empty((n * n_subs, sub), np.uint8)
    subs, weights = x.reshape(-1, sub), importance.reshape(-1, sub)
    _encode(subs, weights, ScaleSearch(15, scale_top, n_subs, first, span), budget, (d, scales, codes))
    return Fit(d, scales.reshape(n, n_subs), codes.reshape(n, n_subs, sub))
