"""Search for x = scale * level[q] with uneven levels: those of FP4, the three of ternary weights, the two of signs.

The steps are search.py's. These levels are symmetric, so that magnitudes are enough; those of IQ4 are not (iq4.py).
Errors are compared through the sums XL and LL of the codes: a scale s explains s * (2 XL - s LL).
"""

import numpy as np

from requant.formats.bits import (
    LARGEST_HALF,
    bits_to_float,
    e8m0_half_to_float,
    float_to_half,
    floor_e8m0,
    nearest_ue4m3_half,
    round_to_half,
    ue4m3_half_to_float,
)
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.search import (
    BASE_LS,
    GAIN,
    HUGE,
    LANES,
    LL,
    LS,
    ONE,
    PEAK,
    SCALE,
    SUM_W,
    SUM_X,
    TRY_INVERSE,
    TRY_LS,
    XL,
    ZERO,
    D,
    buffers,
    keep_better_fit,
    load,
    measure_peak,
)
from requant.formats.jit import kernel

F = np.float32
SMALLEST_PEAK = F(2.0**-100)  # below it all is zero; its inverse is far from overflow


@kernel
def level_of_fp4(v):
    """Return the doubled E2M1 magnitude nearest to `v` >= 0: a whole number up to 4, then one bit of mantissa."""
    rounded = bits_to_float((F(v).view(np.uint32) + np.uint32(0x00200000)) & np.uint32(0xFFC00000))
    return np.rint(v) if v < F(4.0) else min(rounded, F(12.0))


@kernel
def code_of_fp4(v):
    """Return the E2M1 code nearest to `v`; zero is always 0."""
    q = level_of_fp4(abs(v))
    magnitude = (F(q).view(np.uint32) >> np.uint32(22)) - np.uint32(254) if q >= F(2.0) else np.uint32(q)
    return np.uint8(magnitude + np.uint32(8) * np.uint32(v < ZERO and q > ZERO))


@kernel
def _fp4_sums(x, w, t):
    """Compute the sums over the magnitudes and the codes of FP4 that TRY_INVERSE gives."""
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = abs(x[i, j])
            q = level_of_fp4(v * t[TRY_INVERSE, j])
            wq = w[i, j] * q
            t[LL, j] += wq * q
            t[XL, j] += wq * v


@kernel
def _ternary_sums(x, w, t):
    """Compute the sums over the magnitudes and the codes 0 and 1 that TRY_INVERSE gives."""
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = abs(x[i, j])
            wq = w[i, j] if v * t[TRY_INVERSE, j] >= F(0.5) else ZERO
            t[LL, j] += wq
            t[XL, j] += wq * v


