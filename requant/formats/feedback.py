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
from requant.formats.encoders.tiles import halves, to_rows, to_tiles
from requant.formats.polish import polish_fits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from requant.formats.base import BlockFormat
    from requant.formats.codec import Bytes, Floats


def can_compensate(fmt: BlockFormat) -> bool:
    """Return whether `encode_compensated` writes `fmt`."""
    return fmt.can_encode and (hasattr(fmt.kernels, "LEVELS") or hasattr(fmt.kernels, "WORDS"))


def encode_compensated(
    fmt: BlockFormat,
    weights: Floats,
    factor: Floats,
    importance: Floats,
    *,
    effort: Effort = Effort.DEFAULT,
    polish: Floats | None = None,
) -> tuple[Bytes, NDArray[np.float64]]:
    """Encode `weights` (n_rows, n_in) by least error at the output, tr(E H E'), column by column from the left.

    factor: (n_in, n_in), U of H^-1 = U' U, upper triangular, where H is the damped second moment of the inputs.
    importance: (n_in,), 1 / diag(U)^2 or any other, for the search of a block's scales on the compensated weights.
    polish: H, (n_in, n_in), damped or not; coordinate descent then lowers e H e' of each row further.
    Returns the blocks (n_rows, row_bytes), and for each row the sum of the squared rounding errors over that of the
    weights as they were when they were rounded (before polishing), float64; infinite for a row that does not fit the
    scales of `fmt`. Rows do not depend on one another; multiples of LANES, 64, take the least time. All float32.
    Raises NumericFault where the CPU flushes subnormals.
    """
    codec.check_arithmetic()
    fits, x, sums = round_rows(fmt, weights, np.ascontiguousarray(factor), importance, effort)
    if polish is not None:
        polish_fits(fmt.kernels, fits, x, weights, np.ascontiguousarray(polish))
    energy, error = sums.T
    rounding = np.divide(error, energy, out=np.zeros(len(sums)), where=energy != 0)
    return pack_rows(fmt, fits), np.nan_to_num(rounding, nan=np.inf, posinf=np.inf)


def warm_up(formats: Iterable[BlockFormat], *, search: bool) -> None:
    """Compile the kernels of `encode_compensated` for those of `formats` that it writes, or load them from the cache.

    search: those of polishing too.
    """
    for fmt in formats:
        if can_compensate(fmt):
            one = np.eye(fmt.block_weights, dtype=np.float32)
            encode_compensated(fmt, one[:1], one, one.sum(axis=0), polish=one if search else None)


def round_rows(
    fmt: BlockFormat, weights: Floats, factor: Floats, importance: Floats, effort: Effort
) -> tuple[list[Any], Floats, NDArray[np.float64]]:
    """Return what a format's fit gives, for each block of a row with its codes chosen by feedback; and their values.

    The values are in tiles, (n_rows / LANES rounded up, n_in, LANES). Last, the sums of squares of weights and of
    errors, (n_rows, 2). Arguments as in `encode_compensated`.
    """
    kernels: Any = fmt.kernels
    n_rows, n_in = weights.shape
    x = to_tiles(weights)
    n_tiles, width = len(x), fmt.block_weights
    e = np.zeros((n_tiles, PANEL, LANES), np.float32)
    sums = np.zeros((n_tiles, 2, LANES), np.float64)
    fits = []
    for panel in range(0, n_in, PANEL):
        end = min(panel + PANEL, n_in)
        for first in range(panel, end, width):
            spread_errors(x, e, factor, panel, first - panel, first, first + width)
            rows = to_rows(x[:, first : first + width], n_rows)
            fits.append(_fit(fmt, rows, codec.scaled_importance(importance[first : first + width]), effort))
            _round_block(kernels, fits[-1], (x, e, factor, sums), panel, first)
        spread_errors(x, e, factor, panel, end - panel, end, n_in)
    return fits, x, to_rows(sums, n_rows)


def pack_rows(fmt: BlockFormat, fits: list[Any]) -> Bytes:
    """Return the rows (n_rows, row_bytes) of which `fits` hold a block each."""
    kernels: Any = fmt.kernels
    first = fits[0].codes if isinstance(fits[0], Fit) else fits[0]
    blocks = np.empty((len(fits), len(first)), kernels.LAYOUT)
    for fit, own in zip(fits, blocks, strict=True):
        kernels.pack(fit, own)
    return np.ascontiguousarray(blocks.T).view(np.uint8).reshape(len(first), -1)


def _round_block(kernels: Any, found: Any, parts: tuple[Any, ...], panel: int, first: int) -> None:
    """Choose the codes, or words and signs, of `found` anew, with feedback; parts: x, e, u and sums of the tiles."""
    x, e, u, sums = parts
    if isinstance(found, Fit):
        codes = np.empty((len(x), kernels.N, LANES), np.uint8)
        round_columns(x, e, u, (panel, first), kernels.LEVELS, _factors_of_codes(found), codes, sums)
        found.codes[:] = to_rows(codes, len(found.codes)).reshape(found.codes.shape)
        return
    words = np.ascontiguousarray(kernels.WORDS.T, np.float32)
    index = np.zeros((len(x), kernels.N // len(words), LANES), np.uint16)
    signs = np.zeros((len(x), kernels.N // 8, LANES), np.uint8)
    place, shape = (panel, first, len(found)), kernels.SHAPE
    round_words(x, e, u, place, shape, words, _factors_of_words(found, shape), (index, signs, sums))
    found["index"][:, : index.shape[1]] = to_rows(index, len(found))
    found["signs"] = to_rows(signs, len(found))


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
        steps = found.steps if found.d is None else halves(found.d) * found.scales.astype(np.float32)
        least = np.zeros_like(steps) if found.dmin is None else halves(found.dmin) * found.mins.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    factors = np.stack([steps, inverse, least], axis=2).reshape(len(steps), -1)
    return to_tiles(factors).reshape(-1, steps.shape[1], 3, LANES)


def _factors_of_words(found: Any, shape: Any) -> Floats:
    """Return the scale of each sub-block of FOUND: (n_tiles, n_subs, LANES)."""
    levels = found["ls"][:, : 256 // shape.sub].astype(np.float32)
    return to_tiles(halves(found["d"]) * shape.unit * (1 + 2 * levels))
