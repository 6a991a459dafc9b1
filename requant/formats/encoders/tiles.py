"""Rows as tiles, LANES of them side by side, as the kernels over columns take them, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.formats.encoders.search import LANES


def to_tiles(rows: NDArray[Any]) -> NDArray[Any]:
    """Return `rows` (n, k) as tiles (n / LANES rounded up, k, LANES), filled up with zeros."""
    n_tiles = -(-len(rows) // LANES)
    padded = np.zeros((n_tiles * LANES, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(n_tiles, LANES, -1).transpose(0, 2, 1))


def to_rows(tiles: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """Return the first `n_rows` rows of `tiles` (n_tiles, k, LANES): (n_rows, k)."""
    rows = tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])
    return np.ascontiguousarray(rows[:n_rows])


def halves(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return binary16 `bits` (n,) as floats (n, 1)."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)[:, None]
