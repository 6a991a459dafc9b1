"""IQ3_S: 256 weights as 64 codewords of a 512-word codebook, eight sub-block scales; 3.4375 bits per weight.

    x = d * (1 + 2 * ls[s]) * sign * grid[index]

A codeword is four weights; index c has eight bits in qs[c] and one in qh[c // 8]. Each weight has its own sign bit.
ls[s] is nibble s of scales, for 32 weights each.

Source: block_iq3_s in ggml-common.h, dequantize_row_iq3_s in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import IQ3_S
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype(
    [
        ("d", "<u2"),  # binary16 bits
        ("qs", "u1", (N // 4,)),
        ("qh", "u1", (N // 32,)),
        ("signs", "u1", (N // 8,)),
        ("scales", "u1", (N // 64,)),
    ]
)
WORDS = IQ3_S
SHAPE = Shape(
    sub=32,
    dim=4,
    low=np.float32(1),
    step=np.float32(2),
    bend=np.float32(0),
    top=7,
    delta=np.float32(0),
    per_delta=1,
    even=False,
    scale_top=15,
    unit=np.float32(1.0),
    first=np.float32(0.65),
    stride=np.float32(0.14),
)
BY_EFFORT = (SearchBudget(rounds=1, beside=1), SearchBudget(rounds=1, beside=7), SearchBudget(rounds=3, beside=15))


@kernel
def decode(blocks, out):
    d, qs, qh, all_signs, scales = blocks["d"], blocks["qs"], blocks["qh"], blocks["signs"], blocks["scales"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(8):
            level = (np.uint32(scales[b, s >> 1]) >> np.uint32(4 * (s & 1))) & np.uint32(15)
            scale = super_scale * np.float32(np.uint32(1) + np.uint32(2) * level)
            high_bits = np.uint32(qh[b, s])
            for g in range(4):
                signs = np.uint32(all_signs[b, 4 * s + g])
                for j in range(8):
                    c = 2 * g + (j >> 2)
                    high = (high_bits >> np.uint32(c)) & np.uint32(1)
                    index = np.uint32(qs[b, 8 * s + c]) | (high << np.uint32(8))
                    value = scale * np.float32(IQ3_S[index, j & 3])
                    out[b, 32 * s + 8 * g + j] = -value if (signs >> np.uint32(j)) & np.uint32(1) else value


@kernel
def pack(found, blocks):
    d, ls, index, signs = found["d"], found["ls"], found["index"], found["signs"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for s in range(4):
            blocks["scales"][b, s] = ls[b, 2 * s] | ls[b, 2 * s + 1] << np.uint8(4)
        for c in range(N // 4):
            blocks["qs"][b, c] = index[b, c] & np.uint16(255)
        for s in range(8):
            high = np.uint16(0)
            for c in range(8):
                high |= (index[b, 8 * s + c] >> np.uint16(8)) << np.uint16(c)
            blocks["qh"][b, s] = high
        for g in range(N // 8):
            blocks["signs"][b, g] = signs[b, g]


fit = grid_fit("IQ3_S", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
