"""Convert: Source + Plan -> output, chunk by chunk on a pool of threads, published only when every check has passed.

Memory is a few chunks per thread, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

import requant
from requant import codec
from requant.chunks import Done, Job, chunks_of, gate_fault, peak, write_chunk
from requant.codec import Floats
from requant.container.cursor import quoted
from requant.container.files import Identity, identity
from requant.container.layout import Layout, lay_out
from requant.container.output import Output
from requant.container.source import Source, SourceTensor
from requant.conversion import Conversion, Converted, Odd
from requant.errors import BadInput, NumericFault
from requant.formats import BlockFormat
from requant.imatrix import Imatrix, importance_for
from requant.model.companions import SECOND_LEVEL, companion_of, companion_shape
from requant.model.roles import needs_importance
from requant.model.scales import scales_of, takes_second_level
from requant.plan import Choice, Losses, Plan
from requant.pool import in_order, n_threads
from requant.provenance import format_of, imatrix_used, output_metadata

__all__ = ["Conversion", "Converted", "convert", "formats_used", "output_layout"]

_CHECK_EVERY = 64  # chunks between two looks at whether the source was replaced


def convert(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    losses: Losses | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """What became of `source` in the file `out`, which is there only if all went well, the same at any `threads`.

    `progress` is called, in the calling thread, with the source bytes of each finished chunk; `losses` are those that
    the plan was made from, compared with what is given here. Raises BadInput for a plan or imatrix that does not fit
    the source, OutputRefused, InputOutputError, SourceChanged, and NumericFault for weights that are not finite or do
    not survive in their type.
    """
    layout = output_layout(source, plan, imatrix)
    importance = _importance(source, plan, imatrix)
    notes = _notes(source, plan, imatrix, losses, importance)
    scaled, threads = second_level(source, plan), n_threads(threads)
    choices = {c.name: c for c in plan.choices if c.name not in scaled.values()}
    jobs = [
        Job(source.tensor(t.name), choice, format_of(choice.type), t.offset, importance.get(t.name), plan.effort)
        for t in layout.tensors
        if (choice := choices.get(t.name)) is not None
    ]
    with Output(out, layout.size, force=force, inputs=source.identities | _identity(imatrix)) as output:
        codec.warm_up(formats_used(plan))
        scales = {job.tensor.name: _second_scales(source, job, threads) for job in jobs if job.tensor.name in scaled}
        jobs = [replace(job, scales=scales.get(job.tensor.name)) for job in jobs]
        converted = {c.name: c for c in _write(source, output, jobs, threads, progress)}
        for name, companion in scaled.items():
            converted[companion] = _write_companion(output, layout, companion, _on_top(source, name, scales[name]))
        source.check_unchanged()
        output.publish(layout.header)
    used, tensors = imatrix_used(plan, imatrix), tuple(converted[t.name] for t in layout.tensors)
    odd = [line for t in tensors if t.odd is not None for line in t.odd.notes(t.name)]
    return Conversion(
        output=Path(out),
        size=layout.size,
        header_sha256=layout.sha256,
        version=requant.__version__,
        imatrix=None if used is None else Path(used.path).name,
        imatrix_sha256=None if used is None else used.sha256,
        plan=plan,
        tensors=tensors,
        notes=(*notes, *odd, *output.warnings),
    )


def output_layout(source: Source, plan: Plan, imatrix: Imatrix | None = None) -> Layout:
    """The header and every tensor's place in what `convert` will write.

    Raises BadInput where the plan was made for another source, or asks for what cannot be done.
    """
    scaled = second_level(source, plan)
    tensors = []
    for tensor, choice in zip(source.tensors, _choices(source, plan), strict=True):
        tensors.append((tensor.name, tensor.shape, format_of(choice.type).type_id))
        companion = scaled.get(tensor.name)
        if companion is not None and companion not in source:
            tensors.append((companion, companion_shape(tensor.name, tensor.shape), format_of("F32").type_id))
    return lay_out(output_metadata(source, plan, imatrix), tensors, source.path)


def formats_used(plan: Plan) -> list[BlockFormat]:
    """The formats whose kernels a conversion calls, once each."""
    used = {format_of(name) for choice in plan.choices for name in (choice.source_type, choice.type)}
    return sorted((fmt for fmt in used if fmt.can_decode), key=lambda fmt: fmt.type_id)


def _choices(source: Source, plan: Plan) -> list[Choice]:
    """The plan's choices in the order of the source's tensors, each one feasible."""
    if plan.header_sha256 != source.header_sha256:
        what, hint = "the plan was made for another file", "plan again with this one"
        raise BadInput(source.path, what, got=plan.header_sha256[:16], limit=source.header_sha256[:16], hint=hint)
    planned = {c.name: c for c in plan.choices}
    for choice in plan.choices:
        source.tensor(choice.name)
    for tensor in source.tensors:
        wrong = _infeasible(tensor, planned.get(tensor.name))
        if wrong is not None:
            raise BadInput(source.path, f"tensor {quoted(tensor.name)} {wrong}")
    return [planned[t.name] for t in source.tensors]


def _infeasible(tensor: SourceTensor, choice: Choice | None) -> str | None:
    if choice is None:
        return "is not in the plan"
    if (choice.shape, choice.source_type) != (tensor.shape, tensor.format.name):
        return (
            f"is {choice.source_type} {list(choice.shape)} in the plan, not {tensor.format.name} {list(tensor.shape)}"
        )
    return None if choice.copied else _cannot_encode(tensor, format_of(choice.type))


def _cannot_encode(tensor: SourceTensor, fmt: BlockFormat) -> str | None:
    if not fmt.can_encode:
        return f"cannot be {fmt.name}, which requant does not write"
    if not tensor.format.can_decode:
        return f"cannot be {fmt.name}: its {tensor.format.name} values are no weights"
    if not fmt.divides(tensor.n_per_row) or not tensor.n_weights:
        return f"cannot be {fmt.name}: a row of {tensor.n_per_row} is not whole blocks of {fmt.block_weights}"
    return None


def _importance(source: Source, plan: Plan, imatrix: Imatrix | None) -> dict[str, Floats]:
    """(n_matrices, n_per_row) for each tensor to be encoded that the imatrix covers."""
    found: dict[str, Floats] = {}
    missing: list[str] = []
    for choice in plan.choices:
        importance = None if imatrix is None or choice.copied else importance_for(imatrix, choice.name, choice.shape)
        if importance is not None:
            found[choice.name] = importance
        elif not choice.copied and needs_importance(choice.type, choice.role):
            missing.append(quoted(choice.name))
    if missing:
        names = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        what = f"{len(missing)} tensors have a type that needs an importance matrix, and none covers them: {names}"
        raise BadInput(source.path if imatrix is None else imatrix.path, what, hint="pass one with --imatrix")
    return found


def _notes(
    source: Source, plan: Plan, imatrix: Imatrix | None, losses: Losses | None, importance: Mapping[str, Floats]
) -> list[str]:
    notes = []
    if losses is not None:
        scored = sorted((t.name, t.shape) for t in losses.tensors)
        if scored != sorted((t.name, t.shape) for t in source.tensors):
            raise BadInput(source.path, "the losses were made for another model", hint="score this one again")
        if losses.header_sha256 != source.header_sha256:
            notes.append("the losses were made for another file with the same tensors")
        if losses.imatrix_sha256 != (None if imatrix is None else imatrix.sha256):
            notes.append("the losses were made with another imatrix than the tensors")
        if losses.effort != plan.effort:
            notes.append(f"the losses were made with effort {losses.effort.name.lower()}")
    # no imatrix covers an embedding: it is looked up, and has no inputs
    encoded = [c for c in plan.choices if not c.copied and (c.role != "token_embd" or c.name in importance)]
    if imatrix is not None and len(importance) < len(encoded):
        notes.append(f"the imatrix does not cover {len(encoded) - len(importance)} of {len(encoded)} encoded tensors")
    return notes


def _identity(imatrix: Imatrix | None) -> frozenset[Identity]:
    """The imatrix's file is an input too; that it has gone since it was read does no harm."""
    if imatrix is not None:
        with contextlib.suppress(OSError):
            return frozenset([identity(Path(imatrix.path).stat())])
    return frozenset()


