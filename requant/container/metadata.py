"""Metadata: the header's key-value pairs as raw bytes, decoded on demand and edited key by key.

A value that is not edited keeps its exact bytes, so empty strings, array types and invalid UTF-8 survive a rewrite.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from requant.errors import BadInput, UsageError, printable, quote

# GGUF's value types: name -> (id, struct character); the ids are gguf_type in ggml's gguf.h
SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "B"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
BOOL, STRING, ARRAY = 7, 8, 9
WIDTHS = {type_id: struct.calcsize("<" + char) for type_id, char in SCALARS.values()}  # bytes
TYPE_NAMES = {type_id: name for name, (type_id, _) in SCALARS.items()} | {STRING: "str", ARRAY: "arr"}
_CHARS = dict(SCALARS.values())

FIXED_BYTES = 24  # of a header: magic, version and the two counts
ARRAY_HEAD = 12  # bytes of an array's item type and count
DEFAULT_ALIGNMENT = 32  # bytes; GGUF_DEFAULT_ALIGNMENT
MAX_ALIGNMENT = 2**20
MAX_KEY = 65_535  # bytes; the specification's limit


@dataclass(frozen=True, slots=True)
class Value:
    """A value: GGUF's type id and the bytes after it, verbatim (an array's include its item type and count)."""

    type_id: int
    raw: bytes

    @property
    def type_name(self) -> str:
        """The name of the type, as `with_values` takes it: `u32`, `str`, `arr_f32`."""
        if self.type_id != ARRAY:
            return TYPE_NAMES[self.type_id]
        return f"arr_{TYPE_NAMES[struct.unpack_from('<I', self.raw)[0]]}"

    @property
    def array_length(self) -> int | None:
        """Number of items of an array, without decoding them; None for anything else."""
        return int(struct.unpack_from("<Q", self.raw, 4)[0]) if self.type_id == ARRAY else None


@dataclass(frozen=True, slots=True)
class Metadata:
    """The pairs in file order; `path` is the file they came from, for error messages."""

    path: str
    values: dict[str, Value]

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def keys(self) -> Iterable[str]:
        """The keys, in file order."""
        return self.values.keys()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as int, float, bool, str or a list of them; `default` where the key is missing.

        Bytes of a string that are not UTF-8 become surrogate escapes, which `with_values` turns back.
        """
        return decode_value(self.values[key]) if key in self.values else default

    def get_int(self, key: str, default: int | None = None) -> int | None:
        """The integer, or `default` where the key is missing; raises BadInput for another type."""
        value = self.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong_type(key, "an integer")
        return value

    def get_float(self, key: str, default: float | None = None) -> float | None:
        """The number as a float, or `default` where the key is missing; raises BadInput for another type."""
        value = self.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._wrong_type(key, "a number")
        return None if value is None else float(value)

    def get_str(self, key: str, default: str | None = None) -> str | None:
        """The string, or `default` where the key is missing; raises BadInput for another type."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return value

    def get_bool(self, key: str, default: bool | None = None) -> bool | None:
        """The truth value, or `default` where the key is missing; raises BadInput for another type."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self._wrong_type(key, "a bool")
        return value

    def get_list(self, key: str, default: list[Any] | None = None) -> list[Any] | None:
        """The array's items, or `default` where the key is missing; raises BadInput for another type."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, list):
            raise self._wrong_type(key, "an array")
        return value

    def array_length(self, key: str) -> int | None:
        """Number of items without decoding them; None where the key is missing or holds no array."""
        return self.values[key].array_length if key in self.values else None

    def _wrong_type(self, key: str, wanted: str) -> BadInput:
        return BadInput(self.path, f"key {quote(key)} must be {wanted}", got=self.values[key].type_name)

    def with_values(self, changes: Mapping[str, tuple[str, Any] | None]) -> Metadata:
        """Return a copy where each (type name, value) of `changes` is set or appended, and None removes the key.

        Type names are those of SCALARS, `str`, and `arr_` with one of these. All other pairs keep bytes and order.
        Raises UsageError for a key or value that cannot be written.
        """
        edited = dict(self.values)
        for key, change in changes.items():
            if change is None:
                edited.pop(key, None)
            else:
                _check_key(key)
                edited[key] = encode_value(key, *change)
        return Metadata(self.path, edited)

    def find_items(self, key: str) -> tuple[int, int]:
        """Return where the items of the array `key` begin and end in a header; (0, 0) where there is no such array."""
        position = FIXED_BYTES
        for name, value in self.values.items():
            position += len(_encode_string(name)) + 4 + len(value.raw)
            if name == key and value.type_id == ARRAY:
                return position - len(value.raw) + ARRAY_HEAD, position
        return 0, 0

    def encode(self) -> bytes:
        """Encode the whole key-value section of a header."""
        parts = []
        for key, value in self.values.items():
            parts += [_encode_string(key), struct.pack("<I", value.type_id), value.raw]
        return b"".join(parts)


def read_alignment(metadata: Metadata) -> int:
    """The alignment of tensors in bytes. Raises BadInput unless its key is a u32 and a power of two up to 1 MiB."""
    value = metadata.values.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type_name != "u32":
        raise BadInput(metadata.path, "key 'general.alignment' has the wrong type", got=value.type_name, limit="u32")
    alignment = int(decode_value(value))
    if alignment == 0 or alignment & (alignment - 1):
        raise BadInput(metadata.path, "key 'general.alignment' must be a power of two", got=alignment)
    if alignment > MAX_ALIGNMENT:
        raise BadInput(metadata.path, "key 'general.alignment' is too large", got=alignment, limit=MAX_ALIGNMENT)
    return alignment


def decode_value(value: Value) -> Any:
    """Decode checked bytes to int, float, bool, str or a list of them."""
    if value.type_id == STRING:
        return value.raw[8:].decode("utf-8", "surrogateescape")
    if value.type_id != ARRAY:
        return _decode_numbers(value.type_id, value.raw, 0, 1)[0]
    item_type, count = struct.unpack_from("<IQ", value.raw)
    if item_type == STRING:
        return _decode_strings(value.raw, ARRAY_HEAD, count)
    return _decode_numbers(item_type, value.raw, ARRAY_HEAD, count)


def _decode_numbers(type_id: int, raw: bytes, start: int, count: int) -> list[Any]:
    numbers = struct.unpack_from(f"<{count}{_CHARS[type_id]}", raw, start)
    return [n != 0 for n in numbers] if type_id == BOOL else list(numbers)


def _decode_strings(raw: bytes, position: int, count: int) -> list[str]:
    unpack, strings = struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        start = position + 8
        position = start + unpack(raw, position)[0]
        strings.append(raw[start:position].decode("utf-8", "surrogateescape"))
    return strings


def encode_value(key: str, type_name: str, value: Any) -> Value:
    """Encode `value` as the type called `type_name`. Raises UsageError, naming `key`, where it does not fit."""
    try:
        if type_name.startswith("arr_"):
            item_name, items = type_name[4:], list(value)
            item_type = STRING if item_name == "str" else SCALARS[item_name][0]
            packed = bytes(items) if item_name == "u8" else b"".join(_encode_item(item_name, item) for item in items)
            return Value(ARRAY, struct.pack("<IQ", item_type, len(items)) + packed)
        type_id = STRING if type_name == "str" else SCALARS[type_name][0]
        return Value(type_id, _encode_item(type_name, value))
    except (struct.error, OverflowError, TypeError, AttributeError, ValueError) as error:
        shown = printable(f"{value!r:.60}")
        raise UsageError(f"metadata key {quote(key)} cannot hold {shown} as {type_name}: {error}") from error
    except KeyError as error:
        raise UsageError(f"metadata key {quote(key)}: no such value type as {quote(type_name)}") from error


def _encode_item(type_name: str, item: Any) -> bytes:
    return _encode_string(item) if type_name == "str" else struct.pack("<" + SCALARS[type_name][1], item)


def _encode_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def _check_key(key: str) -> None:
    if not 0 < len(key.encode("utf-8", "replace")) <= MAX_KEY or "\0" in key:
        raise UsageError(f"'{printable(key[:60])}' is not a metadata key; it needs 1 to {MAX_KEY} bytes and no NUL")
