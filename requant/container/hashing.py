"""The SHA-256 of whole files, read through the descriptors of an open source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from requant.container.source import Source

_BLOCK = 1 << 22  # bytes read at once


@dataclass(frozen=True, slots=True)
class FileHash:
    """The hash of a whole file: its name without a folder, bytes and SHA-256 in hex."""

    name: str
    size: int
    sha256: str


def hash_files(source: Source, progress: Callable[[int], None] = lambda _: None) -> tuple[FileHash, ...]:
    """Hash every file of `source`, in order; `progress` is called with the bytes of each block.

    Raises SourceChanged, InputOutputError.
    """
    found = []
    buffer = bytearray(_BLOCK)
    for file in source.opened:
        digest, size = hashlib.sha256(), file.header.file_size
        for offset in range(0, size, _BLOCK):
            block = memoryview(buffer)[: min(_BLOCK, size - offset)]
            file.read_into(block, offset)
            digest.update(block)
            progress(len(block))
        found.append(FileHash(file.path.name, size, digest.hexdigest()))
    source.check_unchanged()
    return tuple(found)
