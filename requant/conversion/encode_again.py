"""The comparison of every encoded byte of an output with the source, which is encoded again by the output's plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
from requant.errors import BadInput, NumericFault, brief, quote
from requant.formats import KERNELS, format_of
from requant.formats.codec import Bytes
from requant.planning.output_layout import weight_scale_names
from requant.planning.plan import Choice, Plan


@dataclass(frozen=True, slots=True)
class Encodings:
    """The choices of a plan that are encoded again: without those whose importance is not given.

    left_out: the tensors without their importance. record: of the output, None where only a plan is given.
    """

    plan: Plan
    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]
    imatrix: Imatrix | None
    record: Conversion | None

    @property
    def other_kernels(self) -> str:
        """Return a remark where other encoders wrote the output, else an empty string."""
        if self.record is None or self.record.kernels == KERNELS:
            return ""
        before = "an unknown version" if self.record.kernels is None else f"version {self.record.kernels}"
        return f"encoders of {before} wrote it, these are version {KERNELS}, and may give other bytes"

    def compared(self) -> Iterator[str]:
        """Yield lines on what is compared, and what is not."""
        yield f"encoded again: every byte of {len(self.choices)} encoded tensors"
        if self.left_out and self.record is not None:
            importance = f"{brief(self.record.imatrix or '')}, SHA-256 {self.record.imatrix_sha256!s:.12}"
            what = f"not encoded again: {len(self.left_out)} encoded tensors"
            yield f"{what}, weighted by importance that is not given ({importance}); give its file with --imatrix"
        if self.other_kernels:
            yield self.other_kernels


def choose_encodings(
    target: Source, record: Conversion | None, plan: Plan | None, imatrix: Imatrix | None
) -> Encodings:
    """Return the tensors of `target` to encode again, by `plan` or that of the record.

    Raises BadInput where there is neither, or where `imatrix` is not the one that the output was made with.
    """
    if record is None and plan is None:
        hint = "keep OUT.requant.json beside the output, or give --plan"
        raise BadInput(target.path, "has no record, so its plan is not known", hint=hint)
    if record is not None and imatrix is not None and imatrix.sha256 != record.imatrix_sha256:
        got, wanted = f"SHA-256 {imatrix.sha256:.12}", f"{record.imatrix_sha256 or 'none'!s:.12}"
        raise BadInput(imatrix.path, "is not the importance that the output was made with", got=got, expected=wanted)
    used = plan if plan is not None else record.plan if record is not None else None
    assert used is not None
    choices = [c for c in used.choices if not c.copied and c.name in target]
    choices = [c for c in choices if target.tensor(c.name).format.name == c.type]
    weighted = set[str]()
    if record is not None and record.imatrix_sha256 is not None and imatrix is None:
        weighted = {t.name for t in record.tensors if t.weighted is not False}
    left_out = tuple(c.name for c in choices if c.name in weighted)
    return Encodings(used, tuple(c for c in choices if c.name not in weighted), left_out, imatrix, record)


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
