"""IQ3_XXS: 256 weights as 64 codewords of a 256-word codebook, eight sub-block scales; 3.0625 bits per weight.

    x = d * (0.5 + ls[s]) / 2 * sign * grid[index]

A codeword is four weights. A sub-block of 32 has eight indices and a 32-bit number: four times seven sign bits (the
eighth makes the count of minuses even) and, on top, the four-bit scale.

Source: block_iq3_xxs in ggml-common.h (where qs and signs are one array), dequantize_row_iq3_xxs in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.grids import EVEN_SIGNS, IQ3_XXS
from requant.jit import kernel

N = 256
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 4,)), ("signs", "<u4", (N // 32,))])  # d: binary16 bits


@kernel
def decode(blocks, out):
    d, qs, rests = blocks["d"], blocks["qs"], blocks["signs"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(8):
            rest = np.uint32(rests[b, s])
            scale = super_scale * (np.float32(0.5) + np.float32(rest >> np.uint32(28))) * np.float32(0.5)
            for g in range(4):
                signs = np.uint32(EVEN_SIGNS[(rest >> np.uint32(7 * g)) & np.uint32(127)])
                for j in range(8):
                    index = qs[b, 8 * s + 2 * g + (j >> 2)]
                    value = scale * np.float32(IQ3_XXS[index, j & 3])
                    out[b, 32 * s + 8 * g + j] = -value if (signs >> np.uint32(j)) & np.uint32(1) else value
