"""IQ4_NL: 32 four-bit codes of a fixed non-linear scale and one half-precision factor; 4.5 bits per weight.

    x[i] = d * level[q[i]]

Low nibbles are weights 0-15, high nibbles 16-31.

Source: block_iq4_nl in ggml-common.h, dequantize_row_iq4_nl in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.grids import IQ4_LEVELS
from requant.formats.iq4 import iq4_blocks, iq4_codes
from requant.formats.search import LANES, D, buffers, is_flat, load
from requant.jit import kernel

N = 32
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 2,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N // 2):
            codes = np.uint32(qs[b, i])
            out[b, i] = scale * np.float32(IQ4_LEVELS[codes & np.uint32(15)])
            out[b, 16 + i] = scale * np.float32(IQ4_LEVELS[codes >> np.uint32(4)])


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    # importance may well make it worth to clip the largest weight
    n_candidates, beyond, step = (6, -16.0, 8.0) if is_flat(importance) else (8, -32.0, 8.0)
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        iq4_blocks(tile, w, n_candidates, beyond, step, t)
        iq4_codes(x, first, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    qs = blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = codes[j, i] | codes[j, i + N // 2] << np.uint8(4)
