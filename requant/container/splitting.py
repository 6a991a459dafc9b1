"""Splitting of an output: the tensors and the header of each file, and the files' names.

All keys are in the first file; the others have only their number. Format: tools/gguf-split of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from requant.common.units import format_size
from requant.container.header import combine_sha256
from requant.container.infos import round_up
from requant.container.layout import Layout, info_bytes, lay_out
from requant.container.metadata import FIXED_BYTES, Metadata, read_alignment
from requant.container.shards import MAX_SHARDS, shard_name, whole_name
from requant.errors import BadInput, quote
from requant.formats import FORMATS

Tensor = tuple[str, tuple[int, ...], int]  # name, shape in ggml's order, ggml type id


@dataclass(frozen=True, slots=True)
class Splitting:
    """The way to split an output: as the source is (`keep`), into files of at most `max_size` bytes, or not at all."""

    keep: bool = False
    max_size: int | None = None


WHOLE = Splitting()


def lay_out_files(
    metadata: Metadata, tensors: Sequence[Tensor], origins: Sequence[int], path: object, splitting: Splitting = WHOLE
) -> tuple[Layout, ...]:
    """Lay out every file; origins: the index of the source's file that each tensor is from.

    Raises BadInput, naming `path`, where a tensor or the keys alone are larger than a file may be.
    """
    if splitting.max_size is not None:
        files = _split_by_size(metadata, tensors, path, splitting.max_size)
    elif splitting.keep:
        files = [[t for t, o in zip(tensors, origins, strict=True) if o == i] for i in range(1 + max(origins))]
    else:
        files = [list(tensors)]
    if len(files) == 1:
        return (lay_out(metadata, files[0], path),)
    if len(files) > MAX_SHARDS:
        hint = "raise --max-shard-size"
        raise BadInput(path, "would be split into too many files", got=len(files), limit=MAX_SHARDS, hint=hint)
    n = len(tensors)
    return tuple(lay_out(_number_metadata(metadata, i, len(files), n), file, path) for i, file in enumerate(files))


def _number_metadata(metadata: Metadata, number: int, count: int, n_tensors: int) -> Metadata:
    """Return the metadata of one file: all keys for the first, for the others only those needed to read them."""
    own = {"split.no": ("u16", number), "split.count": ("u16", count), "split.tensors.count": ("i32", n_tensors)}
    if number == 0:
        return metadata.with_values(own)
    kept = {key: value for key, value in metadata.values.items() if key == "general.alignment"}
    return Metadata(metadata.path, kept).with_values(own)


def _split_by_size(metadata: Metadata, tensors: Sequence[Tensor], path: object, most: int) -> list[list[Tensor]]:
    alignment = read_alignment(metadata)
    keys = [FIXED_BYTES + len(_number_metadata(metadata, i, 2, len(tensors)).encode()) for i in range(2)]
    if keys[0] > most:
        hint = f"--max-shard-size must be at least {format_size(keys[0])}"
        raise BadInput(path, "the keys alone are larger than a file may be", got=keys[0], limit=most, hint=hint)
    files: list[list[Tensor]] = [[]]
    header, data = keys[0], 0
    for name, shape, type_id in tensors:
        info, n_bytes = info_bytes(name, shape), round_up(FORMATS[type_id].n_bytes(math.prod(shape)), alignment)
        if round_up(header + info, alignment) + data + n_bytes > most and (files[-1] or len(files) == 1):
            files.append([])
            header, data = keys[1], 0
        header, data = header + info, data + n_bytes
        size = round_up(header, alignment) + data
        if size > most:
            hint = f"--max-shard-size must be at least {format_size(size)}"
            what = f"tensor {quote(name)} alone is larger than a file may be"
            raise BadInput(path, what, got=f"{size} bytes", limit=most, hint=hint)
        files[-1].append((name, shape, type_id))
    return files


def output_paths(out: Path, layouts: Sequence[Layout]) -> list[Path]:
    """The paths of the files of the output `out`: OUT-00001-of-0000N.gguf and so on where there are several."""
    if len(layouts) == 1:
        return [out]
    stem = whole_name(out.name).removesuffix(".gguf")
    return [out.with_name(shard_name(stem, i, len(layouts))) for i in range(1, len(layouts) + 1)]


def total_size(layouts: Sequence[Layout]) -> int:
    """Bytes of all files together."""
    return sum(layout.size for layout in layouts)


def headers_sha256(layouts: Sequence[Layout]) -> str:
    """The `Source.header_sha256` of the finished files."""
    return combine_sha256([layout.sha256 for layout in layouts])
