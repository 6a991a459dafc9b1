"""Q5_1: 32 five-bit codes and one half-precision scale and minimum; 6 bits per weight.

    x[i] = d * q[i] + m

qs[i] holds element i low, 16 + i high; qh holds the fifth bit of element i as bit i.
Source: block_q5_1 in ggml-common.h, dequantize_row_q5_1 in ggml-quants.c.
"""

import numpy as np

from requant.formats.affine import affine_blocks, affine_codes
from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import DMIN, LANES, D, buffers, load
from requant.jit import kernel

N = 32
TOP = 31
LAYOUT = np.dtype([("d", "<u2"), ("m", "<u2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, m, qh, qs = blocks["d"], blocks["m"], blocks["qh"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(m[b])
        for i in range(half):
            bit = np.uint8(i & 7)
            first = ((qh[b, i >> 3] >> bit) & np.uint8(1)) << np.uint8(4)
            second = ((qh[b, 2 + (i >> 3)] >> bit) & np.uint8(1)) << np.uint8(4)
            out[b, i] = scale * np.float32((qs[b, i] & np.uint8(15)) | first) + low
            out[b, i + half] = scale * np.float32((qs[b, i] >> np.uint8(4)) | second) + low


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
    qh, qs = blocks["qh"], blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = (codes[j, i] & np.uint8(15)) | (codes[j, i + N // 2] & np.uint8(15)) << np.uint8(4)
    for k in range(4):
        high = np.uint8(0)
        for i in range(8):
            high |= (codes[j, 8 * k + i] >> np.uint8(4)) << np.uint8(i)
        qh[b, k] = high
