"""Search for x = scale * q: codes -top..top - 1 and a signed scale per sub-block (Q3_K, Q6_K, Q4_0, Q5_0, Q8_0)."""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.search import (
    BASE_LS,
    ERROR,
    HUGE,
    LANES,
    LAST_ERROR,
    LL,
    LOW,
    LS,
    MIN,
    ONE,
    PEAK,
    SCALE,
    SPAN,
    SUM_W,
    TRY_INVERSE,
    TRY_LS,
    XL,
    ZERO,
    D,
    ScaleSearch,
    SearchBudget,
    buffers,
    keep_better_fit,
    load,
    measure_peak,
    undo_worse_refits,
)
from requant.formats.jit import kernel

# rows of t that stand for something else here
FITTED, KEPT_D, KEPT_LS, KEPT_ERROR = MIN, SPAN, SUM_W, LOW


BLOCKS = (SearchBudget(4, 1), SearchBudget(5, 2), SearchBudget(10, 2))  # of formats without integer scales, by effort


@kernel
def _symmetric_sums(x, w, top, t):
    """Compute the sums over the codes -top .. top - 1 that TRY_INVERSE gives."""
    low, high = -np.float32(top), np.float32(top - 1)
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = x[i, j]
            q = min(max(np.rint(v * t[TRY_INVERSE, j]), low), high)
            wq = w[i, j] * q
            t[LL, j] += wq * q
            t[XL, j] += wq * v


@kernel
def _symmetric_trial(x, w, top, t):
    """Fit the scale to the codes of the trial; keep it where it explains more."""
    _symmetric_sums(x, w, top, t)
    keep_better_fit(t)


@kernel
def _search_symmetric(x, w, top, budget, first, span, t):
    """Find the best SCALE (of either sign) per lane for codes -top .. top - 1.

    The candidates put the largest magnitude at codes from -(top + first) to -(top + first + span) and, with the
    other sign, at the same distances beyond top - 1: which side has the spare code matters.
    """
    measure_peak(x, t)
    for j in range(LANES):
        t[PEAK, j] = ONE / t[PEAK, j] if t[PEAK, j] != ZERO else ZERO
    step = np.float32(span) / np.float32(budget.candidates - 1)
    for c in range(budget.candidates):
        reach = np.float32(top) + np.float32(first) + step * np.float32(c)
        for side in (-reach, reach - ONE):
            for j in range(LANES):
                t[TRY_INVERSE, j] = side * t[PEAK, j]
            _symmetric_trial(x, w, top, t)
    for _ in range(budget.repeats):
        for j in range(LANES):
            t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] != ZERO else ZERO
        _symmetric_trial(x, w, top, t)


