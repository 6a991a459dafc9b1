"""Q4_1: 32 four-bit codes and one half-precision scale and minimum; 5 bits per weight.

    x[i] = d * q[i] + m

qs[i] holds element i low, 16 + i high.
Source: block_q4_1 in ggml-common.h, dequantize_row_q4_1 in ggml-quants.c.
"""

import numpy as np

from requant.formats.affine import affine_blocks, affine_codes
from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import DMIN, LANES, D, buffers, load
from requant.jit import kernel

N = 32
TOP = 15
LAYOUT = np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, m, qs = blocks["d"], blocks["m"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(m[b])
        for i in range(half):
            out[b, i] = scale * np.float32(qs[b, i] & np.uint8(15)) + low
            out[b, i + half] = scale * np.float32(qs[b, i] >> np.uint8(4)) + low


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        affine_blocks(tile, w, TOP, -1.0, 0.3, t)
        affine_codes(x, first, TOP, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    blocks["m"][b] = float_to_half(-t[DMIN, j])
    qs = blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = codes[j, i] | codes[j, i + N // 2] << np.uint8(4)
