"""Q5_K: 8 sub-blocks of 32 five-bit codes, each with a 6-bit scale and a 6-bit minimum; 5.5 bits per weight.

    x[32 s + i] = d * scale[s] * q[32 s + i] - dmin * min[s]

As Q4_K, with the fifth bit of element 32 s + i as bit s of qh[i].
Source: block_q5_K in ggml-common.h, dequantize_row_q5_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.affine import encode_affine
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.jit import kernel
from requant.formats.scales import pack_scales, unpack_factors

N = 256
SUBS, SUB = 8, 32
TOP, SCALE_TOP = 31, 63
LEVELS = Levels(LINEAR, 0, TOP, 0, SCALE_TOP, SCALE_TOP)
LAYOUT = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", (12,)), ("qh", "u1", (32,)), ("qs", "u1", (128,))])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, dmin, scales, qh, qs = blocks["d"], blocks["dmin"], blocks["scales"], blocks["qh"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(dmin[b])
        d0, m0 = unpack_factors(scales, b, 0, scale, low)
        d1, m1 = unpack_factors(scales, b, 1, scale, low)
        d2, m2 = unpack_factors(scales, b, 2, scale, low)
        d3, m3 = unpack_factors(scales, b, 3, scale, low)
        d4, m4 = unpack_factors(scales, b, 4, scale, low)
        d5, m5 = unpack_factors(scales, b, 5, scale, low)
        d6, m6 = unpack_factors(scales, b, 6, scale, low)
        d7, m7 = unpack_factors(scales, b, 7, scale, low)
        for i in range(n):
            h = qh[b, i]
            q = qs[b, i]
            out[b, i] = d0 * np.float32((q & np.uint8(15)) | (h & np.uint8(1)) << np.uint8(4)) - m0
            out[b, 32 + i] = d1 * np.float32((q >> np.uint8(4)) | (h & np.uint8(2)) << np.uint8(3)) - m1
            q = qs[b, 32 + i]
            out[b, 64 + i] = d2 * np.float32((q & np.uint8(15)) | (h & np.uint8(4)) << np.uint8(2)) - m2
            out[b, 96 + i] = d3 * np.float32((q >> np.uint8(4)) | (h & np.uint8(8)) << np.uint8(1)) - m3
            q = qs[b, 64 + i]
            out[b, 128 + i] = d4 * np.float32((q & np.uint8(15)) | (h & np.uint8(16))) - m4
            out[b, 160 + i] = d5 * np.float32((q >> np.uint8(4)) | (h & np.uint8(32)) >> np.uint8(1)) - m5
            q = qs[b, 96 + i]
            out[b, 192 + i] = d6 * np.float32((q & np.uint8(15)) | (h & np.uint8(64)) >> np.uint8(2)) - m6
            out[b, 224 + i] = d7 * np.float32((q >> np.uint8(4)) | (h & np.uint8(128)) >> np.uint8(3)) - m7


def fit(x, importance, effort):
    return encode_affine(x, importance, SUBS, TOP, SCALE_TOP, -2.0, 3.5, effort)


def pack(found, blocks):
    blocks["d"], blocks["dmin"] = found.d, found.dmin
    _pack(found.scales, found.mins, found.codes, blocks)


@kernel
def _pack(scales, mins, codes, blocks):
    packed, qs, qh = blocks["scales"], blocks["qs"], blocks["qh"]
    for b in range(codes.shape[0]):
        pack_scales(scales, mins, b, packed)
        for i in range(SUB):
            high = np.uint8(0)
            for s in range(SUBS):
                high |= (codes[b, s, i] >> np.uint8(4)) << np.uint8(s)
            qh[b, i] = high
            for p in range(SUBS // 2):
                low, upper = codes[b, 2 * p, i] & np.uint8(15), codes[b, 2 * p + 1, i] & np.uint8(15)
                qs[b, SUB * p + i] = low | upper << np.uint8(4)


encode = encoder(fit, pack)
