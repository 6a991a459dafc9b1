"""Rounding word by word with feedback, for the codebooks of the IQ formats: columns.py with 4 or 8 columns at a time.

The columns of a word are correlated, so a word is chosen by what the error of all of them costs once the columns that
follow have made up for it: |M (w - v)|^2 with M the transposed inverse of the word's part of u. All words are tried.

x, e, u: as in columns.py.
"""

import numpy as np

from requant.formats.encoders.columns import STEP, subtract
from requant.formats.encoders.search import HUGE, LANES, ONE, ZERO
from requant.formats.jit import kernel

FLIPS = 2  # signs of a word of 8 that are tried the other way where the count of minuses must change


@kernel
def _best_of_4(words, y, a):
    """Return a key of the word of least cost: its bits, the number of the word in the lowest ones.

    Positive floats have the order of their bits, so that a minimum over integers finds it. words: (dim, n_words)
    float32; the cost is |y - a word|^2 with a (dim, dim) lower triangular.
    """
    n, best = words.shape[1], np.int32(0x7FFFFFFF)
    for k in range(n):
        g0, g1, g2, g3 = words[0, k], words[1, k], words[2, k], words[3, k]
        m0 = y[0] - a[0, 0] * g0
        m1 = y[1] - a[1, 0] * g0 - a[1, 1] * g1
        m2 = y[2] - a[2, 0] * g0 - a[2, 1] * g1 - a[2, 2] * g2
        m3 = y[3] - a[3, 0] * g0 - a[3, 1] * g1 - a[3, 2] * g2 - a[3, 3] * g3
        cost = (m0 * m0 + m1 * m1) + (m2 * m2 + m3 * m3)
        key = np.int32(np.float32(cost).view(np.int32) & np.int32(-n))
        best = min(best, np.int32(key | np.int32(k)))
    return best


@kernel
def _best_of_8(words, y, a):
    """Return the key of the best word of eight, as _best_of_4."""
    n, best = words.shape[1], np.int32(0x7FFFFFFF)
    for k in range(n):
        g0, g1, g2, g3 = words[0, k], words[1, k], words[2, k], words[3, k]
        g4, g5, g6, g7 = words[4, k], words[5, k], words[6, k], words[7, k]
        m0 = y[0] - a[0, 0] * g0
        m1 = y[1] - a[1, 0] * g0 - a[1, 1] * g1
        m2 = y[2] - a[2, 0] * g0 - a[2, 1] * g1 - a[2, 2] * g2
        m3 = y[3] - a[3, 0] * g0 - a[3, 1] * g1 - a[3, 2] * g2 - a[3, 3] * g3
        m4 = y[4] - a[4, 0] * g0 - a[4, 1] * g1 - a[4, 2] * g2 - a[4, 3] * g3 - a[4, 4] * g4
        m5 = y[5] - a[5, 0] * g0 - a[5, 1] * g1 - a[5, 2] * g2 - a[5, 3] * g3 - a[5, 4] * g4 - a[5, 5] * g5
        m6 = y[6] - a[6, 0] * g0 - a[6, 1] * g1 - a[6, 2] * g2 - a[6, 3] * g3 - a[6, 4] * g4 - a[6, 5] * g5
        m7 = y[7] - a[7, 0] * g0 - a[7, 1] * g1 - a[7, 2] * g2 - a[7, 3] * g3 - a[7, 4] * g4 - a[7, 5] * g5
        m6 -= a[6, 6] * g6
        m7 -= a[7, 6] * g6 + a[7, 7] * g7
        cost = ((m0 * m0 + m1 * m1) + (m2 * m2 + m3 * m3)) + ((m4 * m4 + m5 * m5) + (m6 * m6 + m7 * m7))
        key = np.int32(np.float32(cost).view(np.int32) & np.int32(-n))
        best = min(best, np.int32(key | np.int32(k)))
    return best


@kernel
def _search(words, w, scale, signs, m, y, a):
    """Return the key of the best word with these signs (a bit each); w: (dim,) weights. y, a: room for the sums."""
    dim = words.shape[0]
    for i in range(dim):
        y[i] = ZERO
        for k in range(i + 1):
            y[i] += m[i, k] * w[k]
            factor = m[i, k] * scale
            a[i, k] = -factor if (signs >> np.uint32(k)) & np.uint32(1) else factor
    return _best_of_4(words, y, a) if dim == 4 else _best_of_8(words, y, a)


@kernel
def _invert(u, first, m):
    """Compute the transposed inverse of u[first:first + dim, first:first + dim], lower triangular: m (dim, dim)."""
    for k in range(m.shape[0]):
        for i in range(k, m.shape[0]):
            total = ONE if i == k else ZERO
            for p in range(k, i):
                total -= u[first + p, first + i] * m[p, k]
            m[i, k] = total / u[first + i, first + i]


