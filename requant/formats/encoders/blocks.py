"""Quick encoders of single blocks whose weights all count the same (Q4_0, Q5_0, Q4_1, Q5_1).

ggml rounds once, to the range; here the scale, and the minimum where there is one, are solved for the codes that gives,
and the weights rounded again. A block is brought to integers first: sums of those are exact, so that they may be added
in any order and vectorize along the row, without the tiles of search.py.
"""

import numpy as np

from requant.formats.bits import bits_to_float, float_to_half, round_to_half
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.search import LANES, ONE, ZERO
from requant.formats.jit import kernel

F = np.float32
SHIFT = np.int32(12)
HALF = np.int32(2048)
UNITS = F(4096.0)  # integers that the largest magnitude, or the range, is divided into: sums over 32 stay below 2**31
SMALLEST, LARGEST = F(2.0**-100), F(2.0**100)  # whose inverse is far from overflow


@kernel
def _order_key(bits):
    """Return an integer with the order of the float that has these `bits`; the function is its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@kernel
def _ends(bits, b):
    """Return the lowest and the highest of the floats with these `bits`: (n, N) int32, row `b`."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for i in range(bits.shape[1]):
        key = _order_key(bits[b, i])
        low, high = min(low, key), max(high, key)
    return bits_to_float(np.uint32(_order_key(low))), bits_to_float(np.uint32(_order_key(high)))


@kernel
def _round_symmetric(x, bits, top, d, codes):
    """Kernel of round_symmetric, with the same arrays."""
    n = x.shape[1]
    sums, t = np.empty((4, LANES), np.int32), np.empty((3, LANES), F)
    least, most = np.int32(-top), np.int32(top - 1)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        for j in range(count):
            low, high = _ends(bits, start + j)
            t[0, j] = low if -low > high else high
        for j in range(count):
            peak = t[0, j]
            t[1, j] = -UNITS / peak if SMALLEST < abs(peak) < LARGEST else ZERO
        for j in range(count):
            xq, qq, xp, pp = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
            unit = t[1, j]
            for i in range(n):
                whole = np.int32(np.rint(x[start + j, i] * unit))
                q = min(np.int32((whole * np.int32(top) + HALF) >> SHIFT), most)
                p = np.int32((whole * most + HALF) >> SHIFT)
                xq += np.int32(whole * q)
                qq += np.int32(q * q)
                xp += np.int32(whole * p)
                pp += np.int32(p * p)
            sums[0, j] = xq
            sums[1, j] = qq
            sums[2, j] = xp
            sums[3, j] = pp
        for j in range(count):
            xq, qq, xp, pp = F(sums[0, j]), F(sums[1, j]), F(sums[2, j]), F(sums[3, j])
            scale = xq / qq if qq > ZERO else ZERO
            other = xp / pp if pp > ZERO else ZERO
            scale = other if other * xp > scale * xq else scale
            scale = round_to_half(scale * t[0, j] / -UNITS)
            d[start + j] = float_to_half(scale)
            t[2, j] = ONE / scale if scale != ZERO else ZERO
        for j in range(count):
            inverse = t[2, j]
            for i in range(n):
                q = min(max(np.int32(np.rint(x[start + j, i] * inverse)), least), most)
                codes[start + j, i] = np.uint8(q - least)


def round_symmetric(x, top):
    """Fit codes 0 .. 2 top - 1 of `x` (n, N): x = d * (code - top)."""
    d, codes = np.empty(len(x), np.uint16), np.empty(x.shape, np.uint8)
    _round_symmetric(x, x.view(np.int32), top, d, codes)
    return Fit(d, np.ones((len(x), 1), np.int8), codes[:, None])


@kernel
def _round_affine(x, bits, top, d, m, codes):
    """Kernel of round_affine, with the same arrays."""
    n = x.shape[1]
    sums, t = np.empty((4, LANES), np.int32), np.empty((5, LANES), F)
    most = np.int32(top)
    for start in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - start)
        for j in range(count):
            t[0, j], t[1, j] = _ends(bits, start + j)
        for j in range(count):
            width = t[1, j] - t[0, j]
            usable = SMALLEST < width < LARGEST
            t[1, j] = width if usable else ZERO
            t[2, j] = UNITS / width if usable else ZERO
        for j in range(count):
            xs, qs, xq, qq = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
            low, unit = t[0, j], t[2, j]
            for i in range(n):
                whole = np.int32(np.rint((x[start + j, i] - low) * unit))
                q = np.int32((whole * np.int32(4 * top + 1) + np.int32(3 << 11)) >> np.int32(14))
                q = min(max(q, np.int32(0)), most)
                xs += whole
                qs += q
                xq += np.int32(whole * q)
                qq += np.int32(q * q)
            sums[0, j] = xs
            sums[1, j] = qs
            sums[2, j] = xq
            sums[3, j] = qq
        for j in range(count):
            xs, qs = F(sums[0, j]), F(sums[1, j])
            det = F(n) * F(sums[3, j]) - qs * qs
            slope = (F(n) * F(sums[2, j]) - xs * qs) / det if det > ZERO else ZERO
            scale = round_to_half(slope * t[1, j] / UNITS)
            least = round_to_half(t[0, j] + (xs - slope * qs) / F(n) * t[1, j] / UNITS)
            d[start + j] = float_to_half(scale)
            m[start + j] = float_to_half(least)
            t[3, j] = ONE / scale if scale != ZERO else ZERO
            t[4, j] = least
        for j in range(count):
            inverse, least = t[3, j], t[4, j]
            for i in range(n):
                q = min(max(np.int32(np.rint((x[start + j, i] - least) * inverse)), np.int32(0)), most)
                codes[start + j, i] = np.uint8(q)


def round_affine(x, top):
    """Fit codes 0 .. top of `x` (n, N): x = d * code - dmin."""
    d, m, codes = np.empty(len(x), np.uint16), np.empty(len(x), np.uint16), np.empty(x.shape, np.uint8)
    _round_affine(x, x.view(np.int32), top, d, m, codes)
    ones = np.ones((len(x), 1), np.uint8)
    return Fit(d, ones, codes[:, None], m ^ np.uint16(0x8000), ones)
