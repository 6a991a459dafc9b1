"""Checkpoint: the sums of a stopped calibration in an archive of NumPy's kind, read as a stranger's file.

Its members must be uncompressed and exactly as long as the model's matrices make them, and their headers are compared
with the right ones, not parsed. A checkpoint that does not fit is ignored.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from requant.common.atomic_write import read_head, write_file
from requant.common.files import open_regular
from requant.common.inputs import own_files
from requant.common.serialization import dump, parse, parse_record, to_plain
from requant.common.sidecars import Sidecar
from requant.container.imatrix import LOOKUP
from requant.container.source import Source
from requant.errors import RequantError
from requant.model.roles import has_own_inputs, n_matrices
from requant.scoring.statistics import SquareSums, Statistics

SCHEMA = "requant.kept/1"
_HEAD = "head"
_START = 1024  # bytes of an archive that contain the schema in its head
_MAX_HEAD = 1 << 26  # bytes; 100,000 matrices have about 10 MiB
# raised by zipfile for a broken archive; RuntimeError for an encrypted one, or one of an unknown method
_BROKEN = (OSError, ValueError, LookupError, RuntimeError, EOFError, OverflowError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The matrix to which the arrays of an index belong, and the number of tokens that it saw."""

    name: str
    expert: int | None
    count: int


@dataclass(frozen=True, slots=True)
class _CheckpointHead:
    """The head of a checkpoint: the run, its tokens so far, and the matrices in the order of the arrays."""

    identity: str
    n_tokens: int
    keys: tuple[_Matrix, ...]


def save_checkpoint(path: Path, identity: str, statistics: Statistics) -> None:
    """Write the sums so far of the run called `identity`, in one step. Raise OutputRefused, InputOutputError."""
    keys = tuple(_Matrix(name, expert, sums.count) for (name, expert), sums in statistics.matrices.items())
    head = dump({"schema": SCHEMA} | to_plain(_CheckpointHead(identity, statistics.n_tokens, keys)))
    arrays = {
        f"{what}{i}": np.asarray(getattr(sums, what), np.float64)
        for i, sums in enumerate(statistics.matrices.values())
        for what in ("inputs", "gradients")
    }

    def fill(file: IO[bytes]) -> None:
        np.savez(file, allow_pickle=False, **{_HEAD: np.frombuffer(head.encode(), np.uint8)}, **arrays)

    write_file(path, fill, force=False, is_own=lambda path: _is_checkpoint(read_head(path, _START)))


def checkpoint_sidecar(path: Path) -> Sidecar:
    """The checkpoint at `path` as a sidecar."""
    return Sidecar(path, "a checkpoint of a calibration", lambda file: _is_checkpoint(os.pread(file, _START, 0)))


def _is_checkpoint(start: bytes) -> bool:
    """Return whether a file that begins with `start` is what `save_checkpoint` writes, perhaps damaged."""
    return start.startswith(b"PK\x03\x04") and f'"schema": "{SCHEMA}"'.encode() in start


def load_checkpoint(path: Path, identity: str, source: Source, n_ctx: int) -> Statistics | None:
    """Return the sums saved for the run `identity` on windows of `n_ctx` tokens; None for any other file."""
    with (
        suppress(RequantError, *_BROKEN),
        own_files(),
        os.fdopen(open_regular(path), "rb") as file,
        zipfile.ZipFile(file) as archive,
    ):
        head = _read_head(archive, path)
        if head.identity != identity or head.n_tokens % n_ctx:
            return None
        found = Statistics(head.n_tokens, n_ctx)
        for i, key in enumerate(head.keys):
            columns, rows = _lengths(source, key)
            sums = _read_sums(archive, f"inputs{i}", columns), _read_sums(archive, f"gradients{i}", rows)
            found.matrices[key.name, key.expert] = SquareSums(key.count, *sums)
        return found
    return None


def _read_head(archive: zipfile.ZipFile, path: Path) -> _CheckpointHead:
    data = _read_member(archive, _HEAD, _MAX_HEAD)
    start = len(_header("|u1", (len(data),)))
    if not data.startswith(_header("|u1", (len(data) - start,))):
        raise ValueError("the head is no text")
    head: _CheckpointHead = parse_record(_CheckpointHead, parse(data[start:].decode(), SCHEMA, path), "", path)
    return head


def _lengths(source: Source, key: _Matrix) -> tuple[int, int]:
    """Return columns and rows of the matrix. Raise LookupError where the model has no such matrix."""
    if key.name == LOOKUP:
        return 1, source.tensor("token_embd.weight").n_per_row
    if key.name not in source:
        raise LookupError(key.name)
    tensor = source.tensor(key.name)
    if not has_own_inputs(key.name, tensor.shape):
        return tensor.n_per_row, tensor.n_rows
    if key.expert is None or key.expert >= n_matrices(tensor.shape):
        raise LookupError(key.expert)
    return tensor.n_per_row, tensor.shape[1]


def _read_sums(archive: zipfile.ZipFile, name: str, length: int) -> NDArray[np.float64]:
    """Return (length,) sums, or the () 0 of a matrix without any. Raise ValueError for other arrays."""
    data = _read_member(archive, name, len(_header("<f8", (length,))) + 8 * length)
    for shape in ((length,), ()):
        header = _header("<f8", shape)
        if data.startswith(header) and len(data) == len(header) + 8 * math.prod(shape):
            sums = np.frombuffer(data, "<f8", offset=len(header)).reshape(shape).astype(np.float64)
            if (np.isfinite(sums) & (sums >= 0)).all() and (shape or sums == 0):
                return sums
    raise ValueError(f"{name} are not {length} sums of squares")


def _read_member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Return a member's bytes. Raise ValueError if compressed or longer than `most`, LookupError without it."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"{name} is compressed or too large")
    return archive.read(info)


def _header(kind: str, shape: tuple[int, ...]) -> bytes:
    """Return what NumPy writes before an array of this dtype and shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()
