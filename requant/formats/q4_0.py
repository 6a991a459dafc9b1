"""Q4_0: 32 four-bit codes and one half-precision scale; 4.5 bits per weight.

    x[i] = d * (q[i] - 8)

qs[i] holds element i low, 16 + i high.
Source: block_q4_0 in ggml-common.h, dequantize_row_q4_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import LANES, D, buffers, load
from requant.formats.symmetric import symmetric_blocks, symmetric_codes
from requant.jit import kernel

N = 32
TOP = 8
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(half):
            out[b, i] = scale * np.float32(np.int32(qs[b, i] & np.uint8(15)) - np.int32(8))
            out[b, i + half] = scale * np.float32(np.int32(qs[b, i] >> np.uint8(4)) - np.int32(8))


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
    qs = blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = codes[j, i] | codes[j, i + N // 2] << np.uint8(4)
