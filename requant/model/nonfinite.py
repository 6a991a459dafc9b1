"""Nonfinite weights (NaN, infinity): found in rows, counted in a tensor, and preserved in copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from requant.common.threads import in_order, n_threads
from requant.errors import NumericFault, quote
from requant.formats import codec

if TYPE_CHECKING:
    from requant.container.remote import Readable
    from requant.container.source import Source, SourceTensor
    from requant.formats.codec import Bytes

_PIECE = 2**22  # bytes of a tensor that are read at a time
_WEIGHTS = 2**20  # weights that are decoded at a time
_HINT = "the file is damaged or was badly converted; get it again, or copy such tensors: convert --nonfinite keep-type"


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """The number of weights that are NaN or infinite, and the flat index in the tensor of the first."""

    count: int
    first: int

    def __str__(self) -> str:
        return f"{self.count} weights are not finite, the first at weight {self.first}"


def find_nonfinite(data: Bytes, tensor: SourceTensor, first_row: int) -> Nonfinite | None:
    """Find nonfinite weights in `data`, whole rows of `tensor` from `first_row` on; None where there are none."""
    found = None
    n = max(1, _WEIGHTS // max(1, tensor.n_per_row))
    for start in range(0, len(data) if tensor.format.can_decode and data.size else 0, n):
        x = codec.dequantize(data[start : start + n], tensor.format)
        at = codec.first_nonfinite(x)
        if at is not None:
            later = Nonfinite(codec.count_nonfinite(x), (first_row + start) * tensor.n_per_row + at)
            found = later if found is None else Nonfinite(found.count + later.count, found.first)
    return found


def scan_nonfinite(source: Readable, tensor: SourceTensor) -> Nonfinite | None:
    """Find the nonfinite weights of the whole tensor; None where there are none."""
    found, n = None, max(1, _PIECE // max(1, tensor.row_bytes))
    for first in range(0, tensor.n_rows, n):
        later = find_nonfinite(source.read_rows(tensor, first, min(n, tensor.n_rows - first)), tensor, first)
        if later is not None:
            found = later if found is None else Nonfinite(found.count + later.count, found.first)
    return found


def nonfinite_fault(source: Readable, tensor: SourceTensor) -> NumericFault:
    """Return the fault for a tensor with nonfinite weights: their number, and the place and value of the first."""
    path, what = source.files[tensor.file], f"tensor {quote(tensor.name)} is not finite"
    found = scan_nonfinite(source, tensor)
    if found is None:
        return NumericFault(path, f"{what}, but was when read again", hint="check the disk and the memory")
    row, column = divmod(found.first, tensor.n_per_row)
    got = float(codec.dequantize(source.read_rows(tensor, row, 1), tensor.format)[0, column])
    what = f"{what}: {found.count} of {tensor.n_weights} weights, the first at weight {found.first}"
    own = f"the plan gives it another type, which cannot hold that; set it to {tensor.format.name} there"
    return NumericFault(path, what, got=got, hint=own if tensor.name in source.preserved else _HINT)


def preserve_nonfinite(
    source: Source, *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Mark the tensors of `source` with nonfinite weights as preserved, and return a message for each.

    Reads all of `source`. Later plans copy these tensors (`source.preserved`), and a conversion accepts the copies; a
    plan that encodes one still ends in a NumericFault. `progress` is called with the number of bytes read.
    """
    with contextlib.closing(in_order(partial(scan_nonfinite, source), source.tensors, n_threads(threads))) as results:
        for tensor, found in zip(source.tensors, results, strict=True):
            progress(tensor.n_bytes)
            if found is not None:
                source.preserved[tensor.name] = str(found)
    return [f"tensor {quote(name)} stays as it is: {why}" for name, why in source.preserved.items()]
