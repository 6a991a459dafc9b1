"""IQ2_XXS: 256 weights as 32 codewords of a 256-word codebook, eight sub-block scales; 2.0625 bits per weight.

    x = d * (0.5 + ls[s]) / 4 * sign * grid[index]

A sub-block of 32 weights is four u2 words: two hold four one-byte indices, two a 32-bit number with four times
seven sign bits (the eighth makes the count of minuses even) and, on top, the four-bit scale.

Source: block_iq2_xxs in ggml-common.h, dequantize_row_iq2_xxs in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import EVEN_SIGNS, IQ2_XXS
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("d", "<u2"), ("qs", "<u2", (N // 8,))])  # d: binary16 bits
WORDS = IQ2_XXS
SHAPE = Shape(
    sub=32,
    dim=8,
    low=np.float32(8),
    step=np.float32(17),
    bend=np.float32(0.5),
    top=2,
    delta=np.float32(0),
    per_delta=1,
    even=True,
    scale_top=15,
    unit=np.float32(0.125),
    first=np.float32(0.7),
    stride=np.float32(0.17),
)
BY_EFFORT = (SearchBudget(rounds=1, beside=1), SearchBudget(rounds=1, beside=7), SearchBudget(rounds=3, beside=15))


@kernel
def decode(blocks, out):
    d, qs = blocks["d"], blocks["qs"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(8):
            indices = np.uint32(qs[b, 4 * s]) | (np.uint32(qs[b, 4 * s + 1]) << np.uint32(16))
            rest = np.uint32(qs[b, 4 * s + 2]) | (np.uint32(qs[b, 4 * s + 3]) << np.uint32(16))
            scale = super_scale * (np.float32(0.5) + np.float32(rest >> np.uint32(28))) * np.float32(0.25)
            for g in range(4):
                index = (indices >> np.uint32(8 * g)) & np.uint32(0xFF)
                signs = np.uint32(EVEN_SIGNS[(rest >> np.uint32(7 * g)) & np.uint32(127)])
                for j in range(8):
                    value = scale * np.float32(IQ2_XXS[index, j])
                    out[b, 32 * s + 8 * g + j] = -value if (signs >> np.uint32(j)) & np.uint32(1) else value


@kernel
def pack(found, blocks):
    d, ls, index, signs = found["d"], found["ls"], found["index"], found["signs"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for s in range(8):
            rest = np.uint32(ls[b, s]) << np.uint32(28)
            for g in range(4):
                rest |= np.uint32(signs[b, 4 * s + g] & np.uint8(127)) << np.uint32(7 * g)
            blocks["qs"][b, 4 * s] = index[b, 4 * s] | index[b, 4 * s + 1] << np.uint16(8)
            blocks["qs"][b, 4 * s + 1] = index[b, 4 * s + 2] | index[b, 4 * s + 3] << np.uint16(8)
            blocks["qs"][b, 4 * s + 2] = rest & np.uint32(0xFFFF)
            blocks["qs"][b, 4 * s + 3] = rest >> np.uint32(16)


fit = grid_fit("IQ2_XXS", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
