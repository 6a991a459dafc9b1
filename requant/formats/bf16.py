"""BF16: the upper half of a single (bfloat16), no blocks; 16 bits per weight."""

import numpy as np

from requant.formats.bits import bfloat_to_float, float_to_bfloat
from requant.formats.jit import kernel

N = 1
LAYOUT = np.dtype("<u2")


@kernel
def decode(blocks, out):
    flat = out.reshape(-1)
    for b in range(blocks.shape[0]):
        flat[b] = bfloat_to_float(blocks[b])


@kernel
def encode(x, importance, blocks, effort):
    flat = x.reshape(-1)
    for b in range(blocks.shape[0]):
        blocks[b] = float_to_bfloat(flat[b])
