"""The comparison of every encoded byte of an output with the source, which is encoded again as the output was made.

The plan is that of the record. Without one, the output itself says how it was made: its header has the types, and its
metadata have the effort, the version of the encoders and the name of the importance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant.common.threads import in_order, n_threads
from requant.container.imatrix import Imatrix
from requant.container.source import Source
from requant.conversion.chunks import Chunk, TensorJob, encode_chunk, split_into_chunks
from requant.conversion.options import ConversionOptions
from requant.conversion.prepare import find_importance
from requant.conversion.record import Conversion
from requant.conversion.second_level import add_scales, combine_scales
from requant.errors import FILE_NAME, BadInput, NumericFault, brief, quote
from requant.formats import KERNELS, Effort, format_of
from requant.formats.codec import Bytes
from requant.model.roles import layer_of, role_of
from requant.planning.output_layout import weight_scale_names
from requant.planning.output_metadata import COMPENSATION_KEY, EFFORT_KEY, IMATRIX_FILE, KERNELS_KEY, compare_imatrix
from requant.planning.plan import Choice, Plan


@dataclass(frozen=True, slots=True)
class Encodings:
    """The choices of a plan that are encoded again.

    unweighted: how many others there are whose importance, `needed` in words, is not given. unknown: how many others
    there are of types that requant does not write, compensated: whose rounding depends on a run of the model. kernels:
    version of the encoders that wrote the output, if known.
    """

    plan: Plan
    choices: tuple[Choice, ...]
    unweighted: int
    unknown: int
    imatrix: Imatrix | None
    needed: str
    kernels: int | None
    compensated: int = 0

    @property
    def is_complete(self) -> bool:
        """Return whether all encoded tensors are encoded again."""
        return not self.unweighted and not self.unknown and not self.compensated

    @property
    def other_kernels(self) -> str:
        """Return a remark where other encoders wrote the output, else an empty string."""
        if self.kernels == KERNELS or not self.choices:
            return ""
        before = "an unknown version or another tool" if self.kernels is None else f"version {self.kernels}"
        return f"encoders of {before} wrote it, these are version {KERNELS}, and may give other bytes"

    def compared(self) -> Iterator[str]:
        """Yield lines on what is compared, and what is not."""
        yield f"encoded again: every byte of {len(self.choices)} encoded tensors"
        if self.unweighted:
            what = f"not encoded again: {self.unweighted} encoded tensors"
            yield f"{what}, weighted by importance that is not given ({self.needed}); give its file with --imatrix"
        if self.unknown:
            yield f"not encoded again: {self.unknown} encoded tensors of types that requant does not write"
        if self.compensated:
            what = f"not encoded again: {self.compensated} compensated tensors"
            yield f"{what}; the same `requant convert` makes them again"
        if self.other_kernels:
            yield self.other_kernels


def choose_encodings(
    target: Source, source: Source, record: Conversion | None, plan: Plan | None, imatrix: Imatrix | None
) -> Encodings:
    """Return the tensors of `target` to encode again, by `plan`, the record's, or the types in the header of `target`.

    Raises BadInput where `imatrix` is not the one that the output was made with.
    """
    if imatrix is not None:
        _check_imatrix(target, record, imatrix)
    used = plan or (_read_plan(target, source) if record is None else record.plan)
    choices = [c for c in used.choices if not c.copied and c.name in target and c.name in source]
    choices = [c for c in choices if target.tensor(c.name).format.name == c.type]
    known = [c for c in choices if format_of(c.type).can_encode and source.tensor(c.name).format.can_decode]
    compensated = _find_compensated(target, record, known)
    known = [c for c in known if c.name not in compensated]
    weighted, needed = (set[str](), "") if imatrix is not None else _find_weighted(target, record, known)
    chosen = tuple(c for c in known if c.name not in weighted)
    kernels = target.metadata.get_int(KERNELS_KEY) if record is None else record.kernels
    n_unknown = len(choices) - len(known) - len(compensated)
    return Encodings(used, chosen, len(known) - len(chosen), n_unknown, imatrix, needed, kernels, len(compensated))


def _check_imatrix(target: Source, record: Conversion | None, imatrix: Imatrix) -> None:
    """Raise BadInput where the record or the metadata say that the output was made with another imatrix or none."""
    if record is None:
        differs = compare_imatrix(target.metadata, imatrix)
    elif imatrix.sha256 != record.imatrix_sha256:
        differs = f"SHA-256 {imatrix.sha256:.12}", f"{record.imatrix_sha256 or 'none'!s:.12}"
    else:
        return
    if differs is not None:
        got, wanted = differs
        raise BadInput(imatrix.path, "is not the importance that the output was made with", got=got, expected=wanted)


def _find_weighted(target: Source, record: Conversion | None, choices: Sequence[Choice]) -> tuple[Collection[str], str]:
    """Return the tensors that were, or may have been, encoded with importance, and the name of that in words."""
    if record is not None:
        names = {t.name for t in record.tensors if t.weighted is not False and record.imatrix_sha256 is not None}
        return names, f"{brief(record.imatrix or '')}, SHA-256 {record.imatrix_sha256!s:.12}"
    name = target.metadata.get(IMATRIX_FILE)
    names = {c.name for c in choices if name is not None and format_of(c.type).block_weights > 1}
    return names, brief(str(name), FILE_NAME)


def _find_compensated(target: Source, record: Conversion | None, choices: Sequence[Choice]) -> Collection[str]:
    """Return the tensors that were, or without a record may have been, encoded with compensation."""
    names = {c.name for c in choices}
    if record is None:
        return names if COMPENSATION_KEY in target.metadata else ()
    return {t.name for t in record.tensors if t.is_compensated} & names


def _read_plan(target: Source, source: Source) -> Plan:
    """Return the types in the header of `target` and the effort in its metadata as a plan, without any losses."""
    effort = target.metadata.get_str(EFFORT_KEY, Effort.DEFAULT.name.lower())
    if effort not in (known := {e.name.lower(): e for e in Effort}):
        raise BadInput(target.path, f"key '{EFFORT_KEY}' has an unknown value", got=effort, expected=", ".join(known))
    choices = []
    for tensor in source.tensors:
        if tensor.name in target and target.tensor(tensor.name).shape == tensor.shape:
            found, name = target.tensor(tensor.name), tensor.name
            place = name, role_of(name), layer_of(name), tensor.shape, tensor.format.name
            choices.append(Choice(*place, found.format.name, found.n_bytes, 0.0, 0.0, "none"))
    arch, header = source.metadata.get_str("general.architecture", ""), source.header_sha256
    method = "types of the output"
    return Plan(source.name, header, str(arch), method, {}, (), {}, tuple(choices), None, None, effort=known[effort])


def compare_encodings(
    target: Source, source: Source, encodings: Encodings, *, threads: int | None, progress: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    """Encode again, and yield the name of each tensor whose bytes differ in `target`, with a line on the first byte.

    `progress` is called with the bytes of each chunk. Memory is a few chunks per thread. Raises BadInput where a type
    needs importance and none is given.
    """
    plan = replace(encodings.plan, choices=encodings.choices)
    importance = find_importance(source, plan, encodings.imatrix)
    jobs = [
        TensorJob(source.tensor(c.name), c, format_of(c.type), 0, 0, importance.get(c.name), plan.effort)
        for c in encodings.choices
    ]
    scaled = weight_scale_names(source, plan)
    jobs = add_scales(source, jobs, scaled, ConversionOptions(threads=threads))
    remark = f"; {encodings.other_kernels}" if encodings.other_kernels else ""
    found = set[str]()

    def compare(chunk: Chunk) -> tuple[Chunk, str | None]:
        tensor = target.tensor(chunk.job.tensor.name)
        try:
            encoded = encode_chunk(source, chunk).data
        except NumericFault as error:
            return chunk, f"{error.what} when it is encoded again"
        data = target.read_rows(tensor, chunk.first_row, chunk.n_rows)
        return chunk, _describe_difference(tensor.name, data, encoded, chunk.first_row * tensor.row_bytes)

    chunks = (chunk for job in jobs for chunk in split_into_chunks(job))
    with contextlib.closing(in_order(compare, chunks, n_threads(threads))) as results:
        for chunk, line in results:
            progress(chunk.n_rows * chunk.job.row_bytes)
            name = chunk.job.tensor.name
            if line is not None and name not in found:
                found.add(name)
                yield name, line + remark
    for job in jobs:
        if job.scales is not None and (name := scaled[job.tensor.name]) in target:
            data = target.read_rows(target.tensor(name)).reshape(1, -1)
            line = _describe_difference(name, data, combine_scales(source, job)[0], 0)
            if line is not None:
                yield name, line + remark


def _describe_difference(name: str, data: Bytes, encoded: Bytes, start: int) -> str | None:
    """Return a line on the first byte of the rows from byte `start` on that is not as encoded, None where all are."""
    if np.array_equal(data, encoded):
        return None
    what = f"tensor {quote(name)} is not what its source becomes when it is encoded again"
    if data.shape != encoded.shape:
        return f"{what}: it has {data.size} bytes instead of {encoded.size}"
    at = int(np.argmax(data.reshape(-1) != encoded.reshape(-1)))
    return f"{what}: byte {start + at} (got {data.flat[at]}, encoded {encoded.flat[at]})"
