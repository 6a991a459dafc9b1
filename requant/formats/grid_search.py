"""Search for x = scale * word: codewords, signs and odd integer scales of the IQ formats with a codebook.

A sub-block's scale comes first from a search that takes each weight by itself; then words are assigned to it and the
scale solved for them in turn. The words of a weight's cell (neighbours.py) lie side by side, so that the loop over
them vectorizes. With d rounded, words are assigned again for the two integer scales nearest to the best one.

One search serves all these formats, so it is compiled once: it writes FOUND, and each format packs that.
x, w: (sub, LANES) float32, sub-block j in column j; rows: (LANES, sub) float32, the same the other way round.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from requant.formats.bits import bits_to_float, float_to_half, half_to_float
from requant.formats.grids import EVEN_SIGNS
from requant.formats.neighbours import NEAREST, neighbours
from requant.formats.search import HUGE, LANES, ONE, ZERO, buffers, load
from requant.jit import kernel

FOUND = np.dtype(
    [
        ("d", "<u2"),  # binary16 bits
        ("ls", "u1", (16,)),  # scale s is d * (1 + 2 * ls[s]), in the format's unit
        ("index", "<u2", (64,)),
        ("signs", "u1", (32,)),  # a bit per weight
        ("minus", "u1", (32,)),  # 1 where delta is subtracted
    ]
)
# rows of t: what is known of each lane
PEAK, SCALE, GAIN, TRY_INVERSE, TRY_SCALE, TRY_LS, TRY_ERROR = 0, 1, 2, 3, 4, 5, 6
LL, XL = 7, 8  # sums of w q^2 and w x q for the words of the trial
COST, AT = 9, 10
D, LS, ERROR, BEST_D, BEST_LL, BEST_XL = 11, 12, 13, 14, 15, 16  # BEST_..., LS, ERROR: of the words kept
SMALLEST, LARGEST = np.float32(1e-30), np.float32(1e30)  # scales beyond do not fit a half, nor have they an inverse
LARGEST_HALF = np.float32(65504.0)
N_SCALES = 16  # tried for d


class Shape(NamedTuple):
    """A format, as the search sees it; the same types for each, so that the kernel is compiled once."""

    sub: int  # weights that share a scale
    dim: int  # weights of a word
    low: np.float32  # the levels are about low, low + step, ... low + top * step
    step: np.float32
    top: int
    delta: np.float32  # added to or subtracted from a word; 0 where weights have signs instead
    per_delta: int  # words that share the choice
    even: bool  # whether the minuses of eight weights must be an even number
    scale_top: int  # integer scales 0 .. scale_top
    unit: np.float32  # of d
    first: np.float32  # candidates for the largest weight, in multiples of the top level
    stride: np.float32
    rounds: int  # of words and scale in turn


def grid_encoder(codebook: str, shape: Shape) -> Callable[[Any], Callable[[Any, Any, Any], None]]:
    """Makes of a kernel pack(found, blocks) the kernel encode(x, importance, blocks) of a format."""

    def decorate(pack: Any) -> Callable[[Any, Any, Any], None]:
        @functools.wraps(pack)
        def encode(x: Any, importance: Any, blocks: Any) -> None:
            words, values = neighbours(codebook)
            found = np.zeros(len(x), FOUND)
            search(x, importance, words, values, shape, found)
            pack(found, blocks)

        return encode

    return decorate


@kernel
def search(x, importance, words, values, shape, found):
    """Of x (n, 256), importance (k, 256) -> found (n,) FOUND; words, values as neighbours() gives them."""
    subs, weights = x.reshape(-1, shape.sub), importance.reshape(-1, shape.sub)
    n_words, n_subs = shape.sub // shape.dim, 256 // shape.sub
    tile, w, t, _ = buffers(shape.sub)
    q, rows = np.zeros_like(tile), np.zeros((LANES, shape.sub), np.float32)
    signs = np.zeros((shape.sub // 8, LANES), np.uint8)
    cells = np.zeros((2, n_words, LANES), np.int32)
    tried, best = np.zeros((2, LANES, n_words), np.uint16), np.zeros((2, LANES, n_words), np.uint16)
    for first in range(0, subs.shape[0], LANES):
        count = min(LANES, subs.shape[0] - first)
        load(subs, weights, first, tile, w)
        if shape.delta == ZERO:
            _take_signs(tile, signs)
        _first_scales(tile, w, shape, t)
        if shape.even:
            _make_even(tile, w, shape, t, signs)
        for j in range(LANES):
            for i in range(shape.sub):
                rows[j, i] = tile[i, j]
        for _ in range(shape.rounds):
            _set_scales(t, True)
            _assign(tile, w, rows, weights, first, count, words, values, shape, t, cells, tried, q)
            for j in range(LANES):
                t[SCALE, j] = t[XL, j] / t[LL, j] if t[LL, j] > ZERO and t[XL, j] > ZERO else ZERO
        _block_scales(shape, n_subs, t)
        _round_d(shape.unit, t)
        for j in range(LANES):
            t[ERROR, j] = HUGE
        for beside in range(2):
            _integer_scales(shape, beside, t)
            _set_scales(t, False)
            _assign(tile, w, rows, weights, first, count, words, values, shape, t, cells, tried, q)
            _keep_better(1, count, t, tried, best)
        _refit(n_subs, t)
        _round_d(shape.unit, t)
        _set_scales(t, False)
        _assign(tile, w, rows, weights, first, count, words, values, shape, t, cells, tried, q)
        _keep_better(n_subs, count, t, tried, best)
        _write(shape, n_subs, first, count, t, best, signs, found)


@kernel
def _take_signs(x, signs):
    """Magnitudes into x; signs: (sub / 8, LANES) uint8, bit i set where weight i of eight is negative."""
    for g in range(signs.shape[0]):
        for j in range(LANES):
            signs[g, j] = 0
        for i in range(8):
            for j in range(LANES):
                v = x[8 * g + i, j]
                signs[g, j] |= np.uint8(v < ZERO) << np.uint8(i)
                x[8 * g + i, j] = abs(v)


@kernel
def _trial(x, w, shape, t):
    """Fit the scale to the levels that TRY_INVERSE gives weight by weight; keep it where it explains more."""
    low, step, inverse, high = shape.low, shape.step, ONE / shape.step, np.float32(shape.top)
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            v = x[i, j]
            code = np.rint((v * t[TRY_INVERSE, j] - low) * inverse)
            q = low + step * min(max(code, ZERO), high)
            wq = w[i, j] * q
            t[LL, j] += wq * q
            t[XL, j] += wq * v
    for j in range(LANES):
        scale = t[XL, j] / t[LL, j] if t[LL, j] > ZERO else ZERO
        gain = scale * t[XL, j]
        if gain > t[GAIN, j]:
            t[GAIN, j] = gain
            t[SCALE, j] = scale


@kernel
def _first_scales(x, w, shape, t):
    """SCALE per lane, as if every combination of levels were a word."""
    for j in range(LANES):
        t[PEAK, j] = ZERO
        t[SCALE, j] = ZERO
        t[GAIN, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            t[PEAK, j] = max(t[PEAK, j], abs(x[i, j]))
    high = shape.low + shape.step * np.float32(shape.top)
    for j in range(LANES):
        t[PEAK, j] = high / t[PEAK, j] if t[PEAK, j] > SMALLEST else ZERO
    for c in range(8):
        reach = shape.first + shape.stride * np.float32(c)
        for j in range(LANES):
            t[TRY_INVERSE, j] = reach * t[PEAK, j]
        _trial(x, w, shape, t)
    for _ in range(2):
        for j in range(LANES):
            t[TRY_INVERSE, j] = _inverse(t[SCALE, j])
        _trial(x, w, shape, t)


@kernel
def _inverse(scale):
    return ONE / scale if SMALLEST < scale < LARGEST else ZERO


@kernel
def _make_even(x, w, shape, t, signs):
    """Where a group of eight has an odd number of minuses, turn the weight of which that costs least at SCALE."""
    low, step, inverse, high = shape.low, shape.step, ONE / shape.step, np.float32(shape.top)
    for j in range(LANES):
        t[TRY_INVERSE, j] = _inverse(t[SCALE, j])
    for g in range(signs.shape[0]):
        for j in range(LANES):
            t[COST, j] = HUGE
            t[AT, j] = ZERO
        for i in range(8):
            for j in range(LANES):
                v = x[8 * g + i, j] * t[TRY_INVERSE, j]
                q = low + step * min(max(np.rint((v - low) * inverse), ZERO), high)
                cost = w[8 * g + i, j] * ((v + low) * (v + low) - (v - q) * (v - q))
                t[AT, j] = np.float32(i) if cost < t[COST, j] else t[AT, j]
                t[COST, j] = min(t[COST, j], cost)
        for j in range(LANES):
            if EVEN_SIGNS[signs[g, j] & np.uint8(127)] != signs[g, j]:
                i = np.uint8(t[AT, j])
                signs[g, j] ^= np.uint8(1) << i
                x[8 * g + i, j] = -x[8 * g + i, j]


@kernel
def _set_scales(t, free):
    """TRY_SCALE of the next assignment: SCALE, or D times the odd integer of TRY_LS."""
    for j in range(LANES):
        t[TRY_SCALE, j] = t[SCALE, j] if free else t[D, j] * (ONE + t[TRY_LS, j] + t[TRY_LS, j])


@kernel
def _find_cells(x, shape, delta, t, cells):
    """The cell of every word's weights at TRY_SCALE; cells: (n_words, LANES) int32."""
    low, inverse, high = shape.low + delta, ONE / shape.step, np.float32(shape.top)
    base = np.int32(shape.top + 1)
    for j in range(LANES):
        t[TRY_INVERSE, j] = _inverse(t[TRY_SCALE, j])
    for g in range(cells.shape[0]):
        for j in range(LANES):
            cells[g, j] = 0
        for i in range(g * shape.dim, (g + 1) * shape.dim):
            for j in range(LANES):
                code = min(max(np.rint((x[i, j] * t[TRY_INVERSE, j] - low) * inverse), ZERO), high)
                cells[g, j] = cells[g, j] * base + np.int32(code)


