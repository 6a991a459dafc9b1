"""The `<architecture>.*` keys of a model, each checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from requant.container.metadata import Metadata
from requant.errors import BadInput, brief

MAX_COUNT = 2**31 - 1

_STILL_WORK = "inspect, verify and diff still read the file"


@dataclass(frozen=True, slots=True)
class ArchitectureKeys:
    """The keys of one architecture; methods take a key without `<architecture>.` and raise BadInput.

    ignored: keys that count as absent, since the architecture does not read them.
    """

    metadata: Metadata
    arch: str
    ignored: frozenset[str] = frozenset()

    def get(self, key: str) -> Any:
        """Return the value as it is, None where the key is absent."""
        return None if key in self.ignored else self.metadata.get(f"{self.arch}.{key}")

    def array_length(self, key: str) -> int | None:
        """Return the number of items, None where the value is no array."""
        return None if key in self.ignored else self.metadata.array_length(f"{self.arch}.{key}")

    def error(
        self, key: str, what: str, *, got: object = None, limit: object = None, hint: str | None = _STILL_WORK
    ) -> BadInput:
        """Return the error that names the file and the key."""
        return BadInput(self.metadata.path, f"key '{brief(self.arch)}.{key}' {what}", got=got, limit=limit, hint=hint)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; `default` where the key is absent, an error without one."""
        value = default if key in self.ignored else self.metadata.get_float(f"{self.arch}.{key}", default)
        if value is None or not math.isfinite(value):
            raise self.error(key, "is missing" if value is None else "is not finite", got=value)
        return value

    def positive(self, key: str, default: float) -> float:
        """Return a finite number above 0, `default` where the key is absent."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, "must be above 0", got=value)
        return value

    def count(self, key: str, default: int | None = None, *, low: int = 0, high: int = MAX_COUNT) -> int:
        """Return an integer within [low, high]; `default` where the key is absent, an error without one."""
        value = self.get(key) if self.array_length(key) is None else []
        if value is None and default is None:
            raise self.error(key, "is missing")
        return self.check_integer(key, value, low, high) if value is not None else int(default or 0)

    def is_per_layer(self, key: str, n_layers: int) -> bool:
        """Return whether the value is an array, which must have one item per layer."""
        length = self.array_length(key)
        if length not in (None, n_layers):
            raise self.error(key, "has the wrong number of items", got=length, limit=f"{n_layers} layers")
        return length is not None

    def largest(self, key: str, default: int) -> int:
        """Return an integer, or the largest item of an array."""
        if self.array_length(key) is None:
            return self.count(key, default)
        return max((self.check_integer(key, item) for item in self.get(key)), default=default)

    def per_layer(
        self, key: str, n_layers: int, default: int | Sequence[int] | None, *, low: int = 0
    ) -> tuple[int, ...]:
        """Return one integer per layer, from a scalar or an array.

        `low` bounds a scalar and the largest item of an array, which may hold zeros for layers without such a part.
        """
        if not self.is_per_layer(key, n_layers):
            if not isinstance(default, int | None) and self.get(key) is None:
                return tuple(default)
            return (self.count(key, default if isinstance(default, int) else None, low=low),) * n_layers
        items = tuple(self.check_integer(key, item) for item in self.get(key))
        self.check_integer(key, max(items), low)
        return items

    def flags(self, key: str, n_layers: int) -> tuple[bool, ...] | None:
        """Return one flag per layer, from a scalar or an array; None where the key is absent."""
        if self.is_per_layer(key, n_layers):
            return tuple(bool(item) for item in self.get(key))
        value = self.get(key)
        return None if value is None else (bool(value),) * n_layers

    def check_integer(self, key: str, value: Any, low: int = 0, high: int = MAX_COUNT) -> int:
        """Return `value`, the key's or one of its items, if it is an integer within [low, high]."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "is no integer", got=type(value).__name__)
        if not low <= value <= high:
            raise self.error(key, "is out of range", got=value, limit=f"{low} to {high}")
        return value
