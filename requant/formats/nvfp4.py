"""NVFP4: 64 E2M1 codes in four sub-blocks of 16 with an UE4M3 scale each; 4.5 bits per weight.

    x = d[s] * level[q]

In a sub-block low nibbles are weights 0-7, high nibbles 8-15. The levels are E2M1 doubled, and the scale is halved.
A tensor's second-level scale, where it has one, is another tensor (".scale"), not part of this type. A writer of one
divides the weights by it first and encodes the quotients; without one, scales below 2**-6 are subnormal and coarse.

Source: block_nvfp4 in ggml-common.h, dequantize_row_nvfp4 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import ue4m3_half_to_float
from requant.formats.encoders.fit import FP4, Levels, encoder
from requant.formats.encoders.levels import encode_fp4
from requant.formats.encoders.search import is_flat
from requant.formats.grids import FP4_LEVELS
from requant.formats.jit import kernel

N = 64
SUBS, SUB = 4, 16
# scales by effort, without importance and with: below and above the one that holds the largest weight
TRIED = (((0, 4), (0, 4)), ((1, 5), (1, 5)), ((2, 7), (4, 9)))
LEVELS = Levels(FP4)
LAYOUT = np.dtype([("d", "u1", (4,)), ("qs", "u1", (N // 2,))])


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        for s in range(4):
            scale = ue4m3_half_to_float(d[b, s])
            for i in range(8):
                codes = np.uint32(qs[b, 8 * s + i])
                out[b, 16 * s + i] = scale * np.float32(FP4_LEVELS[codes & np.uint32(15)])
                out[b, 16 * s + 8 + i] = scale * np.float32(FP4_LEVELS[codes >> np.uint32(4)])


def fit(x, importance, effort):
    return encode_fp4(x, importance, SUBS, False, *TRIED[effort][0 if is_flat(importance) else 1])


def pack(found, blocks):
    blocks["d"] = found.scales
    _pack(found.codes, blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    for b in range(codes.shape[0]):
        for s in range(SUBS):
            for i in range(SUB // 2):
                qs[b, SUB // 2 * s + i] = codes[b, s, i] | codes[b, s, i + SUB // 2] << np.uint8(4)


encode = encoder(fit, pack)
