"""Blocks to decode: random ones, and ones whose scales are what a sane encoder never writes."""

import numpy as np

from requant.formats.base import BlockFormat

# byte offsets of a block's binary16 fields (F16: the weight itself)
HALVES = {
    **dict.fromkeys(("F16", "Q4_0", "Q5_0", "Q8_0", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL"), (0,)),
    **dict.fromkeys(("IQ3_S", "IQ2_S", "IQ4_XS", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
# zeros, smallest and largest subnormals, smallest normal, largest, infinities, signalling and quiet NaN
HALF_EDGES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF)
BYTE_EDGES = (0x00, 0x01, 0x02, 0x07, 0x08, 0x7E, 0x7F, 0x80, 0xF7, 0xFE, 0xFF)
SANE_HALF = 0x2E66  # 0.1
SANE_BYTE = 0x38  # UE4M3: 1, E8M0: 2**-71


def with_scale(fmt: BlockFormat, block: np.ndarray, value: int) -> np.ndarray:
    """A copy of `block` (bytes) all of whose scales of the highest level have the bits `value`."""
    block = block.copy()
    if fmt.name == "IQ1_M":  # the upper four bits of four words
        for k in range(4):
            block[49 + 2 * k] = (block[49 + 2 * k] & 0x0F) | ((value >> (4 * k)) & 0x0F) << 4
    elif fmt.name in ("MXFP4", "NVFP4"):
        block[: 1 if fmt.name == "MXFP4" else 4] = value
    elif fmt.name in ("F32", "BF16"):
        block[-2:] = (value & 0xFF, value >> 8)
    else:
        for offset in HALVES[fmt.name]:
            block[offset : offset + 2] = (value & 0xFF, value >> 8)
    return block


def _has_byte_scales(fmt: BlockFormat) -> bool:
    return fmt.name in ("MXFP4", "NVFP4")


def random_blocks(fmt: BlockFormat, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, block_bytes): any bytes at all."""
    return rng.integers(0, 256, (n, fmt.block_bytes), dtype=np.uint8)


def sane_blocks(fmt: BlockFormat, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, block_bytes): random codes under an ordinary scale."""
    scale = SANE_BYTE if _has_byte_scales(fmt) else SANE_HALF
    return np.stack([with_scale(fmt, block, scale) for block in random_blocks(fmt, n, rng)])


def edge_blocks(fmt: BlockFormat, rng: np.random.Generator) -> np.ndarray:
    """(n, block_bytes): all zeros, all ones, and random codes under every edge scale."""
    values = BYTE_EDGES if _has_byte_scales(fmt) else HALF_EDGES
    edges = [with_scale(fmt, random_blocks(fmt, 1, rng)[0], value) for value in values]
    return np.stack([np.zeros(fmt.block_bytes, np.uint8), np.full(fmt.block_bytes, 0xFF, np.uint8), *edges])
