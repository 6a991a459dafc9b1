"""IQ1_S: 256 weights as 32 codewords of a 2048-word ternary codebook, eight sub-block scales; 1.5625 bits per weight.

    x = d * (1 + 2 * ls[s]) * (grid[index] + delta[s]),  delta = +-1/8

qh[s] holds the upper three bits of the sub-block's four indices, then ls[s] in three bits, then the sign of delta.

Source: block_iq1_s in ggml-common.h, dequantize_row_iq1_s in ggml-quants.c.
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
LAYOUT = np.dtype([("d", "<u2"), ("qs", "u1", (N // 8,)), ("qh", "<u2", (N // 32,))])  # d: binary16 bits
SHAPE = Shape(
    sub=32,
    dim=8,
    low=np.float32(-1),
    step=np.float32(1),
    bend=np.float32(0),
    top=2,
    delta=IQ1_DELTA,
    per_delta=4,
    even=False,
    scale_top=7,
    unit=np.float32(1.0),
    first=np.float32(1.0),
    stride=np.float32(0.35),
)
BY_EFFORT = (SearchBudget(rounds=0, beside=1), SearchBudget(rounds=1, beside=1), SearchBudget(rounds=2, beside=11))


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


@kernel
def pack(found, blocks):
    d, ls, index, minus = found["d"], found["ls"], found["index"], found["minus"]
    for b in range(blocks.shape[0]):
        blocks["d"][b] = d[b]
        for s in range(8):
            bits = np.uint16(ls[b, s]) << np.uint16(12) | np.uint16(minus[b, 4 * s]) << np.uint16(15)
            for g in range(4):
                bits |= (index[b, 4 * s + g] >> np.uint16(8)) << np.uint16(3 * g)
                blocks["qs"][b, 4 * s + g] = index[b, 4 * s + g] & np.uint16(255)
            blocks["qh"][b, s] = bits


fit = grid_fit("IQ1_S", SHAPE, BY_EFFORT, LAYOUT, decode, pack)
encode = encoder(fit, pack)