@kernel
def _measure_magnitudes(x, w, t):
    """Sum the importance (SUM_W) and the weighted magnitudes (SUM_X)."""
    for j in range(LANES):
        t[SUM_W, j] = ZERO
        t[SUM_X, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            t[SUM_W, j] += w[i, j]
            t[SUM_X, j] += w[i, j] * abs(x[i, j])


@kernel
def _fit_signs(x, importance, d):
    """Kernel of encode_signs, with the same arrays."""
    tile, w, t = buffers(x.shape[1])
    for start in range(0, x.shape[0], LANES):
        load(x, importance, start, tile, w)
        _measure_magnitudes(tile, w, t)
        for j in range(min(LANES, x.shape[0] - start)):
            size = t[SUM_X, j] / t[SUM_W, j] if t[SUM_W, j] > ZERO else ZERO
            d[start + j] = float_to_half(min(size, LARGEST_HALF))


def encode_signs(x, importance):
    """Return the d, (n,) binary16 bits, that fits `x` (n, N) best as d * (-1 or 1), by its signs."""
    d = np.empty(len(x), np.uint16)
    _fit_signs(x, importance, d)
    return d


@kernel
def _search_ternary(x, w, t):
    """Find the half D per lane: x = D * (-1, 0 or 1).

    Weights count as zero below a share of the mean magnitude, which suits any distribution with few outliers, or below
    half the largest, which suits outliers and weights that are ternary already. Then least squares and codes in turn.
    """
    measure_peak(x, t)
    _measure_magnitudes(x, w, t)
    for c in range(7):
        share = F(1.0) + F(0.8) * F(c)  # of the mean; the threshold is at half
        for j in range(LANES):
            if c > 3:
                size = t[SCALE, j]
            elif c == 3 or t[SUM_W, j] == ZERO:
                size = abs(t[PEAK, j])
            else:
                size = share * t[SUM_X, j] / t[SUM_W, j]
            t[TRY_INVERSE, j] = ONE / size if size > SMALLEST_PEAK else ZERO
        _ternary_sums(x, w, t)
        keep_better_fit(t)
    for j in range(LANES):
        t[D, j] = round_to_half(t[SCALE, j])


@kernel
def _encode_ternary(x, importance, d, codes):
    """Kernel of encode_ternary, with the same arrays."""
    tile, w, t = buffers(x.shape[1])
    for start in range(0, x.shape[0], LANES):
        load(x, importance, start, tile, w)
        _search_ternary(tile, w, t)
        for j in range(min(LANES, x.shape[0] - start)):
            d[start + j] = float_to_half(t[D, j])
            threshold = F(0.5) * t[D, j]
            for i in range(x.shape[1]):
                v = x[start + j, i]
                codes[start + j, i] = np.uint8(1 + np.int32(v > threshold) - np.int32(v < -threshold))


def encode_ternary(x, importance):
    """Return d and codes 0, 1, 2 of `x` (n, N): x = d * (code - 1). d: (n,) binary16 bits; codes: (n, N) uint8."""
    d, codes = np.empty(len(x), np.uint16), np.empty(x.shape, np.uint8)
    _encode_ternary(x, importance, d, codes)
    return d, codes


@kernel
def _fp4_scale(code, exponent_only):
    """Return the halved scale of an E8M0 (`exponent_only`) or UE4M3 code."""
    return e8m0_half_to_float(code) if exponent_only else ue4m3_half_to_float(code)


@kernel
def _search_fp4(x, w, exponent_only, below, above, t):
    """Find LS, the code of a lane's scale, and D, half of that scale: x = D * level of FP4.

    The codes tried go from `below` under to `above` over the one that puts the largest magnitude at the highest
    level (UE4M3), or that has its power of two (E8M0).
    """
    measure_peak(x, t)
    for j in range(LANES):
        peak = abs(t[PEAK, j])
        t[PEAK, j] = ONE / peak if peak > SMALLEST_PEAK else ZERO
        t[BASE_LS, j] = F(floor_e8m0(peak)) - F(2.0) if exponent_only else F(nearest_ue4m3_half(peak / F(12.0)))
        t[GAIN, j] = -HUGE
        t[LS, j] = ZERO
    highest = F(254.0) if exponent_only else F(126.0)
    for a in range(-below, above + 1):
        for j in range(LANES):
            t[TRY_LS, j] = min(max(t[BASE_LS, j] + F(a), ONE), highest)
            t[SCALE, j] = _fp4_scale(np.uint32(t[TRY_LS, j]), exponent_only)
            t[TRY_INVERSE, j] = ONE / t[SCALE, j]
        _fp4_sums(x, w, t)
        for j in range(LANES):
            scale = t[SCALE, j] * t[PEAK, j]  # all in units of the largest magnitude: no square overflows
            gain = scale * (F(2.0) * (t[XL, j] * t[PEAK, j]) - scale * t[LL, j])
            if gain > t[GAIN, j]:
                t[GAIN, j] = gain
                t[LS, j] = t[TRY_LS, j]
                t[D, j] = t[SCALE, j]


@kernel
def _encode_fp4(subs, importance, exponent_only, below, above, out):
    """Kernel of encode_fp4, with the same arrays; one for both formats."""
    scales, codes, steps = out
    x, w, t = buffers(subs.shape[1])
    for start in range(0, subs.shape[0], LANES):
        load(subs, importance, start, x, w)
        _search_fp4(x, w, exponent_only, below, above, t)
        for j in range(min(LANES, subs.shape[0] - start)):
            scales[start + j] = np.uint8(t[LS, j])
            steps[start + j] = t[D, j]
            inverse = ONE / t[D, j]
            for i in range(subs.shape[1]):
                codes[start + j, i] = code_of_fp4(subs[start + j, i] * inverse)


def encode_fp4(x, importance, n_subs, exponent_only, below, above):
    """Fit E2M1 codes of `x` (n, N) with sub-blocks of N / n_subs weights: x = half the scale * level of FP4.

    The Fit has scales in E8M0 (`exponent_only`) or UE4M3, uint8, and no d. `below` and `above` are those of
    _search_fp4.
    """
    n, sub = len(x), x.shape[1] // n_subs
    scales, codes = np.empty((n, n_subs), np.uint8), np.empty((n, n_subs, sub), np.uint8)
    steps = np.empty((n, n_subs), np.float32)
    out = scales.reshape(-1), codes.reshape(-1, sub), steps.reshape(-1)
    _encode_fp4(x.reshape(-1, sub), importance.reshape(-1, sub), exponent_only, below, above, out)
    return Fit(None, scales, codes, steps=steps)