@kernel
def _nearest_of_4(values, cell, x, w, scale, shift):
    """Weighted squared distance to the nearest of the cell's words, as bits, the lowest four its place among them.

    x, w: (4,) float32. Positive floats have the order of their bits, so that a minimum over integers finds it.
    """
    x0, x1, x2, x3 = x[0] - shift, x[1] - shift, x[2] - shift, x[3] - shift
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    best = np.int32(0x7FFFFFFF)
    for k in range(NEAREST):
        m0 = x0 - scale * np.float32(values[cell, 0, k])
        m1 = x1 - scale * np.float32(values[cell, 1, k])
        m2 = x2 - scale * np.float32(values[cell, 2, k])
        m3 = x3 - scale * np.float32(values[cell, 3, k])
        error = (w0 * m0 * m0 + w1 * m1 * m1) + (w2 * m2 * m2 + w3 * m3 * m3)
        best = min(best, (np.float32(error).view(np.int32) & np.int32(-NEAREST)) | np.int32(k))
    return best


@kernel
def _nearest_of_8(values, cell, x, w, scale, shift):
    """As _nearest_of_4, of words of eight."""
    x0, x1, x2, x3 = x[0] - shift, x[1] - shift, x[2] - shift, x[3] - shift
    x4, x5, x6, x7 = x[4] - shift, x[5] - shift, x[6] - shift, x[7] - shift
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    best = np.int32(0x7FFFFFFF)
    for k in range(NEAREST):
        m0 = x0 - scale * np.float32(values[cell, 0, k])
        m1 = x1 - scale * np.float32(values[cell, 1, k])
        m2 = x2 - scale * np.float32(values[cell, 2, k])
        m3 = x3 - scale * np.float32(values[cell, 3, k])
        m4 = x4 - scale * np.float32(values[cell, 4, k])
        m5 = x5 - scale * np.float32(values[cell, 5, k])
        m6 = x6 - scale * np.float32(values[cell, 6, k])
        m7 = x7 - scale * np.float32(values[cell, 7, k])
        error = (w0 * m0 * m0 + w1 * m1 * m1) + (w2 * m2 * m2 + w3 * m3 * m3)
        error += (w4 * m4 * m4 + w5 * m5 * m5) + (w6 * m6 * m6 + w7 * m7 * m7)
        best = min(best, (np.float32(error).view(np.int32) & np.int32(-NEAREST)) | np.int32(k))
    return best


