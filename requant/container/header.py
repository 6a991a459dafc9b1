"""The strict parser of a GGUF header: every count, length and offset is checked against the file before it is used.

It refuses what ggml's own reader refuses and, on purpose, a little more (empty or control-character names, huge
alignments, tensor data that is not there). Format: gguf.cpp and docs/gguf.md of ggml.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from requant.common.files import open_regular
from requant.container.cursor import Cursor
from requant.container.infos import TensorInfo, decode_text, read_infos, round_up
from requant.container.metadata import (
    ARRAY,
    BOOL,
    FIXED_BYTES,
    MAX_KEY,
    STRING,
    TYPE_NAMES,
    WIDTHS,
    Metadata,
    Value,
    read_alignment,
)
from requant.container.signature import not_gguf_error, version_error
from requant.errors import BadInput, quote

__all__ = ["Header", "TensorInfo", "parse_header", "read_header"]

MAX_KEYS, MAX_TENSORS = 65_536, 1_048_576
_MIN_PAIR, _MIN_TENSOR = 13, 25  # bytes: nothing shorter can be written


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: `data_start`, `data_size` (padded) and `file_size` in bytes, `sha256` of all before the data.

    padding: the bytes between the last info and the data.
    """

    version: int
    alignment: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_start: int
    data_size: int
    file_size: int
    sha256: str
    warnings: tuple[str, ...]
    padding: bytes

    @property
    def trailing_bytes(self) -> int:
        """Bytes at the end of the file that belong to no tensor."""
        return max(0, self.file_size - self.data_start - self.data_size)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the last tensor's padding that the file does not have; readers do without them."""
        return max(0, self.data_start + self.data_size - self.file_size)


def parse_header(path: Path) -> Header:
    """Parse the header of the GGUF file at `path`.

    Raises BadInput for anything that is no complete little-endian GGUF of version 2 or 3, InputOutputError where
    the system fails to read it.
    """
    descriptor = open_regular(Path(path))
    try:
        return read_header(path, descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path, descriptor: int) -> Header:
    """Parse the header of an open file as `parse_header` does."""
    cursor = Cursor(str(path), descriptor, os.fstat(descriptor).st_size)
    warnings: list[str] = []
    version, n_tensors, n_pairs = _read_fixed(cursor)
    metadata = Metadata(cursor.path, _read_pairs(cursor, n_pairs, warnings))
    alignment = read_alignment(metadata)
    tensors = read_infos(cursor, n_tensors, alignment, warnings)
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
        cursor.since(cursor.position - padding),
    )


def _read_fixed(cursor: Cursor) -> tuple[int, int, int]:
    """Read the version, the number of tensors and the number of pairs."""
    first = min(FIXED_BYTES, cursor.file_size)
    cursor.require(first, "the header")
    if first < FIXED_BYTES or cursor.buffer[:4] != b"GGUF":
        raise not_gguf_error(cursor.path, bytes(cursor.buffer[:64]), cursor.file_size)
    cursor.position = 4
    version = cursor.u32("the version")
    if version not in (2, 3):
        raise version_error(cursor.path, version)
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
        key = decode_text(cursor, encoded, f"key {i}")
        if not key or "\0" in key:
            raise BadInput(cursor.path, f"key {i} {'contains a NUL' if key else 'is empty'}")
        if key in pairs:
            first = list(pairs).index(key)
            raise BadInput(cursor.path, f"key {quote(key)} appears twice, as key {first} and key {i}")
        pairs[key] = value = _read_value(cursor, f"key {quote(key)}")
        if _has_odd_bool(value):
            warnings.append(f"key {quote(key)} holds a bool that is neither 0 nor 1; its bytes are kept")
    return pairs


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


def _has_odd_bool(value: Value) -> bool:
    if value.type_id == BOOL:
        return value.raw[0] > 1
    return value.type_name == "arr_bool" and bool(value.raw[12:].translate(None, b"\0\1"))


def _check_data(cursor: Cursor, tensors: tuple[TensorInfo, ...], alignment: int) -> int:
    """Return the padded bytes of all tensors. Raises BadInput where the file ends before the last one does."""
    if not tensors:
        return 0
    last = tensors[-1]
    missing = last.offset + last.n_bytes - cursor.remaining
    if missing > 0:
        whole = [t for t in tensors if t.offset + t.n_bytes <= cursor.remaining]
        until = f"the last whole tensor is {quote(whole[-1].name)}" if whole else "no tensor is whole"
        raise BadInput(
            cursor.path,
            f"is truncated: {missing} bytes of tensor data are missing, {until}",
            got=f"{cursor.file_size} bytes",
            limit=f"{cursor.file_size + missing} bytes",
            hint="an interrupted download or copy; fetch it again",
        )
    return last.offset + round_up(last.n_bytes, alignment)


def combine_sha256(digests: Sequence[str]) -> str:
    """Combine the digests of the headers of a model's files, in hex; the digest of a single file stays as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
