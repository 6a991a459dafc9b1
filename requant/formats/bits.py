"""Small floats as integers (binary16, bfloat16, E8M0, UE4M3) and the roundings that the formats share.

Integer arithmetic throughout: hardware conversions are missing on some targets and flush subnormals on others.
"""

import numpy as np

from requant.formats.jit import kernel

LARGEST_HALF = np.float32(65504.0)


@kernel
def bits_to_float(bits):
    """The float32 whose bits are `bits` (uint32)."""
    return np.uint32(bits).view(np.float32)


@kernel
def half_to_float(h):
    """binary16 bits -> float32, exact; a NaN keeps its payload and becomes quiet. No branch, so loops vectorize."""
    bits = np.uint32(h) << np.uint32(16)
    rest = np.uint32(bits << np.uint32(1))  # exponent from bit 27 on
    normal = bits_to_float((rest >> np.uint32(4)) + np.uint32(0x70000000)) * np.float32(2.0**-112)
    # a subnormal's mantissa, as the low bits of a float of 0.5 and more
    subnormal = bits_to_float((rest >> np.uint32(17)) | np.uint32(0x3F000000)) - np.float32(0.5)
    size = subnormal if rest < np.uint32(0x08000000) else normal
    return bits_to_float((bits & np.uint32(0x80000000)) | np.float32(size).view(np.uint32))


@kernel
def float_to_half(x):
    """float32 -> binary16 bits, to nearest, ties to even; overflows to infinity, NaN becomes a quiet NaN."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    rest = bits & np.uint32(0x7FFFFFFF)
    if rest > np.uint32(0x7F800000):
        return sign | np.uint16(0x7E00)
    if rest >= np.uint32(0x47800000):
        return sign | np.uint16(0x7C00)
    if rest < np.uint32(0x38800000):  # subnormal: adding 0.5 leaves the value in the low bits, rounded to even
        shifted = np.float32(bits_to_float(rest) + np.float32(0.5)).view(np.uint32)
        return sign | np.uint16(shifted - np.uint32(0x3F000000))
    odd = (rest >> np.uint32(13)) & np.uint32(1)
    return sign | np.uint16((rest - np.uint32(0x37FFF001) + odd) >> np.uint32(13))


@kernel
def round_to_half(x):
    """`x` rounded to half precision; what is too large becomes the largest half, never infinity."""
    return half_to_float(float_to_half(min(max(x, -LARGEST_HALF), LARGEST_HALF)))


@kernel
def bfloat_to_float(b):
    """bfloat16 bits -> float32, exact."""
    return bits_to_float(np.uint32(b) << np.uint32(16))


@kernel
def float_to_bfloat(x):
    """float32 -> bfloat16 bits, to nearest, ties to even; NaN stays NaN (made quiet)."""
    bits = np.float32(x).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def e8m0_half_to_float(e):
    """E8M0 exponent byte -> half of its value, 2**(e - 128), as ggml's FP4 codes are doubled."""
    e = np.uint32(e)
    if e < np.uint32(2):
        return bits_to_float(np.uint32(0x00200000) << e)
    return bits_to_float((e - np.uint32(1)) << np.uint32(23))


@kernel
def ue4m3_half_to_float(e):
    """UE4M3 scale byte -> half of its value; 0x7F (a NaN) reads as 0, else bit 7 is ignored, as in ggml."""
    e = np.uint32(e)
    if e == np.uint32(0) or e == np.uint32(0x7F):
        return np.float32(0.0)
    exponent, mantissa = (e >> np.uint32(3)) & np.uint32(15), e & np.uint32(7)
    if exponent == np.uint32(0):
        return np.float32(mantissa) * np.float32(2.0**-10)
    return bits_to_float(((exponent + np.uint32(119)) << np.uint32(23)) | (mantissa << np.uint32(20)))


@kernel
def floor_e8m0(x):
    """E8M0 exponent byte of the highest power of two that is not above `x` >= 0; 0 for what lies below 2**-126."""
    return np.float32(x).view(np.uint32) >> np.uint32(23)


@kernel
def nearest_ue4m3_half(x):
    """UE4M3 byte of which half the value is nearest to `x` >= 0, ties to even, 126 (of 448) at most.

    ggml's own encoder makes 126 of everything from 256 on.
    """
    bits = np.float32(x).view(np.uint32)
    if bits < np.uint32(0x3C000000):  # 2**-7, half of the smallest normal scale
        return np.uint32(np.rint(np.float32(x) * np.float32(2.0**10)))
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
    return np.uint32(min(rounded - np.uint32(119 * 8), np.uint32(126)))
