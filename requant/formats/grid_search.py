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
MINUS = np.uint16(0x8000)
LARGEST_HALF = np.float32(65504.0)
N_CANDIDATES, N_SCALES = 8, 12  # tried for a sub-block's first scale, and for d


class Shape(NamedTuple):
    """A format, as the search sees it; the same types for each, so that the kernel is compiled once."""

    sub: int  # weights that share a scale
    dim: int  # weights of a word
    low: np.float32  # level c = 0 .. top is low + step * c, about
    step: np.float32
    bend: (
        np.float32
    )  # by how much the middle one of three levels is below that, halved: low + step, low + 2 step + 2 bend
    top: int
    delta: np.float32  # added to or subtracted from a word; 0 where weights have signs instead
    per_delta: int  # words that share the choice
    even: bool  # whether the minuses of eight weights must be an even number
    scale_top: int  # integer scales 0 .. scale_top
    unit: np.float32  # of d
    first: np.float32  # candidates for the largest weight, in multiples of the top level
    stride: np.float32
    rounds: int  # of words and scale in turn
    beside: int  # integer scales tried


def grid_encoder(codebook: str, shape: Shape) -> Callable[[Any], Callable[[Any, Any, Any], None]]:
    """Makes of a kernel pack(found, blocks) the kernel encode(x, importance, blocks) of a format."""

    def decorate(pack: Any) -> Callable[[Any, Any, Any], None]:
        @functools.wraps(pack)
        def encode(x: Any, importance: Any, blocks: Any) -> None:
            found = np.zeros(len(x), FOUND)
            search(x, importance, neighbours(codebook), shape, found)
            pack(found, blocks)

        return encode

    return decorate