@kernel
def _assign(x, w, rows, weights, first, count, words, values, shape, t, cells, tried, q):
    """The best words at TRY_SCALE into tried[0], their deltas into tried[1]; the sums over them; TRY_ERROR."""
    _find_cells(x, shape, shape.delta, t, cells[0])
    if shape.delta != ZERO:
        _find_cells(x, shape, -shape.delta, t, cells[1])
    for j in range(count):
        wj = weights[(first + j) % weights.shape[0]]
        if shape.delta != ZERO:
            _assign_shifted(rows[j], wj, j, words, values, shape, t[TRY_SCALE, j], cells, tried, q)
            continue
        for g in range(cells.shape[1]):
            i, cell = g * shape.dim, cells[0, g, j]
            if shape.dim == 4:
                k = _nearest_of_4(values, cell, rows[j, i : i + 4], wj[i : i + 4], t[TRY_SCALE, j], ZERO)
            else:
                k = _nearest_of_8(values, cell, rows[j, i : i + 8], wj[i : i + 8], t[TRY_SCALE, j], ZERO)
            k &= np.int32(NEAREST - 1)
            tried[0, j, g] = words[cell, k]
            for n in range(shape.dim):
                q[i + n, j] = values[cell, n, k]
    _sum(x, w, q, t)


