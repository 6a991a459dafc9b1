"""Encoding that compensates its own errors: a column is rounded after the errors of those before it are taken off."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.formats import codec
from requant.formats.base import Effort

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from requant.formats.base import BlockFormat
    from requant.formats.codec import Bytes, Floats


def can_compensate(fmt: BlockFormat) -> bool:
    """Return whether `encode_compensated` writes `fmt`."""
    return fmt.can_encode and hasattr(fmt.kernels, "LEVELS")


def encode_compensated(
    fmt: BlockFormat, weights: Floats, factor: Floats, importance: Floats, *, effort: Effort = Effort.DEFAULT
) -> tuple[Bytes, NDArray[np.float64]]:
    """Encode `weights` (n_rows, n_in) by least error at the output, tr(E H E'), column by column from the left.

    factor: (n_in, n_in), U of H^-1 = U' U, upper triangular, where H is the damped second moment of the inputs.
    importance: (n_in,), 1 / diag(U)^2 or any other, for the search of a block's scales on the compensated weights.
    Returns the blocks (n_rows, row_bytes), and for each row the sum of the squared rounding errors over that of the
    weights as they were when they were rounded, float64; infinite for a row that does not fit the scales of `fmt`. Rows
    do not depend on one another.
    """
    blocks, _, sums = round_rows(fmt, weights, factor, importance, effort)
    energy, error = sums.T
    rounding = np.divide(error, energy, out=np.zeros(len(sums)), where=energy != 0)
    return blocks, np.nan_to_num(rounding, nan=np.inf, posinf=np.inf)


def round_rows(
    fmt: BlockFormat, weights: Floats, factor: Floats, importance: Floats, effort: Effort
) -> tuple[Bytes, Floats, NDArray[np.float64]]:
    """Return blocks, the values that they decode to (n_rows, n_in), and sums of squares of weights and of errors.

    Sums: (n_rows, 2); arguments as in `encode_compensated`.
    """
    kernels: Any = fmt.kernels
    columns = _columns()
    n_rows, n_in = weights.shape
    scaled = codec.scaled_importance(importance)
    x = _to_tiles(weights, columns.LANES)
    n_tiles, width = len(x), fmt.block_weights
    e = np.zeros((n_tiles, columns.PANEL, columns.LANES), np.float32)
    codes = np.empty((n_tiles, width, columns.LANES), np.uint8)
    sums = np.zeros((n_tiles, 2, columns.LANES), np.float64)
    blocks = np.empty((n_in // width, n_rows), kernels.LAYOUT)
    for panel in range(0, n_in, columns.PANEL):
        end = min(panel + columns.PANEL, n_in)
        for first in range(panel, end, width):
            columns.spread_errors(x, e, factor, panel, first - panel, first, first + width)
            rows = _to_rows(x[:, first : first + width], n_rows)
            found = _fit(fmt, rows, scaled[first : first + width], effort)
            scales = _factors(found, n_tiles)
            columns.round_columns(x, e, factor, (panel, first), kernels.LEVELS, scales, codes, sums)
            found = found._replace(codes=_to_rows(codes, n_rows).reshape(found.codes.shape))
            kernels.pack(found, blocks[first // width])
        columns.spread_errors(x, e, factor, panel, end - panel, end, n_in)
    data = np.ascontiguousarray(blocks.T).view(np.uint8).reshape(n_rows, -1)
    return data, _to_rows(x, n_rows), _to_rows(sums, n_rows)


def _to_tiles(rows: NDArray[Any], lanes: int) -> NDArray[Any]:
    """Return `rows` (n, k) as tiles (n / lanes rounded up, k, lanes), filled up with zeros."""
    n_tiles = -(-len(rows) // lanes)
    padded = np.zeros((n_tiles * lanes, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(n_tiles, lanes, -1).transpose(0, 2, 1))


def _to_rows(tiles: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """Return the first `n_rows` rows of `tiles` (n_tiles, k, lanes): (n_rows, k)."""
    rows = tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])
    return np.ascontiguousarray(rows[:n_rows])


def _fit(fmt: BlockFormat, rows: Floats, importance: Floats, effort: Effort) -> Any:
    """Fit one block of each row as `codec.quantize` would encode it."""
    kernels: Any = fmt.kernels
    found = kernels.fit(rows, importance[None], int(effort))
    alike = codec.find_unweighted_blocks(rows, fmt, importance)
    if alike.any():
        again = kernels.fit(rows[alike], np.ones((1, rows.shape[1]), np.float32), int(effort))
        for ours, theirs in zip(found, again, strict=True):
            if ours is not None:
                ours[alike] = theirs
    return found


def _factors(found: Any, n_tiles: int) -> Floats:
    """Return the scale, its inverse and the minimum of each sub-block: (n_tiles, n_subs, 3, lanes)."""
    with np.errstate(invalid="ignore"):  # an infinite scale of a row that does not fit
        steps = found.steps if found.d is None else _halves(found.d) * found.scales.astype(np.float32)
        least = np.zeros_like(steps) if found.dmin is None else _halves(found.dmin) * found.mins.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    factors = np.stack([steps, inverse, least], axis=2).reshape(len(steps), -1)
    lanes = _columns().LANES
    return _to_tiles(factors, lanes).reshape(n_tiles, -1, 3, lanes)


def _halves(bits: NDArray[np.uint16]) -> Floats:
    """Return binary16 `bits` (n,) as floats (n, 1)."""
    return bits.view(np.float16).astype(np.float32)[:, None]


def _columns() -> Any:
    """Import the kernels over columns, on first use, because Numba takes long."""
    return importlib.import_module("requant.formats.encoders.columns")