@kernel
def search(x, importance, book, shape, found):
    """Of x (n, 256), importance (k, 256) -> found (n,) FOUND; book as neighbours() gives it."""
    subs, weights = x.reshape(-1, shape.sub), importance.reshape(-1, shape.sub)
    n_words = shape.sub // shape.dim
    tile, w, t, _ = buffers(shape.sub)
    rows, signs = np.zeros((LANES, shape.sub), np.float32), np.zeros((shape.sub // 8, LANES), np.uint8)
    cells, keys = np.zeros((2, n_words, LANES), np.int32), np.zeros((2, LANES, n_words), np.int32)
    cost = np.zeros((4, LANES, shape.sub), np.float32)
    for j in range(LANES):
        for i in range(shape.sub):
            cost[3, j, i] = np.float32(0.25 ** (i % 8))
    tried, best = np.zeros((LANES, n_words), np.uint16), np.zeros((LANES, n_words), np.uint16)
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
        last = shape.rounds + shape.beside
        for turn in range(last + 1):
            _next_scales(shape, turn, t)
            _find_cells(tile, shape, t, cells)
            _assign(rows, weights, first, count, book, shape, t, cells, cost, keys, tried)
            if turn < shape.rounds:
                _solve_scales(t)
            else:
                _keep_better(256 // shape.sub if turn == last else 1, count, t, tried, best)
        _write(shape, first, count, t, best, signs, found)


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
    for c in range(N_CANDIDATES + 2):
        reach = shape.first + shape.stride * np.float32(c)
        for j in range(LANES):
            t[TRY_INVERSE, j] = reach * t[PEAK, j] if c < N_CANDIDATES else _inverse(t[SCALE, j])
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
def _next_scales(shape, turn, t):
    """TRY_SCALE of a turn: the free SCALE at first, then with d rounded the integer scales, at last with d refitted."""
    n_subs = 256 // shape.sub
    if turn < shape.rounds:
        for j in range(LANES):
            t[TRY_SCALE, j] = t[SCALE, j]
        return
    if turn == shape.rounds:
        _block_scales(shape, n_subs, t)
    elif turn == shape.rounds + shape.beside:
        _refit(n_subs, t)
    if turn < shape.rounds + shape.beside:
        _integer_scales(shape, turn - shape.rounds, t)
    for j in range(LANES):
        t[D, j] = half_to_float(float_to_half(min(t[D, j] / shape.unit, LARGEST_HALF))) * shape.unit
        t[TRY_SCALE, j] = t[D, j] * (ONE + t[TRY_LS, j] + t[TRY_LS, j])


@kernel
def _solve_scales(t):
    """SCALE per lane: the best for the words of the trial."""
    for j in range(LANES):
        t[SCALE, j] = t[XL, j] / t[LL, j] if t[LL, j] > ZERO and t[XL, j] > ZERO else ZERO


@kernel
def _find_cells(x, shape, t, cells):
    """The cell of every word's weights at TRY_SCALE, with delta added and subtracted; cells: (2, n_words, LANES) int32."""
    inverse, high = ONE / shape.step, np.float32(shape.top)
    base = np.int32(shape.top + 1)
    for j in range(LANES):
        t[TRY_INVERSE, j] = _inverse(t[TRY_SCALE, j])
    for minus in range(1 if shape.delta == ZERO else 2):
        low = shape.low + (-shape.delta if minus else shape.delta)
        for g in range(cells.shape[1]):
            for j in range(LANES):
                cells[minus, g, j] = 0
            for i in range(g * shape.dim, (g + 1) * shape.dim):
                for j in range(LANES):
                    code = min(max(np.rint((x[i, j] * t[TRY_INVERSE, j] - low) * inverse), ZERO), high)
                    cells[minus, g, j] = cells[minus, g, j] * base + np.int32(code)


@kernel
def _assign(x, weights, first, count, book, shape, t, cells, cost, keys, tried):
    """The best words at TRY_SCALE into tried, MINUS where delta is subtracted; the sums over them."""
    if shape.dim == 4:
        _pick_of_4(book.values, cells[0], x, weights, first, count, t, keys[0])
    else:
        for minus in range(1 if shape.delta == ZERO else 2):
            _level_costs(x, weights, first, count, -shape.delta if minus else shape.delta, shape, t, cost)
            _pick_of_8(book.codes, cells[minus], count, cost, keys[minus])
    _choose(book.near, cells, keys, count, shape, tried)
    _sum(x, weights, first, count, book.words, shape, tried, t)


@kernel
def _pick_of_4(values, cells, x, weights, first, count, t, keys):
    """Key of the best word of every cell: its weighted squared error, as bits, the lowest four of which are its place.

    Positive floats have the order of their bits, so that a minimum over integers finds it. values: (n_cells, 4,
    NEAREST) int8, cells: (n_words, LANES), keys: (LANES, n_words) int32.
    """
    for j in range(count):
        scale, r = t[TRY_SCALE, j], (first + j) % weights.shape[0]
        for g in range(cells.shape[0]):
            i, cell = 4 * g, cells[g, j]
            x0, x1, x2, x3 = x[j, i], x[j, i + 1], x[j, i + 2], x[j, i + 3]
            w0, w1, w2, w3 = weights[r, i], weights[r, i + 1], weights[r, i + 2], weights[r, i + 3]
            best = np.int32(0x7FFFFFFF)
            for k in range(NEAREST):
                m0 = x0 - scale * np.float32(values[cell, 0, k])
                m1 = x1 - scale * np.float32(values[cell, 1, k])
                m2 = x2 - scale * np.float32(values[cell, 2, k])
                m3 = x3 - scale * np.float32(values[cell, 3, k])
                error = (w0 * m0 * m0 + w1 * m1 * m1) + (w2 * m2 * m2 + w3 * m3 * m3)
                key = np.int32(np.float32(error).view(np.int32) & np.int32(-NEAREST))
                best = min(best, np.int32(key | np.int32(k)))
            keys[j, g] = best


@kernel
def _level_costs(x, weights, first, count, delta, shape, t, cost):
    """What level c = 0, 1, 2 costs each weight: cost[0] + cost[1] * c' + cost[2] * c'**2 with c' = c * 4**(i % 8).

    cost: (4, LANES, sub); cost[3] holds the factors 4**-(i % 8).
    """
    q0, q1 = shape.low, shape.low + shape.step
    q2 = q1 + shape.step + shape.bend + shape.bend
    three, four, half = np.float32(3.0), np.float32(4.0), np.float32(0.5)
    a, b = (four * q1 - three * q0 - q2) * half, (q0 + q2) * half - q1  # q = q0 + a c + b c^2
    aa, bb = (four * q1 * q1 - three * q0 * q0 - q2 * q2) * half, (q0 * q0 + q2 * q2) * half - q1 * q1  # and q^2
    for j in range(count):
        scale, r = t[TRY_SCALE, j], (first + j) % weights.shape[0]
        for i in range(x.shape[1]):
            v, w, place = x[j, i] - scale * delta, weights[r, i], cost[3, j, i]
            miss, ws, v2 = v - scale * q0, w * scale * place, v + v
            cost[0, j, i] = w * miss * miss
            cost[1, j, i] = ws * (scale * aa - v2 * a)
            cost[2, j, i] = ws * place * (scale * bb - v2 * b)


@kernel
def _pick_of_8(codes, cells, count, cost, keys):
    """As _pick_of_4, of words of eight with three levels, by what these cost; codes: (n_cells, NEAREST) uint16."""
    for j in range(count):
        for g in range(cells.shape[0]):
            i, cell = 8 * g, cells[g, j]
            a0, a1, a2, a3 = cost[1, j, i], cost[1, j, i + 1], cost[1, j, i + 2], cost[1, j, i + 3]
            a4, a5, a6, a7 = cost[1, j, i + 4], cost[1, j, i + 5], cost[1, j, i + 6], cost[1, j, i + 7]
            b0, b1, b2, b3 = cost[2, j, i], cost[2, j, i + 1], cost[2, j, i + 2], cost[2, j, i + 3]
            b4, b5, b6, b7 = cost[2, j, i + 4], cost[2, j, i + 5], cost[2, j, i + 6], cost[2, j, i + 7]
            base = (cost[0, j, i] + cost[0, j, i + 1]) + (cost[0, j, i + 2] + cost[0, j, i + 3])
            base += (cost[0, j, i + 4] + cost[0, j, i + 5]) + (cost[0, j, i + 6] + cost[0, j, i + 7])
            best = np.int32(0x7FFFFFFF)
            for k in range(NEAREST):
                code = np.int32(codes[cell, k])
                c0, c1 = np.float32(np.int32(code & np.int32(0x3))), np.float32(np.int32(code & np.int32(0xC)))
                c2, c3 = np.float32(np.int32(code & np.int32(0x30))), np.float32(np.int32(code & np.int32(0xC0)))
                c4, c5 = np.float32(np.int32(code & np.int32(0x300))), np.float32(np.int32(code & np.int32(0xC00)))
                c6, c7 = np.float32(np.int32(code & np.int32(0x3000))), np.float32(np.int32(code & np.int32(0xC000)))
                error = (c0 * (a0 + b0 * c0) + c1 * (a1 + b1 * c1)) + (c2 * (a2 + b2 * c2) + c3 * (a3 + b3 * c3))
                error += (c4 * (a4 + b4 * c4) + c5 * (a5 + b5 * c5)) + (c6 * (a6 + b6 * c6) + c7 * (a7 + b7 * c7))
                key = np.int32(np.float32(base + error).view(np.int32) & np.int32(-NEAREST))
                best = min(best, np.int32(key | np.int32(k)))
            keys[j, g] = best


@kernel
def _choose(near, cells, keys, count, shape, tried):
    """The words of the keys; with delta added or subtracted, for per_delta words together, as errs less."""
    for j in range(count):
        for start in range(0, cells.shape[1], shape.per_delta):
            minus = 0
            if shape.delta != ZERO:
                gain = ZERO
                for g in range(start, start + shape.per_delta):
                    gain += bits_to_float(np.uint32(keys[0, j, g] & np.int32(-NEAREST)))
                    gain -= bits_to_float(np.uint32(keys[1, j, g] & np.int32(-NEAREST)))
                minus = 1 if gain > ZERO else 0
            for g in range(start, start + shape.per_delta):
                word = near[cells[minus, g, j], keys[minus, j, g] & np.int32(NEAREST - 1)]
                tried[j, g] = word | np.uint16(minus << 15)


@kernel
def _sum(x, weights, first, count, words, shape, tried, t):
    """Sums XL and LL over the words tried, and TRY_ERROR; each in eight parts, of weights 8 apart (or 4, in four)."""
    xl, ll = np.zeros(8, np.float32), np.zeros(8, np.float32)
    for j in range(count):
        scale, r = t[TRY_SCALE, j], (first + j) % weights.shape[0]
        for n in range(8):
            xl[n] = ZERO
            ll[n] = ZERO
        for g in range(tried.shape[1]):
            word = tried[j, g] & (MINUS - np.uint16(1))
            delta = -shape.delta if tried[j, g] & MINUS else shape.delta
            if shape.dim == 4:
                for n in range(4):
                    q = np.float32(words[word, n])
                    wq = weights[r, 4 * g + n] * q
                    xl[n] += wq * x[j, 4 * g + n]
                    ll[n] += wq * q
            else:
                for n in range(8):
                    q = np.float32(words[word, n]) + delta
                    wq = weights[r, 8 * g + n] * q
                    xl[n] += wq * x[j, 8 * g + n]
                    ll[n] += wq * q
        t[XL, j] = ((xl[0] + xl[1]) + (xl[2] + xl[3])) + ((xl[4] + xl[5]) + (xl[6] + xl[7]))
        t[LL, j] = ((ll[0] + ll[1]) + (ll[2] + ll[3])) + ((ll[4] + ll[5]) + (ll[6] + ll[7]))
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
            t[ERROR, j] = HUGE


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
            for n in range(best.shape[1]):
                best[j, n] = tried[j, n]


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
def _write(shape, first, count, t, best, signs, found):
    """The sub-blocks `first` to `first` + `count` into found."""
    n_words, n_subs = best.shape[1], 256 // shape.sub
    for j in range(count):
        b, s = (first + j) // n_subs, (first + j) % n_subs
        found["d"][b] = float_to_half(t[BEST_D, j] / shape.unit)
        found["ls"][b, s] = np.uint8(t[LS, j])
        for g in range(n_words):
            found["index"][b, s * n_words + g] = best[j, g] & (MINUS - np.uint16(1))
            found["minus"][b, (s * n_words + g) % 32] = best[j, g] >> np.uint16(15)
        for g in range(signs.shape[0]):
            found["signs"][b, s * signs.shape[0] + g] = signs[g, j]
