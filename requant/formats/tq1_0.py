"""TQ1_0: 256 ternary weights, five to a byte, and one half-precision scale; 1.6875 bits per weight.

    x = d * (trit - 1)

A byte is a base-3 fraction scaled to 256: its n-th trit is the integer part of 3 * frac(byte * 3**n / 256).
qs[0:32] gives weights 0-159 (trit n of byte m is weight 32n + m), qs[32:48] weights 160-239 (16n + m),
and qh, of which only four trits are used, weights 240-255 (4n + m).

Source: block_tq1_0 in ggml-common.h, dequantize_row_tq1_0 in ggml-quants.c.
"""

import numpy as np

from requant.formats.bits import half_to_float
from requant.formats.encoders.levels import encode_ternary
from requant.formats.jit import kernel

N = 256
LAYOUT = np.dtype([("qs", "u1", (48,)), ("qh", "u1", (4,)), ("d", "<u2")])  # d: binary16 bits


@kernel
def _trit(byte, power):
    """Return the trit of `byte` that 3**n = `power` brings to the front, less 1."""
    fraction = (np.int32(byte) * power) & np.int32(0xFF)
    return np.float32((fraction * np.int32(3)) >> np.int32(8)) - np.float32(1.0)


@kernel
def decode(blocks, out):
    d, qs, qh = blocks["d"], blocks["qs"], blocks["qh"]
    group = out.shape[1] // 8  # 32; a literal would be unrolled and then not vectorized, a quarter slower
    for b in range(blocks.shape[0]):
        scale = half_to_float(d[b])
        power = np.int32(1)
        for n in range(5):
            for m in range(group):
                out[b, 32 * n + m] = scale * _trit(qs[b, m], power)
            for m in range(group // 2):
                out[b, 160 + 16 * n + m] = scale * _trit(qs[b, 32 + m], power)
            if n < 4:
                for m in range(4):
                    out[b, 240 + 4 * n + m] = scale * _trit(qh[b, m], power)
            power *= np.int32(3)


def encode(x, importance, blocks, effort):
    blocks["d"], codes = encode_ternary(x, importance)
    _pack(codes, blocks)


@kernel
def _byte(codes, b, first, step, n):
    """Return `n` trits, `step` apart, as a byte: 256 / 243 times their number in base 3, rounded up."""
    number = np.uint32(0)
    for k in range(5):
        trit = np.uint32(codes[b, first + step * k]) if k < n else np.uint32(0)
        number = np.uint32(number * np.uint32(3) + trit)
    return np.uint8((number * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@kernel
def _pack(codes, blocks):
    qs, qh = blocks["qs"], blocks["qh"]
    group = codes.shape[1] // 8  # 32, as in decode
    for b in range(codes.shape[0]):
        for m in range(group):
            qs[b, m] = _byte(codes, b, m, 32, 5)
        for m in range(group // 2):
            qs[b, 32 + m] = _byte(codes, b, 160 + m, 16, 5)
        for m in range(4):
            qh[b, m] = _byte(codes, b, 240 + m, 4, 4)
