"""IQ2_XS: 256 weights as 32 codewords of a 512-word codebook, sixteen sub-block scales; 2.3125 bits per weight.

    x = d * (0.5 + ls[s]) / 4 * sign * grid[index]

A word of qs stands for eight weights: nine bits of index, seven of signs (the eighth makes the count of minuses
even). ls[s] is nibble s of scales, for 16 weights each.

Source: block_iq2_xs in ggml-common.h, dequantize_row_iq2_xs in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import EVEN_SIGNS, IQ2_XS
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("d", "<u2"), ("qs", "<u2", (N // 8,)), ("scales", "u1", (N // 32,))])  # d: binary16 bits
WORDS = IQ2_XS
SHAPE = Shape(
    sub=16,
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
    d, qs, scales = blocks["d"], blocks["qs"], blocks["scales"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(16):
            level = (np.uint32(scales[b, s >> 1]) >> np.uint32(4 * (s & 1))) & np.uint32(15)
            scale = super_scale * (np.float32(0.5) + np.float32(level)) * np.float32(0.25)
            for g in range(2 * s, 2 * s + 2):
                word = np.uint32(qs[b, g])
                index, signs = word & np.uint32(511), np.uint32(EVEN_SIGNS[word >> np.uint32(9)])
                for j in range(8):
                    value = scale * np.float32(IQ2_XS[index, j])
                    out[b, 8 * g + j] = -value if (signs >> np.uint32(j)) & np.uint32(1) else value


@kernel
def pack(found, blocks):
    d, ls, index, signs = found["d"], found["ls"], found["index"], found["signs"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for s in range(8):
            blocks["scales"][b, s] = ls[b, 2 * s] | ls[b, 2 * s + 1] << np.uint8(4)
        for g in range(N // 8):
            blocks["qs"][b, g] = index[b, g] | np.uint16(signs[b, g] & np.uint8(127)) << np.uint16(9)


fit = grid_fit("IQ2_XS", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
