"""Tensor infos: name, shape, type and offset of every tensor as the header declares them, strictly checked."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.common.shapes import MAX_DIMS, MAX_INT64, check_shape
from requant.errors import BadInput, printable, quote
from requant.formats import FORMATS

if TYPE_CHECKING:
    from requant.container.cursor import Cursor
    from requant.formats.base import BlockFormat

MAX_NAME = 63  # bytes; GGML_MAX_NAME without the NUL
# types that ggml has or had, but not in files
_NOT_IN_FILES = {
    4: "Q4_2, removed from ggml",
    5: "Q4_3, removed from ggml",
    9: "Q8_1, only for activations",
    15: "Q8_K, only for activations",
    31: "Q4_0_4_4, removed from ggml",
    32: "Q4_0_4_8, removed from ggml",
    33: "Q4_0_8_8, removed from ggml",
    36: "IQ4_NL_4_4, removed from ggml",
    37: "IQ4_NL_4_8, removed from ggml",
    38: "IQ4_NL_8_8, removed from ggml",
}
FORK = "a type of ik_llama.cpp, which requant neither reads nor writes"
# enum ggml_type of the fork's ggml.h
_OF_THE_FORK = {
    first + i: name
    for first, names in {
        133: "Q6_0 IQ1_BN IQ2_BN Q8_K64 IQ2_K IQ3_K IQ4_K IQ5_K IQ6_K",
        144: "IQ4_KS IQ2_KS IQ4_KSS Q8_K16 Q8_K32 Q8_KR8 Q8_K128 Q8_KV IQ5_KS IQ2_KT IQ3_KT IQ4_KT IQ3_KS IQ2_KL",
        158: "IQ1_KT",
        202: "Q4_0_R8",
        206: "Q5_0_R4",
        208: "Q8_0_R8",
        210: "Q2_K_R4 Q3_K_R4 Q4_K_R4 Q5_K_R4 Q6_K_R4",
        216: "IQ2_XXS_R4 IQ2_XS_R4 IQ3_XXS_R4 IQ1_S_R4 IQ4_NL_R4 IQ3_S_R4 IQ2_S_R4 IQ4_XS_R8",
        229: "IQ1_M_R4 BF16_R16",
        233: "Q6_0_R4",
        335: "IQ2_BN_R4",
        337: "IQ2_K_R4 IQ3_K_R4 IQ4_K_R4 IQ5_K_R4",
        344: "IQ4_KS_R4",
        352: "IQ5_KS_R4",
        398: "Q8_KV_R8 Q8_K_R8",
    }.items()
    for i, name in enumerate(names.split())
}
FORK_TYPES = frozenset(_OF_THE_FORK.values())


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header declares it: `shape` in ggml's order (fastest first), `offset` from the data's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def format(self) -> BlockFormat:
        """Its ggml type."""
        return FORMATS[self.type_id]

    @property
    def n_weights(self) -> int:
        """All elements; 1 for a scalar, whose shape is ()."""
        return math.prod(self.shape)

    @property
    def n_per_row(self) -> int:
        """Elements of a row; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """All dimensions but the first multiplied; 0 for a tensor without elements, whatever its dimensions."""
        return math.prod(self.shape[1:]) if self.n_weights else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.format.n_bytes(self.n_per_row)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor without padding."""
        return self.format.n_bytes(self.n_weights)


def round_up(n_bytes: int, alignment: int) -> int:
    """Round `n_bytes` up to a multiple of `alignment`."""
    return n_bytes + -n_bytes % alignment


def read_infos(cursor: Cursor, n_tensors: int, alignment: int, warnings: list[str]) -> tuple[TensorInfo, ...]:
    """Read the `n_tensors` infos at the position; append a line to `warnings` for each harmless anomaly.

    Raises BadInput for anything that ggml would not read.
    """
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for i in range(n_tensors):
        name = _read_name(cursor, f"tensor {i}", warnings)
        if name in tensors:
            first = list(tensors).index(name)
            raise BadInput(cursor.path, f"tensor {quote(name)} appears twice, as tensor {first} and tensor {i}")
        what = f"tensor {quote(name)}"
        shape = _read_shape(cursor, what)
        if math.prod(shape) == 0 or not shape:
            warnings.append(f"{what} has {'no elements' if shape else 'no dimensions'}; it is copied as it is")
        type_id = _read_type(cursor, what, shape)
        offset = cursor.u64(f"{what}, offset")
        if offset != expected:
            raise BadInput(cursor.path, f"{what} has the wrong data offset", got=offset, limit=f"exactly {expected}")
        tensors[name] = info = TensorInfo(name, shape, type_id, offset)
        if info.n_bytes > MAX_INT64 - alignment - expected:
            raise BadInput(cursor.path, f"{what} is too large to address", got=f"{info.n_bytes} bytes")
        expected += round_up(info.n_bytes, alignment)
    return tuple(tensors.values())


def _read_name(cursor: Cursor, what: str, warnings: list[str]) -> str:
    name = decode_text(cursor, cursor.string(f"{what}, name", MAX_NAME), f"{what}, name")
    if not name:
        raise BadInput(cursor.path, f"{what} has an empty name")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise BadInput(cursor.path, f"{what}, name {quote(name)} contains control characters")
    if printable(name) != name:
        warnings.append(f"{what}, name {quote(name)} contains invisible characters")
    return name


def _read_shape(cursor: Cursor, what: str) -> tuple[int, ...]:
    n_dims = cursor.u32(f"{what}, number of dimensions")
    if n_dims > MAX_DIMS:
        raise BadInput(cursor.path, f"{what} has too many dimensions", got=n_dims, limit=MAX_DIMS)
    return check_shape(tuple(cursor.u64(f"{what}, dimension {i}") for i in range(n_dims)), what, cursor.path)


def _read_type(cursor: Cursor, what: str, shape: tuple[int, ...]) -> int:
    type_id = cursor.i32(f"{what}, type")
    if type_id not in FORMATS:
        known = _NOT_IN_FILES.get(type_id)
        hint = None if known or type_id < 0 else "a newer requant may know it"
        if (forked := _OF_THE_FORK.get(type_id)) is not None:
            known, hint = f"{forked}, {FORK}", "start from a model in types of llama.cpp"
        raise BadInput(
            cursor.path, f"{what} has an unknown type", got=f"{type_id}: {known}" if known else type_id, hint=hint
        )
    block = FORMATS[type_id]
    n_per_row = shape[0] if shape else 1
    if not block.divides(n_per_row):
        what = f"{what} of type {block.name} has rows that are not whole blocks"
        raise BadInput(cursor.path, what, got=n_per_row, limit=f"a multiple of {block.block_weights}")
    return type_id


def decode_text(cursor: Cursor, encoded: bytes, what: str) -> str:
    """Decode UTF-8 text. Raises BadInput."""
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise BadInput(cursor.path, f"{what} is not valid UTF-8", got=repr(encoded[:80])) from error
