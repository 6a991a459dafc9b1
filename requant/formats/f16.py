"""F16: half precision (binary16), no blocks; 16 bits per weight."""

import numpy as np

from requant.formats.bits import float_to_half, half_to_float
from requant.jit import kernel

N = 1
LAYOUT = np.dtype([("x", "<u2")])


@kernel
def decode(blocks, out):
    for b in range(blocks.shape[0]):
        out[b, 0] = half_to_float(blocks["x"][b])


@kernel
def encode(x, importance, blocks):
    for b in range(blocks.shape[0]):
        blocks["x"][b] = float_to_half(x[b, 0])
