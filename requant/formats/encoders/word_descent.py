"""Coordinate descent over the words, integer scales and d of the IQ formats, as descent.py does over codes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from requant.formats.encoders.codewords import choose_word, flip_costs, is_odd, signs_of
from requant.formats.encoders.columns import PANEL, STEP, subtract
from requant.formats.encoders.descent import solve_factors, sum_products
from requant.formats.encoders.search import LANES, ONE, ZERO
from requant.formats.jit import kernel

SMALLEST = np.float32(1e-6)  # of a column's own moment, that must be left once others are known


class Words(NamedTuple):
    """The encoded rows: values by column, words and signs, d by block, integer scales by sub-block."""

    v: NDArray[np.float32]  # (n_tiles, n_in, LANES)
    numbers: NDArray[np.uint16]  # (n_tiles, n_in / dim, LANES)
    signs: NDArray[np.uint8]  # (n_tiles, n_in / 8, LANES), a bit per weight
    d: NDArray[np.float32]  # (n_tiles, n_blocks, LANES), with the format's unit
    scales: NDArray[np.float32]  # (n_tiles, n_subs, LANES): 1 + 2 ls


@kernel
def _find_root(h, first, m):
    """Find the lower triangular m (dim, dim) with m' m = h[first:first + dim, first:first + dim]."""
    for i in range(m.shape[0] - 1, -1, -1):
        own = h[first + i, first + i]
        for k in range(i, -1, -1):
            total = h[first + i, first + k]
            for p in range(i + 1, m.shape[0]):
                total -= m[p, i] * m[p, k]
            if k == i:
                m[i, i] = np.sqrt(max(total, SMALLEST * own)) if own > ZERO else ONE
            else:
                m[i, k] = total / m[i, i]


@kernel
def _divide(m, r, z):
    """Solve m' m z = r (dim,)."""
    for i in range(m.shape[0] - 1, -1, -1):
        z[i] = r[i]
        for p in range(i + 1, m.shape[0]):
            z[i] -= m[p, i] * z[p]
        z[i] /= m[i, i]
    for i in range(m.shape[0]):
        for k in range(i):
            z[i] -= m[i, k] * z[k]
        z[i] /= m[i, i]


@kernel
def _choose_again(v, r, h, first, scale, present, book, found):
    """Choose the words of a sub-block one after the other; return by how much the error falls.

    v, r: (sub,), r is used up; present: whether `scale` is the one of v, so that a word may stay. found: its arrays are
    index, signs (by word), values and e (by column), of which the first two are those of v before.
    """
    words, shape, roots, buffers = book
    index, signs, values, e = found
    y, a, costs, w, diagonal = buffers
    dim, total = words.shape[0], ZERO
    for g in range(index.shape[0]):
        at, m = g * dim, roots[g]
        _divide(m, r[at : at + dim], w)
        for i in range(dim):
            w[i] = v[at + i] - w[i]
            diagonal[i] = m[i, i]
        own = signs_of(w)
        odd = shape.even and is_odd(own ^ signs[g])
        if odd:
            flip_costs(w, scale, shape, diagonal, costs)
        key, own = choose_word(words, w, scale, own, odd, (m, y, a, costs))
        word, fall = key & np.int32(words.shape[1] - 1), ZERO
        for i in range(dim):
            value = scale * words[i, word]
            values[at + i] = -value if (own >> np.uint32(i)) & np.uint32(1) else value
            e[at + i] = v[at + i] - values[at + i]
        for i in range(dim):
            product = r[at + i] + r[at + i]
            for k in range(dim):
                product -= h[first + at + i, first + at + k] * e[at + k]
            fall += e[at + i] * product
        if present and not fall > ZERO:
            for i in range(dim):
                e[at + i] = ZERO
                values[at + i] = v[at + i]
            continue
        total += fall
        index[g], signs[g] = word, own
        for k in range(at + dim, r.shape[0]):
            for i in range(dim):
                r[k] -= h[first + at + i, first + k] * e[at + i]
    return total