@kernel
def flip_costs(w, scale, shape, m, costs):
    """Compute what the other sign costs each weight by itself; costs: (n,)."""
    low, step, high = shape.low, shape.step, np.float32(shape.top)
    for i in range(costs.shape[0]):
        size = abs(w[i])
        q = low + step * min(max(np.rint((size / scale - low) / step), ZERO), high) if scale > ZERO else ZERO
        near, far = size - scale * q, size + scale * low
        costs[i] = (far * far - near * near) * m[i] * m[i]


@kernel
def _lowest(costs):
    """Return the place of the lowest of `costs`, and set it to HUGE."""
    at = 0
    for i in range(costs.shape[0]):
        at = i if costs[i] < costs[at] else at
    costs[at] = HUGE
    return np.uint32(at)


@kernel
def signs_of(w):
    signs = np.uint32(0)
    for i in range(w.shape[0]):
        signs |= np.uint32(w[i] < ZERO) << np.uint32(i)
    return signs


@kernel
def is_odd(signs):
    signs ^= signs >> np.uint32(4)
    signs ^= signs >> np.uint32(2)
    return ((signs ^ (signs >> np.uint32(1))) & np.uint32(1)) == np.uint32(1)


@kernel
def choose_word(words, w, scale, signs, odd, buffers):
    """Return the key and the signs of the best word for the weights w (dim,); `odd`: one of the signs must change."""
    m, y, a, costs = buffers
    if not odd:
        return _search(words, w, scale, signs, m, y, a), signs
    best, kept = np.int32(0x7FFFFFFF), signs
    for _ in range(min(FLIPS, w.shape[0])):
        other = signs ^ (np.uint32(1) << _lowest(costs))
        key = _search(words, w, scale, other, m, y, a)
        if key < best:
            best, kept = key, other
    return best, kept


@kernel
def _put(words, word, signs, scale, lane, parts):
    """Write the values of a word into the columns x (dim, n) of a lane, their errors into e, and add their squares."""
    x, e, u, sums = parts  # of the columns of the word
    for i in range(words.shape[0]):
        value = scale * words[i, word]
        value = -value if (signs >> np.uint32(i)) & np.uint32(1) else value
        weight = x[i, lane]
        miss = weight - value
        sums[0, lane] += np.float64(weight) * np.float64(weight)
        sums[1, lane] += np.float64(miss) * np.float64(miss)
        for k in range(i):
            miss -= e[k, lane] * u[k, i]
        e[i, lane] = miss / u[i, i]
        x[i, lane] = value


@kernel
def round_words(x, e, u, place, shape, words, scales, out):
    """Round the words of one block; place: `panel`, the first column of the block, and the number of rows.

    words: (dim, n_words) float32; scales: (n_tiles, n_subs, LANES). Out: index (n_tiles, N / dim, LANES) uint16; signs
    (n_tiles, N / 8, LANES) uint8; sums as in round_columns; x holds the values.
    """
    panel, first, n_rows = place
    index, all_signs, sums = out
    dim = words.shape[0]
    m, w, costs = np.zeros((2, dim, dim), np.float32), np.zeros(STEP, np.float32), np.zeros(STEP, np.float32)
    y, a, diagonal = np.zeros(dim, np.float32), np.zeros((dim, dim), np.float32), np.zeros(STEP, np.float32)
    for t in range(x.shape[0]):
        for begin in range(first, first + STEP * all_signs.shape[1], STEP):
            subtract(x[t], e[t], u, panel, first - panel, begin - panel, begin, begin + STEP)
            at, n_words = begin - first, STEP // dim
            for g in range(n_words):
                _invert(u, begin + g * dim, m[g])
            for i in range(STEP):
                diagonal[i] = ONE / u[begin + i, begin + i]
            for lane in range(min(LANES, n_rows - t * LANES)):
                scale, signs = scales[t, at // shape.sub, lane], np.uint32(0)
                for g in range(n_words):
                    start = begin + g * dim
                    for i in range(STEP - g * dim):
                        w[i] = x[t, start + i, lane]
                    near, far = w[:dim], w[: STEP - g * dim]
                    own = signs_of(near)
                    odd = shape.even and is_odd(signs | signs_of(far) << np.uint32(g * dim))
                    if odd:
                        flip_costs(far, scale, shape, diagonal[g * dim :], costs[: STEP - g * dim])
                        if dim < far.shape[0]:
                            flip = _lowest(costs[: far.shape[0]])
                            own ^= np.uint32(flip < np.uint32(dim)) << flip
                            odd = False
                    key, own = choose_word(words, near, scale, own, odd, (m[g], y, a, costs[:dim]))
                    word = key & np.int32(words.shape[1] - 1)
                    index[t, (at + g * dim) // dim, lane] = word
                    signs |= own << np.uint32(g * dim)
                    square = u[start : start + dim, start : start + dim]
                    _put(words, word, own, scale, lane, (x[t, start:], e[t, start - panel :], square, sums[t]))
                    for k in range(start + dim, begin + STEP):
                        for i in range(dim):
                            x[t, k, lane] -= e[t, start - panel + i, lane] * u[start + i, k]
                all_signs[t, at // STEP, lane] = signs
