"""Q4_K: 8 sub-blocks of 32 four-bit codes, each with a 6-bit scale and a 6-bit minimum; 4.5 bits per weight.

    x[32 s + i] = d * scale[s] * q[32 s + i] - dmin * min[s]

scales packs the sixteen 6-bit numbers (see scales.py); qs[32 p + i] holds element 64 p + i low, 64 p + 32 + i high.
Source: block_q4_K in ggml-common.h, dequantize_row_q4_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.affine import encode_affine
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.jit import kernel
from requant.formats.scales import pack_scales, unpack_factors

N = 256
SUBS, SUB = 8, 32
TOP, SCALE_TOP = 15, 63
LEVELS = Levels(LINEAR, 0, TOP, 0, SCALE_TOP, SCALE_TOP)
LAYOUT = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", (12,)), ("qs", "u1", (128,))])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, dmin, scales, qs = blocks["d"], blocks["dmin"], blocks["scales"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(dmin[b])
        for p in range(SUBS // 2):
            d0, m0 = unpack_factors(scales, b, 2 * p, scale, low)
            d1, m1 = unpack_factors(scales, b, 2 * p + 1, scale, low)
            for i in range(n):
                q = qs[b, SUB * p + i]
                out[b, 2 * SUB * p + i] = d0 * np.float32(q & np.uint8(15)) - m0
                out[b, 2 * SUB * p + SUB + i] = d1 * np.float32(q >> np.uint8(4)) - m1


def fit(x, importance, effort):
    return encode_affine(x, importance, SUBS, TOP, SCALE_TOP, -1.0, 2.1, effort)


def pack(found, blocks):
    blocks["d"], blocks["dmin"] = found.d, found.dmin
    _pack(found.scales, found.mins, found.codes, blocks)


@kernel
def _pack(scales, mins, codes, blocks):
    packed, qs = blocks["scales"], blocks["qs"]
    for b in range(codes.shape[0]):
        pack_scales(scales, mins, b, packed)
        for p in range(SUBS // 2):
            for i in range(SUB):
                qs[b, SUB * p + i] = codes[b, 2 * p, i] | codes[b, 2 * p + 1, i] << np.uint8(4)


encode = encoder(fit, pack)
