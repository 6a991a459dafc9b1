"""Coordinate descent on encoded rows: codes, integer scales and factors of blocks by the error at the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from requant.formats.encoders.columns import spread_errors
from requant.formats.encoders.descent import Codes, polish_codes
from requant.formats.encoders.fit import FP4, IQ4
from requant.formats.encoders.search import LANES
from requant.formats.grids import FP4_LEVELS, IQ4_LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from requant.formats.codec import Floats
    from requant.formats.encoders.fit import Fit

SWEEPS = 3  # more gain 1 to 2 %


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


def halves(bits: NDArray[np.uint16]) -> Floats:
    """Return binary16 `bits` (n,) as floats (n, 1)."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)[:, None]


def polish_fits(kernels: Any, fits: list[Fit], x: Floats, weights: Floats, h: Floats) -> None:
    """Lower the error (v - w) H (v - w)' of rows that `fits` hold, one for each block of a row, in place.

    x: their values in tiles (n_tiles, n_in, LANES), brought up to date; weights: (n_rows, n_in); h: (n_in, n_in). A row
    whose error would not fall stays as it is.
    """
    target = to_tiles(weights)
    r, before = np.zeros_like(x), _state(fits, x.copy())
    spread_errors(r, target - x, h, 0, x.shape[1], 0, x.shape[1])
    errors = [np.einsum("tij,tij->tj", x - target, r, dtype=np.float64)]
    after = _state(fits, x)
    polish_codes(after, r, h, kernels.LEVELS, _table(kernels.LEVELS), SWEEPS)
    errors.append(np.einsum("tij,tij->tj", x - target, r, dtype=np.float64))
    better = (errors[1] < errors[0])[:, None]
    for new, old in zip(after, before, strict=True):
        np.copyto(new, old, where=~better)
    _write(fits, after)


def _state(fits: list[Fit], x: Floats) -> Codes:
    """Return the arrays of `fits` in tiles."""
    ones = np.ones((len(fits[0].codes), 1), np.float32)
    zeros = np.zeros_like(fits[0].scales, np.float32)

    def tiles(parts: list[Any]) -> Any:
        return to_tiles(np.concatenate(parts, axis=1))

    return Codes(
        x,
        tiles([fit.codes.reshape(len(ones), -1) for fit in fits]),
        tiles([ones if fit.d is None else halves(fit.d) for fit in fits]),
        tiles([zeros[:, :1] if fit.dmin is None else halves(fit.dmin) for fit in fits]),
        tiles([(fit.scales if fit.steps is None else fit.steps).astype(np.float32) for fit in fits]),
        tiles([zeros if fit.mins is None else fit.mins.astype(np.float32) for fit in fits]),
    )


def _write(fits: list[Fit], state: Codes) -> None:
    """Write the arrays in tiles back into `fits`."""
    n_rows = len(fits[0].codes)
    codes, d, dmin, scales, mins = (np.split(to_rows(part, n_rows), len(fits), axis=1) for part in state[1:])
    for k, fit in enumerate(fits):
        fit.codes[:] = codes[k].reshape(fit.codes.shape)
        if fit.d is not None:
            fit.d[:] = d[k][:, 0].astype(np.float16).view(np.uint16)
            fit.scales[:] = scales[k]
        if fit.dmin is not None and fit.mins is not None:
            fit.dmin[:] = dmin[k][:, 0].astype(np.float16).view(np.uint16)
            fit.mins[:] = mins[k]


def _table(levels: Any) -> Floats:
    """Return the level of each code."""
    if levels.kind == IQ4:
        return IQ4_LEVELS.astype(np.float32)
    if levels.kind == FP4:
        return FP4_LEVELS.astype(np.float32)
    return np.arange(levels.low, levels.high + 1, dtype=np.float32)
