"""Q5_K: 8 sub-blocks of 32 five-bit codes, each with a 6-bit scale and a 6-bit minimum; 5.5 bits per weight.

    x[32 s + i] = d * scale[s] * q[32 s + i] - dmin * min[s]

As Q4_K, with the fifth bit of element 32 s + i as bit s of qh[i].
Source: block_q5_K in ggml-common.h, dequantize_row_q5_K in ggml-quants.c.
"""

import numpy as np

from requant.formats.affine import encode_affine
from requant.formats.bits import half_to_float
from requant.formats.scales import pack_scales, unpack_scale
from requant.jit import kernel

N = 256
SUBS, SUB = 8, 32
TOP, SCALE_TOP = 31, 63
LAYOUT = np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", (12,)), ("qh", "u1", (32,)), ("qs", "u1", (128,))])


@kernel
def decode(blocks, out):
    n = out.shape[1] // SUBS  # SUB, but not as a constant: LLVM would unroll the loop before it can vectorize it
    d, dmin, scales, qh, qs = blocks["d"], blocks["dmin"], blocks["scales"], blocks["qh"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(dmin[b])
        for s in range(SUBS):
            ls, lm = unpack_scale(scales, b, s)
            dl, ml = scale * np.float32(ls), low * np.float32(lm)
            shift, bit = np.uint8(4 * (s & 1)), np.uint8(s)
            first = SUB * (s >> 1)
            for i in range(n):
                high = ((qh[b, i] >> bit) & np.uint8(1)) << np.uint8(4)
                q = ((qs[b, first + i] >> shift) & np.uint8(15)) | high
                out[b, SUB * s + i] = dl * np.float32(q) - ml


def encode(x, importance, blocks, effort):
    blocks["d"], blocks["dmin"], scales, mins, codes = encode_affine(
        x, importance, SUBS, TOP, SCALE_TOP, -2.0, 3.5, effort
    )
    _pack(scales, mins, codes, blocks)


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
