"""IQ4_NL: 32 four-bit codes of a fixed non-linear scale and one half-precision factor; 4.5 bits per weight.

    x[i] = d * level[q[i]]

Low nibbles are weights 0-15, high nibbles 16-31.

Source: block_iq4_nl in ggml-common.h, dequantize_row_iq4_nl in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import IQ4, Levels, encoder
from requant.formats.encoders.iq4 import encode_iq4
from requant.formats.encoders.search import SearchBudget, is_flat
from requant.formats.grids import IQ4_LEVELS
from requant.formats.jit import kernel

N = 32
SEARCH = (SearchBudget(4, 1), SearchBudget(8, 1), SearchBudget(28, 3))
LEVELS = Levels(IQ4)
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 2,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N // 2):
            codes = np.uint32(qs[b, i])
            out[b, i] = scale * np.float32(IQ4_LEVELS[codes & np.uint32(15)])
            out[b, 16 + i] = scale * np.float32(IQ4_LEVELS[codes >> np.uint32(4)])


def fit(x, importance, effort):
    # importance may well make it worth to clip the largest weight
    first, span = (-16.0, 40.0) if is_flat(importance) else (-32.0, 56.0)
    return encode_iq4(x, importance, 1, 1, SEARCH[effort], first, span)


def pack(found, blocks):
    blocks["d"] = found.d
    _pack(found.codes, blocks)


@kernel
def _pack(codes, blocks):
    qs = blocks["qs"]
    for b in range(codes.shape[0]):
        for i in range(N // 2):
            qs[b, i] = codes[b, 0, i] | codes[b, 0, i + N // 2] << np.uint8(4)


encode = encoder(fit, pack)
