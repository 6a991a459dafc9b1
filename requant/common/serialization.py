"""Frozen dataclasses as JSON that a person can edit, read back strictly.

An unknown key, a missing one, a wrong type, a number that is not finite or is negative: each is a BadInput that names
its place in the file. A field may name a parser of its value, `field(metadata={"parse": f})`, which is called with the
value, its place and the path. A field with `metadata=IN_MEMORY` is not in the JSON. An IntEnum is its member's name
in small letters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from requant.common.inputs import add_input
from requant.common.units import format_size
from requant.errors import MISSING, REMARK, BadInput, InputOutputError, brief, missing_file

IN_MEMORY = {"in_memory": True}  # metadata of a field
_LINE = 160  # characters of a JSON value that is kept on one line
_BLOCK = 1 << 18  # bytes read at once
MAX_FLOAT = 1e100
_MAX_FILE = 1 << 28  # bytes; 1000 tensors x 30 types are about 4 MiB
_MAX_DIGITS = 101  # of a whole number: those of MAX_FLOAT
# bytes of memory that the parsed values behind characters take at most: an object, a list, a value, a key
_MEMORY = {"{": 240, "[": 72, ",": 64, '":': 120}
_MAX_MEMORY = 12  # bytes for each byte of the file; files that requant writes have up to 10
_FREE_MEMORY = 1 << 22  # bytes that any file may take


def read_text(path: Path | str, most: int = _MAX_FILE) -> str:
    """Read the text file at `path`, of at most `most` bytes.

    Raises BadInput where it is missing, longer or no UTF-8, InputOutputError.
    """
    try:
        with Path(path).open("rb") as file:
            add_input(Path(path), os.fstat(file.fileno()))
            data = bytearray()
            while len(data) <= most and (part := file.read(_BLOCK)):  # read(most) would allocate all of it
                data += part
    except MISSING as error:
        raise missing_file(Path(path)) from error
    except OSError as error:
        raise InputOutputError(path, f"cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise BadInput(path, "is too large for such a file", limit=format_size(most))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text at byte {error.start}" if data[:4] != b"GGUF" else "is a GGUF file, not a text"
        raise BadInput(path, what) from error


def to_plain(value: Any) -> Any:
    """Convert dataclasses to dicts in field order, tuples to lists, members of an IntEnum to their names."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.metadata != IN_MEMORY}
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def dump(value: Any, indent: str = "") -> str:
    """Format `value` as JSON, every part that fits on one line; the whole ends in a newline."""
    line = json.dumps(value, allow_nan=False)
    inner = indent + "  "
    if isinstance(value, dict) and (not indent or len(line) > _LINE):
        items = [f"{json.dumps(key)}: {dump(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and len(line) > _LINE:
        items = [dump(item, inner) for item in value]
    else:
        return line
    left, right = line[0], line[-1]
    return f"{left}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{right}" + ("" if indent else "\n")


def parse(text: str, schema: str, path: object) -> dict[str, Any]:
    """Parse the JSON object in `text`, and return it without its `schema`.

    Raises BadInput for another schema, and before it parses a text whose values would take far more memory than it.
    """
    memory, limit = sum(text.count(c) * n for c, n in _MEMORY.items()), _FREE_MEMORY + _MAX_MEMORY * len(text)
    if memory > limit:
        what = "holds too many values for its size"
        raise BadInput(path, what, got=f"{format_size(memory)} of memory", limit=format_size(limit))
    try:
        raw = json.loads(
            text, parse_int=_parse_integer, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise BadInput(path, f"is not valid JSON: {brief(str(error), REMARK)}") from error
    found = raw.pop("schema", None) if isinstance(raw, dict) else None
    if found != schema:
        raise BadInput(path, "is another kind of file", got=f"schema {show_json(found)}", expected=schema)
    return raw  # type: ignore[no-any-return]


def _parse_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits, {_MAX_DIGITS} at most")
    return int(text)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"key '{brief(counts.most_common(1)[0][0])}' appears twice in one object")
    return dict(pairs)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def parse_record(kind: Any, raw: Any, where: str, path: object) -> Any:
    """Parse a JSON object with exactly the fields of the dataclass `kind`. Raises BadInput."""
    if not isinstance(raw, dict):
        raise _type_error(where, "an object", raw, path)
    hints, prefix = _hints(kind), where and f"{where}."
    kept = [f for f in fields(kind) if f.metadata != IN_MEMORY]
    if unknown := sorted(raw.keys() - {f.name for f in kept}):
        raise BadInput(path, f"{prefix}{brief(unknown[0])} is not a key of this file")
    values = {}
    for f in kept:
        if f.name in raw:
            values[f.name] = parse_value(hints[f.name], raw[f.name], prefix + f.name, path)
            if (parser := f.metadata.get("parse")) is not None:
                values[f.name] = parser(values[f.name], prefix + f.name, path)
        elif f.default is f.default_factory:  # both MISSING: the field is required
            raise BadInput(path, f"{prefix}{f.name} is missing")
    return kind(**values)


def parse_value(kind: Any, raw: Any, where: str, path: object) -> Any:
    """Parse `raw` by the type hint `kind`: scalar, IntEnum, `X | None`, tuple[X, ...], Mapping[str, X] or dataclass."""
    if is_dataclass(kind):
        return parse_record(kind, raw, where, path)
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        other = next(a for a in args if a is not NoneType)
        return None if raw is None else parse_value(other, raw, where, path)
    if origin is tuple:
        if not isinstance(raw, list):
            raise _type_error(where, "a list", raw, path)
        return tuple(parse_value(args[0], item, f"{where}[{i}]", path) for i, item in enumerate(raw))
    if origin is Mapping:
        if not isinstance(raw, dict):
            raise _type_error(where, "an object", raw, path)
        return {key: parse_value(args[1], item, f"{where}.{brief(key)}", path) for key, item in raw.items()}
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        names = {member.name.lower(): member for member in kind}
        if not isinstance(raw, str) or raw not in names:
            raise _type_error(where, f"one of {', '.join(names)}", raw, path)
        return names[raw]
    if kind is not Any and not _SCALARS[kind][1](raw):
        raise _type_error(where, _SCALARS[kind][0], raw, path)
    return float(raw) if kind is float else raw


_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a string", lambda x: isinstance(x, str)),
    bool: ("true or false", lambda x: isinstance(x, bool)),
    int: ("a whole number from 0 to 2^63", lambda x: type(x) is int and 0 <= x < 2**63),
    # products and quotients of a few such figures are finite too
    float: ("a finite number from 0 to 1e100", lambda x: type(x) in (int, float) and 0 <= x <= MAX_FLOAT),
}


def _type_error(where: str, wanted: str, raw: Any, path: object) -> BadInput:
    return BadInput(path, f"{where or 'the file'} must be {wanted}", got=show_json(raw))


def show_json(raw: Any) -> str:
    """Format a JSON value in at most 60 printable characters."""
    text = json.dumps(raw)
    return text if len(text) <= 60 else text[:57] + "..."


def hash_json(value: Any) -> str:
    """Return the SHA-256, in hex, of `value` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
