"""IQ3_XXS: 256 weights as 64 codewords of a 256-word codebook, eight sub-block scales; 3.0625 bits per weight.

    x = d * (0.5 + ls[s]) / 2 * sign * grid[index]

A codeword is four weights. A sub-block of 32 has eight indices and a 32-bit number: four times seven sign bits (the
eighth makes the count of minuses even) and, on top, the four-bit scale.

Source: block_iq3_xxs in ggml-common.h (where qs and signs are one array), dequantize_row_iq3_xxs in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import EVEN_SIGNS, IQ3_XXS
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 4,)), ("signs", "<u4", (N // 32,))])  # d: binary16 bits
WORDS = IQ3_XXS
SHAPE = Shape(
    sub=32,
    dim=4,
    low=np.float32(4),
    step=np.float32(8),
    bend=np.float32(0),
    top=7,
    delta=np.float32(0),
    per_delta=1,
    even=True,
    scale_top=15,
    unit=np.float32(0.25),
    first=np.float32(0.65),
    stride=np.float32(0.14),
)
BY_EFFORT = (SearchBudget(rounds=1, beside=3), SearchBudget(rounds=1, beside=7), SearchBudget(rounds=3, beside=15))


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


@kernel
def pack(found, blocks):
    d, ls, index, signs = found["d"], found["ls"], found["index"], found["signs"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for c in range(N // 4):
            blocks["qs"][b, c] = index[b, c]
        for s in range(8):
            rest = np.uint32(ls[b, s]) << np.uint32(28)
            for g in range(4):
                rest |= np.uint32(signs[b, 4 * s + g] & np.uint8(127)) << np.uint32(7 * g)
            blocks["signs"][b, s] = rest


fit = grid_fit("IQ3_XXS", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
