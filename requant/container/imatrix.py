"""Importance matrices: the mean squared input of every column, read from GGUF and legacy .dat files.

GGUF: `W.in_sum2` (n_per_row, n_matrices) sums of squares and `W.counts` (1, n_matrices) tokens behind them.
Legacy: per entry the values already divided by their tokens and multiplied by a call count.
Sources: common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp of llama.cpp.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from requant.common.files import open_regular, read_into
from requant.container.header import Header, TensorInfo, read_header
from requant.container.source import SourceTensor
from requant.errors import BadInput, brief

Floats = NDArray[np.float32]

_F32 = 0  # ggml type id
SUMS, COUNTS = ".in_sum2", ".counts"
GRADIENTS = ".g_sum2"  # requant's own: (n_rows, n_matrices) sums of squared gradients at the outputs
LOOKUP = "token_embd.lookup"  # requant's own, with GRADIENTS: those at the rows of the embedding
_MAX_NAME = 1024  # bytes of a legacy entry's name; a GGUF tensor name has at most 63
_MIN_ENTRY = 17  # bytes of a legacy entry: three integers, a letter, a value
_HASH_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's importance.

    `importance`: (n_matrices, n_per_row) float32, the mean square of each input column as measured: finite, not
    negative, not scaled to any mean. Matrices whose count is 0 saw no token; they hold the mean of the others.
    `counts`: (n_matrices,) float32, tokens behind each; a legacy file does not divide its values by matrix, so its
    entries have one row of all values, and the number of calls as the only count.
    `gradients`: (n_matrices, n_rows) float32, the mean squared gradient at each output row over the same tokens, in
    files that `requant calibrate` wrote, or None.
    """

    importance: Floats
    counts: Floats
    gradients: Floats | None = None

    @property
    def n_uncovered(self) -> int:
        """Matrices (experts) without a token."""
        return int(np.count_nonzero(self.counts == 0))

    @property
    def is_empty(self) -> bool:
        """Return whether no matrix saw a token, or all importance is zero: such an entry is ignored."""
        return self.n_uncovered == len(self.counts) or not self.importance.any()


@dataclass(frozen=True, slots=True)
class Imatrix:
    """A file's entries by tensor name, in file order; `sha256` of all its bytes, in hex."""

    path: str
    sha256: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int | None
    legacy: bool
    chunk_size: int | None = None
    lookup: Floats | None = None  # (n_embd,), mean squared gradient at the embedding's rows, from `requant calibrate`
    known_as: str | None = None  # the name that outputs record, where that is not the file's

    @property
    def n_tokens(self) -> int:
        """Number of tokens behind the file; 0 where it is not known."""
        return (self.chunk_count or 0) * (self.chunk_size or 0)

    @property
    def name(self) -> str:
        """The name that outputs record: without a folder."""
        return Path(self.known_as or self.path).name


@dataclass(frozen=True, slots=True)
class Coverage:
    """Names of tensors with and without importance, their weights, and per tensor the experts without a token."""

    covered: tuple[str, ...]
    missing: tuple[str, ...]
    weights_covered: int
    weights_missing: int
    uncovered_experts: Mapping[str, int]


def read_imatrix(path: Path) -> Imatrix:
    """Read the importance matrix in the GGUF or legacy file at `path`.

    Raises BadInput, naming the entry and what was expected, for anything malformed, not finite or negative.
    """
    path = Path(path)
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        magic = bytearray(min(4, size))
        read_into(path, descriptor, memoryview(magic), 0)
        read = _read_gguf if magic == b"GGUF" else _read_legacy
        return read(path, descriptor, size)
    finally:
        os.close(descriptor)


def importance_for(imatrix: Imatrix, name: str, shape: Sequence[int]) -> Floats | None:
    """Importance (n_matrices, n_per_row) float32 of a tensor of `shape`, or None where the file has none.

    The values are as measured, not scaled; a single row serves all matrices (`shares_row`). Raises BadInput where the
    entry's size is not the tensor's.
    """
    found = _find_entry(imatrix, name, shape)
    return None if found is None else found.importance


