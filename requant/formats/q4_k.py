"""Q4_K: 8 sub-blocks of 32 four-bit codes, each with a 6-bit scale and a 6-bit minimum; 4.5 bits per weight.

    x[32 s + i] = d * scale[s] * q[32 s + i] - dmin * min[s]

scales packs the sixteen 6-bit numbers (see scales.py); qs[32 p + i] holds element 64 p + i low, 64 p + 32 + i high.
Source: block_q4_K in ggml-common.h, dequantize_row_q4_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.affine import affine_codes, affine_super_blocks
from requant.formats.bits import float_to_half, half_to_float
from requant.formats.scales import pack_scales, unpack_scale
from requant.formats.search import DMIN, LANES, LM, LS, D, buffers, load
from requant.jit import kernel

N = 256
SUBS, SUB = 8, 32
TOP, SCALE_TOP = 15, 63
LAYOUT = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", (12,)), ("qs", "u1", (128,))])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, dmin, scales, qs = blocks["d"], blocks["dmin"], blocks["scales"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(dmin[b])
        for s in range(SUBS):
            ls, lm = unpack_scale(scales, b, s)
            dl, ml = scale * np.float32(ls), low * np.float32(lm)
            shift = np.uint8(4 * (s & 1))
            first = SUB * (s >> 1)
            for i in range(n):
                q = (qs[b, first + i] >> shift) & np.uint8(15)
                out[b, SUB * s + i] = dl * np.float32(q) - ml


@kernel
def encode(x, importance, blocks):
    subs, weights = x.reshape(-1, SUB), importance.reshape(-1, SUB)
    tile, w, t, codes = buffers(SUB)
    for first in range(0, subs.shape[0], LANES):
        load(subs, weights, first, tile, w)
        affine_super_blocks(tile, w, TOP, SCALE_TOP, SUBS, -1.0, 0.3, t)
        affine_codes(subs, first, TOP, t, codes)
        for j in range(0, min(LANES, subs.shape[0] - first), SUBS):
            _pack(blocks, (first + j) // SUBS, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    blocks["dmin"][b] = float_to_half(t[DMIN, j])
    pack_scales(t[LS], t[LM], j, blocks["scales"], b)
    qs = blocks["qs"]
    for p in range(SUBS // 2):
        for i in range(SUB):
            qs[b, SUB * p + i] = codes[j + 2 * p, i] | codes[j + 2 * p + 1, i] << np.uint8(4)
