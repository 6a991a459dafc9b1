"""Q1_0: 128 sign bits and one half-precision scale; 1.125 bits per weight.

    x[i] = d if bit i of qs else -d

Source: block_q1_0 in ggml-common.h, dequantize_row_q1_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.levels import encode_signs
from requant.formats.jit import kernel

N = 128
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 8,))])  # d: binary16 bits; qs: lowest bit first


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N // 8):
            bits = np.uint32(qs[b, i])
            for j in range(8):
                out[b, 8 * i + j] = scale if (bits >> np.uint32(j)) & np.uint32(1) else -scale


def encode(x, importance, blocks, effort):
    blocks["d"] = encode_signs(x, importance)
    _pack(x, blocks)


@kernel
def _pack(x, blocks):
    qs = blocks["qs"]
    for b in range(x.shape[0]):
        for i in range(N // 8):
            bits = np.uint32(0)
            for k in range(8):
                bits |= np.uint32(x[b, 8 * i + k] >= np.float32(0.0)) << np.uint32(k)
            qs[b, i] = np.uint8(bits)
