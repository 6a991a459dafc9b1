"""Q8_0: 32 signed bytes and one half-precision scale; 8.5 bits per weight.

    x[i] = d * qs[i]

Source: block_q8_0 in ggml-common.h, quantize_row_q8_0_ref in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import LANES, D, buffers, load
from requant.formats.symmetric import symmetric_blocks, symmetric_codes
from requant.jit import kernel

N = 32
TOP = 128
LAYOUT = np.dtype([("d", "<u2"), ("qs", "i1", (N,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    n = out.shape[1]  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(n):
            out[b, i] = scale * np.float32(qs[b, i])


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        symmetric_blocks(tile, w, TOP, 2, -0.5, 0.5, t)
        symmetric_codes(x, first, TOP, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    qs = blocks["qs"]
    for i in range(N):
        qs[b, i] = np.int8(np.int32(codes[j, i]) - np.int32(TOP))
