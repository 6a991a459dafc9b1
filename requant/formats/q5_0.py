"""Q5_0: 32 five-bit codes and one half-precision scale; 5.5 bits per weight.

    x[i] = d * (q[i] - 16)

qs[i] holds element i low, 16 + i high; qh holds the fifth bit of element i as bit i.
Source: block_q5_0 in ggml-common.h, dequantize_row_q5_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import LANES, D, buffers, load
from requant.formats.symmetric import symmetric_blocks, symmetric_codes
from requant.jit import kernel

N = 32
TOP = 16
LAYOUT = np.dtype([("d", "<u2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, qh, qs = blocks["d"], blocks["qh"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(half):
            bit = np.uint8(i & 7)
            first = ((qh[b, i >> 3] >> bit) & np.uint8(1)) << np.uint8(4)
            second = ((qh[b, 2 + (i >> 3)] >> bit) & np.uint8(1)) << np.uint8(4)
            out[b, i] = scale * np.float32(np.int32((qs[b, i] & np.uint8(15)) | first) - np.int32(16))
            out[b, i + half] = scale * np.float32(np.int32((qs[b, i] >> np.uint8(4)) | second) - np.int32(16))


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        symmetric_blocks(tile, w, TOP, 6, -0.9, 0.3, t)
        symmetric_codes(x, first, TOP, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    qh, qs = blocks["qh"], blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = (codes[j, i] & np.uint8(15)) | (codes[j, i + N // 2] & np.uint8(15)) << np.uint8(4)
    for k in range(4):
        high = np.uint8(0)
        for i in range(8):
            high |= (codes[j, 8 * k + i] >> np.uint8(4)) << np.uint8(i)
        qh[b, k] = high