@kernel
def _symmetric_error(x, w, top, t):
    """Compute the weighted squared error per lane, into LAST_ERROR, of scales D * TRY_LS."""
    low, high = -np.float32(top), np.float32(top - 1)
    for j in range(LANES):
        t[SCALE, j] = t[D, j] * t[TRY_LS, j]
        t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] != ZERO else ZERO
        t[LAST_ERROR, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            q = min(max(np.rint(x[i, j] * t[TRY_INVERSE, j]), low), high)
            miss = t[SCALE, j] * q - x[i, j]
            t[LAST_ERROR, j] += w[i, j] * miss * miss


@kernel
def _refine_symmetric(x, w, top, scale_top, reach, t):
    """Re-choose LS among its neighbours up to `reach` away, by true error."""
    low, high = -np.float32(scale_top), np.float32(scale_top - 1)
    for j in range(LANES):
        t[ERROR, j] = HUGE
        t[BASE_LS, j] = t[LS, j]
    for a in range(-reach, reach + 1):
        for j in range(LANES):
            t[TRY_LS, j] = min(max(t[BASE_LS, j] + np.float32(a), low), high)
        _symmetric_error(x, w, top, t)
        for j in range(LANES):
            if t[LAST_ERROR, j] < t[ERROR, j]:
                t[ERROR, j] = t[LAST_ERROR, j]
                t[LS, j] = t[TRY_LS, j]


@kernel
def _refit_symmetric(x, w, top, n_subs, t):
    """Solve each super-block's D anew for its codes and integer scales; keep it where the error falls."""
    for j in range(LANES):
        scale = t[D, j] * t[LS, j]
        t[TRY_INVERSE, j] = ONE / scale if scale != ZERO else ZERO
        t[TRY_LS, j] = t[LS, j]
        t[BASE_LS, j] = t[D, j]  # what to go back to
    _symmetric_sums(x, w, top, t)
    for g in range(0, LANES, n_subs):
        aa = xa = ZERO
        for j in range(g, g + n_subs):
            aa += t[LS, j] * t[LS, j] * t[LL, j]
            xa += t[LS, j] * t[XL, j]
        d = half_to_float(float_to_half(xa / aa)) if aa > ZERO else t[D, g]
        for j in range(g, g + n_subs):
            t[D, j] = d
    _symmetric_error(x, w, top, t)
    undo_worse_refits(n_subs, t)


@kernel
def _start(end, low, high, n_subs, t):
    """Set D of each super-block of `n_subs` lanes so that its largest scale is `end`, and LS to match."""
    for g in range(0, LANES, n_subs):
        largest = ZERO
        for j in range(g, g + n_subs):
            if abs(t[FITTED, j]) > abs(largest):
                largest = t[FITTED, j]
        d = half_to_float(float_to_half(largest / end))
        for j in range(g, g + n_subs):
            t[D, j] = d
            t[LS, j] = min(max(np.rint(t[FITTED, j] / d), low), high) if d != ZERO else ZERO


@kernel
def _keep_better(first, n_subs, t):
    """Keep the super-blocks of the `first` start, and those with less error in a later one."""
    for g in range(0, LANES, n_subs):
        before = after = ZERO
        for j in range(g, g + n_subs):
            before += t[KEPT_ERROR, j]
            after += t[ERROR, j]
        if first or after < before:
            for j in range(g, g + n_subs):
                t[KEPT_ERROR, j] = t[ERROR, j]
                t[KEPT_D, j] = t[D, j]
                t[KEPT_LS, j] = t[LS, j]


@kernel
def _fit_super_blocks(x, w, top, scale_top, n_subs, budget, t):
    """Fit LS in -scale_top .. scale_top - 1 and the half D per super-block of `n_subs` lanes to SCALE.

    D starts from the largest scale at either end of LS, because it matters which end has the spare integer, or further
    out.
    """
    low, high = -np.float32(scale_top), np.float32(scale_top - 1)
    for j in range(LANES):
        t[FITTED, j] = t[SCALE, j]
        t[KEPT_ERROR, j] = ZERO
    for start in range(budget.starts):
        beyond = ONE + np.float32(0.03) * np.float32(start >> 1)
        _start((high if start & 1 else low) * beyond, low, high, n_subs, t)
        for _ in range(budget.rounds):
            _refine_symmetric(x, w, top, scale_top, budget.reach, t)
            _refit_symmetric(x, w, top, n_subs, t)
        _keep_better(start == 0, n_subs, t)
    for j in range(LANES):
        t[D, j] = t[KEPT_D, j]
        t[LS, j] = t[KEPT_LS, j]


@kernel
def _write(subs, start, top, t, codes):
    """Write the codes of sub-blocks subs[start:start + LANES]: the nearest for scale D * LS, plus `top`."""
    low, high = -np.float32(top), np.float32(top - 1)
    for j in range(min(LANES, subs.shape[0] - start)):
        scale = t[D, j] * t[LS, j]
        inverse = ONE / scale if scale != ZERO else ZERO
        for i in range(subs.shape[1]):
            q = min(max(np.rint(subs[start + j, i] * inverse), low), high)
            codes[start + j, i] = np.uint8(np.int32(q - low))


@kernel
def _encode(subs, importance, search, budget, out):
    """Kernel of encode_symmetric, with the same arrays; one for all formats, because it is the slowest to compile."""
    top, scale_top, n_subs, first, span = search
    d, scales, codes = out
    x, w, t = buffers(subs.shape[1])
    for start in range(0, subs.shape[0], LANES):
        load(subs, importance, start, x, w)
        _search_symmetric(x, w, top, budget, first, span, t)
        if n_subs == 1:
            for j in range(LANES):
                t[D, j] = half_to_float(float_to_half(t[SCALE, j]))
                t[LS, j] = ONE
        else:
            _fit_super_blocks(x, w, top, scale_top, n_subs, budget, t)
        _write(subs, start, top, t, codes)
        for j in range(min(LANES, subs.shape[0] - start)):
            scales[start + j] = np.int8(t[LS, j])
        for j in range(0, min(LANES, subs.shape[0] - start), n_subs):
            d[(start + j) // n_subs] = float_to_half(t[D, j])


def encode_symmetric(x, importance, n_subs, top, scale_top, budget, first, span):
    """Fit codes 0 .. 2 top - 1 of `x` (n, N) with sub-blocks of N / n_subs weights: x = d * scale * (code - top).

    The Fit has scales in -scale_top .. scale_top - 1, int8; with n_subs 1 there are none (all 1). `first` and `span`
    are those of _search_symmetric.
    """
    n, sub = len(x), x.shape[1] // n_subs
    d, scales = np.empty(n, np.uint16), np.empty(n * n_subs, np.int8)
    codes = np.empty((n * n_subs, sub), np.uint8)
    subs, weights = x.reshape(-1, sub), importance.reshape(-1, sub)
    _encode(subs, weights, ScaleSearch(top, scale_top, n_subs, first, span), budget, (d, scales, codes))
    return Fit(d, scales.reshape(n, n_subs), codes.reshape(n, n_subs, sub))
