"""IQ2_S: 256 weights as 32 codewords of a 1024-word codebook, sixteen sub-block scales; 2.5625 bits per weight.

    x = d * (0.5 + ls[s]) / 4 * sign * grid[index]

Index g: eight bits in qs[g], two in qh[g // 4]. Each weight has its own sign bit. ls[s] is nibble s of scales,
for 16 weights each.

Source: block_iq2_s in ggml-common.h (where qs and signs are one array), dequantize_row_iq2_s in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import IQ2_S
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype(
    [
        ("d", "<u2"),  # binary16 bits
        ("qs", "u1", (N // 8,)),
        ("signs", "u1", (N // 8,)),
        ("qh", "u1", (N // 32,)),
        ("scales", "u1", (N // 32,)),
    ]
)
WORDS = IQ2_S
SHAPE = Shape(
    sub=16,
    dim=8,
    low=np.float32(8),
    step=np.float32(17),
    bend=np.float32(0.5),
    top=2,
    delta=np.float32(0),
    per_delta=1,
    even=False,
    scale_top=15,
    unit=np.float32(0.125),
    first=np.float32(0.6),
    stride=np.float32(0.2),
)
BY_EFFORT = (SearchBudget(rounds=1, beside=1), SearchBudget(rounds=1, beside=5), SearchBudget(rounds=3, beside=15))


@kernel
def decode(blocks, out):
    d, qs, all_signs, qh, scales = blocks["d"], blocks["qs"], blocks["signs"], blocks["qh"], blocks["scales"]
    for b in range(blocks.shape[0]):
        super_scale = half_to_float(d[b])
        for s in range(16):
            level = (np.uint32(scales[b, s >> 1]) >> np.uint32(4 * (s & 1))) & np.uint32(15)
            scale = super_scale * (np.float32(0.5) + np.float32(level)) * np.float32(0.25)
            for g in range(2 * s, 2 * s + 2):
                high = (np.uint32(qh[b, g >> 2]) >> np.uint32(2 * (g & 3))) & np.uint32(3)
                index = np.uint32(qs[b, g]) | (high << np.uint32(8))
                signs = np.uint32(all_signs[b, g])
                for j in range(8):
                    value = scale * np.float32(IQ2_S[index, j])
                    out[b, 8 * g + j] = -value if (signs >> np.uint32(j)) & np.uint32(1) else value


@kernel
def pack(found, blocks):
    d, ls, index, signs = found["d"], found["ls"], found["index"], found["signs"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for s in range(8):
            blocks["scales"][b, s] = ls[b, 2 * s] | ls[b, 2 * s + 1] << np.uint8(4)
            high = np.uint16(0)
            for k in range(4):
                high |= (index[b, 4 * s + k] >> np.uint16(8)) << np.uint16(2 * k)
            blocks["qh"][b, s] = high
        for g in range(N // 8):
            blocks["qs"][b, g] = index[b, g] & np.uint16(255)
            blocks["signs"][b, g] = signs[b, g]


fit = grid_fit("IQ2_S", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
