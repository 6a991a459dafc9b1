"""F32: single precision, no blocks; 32 bits per weight."""

import numpy as np

from requant.formats.jit import kernel

N = 1
LAYOUT = np.dtype("<f4")


@kernel
def decode(blocks, out):
    flat = out.reshape(-1)
    for b in range(blocks.shape[0]):
        flat[b] = blocks[b]


@kernel
def encode(x, importance, blocks, effort):
    flat = x.reshape(-1)
    for b in range(blocks.shape[0]):
        blocks[b] = flat[b]
