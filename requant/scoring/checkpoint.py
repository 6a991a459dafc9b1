"""Sums of a calibration that was stopped, kept in an archive of NumPy's kind and read like a stranger's file.

Nothing in it is believed: its members must be uncompressed and exactly as long as the model's matrices make them, and
their headers are compared with the right ones, not parsed. What does not fit is as good as nothing.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from requant.common.files import open_regular
from requant.common.serialization import dump, parse, parse_record, to_plain
from requant.container.imatrix import LOOKUP
from requant.container.source import Source
from requant.errors import InputOutputError, RequantError
from requant.model.roles import is_experts, n_matrices
from requant.scoring.statistics import SquareSums, Statistics

SCHEMA = "requant.kept/1"
_HEAD = "head"
_MAX_HEAD = 1 << 26  # bytes; 100,000 matrices have about 10 MiB
# what zipfile raises for a broken archive; RuntimeError where it is encrypted, or of a method that is not known
_BROKEN = (OSError, ValueError, LookupError, RuntimeError, EOFError, OverflowError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class _Key:
    """The matrix that the arrays of an index are of, and the tokens behind them."""

    name: str
    expert: int | None
    count: int


@dataclass(frozen=True, slots=True)
class _Head:
    identity: str
    n_tokens: int
    keys: tuple[_Key, ...]


def save_checkpoint(path: Path, identity: str, statistics: Statistics) -> None:
    """Write the sums so far, of the run called `identity`, in one step. Raises InputOutputError."""
    keys = tuple(_Key(name, expert, sums.count) for (name, expert), sums in statistics.matrices.items())
    head = dump({"schema": SCHEMA} | to_plain(_Head(identity, statistics.n_tokens, keys)))
    arrays = {
        f"{what}{i}": np.asarray(getattr(sums, what), np.float64)
        for i, sums in enumerate(statistics.matrices.values())
        for what in ("inputs", "gradients")
    }
    part = path.with_name(f"{path.name}.new")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666), "wb") as file:
            np.savez(file, allow_pickle=False, **{_HEAD: np.frombuffer(head.encode(), np.uint8)}, **arrays)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise InputOutputError(path, f"cannot be written: {error.strerror}") from error


def load_checkpoint(path: Path, identity: str, source: Source, n_ctx: int) -> Statistics | None:
    """What `save_checkpoint` wrote for the run called `identity` on windows of `n_ctx` tokens; None for anything else."""
    with (
        suppress(RequantError, *_BROKEN),
        os.fdopen(open_regular(path), "rb") as file,
        zipfile.ZipFile(file) as archive,
    ):
        head = _head(archive, path)
        if head.identity != identity or head.n_tokens % n_ctx:
            return None
        found = Statistics(head.n_tokens, n_ctx)
        for i, key in enumerate(head.keys):
            columns, rows = _lengths(source, key)
            sums = _sums(archive, f"inputs{i}", columns), _sums(archive, f"gradients{i}", rows)
            found.matrices[key.name, key.expert] = SquareSums(key.count, *sums)
        return found
    return None


def _head(archive: zipfile.ZipFile, path: Path) -> _Head:
    data = _member(archive, _HEAD, _MAX_HEAD)
    start = len(_header("|u1", (len(data),)))
    if not data.startswith(_header("|u1", (len(data) - start,))):
        raise ValueError("the head is no text")
    head: _Head = parse_record(_Head, parse(data[start:].decode(), SCHEMA, path), "", path)
    return head


def _lengths(source: Source, key: _Key) -> tuple[int, int]:
    """Columns and rows of the matrix; raises LookupError where the model has no such matrix."""
    if key.name == LOOKUP:
        return 1, source.tensor("token_embd.weight").n_per_row
    if key.name not in source:
        raise LookupError(key.name)
    tensor = source.tensor(key.name)
    if not is_experts(key.name, tensor.shape):
        return tensor.n_per_row, tensor.n_rows
    if key.expert is None or key.expert >= n_matrices(tensor.shape):
        raise LookupError(key.expert)
    return tensor.n_per_row, tensor.shape[1]


def _sums(archive: zipfile.ZipFile, name: str, length: int) -> NDArray[np.float64]:
    """(length,) sums, or the () 0 that stands for sums of nothing; raises ValueError for what is no sum of squares."""
    data = _member(archive, name, len(_header("<f8", (length,))) + 8 * length)
    for shape in ((length,), ()):
        header = _header("<f8", shape)
        if data.startswith(header) and len(data) == len(header) + 8 * math.prod(shape):
            sums = np.frombuffer(data, "<f8", offset=len(header)).reshape(shape).astype(np.float64)
            if (np.isfinite(sums) & (sums >= 0)).all() and (shape or sums == 0):
                return sums
    raise ValueError(f"{name} are not {length} sums of squares")


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A member's bytes; raises ValueError for more than `most`, or fewer in the archive, LookupError without it."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"{name} is compressed or too large")
    return archive.read(info)


def _header(kind: str, shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before an array of that kind and shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()