@kernel
def _assign_shifted(x, w, j, words, values, shape, scale, cells, tried, q):
    """Words for lane `j`, with delta added or subtracted for per_delta words together, whichever errs less."""
    for start in range(0, cells.shape[1], shape.per_delta):
        least = HUGE
        for minus in range(2):
            delta = -shape.delta if minus else shape.delta
            total = ZERO
            for g in range(start, start + shape.per_delta):
                key = _nearest_of_8(
                    values, cells[minus, g, j], x[8 * g : 8 * g + 8], w[8 * g : 8 * g + 8], scale, scale * delta
                )
                total += bits_to_float(np.uint32(key & np.int32(-NEAREST)))
                tried[1, j, g] = key & np.int32(NEAREST - 1)  # for now
            if total < least or minus == 0:
                least = total
                for g in range(start, start + shape.per_delta):
                    cell, k = cells[minus, g, j], tried[1, j, g]
                    tried[0, j, g] = words[cell, k] | np.uint16(minus << 15)
                    for n in range(8):
                        q[8 * g + n, j] = np.float32(values[cell, n, k]) + delta
        for g in range(start, start + shape.per_delta):
            tried[1, j, g] = tried[0, j, g] >> np.uint16(15)
            tried[0, j, g] &= np.uint16(0x7FFF)