def _second_scales(source: Source, job: Job, threads: int) -> Floats:
    """The second-level scale of every matrix of a tensor, which is read once more for it."""
    matrices = companion_shape(job.tensor.name, job.tensor.shape)[0]
    peaks = np.zeros(matrices, np.float32)
    chunks = list(chunks_of(replace(job, scales=peaks)))
    with contextlib.closing(in_order(lambda chunk: peak(source, chunk), chunks, threads)) as found:
        for chunk, value in zip(chunks, found, strict=True):
            m = chunk.first_row * matrices // job.tensor.n_rows
            peaks[m] = max(peaks[m], value)
    return np.array([codec.second_scale(float(p)) for p in peaks], np.float32)


def _on_top(source: Source, name: str, scales: Floats) -> Floats:
    """`scales` times what the source already multiplies the matrices of the tensor by."""
    before = scales_of(source, source.tensor(name))
    return scales if before is None else scales * before


def _write_companion(output: Output, layout: Layout, name: str, scales: Floats) -> Converted:
    (placed,) = (t for t in layout.tensors if t.name == name)
    data = scales.astype("<f4").view(np.uint8).reshape(1, -1)
    output.write_at(placed.offset, data)
    return Converted(name, "F32", "F32", data.size, 0.0, 0.0, hashlib.sha256(data.data).hexdigest())


