"""Digests of an output in its own metadata: of the headers and of every tensor, for copies without a record.

Key `requant.digests`, an array of UINT8, 16 bytes for each digest: the headers' first, then that of each tensor in the
order of the files. Each is the first half of a SHA-256. That of the headers is taken with the array full of zeros. That
of a tensor is taken over its name, type and shape with the SHA-256 of its bytes, so that a tensor is found again in
whatever order another tool has written it. The array has its size before a byte is written, and is filled in last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from requant.container.header import combine_sha256
from requant.container.metadata import ARRAY_HEAD

if TYPE_CHECKING:
    from requant.container.layout import Layout
    from requant.container.source import Source

KEY, SCHEMA_KEY = "requant.digests", "requant.digests.schema"
SCHEMA = "requant.digests/1"
N_BYTES = 16  # of a digest


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests in a file: of its headers, and of the tensors that were written, one after the other."""

    headers: bytes
    tensors: bytes

    @property
    def n_tensors(self) -> int:
        """Number of tensors that were written."""
        return len(self.tensors) // N_BYTES

    def in_order(self, found: Iterable[bytes]) -> bool:
        """Return whether the digests `found` are those of the tensors, in this order."""
        return b"".join(found) == self.tensors

    def without(self, found: Mapping[str, bytes]) -> list[str]:
        """Return the names in `found`, {name: digest}, whose digest is not among those of the tensors."""
        names = {digest: name for name, digest in found.items()}
        for at in range(0, len(self.tensors), N_BYTES):
            names.pop(self.tensors[at : at + N_BYTES], None)
        return list(names.values())


def reserve_digests(n_tensors: int) -> dict[str, tuple[str, object]]:
    """Return the metadata keys, their digests still zero, of an output of `n_tensors` tensors."""
    return {SCHEMA_KEY: ("str", SCHEMA), KEY: ("arr_u8", bytes(N_BYTES * (1 + n_tensors)))}


def digest_tensor(name: str, type_id: int, shape: Sequence[int], sha256: str) -> bytes:
    """Return the digest of a tensor whose bytes have the SHA-256 `sha256`, in hex."""
    text = "\n".join([name, str(type_id), " ".join(map(str, shape)), sha256])
    return hashlib.sha256(text.encode()).digest()[:N_BYTES]


def fill_in_digests(layouts: Sequence[Layout], sha256: Iterable[str]) -> tuple[Layout, ...]:
    """Return the layouts with the digests in the first header; sha256: of every tensor, in file order, in hex."""
    tensors = (t for layout in layouts for t in layout.tensors)
    digests = [digest_tensor(t.name, t.type_id, t.shape, hex) for t, hex in zip(tensors, sha256, strict=True)]
    first, data = layouts[0], b"".join([_digest_headers([layout.sha256 for layout in layouts]), *digests])
    start, stop = first.digests
    assert stop - start == len(data)
    header = first.header[:start] + data + first.header[stop:]
    return (replace(first, header=header), *layouts[1:])


def read_digests(target: Source) -> Digests | None:
    """Return the digests in the metadata of `target`, None where it has none of this form."""
    value = target.metadata.values.get(KEY)
    if value is None or value.type_name != "arr_u8" or target.metadata.get(SCHEMA_KEY) != SCHEMA:
        return None
    items = value.raw[ARRAY_HEAD:]
    return Digests(items[:N_BYTES], items[N_BYTES:]) if items and len(items) % N_BYTES == 0 else None


def hash_headers(target: Source) -> bytes:
    """Return the digest of the headers of `target`, which has digests, as they are now. Raises InputOutputError."""
    hashes = [file.header.sha256 for file in target.opened]
    file = target.opened[0]
    header = bytearray(file.header.data_start)
    file.read_into(memoryview(header), 0)
    start, stop = target.metadata.find_items(KEY)
    header[start:stop] = bytes(stop - start)
    hashes[0] = hashlib.sha256(header).hexdigest()
    return _digest_headers(hashes)


def _digest_headers(sha256: Sequence[str]) -> bytes:
    return bytes.fromhex(combine_sha256(sha256))[:N_BYTES]