@kernel
def _sum(x, w, q, t):
    """Sums over the levels q and, less sum(w x^2), the error at TRY_SCALE."""
    for j in range(LANES):
        t[LL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            wq = w[i, j] * q[i, j]
            t[LL, j] += wq * q[i, j]
            t[XL, j] += wq * x[i, j]
    for j in range(LANES):
        scale = t[TRY_SCALE, j]
        t[TRY_ERROR, j] = scale * (scale * t[LL, j] - t[XL, j] - t[XL, j])


@kernel
def _nearest_odd(ratio, top):
    """The integer scale 0 .. top of which the odd number 2 ls + 1 is nearest to `ratio`."""
    return min(max(np.rint((ratio - ONE) * np.float32(0.5)), ZERO), np.float32(top))


@kernel
def _solved(t, g, n_subs, d, top):
    """The D of sub-blocks g .. g + n_subs - 1 that is best for the integer scales nearest at `d`; and its error."""
    mm = sm = ss = ZERO
    inverse = _inverse(d)
    for j in range(g, g + n_subs):
        ls = _nearest_odd(t[SCALE, j] * inverse, top)
        m = ls + ls + ONE
        mm += t[LL, j] * m * m
        sm += t[LL, j] * m * t[SCALE, j]
        ss += t[LL, j] * t[SCALE, j] * t[SCALE, j]
    solved = sm / mm if mm > ZERO else ZERO
    return solved, ss - solved * sm


@kernel
def _block_scales(shape, n_subs, t):
    """D per super-block: of N_SCALES that bring the largest SCALE to the upper end, the one with the least error."""
    for g in range(0, LANES, n_subs):
        largest = ZERO
        for j in range(g, g + n_subs):
            largest = max(largest, t[SCALE, j])
        start = largest / np.float32(2 * shape.scale_top + 1)
        d, least = start, HUGE
        for c in range(N_SCALES):
            solved, error = _solved(
                t, g, n_subs, start * (np.float32(0.9) + np.float32(0.025) * np.float32(c)), shape.scale_top
            )
            if error < least:
                d, least = solved, error
        for j in range(g, g + n_subs):
            t[D, j] = d


@kernel
def _integer_scales(shape, beside, t):
    """TRY_LS: the integer scale nearest to SCALE or, if `beside`, the next best."""
    for j in range(LANES):
        ratio = t[SCALE, j] * _inverse(t[D, j])
        ls = _nearest_odd(ratio, shape.scale_top)
        if beside:
            ls = ls + ONE if ratio > ls + ls + ONE else ls - ONE
        t[TRY_LS, j] = min(max(ls, ZERO), np.float32(shape.scale_top))


@kernel
def _keep_better(n_subs, count, t, tried, best):
    """Keep what was tried where it lowers the error of `n_subs` sub-blocks together."""
    for g in range(0, count, n_subs):
        before = after = ZERO
        for j in range(g, g + n_subs):
            before += t[ERROR, j]
            after += t[TRY_ERROR, j]
        if after >= before:  # not so where both are NaN
            continue
        for j in range(g, g + n_subs):
            t[ERROR, j] = t[TRY_ERROR, j]
            t[LS, j] = t[TRY_LS, j]
            t[BEST_D, j] = t[D, j]
            t[BEST_XL, j] = t[XL, j]
            t[BEST_LL, j] = t[LL, j]
            for n in range(best.shape[2]):
                best[0, j, n] = tried[0, j, n]
                best[1, j, n] = tried[1, j, n]


@kernel
def _refit(n_subs, t):
    """D solved anew for the words and integer scales kept, which are to be tried with it."""
    for g in range(0, LANES, n_subs):
        mm = xm = ZERO
        for j in range(g, g + n_subs):
            t[TRY_LS, j] = t[LS, j]
            m = ONE + t[LS, j] + t[LS, j]
            mm += m * m * t[BEST_LL, j]
            xm += m * t[BEST_XL, j]
        for j in range(g, g + n_subs):
            t[D, j] = max(xm / mm, ZERO) if mm > ZERO else ZERO


@kernel
def _round_d(unit, t):
    """D as a half, in units."""
    for j in range(LANES):
        t[D, j] = half_to_float(float_to_half(min(t[D, j] / unit, LARGEST_HALF))) * unit


@kernel
def _write(shape, n_subs, first, count, t, best, signs, found):
    """The sub-blocks `first` to `first` + `count` into found."""
    n_words = best.shape[2]
    for j in range(count):
        b, s = (first + j) // n_subs, (first + j) % n_subs
        found["d"][b] = float_to_half(t[BEST_D, j] / shape.unit)
        found["ls"][b, s] = np.uint8(t[LS, j])
        for g in range(n_words):
            found["index"][b, s * n_words + g] = best[0, j, g]
        if shape.delta == ZERO:
            for g in range(signs.shape[0]):
                found["signs"][b, s * signs.shape[0] + g] = signs[g, j]
        else:
            for g in range(n_words):
                found["minus"][b, s * n_words + g] = best[1, j, g]
