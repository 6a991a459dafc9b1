"""Search for x = scale * word: codewords, signs and odd integer scales of the IQ formats with a codebook.

A sub-block's scale comes first from a search that takes each weight by itself; then words are assigned to it
(grid_words.py) and the scale solved for them, in turn. With d rounded, words are assigned again for the integer
scales nearest to the best one, and d is solved once more. ggml tries up to 19 scales, but no word again after rounding.

One search serves all these formats, so it is compiled once: it writes FOUND, and each format packs that.
x, w, t: as in grid_words.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from requant.formats.bits import LARGEST_HALF, float_to_half, half_to_float
from requant.formats.encoders.grid_words import (
    AT,
    BEST_D,
    COST,
    LEVEL,
    MINUS,
    SMALLEST,
    TRY_ERROR,
    Shape,
    find_cells,
    find_errors,
    inverse_of,
    keep_words,
    level_costs,
    pick_of_4,
    pick_of_8,
    sum_levels,
)
from requant.formats.encoders.neighbours import neighbours
from requant.formats.encoders.search import (
    ERROR,
    GAIN,
    HUGE,
    LANES,
    LL,
    LS,
    ONE,
    PEAK,
    SCALE,
    TRY_INVERSE,
    TRY_LS,
    TRY_SCALE,
    XL,
    ZERO,
    D,
    SearchBudget,
    buffers,
    keep_better_fit,
    load,
    measure_peak,
)
from requant.formats.encoders.shrinkage import grow
from requant.formats.grids import EVEN_SIGNS
from requant.formats.jit import kernel

FOUND = np.dtype(
    [
        ("d", "<u2"),  # binary16 bits
        ("ls", "u1", (16,)),  # scale s is d * (1 + 2 * ls[s]), in the format's unit
        ("index", "<u2", (64,)),
        ("signs", "u1", (32,)),  # a bit per weight
        ("minus", "u1", (32,)),  # 1 where delta is subtracted
    ]
)
ALIKE = np.float32(0.9)  # least ratio of squared mean and mean square; 0.64 where weights are normally distributed
N_CANDIDATES, N_SCALES = 5, 16  # tried for a sub-block's first scale, and for d


def grid_fit(
    codebook: str, shape: Shape, by_effort: Sequence[SearchBudget], layout: Any, decode: Any, pack: Any
) -> Callable[[Any, Any, int], Any]:
    """Return fit(x, importance, effort) of a format with the kernels decode(blocks, out) and pack(found, blocks).

    It returns FOUND (n,) of x (n, 256) and importance (k, 256).
    """

    def fit(x: Any, importance: Any, effort: int) -> Any:
        found = np.zeros(len(x), FOUND)
        search(x, importance, neighbours(codebook), shape, by_effort[effort], found)
        blocks = np.empty(len(x), layout)
        pack(found, blocks)
        d = found["d"].copy()
        grow(x, importance, blocks, decode, d)
        found["d"] = d
        return found

    return fit


@kernel
def search(x, importance, book, shape, budget, found):
    """Search words, signs and scales of x (n, 256) with importance (k, 256) -> found (n,) FOUND; book: Neighbours."""
    subs, weights = x.reshape(-1, shape.sub), importance.reshape(-1, shape.sub)
    n_words = shape.sub // shape.dim
    tile, w, t = buffers(shape.sub)
    q, cost, base = np.zeros_like(tile), np.zeros((2, shape.sub, LANES), np.float32), np.zeros_like(tile)
    signs = np.zeros((shape.sub // 8, LANES), np.uint8)
    cells, keys = np.zeros((2, n_words, LANES), np.int32), np.zeros((2, n_words, LANES), np.int32)
    minus, best = np.zeros((n_words, LANES), np.uint8), np.zeros((n_words, LANES), np.uint16)
    last = budget.rounds + budget.beside
    for first in range(0, subs.shape[0], LANES):
        count = min(LANES, subs.shape[0] - first)
        load(subs, weights, first, tile, w)
        if shape.delta == ZERO:
            _take_signs(tile, signs)
        first_turn = -3 if _find_level(tile, shape, t) else 0
        _first_scales(tile, w, shape, t)
        if shape.even:
            _make_even(tile, w, shape, t, signs)
        for turn in range(first_turn, last + 1):
            if first_turn < turn <= budget.rounds or turn == last:
                sum_levels(tile, w, book.words, best, count, shape, q, t)
            if first_turn < turn <= budget.rounds:
                _solve_scales(turn - 1, t)
            _next_scales(shape, budget, turn, t)
            for signed in range(1 if shape.delta == ZERO else 2):
                delta = -shape.delta if signed else shape.delta
                find_cells(tile, delta, shape, t, cells[signed])
                if shape.dim == 4:
                    pick_of_4(tile, w, book.values, cells[signed], count, t, keys[signed])
                else:
                    level_costs(tile, w, delta, shape, t, base, cost)
                    pick_of_8(book.codes, cells[signed], count, base, cost, keys[signed])
            find_errors(keys, shape, minus, t)
            together = 256 // shape.sub if turn == last else 1
            _keep_better(turn < budget.rounds, together, count, (book.near, cells, keys, minus), t, best)
        _write(shape, first, count, t, best, signs, found)


@kernel
def _take_signs(x, signs):
    """Replace x by its magnitudes; signs: (sub / 8, LANES) uint8, bit i set where weight i of eight is negative."""
    for g in range(signs.shape[0]):
        for j in range(LANES):
            signs[g, j] = 0
        for i in range(8):
            for j in range(LANES):
                v = x[8 * g + i, j]
                signs[g, j] |= np.uint8(v < ZERO) << np.uint8(i)
                x[8 * g + i, j] = abs(v)


@kernel
def _find_level(x, shape, t):
    """Set LEVEL to the mean magnitude of lanes whose weights are all much alike, else 0; return whether there are any.

    Weight by weight such lanes fit at any scale, but few words have all their levels alike. Importance is left out:
    where it is uneven, a few weights that are alike would often pass for all.
    """
    found, n = False, np.float32(x.shape[0])
    for j in range(LANES):
        t[LEVEL, j] = ZERO
        t[XL, j] = ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            t[XL, j] += x[i, j]
            t[LEVEL, j] += x[i, j] * x[i, j]
    for j in range(LANES):
        alike = t[XL, j] * t[XL, j] > ALIKE * t[LEVEL, j] * n and shape.delta == ZERO
        t[LEVEL, j] = t[XL, j] / n if alike else ZERO
        found = found or alike
    return found


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
    keep_better_fit(t)


@kernel
def _first_scales(x, w, shape, t):
    """Find SCALE per lane, as if every combination of levels were a word."""
    measure_peak(x, t)
    high = shape.low + shape.step * np.float32(shape.top)
    for j in range(LANES):
        t[PEAK, j] = high / abs(t[PEAK, j]) if abs(t[PEAK, j]) > SMALLEST else ZERO
    for c in range(N_CANDIDATES + 2):
        reach = shape.first + shape.stride * np.float32(c)
        for j in range(LANES):
            t[TRY_INVERSE, j] = reach * t[PEAK, j] if c < N_CANDIDATES else inverse_of(t[SCALE, j])
        _trial(x, w, shape, t)


@kernel
def _make_even(x, w, shape, t, signs):
    """Flip the sign that costs least at SCALE in each group of eight weights with an odd number of minuses."""
    low, step, inverse, high = shape.low, shape.step, ONE / shape.step, np.float32(shape.top)
    for j in range(LANES):
        t[TRY_INVERSE, j] = inverse_of(t[SCALE, j])
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
def _next_scales(shape, budget, turn, t):
    """Set TRY_SCALE for a turn.

    Before turn 0 it is SCALE, or puts LEVEL at one of two levels; for some rounds it is SCALE; then, with d rounded,
    the integer scales are tried; at last the integer scales kept, with d solved anew for the words kept.
    """
    n_subs = 256 // shape.sub
    if turn < budget.rounds:
        level = shape.low if turn == -2 else shape.low + shape.step + shape.step
        for j in range(LANES):
            t[TRY_SCALE, j] = t[LEVEL, j] / level if turn in (-2, -1) else t[SCALE, j]
        return
    if turn == budget.rounds:
        _block_scales(shape, n_subs, t)
    elif turn == budget.rounds + budget.beside:
        _refit(n_subs, t)
    if turn < budget.rounds + budget.beside:
        _integer_scales(shape, turn - budget.rounds, t)
    for j in range(LANES):
        d = t[D, j] / shape.unit
        t[D, j] = half_to_float(float_to_half(d if d < LARGEST_HALF else LARGEST_HALF)) * shape.unit  # NaN is not below
        t[TRY_SCALE, j] = t[D, j] * (ONE + t[TRY_LS, j] + t[TRY_LS, j])


@kernel
def _solve_scales(turn, t):
    """Solve SCALE per lane for the words of the trial; before turn 0 only where a lane has a LEVEL and it is better."""
    for j in range(LANES):
        scale = t[XL, j] / t[LL, j] if t[LL, j] > ZERO and t[XL, j] > ZERO else ZERO
        gain = scale * t[XL, j]
        if turn >= 0 or (t[LEVEL, j] > ZERO and (turn == -3 or gain > t[GAIN, j])):
            t[SCALE, j] = scale
            t[GAIN, j] = gain


@kernel
def _block_scales(shape, n_subs, t):
    """Choose D per super-block: of those that bring the largest SCALE near the top, the best by least squares."""
    inverse, mm, sm = np.zeros(N_SCALES, np.float32), np.zeros(N_SCALES, np.float32), np.zeros(N_SCALES, np.float32)
    top = np.float32(shape.scale_top)
    for first in range(0, LANES, n_subs):
        largest = ZERO
        for j in range(first, first + n_subs):
            largest = max(largest, t[SCALE, j])
        for c in range(N_SCALES):
            inverse[c] = inverse_of(largest) * (top + top + ONE) / (np.float32(0.9) + np.float32(0.025) * np.float32(c))
            mm[c] = ZERO
            sm[c] = ZERO
        for j in range(first, first + n_subs):
            scale, ll = t[SCALE, j], t[LL, j]
            for c in range(N_SCALES):
                ls = min(max(np.rint((scale * inverse[c] - ONE) * np.float32(0.5)), ZERO), top)
                m = ls + ls + ONE
                mm[c] += ll * m * m
                sm[c] += ll * m * scale
        d = gain = ZERO
        for c in range(N_SCALES):
            solved = sm[c] / mm[c] if mm[c] > ZERO else ZERO
            if solved * sm[c] > gain:
                d, gain = solved, solved * sm[c]
        for j in range(first, first + n_subs):
            t[D, j] = d
            t[ERROR, j] = HUGE


@kernel
def _integer_scales(shape, beside, t):
    """Set TRY_LS to the integer scale nearest to SCALE or, by the number `beside`, to the next ones on either side."""
    away = np.float32((beside + 1) // 2 if beside % 2 else -(beside // 2))
    for j in range(LANES):
        ratio = t[SCALE, j] * inverse_of(t[D, j])
        ls = min(max(np.rint((ratio - ONE) * np.float32(0.5)), ZERO), np.float32(shape.scale_top))
        ls += away if ratio > ls + ls + ONE else -away
        t[TRY_LS, j] = min(max(ls, ZERO), np.float32(shape.scale_top))


@kernel
def _keep_better(always, n_subs, count, words, t, best):
    """Keep the words picked, `always` or where they lower the error of `n_subs` sub-blocks together."""
    near, cells, keys, minus = words
    for first in range(0, count, n_subs):
        before = after = ZERO
        for j in range(first, first + n_subs):
            before += t[ERROR, j]
            after += t[TRY_ERROR, j]
        if after >= before and not always:  # not so where both are NaN
            continue
        for j in range(first, first + n_subs):
            if not always:
                t[ERROR, j] = t[TRY_ERROR, j]
                t[LS, j] = t[TRY_LS, j]
                t[BEST_D, j] = t[D, j]
            keep_words(near, cells, keys, minus, j, best)


@kernel
def _refit(n_subs, t):
    """Solve D anew for the words and integer scales kept, and set TRY_LS to these scales."""
    for g in range(0, LANES, n_subs):
        mm = xm = ZERO
        for j in range(g, g + n_subs):
            t[TRY_LS, j] = t[LS, j]
            m = ONE + t[LS, j] + t[LS, j]
            mm += m * m * t[LL, j]
            xm += m * t[XL, j]
        for j in range(g, g + n_subs):
            t[D, j] = max(xm / mm, ZERO) if mm > ZERO else ZERO


@kernel
def _write(shape, first, count, t, best, signs, found):
    """Write the sub-blocks `first` to `first` + `count` into found."""
    n_words, n_subs = best.shape[0], 256 // shape.sub
    for j in range(count):
        b, s = (first + j) // n_subs, (first + j) % n_subs
        found["d"][b] = float_to_half(t[BEST_D, j] / shape.unit)
        found["ls"][b, s] = np.uint8(t[LS, j])
        for g in range(n_words):
            found["index"][b, s * n_words + g] = best[g, j] & (MINUS - np.uint16(1))
            found["minus"][b, (s * n_words + g) % 32] = best[g, j] >> np.uint16(15)
        for g in range(signs.shape[0]):
            found["signs"][b, s * signs.shape[0] + g] = signs[g, j]
