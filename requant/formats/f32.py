"""F32: single precision, no blocks; 32 bits per weight."""

import numpy as np

from requant.jit import kernel

N = 1
LAYOUT = np.dtype([("x", "<f4")])


@kernel
def decode(blocks, out):
    for b in range(blocks.shape[0]):
        out[b, 0] = blocks["x"][b]


@kernel
def encode(x, importance, blocks):
    for b in range(blocks.shape[0]):
        blocks["x"][b] = x[b, 0]
