"""FORMATS, the table of every ggml type that a file may hold; the kernels of a type are in the module of its name."""

import hashlib

from requant.formats.base import BlockFormat, Effort

__all__ = ["FORMATS", "GGML", "KERNELS", "BlockFormat", "Effort", "by_name", "table_digest"]

KERNELS = 1  # version of the encoders; raised when the same weights become other bytes: scripts/make/make_encodings.py
GGML = "0.20.2"  # the version of ggml whose types these are

FORMATS: dict[int, BlockFormat] = {
    f.type_id: f
    for f in (
        BlockFormat("F32", 0, 1, 4, can_encode=True),
        BlockFormat("F16", 1, 1, 2, can_encode=True, gaussian_rmse=0.00021),
        BlockFormat("Q4_0", 2, 32, 18, can_encode=True, gaussian_rmse=0.083),
        BlockFormat("Q4_1", 3, 32, 20, can_encode=True, gaussian_rmse=0.0743),
        BlockFormat("Q5_0", 6, 32, 22, can_encode=True, gaussian_rmse=0.0409),
        BlockFormat("Q5_1", 7, 32, 24, can_encode=True, gaussian_rmse=0.0363),
        BlockFormat("Q8_0", 8, 32, 34, can_encode=True, gaussian_rmse=0.00493),
        BlockFormat("Q2_K", 10, 256, 84, can_encode=True, gaussian_rmse=0.266),
        BlockFormat("Q3_K", 11, 256, 110, can_encode=True, gaussian_rmse=0.144),
        BlockFormat("Q4_K", 12, 256, 144, can_encode=True, gaussian_rmse=0.0701),
        BlockFormat("Q5_K", 13, 256, 176, can_encode=True, gaussian_rmse=0.0346),
        BlockFormat("Q6_K", 14, 256, 210, can_encode=True, gaussian_rmse=0.0167),
        BlockFormat("IQ2_XXS", 16, 256, 66, can_encode=True, gaussian_rmse=0.333),
        BlockFormat("IQ2_XS", 17, 256, 74, can_encode=True, gaussian_rmse=0.289),
        BlockFormat("IQ3_XXS", 18, 256, 98, can_encode=True, gaussian_rmse=0.178),
        BlockFormat("IQ1_S", 19, 256, 50, can_encode=True, gaussian_rmse=0.453),
        BlockFormat("IQ4_NL", 20, 32, 18, can_encode=True, gaussian_rmse=0.0733),
        BlockFormat("IQ3_S", 21, 256, 110, can_encode=True, gaussian_rmse=0.13),
        BlockFormat("IQ2_S", 22, 256, 82, can_encode=True, gaussian_rmse=0.241),
        BlockFormat("IQ4_XS", 23, 256, 136, can_encode=True, gaussian_rmse=0.0738),
        BlockFormat("I8", 24, 1, 1, can_decode=False),
        BlockFormat("I16", 25, 1, 2, can_decode=False),
        BlockFormat("I32", 26, 1, 4, can_decode=False),
        BlockFormat("I64", 27, 1, 8, can_decode=False),
        BlockFormat("F64", 28, 1, 8, can_decode=False),
        BlockFormat("IQ1_M", 29, 256, 56, can_encode=True, gaussian_rmse=0.42),
        BlockFormat("BF16", 30, 1, 2, can_encode=True, gaussian_rmse=0.0017),
        BlockFormat("TQ1_0", 34, 256, 54, can_encode=True, gaussian_rmse=0.435),
        BlockFormat("TQ2_0", 35, 256, 66, can_encode=True, gaussian_rmse=0.435),
        BlockFormat("MXFP4", 39, 32, 17, can_encode=True, gaussian_rmse=0.111),
        BlockFormat("NVFP4", 40, 64, 36, can_encode=True, gaussian_rmse=0.0816),
        BlockFormat("Q1_0", 41, 128, 18, can_encode=True, gaussian_rmse=0.6),
        BlockFormat("Q2_0", 42, 64, 18, can_encode=True, gaussian_rmse=0.352),
    )
}

_BY_NAME = {f.name: f for f in FORMATS.values()}


def by_name(name: str) -> BlockFormat | None:
    """Return the format called `name`, in upper or lower case; None if there is none."""
    return _BY_NAME.get(name.upper())


def format_of(name: str) -> BlockFormat:
    """Return the format of a type name that was checked before; an unknown name is a bug of ours."""
    fmt = by_name(name)
    assert fmt is not None, name
    return fmt


def by_bits(name: str) -> tuple[float, str]:
    """Return the key that types are sorted by: bits per weight, then the name."""
    return format_of(name).bpw, name


def table_digest() -> str:
    """Return a hash over names, ids, blocks and abilities; equal where two versions know the same types."""
    rows = [(f.name, f.type_id, f.block_weights, f.block_bytes, f.can_decode, f.can_encode) for f in FORMATS.values()]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
