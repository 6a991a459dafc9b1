"""Q2_K: 16 sub-blocks of 16 two-bit codes, each with a 4-bit scale and a 4-bit minimum; 2.625 bits per weight.

    x[16 s + i] = d * (scales[s] & 15) * q[16 s + i] - dmin * (scales[s] >> 4)

Element 128 h + 32 k + i (k = 0..3, i = 0..31) is bits 2 k, 2 k + 1 of qs[32 h + i].
Source: block_q2_K in ggml-common.h, dequantize_row_q2_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.affine import affine_codes, affine_super_blocks
from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import DMIN, LANES, LM, LS, D, buffers, load
from requant.jit import kernel

N = 256
SUBS, SUB = 16, 16
TOP, SCALE_TOP = 3, 15
LAYOUT = np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), ("d", "<u2"), ("dmin", "<u2")])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, dmin, scales, qs = blocks["d"], blocks["dmin"], blocks["scales"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(dmin[b])
        for s in range(SUBS):
            dl = scale * np.float32(scales[b, s] & np.uint8(15))
            ml = low * np.float32(scales[b, s] >> np.uint8(4))
            first, shift = 32 * (s >> 3) + SUB * (s & 1), np.uint8(s & 6)
            for i in range(n):
                q = (qs[b, first + i] >> shift) & np.uint8(3)
                out[b, SUB * s + i] = dl * np.float32(q) - ml


@kernel
def encode(x, importance, blocks):
    subs, weights = x.reshape(-1, SUB), importance.reshape(-1, SUB)
    tile, w, t, codes = buffers(SUB)
    for first in range(0, subs.shape[0], LANES):
        load(subs, weights, first, tile, w)
        affine_super_blocks(tile, w, TOP, SCALE_TOP, SUBS, -0.5, 0.15, t)
        affine_codes(subs, first, TOP, t, codes)
        for j in range(0, min(LANES, subs.shape[0] - first), SUBS):
            _pack(blocks, (first + j) // SUBS, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    blocks["dmin"][b] = float_to_half(t[DMIN, j])
    scales, qs = blocks["scales"], blocks["qs"]
    for s in range(SUBS):
        scales[b, s] = np.uint8(t[LS, j + s]) | np.uint8(t[LM, j + s]) << np.uint8(4)
    for p in range(4):  # half h and odd or even sub-blocks
        lane = j + 8 * (p >> 1) + (p & 1)
        for i in range(SUB):
            low = codes[lane, i] | codes[lane + 2, i] << np.uint8(2)
            qs[b, SUB * p + i] = low | codes[lane + 4, i] << np.uint8(4) | codes[lane + 6, i] << np.uint8(6)
