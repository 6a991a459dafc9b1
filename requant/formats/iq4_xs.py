"""IQ4_XS: 256 non-linear four-bit codes in eight sub-blocks with six-bit scales; 4.25 bits per weight.

    x = d * (ls[s] - 32) * level[q]

ls[s]: low four bits in nibble s of scales_l, high two in bits 2s of scales_h. In a sub-block low nibbles are
weights 0-15, high nibbles 16-31.

Source: block_iq4_xs in ggml-common.h, dequantize_row_iq4_xs in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import IQ4, Levels, encoder
from requant.formats.encoders.iq4 import encode_iq4
from requant.formats.encoders.search import SearchBudget, is_flat
from requant.formats.grids import IQ4_LEVELS
from requant.formats.jit import kernel

N = 256
SUBS, SUB = 8, 32
SCALE_TOP = 32
# fewer candidates than in IQ4_NL: the integer scales are chosen again
SEARCH = (SearchBudget(3, 1, 1, 1), SearchBudget(6, 1, 2, 1), SearchBudget(16, 2, 4, 2))
LEVELS = Levels(IQ4, 0, 0, -SCALE_TOP, SCALE_TOP - 1)
LAYOUT = np.dtype([("d", "<u2"), ("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (N // 2,))])


@kernel
def decode(blocks, out):
    d, scales_h, scales_l, qs = blocks["d"], blocks["scales_h"], blocks["scales_l"], blocks["qs"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        high_bits = np.int32(scales_h[b])
        for s in range(8):
            low = (np.int32(scales_l[b, s >> 1]) >> np.int32(4 * (s & 1))) & np.int32(15)
            high = (high_bits >> np.int32(2 * s)) & np.int32(3)
            scale = super_scale * np.float32((low | (high << np.int32(4))) - np.int32(32))
            for i in range(16):
                codes = np.uint32(qs[b, 16 * s + i])
                out[b, 32 * s + i] = scale * np.float32(IQ4_LEVELS[codes & np.uint32(15)])
                out[b, 32 * s + 16 + i] = scale * np.float32(IQ4_LEVELS[codes >> np.uint32(4)])


def fit(x, importance, effort):
    first, span = (-20.0, 36.0) if is_flat(importance) else (-24.0, 45.0)
    return encode_iq4(x, importance, SUBS, SCALE_TOP, SEARCH[effort], first, span)


def pack(found, blocks):
    blocks["d"] = found.d
    _pack((found.scales + np.int8(SCALE_TOP)).view(np.uint8), found.codes, blocks)


@kernel
def _pack(scales, codes, blocks):
    scales_h, scales_l, qs = blocks["scales_h"], blocks["scales_l"], blocks["qs"]
    for b in range(codes.shape[0]):
        high = np.uint16(0)
        for s in range(SUBS):
            high |= np.uint16(scales[b, s] >> np.uint8(4)) << np.uint16(2 * s)
            for i in range(SUB // 2):
                qs[b, SUB // 2 * s + i] = codes[b, s, i] | codes[b, s, i + SUB // 2] << np.uint8(4)
        scales_h[b] = high
        for p in range(SUBS // 2):
            scales_l[b, p] = (scales[b, 2 * p] & np.uint8(15)) | (scales[b, 2 * p + 1] & np.uint8(15)) << np.uint8(4)


encode = encoder(fit, pack)
