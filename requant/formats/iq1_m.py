"""IQ1_M: 256 weights as 32 codewords of a 2048-word ternary codebook, sixteen sub-block scales; 1.75 bits per weight.

    x = d * (1 + 2 * ls[s]) * (grid[index] + delta),  delta = +-1/8

Nibble g of qh: three upper bits of index g and the sign of its delta. Each of the four words of scales holds four
three-bit ls, for 16 weights each, and on top four bits of d.

Source: block_iq1_m in ggml-common.h (scales as bytes), dequantize_row_iq1_m in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.fit import encoder
from requant.formats.encoders.grid_search import grid_fit
from requant.formats.encoders.grid_words import Shape
from requant.formats.encoders.search import SearchBudget
from requant.formats.grids import IQ1_DELTA, IQ1_S
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("qs", "u1", (N // 8,)), ("qh", "u1", (N // 16,)), ("scales", "<u2", (4,))])
SHAPE = Shape(
    sub=16,
    dim=8,
    low=np.float32(-1),
    step=np.float32(1),
    bend=np.float32(0),
    top=2,
    delta=IQ1_DELTA,
    per_delta=1,
    even=False,
    scale_top=7,
    unit=np.float32(1.0),
    first=np.float32(1.0),
    stride=np.float32(0.35),
)
BY_EFFORT = (SearchBudget(rounds=0, beside=1), SearchBudget(rounds=1, beside=5), SearchBudget(rounds=3, beside=15))


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


@kernel
def pack(found, blocks):
    d, ls, index, minus = found["d"], found["ls"], found["index"], found["minus"]
    for b in range(blocks.shape[0]):
        for k in range(4):
            word = (d[b] >> np.uint16(4 * k)) << np.uint16(12)
            for s in range(4):
                word |= np.uint16(ls[b, 4 * k + s]) << np.uint16(3 * s)
            blocks["scales"][b, k] = word
        for g in range(N // 8):
            blocks["qs"][b, g] = index[b, g] & np.uint16(255)
        for h in range(N // 16):
            low = (index[b, 2 * h] >> np.uint16(8)) | np.uint16(minus[b, 2 * h]) << np.uint16(3)
            high = (index[b, 2 * h + 1] >> np.uint16(8)) | np.uint16(minus[b, 2 * h + 1]) << np.uint16(3)
            blocks["qh"][b, h] = low | high << np.uint16(4)


fit = grid_fit("IQ1_S", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
