"""Verify: read a finished output again, every byte, and compare it with its record and with its source.

Always: the structure, and every weight decoded and finite. With the record (OUT.requant.json): size, header, types and
the SHA-256 of every tensor; and it may say that a copy is not finite. With the source: metadata key by key, names and
shapes, copies byte by byte, and of every encoded tensor up to 64 rows evenly spread: none may be lost, and their
relative error, all columns alike, must be at most 1.5 times the recorded one plus 0.001; without a record, 3 times what
the type has on normal weights.
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
from requant.container.remote import Readable, Reader, RemoteSource, remote_sources
from requant.container.source import Source, SourceTensor, open_source
from requant.conversion import compare as differences
from requant.conversion.chunks import copy_rows
from requant.conversion.record import Conversion, Converted, read_conversion, record_path
from requant.errors import quoted
from requant.formats import BlockFormat, codec
from requant.formats.codec import Bytes, Floats
from requant.model.nonfinite import Nonfinite, find_nonfinite
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, scaled_matrix_name

SCHEMA = "requant.verify/1"
SAMPLE_ROWS = 64
FACTOR, SLACK = 1.5, 0.001  # sampled rows against the whole tensor: a row's error differs from its neighbour's


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: one line each, none where the output is sound. `n_bytes` of `n_tensors` tensors were read."""

    output: Path
    n_tensors: int
    n_bytes: int
    against: tuple[str, ...]  # "record", "source"
    findings: tuple[str, ...]
    other_source: bool = False  # the source named is not what the output was made from, which is a finding

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def is_itself_sound(self) -> bool:
        """Whether nothing was found but, perhaps, that the source named is another."""
        return len(self.findings) == self.other_source

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """One object, schema requant.verify/1."""
        figures = {"tensors": self.n_tensors, "bytes": self.n_bytes, "against": self.against, "findings": self.findings}
        head = {"schema": SCHEMA, "output": self.output.name, "ok": self.ok, "other_source": self.other_source}
        return json.dumps(head | figures, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a tensor of the output, and the tensor of the source that they are compared with.

    scales: what matrix by matrix the engine multiplies the output's weights by, over what it does the source's.
    """

    tensor: SourceTensor
    first_row: int
    n_rows: int
    origin: SourceTensor | None
    scales: Floats


@dataclass(frozen=True, slots=True)
class _Seen:
    """A part's bytes, what is wrong with them, and sums as codec.row_errors has them of its sampled rows."""

    part: _Part
    data: Bytes
    wrong: str | None
    errors: NDArray[np.float64]
    nonfinite: Nonfinite | None


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor for another machine to look at: its file, that of the source's if it is compared, its parts."""

    target: RemoteSource
    origin: RemoteSource | None
    parts: tuple[_Part, ...]
    recorded: Converted | None


def verify(
    out: Path,
    *,
    source: Source | None = None,
    record: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Everything that is wrong with the file `out`, compared with `source` and with its `record`.

    The record is looked for beside `out` if none is named; `progress` is called with the bytes of `out` of each part
    read. Raises BadInput where `out` is no sound GGUF file at all or a named record cannot be read, InputOutputError.
    """
    with open_source(Path(out)) as target:
        beside = record_path(target.files[0])  # that of a split output is beside its first file
        found = record if record is not None else beside if beside.exists() else None
        conversion = None if found is None else read_conversion(found)
        return verify_source(target, source=source, made=conversion, threads=threads, progress=progress)


def verify_source(
    target: Source,
    *,
    source: Source | None,
    made: Conversion | None,
    threads: int | None = None,
    cluster: Cluster | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """As `verify`, of an open output and the record `made`, by threads or by the workers of `cluster`."""
    findings = [] if made is None else list(differences.compare_with_record(target, made))
    strangers, origin = list[str](), None
    if source is not None:
        strangers = differences.made_elsewhere(target, source, made)
        findings += strangers or [
            *differences.compare_metadata(target, source),
            *differences.compare_tensors(target, source),
        ]
        origin = None if strangers else source
    codec.warm_up(formats_read(target, origin), encode=False)
    recorded = {} if made is None else {t.name: t for t in made.tensors}
    if cluster is None:
        findings += _read_all(target, origin, recorded, n_threads(threads), progress)
    else:
        findings += _read_there(cluster, target, origin, recorded, progress)
    against = [name for name, given in (("record", made), ("source", origin)) if given is not None]
    n_bytes = sum(t.n_bytes for t in target.tensors)
    return Verification(target.path, len(target.tensors), n_bytes, tuple(against), tuple(findings), bool(strangers))


def formats_read(target: Source, source: Source | None = None) -> list[BlockFormat]:
    """The formats whose decoders a verification calls, once each."""
    tensors = target.tensors + (() if source is None else source.tensors)
    return sorted({t.format for t in tensors if t.format.can_decode}, key=lambda fmt: fmt.type_id)


def _read_all(
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    threads: int,
    progress: Callable[[int], None] | None,
) -> Iterator[str]:
    """Every byte of every tensor; what is wrong, in file order."""
    parts = (part for tensor in target.tensors for part in _parts(tensor, target, source))
    with contextlib.closing(in_order(lambda part: _look(target, source, part), parts, threads)) as results:
        for name, seen in groupby(_counted(results, progress), key=lambda s: s.part.tensor.name):
            yield from _judged(seen, recorded.get(name))


def _read_there(
    cluster: Cluster,
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    progress: Callable[[int], None] | None,
) -> Iterator[str]:
    """As `_read_all`, by the workers of a cluster, a tensor at a time."""
    targets, origins = remote_sources(target), () if source is None else remote_sources(source)

    def step(tensor: SourceTensor) -> Step:
        parts = tuple(_parts(tensor, target, source))
        origin = None if parts[0].origin is None else origins[parts[0].origin.file]
        item = _Tensor(targets[tensor.file], origin, parts, recorded.get(tensor.name))
        return Step(_judged_there, item, f"tensor {quoted(tensor.name)}", about=tensor)

    with contextlib.closing(cluster.run(map(step, target.tensors))) as steps:
        for done in steps:
            if progress is not None:
                progress(done.about.n_bytes)
            yield from done.result


def _judged_there(tensor: _Tensor) -> list[str]:
    """On a worker: what is wrong with a tensor."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Reader(tensor.target))
        source = None if tensor.origin is None else stack.enter_context(Reader(tensor.origin))
        return list(_judged((_look(target, source, part) for part in tensor.parts), tensor.recorded))


def _counted(results: Iterator[_Seen], progress: Callable[[int], None] | None) -> Iterator[_Seen]:
    for seen in results:
        if progress is not None:
            progress(seen.data.size)
        yield seen


def _parts(tensor: SourceTensor, target: Source, source: Source | None) -> Iterator[_Part]:
    origin, scales = None, np.ones(1, np.float32)
    if source is not None and tensor.name in source and source.tensor(tensor.name).shape == tensor.shape:
        origin = None if _is_new_scale(tensor, target, source) else source.tensor(tensor.name)
        for scaled, sign in (
            (read_weight_scales(target, tensor), 1),
            (read_weight_scales(source, source.tensor(tensor.name)), -1),
        ):
            scales = scales if scaled is None else scales * scaled**sign
    n = copy_rows(tensor)
    for first in range(0, max(1, tensor.n_rows), n):
        yield _Part(tensor, first, min(n, tensor.n_rows - first), origin, scales)


def _is_new_scale(tensor: SourceTensor, target: Source, source: Source) -> bool:
    """Whether `tensor` is the companion of a matrix that became NVFP4: its weights show whether it is right."""
    matrix = scaled_matrix_name(tensor.name)
    if matrix not in target or matrix not in source:
        return False
    return target.tensor(matrix).format.name == SCALED_TYPE != source.tensor(matrix).format.name


def _look(target: Readable, source: Readable | None, part: _Part) -> _Seen:
    """Read a part, decode all of it, and compare it with the same rows of the source."""
    data = target.read_rows(part.tensor, part.first_row, part.n_rows)
    errors = np.zeros((0, 4))
    wrong = None
    if source is not None and part.origin is not None:
        if part.origin.type_id == part.tensor.type_id:
            wrong = _byte_difference(data, source.read_rows(part.origin, part.first_row, part.n_rows), part)
        elif part.origin.format.can_decode and part.tensor.format.can_decode and data.size:
            wrong, errors = _sampled_errors(data, source, part.origin, part)
    found = find_nonfinite(data, part.tensor, part.first_row)
    return _Seen(part, data, wrong, errors.sum(axis=0), found)


def _byte_difference(data: Bytes, original: Bytes, part: _Part) -> str | None:
    if np.array_equal(data, original):
        return None
    at = int(np.argmax(data.reshape(-1) != original.reshape(-1)))
    got, wanted = data.flat[at], original.flat[at]
    at += part.first_row * part.tensor.row_bytes
    what = f"tensor {quoted(part.tensor.name)} is a copy but differs from the source"
    return f"{what} at its byte {at} (got {got}, source {wanted})"


def _sampled_errors(
    data: Bytes, source: Readable, origin: SourceTensor, part: _Part
) -> tuple[str | None, NDArray[np.float64]]:
    """What is wrong with single rows, and codec.row_errors of those sampled, all columns alike."""
    stride = -(-part.tensor.n_rows // SAMPLE_ROWS)
    rows = np.arange(part.first_row + -part.first_row % stride, part.first_row + part.n_rows, stride)
    if not rows.size:
        return None, np.zeros((0, 4))
    x = codec.dequantize(np.concatenate([source.read_rows(origin, int(row), 1) for row in rows]), origin.format)
    y = codec.dequantize(data[rows - part.first_row], part.tensor.format)
    y *= part.scales[rows * len(part.scales) // part.tensor.n_rows][:, None]
    errors = codec.row_errors(x, y)
    limit = codec.row_limit(part.tensor.format)
    lost = codec.lost_row(errors, limit)
    if lost is None:
        return None, errors
    relative = np.sqrt(errors[lost, 1] / errors[lost, 0])
    what = f"tensor {quoted(part.tensor.name)}, row {rows[lost]} is lost: relative error"
    return f"{what} (got {relative:.3g}, limit {limit})", errors


def _judged(parts: Iterable[_Seen], recorded: Converted | None) -> Iterator[str]:
    """What is wrong with one tensor; of several broken parts, the first."""
    digest, total, wrong, bad = hashlib.sha256(), np.zeros(4), None, list[Nonfinite]()
    for seen in parts:
        digest.update(seen.data.reshape(-1).data)
        total += seen.errors
        bad += [] if seen.nonfinite is None else [seen.nonfinite]
        wrong = wrong or seen.wrong
        tensor = seen.part.tensor
    name = quoted(tensor.name)
    known = 0 if recorded is None or recorded.odd is None else recorded.odd.nonfinite
    if (count := sum(found.count for found in bad)) > known:
        wrong = f"tensor {name}: {Nonfinite(count, bad[0].first)}"
    if wrong is not None:
        yield wrong
    if recorded is not None and digest.hexdigest() != recorded.sha256:
        yield f"tensor {name} is not as it was written: sha256 {digest.hexdigest():.12}, record {recorded.sha256:.12}"
    error, limit = codec.relative_error(total[None, :]), _limit(tensor, recorded)
    if wrong is None and not error <= limit:
        figures = f"(got {error:.3g}, limit {limit:.3g})"
        yield f"tensor {name} as {tensor.format.name} is off the source: relative error {figures}"


def _limit(tensor: SourceTensor, recorded: Converted | None) -> float:
    """The most that the sampled rows may be off; types that requant does not write have no normal error."""
    if recorded is not None:
        return FACTOR * recorded.rmse_unweighted + SLACK
    normal = codec.GATE * tensor.format.gaussian_rmse
    return min(normal + SLACK if normal else codec.LOST, codec.LOST)
