"""Coordinate descent on encoded rows: codes, integer scales and factors of blocks by the error at the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from requant.formats.encoders.columns import spread_errors
from requant.formats.encoders.descent import Codes, polish_codes
from requant.formats.encoders.fit import FP4, IQ4, Fit
from requant.formats.encoders.tiles import halves, to_rows, to_tiles
from requant.formats.encoders.word_descent import Words, polish_words
from requant.formats.grids import FP4_LEVELS, IQ4_LEVELS

if TYPE_CHECKING:
    from requant.formats.codec import Floats

SWEEPS = 3  # more gain 1 to 2 %


def polish_fits(kernels: Any, fits: list[Any], x: Floats, weights: Floats, h: Floats) -> None:
    """Lower the error (v - w) H (v - w)' of rows that `fits` hold, one for each block of a row, in place.

    x: their values in tiles (n_tiles, n_in, LANES), brought up to date; weights: (n_rows, n_in); h: (n_in, n_in). A row
    whose error would not fall stays as it is.
    """
    target, r = to_tiles(weights), np.zeros_like(x)
    before, after = _state(kernels, fits, x.copy()), _state(kernels, fits, x)
    spread_errors(r, target - x, h, 0, x.shape[1], 0, x.shape[1])
    error = np.einsum("tij,tij->tj", x - target, r, dtype=np.float64)
    if isinstance(after, Codes):
        polish_codes(after, r, h, kernels.LEVELS, _table(kernels.LEVELS), SWEEPS)
    else:
        polish_words(after, r, h, kernels.SHAPE, np.ascontiguousarray(kernels.WORDS.T, np.float32), SWEEPS)
    better = np.einsum("tij,tij->tj", x - target, r, dtype=np.float64) < error
    for new, old in zip(after, before, strict=True):
        np.copyto(new, old, where=~better[:, None])
    if isinstance(after, Codes):
        _store_codes(fits, after)
    else:
        _store_words(kernels.SHAPE, fits, after)


def _state(kernels: Any, fits: list[Any], x: Floats) -> Any:
    """Return the arrays of `fits` in tiles, Codes or Words."""
    return _codes_of(fits, x) if isinstance(fits[0], Fit) else _words_of(kernels.SHAPE, kernels.WORDS.shape[1], fits, x)


def _words_of(shape: Any, dim: int, fits: list[Any], x: Floats) -> Words:
    """Return the arrays of `fits`, FOUND of each block of a row, in tiles."""

    def tiles(name: str, n: int) -> Any:
        return to_tiles(np.concatenate([fit[name][:, :n] for fit in fits], axis=1))

    d = np.concatenate([halves(fit["d"]) for fit in fits], axis=1) * shape.unit
    scales = 1 + 2 * tiles("ls", 256 // shape.sub).astype(np.float32)
    return Words(x, tiles("index", 256 // dim), tiles("signs", 32), to_tiles(d), scales)


def _store_words(shape: Any, fits: list[Any], state: Words) -> None:
    """Write the arrays in tiles back into `fits`."""
    parts = [np.split(to_rows(part, len(fits[0])), len(fits), axis=1) for part in state[1:]]
    for k, fit in enumerate(fits):
        index, signs, d, scales = (part[k] for part in parts)
        fit["index"][:, : index.shape[1]], fit["signs"] = index, signs
        fit["d"] = (d[:, 0] / shape.unit).astype(np.float16).view(np.uint16)
        fit["ls"][:, : scales.shape[1]] = (scales - 1) / 2


def _codes_of(fits: list[Fit], x: Floats) -> Codes:
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


def _store_codes(fits: list[Fit], state: Codes) -> None:
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
