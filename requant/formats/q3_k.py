"""Q3_K: 16 sub-blocks of 16 three-bit codes, each with a signed 6-bit scale; 3.4375 bits per weight.

    x[16 s + i] = d * (scale[s] - 32) * (q[16 s + i] - 4)

Element 128 h + 32 k + i (k = 0..3, i = 0..31) has its low two bits in qs[32 h + i] at 2 k and its third bit in
hmask[i] at 4 h + k. Scale s has its low nibble in scales[s % 8] (high half for s >= 8) and its upper two bits in
scales[8 + s % 4] at 2 (s / 4).
Source: block_q3_K in ggml-common.h, dequantize_row_q3_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.search import SearchBudget, is_flat
from requant.formats.encoders.symmetric import encode_symmetric
from requant.formats.jit import kernel

N = 256
SUBS, SUB = 16, 16
TOP, SCALE_TOP = 4, 32
# by effort, without importance and with: candidates between first and first + span
SEARCH = (
    ((SearchBudget(2, 0, 1, 0, 1), -0.5, 0.6), (SearchBudget(5, 1, 1, 1, 1), -0.9, 4.2)),
    ((SearchBudget(3, 0, 1, 0, 1), -0.6, 1.0), (SearchBudget(8, 1, 1, 1, 1), -0.9, 4.2)),
    ((SearchBudget(4, 1, 2, 1, 1), -0.6, 1.0), (SearchBudget(16, 2, 4, 2, 2), -0.9, 4.2)),
)
LEVELS = Levels(LINEAR, -TOP, TOP - 1, -SCALE_TOP, SCALE_TOP - 1)
LAYOUT = np.dtype([("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<u2")])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, scales, hmask, qs = blocks["d"], blocks["scales"], blocks["hmask"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for s in range(SUBS):
            low = (scales[b, s & 7] >> np.uint8(4 * (s >> 3))) & np.uint8(15)
            ls = low | ((scales[b, 8 + (s & 3)] >> np.uint8(2 * (s >> 2))) & np.uint8(3)) << np.uint8(4)
            dl = scale * np.float32(np.int32(ls) - np.int32(32))
            odd, shift, bit = SUB * (s & 1), np.uint8(s & 6), np.uint8(s >> 1)
            first = 32 * (s >> 3) + odd
            for i in range(n):
                high = ((hmask[b, odd + i] >> bit) & np.uint8(1)) << np.uint8(2)
                q = ((qs[b, first + i] >> shift) & np.uint8(3)) | high
                out[b, SUB * s + i] = dl * np.float32(np.int32(q) - np.int32(4))


def fit(x, importance, effort):
    # without importance the best scale is near the range; with it, it may well clip the largest weight
    budget, first, span = SEARCH[effort][0] if is_flat(importance) else SEARCH[effort][1]
    return encode_symmetric(x, importance, SUBS, TOP, SCALE_TOP, budget, first, span)


def pack(found, blocks):
    blocks["d"] = found.d
    _pack((found.scales + np.int8(SCALE_TOP)).view(np.uint8), found.codes, blocks)


@kernel
def _pack(scales, codes, blocks):
    packed, hmask, qs = blocks["scales"], blocks["hmask"], blocks["qs"]
    for b in range(codes.shape[0]):
        for s in range(8):
            packed[b, s] = (scales[b, s] & np.uint8(15)) | (scales[b, s + 8] & np.uint8(15)) << np.uint8(4)
        for s in range(4):
            upper = np.uint8(0)
            for k in range(4):
                upper |= (scales[b, s + 4 * k] >> np.uint8(4)) << np.uint8(2 * k)
            packed[b, 8 + s] = upper
        for p in range(4):  # half h and odd or even sub-blocks
            s = 8 * (p >> 1) + (p & 1)
            for i in range(SUB):
                low = (codes[b, s, i] & np.uint8(3)) | (codes[b, s + 2, i] & np.uint8(3)) << np.uint8(2)
                high = (codes[b, s + 4, i] & np.uint8(3)) | (codes[b, s + 6, i] & np.uint8(3)) << np.uint8(2)
                qs[b, SUB * p + i] = low | high << np.uint8(4)
        for odd in range(2):
            for i in range(SUB):
                mask = np.uint8(0)
                for k in range(8):
                    mask |= (codes[b, 2 * k + odd, i] >> np.uint8(2)) << np.uint8(k)
                hmask[b, SUB * odd + i] = mask


encode = encoder(fit, pack)
