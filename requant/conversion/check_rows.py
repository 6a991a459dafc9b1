"""The check of one tensor of an output: its rows decoded, hashed, and compared with those of the source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant.container.remote import Readable
from requant.container.source import Source, SourceTensor
from requant.conversion.chunks import COPY_BYTES, hash_leaves
from requant.conversion.record import Converted, SourceDigest
from requant.errors import quote
from requant.formats import codec
from requant.formats.codec import Bytes, Floats
from requant.model.nonfinite import Nonfinite, find_nonfinite
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, scaled_matrix_name
from requant.planning.output_metadata import COMPENSATION_KEY

SAMPLE_ROWS = 64
FACTOR, SLACK = 1.5, 0.001  # sampled rows against the whole tensor: a row's error differs from its neighbour's
COPY, SAMPLE, NOTHING, COMPENSATED = "copy", "sample", "nothing", "compensated"


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of a tensor of the output, and the tensor of the source that they are compared with.

    how: COPY compares every byte, SAMPLE some rows, NOTHING none, nor does COMPENSATED: such weights may be far off
    where their results are not. scales: per matrix, the scale that the engine applies to the output's weights over that
    for the source's weights. digest: number of the source's digest in the record that these rows are a part of, None
    where it has none; it is of `leaf_rows` each.
    """

    tensor: SourceTensor
    first_row: int
    n_rows: int
    origin: SourceTensor | None
    how: str
    scales: Floats
    digest: int | None
    leaf_rows: int


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The bytes of a range of rows, its first fault, and the sums of codec.row_errors over its sampled rows.

    source: the digests of the rows of the source, as `hash_leaves` returns them, where they are recorded.
    """

    rows: RowRange
    data: Bytes
    source: bytes
    fault: str | None
    errors: NDArray[np.float64]
    nonfinite: Nonfinite | None


@dataclass(frozen=True, slots=True)
class CheckedTensor:
    """A tensor of the output with the SHA-256 of its bytes in hex, and the findings on it, a line each.

    how: that of its rows. misread: it was made from other bytes than the source has. has_digests: all its rows of the
    source were compared with those that it was made from.
    """

    name: str
    sha256: str
    how: str
    findings: tuple[str, ...]
    misread: bool
    has_digests: bool


def split_into_ranges(
    tensor: SourceTensor, target: Source, source: Source | None, recorded: Converted | None
) -> Iterator[RowRange]:
    """Yield the ranges of rows of a tensor of `target`, at least one; none crosses from one digest to the next."""
    origin, how, scales = None, NOTHING, np.ones(1, np.float32)
    if source is not None and tensor.name in source and source.tensor(tensor.name).shape == tensor.shape:
        origin = source.tensor(tensor.name)
        how = NOTHING if _is_new_scale(tensor, target, source) else _find_comparison(origin, tensor)
        if how == SAMPLE and _is_compensated(target, recorded):
            how = COMPENSATED
        new, old = read_weight_scales(target, tensor), read_weight_scales(source, origin)
        scales = scales if new is None else scales * new
        scales = scales if old is None else scales * old**-1
    digests = () if origin is None or recorded is None else recorded.source
    parts: list[tuple[int | None, int, int]] = [(i, x.n_rows, x.leaf_rows) for i, x in enumerate(digests)]
    if sum(n for _, n, _ in parts) != tensor.n_rows or not all(leaf for *_, leaf in parts):
        parts = [(None, tensor.n_rows, 1)]
    most = COPY_BYTES // max(1, tensor.row_bytes, 0 if origin is None else origin.row_bytes)
    start = 0
    for number, n, leaf in parts:
        step = max(leaf, most - most % leaf)
        for first in range(start, start + max(1, n), step):
            yield RowRange(tensor, first, min(step, start + n - first), origin, how, scales, number, leaf)
        start += n


def _find_comparison(origin: SourceTensor, tensor: SourceTensor) -> str:
    if origin.type_id == tensor.type_id:
        return COPY
    return SAMPLE if origin.format.can_decode and tensor.format.can_decode and tensor.n_bytes else NOTHING


def _is_compensated(target: Source, recorded: Converted | None) -> bool:
    """Return whether the tensor was encoded with compensation, or without a record may have been."""
    return COMPENSATION_KEY in target.metadata if recorded is None else recorded.is_compensated


def _is_new_scale(tensor: SourceTensor, target: Source, source: Source) -> bool:
    """Return whether `tensor` is the scale of a matrix that became NVFP4: the matrix's weights show if it is right."""
    matrix = scaled_matrix_name(tensor.name)
    if matrix not in target or matrix not in source:
        return False
    return target.tensor(matrix).format.name == SCALED_TYPE != source.tensor(matrix).format.name


