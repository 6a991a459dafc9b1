"""Q5_1: 32 five-bit codes and one half-precision scale and minimum; 6 bits per weight.

    x[i] = d * q[i] + m

qs[i] holds element i low, 16 + i high; qh holds the fifth bit of element i as bit i.
Source: block_q5_1 in ggml-common.h, dequantize_row_q5_1 in ggml-quants.c.
"""

import numpy as np

from requant.formats.base import Effort
from requant.formats.bits import half_to_float
from requant.formats.encoders.affine import encode_affine
from requant.formats.encoders.blocks import round_affine
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.search import is_flat
from requant.formats.jit import kernel

N = 32
TOP = 31
LEVELS = Levels(LINEAR, 0, TOP)
LAYOUT = np.dtype([("d", "<u2"), ("m", "<u2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, m, qh, qs = blocks["d"], blocks["m"], blocks["qh"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(m[b])
        for i in range(half):
            bit = np.uint8(i & 7)
            first = ((qh[b, i >> 3] >> bit) & np.uint8(1)) << np.uint8(4)
            second = ((qh[b, 2 + (i >> 3)] >> bit) & np.uint8(1)) << np.uint8(4)
            out[b, i] = scale * np.float32((qs[b, i] & np.uint8(15)) | first) + low
            out[b, i + half] = scale * np.float32((qs[b, i] >> np.uint8(4)) | second) + low


def fit(x, importance, effort):
    if effort < Effort.BEST and is_flat(importance):
        return round_affine(x, TOP)
    return encode_affine(x, importance, 1, TOP, 1, -1.0, 2.1, effort)


def pack(found, blocks):
    blocks["d"], blocks["m"] = found.d, found.dmin ^ np.uint16(0x8000)
    _pack(found.codes[:, 0], blocks)


@kernel
def _pack(codes, blocks):
    qh, qs = blocks["qh"], blocks["qs"]
    half = codes.shape[1] // 2  # not as a constant, as in decode
    for b in range(codes.shape[0]):
        for i in range(half):
            qs[b, i] = (codes[b, i] & np.uint8(15)) | (codes[b, i + half] & np.uint8(15)) << np.uint8(4)
        for k in range(4):
            high = np.uint8(0)
            for i in range(8):
                high |= (codes[b, 8 * k + i] >> np.uint8(4)) << np.uint8(i)
            qh[b, k] = high


encode = encoder(fit, pack)
