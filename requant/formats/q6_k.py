"""Q6_K: 16 sub-blocks of 16 six-bit codes, each with a signed 8-bit scale; 6.5625 bits per weight.

    x[16 s + i] = d * scales[s] * (q[16 s + i] - 32)

Half h of a block (128 elements) keeps element 32 k + i (k = 0..3, i = 0..31) as its low nibble in
ql[64 h + 32 (k & 1) + i], low half of the byte for k < 2, and its upper two bits in qh[32 h + i] at 2 k.
Source: block_q6_K in ggml-common.h, dequantize_row_q6_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.search import SearchBudget
from requant.formats.encoders.symmetric import encode_symmetric
from requant.formats.jit import kernel

N = 256
SUBS, SUB = 16, 16
TOP, SCALE_TOP = 32, 128
SEARCH = (SearchBudget(5, 1, 1, 0, 1), SearchBudget(6, 1, 1, 1, 1), SearchBudget(20, 2, 2, 2, 2))
LEVELS = Levels(LINEAR, -TOP, TOP - 1, -SCALE_TOP, SCALE_TOP - 1)
LAYOUT = np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<u2")])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, scales, ql, qh = blocks["d"], blocks["scales"], blocks["ql"], blocks["qh"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for p in range(4):  # half h and odd or even sub-blocks
            half, odd = p >> 1, p & 1
            s, low, high = 8 * half + odd, 64 * half + SUB * odd, 32 * half + SUB * odd
            d0, d1 = scale * np.float32(scales[b, s]), scale * np.float32(scales[b, s + 2])
            d2, d3 = scale * np.float32(scales[b, s + 4]), scale * np.float32(scales[b, s + 6])
            for i in range(n):
                first, second, upper = ql[b, low + i], ql[b, low + 32 + i], qh[b, high + i]
                q0 = (first & np.uint8(15)) | (upper & np.uint8(3)) << np.uint8(4)
                q1 = (second & np.uint8(15)) | (upper & np.uint8(12)) << np.uint8(2)
                q2 = (first >> np.uint8(4)) | (upper & np.uint8(48))
                q3 = (second >> np.uint8(4)) | (upper & np.uint8(192)) >> np.uint8(2)
                out[b, SUB * s + i] = d0 * np.float32(np.int32(q0) - np.int32(32))
                out[b, SUB * (s + 2) + i] = d1 * np.float32(np.int32(q1) - np.int32(32))
                out[b, SUB * (s + 4) + i] = d2 * np.float32(np.int32(q2) - np.int32(32))
                out[b, SUB * (s + 6) + i] = d3 * np.float32(np.int32(q3) - np.int32(32))


def fit(x, importance, effort):
    return encode_symmetric(x, importance, SUBS, TOP, SCALE_TOP, SEARCH[effort], -3.0, 7.0)


def pack(found, blocks):
    blocks["d"], blocks["scales"] = found.d, found.scales
    _pack(found.codes, blocks)


@kernel
def _pack(codes, blocks):
    ql, qh = blocks["ql"], blocks["qh"]
    for b in range(codes.shape[0]):
        for p in range(4):  # half h and odd or even sub-blocks
            half, odd = p >> 1, p & 1
            s, low, high = 8 * half + odd, 64 * half + SUB * odd, 32 * half + SUB * odd
            for i in range(SUB):
                a, c, e, g = codes[b, s, i], codes[b, s + 2, i], codes[b, s + 4, i], codes[b, s + 6, i]
                ql[b, low + i] = (a & np.uint8(15)) | (e & np.uint8(15)) << np.uint8(4)
                ql[b, low + 32 + i] = (c & np.uint8(15)) | (g & np.uint8(15)) << np.uint8(4)
                upper = (e >> np.uint8(4)) << np.uint8(4) | (g >> np.uint8(4)) << np.uint8(6)
                qh[b, high + i] = a >> np.uint8(4) | (c >> np.uint8(4)) << np.uint8(2) | upper


encode = encoder(fit, pack)
