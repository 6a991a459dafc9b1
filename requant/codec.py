"""The tensor level: rows of weights to and from a format, with every check that the kernels leave out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from requant.errors import UsageError
from requant.formats import BlockFormat, Effort

if TYPE_CHECKING:
    from collections.abc import Iterable

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Errors = NDArray[np.float64]  # (n_rows, 4), as row_errors gives them

# relative to the mean, so that a block of columns that were never used is still rounded well: without it, any
# codes would do there, and the engine would read them all the same
IMPORTANCE_FLOOR = np.float32(2.0**-20)
# a reconstruction beyond this multiple of the format's error on normally distributed weights is a fault
GATE = 3.0
NVFP4_LARGEST = np.float32(6 * 448)  # weight of a block: the largest level at the largest scale
LOST = 0.9  # relative error of a row that holds nothing of the original


def dequantize(data: Bytes, fmt: BlockFormat) -> Floats:
    """Weights (n_rows, n_per_row) of `data` (n_rows, row_bytes), bit for bit as ggml decodes them.

    But for blocks whose scale is the NaN of its format (NAN_SCALE): NaN, where ggml's decoder makes up a number, though
    its validation refuses them. Raises UsageError where the rows are not whole blocks, or the type holds no weights.
    """
    if not fmt.can_decode or data.ndim != 2 or data.shape[1] % fmt.block_bytes:
        raise UsageError(f"an array of shape {data.shape} cannot be read as rows of {fmt.name}")
    n_blocks = data.shape[1] // fmt.block_bytes
    blocks = np.ascontiguousarray(data, np.uint8).reshape(-1).view(fmt.kernels.LAYOUT)
    out = np.empty((blocks.size, fmt.block_weights), np.float32)
    fmt.kernels.decode(blocks, out)
    for field, nan in getattr(fmt.kernels, "NAN_SCALE", {}).items():
        out[blocks[field] == nan] = np.nan
    return out.reshape(data.shape[0], n_blocks * fmt.block_weights)


def quantize(x: Floats, fmt: BlockFormat, importance: Floats | None = None, effort: Effort = Effort.DEFAULT) -> Bytes:
    """`x` (n_rows, n_per_row) in `fmt` as (n_rows, row_bytes), by least (importance-weighted) squared error.

    importance: (n_per_row,), any scale, finite and not negative; None weighs all columns alike. The weights must be
    finite (`first_nonfinite`). Raises UsageError where the format cannot be written or does not divide the row.
    """
    if not fmt.can_encode:
        raise UsageError(f"{fmt.name} cannot be written")
    if x.ndim != 2 or not fmt.divides(x.shape[1]):
        raise UsageError(f"rows of shape {x.shape} are no multiple of {fmt.name}'s block of {fmt.block_weights}")
    n = fmt.block_weights
    weights = np.ones((1, n), np.float32) if importance is None else scaled_importance(importance).reshape(-1, n)
    rows = np.ascontiguousarray(x, np.float32).reshape(-1, n)
    blocks = np.empty(len(rows), fmt.kernels.LAYOUT)
    fmt.kernels.encode(rows, weights, blocks, int(effort))
    return blocks.view(np.uint8).reshape(x.shape[0], -1)


def second_scale(peak: float) -> np.float32:
    """The second-level scale of NVFP4 for weights of at most `peak`: what to divide them by, never 0.

    The largest weight then needs the largest block scale, so that those of other blocks are as far from the coarse
    subnormal ones as can be.
    """
    return max(np.float32(peak) / NVFP4_LARGEST, np.finfo(np.float32).tiny)


def reconstruct(
    x: Floats, fmt: BlockFormat, importance: Floats | None = None, effort: Effort = Effort.DEFAULT, scale: float = 1
) -> Floats:
    """`x` as it reads back from `fmt`, encoded as by `quantize` after division by `scale`."""
    if scale == 1:
        return dequantize(quantize(x, fmt, importance, effort), fmt)
    return dequantize(quantize(x / np.float32(scale), fmt, importance, effort), fmt) * np.float32(scale)


def scaled_importance(importance: Floats) -> Floats:
    """`importance` (n,) with mean 1 and a floor; all ones where nothing in it is above zero."""
    mean = float(importance.mean(dtype=np.float64))
    if mean <= 0:
        return np.ones_like(importance)
    scaled: Floats = np.maximum((importance.astype(np.float64) / mean).astype(np.float32), IMPORTANCE_FLOOR)
    return scaled


def first_nonfinite(x: Floats) -> int | None:
    """Flat index of the first NaN or infinity in `x` (n_rows, n_per_row), or None."""
    index = int(_rows().first_nonfinite(x))
    return None if index < 0 else index


def row_errors(x: Floats, y: Floats, importance: Floats | None = None) -> Errors:
    """Per row of `x` and its reconstruction `y`: sum x^2, sum (x - y)^2, and both weighted by `importance` as given.

    Shape (n_rows, 4), float64.
    """
    out = np.empty((x.shape[0], 4), np.float64)
    weights = np.ones(x.shape[1], np.float32) if importance is None else importance
    _rows().sum_errors(x, y, weights, out)
    return out


def relative_error(errors: Errors) -> float:
    """Root of error over energy, weighted, of `errors` as row_errors gives them; 0 for weights that are all zero.

    NaN or infinite where the reconstruction is.
    """
    energy, error = errors[:, 2].sum(), errors[:, 3].sum()
    with np.errstate(invalid="ignore"):  # weights near the end of float32
        return float(np.sqrt(error / energy if energy > 0 else error))


def lost_row(errors: Errors) -> int | None:
    """The first row, not all zero, of which the reconstruction holds next to nothing, or is not finite; else None."""
    lost = ~(errors[:, 1] < LOST**2 * errors[:, 0]) & (errors[:, 0] > 0)
    return int(np.argmax(lost)) if lost.any() else None


def gate(errors: Errors, fmt: BlockFormat) -> str | None:
    """What is wrong with a reconstruction, or None: a row that was lost, or an error beyond the format's ceiling."""
    row = lost_row(errors)
    if row is not None:
        return (
            f"row {row} is lost: relative error {relative_error(errors[row : row + 1, [0, 1, 0, 1]]):.3g}, limit {LOST}"
        )
    error, limit = relative_error(errors), min(GATE * fmt.gaussian_rmse, LOST)
    return None if error <= limit else f"relative error {error:.3g}, limit {limit:.3g} for {fmt.name}"


def warm_up(formats: Iterable[BlockFormat], *, encode: bool = True) -> None:
    """Compile, or load from the cache, the kernels that converting among `formats`, or only reading them, will call."""
    for fmt in formats:
        n = fmt.block_weights
        x = np.ones((1, n), np.float32)
        data = quantize(x, fmt) if encode and fmt.can_encode else np.zeros((1, fmt.block_bytes), np.uint8)
        y = dequantize(data, fmt)
        first_nonfinite(y)
        row_errors(x, x)


def _rows() -> Any:
    """The kernels over rows; imported on first use, because Numba takes its time."""
    return importlib.import_module("requant.formats.rows")
