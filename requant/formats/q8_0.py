"""Q8_0: 32 signed bytes and one half-precision scale; 8.5 bits per weight.

    x[i] = d * qs[i]

Source: block_q8_0 in ggml-common.h, quantize_row_q8_0_ref in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import LINEAR, Levels, encoder
from requant.formats.encoders.search import SearchBudget
from requant.formats.encoders.symmetric import encode_symmetric
from requant.formats.jit import kernel

N = 32
TOP = 128
SEARCH = (SearchBudget(2, 0), SearchBudget(2, 1), SearchBudget(4, 1))
LEVELS = Levels(LINEAR, -TOP, TOP - 1)
LAYOUT = np.dtype([("d", "<u2"), ("qs", "i1", (N,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    n = out.shape[1]  # not as a constant: LLVM would unroll the loop before it can vectorize it
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(n):
            out[b, i] = scale * np.float32(qs[b, i])


def fit(x, importance, effort):
    return encode_symmetric(x, importance, 1, TOP, 1, SEARCH[effort], -0.5, 0.5)


def pack(found, blocks):
    blocks["d"] = found.d
    blocks["qs"] = (found.codes[:, 0] ^ np.uint8(TOP)).view(np.int8)


encode = encoder(fit, pack)