def check_rows(target: Readable, source: Readable | None, rows: RowRange) -> CheckedRows:
    """Read a range of rows, decode all of it, and compare it with the same rows of the source."""
    data, original = target.read_rows(rows.tensor, rows.first_row, rows.n_rows), None
    errors = np.zeros((0, 4))
    fault = None
    if source is not None and rows.origin is not None:
        if rows.how == COPY or rows.digest is not None:
            original = source.read_rows(rows.origin, rows.first_row, rows.n_rows)
        if rows.how == COPY:
            assert original is not None
            fault = _byte_difference(data, original, rows)
        elif rows.how == SAMPLE:
            fault, errors = _sampled_errors(data, original, source, rows)
    found = find_nonfinite(data, rows.tensor, rows.first_row)
    digests = b"" if original is None or rows.digest is None else hash_leaves(original, rows.leaf_rows)
    return CheckedRows(rows, data, digests, fault, errors.sum(axis=0), found)


def _byte_difference(data: Bytes, original: Bytes, rows: RowRange) -> str | None:
    if np.array_equal(data, original):
        return None
    at = int(np.argmax(data.reshape(-1) != original.reshape(-1)))
    got, wanted = data.flat[at], original.flat[at]
    at += rows.first_row * rows.tensor.row_bytes
    what = f"tensor {quote(rows.tensor.name)} is a copy but differs from the source"
    return f"{what} at its byte {at} (got {got}, source {wanted})"


def _sampled_errors(
    data: Bytes, original: Bytes | None, source: Readable, sample: RowRange
) -> tuple[str | None, NDArray[np.float64]]:
    """The first row that is lost, and codec.row_errors of the sampled rows, all columns alike."""
    origin = sample.origin
    assert origin is not None
    stride = -(-sample.tensor.n_rows // SAMPLE_ROWS)
    rows = np.arange(sample.first_row + -sample.first_row % stride, sample.first_row + sample.n_rows, stride)
    if not rows.size:
        return None, np.zeros((0, 4))
    if original is None:
        encoded = np.concatenate([source.read_rows(origin, int(row), 1) for row in rows])
    else:
        encoded = original[rows - sample.first_row]
    x = codec.dequantize(encoded, origin.format)
    y = codec.dequantize(data[rows - sample.first_row], sample.tensor.format)
    y *= sample.scales[rows * len(sample.scales) // sample.tensor.n_rows][:, None]
    errors = codec.row_errors(x, y)
    limit = codec.row_limit(sample.tensor.format)
    lost = codec.lost_row(errors, limit)
    if lost is None:
        return None, errors
    relative = np.sqrt(errors[lost, 1] / errors[lost, 0])
    what = f"tensor {quote(sample.tensor.name)}, row {rows[lost]} is lost: relative error"
    return f"{what} (got {relative:.3g}, limit {limit})", errors


def sum_up(ranges: Iterable[CheckedRows], recorded: Converted | None) -> CheckedTensor:
    """Return the findings on one tensor; of the faults of its rows only the first."""
    digest, total, fault, bad = hashlib.sha256(), np.zeros(4), None, list[Nonfinite]()
    wanted = () if recorded is None else recorded.source
    hashes = [hashlib.sha256() for _ in wanted]
    for checked in ranges:
        digest.update(checked.data.reshape(-1).data)
        if checked.rows.digest is not None:
            hashes[checked.rows.digest].update(checked.source)
        total += checked.errors
        bad += [] if checked.nonfinite is None else [checked.nonfinite]
        fault = fault or checked.fault
        rows = checked.rows
    tensor, sha256, has_digests = rows.tensor, digest.hexdigest(), rows.digest is not None
    name, findings = quote(tensor.name), list[str]()
    misread = has_digests and [x.hexdigest() for x in hashes] != [x.sha256 for x in wanted]
    known = 0 if recorded is None or recorded.odd is None else recorded.odd.nonfinite
    if (count := sum(found.count for found in bad)) > known:
        fault = f"tensor {name}: {Nonfinite(count, bad[0].first)}"
    if recorded is not None and sha256 != recorded.sha256:
        findings.append(f"tensor {name} is not as it was written: sha256 {sha256:.12}, record {recorded.sha256:.12}")
    if misread:
        findings.append(_describe_misread(name, [x.hexdigest() for x in hashes], wanted))
    error, limit = codec.relative_error(total[None, :]), _error_limit(tensor, recorded)
    if fault is None and not error <= limit:
        figures = f"(got {error:.3g}, limit {limit:.3g})"
        findings.append(f"tensor {name} as {tensor.format.name} is off the source: relative error {figures}")
    found = (*([] if fault is None else [fault]), *findings)
    return CheckedTensor(tensor.name, sha256, rows.how, found, misread, has_digests)


def _describe_misread(name: str, found: list[str], wanted: tuple[SourceDigest, ...]) -> str:
    first = next(i for i, digest in enumerate(wanted) if digest.sha256 != found[i])
    start = sum(digest.n_rows for digest in wanted[:first])
    rows = f"rows {start} to {start + wanted[first].n_rows - 1} of the source"
    figures = f"have the digest {found[first]:.12}, record {wanted[first].sha256:.12}"
    return f"tensor {name} was made from other bytes: {rows} {figures}"


def _error_limit(tensor: SourceTensor, recorded: Converted | None) -> float:
    """The largest relative error allowed in sampled rows; types that requant does not write have no normal error."""
    if recorded is not None:
        return FACTOR * recorded.rmse_unweighted + SLACK
    normal = codec.GATE * tensor.format.gaussian_rmse
    return min(normal + SLACK if normal else codec.LOST, codec.LOST)
