"""Q2_0: 64 two-bit codes and one half-precision scale; 2.25 bits per weight.

    x[i] = d * (q[i] - 1)

Source: block_q2_0 in ggml-common.h, dequantize_row_q2_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import LANES, D, buffers, load
from requant.formats.symmetric import symmetric_blocks, symmetric_codes
from requant.jit import kernel

N = 64
TOP = 2
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 4,))])  # d: binary16 bits; qs: four codes, lowest first


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N // 4):
            codes = np.int32(qs[b, i])
            for j in range(4):
                code = (codes >> np.int32(2 * j)) & np.int32(3)
                out[b, 4 * i + j] = scale * np.float32(code - np.int32(1))


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        symmetric_blocks(tile, w, TOP, 5, -0.6, 0.4, t)
        symmetric_codes(x, first, TOP, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    """The codes 0..3 of -2..1 become those of 1..-2, and d changes its sign."""
    blocks["d"][b] = float_to_half(-t[D, j])
    qs = blocks["qs"]
    for i in range(N // 4):
        byte = np.uint8(0)
        for k in range(4):
            byte |= (np.uint8(3) - codes[j, 4 * i + k]) << np.uint8(2 * k)
        qs[b, i] = byte
