"""Q4_1: 32 four-bit codes and one half-precision scale and minimum; 5 bits per weight.

    x[i] = d * q[i] + m

qs[i] holds element i low, 16 + i high.
Source: block_q4_1 in ggml-common.h, dequantize_row_q4_1 in ggml-quants.c.
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
TOP = 15
LEVELS = Levels(LINEAR, 0, TOP)
LAYOUT = np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, m, qs = blocks["d"], blocks["m"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale, low = half_to_float(d[b]), half_to_float(m[b])
        for i in range(half):
            out[b, i] = scale * np.float32(qs[b, i] & np.uint8(15)) + low
            out[b, i + half] = scale * np.float32(qs[b, i] >> np.uint8(4)) + low


def fit(x, importance, effort):
    if effort < Effort.BEST and is_flat(importance):
        return round_affine(x, TOP)
    return encode_affine(x, importance, 1, TOP, 1, -1.0, 2.1, effort)


def pack(found, blocks):
    blocks["d"], blocks["m"] = found.d, found.dmin ^ np.uint16(0x8000)
    _pack(found.codes[:, 0], blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    half = codes.shape[1] // 2  # not as a constant, as in decode
    for b in range(codes.shape[0]):
        for i in range(half):
            qs[b, i] = codes[b, i] | codes[b, i + half] << np.uint8(4)


encode = encoder(fit, pack)
