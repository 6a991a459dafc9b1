"""Bytes of a file that belong to no key and no tensor: padding, which is zero, and any bytes after the last tensor."""

from __future__ import annotations

from collections.abc import Iterator

from requant.container.infos import round_up
from requant.container.source import Source, SourceFile
from requant.errors import FILE_NAME, brief, quote


def find_stray_bytes(target: Source) -> Iterator[str]:
    """Yield a line for each file of `target`, written by requant, with bytes after its last tensor or other padding.

    Raises InputOutputError.
    """
    for file in target.opened:
        header = file.header
        name = "the file" if len(target.opened) == 1 else f"'{brief(file.path.name, FILE_NAME)}'"
        if header.trailing_bytes:
            yield f"{name} has {header.trailing_bytes} bytes after its last tensor, which belong to no tensor"
        if header.missing_bytes:
            yield f"{name} is cut short: the last {header.missing_bytes} bytes of its padding are missing"
        if (place := _find_filled_padding(file)) is not None:
            yield f"{name} has bytes that are not zero in its padding, the first {place}"


def _find_filled_padding(file: SourceFile) -> str | None:
    """Return where the first padding is that is not zero, None where all is."""
    header = file.header
    if any(header.padding):
        return "before the first tensor"
    for tensor in header.tensors:
        start = tensor.offset + tensor.n_bytes
        stop = min(round_up(start, header.alignment), header.file_size - header.data_start)
        padding = bytearray(max(0, stop - start))
        file.read_into(memoryview(padding), header.data_start + start)
        if any(padding):
            return f"after tensor {quote(tensor.name)}"
    return None
