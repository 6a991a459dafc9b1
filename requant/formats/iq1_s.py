"""IQ1_S: 256 weights as 32 codewords of a 2048-word ternary codebook, eight sub-block scales; 1.5625 bits per weight.

    x = d * (1 + 2 * ls[s]) * (grid[index] + delta[s]),  delta = +-1/8

qh[s] holds the upper three bits of the sub-block's four indices, then ls[s] in three bits, then the sign of delta.

Source: block_iq1_s in ggml-common.h, dequantize_row_iq1_s in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.grids import IQ1_DELTA, IQ1_S
from requant.jit import kernel

N = 256
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 8,)), ("qh", "<u2", (N // 32,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs, qh = blocks["d"], blocks["qs"], blocks["qh"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(8):
            bits = np.uint32(qh[b, s])
            level = (bits >> np.uint32(12)) & np.uint32(7)
            scale = super_scale * np.float32(np.uint32(1) + np.uint32(2) * level)
            delta = -IQ1_DELTA if bits & np.uint32(0x8000) else IQ1_DELTA
            for g in range(4):
                high = (bits >> np.uint32(3 * g)) & np.uint32(7)
                index = np.uint32(qs[b, 4 * s + g]) | (high << np.uint32(8))
                for j in range(8):
                    out[b, 32 * s + 8 * g + j] = scale * (np.float32(IQ1_S[index, j]) + delta)
