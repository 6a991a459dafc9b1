"""Q2_0: 64 two-bit codes and one half-precision scale; 2.25 bits per weight.

    x[i] = d * (q[i] - 1)

Source: block_q2_0 in ggml-common.h, dequantize_row_q2_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.symmetric import BLOCKS, encode_symmetric
from requant.formats.jit import kernel

N = 64
TOP = 2
LEVELS = Levels(LINEAR, -TOP, TOP - 1)
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 4,))])  # d: binary16 bits; qs: four codes, lowest first


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N // 4):
            codes = np.int32(qs[b, i])
            for j in range(4):
                code = (codes >> np.int32(2 * j)) & np.int32(3)
                out[b, 4 * i + j] = scale * np.float32(code - np.int32(1))


def fit(x, importance, effort):
    return encode_symmetric(x, importance, 1, TOP, 1, BLOCKS[effort], -0.6, 1.6)


def pack(found, blocks):
    blocks["d"] = found.d ^ np.uint16(0x8000)
    _pack(found.codes, blocks)


@kernel
def _pack(codes, blocks):
    """Turn the codes 0..3 of -2..1 into those of 1..-2, as d has changed its sign."""
    qs = blocks["qs"]
    for b in range(codes.shape[0]):
        for i in range(N // 4):
            byte = np.uint8(0)
            for k in range(4):
                byte |= (np.uint8(3) - codes[b, 0, 4 * i + k]) << np.uint8(2 * k)
            qs[b, i] = byte


encode = encoder(fit, pack)
