"""The strict parser of a GGUF header: every count, length and offset is checked against the file before it is used.

It refuses what ggml's own reader refuses and, on purpose, a little more (empty or control-character names, huge
alignments, tensor data that is not there). Format: gguf.cpp and docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from requant.container.cursor import Cursor
from requant.container.files import open_regular
from requant.container.metadata import (
    ARRAY,
    BOOL,
    MAX_KEY,
    STRING,
    TYPE_NAMES,
    WIDTHS,
    Metadata,
    Value,
    alignment_of,
)
from requant.container.signature import not_gguf, unsupported_version
from requant.errors import BadInput, printable
from requant.formats import FORMATS
from requant.formats.base import BlockFormat

MAX_KEYS, MAX_TENSORS = 65_536, 1_048_576
MAX_NAME = 63  # bytes; GGML_MAX_NAME without the NUL
MAX_DIMS = 4
_FIXED = 24  # bytes of magic, version and the two counts
_MIN_PAIR, _MIN_TENSOR = 13, 25  # bytes: nothing shorter can be written
_MAX_INT64 = 2**63 - 1
# types that ggml knows or knew, but not in files
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
        """All dimensions but the first multiplied."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.format.n_bytes(self.n_per_row)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor without padding."""
        return self.format.n_bytes(self.n_weights)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: `data_start`, `data_size` (padded) and `file_size` in bytes, `sha256` of all before the data."""

    version: int
    alignment: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_start: int
    data_size: int
    file_size: int
    sha256: str
    warnings: tuple[str, ...]

    @property
    def trailing_bytes(self) -> int:
        """Bytes at the end of the file that belong to no tensor."""
        return max(0, self.file_size - self.data_start - self.data_size)


def parse_header(path: Path) -> Header:
    """The header of the GGUF file at `path`.

    Raises BadInput for anything that is no complete little-endian GGUF of version 2 or 3, InputOutputError where
    the system fails to read it.
    """
    descriptor = open_regular(path)
    try:
        return read_header(path, descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path, descriptor: int) -> Header:
    """As `parse_header`, from an open descriptor."""
    cursor = Cursor(str(path), descriptor, os.fstat(descriptor).st_size)
    warnings: list[str] = []
    version, n_tensors, n_pairs = _read_fixed(cursor)
    metadata = Metadata(cursor.path, _read_pairs(cursor, n_pairs, warnings))
    alignment = alignment_of(metadata)
    tensors = _read_tensors(cursor, n_tensors, alignment, warnings)
    padding = -cursor.position % alignment
    if not tensors:  # ggml wants no padding where no data follows
        padding = min(padding, cursor.remaining)
    cursor.skip(padding, "the padding before the tensor data")
    data_size = _check_data(cursor, tensors, alignment)
    return Header(
        version,
        alignment,
        metadata,
        tensors,
        cursor.position,
        data_size,
        cursor.file_size,
        cursor.sha256(),
        tuple(warnings),
    )


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return n_bytes + -n_bytes % alignment


def _read_fixed(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors and number of pairs."""
    first = min(_FIXED, cursor.file_size)
    cursor.require(first, "the header")
    if first < _FIXED or cursor.buffer[:4] != b"GGUF":
        raise not_gguf(cursor.path, bytes(cursor.buffer[:64]), cursor.file_size)
    cursor.position = 4
    version = cursor.u32("the version")
    if version not in (2, 3):
        raise unsupported_version(cursor.path, version)
    n_tensors, n_pairs = cursor.u64("the number of tensors"), cursor.u64("the number of keys")
    for what, n, least, most in (
        ("tensors", n_tensors, _MIN_TENSOR, MAX_TENSORS),
        ("keys", n_pairs, _MIN_PAIR, MAX_KEYS),
    ):
        limit = min(cursor.remaining // least, most)
        if n > limit:
            raise BadInput(cursor.path, f"declares more {what} than it can hold", got=n, limit=limit)
    return version, n_tensors, n_pairs


def _read_pairs(cursor: Cursor, n_pairs: int, warnings: list[str]) -> dict[str, Value]:
    pairs: dict[str, Value] = {}
    for i in range(n_pairs):
        encoded = cursor.string(f"key {i}", MAX_KEY)
        key = _text(cursor, encoded, f"key {i}")
        if not key or "\0" in key:
            raise BadInput(cursor.path, f"key {i} {'contains a NUL' if key else 'is empty'}")
        if key in pairs:
            first = list(pairs).index(key)
            raise BadInput(cursor.path, f"key '{printable(key)}' appears twice, as key {first} and key {i}")
        pairs[key] = value = _read_value(cursor, f"key '{printable(key)}'")
        if _odd_bool(value):
            warnings.append(f"key '{printable(key)}' holds a bool that is neither 0 nor 1; its bytes are kept")
    return pairs


def _text(cursor: Cursor, encoded: bytes, what: str) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise BadInput(cursor.path, f"{what} is not valid UTF-8", got=repr(encoded[:80])) from error


def _read_value(cursor: Cursor, what: str) -> Value:
    type_id = cursor.i32(f"{what}, type")
    start = cursor.position
    if type_id == ARRAY:
        _skip_array(cursor, what)
    elif type_id == STRING:
        cursor.skip(cursor.u64(f"{what}, length"), what)
    else:
        _check_type(cursor, type_id, what)
        cursor.skip(WIDTHS[type_id], what)
    return Value(type_id, cursor.since(start))


def _skip_array(cursor: Cursor, what: str) -> None:
    item_type, count = cursor.i32(f"{what}, item type"), cursor.u64(f"{what}, count")
    if item_type == ARRAY:
        raise BadInput(cursor.path, f"{what} is an array of arrays, which GGUF files do not hold")
    _check_type(cursor, item_type, f"{what}, item")
    if item_type == STRING:
        cursor.skip_strings(count, what)
    else:
        cursor.skip(count * WIDTHS[item_type], what)


def _check_type(cursor: Cursor, type_id: int, what: str) -> None:
    if type_id not in TYPE_NAMES:
        raise BadInput(cursor.path, f"{what} has an unknown value type", got=type_id, limit=max(TYPE_NAMES))


def _odd_bool(value: Value) -> bool:
    if value.type_id == BOOL:
        return value.raw[0] > 1
    return value.type_name == "arr_bool" and bool(value.raw[12:].translate(None, b"\0\1"))


def _read_tensors(cursor: Cursor, n_tensors: int, alignment: int, warnings: list[str]) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for i in range(n_tensors):
        name = _read_name(cursor, f"tensor {i}", warnings)
        if name in tensors:
            first = list(tensors).index(name)
            raise BadInput(cursor.path, f"tensor '{printable(name)}' appears twice, as tensor {first} and tensor {i}")
        what = f"tensor '{printable(name)}'"
        shape = _read_shape(cursor, what)
        if math.prod(shape) == 0 or not shape:
            warnings.append(f"{what} has {'no elements' if shape else 'no dimensions'}; it is copied as it is")
        type_id = _read_type(cursor, what, shape)
        offset = cursor.u64(f"{what}, offset")
        if offset != expected:
            raise BadInput(cursor.path, f"{what} has the wrong data offset", got=offset, limit=f"exactly {expected}")
        tensors[name] = info = TensorInfo(name, shape, type_id, offset)
        if info.n_bytes > _MAX_INT64 - alignment - expected:
            raise BadInput(cursor.path, f"{what} is too large to address", got=f"{info.n_bytes} bytes")
        expected += padded(info.n_bytes, alignment)
    return tuple(tensors.values())


def _read_name(cursor: Cursor, what: str, warnings: list[str]) -> str:
    name = _text(cursor, cursor.string(f"{what}, name", MAX_NAME), f"{what}, name")
    if not name:
        raise BadInput(cursor.path, f"{what} has an empty name")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise BadInput(cursor.path, f"{what}, name '{printable(name)}' contains control characters")
    if not name.isprintable():
        warnings.append(f"{what}, name '{printable(name)}' contains invisible characters")
    return name


def _read_shape(cursor: Cursor, what: str) -> tuple[int, ...]:
    n_dims = cursor.u32(f"{what}, number of dimensions")
    if n_dims > MAX_DIMS:
        raise BadInput(cursor.path, f"{what} has too many dimensions", got=n_dims, limit=MAX_DIMS)
    shape = tuple(cursor.u64(f"{what}, dimension {i}") for i in range(n_dims))
    n_weights = 1
    for length in shape:
        # ggml skips the zeros in this product but not what stands before them
        n_weights *= length
        if max(length, n_weights) > _MAX_INT64:
            raise BadInput(cursor.path, f"{what} has too many elements", got=" x ".join(map(str, shape)))
    return shape


def _read_type(cursor: Cursor, what: str, shape: tuple[int, ...]) -> int:
    type_id = cursor.i32(f"{what}, type")
    if type_id not in FORMATS:
        known = _NOT_IN_FILES.get(type_id)
        hint = None if known or type_id < 0 else "a newer requant may know it"
        raise BadInput(
            cursor.path, f"{what} has an unknown type", got=f"{type_id}: {known}" if known else type_id, hint=hint
        )
    block = FORMATS[type_id]
    n_per_row = shape[0] if shape else 1
    if not block.divides(n_per_row):
        what = f"{what} of type {block.name} has rows that are not whole blocks"
        raise BadInput(cursor.path, what, got=n_per_row, limit=f"a multiple of {block.block_weights}")
    return type_id


def _check_data(cursor: Cursor, tensors: tuple[TensorInfo, ...], alignment: int) -> int:
    """The padded bytes of all tensors; raises BadInput where the file ends before the last one does."""
    if not tensors:
        return 0
    last = tensors[-1]
    missing = last.offset + last.n_bytes - cursor.remaining
    if missing > 0:
        whole = [t for t in tensors if t.offset + t.n_bytes <= cursor.remaining]
        until = f"the last whole tensor is '{printable(whole[-1].name)}'" if whole else "no tensor is whole"
        raise BadInput(
            cursor.path,
            f"is truncated: {missing} bytes of tensor data are missing, {until}",
            got=f"{cursor.file_size} bytes",
            limit=f"{cursor.file_size + missing} bytes",
            hint="an interrupted download or copy; fetch it again",
        )
    return last.offset + padded(last.n_bytes, alignment)
