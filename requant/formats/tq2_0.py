"""TQ2_0: 256 two-bit codes, meant for ternary weights, and one half-precision scale; 2.0625 bits per weight.

    x = d * (q - 1)

The codes of weights 128h + 32l + m lie in bits 2l of qs[32h + m].

Source: block_tq2_0 in ggml-common.h, dequantize_row_tq2_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.levels import encode_ternary
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("qs", "u1", (N // 4,)), ("d", "<u2")])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    group = out.shape[1] // 8  # 32; a literal would be unrolled and then not vectorized, 3 times slower
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for h in range(2):
            for plane in range(4):
                for m in range(group):
                    code = (np.int32(qs[b, 32 * h + m]) >> np.int32(2 * plane)) & np.int32(3)
                    out[b, 128 * h + 32 * plane + m] = scale * np.float32(code - np.int32(1))


def encode(x, importance, blocks, effort):
    blocks["d"], codes = encode_ternary(x, importance)
    _pack(codes, blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    group = codes.shape[1] // 8  # 32, as in decode
    for b in range(codes.shape[0]):
        for h in range(2):
            for m in range(group):
                i = 128 * h + m
                low = codes[b, i] | codes[b, i + 32] << np.uint8(2)
                qs[b, 32 * h + m] = low | codes[b, i + 64] << np.uint8(4) | codes[b, i + 96] << np.uint8(6)
