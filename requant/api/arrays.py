"""The Python API for arrays: conversion of weights to the bytes of any ggml type and back, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from requant.common.threads import in_order, n_threads
from requant.errors import NumericFault, UsageError, brief, suggest
from requant.formats import FORMATS, BlockFormat, Effort, by_name, codec
from requant.formats.codec import Bytes, Floats

CHUNK_WEIGHTS = 2**18  # of a thread's task


def quantize(
    array: ArrayLike,
    type_name: str,
    importance: ArrayLike | None = None,
    effort: str = "default",
    *,
    threads: int | None = None,
) -> Bytes:
    """Encode `array` (..., n_per_row) in the ggml type, as (..., row_bytes) uint8, the rows of a GGUF tensor.

    array: real numbers, taken as float32; the last axis is a row, which must be whole blocks of the type. importance:
    (n_per_row,), or for a stack of matrices (n_matrices, n_per_row), finite, not negative, any scale; what is minimised
    is sum importance * (x - y)^2. effort: `fast`, `default` or `best`. threads: None for all cores; the bytes are the
    same for any. NVFP4 gets no second-level scale here: divide by `requant.formats.codec.second_scale` first where an
    engine multiplies by one.

    Raises UsageError for a type, shape, importance or effort that makes no sense, NumericFault for weights that are
    not finite, a row that does not survive in the type, or an error of all that is far beyond what is usual for it.
    """
    fmt, level, x = _find_format(type_name), parse_effort(effort), np.asarray(array)
    if x.dtype.kind not in "fiub" or not x.ndim or not x.shape[-1] or not fmt.divides(x.shape[-1]):
        wanted = f"rows of whole blocks of {fmt.name}'s {fmt.block_weights} weights"
        raise UsageError(f"an array of {x.dtype} and shape {x.shape} is not {wanted}")
    if not fmt.can_encode:
        raise UsageError(f"{fmt.name} cannot be written")
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    weights = None if importance is None else _check_importance(importance, x.shape)
    n = len(rows) if weights is None else len(rows) // len(weights)  # rows of a matrix
    out, errors = np.empty((len(rows), fmt.n_bytes(rows.shape[1])), np.uint8), np.empty((len(rows), 4))

    def encode(first: int, stop: int) -> None:
        own = None if weights is None else weights[first // n]
        part = _check_finite(rows[first:stop], rows, first)
        out[first:stop] = codec.quantize(part, fmt, own, level)
        errors[first:stop] = codec.row_errors(part, codec.dequantize(out[first:stop], fmt), own)

    codec.warm_up([fmt])
    _run_in_parts(encode, len(rows), n, rows.shape[1], threads)
    fault = codec.gate(errors, fmt, rows.size)
    if fault is not None:
        raise NumericFault("array", f"does not survive as {fmt.name}: {fault}", hint="scale it, or take another type")
    return out.reshape(*x.shape[:-1], out.shape[1])


def dequantize(data: NDArray[np.uint8], type_name: str, *, threads: int | None = None) -> Floats:
    """Decode `data` (..., row_bytes) uint8 to weights (..., n_per_row) float32, bit for bit as ggml does.

    Raises UsageError for a type that holds no weights, and for rows that are not whole blocks of it.
    """
    fmt, data = _find_format(type_name), np.asarray(data)
    if not fmt.can_decode:
        raise UsageError(f"{fmt.name} holds no weights")
    if data.dtype != np.uint8 or not data.ndim or not data.shape[-1] or data.shape[-1] % fmt.block_bytes:
        wanted = f"rows of whole blocks of {fmt.name}'s {fmt.block_bytes} bytes"
        raise UsageError(f"an array of {data.dtype} and shape {data.shape} is not {wanted}")
    rows = np.ascontiguousarray(data).reshape(-1, data.shape[-1])
    out = np.empty((len(rows), rows.shape[1] // fmt.block_bytes * fmt.block_weights), np.float32)

    def decode(first: int, stop: int) -> None:
        out[first:stop] = codec.dequantize(rows[first:stop], fmt)

    codec.warm_up([fmt], encode=False)
    _run_in_parts(decode, len(rows), len(rows), out.shape[1], threads)
    return out.reshape(*data.shape[:-1], out.shape[1])


def _run_in_parts(work: Callable[[int, int], None], n_rows: int, n: int, n_per_row: int, threads: int | None) -> None:
    """Call `work` on ranges of rows [first, stop), none of which crosses a multiple of `n`."""
    most = max(1, CHUNK_WEIGHTS // n_per_row)

    def parts() -> Iterator[tuple[int, int]]:
        for start in range(0, n_rows, max(1, n)):
            for first in range(start, start + n, most):
                yield first, min(first + most, start + n)

    for _ in in_order(lambda part: work(*part), parts(), n_threads(threads)):
        pass


def _check_finite(part: NDArray[Any], rows: NDArray[Any], first: int) -> Floats:
    """Return `part`, the rows from `first` on, as float32. Raises NumericFault for NaN and infinity."""
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        x = part.astype(np.float32)
        bad = codec.first_nonfinite(x)
        if bad is None:
            return x
        count = codec.count_nonfinite(rows.astype(np.float32))
    row, column = divmod(bad, x.shape[1])
    what = f"{count} of {rows.size} weights are not finite, the first at row {first + row}, column {column}"
    raise NumericFault("array", what, got=float(x.flat[bad]))


def _check_importance(importance: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Return importance (n_matrices or 1, n_per_row) float32. Raises UsageError."""
    weights = np.asarray(importance)
    n_matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
    if weights.dtype.kind not in "fiub" or weights.shape not in ((shape[-1],), (n_matrices, shape[-1])):
        wanted = f"({shape[-1]},)" if n_matrices == 1 else f"({shape[-1]},) or ({n_matrices}, {shape[-1]})"
        raise UsageError(f"importance of {weights.dtype} and shape {weights.shape} does not fit; it must be {wanted}")
    found = np.ascontiguousarray(weights, np.float32).reshape(-1, shape[-1])
    if not np.isfinite(found).all() or (found < 0).any():
        raise UsageError("importance must be finite and not negative")
    return found


def _find_format(type_name: str) -> BlockFormat:
    fmt = by_name(type_name)
    if fmt is None:
        names = [fmt.name for fmt in FORMATS.values()]
        raise UsageError(f"'{brief(type_name)}' is not a ggml type; {suggest(type_name, names)}")
    return fmt


def parse_effort(name: str) -> Effort:
    """Return the effort called `name`. Raises UsageError."""
    if name not in (known := [e.name.lower() for e in Effort]):
        raise UsageError(f"effort must be one of {', '.join(known)}, not '{brief(name)}'")
    return Effort[name.upper()]
