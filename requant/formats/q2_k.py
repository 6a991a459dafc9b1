"""Q2_K: 16 sub-blocks of 16 two-bit codes, each with a 4-bit scale and a 4-bit minimum; 2.625 bits per weight.

    x[16 s + i] = d * (scales[s] & 15) * q[16 s + i] - dmin * (scales[s] >> 4)

Element 128 h + 32 k + i (k = 0..3, i = 0..31) is bits 2 k, 2 k + 1 of qs[32 h + i].
Source: block_q2_K in ggml-common.h, dequantize_row_q2_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.affine import encode_affine
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.shrinkage import grow
from requant.formats.jit import kernel

N = 256
SUBS, SUB = 16, 16
TOP, SCALE_TOP = 3, 15
LEVELS = Levels(LINEAR, 0, TOP, 0, SCALE_TOP, SCALE_TOP)
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


def fit(x, importance, effort):
    found = encode_affine(x, importance, SUBS, TOP, SCALE_TOP, -0.5, 1.05, effort)
    blocks = np.empty(len(x), LAYOUT)
    pack(found, blocks)
    grow(x, importance, blocks, decode, found.d, found.dmin)
    return found


def pack(found, blocks):
    blocks["d"], blocks["dmin"] = found.d, found.dmin
    _pack(found.scales, found.mins, found.codes, blocks)


@kernel
def _pack(scales, mins, codes, blocks):
    packed, qs = blocks["scales"], blocks["qs"]
    for b in range(codes.shape[0]):
        for s in range(SUBS):
            packed[b, s] = scales[b, s] | mins[b, s] << np.uint8(4)
        for p in range(4):  # half h and odd or even sub-blocks
            s = 8 * (p >> 1) + (p & 1)
            for i in range(SUB):
                low = codes[b, s, i] | codes[b, s + 2, i] << np.uint8(2)
                qs[b, SUB * p + i] = low | codes[b, s + 4, i] << np.uint8(4) | codes[b, s + 6, i] << np.uint8(6)


encode = encoder(fit, pack)
