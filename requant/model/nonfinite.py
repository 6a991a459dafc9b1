"""Weights that are not finite: found in rows, counted over a tensor, and the tensors that may be copied with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from requant.common.threads import in_order, n_threads
from requant.container.remote import Readable
from requant.container.source import Source, SourceTensor
from requant.errors import NumericFault, quoted
from requant.formats import codec
from requant.formats.codec import Bytes

_PIECE = 2**22  # bytes of a tensor that are looked at together
_WEIGHTS = 2**20  # and weights, once decoded
_HINT = "the file is damaged or was badly converted; get it again, or copy such tensors: convert --nonfinite keep-type"


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """How many weights are NaN or infinite, and the flat index in the tensor of the first of them."""

    count: int
    first: int

    def __str__(self) -> str:
        return f"{self.count} weights are not finite, the first at weight {self.first}"


def find_nonfinite(data: Bytes, tensor: SourceTensor, first_row: int) -> Nonfinite | None:
    """Those in `data`, whole rows of `tensor` from `first_row` on; None where all are finite, or no weights at all."""
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
    """Those of the whole tensor."""
    found, n = None, max(1, _PIECE // max(1, tensor.row_bytes))
    for first in range(0, tensor.n_rows, n):
        later = find_nonfinite(source.read_rows(tensor, first, min(n, tensor.n_rows - first)), tensor, first)
        if later is not None:
            found = later if found is None else Nonfinite(found.count + later.count, found.first)
    return found


def nonfinite_fault(source: Readable, tensor: SourceTensor) -> NumericFault:
    """The fault for a tensor in which one was found: where the first is, what it is, and how many there are."""
    path, what = source.files[tensor.file], f"tensor {quoted(tensor.name)} is not finite"
    found = scan_nonfinite(source, tensor)
    if found is None:
        return NumericFault(path, f"{what}, but was when read again", hint="check the disk and the memory")
    row, column = divmod(found.first, tensor.n_per_row)
    got = float(codec.dequantize(source.read_rows(tensor, row, 1), tensor.format)[0, column])
    return NumericFault(
        path,
        f"{what}: {found.count} of {tensor.n_weights} weights, the first at weight {found.first}",
        got=got,
        hint=_HINT,
    )


def preserve_nonfinite(
    source: Source, *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Read all of `source`, and have what is not finite in it stay as it is (`source.preserved`); a line for each tensor.

    Whatever is planned from then on copies these tensors, and converting lets the copies pass; a plan that encodes one
    of them is a NumericFault as ever. `progress` is called with bytes read.
    """

    def look(tensor: SourceTensor) -> Nonfinite | None:
        return scan_nonfinite(source, tensor)

    codec.warm_up(
        sorted({t.format for t in source.tensors if t.format.can_decode}, key=lambda f: f.type_id), encode=False
    )
    with contextlib.closing(in_order(look, source.tensors, n_threads(threads))) as results:
        for tensor, found in zip(source.tensors, results, strict=True):
            progress(tensor.n_bytes)
            if found is not None:
                source.preserved[tensor.name] = str(found)
    return [f"tensor {quoted(name)} stays as it is: {why}" for name, why in source.preserved.items()]