def _write(
    source: Source, output: Output, jobs: Sequence[Job], threads: int, progress: Callable[[int], None] | None
) -> tuple[Converted, ...]:
    """Write every tensor. A fault in the numbers of a source that was changed meanwhile is SourceChanged."""
    chunks = (chunk for job in jobs for chunk in chunks_of(job))
    with contextlib.closing(in_order(lambda chunk: write_chunk(source, output, chunk), chunks, threads)) as results:
        watched = _watched(results, source, progress)
        try:
            return tuple(_measured(chunks_, source) for _, chunks_ in groupby(watched, key=lambda done: done.name))
        except NumericFault:
            source.check_unchanged()
            raise


def _watched(results: Iterator[Done], source: Source, progress: Callable[[int], None] | None) -> Iterator[Done]:
    for i, done in enumerate(results, start=1):
        if i % _CHECK_EVERY == 0:
            source.check_unchanged()
        if progress is not None:
            progress(done.chunk.n_rows * done.chunk.job.tensor.row_bytes)
        yield done


def _measured(chunks: Iterator[Done], source: Source) -> Converted:
    """The tensor that `chunks` make up; raises NumericFault where its error is beyond the format's ceiling."""
    digest, total, odd = hashlib.sha256(), np.zeros(4), Odd()
    for done in chunks:
        digest.update(done.data.reshape(-1).data)
        odd += done.odd
        if done.errors is not None:
            total += done.errors
        job = done.chunk.job
    error = codec.relative_error(total[None, :])
    limit = codec.ceiling(total[0], job.tensor.n_weights, job.format)
    if not job.choice.copied and not error <= limit:
        raise gate_fault(job, "relative error", error, limit, source.files[job.tensor.file])
    return Converted(
        name=job.tensor.name,
        source_type=job.tensor.format.name,
        type=job.format.name,
        n_bytes=job.format.n_bytes(job.tensor.n_weights),
        rmse=error,
        rmse_unweighted=math.sqrt(total[1] / total[0]) if total[0] > 0 else 0.0,
        sha256=digest.hexdigest(),
        odd=None if odd == Odd() else odd,
    )


def second_level(source: Source, plan: Plan) -> dict[str, str]:
    """Matrix -> its companion, of all that `plan` encodes as NVFP4 and the engine scales."""
    encoded = (c.name for c in plan.choices if c.type == SECOND_LEVEL and not c.copied)
    return {name: companion_of(name) for name in encoded if takes_second_level(source, source.tensor(name))}
