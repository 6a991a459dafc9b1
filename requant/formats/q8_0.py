"""Q8_0: 32 signed bytes and one half-precision scale; 8.5 bits per weight.

    x[i] = d * qs[i]

Source: block_q8_0 in ggml-common.h, quantize_row_q8_0_ref in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.jit import kernel

N = 32
LAYOUT = np.dtype([("d", "<u2"), ("qs", "i1", (N,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        for i in range(N):
            out[b, i] = scale * np.float32(qs[b, i])
