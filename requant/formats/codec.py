"""The tensor level: rows of weights to and from a format, with every check that the kernels leave out."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from requant.errors import NumericFault, UsageError
from requant.formats import BlockFormat, Effort

if TYPE_CHECKING:
    from collections.abc import Iterable

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Errors = NDArray[np.float64]  # (n_rows, 4), as row_errors gives them

CHUNK_WEIGHTS = 2**20  # about as many weights, in whole rows, are a thread's task
# relative to the mean, so that a block of columns that were never used is still rounded well: without a floor, any
# codes would do there, and the engine would read them all the same
IMPORTANCE_FLOOR = np.float32(2.0**-20)
# a reconstruction with an error beyond this multiple of the format's error on normally distributed weights is a fault
GATE = 3.0
NVFP4_LARGEST = np.float32(6 * 448)  # weight of a block: the largest level at the largest scale
LOST, LOST_OF_ONE_BIT = 0.9, 0.99  # relative error of a row that holds nothing of the original
# sum of squares of a row that may become zero: with inputs of norm 2**16 its output is below 2**-36, out of reach of
# any norm's epsilon. Embeddings have such rows, 1e-24 throughout, for tokens that were never trained
NEGLIGIBLE = 2.0**-104
# the same multiple where the root mean square of the weights is near an end of the scales' range: nothing else shows a
# fault there in types of few bits, whose error cannot reach 3 times the normal one. Real tensors have up to 1.33
GATE_AT_THE_ENDS, ENDS = 1.3, (2.0**-20, 2.0**12)
_TINY, _HALF = np.finfo(np.float32).tiny, np.float32(0.5)  # their product is subnormal


def dequantize(data: Bytes, fmt: BlockFormat) -> Floats:
    """Return the weights (n_rows, n_per_row) of `data` (n_rows, row_bytes), bit for bit as ggml decodes them.

    One exception: blocks whose scale is the NaN of its format (NAN_SCALE) give NaN, where ggml's decoder makes up a
    number, though its validation refuses them. Raises UsageError where the rows are not whole blocks, or the type holds
    no weights.
    """
    if not fmt.can_decode or data.ndim != 2 or data.shape[1] % fmt.block_bytes:
        raise UsageError(f"an array of shape {data.shape} cannot be read as rows of {fmt.name}")
    check_arithmetic()
    n_blocks = data.shape[1] // fmt.block_bytes
    blocks = np.ascontiguousarray(data, np.uint8).reshape(-1).view(fmt.kernels.LAYOUT)
    out = np.empty((blocks.size, fmt.block_weights), np.float32)
    fmt.kernels.decode(blocks, out)
    for field, nan in getattr(fmt.kernels, "NAN_SCALE", {}).items():
        out[blocks[field] == nan] = np.nan
    return out.reshape(data.shape[0], n_blocks * fmt.block_weights)


def quantize(x: Floats, fmt: BlockFormat, importance: Floats | None = None, effort: Effort = Effort.DEFAULT) -> Bytes:
    """Encode `x` (n_rows, n_per_row) in `fmt` as (n_rows, row_bytes), by least (importance-weighted) squared error.

    importance: (n_per_row,), any scale, finite and not negative; None weighs all columns alike, as do blocks without
    usable importance (`find_unweighted_blocks`). The weights must be finite (`first_nonfinite`). Raises UsageError
    where the format cannot be written or does not divide the row, NumericFault where the CPU flushes subnormals.
    """
    if not fmt.can_encode:
        raise UsageError(f"{fmt.name} cannot be written")
    if x.ndim != 2 or not fmt.divides(x.shape[1]):
        raise UsageError(f"rows of shape {x.shape} are no multiple of {fmt.name}'s block of {fmt.block_weights}")
    check_arithmetic()
    n = fmt.block_weights
    weights = np.ones((1, n), np.float32) if importance is None else scaled_importance(importance).reshape(-1, n)
    rows = np.ascontiguousarray(x, np.float32).reshape(-1, n)
    blocks = np.empty(len(rows), fmt.kernels.LAYOUT)
    fmt.kernels.encode(rows, weights, blocks, int(effort))
    if importance is not None and (alike := find_unweighted_blocks(x, fmt, importance)).any():
        again = np.empty(np.count_nonzero(alike), fmt.kernels.LAYOUT)
        fmt.kernels.encode(rows[alike], np.ones((1, n), np.float32), again, int(effort))
        blocks[alike] = again
    return blocks.view(np.uint8).reshape(x.shape[0], -1)


def find_unweighted_blocks(x: Floats, fmt: BlockFormat, importance: Floats) -> NDArray[np.bool_]:
    """Mark the blocks of `x` (n_rows, n_per_row) without importance above the floor where their weights are not 0.

    Shape (n_blocks,). With such importance any codes would do, so `quantize` weighs their columns alike.
    """
    rows = np.ascontiguousarray(x, np.float32).reshape(-1, fmt.block_weights)
    scaled = scaled_importance(importance) if importance.any() else np.zeros_like(importance)
    found = np.empty(len(rows), np.bool_)
    _rows().mark_unweighted(rows, scaled.reshape(-1, fmt.block_weights), IMPORTANCE_FLOOR, found)
    return found


def second_scale(peak: float) -> np.float32:
    """Return the second-level scale of NVFP4 for weights of at most `peak`: their divisor, never 0.

    The largest weight then needs the largest block scale, so that the scales of other blocks are as far as possible
    from the coarse subnormal ones.
    """
    return max(np.float32(peak) / NVFP4_LARGEST, np.finfo(np.float32).tiny)


def reconstruct(
    x: Floats, fmt: BlockFormat, importance: Floats | None = None, effort: Effort = Effort.DEFAULT, scale: float = 1
) -> Floats:
    """Return `x` as it reads back from `fmt`, encoded as by `quantize` after division by `scale`."""
    if scale == 1:
        return dequantize(quantize(x, fmt, importance, effort), fmt)
    return dequantize(quantize(x / np.float32(scale), fmt, importance, effort), fmt) * np.float32(scale)


def scaled_importance(importance: Floats) -> Floats:
    """Return `importance` (n,) with mean 1 and a floor; all ones where no importance is above zero."""
    mean = float(importance.mean(dtype=np.float64))
    if mean <= 0:
        return np.ones_like(importance)
    scaled: Floats = np.maximum((importance.astype(np.float64) / mean).astype(np.float32), IMPORTANCE_FLOOR)
    return scaled


def first_nonfinite(x: Floats) -> int | None:
    """Return the flat index of the first NaN or infinity in `x` (n_rows, n_per_row), or None."""
    index = int(_rows().first_nonfinite(x))
    return None if index < 0 else index


def count_nonfinite(x: Floats) -> int:
    """Count the weights of `x` that are NaN or infinite."""
    return x.size - int(np.count_nonzero(np.isfinite(x)))


def row_errors(x: Floats, y: Floats, importance: Floats | None = None) -> Errors:
    """Return per row of `x` and its reconstruction `y`: sum x^2, sum (x - y)^2, and both weighted by `importance`.

    Shape (n_rows, 4), float64.
    """
    out = np.empty((x.shape[0], 4), np.float64)
    weights = np.ones(x.shape[1], np.float32) if importance is None else importance
    _rows().sum_errors(x, y, weights, out)
    return out


def relative_error(errors: Errors) -> float:
    """Return the root of weighted error over energy of `errors`, from row_errors; 0 for weights that are all zero.

    Columns count alike where only zeros have importance. NaN or infinite where the reconstruction is.
    """
    energy, error = errors[:, 2].sum(), errors[:, 3].sum()
    if energy == 0:
        energy, error = errors[:, 0].sum(), errors[:, 1].sum()
    with np.errstate(invalid="ignore"):  # weights near the end of float32
        return float(np.sqrt(error / energy if energy > 0 else error))


def lost_row(errors: Errors, limit: float = LOST) -> int | None:
    """Return the first row whose reconstruction keeps almost nothing of it, or is not finite; else None.

    limit: row_limit of the format. A row that is all zero, or NEGLIGIBLE, may vanish.
    """
    lost = ~(errors[:, 1] < limit**2 * np.maximum(errors[:, 0], NEGLIGIBLE))
    return int(np.argmax(lost)) if lost.any() else None


def vanished_rows(errors: Errors) -> int:
    """Count the NEGLIGIBLE rows that did not survive: their reconstruction is as good as zero."""
    small = (errors[:, 0] > 0) & (errors[:, 0] < NEGLIGIBLE)
    return int(np.count_nonzero(small & ~(errors[:, 1] < LOST**2 * errors[:, 0])))


def gate(errors: Errors, fmt: BlockFormat, n_weights: int) -> str | None:
    """Return the fault of a reconstruction as text: a lost row, or an error beyond the format's ceiling; else None."""
    most = row_limit(fmt)
    row = lost_row(errors, most)
    if row is not None:
        error = relative_error(errors[row : row + 1, [0, 1, 0, 1]])
        return f"row {row} is lost: relative error {error:.3g}, limit {most:g}"
    error, limit = relative_error(errors), ceiling(float(errors[:, 0].sum()), n_weights, fmt)
    return None if error <= limit else f"relative error {error:.3g}, limit {limit:.3g} for {fmt.name}"


