"""Search for x = scale * q + min: codes 0..top, a scale and a minimum per sub-block (Q2_K, Q4_K, Q5_K, Q4_1, Q5_1)."""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.search import (
    BASE_LM,
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
    SCALE,
    SPAN,
    SUM_W,
    SUM_X,
    TRY_INVERSE,
    TRY_LM,
    TRY_LS,
    TRY_MIN,
    TRY_SCALE,
    XL,
    ZERO,
    D,
    L,
    ScaleSearch,
    SearchBudget,
    buffers,
    is_flat,
    load,
    undo_worse_refits,
)
from requant.formats.jit import kernel

# by effort; without importance, and with
SUPER_BLOCKS = (
    (SearchBudget(6, 1, reach=0), SearchBudget(5, 2, reach=1)),
    (SearchBudget(6, 2, reach=1), SearchBudget(6, 2, reach=3, rounds=2)),
    (SearchBudget(16, 2, reach=5, rounds=3), SearchBudget(24, 3, reach=7, rounds=4)),
)
BLOCKS = (SearchBudget(10, 2), SearchBudget(16, 3), SearchBudget(24, 4))
SINGULAR = np.float32(1e-5)  # well above the rounding of sums over 32 weights


@kernel
def _measure(x, w, t):
    """Measure the lowest weight (LOW), the highest (SPAN, for now) and the sums that need no codes."""
    for j in range(LANES):
        t[LOW, j] = x[0, j]
        t[SPAN, j] = x[0, j]
        t[SUM_W, j] = ZERO
        t[SUM_X, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v, u = x[i, j], w[i, j]
            t[LOW, j] = min(t[LOW, j], v)
            t[SPAN, j] = max(t[SPAN, j], v)
            t[SUM_W, j] += u
            t[SUM_X, j] += u * v


@kernel
def _affine_sums(x, w, top, t):
    """Compute the sums over the codes that TRY_INVERSE and TRY_MIN give."""
    high = np.float32(top)
    for j in range(LANES):
        t[L, j] = ZERO
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = x[i, j]
            q = min(max(np.rint((v - t[TRY_MIN, j]) * t[TRY_INVERSE, j]), ZERO), high)
            wq = w[i, j] * q
            t[L, j] += wq
            t[LL, j] += wq * q
            t[XL, j] += wq * v


@kernel
def _affine_trial(x, w, top, signed_min, t):
    """Fit scale and min to the codes of the trial; keep them where they explain more."""
    _affine_sums(x, w, top, t)
    for j in range(LANES):
        det = t[SUM_W, j] * t[LL, j] - t[L, j] * t[L, j]
        solvable = det > SINGULAR * t[SUM_W, j] * t[LL, j]  # else all codes are alike
        inverse = ONE / det if solvable else ZERO
        scale = (t[SUM_W, j] * t[XL, j] - t[SUM_X, j] * t[L, j]) * inverse
        low = (t[LL, j] * t[SUM_X, j] - t[L, j] * t[XL, j]) * inverse
        if not solvable or (low > ZERO and not signed_min):
            low = ZERO
            scale = t[XL, j] / t[LL, j] if t[LL, j] > ZERO else ZERO
        gain = scale * t[XL, j] + low * t[SUM_X, j]
        if gain > t[GAIN, j] and scale > ZERO:
            t[GAIN, j] = gain
            t[SCALE, j] = scale
            t[MIN, j] = low


@kernel
def _search_affine(x, w, top, budget, first, span, signed_min, t):
    """Find the best (SCALE, MIN) per lane for codes 0..top; without `signed_min`, MIN is never above 0.

    The candidates map the range to top + first up to top + first + span codes.
    """
    _measure(x, w, t)
    for j in range(LANES):
        if t[LOW, j] > ZERO and not signed_min:
            t[LOW, j] = ZERO
        width = t[SPAN, j] - t[LOW, j]
        t[SPAN, j] = ONE / width if width > ZERO else ZERO
        t[TRY_MIN, j] = t[LOW, j]
        t[SCALE, j] = ZERO  # a constant sub-block is its minimum
        t[MIN, j] = t[SUM_X, j] / t[SUM_W, j] if t[SUM_W, j] > ZERO else t[LOW, j]
        if t[MIN, j] > ZERO and not signed_min:
            t[MIN, j] = ZERO
        t[GAIN, j] = t[MIN, j] * t[SUM_X, j]
    step = np.float32(span) / np.float32(budget.candidates - 1)
    for c in range(budget.candidates):
        reach = np.float32(top) + np.float32(first) + step * np.float32(c)
        for j in range(LANES):
            t[TRY_INVERSE, j] = reach * t[SPAN, j]
        _affine_trial(x, w, top, signed_min, t)
    for _ in range(budget.repeats):
        for j in range(LANES):
            t[TRY_INVERSE, j] = ONE / t[SCALE, j] if t[SCALE, j] > ZERO else ZERO
            t[TRY_MIN, j] = t[MIN, j]
        _affine_trial(x, w, top, signed_min, t)


@kernel
def _affine_error(x, w, top, t):
    """Compute the weighted squared error per lane, into LAST_ERROR, of scales D * TRY_LS and minima DMIN * TRY_LM."""
    high = np.float32(top)
    for j in range(LANES):
        t[TRY_SCALE, j] = t[D, j] * t[TRY_LS, j]
        t[TRY_INVERSE, j] = ONE / t[TRY_SCALE, j] if t[TRY_SCALE, j] > ZERO else ZERO
        t[TRY_MIN, j] = t[DMIN, j] * t[TRY_LM, j]
        t[LAST_ERROR, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            shifted = x[i, j] + t[TRY_MIN, j]
            q = min(max(np.rint(shifted * t[TRY_INVERSE, j]), ZERO), high)
            miss = t[TRY_SCALE, j] * q - shifted
            t[LAST_ERROR, j] += w[i, j] * miss * miss


@kernel
def _refine_affine(x, w, top, scale_top, reach, t):
    """Re-choose LS and LM among their neighbours up to `reach` away, by true error.

    Both move the same way, give or take one, because a wider range also ends further out.
    """
    limit = np.float32(scale_top)
    for j in range(LANES):
        t[ERROR, j] = HUGE
        t[BASE_LS, j] = t[LS, j]
        t[BASE_LM, j] = t[LM, j]
    for a in range(-reach, reach + 1):
        for b in range(max(a - 1, -reach), min(a + 1, reach) + 1):
            for j in range(LANES):
                t[TRY_LS, j] = min(max(t[BASE_LS, j] + np.float32(a), ZERO), limit)
                t[TRY_LM, j] = min(max(t[BASE_LM, j] + np.float32(b), ZERO), limit)
            _affine_error(x, w, top, t)
            for j in range(LANES):
                if t[LAST_ERROR, j] < t[ERROR, j]:
                    t[ERROR, j] = t[LAST_ERROR, j]
                    t[LS, j] = t[TRY_LS, j]
                    t[LM, j] = t[TRY_LM, j]


@kernel
def _refit_affine(x, w, top, n_subs, t):
    """Solve each super-block's D and DMIN anew for its codes and integer scales; keep them where the error falls."""
    for j in range(LANES):
        scale = t[D, j] * t[LS, j]
        t[TRY_INVERSE, j] = ONE / scale if scale > ZERO else ZERO
        t[TRY_MIN, j] = -t[DMIN, j] * t[LM, j]
        t[TRY_LS, j] = t[LS, j]
        t[TRY_LM, j] = t[LM, j]
    _affine_sums(x, w, top, t)
    for g in range(0, LANES, n_subs):
        aa = ab = bb = xa = xb = ZERO
        for j in range(g, g + n_subs):
            aa += t[LS, j] * t[LS, j] * t[LL, j]
            ab += t[LS, j] * t[LM, j] * t[L, j]
            bb += t[LM, j] * t[LM, j] * t[SUM_W, j]
            xa += t[LS, j] * t[XL, j]
            xb += t[LM, j] * t[SUM_X, j]
        det = aa * bb - ab * ab
        d, dmin = t[D, g], t[DMIN, g]
        if det > ZERO:
            d = (xa * bb - xb * ab) / det
            dmin = (xa * ab - xb * aa) / det
        elif aa > ZERO:
            d = xa / aa
        d = half_to_float(float_to_half(max(d, ZERO)))
        dmin = half_to_float(float_to_half(max(dmin, ZERO)))
        for j in range(g, g + n_subs):
            t[BASE_LS, j] = t[D, j]  # what to go back to
            t[BASE_LM, j] = t[DMIN, j]
            t[D, j] = d
            t[DMIN, j] = dmin
    _affine_error(x, w, top, t)
    undo_worse_refits(n_subs, t)


@kernel
def _fit_super_blocks(x, w, top, scale_top, n_subs, budget, t):
    """Fit LS, LM in 0..scale_top and the halves D, DMIN per super-block of `n_subs` lanes to SCALE and MIN."""
    limit = np.float32(scale_top)
    for g in range(0, LANES, n_subs):
        largest_scale = largest_min = ZERO
        for j in range(g, g + n_subs):
            largest_scale = max(largest_scale, t[SCALE, j])
            largest_min = max(largest_min, -t[MIN, j])
        d = half_to_float(float_to_half(largest_scale / limit))
        dmin = half_to_float(float_to_half(largest_min / limit))
        for j in range(g, g + n_subs):
            t[D, j] = d
            t[DMIN, j] = dmin
            t[LS, j] = min(np.rint(t[SCALE, j] / d), limit) if d > ZERO else ZERO
            t[LM, j] = min(np.rint(-t[MIN, j] / dmin), limit) if dmin > ZERO else ZERO
    for _ in range(budget.rounds):
        _refine_affine(x, w, top, scale_top, budget.reach, t)
        _refit_affine(x, w, top, n_subs, t)


@kernel
def _round_blocks(t):
    """Round SCALE and MIN per lane to the halves D and DMIN, where a block has no integer scales."""
    for j in range(LANES):
        t[D, j] = half_to_float(float_to_half(t[SCALE, j]))
        t[DMIN, j] = half_to_float(float_to_half(-t[MIN, j]))
        t[LS, j] = ONE
        t[LM, j] = ONE


@kernel
def _write(subs, start, top, t, codes):
    """Write the codes of sub-blocks subs[start:start + LANES]: the nearest for scale D * LS and minimum -DMIN * LM."""
    high = np.float32(top)
    for j in range(min(LANES, subs.shape[0] - start)):
        scale, low = t[D, j] * t[LS, j], t[DMIN, j] * t[LM, j]
        inverse = ONE / scale if scale > ZERO else ZERO
        for i in range(subs.shape[1]):
            q = np.rint((subs[start + j, i] + low) * inverse)
            codes[start + j, i] = np.uint8(min(max(q, ZERO), high))


@kernel
def _encode(subs, importance, search, budget, out):
    """Kernel of encode_affine, with the same arrays; one for all formats, because it is the slowest to compile."""
    top, scale_top, n_subs, first, span = search
    d, dmin, scales, mins, codes = out
    x, w, t = buffers(subs.shape[1])
    for start in range(0, subs.shape[0], LANES):
        load(subs, importance, start, x, w)
        _search_affine(x, w, top, budget, first, span, n_subs == 1, t)
        if n_subs == 1:
            _round_blocks(t)
        else:
            _fit_super_blocks(x, w, top, scale_top, n_subs, budget, t)
        _write(subs, start, top, t, codes)
        for j in range(min(LANES, subs.shape[0] - start)):
            scales[start + j] = np.uint8(t[LS, j])
            mins[start + j] = np.uint8(t[LM, j])
        for j in range(0, min(LANES, subs.shape[0] - start), n_subs):
            block = (start + j) // n_subs
            d[block] = float_to_half(t[D, j])
            dmin[block] = float_to_half(t[DMIN, j])


def encode_affine(x, importance, n_subs, top, scale_top, first, span, effort):
    """Fit codes 0..top of `x` (n, N) with sub-blocks of N / n_subs weights: x = d * scale * code - dmin * min.

    The Fit has scales and mins up to `scale_top`. With n_subs 1 there are no integer scales (all 1), and dmin may be
    negative. `first` and `span` are those of _search_affine.
    """
    n, sub = len(x), x.shape[1] // n_subs
    d, dmin = np.empty(n, np.uint16), np.empty(n, np.uint16)
    scales, mins = np.empty(n * n_subs, np.uint8), np.empty(n * n_subs, np.uint8)
    codes = np.empty((n * n_subs, sub), np.uint8)
    subs, weights = x.reshape(-1, sub), importance.reshape(-1, sub)
    budget = BLOCKS[effort] if n_subs == 1 else SUPER_BLOCKS[effort][0 if is_flat(importance) else 1]
    search = ScaleSearch(top, scale_top, n_subs, first, span)
    _encode(subs, weights, search, budget, (d, dmin, scales, mins, codes))
    return Fit(d, scales.reshape(n, n_subs), codes.reshape(n, n_subs, sub), dmin, mins.reshape(n, n_subs))
