"""Q6_K: 16 sub-blocks of 16 six-bit codes, each with a signed 8-bit scale; 6.5625 bits per weight.

    x[16 s + i] = d * scales[s] * (q[16 s + i] - 32)

Half h of a block (128 elements) keeps element 32 k + i (k = 0..3, i = 0..31) as its low nibble in
ql[64 h + 32 (k & 1) + i], low half of the byte for k < 2, and its upper two bits in qh[32 h + i] at 2 k.
Source: block_q6_K in ggml-common.h, dequantize_row_q6_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.formats.search import LANES, LS, D, buffers, load
from requant.formats.symmetric import symmetric_codes, symmetric_super_blocks
from requant.jit import kernel

N = 256
SUBS, SUB = 16, 16
TOP, SCALE_TOP = 32, 128
LAYOUT = np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<u2")])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, scales, ql, qh = blocks["d"], blocks["scales"], blocks["ql"], blocks["qh"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for s in range(SUBS):
            dl = scale * np.float32(scales[b, s])
            half, k, odd = s >> 3, (s >> 1) & 3, SUB * (s & 1)
            low, high = 64 * half + 32 * (k & 1) + odd, 32 * half + odd
            low_shift, high_shift = np.uint8(4 * (k >> 1)), np.uint8(2 * k)
            for i in range(n):
                nibble = (ql[b, low + i] >> low_shift) & np.uint8(15)
                q = nibble | ((qh[b, high + i] >> high_shift) & np.uint8(3)) << np.uint8(4)
                out[b, SUB * s + i] = dl * np.float32(np.int32(q) - np.int32(32))


@kernel
def encode(x, importance, blocks):
    subs, weights = x.reshape(-1, SUB), importance.reshape(-1, SUB)
    tile, w, t, codes = buffers(SUB)
    for first in range(0, subs.shape[0], LANES):
        load(subs, weights, first, tile, w)
        symmetric_super_blocks(tile, w, TOP, SCALE_TOP, SUBS, 8, -3.0, 1.0, 1, t)
        symmetric_codes(subs, first, TOP, t, codes)
        for j in range(0, min(LANES, subs.shape[0] - first), SUBS):
            _pack(blocks, (first + j) // SUBS, j, t, codes)


@kernel
def _pack(blocks, b, j, t, codes):
    blocks["d"][b] = float_to_half(t[D, j])
    scales, ql, qh = blocks["scales"], blocks["ql"], blocks["qh"]
    for s in range(SUBS):
        scales[b, s] = np.int8(t[LS, j + s])
    for half in range(2):
        for i in range(32):
            lane, row = j + 8 * half + (i >> 4), i & 15
            a, c, e, g = codes[lane, row], codes[lane + 2, row], codes[lane + 4, row], codes[lane + 6, row]
            ql[b, 64 * half + i] = (a & np.uint8(15)) | (e & np.uint8(15)) << np.uint8(4)
            ql[b, 64 * half + 32 + i] = (c & np.uint8(15)) | (g & np.uint8(15)) << np.uint8(4)
            high = a >> np.uint8(4) | (c >> np.uint8(4)) << np.uint8(2)
            qh[b, 32 * half + i] = high | (e >> np.uint8(4)) << np.uint8(4) | (g >> np.uint8(4)) << np.uint8(6)
