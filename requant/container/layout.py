"""Layout of an output file: its complete header and the place of every tensor, before a byte is written."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from requant.common.shapes import check_shape
from requant.container.digests import KEY
from requant.container.infos import MAX_NAME, round_up
from requant.container.metadata import Metadata, read_alignment
from requant.errors import BadInput, quote
from requant.formats import FORMATS

VERSION = 3


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor of the output: its offset from the start of the file, and its bytes without padding."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's header, padded up to `data_start`, its tensors, and its size with the last tensor's padding.

    digests: where the bytes of the header begin and end that are zero until all tensors are written; (0, 0) for none.
    """

    header: bytes
    data_start: int
    tensors: tuple[PlacedTensor, ...]
    size: int
    digests: tuple[int, int] = (0, 0)

    def begins(self, data: bytes) -> bool:
        """Return whether `data` begins with this header, whatever digests it holds."""
        (start, stop), n = self.digests, len(self.header)
        return len(data) >= n and data[:start] == self.header[:start] and data[stop:n] == self.header[stop:]

    @property
    def padding(self) -> Iterator[tuple[int, int]]:
        """Yield where the padding after each tensor begins and ends in the file, without empty ones."""
        stops = (*(t.offset for t in self.tensors[1:]), self.size)
        for tensor, stop in zip(self.tensors, stops, strict=False):
            if (start := tensor.offset + tensor.n_bytes) < stop:
                yield start, stop

    @property
    def sha256(self) -> str:
        """The header's digest in hex: the `Header.sha256` of the finished file."""
        return hashlib.sha256(self.header).hexdigest()


def lay_out(metadata: Metadata, tensors: Iterable[tuple[str, tuple[int, ...], int]], path: object) -> Layout:
    """Lay out tensors (name, shape in ggml's order, ggml type id) in a GGUF of version 3.

    The offset is the running sum of the sizes padded to general.alignment, as every loader demands. Raises BadInput,
    naming `path` (the output), for a tensor that no reader would take.
    """
    alignment = read_alignment(metadata)
    placed: list[PlacedTensor] = []
    infos: list[bytes] = []
    seen: set[str] = set()
    offset = 0
    for name, shape, type_id in tensors:
        n_bytes = _n_bytes(path, name, shape, type_id, seen)
        infos.append(_encode_info(name, shape, type_id, offset))
        placed.append(PlacedTensor(name, shape, type_id, offset, n_bytes))
        offset += round_up(n_bytes, alignment)
    fixed = b"GGUF" + struct.pack("<IQQ", VERSION, len(infos), len(metadata))
    header = b"".join([fixed, metadata.encode(), *infos])
    header = header.ljust(round_up(len(header), alignment), b"\0")
    start = len(header)
    moved = tuple(PlacedTensor(t.name, t.shape, t.type_id, start + t.offset, t.n_bytes) for t in placed)
    return Layout(header, start, moved, start + offset, metadata.find_items(KEY))


def _n_bytes(path: object, name: str, shape: tuple[int, ...], type_id: int, seen: set[str]) -> int:
    what = f"tensor {quote(name)}"
    n_name = len(name.encode())
    if not 0 < n_name <= MAX_NAME:
        raise BadInput(path, f"{what} has a name of the wrong length", got=f"{n_name} bytes", limit=MAX_NAME)
    if name in seen:
        raise BadInput(path, f"{what} would be written twice")
    seen.add(name)
    check_shape(shape, what, path)
    block = FORMATS[type_id]
    n_per_row = shape[0] if shape else 1
    if not block.divides(n_per_row):
        what = f"{what} cannot be {block.name}: its rows are not whole blocks"
        raise BadInput(path, what, got=n_per_row, limit=f"a multiple of {block.block_weights}")
    return block.n_bytes(math.prod(shape))


def info_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's info in the header."""
    return len(_encode_info(name, shape, 0, 0))


def _encode_info(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    encoded = name.encode()
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(encoded)) + encoded + dims + struct.pack("<iQ", type_id, offset)
