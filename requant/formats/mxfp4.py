"""MXFP4: 32 E2M1 codes and one E8M0 scale; 4.25 bits per weight.

    x[i] = d * level[q[i]],  d = 2**(e - 128)

Low nibbles are weights 0-15, high nibbles 16-31. The levels are E2M1 doubled, and the scale is halved.

Source: block_mxfp4 in ggml-common.h, dequantize_row_mxfp4 in ggml-quants.c; OCP Microscaling Formats 1.0.
"""

import numpy as np

from requant.formats.bits import e8m0_half_to_float
from requant.formats.grids import FP4_LEVELS
from requant.formats.levels import fp4_blocks, fp4_codes
from requant.formats.search import LANES, LS, buffers, is_flat, load
from requant.jit import kernel

N = 32
LAYOUT = np.dtype([("e", "u1"), ("qs", "u1", (N // 2,))])


@kernel
def decode(blocks, out):
    e, qs = blocks["e"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = e8m0_half_to_float(e[b])
        for i in range(N // 2):
            codes = np.uint32(qs[b, i])
            out[b, i] = scale * np.float32(FP4_LEVELS[codes & np.uint32(15)])
            out[b, 16 + i] = scale * np.float32(FP4_LEVELS[codes >> np.uint32(4)])


@kernel
def encode(x, importance, blocks):
    tile, w, t, codes = buffers(N)
    below = 1 if is_flat(importance) else 2
    for first in range(0, x.shape[0], LANES):
        load(x, importance, first, tile, w)
        fp4_blocks(tile, w, True, below, 1, t)
        fp4_codes(x, first, t, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            _pack(blocks, first + j, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["e"][b] = np.uint8(t[LS, j])
    qs = blocks["qs"]
    for i in range(N // 2):
        qs[b, i] = codes[j, i] | codes[j, i + N // 2] << np.uint8(4)
