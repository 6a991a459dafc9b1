"""BF16: the upper half of a single (bfloat16), no blocks; 16 bits per weight."""

import numpy as np

from requant.formats.bits import bfloat_to_float, float_to_bfloat
from requant.jit import kernel

N = 1
LAYOUT = np.dtype([("x", "<u2")])


@kernel
def decode(blocks, out):
    for b in range(blocks.shape[0]):
        out[b, 0] = bfloat_to_float(blocks["x"][b])


@kernel
def encode(x, importance, blocks):
    for b in range(blocks.shape[0]):
        blocks["x"][b] = float_to_bfloat(x[b, 0])