@kernel
def _load(x, t, s, lane, sub, dim, found):
    """Load the words and signs of sub-block `s` of a lane into `found`, as in _choose_again."""
    index, signs = found[0], found[1]
    mask = np.uint32((1 << dim) - 1)
    for g in range(sub // dim):
        column = s * sub + g * dim
        index[g] = x.numbers[t, column // dim, lane]
        signs[g] = (np.uint32(x.signs[t, column // STEP, lane]) >> np.uint32(column % STEP)) & mask


@kernel
def _store(x, t, s, lane, dim, found):
    """Store the words, signs and values of `found` in sub-block `s` of a lane."""
    index, signs, values = found[0], found[1], found[2]
    first, mask = s * values.shape[0], np.uint32((1 << dim) - 1)
    for g in range(index.shape[0]):
        column = first + g * dim
        shift = np.uint32(column % STEP)
        others = np.uint32(x.signs[t, column // STEP, lane]) & ~(mask << shift)
        x.signs[t, column // STEP, lane] = others | signs[g] << shift
        x.numbers[t, column // dim, lane] = index[g]
    for i in range(values.shape[0]):
        x.v[t, first + i, lane] = values[i]


@kernel
def _descend(x, t, s, r, h, moves, book, e):
    """Choose the words of sub-block `s` again in every lane, with scales up to `moves` integers beside the present one.

    e: (sub, LANES), as in descent.py.
    """
    words, shape, _, _ = book
    sub, dim = shape.sub, words.shape[0]
    first, block = s * sub, s * sub // 256
    v, own_r = np.empty(sub, np.float32), np.empty(sub, np.float32)
    n_words = sub // dim
    index, signs = np.empty((2, n_words), np.int32), np.empty((2, n_words), np.uint32)
    floats = np.empty((2, 2, sub), np.float32)
    for lane in range(LANES):
        best, kept, kept_scale = ZERO, -1, x.scales[t, s, lane]
        for i in range(sub):
            e[i, lane] = ZERO
            v[i] = x.v[t, first + i, lane]
        turns = 0 if x.d[t, block, lane] == ZERO else 2 * moves + 1
        for turn in range(turns):
            move = np.float32(turn if turn < 2 else -1)
            m = x.scales[t, s, lane] + move + move
            if m < ONE or m > np.float32(2 * shape.scale_top + 1):
                continue
            free = 1 if kept == 0 else 0
            found = index[free], signs[free], floats[free, 0], floats[free, 1]
            _load(x, t, s, lane, sub, dim, found)
            for i in range(sub):
                own_r[i] = r[first + i, lane]
            fall = _choose_again(v, own_r, h, first, x.d[t, block, lane] * m, turn == 0, book, found)
            if fall > best:
                best, kept, kept_scale = fall, free, m
        if kept >= 0:
            found = index[kept], signs[kept], floats[kept, 0], floats[kept, 1]
            _store(x, t, s, lane, dim, found)
            x.scales[t, s, lane] = kept_scale
            for i in range(sub):
                e[i, lane] = floats[kept, 1, i]


@kernel
def _refit(x, t, r, h, block, unit, buffers):
    """Solve d of a block anew for its words and integer scales: new values, and e (256, LANES) as in descent.py."""
    directions, room, sums, fall, old, e = buffers
    first = block * 256
    for i in range(256):
        for j in range(LANES):
            d = x.d[t, block, j]
            directions[0, i, j] = x.v[t, first + i, j] / d if d != ZERO else ZERO
    for j in range(LANES):
        old[0, j] = x.d[t, block, j] / unit
    sum_products(directions, r, h, first, room, sums)
    for j in range(LANES):
        sums[0, j] *= unit * unit
        sums[3, j] *= unit
    solve_factors(old[0], old[1], sums, False, fall)
    for j in range(LANES):
        x.d[t, block, j] = old[0, j] * unit if fall[j] > ZERO and old[0, j] > ZERO else x.d[t, block, j]
    for i in range(256):
        for j in range(LANES):
            value = x.d[t, block, j] * directions[0, i, j]
            e[i, j] = x.v[t, first + i, j] - value
            x.v[t, first + i, j] = value


@kernel
def polish_words(x, r, h, shape, words, sweeps):
    """Lower the error of the rows `x`, Words, by `sweeps` over their blocks; r: (n_tiles, n_in, LANES), (v - w) H.

    Integer scales move in the first sweep only, since each one tried takes a search of all words.
    """
    n, dim, sub = x.v.shape[1], words.shape[0], shape.sub
    room, floats = np.zeros((n, LANES), np.float32), np.zeros((2, PANEL, LANES), np.float32)
    total, e = floats[0], floats[1]
    lanes, sums = np.zeros((3, LANES), np.float32), np.zeros((5, LANES), np.float32)
    directions, roots = np.zeros((2, 256, LANES), np.float32), np.zeros((sub // dim, dim, dim), np.float32)
    small = np.zeros((4, dim), np.float32)
    book = words, shape, roots, (small[0], np.zeros((dim, dim), np.float32), small[1], small[2], small[3])
    for t in range(x.v.shape[0]):
        for turn in range(sweeps * (n // 256)):
            block = turn % (n // 256)
            panel, end = block * 256, block * 256 + 256
            total[:] = ZERO
            for s in range(panel // sub, end // sub):
                first = s * sub
                for g in range(sub // dim):
                    _find_root(h, first + g * dim, roots[g])
                _descend(x, t, s, r[t], h, 1 if turn < n // 256 else 0, book, e[:sub])
                subtract(r[t], e, h, first, 0, sub, panel, end)
                total[first - panel : first - panel + sub] += e[:sub]
            _refit(x, t, r[t], h, block, shape.unit, (directions, room, sums, lanes[0], lanes[1:], e))
            subtract(r[t], e, h, panel, 0, 256, panel, end)
            total += e
            subtract(r[t], total, h, panel, 0, 256, 0, panel)
            subtract(r[t], total, h, panel, 0, 256, end, n)
