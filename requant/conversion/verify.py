"""Verification of a finished output: every byte is read again and compared with its record and its source.

Always: the structure, and every weight decoded and finite. With the record (OUT.requant.json): size, header, types and
the SHA-256 of every tensor; copies may hold as many weights that are not finite as it has recorded. With the source:
metadata key by key, names and shapes, copies byte by byte, and of every encoded tensor up to 64 rows evenly spread:
none may be lost, and their relative error, all columns alike, must be at most 1.5 times the recorded one plus 0.001;
without a record, 3 times the error of the type on normal weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from requant.common.cluster import Cluster, Step
from requant.common.notebook import html
from requant.common.threads import in_order, n_threads
from requant.container.remote import Readable, RemoteReader, RemoteSource, remote_sources
from requant.container.source import Source, SourceTensor, open_source
from requant.conversion.chunks import rows_per_copy
from requant.conversion.compare import compare_metadata, compare_tensors, compare_with_record, describe_other_source
from requant.conversion.record import Conversion, Converted, read_conversion, record_path
from requant.errors import quote
from requant.formats import codec
from requant.formats.codec import Bytes, Floats
from requant.model.nonfinite import Nonfinite, find_nonfinite
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, scaled_matrix_name

SCHEMA = "requant.verify/1"
SAMPLE_ROWS = 64
FACTOR, SLACK = 1.5, 0.001  # sampled rows against the whole tensor: a row's error differs from its neighbour's


@dataclass(frozen=True, slots=True)
class Verification:
    """The findings on an output, a line each, none where it is sound; `n_bytes` of `n_tensors` tensors were read."""

    output: Path
    n_tensors: int
    n_bytes: int
    against: tuple[str, ...]  # "record", "source"
    findings: tuple[str, ...]
    other_source: bool = False  # the given source is not the one that the output was made from: a finding

    @property
    def ok(self) -> bool:
        """Return whether there are no findings."""
        return not self.findings

    @property
    def is_itself_sound(self) -> bool:
        """Return whether there are no findings, except perhaps that the given source is another one."""
        return len(self.findings) == self.other_source

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """Return a JSON object of schema requant.verify/1."""
        figures = {"tensors": self.n_tensors, "bytes": self.n_bytes, "against": self.against, "findings": self.findings}
        head = {"schema": SCHEMA, "output": self.output.name, "ok": self.ok, "other_source": self.other_source}
        return json.dumps(head | figures, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class _RowRange:
    """Rows of a tensor of the output, and the tensor of the source that they are compared with.

    scales: per matrix, the scale that the engine applies to the output's weights over that for the source's weights.
    """

    tensor: SourceTensor
    first_row: int
    n_rows: int
    origin: SourceTensor | None
    scales: Floats


@dataclass(frozen=True, slots=True)
class _CheckedRows:
    """The bytes of a range of rows, its first fault, and the sums of codec.row_errors over its sampled rows."""

    rows: _RowRange
    data: Bytes
    fault: str | None
    errors: NDArray[np.float64]
    nonfinite: Nonfinite | None


@dataclass(frozen=True, slots=True)
class _TensorTask:
    """A tensor for another machine to check: its file, that of the source's tensor if it is compared, its rows."""

    target: RemoteSource
    origin: RemoteSource | None
    ranges: tuple[_RowRange, ...]
    recorded: Converted | None


