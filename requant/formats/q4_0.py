"""Q4_0: 32 four-bit codes and one half-precision scale; 4.5 bits per weight.

    x[i] = d * (q[i] - 8)

qs[i] holds element i low, 16 + i high.
Source: block_q4_0 in ggml-common.h, dequantize_row_q4_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.base import Effort
from requant.formats.bits import half_to_float
from requant.formats.encoders.blocks import round_symmetric
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.search import is_flat
from requant.formats.encoders.symmetric import BLOCKS, encode_symmetric
from requant.formats.jit import kernel

N = 32
TOP = 8
LEVELS = Levels(LINEAR, -TOP, TOP - 1)
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (16,))])


@kernel
def decode(blocks, out):
    half = out.shape[1] // 2  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(half):
            out[b, i] = scale * (np.float32(qs[b, i] & np.uint8(15)) - np.float32(8.0))
            out[b, i + half] = scale * (np.float32(qs[b, i] >> np.uint8(4)) - np.float32(8.0))


def fit(x, importance, effort):
    if effort < Effort.BEST and is_flat(importance):
        return round_symmetric(x, TOP)
    return encode_symmetric(x, importance, 1, TOP, 1, BLOCKS[effort], -0.9, 1.5)


def pack(found, blocks):
    blocks["d"] = found.d
    _pack(found.codes[:, 0], blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    half = codes.shape[1] // 2  # not as a constant, as in decode
    for b in range(codes.shape[0]):
        for i in range(half):
            qs[b, i] = codes[b, i] | codes[b, i + half] << np.uint8(4)


encode = encoder(fit, pack)
