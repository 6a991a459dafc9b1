"""IQ1_M: 256 weights as 32 codewords of a 2048-word ternary codebook, sixteen sub-block scales; 1.75 bits per weight.

    x = d * (1 + 2 * ls[s]) * (grid[index] + delta),  delta = +-1/8

Nibble g of qh: three upper bits of index g and the sign of its delta. Each of the four words of scales holds four
three-bit ls, for 16 weights each, and on top four bits of d.

Source: block_iq1_m in ggml-common.h (scales as bytes), dequantize_row_iq1_m in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.grids import IQ1_DELTA, IQ1_S
from requant.jit import kernel

N = 256
LAYOUT = np.dtype([("qs", "u1", (N // 8,)), ("qh", "u1", (N // 16,)), ("scales", "<u2", (4,))])


@kernel
def decode(blocks, out):
    qs, qh, scales = blocks["qs"], blocks["qh"], blocks["scales"]
    for b in range(blocks.shape[0]):
        d = np.uint32(0)
        for k in range(4):
            d |= (np.uint32(scales[b, k]) >> np.uint32(12)) << np.uint32(4 * k)
        super_scale = half_to_float(d)
        for s in range(16):
            level = (np.uint32(scales[b, s >> 2]) >> np.uint32(3 * (s & 3))) & np.uint32(7)
            scale = super_scale * np.float32(np.uint32(1) + np.uint32(2) * level)
            for g in range(2 * s, 2 * s + 2):
                nibble = (np.uint32(qh[b, g >> 1]) >> np.uint32(4 * (g & 1))) & np.uint32(15)
                index = np.uint32(qs[b, g]) | ((nibble & np.uint32(7)) << np.uint32(8))
                delta = -IQ1_DELTA if nibble & np.uint32(8) else IQ1_DELTA
                for j in range(8):
                    out[b, 8 * g + j] = scale * (np.float32(IQ1_S[index, j]) + delta)