def verify(
    out: Path,
    *,
    source: Source | None = None,
    record: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Verify the file `out` against `source` and its record, which is the file `record` or the one beside `out`.

    `progress` is called with the bytes of `out` after each range of rows. The decoders of both files are compiled in
    the threads that need them where the caller has not done so. Raises BadInput where `out` is no sound GGUF file at
    all or `record` cannot be read, InputOutputError.
    """
    with open_source(Path(out)) as target:
        beside = record_path(target.files[0])  # that of a split output is beside its first file
        path = record if record is not None else beside if beside.exists() else None
        conversion = None if path is None else read_conversion(path)
        return verify_output(target, source=source, record=conversion, threads=threads, progress=progress)


def verify_output(
    target: Source,
    *,
    source: Source | None,
    record: Conversion | None,
    threads: int | None = None,
    cluster: Cluster | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Verify an open output as `verify` does, in threads or by the workers of `cluster`."""
    findings = [] if record is None else compare_with_record(target, record)
    strangers, origin = list[str](), None
    if source is not None:
        strangers = describe_other_source(target, source, record)
        findings += strangers or [*compare_metadata(target, source), *compare_tensors(target, source)]
        origin = None if strangers else source
    recorded = {} if record is None else {t.name: t for t in record.tensors}
    if cluster is None:
        findings += _check_tensors(target, origin, recorded, n_threads(threads), progress)
    else:
        findings += _check_on_cluster(cluster, target, origin, recorded, progress)
    against = [name for name, given in (("record", record), ("source", origin)) if given is not None]
    n_bytes = sum(t.n_bytes for t in target.tensors)
    return Verification(target.path, len(target.tensors), n_bytes, tuple(against), tuple(findings), bool(strangers))


def _check_tensors(
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    threads: int,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """Check every tensor in threads; yield the findings in file order."""
    ranges = (rows for tensor in target.tensors for rows in _row_ranges(tensor, target, source))
    with contextlib.closing(in_order(lambda rows: _check_rows(target, source, rows), ranges, threads)) as results:
        for name, checked in groupby(_report_progress(results, progress), key=lambda c: c.rows.tensor.name):
            yield from _sum_up(checked, recorded.get(name))


def _check_on_cluster(
    cluster: Cluster,
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    progress: Callable[[int], None],
) -> Iterator[str]:
    """Check every tensor by the workers of a cluster, one tensor per task."""
    targets, origins = remote_sources(target), () if source is None else remote_sources(source)

    def step(tensor: SourceTensor) -> Step:
        ranges = tuple(_row_ranges(tensor, target, source))
        origin = None if ranges[0].origin is None else origins[ranges[0].origin.file]
        item = _TensorTask(targets[tensor.file], origin, ranges, recorded.get(tensor.name))
        return Step(_check_tensor, item, f"tensor {quote(tensor.name)}", about=tensor)

    with contextlib.closing(cluster.run(map(step, target.tensors))) as steps:
        for done in steps:
            progress(done.about.n_bytes)
            yield from done.result


def _check_tensor(task: _TensorTask) -> list[str]:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(RemoteReader(task.target))
        source = None if task.origin is None else stack.enter_context(RemoteReader(task.origin))
        return list(_sum_up((_check_rows(target, source, rows) for rows in task.ranges), task.recorded))


def _report_progress(results: Iterator[_CheckedRows], progress: Callable[[int], None]) -> Iterator[_CheckedRows]:
    for checked in results:
        progress(checked.data.size)
        yield checked


def _row_ranges(tensor: SourceTensor, target: Source, source: Source | None) -> Iterator[_RowRange]:
    origin, scales = None, np.ones(1, np.float32)
    if source is not None and tensor.name in source and source.tensor(tensor.name).shape == tensor.shape:
        origin = None if _is_new_scale(tensor, target, source) else source.tensor(tensor.name)
        new, old = read_weight_scales(target, tensor), read_weight_scales(source, source.tensor(tensor.name))
        scales = scales if new is None else scales * new
        scales = scales if old is None else scales * old**-1
    n = rows_per_copy(tensor)
    for first in range(0, max(1, tensor.n_rows), n):
        yield _RowRange(tensor, first, min(n, tensor.n_rows - first), origin, scales)


def _is_new_scale(tensor: SourceTensor, target: Source, source: Source) -> bool:
    """Return whether `tensor` is the scale of a matrix that became NVFP4: the matrix's weights show if it is right."""
    matrix = scaled_matrix_name(tensor.name)
    if matrix not in target or matrix not in source:
        return False
    return target.tensor(matrix).format.name == SCALED_TYPE != source.tensor(matrix).format.name


def _check_rows(target: Readable, source: Readable | None, rows: _RowRange) -> _CheckedRows:
    """Read a range of rows, decode all of it, and compare it with the same rows of the source."""
    data = target.read_rows(rows.tensor, rows.first_row, rows.n_rows)
    errors = np.zeros((0, 4))
    fault = None
    if source is not None and rows.origin is not None:
        if rows.origin.type_id == rows.tensor.type_id:
            fault = _byte_difference(data, source.read_rows(rows.origin, rows.first_row, rows.n_rows), rows)
        elif rows.origin.format.can_decode and rows.tensor.format.can_decode and data.size:
            fault, errors = _sampled_errors(data, source, rows.origin, rows)
    found = find_nonfinite(data, rows.tensor, rows.first_row)
    return _CheckedRows(rows, data, fault, errors.sum(axis=0), found)


def _byte_difference(data: Bytes, original: Bytes, rows: _RowRange) -> str | None:
    if np.array_equal(data, original):
        return None
    at = int(np.argmax(data.reshape(-1) != original.reshape(-1)))
    got, wanted = data.flat[at], original.flat[at]
    at += rows.first_row * rows.tensor.row_bytes
    what = f"tensor {quote(rows.tensor.name)} is a copy but differs from the source"
    return f"{what} at its byte {at} (got {got}, source {wanted})"


def _sampled_errors(
    data: Bytes, source: Readable, origin: SourceTensor, sample: _RowRange
) -> tuple[str | None, NDArray[np.float64]]:
    """The first row that is lost, and codec.row_errors of the sampled rows, all columns alike."""
    stride = -(-sample.tensor.n_rows // SAMPLE_ROWS)
    rows = np.arange(sample.first_row + -sample.first_row % stride, sample.first_row + sample.n_rows, stride)
    if not rows.size:
        return None, np.zeros((0, 4))
    x = codec.dequantize(np.concatenate([source.read_rows(origin, int(row), 1) for row in rows]), origin.format)
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


def _sum_up(ranges: Iterable[_CheckedRows], recorded: Converted | None) -> Iterator[str]:
    """Yield the findings on one tensor; of the faults of its rows only the first."""
    digest, total, fault, bad = hashlib.sha256(), np.zeros(4), None, list[Nonfinite]()
    for checked in ranges:
        digest.update(checked.data.reshape(-1).data)
        total += checked.errors
        bad += [] if checked.nonfinite is None else [checked.nonfinite]
        fault = fault or checked.fault
        tensor = checked.rows.tensor
    name = quote(tensor.name)
    known = 0 if recorded is None or recorded.odd is None else recorded.odd.nonfinite
    if (count := sum(found.count for found in bad)) > known:
        fault = f"tensor {name}: {Nonfinite(count, bad[0].first)}"
    if fault is not None:
        yield fault
    if recorded is not None and digest.hexdigest() != recorded.sha256:
        yield f"tensor {name} is not as it was written: sha256 {digest.hexdigest():.12}, record {recorded.sha256:.12}"
    error, limit = codec.relative_error(total[None, :]), _error_limit(tensor, recorded)
    if fault is None and not error <= limit:
        figures = f"(got {error:.3g}, limit {limit:.3g})"
        yield f"tensor {name} as {tensor.format.name} is off the source: relative error {figures}"


def _error_limit(tensor: SourceTensor, recorded: Converted | None) -> float:
    """The largest relative error allowed in sampled rows; types that requant does not write have no normal error."""
    if recorded is not None:
        return FACTOR * recorded.rmse_unweighted + SLACK
    normal = codec.GATE * tensor.format.gaussian_rmse
    return min(normal + SLACK if normal else codec.LOST, codec.LOST)
