"""The packed sub-block scales that several K formats share.

Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minima in 12 bytes: bytes 0-3 hold scales 0-3 and bytes 4-7
minima 0-3 in their low six bits; bytes 8-11 hold scales 4-7 (low nibbles of them) and minima 4-7 (low nibbles, in
the high half), whose upper two bits sit on top of bytes 0-3 and 4-7.
Source: get_scale_min_k4 in ggml-quants.c.
"""

import numpy as np

from requant.formats.jit import kernel


@kernel
def unpack_factors(scales, b, s, d, dmin):
    """Return d times the scale and dmin times the minimum of sub-block `s` of block `b`; scales: (n, 12) uint8."""
    if s < 4:
        scale, low = scales[b, s] & np.uint8(63), scales[b, s + 4] & np.uint8(63)
    else:
        scale = (scales[b, s + 4] & np.uint8(15)) | ((scales[b, s - 4] >> np.uint8(6)) << np.uint8(4))
        low = (scales[b, s + 4] >> np.uint8(4)) | ((scales[b, s] >> np.uint8(6)) << np.uint8(4))
    return d * np.float32(scale), dmin * np.float32(low)


@kernel
def pack_scales(scales, mins, b, packed):
    """scales, mins: (n, 8) uint8, 0..63, those of block `b` -> packed[b], (n, 12) uint8."""
    for s in range(4):
        high_scale, high_min = scales[b, s + 4], mins[b, s + 4]
        packed[b, s] = scales[b, s] | (high_scale >> np.uint8(4)) << np.uint8(6)
        packed[b, s + 4] = mins[b, s] | (high_min >> np.uint8(4)) << np.uint8(6)
        packed[b, s + 8] = (high_scale & np.uint8(15)) | (high_min & np.uint8(15)) << np.uint8(4)
