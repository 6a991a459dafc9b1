"""Coordinate descent after the rounding: codes, integer scales and d, dmin by the error e H e' of the whole row.

r = (v - w) H is kept up to date, so that what a change of some columns costs is known without the other columns.

All arrays of a row lie in tiles as in columns.py. e: values before less values after a change, so that r falls by H e.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from requant.formats.bits import round_to_half
from requant.formats.encoders.columns import PANEL, round_column, subtract
from requant.formats.encoders.fit import FP4
from requant.formats.encoders.search import HUGE, LANES, ONE, ZERO
from requant.formats.jit import kernel

SINGULAR = np.float32(1e-5)


class Codes(NamedTuple):
    """The encoded rows: values and codes by column, d and dmin by block, integer scales and minima by sub-block."""

    v: NDArray[np.float32]  # (n_tiles, n_in, LANES)
    codes: NDArray[np.uint8]  # (n_tiles, n_in, LANES)
    d: NDArray[np.float32]  # (n_tiles, n_blocks, LANES), as the following ones
    dmin: NDArray[np.float32]
    scales: NDArray[np.float32]  # (n_tiles, n_subs, LANES), as the following one
    mins: NDArray[np.float32]


@kernel
def _set_factors(d, dmin, scale, least, factors):
    """Set factors (3, LANES), as in columns.py, to those of a sub-block."""
    for j in range(LANES):
        step = d[j] * scale[j]
        factors[0, j] = step
        factors[1, j] = ONE / step if step != ZERO else ZERO
        factors[2, j] = dmin[j] * least[j]


@kernel
def _round_again(v, r, h, first, levels, factors, buffers):
    """Round the columns of a sub-block one after the other, each to what is best after those before it.

    v, r: (n_in, LANES) of a tile. buffers: codes, values and e (sub, LANES), the fall of the error (LANES,), and room.
    """
    codes, values, e, fall, room = buffers
    low, high = np.float32(levels.low), np.float32(levels.high)
    g, unused = room[0], room[1]
    for j in range(LANES):
        fall[j] = ZERO
    for i in range(e.shape[0]):
        column = first + i
        diagonal = h[column, column]
        inverse = ONE / diagonal if diagonal > ZERO else ZERO
        for j in range(LANES):
            g[j] = r[column, j]
        for k in range(i):
            share, before = h[first + k, column], e[k]
            for j in range(LANES):
                g[j] -= share * before[j]
        w = values[i]
        for j in range(LANES):
            w[j] = v[column, j] - g[j] * inverse
        round_column(w, unused, ONE, levels.kind, low, high, factors, codes[i])
        for j in range(LANES):
            miss = v[column, j] - w[j]
            e[i, j] = miss
            fall[j] += miss * (g[j] + g[j] - diagonal * miss)


@kernel
def _try_scales(v, r, h, first, levels, state, buffers):
    """Find the integer scale and minimum, at most one beside the present ones, that lower the error most.

    state: d, dmin, scale, least and, to be set, the best of these two, (LANES,) each.
    """
    d, dmin, scale, least, best_scale, best_least = state
    factors, best, room = buffers
    low, high = np.float32(levels.scale_low), np.float32(levels.scale_high)
    top = np.float32(levels.min_high)
    beside = 1 if levels.scale_high > levels.scale_low else 0
    lower = 1 if levels.min_high > 0 else 0
    trial, other = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    fall = room[3]
    for j in range(LANES):
        best[j] = -HUGE
        best_scale[j] = scale[j]
        best_least[j] = least[j]
    for turn in range((2 * beside + 1) * (2 * lower + 1)):
        # 0, 1, -1: the present ones come first, and stay where others are no better
        a, b = turn % (2 * beside + 1), turn // (2 * beside + 1)
        move, shift = np.float32(a if a < 2 else -1), np.float32(b if b < 2 else -1)
        for j in range(LANES):
            trial[j] = min(max(scale[j] + move, low), high) if beside else scale[j]
            other[j] = min(max(least[j] + shift, ZERO), top) if lower else least[j]
        _set_factors(d, dmin, trial, other, factors)
        _round_again(v, r, h, first, levels, factors, room)
        for j in range(LANES):
            if fall[j] > best[j]:
                best[j] = fall[j]
                best_scale[j] = trial[j]
                best_least[j] = other[j]
    _set_factors(d, dmin, best_scale, best_least, factors)
    _round_again(v, r, h, first, levels, factors, room)


@kernel
def _apply_better(x, at, first, changes, total):
    """Take over the changes (codes, values, e, fall) of the columns from `first` on where the error falls.

    e becomes 0 in the other lanes, and is added to total (the columns of the panel, LANES) from row `at` on.
    """
    v, codes = x
    new_codes, values, e, fall = changes
    for i in range(e.shape[0]):
        for j in range(LANES):
            better = fall[j] > ZERO
            e[i, j] = e[i, j] if better else ZERO
            v[first + i, j] = values[i, j] if better else v[first + i, j]
            total[at + i, j] += e[i, j]
        for j in range(LANES):
            codes[first + i, j] = new_codes[i, j] if fall[j] > ZERO else codes[first + i, j]


@kernel
def sum_products(directions, r, h, first, room, sums):
    """Compute the sums a'Ha, a'Hb, b'Hb, a'r and b'r of the directions a and b (width, LANES) of a block's values."""
    a, b = directions[0], directions[1]
    width = a.shape[0]
    sums[:] = ZERO
    for c in range(2):
        room[first : first + width] = ZERO
        subtract(room, directions[c], h, first, 0, width, first, first + width)
        for i in range(width):
            for j in range(LANES):
                product = -room[first + i, j]
                sums[c, j] += a[i, j] * product
                sums[c + 1, j] += (b[i, j] if c == 1 else ZERO) * product
    for i in range(width):
        for j in range(LANES):
            sums[3, j] += a[i, j] * r[first + i, j]
            sums[4, j] += b[i, j] * r[first + i, j]


@kernel
def solve_factors(d, dmin, sums, signed, fall):
    """Solve d and dmin (LANES,) for the sums of sum_products; fall: by how much the error then falls."""
    for j in range(LANES):
        aa, ab, bb, ra, rb = sums[0, j], sums[1, j], sums[2, j], sums[3, j], sums[4, j]
        det = aa * bb - ab * ab
        more = least = ZERO
        if det > SINGULAR * aa * bb:
            more, least = (rb * ab - ra * bb) / det, (ra * ab - rb * aa) / det
        elif aa > ZERO:
            more = -ra / aa
        new_d, new_dmin = round_to_half(d[j] + more), round_to_half(dmin[j] + least)
        if not signed:
            new_d, new_dmin = max(new_d, ZERO), max(new_dmin, ZERO)
        more, least = new_d - d[j], new_dmin - dmin[j]
        two = np.float32(2.0)
        change = more * more * aa + two * more * least * ab + least * least * bb + two * (more * ra + least * rb)
        fall[j] = -change
        if change < ZERO:
            d[j], dmin[j] = new_d, new_dmin


@kernel
def _refit_block(x, t, r, h, block, table, signed, buffers):
    """Solve d and dmin of a block anew for its codes, integer scales and minima; buffers hold the changes."""
    changes, directions, room, sums = buffers
    codes, values, e, fall = changes
    width = directions.shape[1]
    first, sub = block * width, x.v.shape[1] // x.scales.shape[1]
    for i in range(width):
        s = (first + i) // sub
        for j in range(LANES):
            codes[i, j] = x.codes[t, first + i, j]
            directions[0, i, j] = x.scales[t, s, j] * table[codes[i, j]]
            directions[1, i, j] = -x.mins[t, s, j]
    sum_products(directions, r, h, first, room, sums)
    solve_factors(x.d[t, block], x.dmin[t, block], sums, signed, fall)
    for i in range(width):
        s = (first + i) // sub
        for j in range(LANES):
            scale, least = x.d[t, block, j] * x.scales[t, s, j], x.dmin[t, block, j] * x.mins[t, s, j]
            values[i, j] = scale * table[codes[i, j]] - least
            e[i, j] = x.v[t, first + i, j] - values[i, j]


@kernel
def polish_codes(x, r, h, levels, table, sweeps):
    """Lower the error of the rows `x`, Codes, by `sweeps` over their blocks; r: (n_tiles, n_in, LANES), (v - w) H.

    table: the level of each code. With levels of FP4 the scales stay as they are.
    """
    n = x.v.shape[1]
    width, sub = n // x.d.shape[1], n // x.scales.shape[1]
    floats, room = np.zeros((3, PANEL, LANES), np.float32), np.zeros((n, LANES), np.float32)
    total, e, values = floats[0], floats[1], floats[2]
    codes, factors = np.zeros((PANEL, LANES), np.uint8), np.zeros((3, LANES), np.float32)
    directions, sums = np.zeros((2, width, LANES), np.float32), np.zeros((5, LANES), np.float32)
    lanes = np.zeros((4, LANES), np.float32)
    fall, best, best_scale, best_least = lanes[0], lanes[1], lanes[2], lanes[3]
    for t in range(x.v.shape[0]):
        row = x.v[t], x.codes[t]
        for panel_turn in range(sweeps * ((n + PANEL - 1) // PANEL)):
            panel = panel_turn * PANEL % (PANEL * ((n + PANEL - 1) // PANEL))
            end = min(panel + PANEL, n)
            total[:] = ZERO
            for block in range(panel // width, end // width):
                changes = codes[:sub], values[:sub], e[:sub], fall
                for s in range(block * width // sub, (block + 1) * width // sub):
                    state = x.d[t, block], x.dmin[t, block], x.scales[t, s], x.mins[t, s], best_scale, best_least
                    _try_scales(x.v[t], r[t], h, s * sub, levels, state, (factors, best, (*changes, room)))
                    _apply_better(row, s * sub - panel, s * sub, changes, total)
                    for j in range(LANES):
                        x.scales[t, s, j] = best_scale[j] if fall[j] > ZERO else x.scales[t, s, j]
                        x.mins[t, s, j] = best_least[j] if fall[j] > ZERO else x.mins[t, s, j]
                    subtract(r[t], e, h, s * sub, 0, sub, panel, end)
                if levels.kind != FP4:
                    changes = codes[:width], values[:width], e[:width], fall
                    _refit_block(x, t, r[t], h, block, table, levels.min_high == 0, (changes, directions, room, sums))
                    _apply_better(row, block * width - panel, block * width, changes, total)
                    subtract(r[t], e, h, block * width, 0, width, panel, end)
            subtract(r[t], total, h, panel, 0, end - panel, 0, panel)
            subtract(r[t], total, h, panel, 0, end - panel, end, n)
