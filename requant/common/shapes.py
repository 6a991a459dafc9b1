"""Shapes of tensors: GGUF's limits on dimensions and elements, for headers and for JSON files alike."""

from __future__ import annotations

from requant.errors import BadInput

MAX_DIMS = 4
MAX_INT64 = 2**63 - 1  # elements or bytes of a tensor


def check_shape(shape: tuple[int, ...], what: str, path: object) -> tuple[int, ...]:
    """Return `shape`, of the tensor `what` in the file at `path`.

    Raises BadInput for more than four dimensions, and for 2^63 elements or more, which no reader can count.
    """
    if len(shape) > MAX_DIMS:
        raise BadInput(path, f"{what} has too many dimensions", got=len(shape), limit=MAX_DIMS)
    n_weights = 1
    for length in shape:
        # ggml skips the zeros in this product but not the factors before them
        n_weights *= length
        if max(length, n_weights) > MAX_INT64:
            raise BadInput(path, f"{what} has too many elements", got=" x ".join(map(str, shape)))
    return shape
