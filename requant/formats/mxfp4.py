"""MXFP4: 32 E2M1 codes and one E8M0 scale; 4.25 bits per weight.

    x[i] = d * level[q[i]],  d = 2**(e - 128)

Low nibbles are weights 0-15, high nibbles 16-31. The levels are E2M1 doubled, and the scale is halved.

Source: block_mxfp4 in ggml-common.h, dequantize_row_mxfp4 in ggml-quants.c; OCP Microscaling Formats 1.0.
"""

import numpy as np

from requant.formats.bits import e8m0_half_to_float
from requant.formats.encoders.fit import FP4, Levels, encoder
from requant.formats.encoders.levels import encode_fp4
from requant.formats.encoders.search import is_flat
from requant.formats.grids import FP4_LEVELS
from requant.formats.jit import kernel

N = 32
# scales by effort, without importance and with: below and above the one with the largest weight's power of two; no
# others are ever better
TRIED = (((0, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (3, 1)))
LEVELS = Levels(FP4)
LAYOUT = np.dtype([("e", "u1"), ("qs", "u1", (N // 2,))])
NAN_SCALE = {"e": 255}  # E8M0 has no infinity, and this one NaN


@kernel
def decode(blocks, out):
    e, qs = blocks["e"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = e8m0_half_to_float(e[b])
        for i in range(N // 2):
            codes = np.uint32(qs[b, i])
            out[b, i] = scale * np.float32(FP4_LEVELS[codes & np.uint32(15)])
            out[b, 16 + i] = scale * np.float32(FP4_LEVELS[codes >> np.uint32(4)])


def fit(x, importance, effort):
    return encode_fp4(x, importance, 1, True, *TRIED[effort][0 if is_flat(importance) else 1])


def pack(found, blocks):
    blocks["e"] = found.scales[:, 0]
    _pack(found.codes, blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    for b in range(codes.shape[0]):
        for i in range(N // 2):
            qs[b, i] = codes[b, 0, i] | codes[b, 0, i + N // 2] << np.uint8(4)


encode = encoder(fit, pack)