def ceiling(energy: float, n_weights: int, fmt: BlockFormat) -> float:
    """Return the largest relative error that is no fault, for a tensor with this sum of squares."""
    usual = ENDS[0] < math.sqrt(energy / max(n_weights, 1)) < ENDS[1] or energy == 0
    return min((GATE if usual else GATE_AT_THE_ENDS) * fmt.gaussian_rmse, LOST)


def row_limit(fmt: BlockFormat) -> float:
    """Return the relative error from which a row is lost.

    One-bit types have a single magnitude for a block: where it has spikes, even the best scale leaves little (0.955 in
    a row of Gemma 3 270M).
    """
    return LOST if fmt.bpw > 1.5 else LOST_OF_ONE_BIT


def warm_up(formats: Iterable[BlockFormat], *, encode: bool = True) -> None:
    """Compile, or load from the cache, the kernels for converting among `formats`, or with `encode` off for reading."""
    for fmt in formats:
        n = fmt.block_weights
        x = np.ones((1, n), np.float32)
        data = quantize(x, fmt) if encode and fmt.can_encode else np.zeros((1, fmt.block_bytes), np.uint8)
        y = dequantize(data, fmt)
        first_nonfinite(y)
        row_errors(x, x)
        if encode and fmt.can_encode:
            find_unweighted_blocks(x, fmt, x[0])


def check_arithmetic() -> None:
    """Raise NumericFault where this thread flushes subnormal numbers to zero: the bytes would depend on that."""
    if _rows().vanishes(_TINY, _HALF):
        hint = "a library has changed it (-ffast-math, torch.set_flush_denormal); do without, or in another process"
        raise NumericFault("processor", "it is set to flush subnormal numbers to zero", hint=hint)


def _rows() -> Any:
    """Import the kernels over rows, on first use, because Numba takes long."""
    return importlib.import_module("requant.formats.encoders.rows")
