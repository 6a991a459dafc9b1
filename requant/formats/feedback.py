"""Encoding that compensates its own errors: a column is rounded after the errors of those before it are taken off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from requant.formats import codec
from requant.formats.base import Effort
from requant.formats.encoders.codewords import round_words
from requant.formats.encoders.columns import PANEL, round_columns, spread_errors
from requant.formats.encoders.fit import Fit
from requant.formats.encoders.search import LANES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from requant.formats.base import BlockFormat
    from requant.formats.codec import Bytes, Floats


def can_compensate(fmt: BlockFormat) -> bool:
    """Return whether `encode_compensated` writes `fmt`."""
    return fmt.can_encode and (hasattr(fmt.kernels, "LEVELS") or hasattr(fmt.kernels, "WORDS"))


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
    n_rows, n_in = weights.shape
    scaled = codec.scaled_importance(importance)
    x = _to_tiles(weights)
    n_tiles, width = len(x), fmt.block_weights
    e = np.zeros((n_tiles, PANEL, LANES), np.float32)
    sums = np.zeros((n_tiles, 2, LANES), np.float64)
    blocks = np.empty((n_in // width, n_rows), kernels.LAYOUT)
    for panel in range(0, n_in, PANEL):
        end = min(panel + PANEL, n_in)
        for first in range(panel, end, width):
            spread_errors(x, e, factor, panel, first - panel, first, first + width)
            rows = _to_rows(x[:, first : first + width], n_rows)
            found = _fit(fmt, rows, scaled[first : first + width], effort)
            _round_block(kernels, found, (x, e, factor, sums), panel, first)
            kernels.pack(found, blocks[first // width])
        spread_errors(x, e, factor, panel, end - panel, end, n_in)
    data = np.ascontiguousarray(blocks.T).view(np.uint8).reshape(n_rows, -1)
    return data, _to_rows(x, n_rows), _to_rows(sums, n_rows)


def _round_block(kernels: Any, found: Any, parts: tuple[Any, ...], panel: int, first: int) -> None:
    """Choose the codes, or words and signs, of `found` anew, with feedback; parts: x, e, u and sums of the tiles."""
    x, e, u, sums = parts
    if isinstance(found, Fit):
        codes = np.empty((len(x), kernels.N, LANES), np.uint8)
        round_columns(x, e, u, (panel, first), kernels.LEVELS, _factors_of_codes(found), codes, sums)
        found.codes[:] = _to_rows(codes, len(found.codes)).reshape(found.codes.shape)
        return
    words = np.ascontiguousarray(kernels.WORDS.T, np.float32)
    index = np.zeros((len(x), kernels.N // len(words), LANES), np.uint16)
    signs = np.zeros((len(x), kernels.N // 8, LANES), np.uint8)
    place, shape = (panel, first, len(found)), kernels.SHAPE
    round_words(x, e, u, place, shape, words, _factors_of_words(found, shape), (index, signs, sums))
    found["index"][:, : index.shape[1]] = _to_rows(index, len(found))
    found["signs"] = _to_rows(signs, len(found))


def _to_tiles(rows: NDArray[Any]) -> NDArray[Any]:
    """Return `rows` (n, k) as tiles (n / LANES rounded up, k, LANES), filled up with zeros."""
    n_tiles = -(-len(rows) // LANES)
    padded = np.zeros((n_tiles * LANES, rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(n_tiles, LANES, -1).transpose(0, 2, 1))


def _to_rows(tiles: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """Return the first `n_rows` rows of `tiles` (n_tiles, k, LANES): (n_rows, k)."""
    rows = tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])
    return np.ascontiguousarray(rows[:n_rows])


def _fit(fmt: BlockFormat, rows: Floats, importance: Floats, effort: Effort) -> Any:
    """Fit one block of each row as `codec.quantize` would encode it."""
    kernels: Any = fmt.kernels
    found = kernels.fit(rows, importance[None], int(effort))
    alike = codec.find_unweighted_blocks(rows, fmt, importance)
    if alike.any():
        again = kernels.fit(rows[alike], np.ones((1, rows.shape[1]), np.float32), int(effort))
        if not isinstance(found, Fit):
            found, again = (found,), (again,)
        for ours, theirs in zip(found, again, strict=True):
            if ours is not None:
                ours[alike] = theirs
    return found


def _factors_of_codes(found: Any) -> Floats:
    """Return the scale, its inverse and the minimum of each sub-block: (n_tiles, n_subs, 3, LANES)."""
    with np.errstate(invalid="ignore"):  # an infinite scale of a row that does not fit
        steps = found.steps if found.d is None else _halves(found.d) * found.scales.astype(np.float32)
        least = np.zeros_like(steps) if found.dmin is None else _halves(found.dmin) * found.mins.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    factors = np.stack([steps, inverse, least], axis=2).reshape(len(steps), -1)
    return _to_tiles(factors).reshape(-1, steps.shape[1], 3, LANES)


def _factors_of_words(found: Any, shape: Any) -> Floats:
    """Return the scale of each sub-block of FOUND: (n_tiles, n_subs, LANES)."""
    levels = found["ls"][:, : 256 // shape.sub].astype(np.float32)
    return _to_tiles(_halves(found["d"]) * shape.unit * (1 + 2 * levels))


def _halves(bits: NDArray[np.uint16]) -> Floats:
    """Return binary16 `bits` (n,) as floats (n, 1)."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)[:, None]
