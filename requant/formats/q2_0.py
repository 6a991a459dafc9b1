"""Q2_0: 64 two-bit codes and one half-precision scale; 2.25 bits per weight.

    x[i] = d * (q[i] - 1)

Source: block_q2_0 in ggml-common.h, dequantize_row_q2_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.jit import kernel

N = 64
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