def shares_row(imatrix: Imatrix, name: str, shape: Sequence[int]) -> bool:
    """Return whether the file has one row for all matrices of a tensor, as older versions of llama-imatrix wrote it."""
    entry = imatrix.entries.get(name)
    return entry is not None and math.prod(shape[2:]) > 1 and entry.importance.size == shape[0]


def describe_shared_rows(imatrix: Imatrix, tensors: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """Return a line on those of `tensors`, by name and shape, whose matrices share a row of importance; else none."""
    n = sum(shares_row(imatrix, name, shape) for name, shape in tensors)
    what = "the imatrix is of an older collector: one row of importance serves all experts or heads of"
    return [f"{what} {n} tensor{'s' * (n > 1)}"] if n else []


def coverage(imatrix: Imatrix, tensors: Iterable[SourceTensor]) -> Coverage:
    """Compute the coverage of `tensors`, those that may be quantized, by the file.

    Raises BadInput where it covers none of them, or an entry has another size than its tensor.
    """
    covered: list[str] = []
    missing: list[str] = []
    weights = [0, 0]
    uncovered: dict[str, int] = {}
    for tensor in tensors:
        found = _find_entry(imatrix, tensor.name, tensor.shape)
        (missing if found is None else covered).append(tensor.name)
        weights[found is None] += math.prod(tensor.shape)
        if found is not None and found.n_uncovered:
            uncovered[tensor.name] = found.n_uncovered
    if missing and not covered:
        raise BadInput(
            imatrix.path,
            "it was made for another model: none of its entries names a tensor of this one",
            got=f"{len(imatrix.entries)} entries",
        )
    return Coverage(tuple(covered), tuple(missing), weights[0], weights[1], uncovered)


def _find_entry(imatrix: Imatrix, name: str, shape: Sequence[int]) -> Entry | None:
    """Find the entry of a tensor, in the tensor's shape; None where there is none, or it is empty."""
    entry = imatrix.entries.get(name)
    if entry is None or not shape:
        return None
    n_per_row, n_matrices = shape[0], math.prod(shape[2:])
    if shares_row(imatrix, name, shape):
        rows = np.repeat(entry.importance.reshape(1, n_per_row), n_matrices, axis=0)
        return None if entry.is_empty else Entry(rows, np.repeat(entry.counts, n_matrices))
    same = entry.importance.size == n_per_row * n_matrices
    if not same or (not imatrix.legacy and entry.importance.shape[1] != n_per_row):
        raise BadInput(
            imatrix.path,
            f"it was made for another model: entry '{brief(name)}' has another size than the tensor",
            got=" x ".join(map(str, reversed(entry.importance.shape))),
            limit=f"exactly {n_per_row} x {n_matrices}",
        )
    if imatrix.legacy and n_matrices > 1:
        # one count for all experts: those whose importance is all zero saw no token
        split = entry.importance.reshape(n_matrices, n_per_row)
        entry = _fill_gaps(split, np.where(split.any(axis=1), entry.counts[0], 0).astype(np.float32))
    return None if entry.is_empty else entry


def _fill_gaps(importance: Floats, counts: Floats) -> Entry:
    """Return an entry where matrices with a count of 0 hold the mean of the others (llama-quantize takes 1.0)."""
    seen = counts > 0
    if seen.any() and not seen.all():
        importance = importance.copy()
        importance[~seen] = importance[seen].mean(axis=0, dtype=np.float64)
    return Entry(importance, counts)


def _check_values(path: Path, what: str, values: Floats) -> Floats:
    """Return `values`, all finite and none negative. Raises BadInput with the first that is not."""
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        flat = int(np.argmax(bad))
        got = float(values.reshape(-1)[flat])
        raise BadInput(path, f"{what}, value {flat} is no mean square", got=got, limit="finite, not negative")
    return values


def _hash_file(path: Path, descriptor: int, size: int) -> str:
    digest, chunk = hashlib.sha256(), bytearray(min(size, _HASH_CHUNK))
    for start in range(0, size, _HASH_CHUNK):
        part = memoryview(chunk)[: min(_HASH_CHUNK, size - start)]
        read_into(path, descriptor, part, start)
        digest.update(part)
    return digest.hexdigest()


# GGUF


def _read_gguf(path: Path, descriptor: int, n_bytes: int) -> Imatrix:
    header = read_header(path, descriptor)
    kind = header.metadata.get("general.type")
    if kind not in (None, "imatrix"):
        raise BadInput(path, "is a GGUF file, but no importance matrix", got=f"general.type {brief(repr(kind), 40)}")
    tensors = {t.name: t for t in header.tensors}
    names = [t.removesuffix(SUMS) for t in tensors if t.endswith(SUMS)]
    if not names:
        raise BadInput(path, "holds no importance", got=f"{len(tensors)} tensors, none of them '*{SUMS}'")
    lone = next((t for t in tensors if t.endswith(COUNTS) and t.removesuffix(COUNTS) + SUMS not in tensors), None)
    if lone is not None:
        raise BadInput(path, f"entry '{brief(lone.removesuffix(COUNTS))}' has counts, but no sums")
    entries = {name: _read_gguf_entry(path, descriptor, header, tensors, name) for name in names}
    if not any(entry.counts.any() for entry in entries.values()):
        raise BadInput(path, "holds no importance: no token is behind any entry", got=f"{len(entries)} entries")
    datasets = header.metadata.get("imatrix.datasets")
    chunks, size = (_parse_count(header.metadata.get(f"imatrix.chunk_{what}")) for what in ("count", "size"))
    lookup = None
    if LOOKUP + GRADIENTS in tensors and chunks and size:
        info = tensors[LOOKUP + GRADIENTS]
        sums = _check_values(path, f"tensor '{LOOKUP + GRADIENTS}'", _read_floats(path, descriptor, header, info))
        lookup = sums / np.float32(chunks * size)
    return Imatrix(
        path=str(path),
        sha256=_hash_file(path, descriptor, n_bytes),
        entries=entries,
        datasets=tuple(str(d) for d in datasets) if isinstance(datasets, list) else (),
        chunk_count=chunks,
        legacy=False,
        chunk_size=size,
        lookup=lookup,
    )


def _parse_count(value: object) -> int | None:
    """Return a count that llama-imatrix could have written; None for anything else."""
    return value if type(value) is int and 0 <= value < 2**32 else None


def _read_gguf_entry(
    path: Path, descriptor: int, header: Header, tensors: Mapping[str, TensorInfo], name: str
) -> Entry:
    what = f"entry '{brief(name)}'"
    if name + COUNTS not in tensors:
        raise BadInput(path, f"{what} has sums, but no counts")
    sums, counts = tensors[name + SUMS], tensors[name + COUNTS]
    n_matrices = sums.n_rows
    if sums.n_weights == 0:
        raise BadInput(path, f"{what} has no sums", got=0)
    if counts.n_weights not in (1, n_matrices) or counts.n_weights == 0:
        raise BadInput(path, f"{what} has the wrong number of counts", got=counts.n_weights, limit=f"{n_matrices} or 1")
    n_tokens = _check_values(path, f"{what}, counts", _read_floats(path, descriptor, header, counts))
    total = _check_values(path, what, _read_floats(path, descriptor, header, sums)).reshape(n_matrices, sums.n_per_row)
    n_tokens = np.broadcast_to(n_tokens, n_matrices).astype(np.float32)
    gradients = None
    if name + GRADIENTS in tensors:
        info = tensors[name + GRADIENTS]
        if info.n_rows != n_matrices or not info.n_weights:
            raise BadInput(path, f"tensor '{brief(info.name)}' has the wrong shape", got=list(info.shape))
        gradients = _check_values(path, f"{what}, gradients", _read_floats(path, descriptor, header, info))
        gradients = gradients.reshape(n_matrices, info.n_per_row)
    entry = entry_of(total, n_tokens, gradients)
    _check_values(path, f"{what}, divided by its counts", entry.importance)
    return entry


def entry_of(sums: Floats, counts: Floats, gradients: Floats | None = None) -> Entry:
    """The entry of sums of squares (n_matrices, n_per_row) over `counts` (n_matrices,) tokens; gradients: likewise."""
    with np.errstate(over="ignore"):
        divisor = np.where(counts > 0, counts, 1)[:, None].astype(np.float64)
        entry = _fill_gaps((sums / divisor).astype(np.float32), counts)
        return entry if gradients is None else replace(entry, gradients=(gradients / divisor).astype(np.float32))


def _read_floats(path: Path, descriptor: int, header: Header, info: TensorInfo) -> Floats:
    if info.type_id != _F32:
        what = f"tensor '{brief(info.name)}' has the wrong type"
        raise BadInput(path, what, got=info.format.name, expected="F32")
    values = np.empty(info.n_weights, dtype="<f4")  # the header was checked: the file is that long
    read_into(path, descriptor, values.data.cast("B"), header.data_start + info.offset)
    return values


# legacy .dat


@dataclass(slots=True)
class _LegacyCursor:
    """A position in a legacy file; every length is checked against `size` before it is used."""

    path: Path
    descriptor: int
    size: int
    position: int = 0

    def take(self, n_bytes: int, what: str) -> bytearray:
        left = self.size - self.position
        if not 0 <= n_bytes <= left:
            self.fail(f"{what} at offset {self.position} runs past the end", got=f"{n_bytes} bytes", limit=left)
        data = bytearray(n_bytes)
        read_into(self.path, self.descriptor, memoryview(data), self.position)
        self.position += n_bytes
        return data

    def integer(self, what: str, low: int, high: int) -> int:
        at = self.position
        value = int(struct.unpack("<i", self.take(4, what))[0])
        if not low <= value <= high:
            self.fail(f"{what} at offset {at} is out of range", got=value, limit=f"{low} to {max(low, high)}")
        return value

    def text(self, what: str, low: int = 0) -> str:
        length = self.integer(f"{what}, length", low, min(_MAX_NAME if low else self.size, self.size - self.position))
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def fail(self, what: str, *, got: object = None, limit: object = None) -> NoReturn:
        hint = "a GGUF imatrix begins with 'GGUF'; this was read as a legacy .dat file"
        raise BadInput(self.path, what, got=got, limit=limit, hint=hint)


def _read_legacy(path: Path, descriptor: int, size: int) -> Imatrix:
    walk = _LegacyCursor(path, descriptor, size)
    n_entries = walk.integer("the number of entries", 1, max(0, size - 4) // _MIN_ENTRY)
    entries: dict[str, Entry] = {}
    for i in range(n_entries):
        name = walk.text(f"entry {i}, name", low=1)
        if name in entries:
            walk.fail(f"entry '{brief(name)}' appears twice")
        entries[name] = _read_legacy_entry(walk, f"entry '{brief(name)}'")
    chunk_count, dataset = None, ""
    if walk.position < size:
        chunk_count = walk.integer("the chunk count", 0, 2**31 - 1)
    if walk.position < size:
        dataset = walk.text("the name of the data set")
    if walk.position < size:
        walk.fail(f"{size - walk.position} bytes are left over at offset {walk.position}")
    return Imatrix(
        str(path), _hash_file(path, descriptor, size), entries, (dataset,) if dataset else (), chunk_count, legacy=True
    )


def _read_legacy_entry(walk: _LegacyCursor, what: str) -> Entry:
    n_calls = walk.integer(f"{what}, number of calls", 0, 2**31 - 1)
    n_values = walk.integer(f"{what}, number of values", 1, (walk.size - walk.position) // 4)
    values = np.frombuffer(walk.take(4 * n_values, what), dtype="<f4")
    mean = _check_values(walk.path, what, values) / np.float32(max(n_calls, 1))
    return Entry(mean.astype(np.float32)[None, :], np.array([max(n_calls, 1)], dtype=np.float32))
