"""The correction of scales in types of few bits: it undoes half of what least squares shrinks a block by.

The scale of least squared error makes a block smaller than its weights: its projection on them is the part of their
energy that it explains, so a matrix in two bits gives outputs that are all 2 to 8 % too small. That costs more than the
same error at random (docs/kernels.md measures it on whole models). The scale at which the projection is the weights'
own energy is best there, but has more squared error; the geometric mean of both scales has nearly all of the gain, and
almost no more error.
"""

import numpy as np

from requant.formats.bits import LARGEST_HALF, float_to_half, half_to_float
from requant.formats.encoders.search import ONE, ZERO
from requant.formats.jit import kernel

MOST = np.float32(1.08)  # the largest factor; blocks that explain almost nothing of their weights cannot be helped


@kernel
def _factors(x, y, importance, factors):
    """Compute the factor of each block, (n,) float32; other arrays as in grow."""
    width = x.shape[1] // 4
    xx, xy = np.empty(width, np.float32), np.empty(width, np.float32)
    for b in range(x.shape[0]):
        own = b % importance.shape[0]
        for j in range(width):
            xx[j] = ZERO
            xy[j] = ZERO
        for g in range(4):
            for j in range(width):
                wx = importance[own, 64 * g + j] * x[b, 64 * g + j]
                xx[j] += wx * x[b, 64 * g + j]
                xy[j] += wx * y[b, 64 * g + j]
        n = width
        while n > 1:  # pairs, so that it vectorizes
            n //= 2
            for j in range(n):
                xx[j] += xx[j + n]
                xy[j] += xy[j + n]
        energy, explained = xx[0], xy[0]
        ratio = energy / explained if explained > ZERO else ONE
        factors[b] = min(np.sqrt(ratio), MOST) if ratio > ONE else ONE


@kernel
def _scale(halves, factors):
    for b in range(halves.shape[0]):
        halves[b] = float_to_half(min(half_to_float(halves[b]) * factors[b], LARGEST_HALF))


def grow(x, importance, blocks, decode, *halves):
    """Enlarge `halves`, (n,) binary16 bits >= 0, which the weights of `blocks` are proportional to.

    x: (n, 256) float32 and importance: (k, 256), from which `blocks`, read by `decode`, were encoded.
    """
    y, factors = np.empty_like(x), np.empty(len(x), np.float32)
    decode(blocks, y)
    _factors(x, y, importance, factors)
    for half in halves:
        _scale(half, factors)
