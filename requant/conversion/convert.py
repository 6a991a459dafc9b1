"""Convert: Source + Plan -> output, chunk by chunk on a pool of threads, published only when every check has passed.

Memory is a few chunks per thread, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from requant._version import __version__
from requant.common.cluster import Cluster
from requant.common.files import Identity, identity
from requant.common.threads import in_order, n_threads
from requant.container.imatrix import Imatrix
from requant.container.journal import Journal, Line
from requant.container.output import Output, claim
from requant.container.source import Source, open_files
from requant.container.splitting import WHOLE, Splitting, headers_sha256, output_paths, total_size
from requant.conversion.chunks import TensorJob, find_peak, pieces_of
from requant.conversion.prepare import compatibility_notes, find_importance, formats_used, tensor_jobs
from requant.conversion.record import Conversion, Converted
from requant.conversion.verify import verify_source
from requant.conversion.write import Tell, WrittenPiece, describe_tensor, write_pieces
from requant.conversion.write_on_cluster import find_peaks_on_cluster, write_pieces_on_cluster
from requant.errors import InputOutputError
from requant.formats import KERNELS, codec
from requant.formats.codec import Floats
from requant.formats.jit import SOURCE_STATE
from requant.model.weight_scales import read_weight_scales, weight_scale_shape
from requant.planning.output_layout import output_layouts, weight_scale_names
from requant.planning.output_metadata import imatrix_used
from requant.planning.plan import Plan
from requant.scoring.losses import Losses

__all__ = ["Conversion", "Converted", "convert", "formats_used", "n_steps", "output_layouts"]

_HEAD_VERSION = 1

# writes the pieces of jobs, in their order
Pieces = Callable[[Source, Output, Sequence[TensorJob]], Generator[WrittenPiece, None, None]]


def convert(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    losses: Losses | None = None,
    threads: int | None = None,
    force: bool = False,
    splitting: Splitting = WHOLE,
    verified: bool = True,
    cluster: Cluster | None = None,
    journal: Journal | None = None,
    asked: Mapping[str, Any] | None = None,
    extras: Sequence[Path] = (),
    keep: bool = False,
    record: Callable[[Conversion], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
    tell: Tell = lambda _: None,
) -> Conversion:
    """What became of `source` in the file `out`, which is there only if all went well, the same at any `threads`.

    A run that was stopped goes on where it was when it is called in the same way again. The output is read again and
    compared with the source before it gets its name, unless not `verified`; `record` is called when it has it, before
    the journal goes. `progress` is called, in the calling thread, with the bytes of each finished chunk, `n_steps` in
    all, `tell` with what became of an earlier run. `losses` are those that the plan was made from, compared with what
    is given here. journal: of `out`, where the caller has claimed it, with `asked`, which must be the same in a run
    that goes on, `extras`, files that go when it does, and `keep` for a plan that took long to make. cluster: its
    workers do all that is long, and must share the storage of source and output; the bytes are the same.

    Raises BadInput for a plan or imatrix that does not fit the source, OutputRefused, InputOutputError, SourceChanged,
    and NumericFault for weights that are not finite or do not survive in their type.
    """
    layouts = output_layouts(source, plan, imatrix, splitting)
    importance = find_importance(source, plan, imatrix)
    notes = compatibility_notes(source, plan, imatrix, losses, importance)
    paths, threads = output_paths(Path(out), layouts), n_threads(threads)
    inputs = source.identities | _identity(imatrix)
    with contextlib.ExitStack() as stack:
        held = journal or stack.enter_context(claim(out))
        head = _head(source, plan, imatrix, asked)
        how: dict[str, Any] = {"force": force, "inputs": inputs, "extras": extras, "keep": keep}
        output = stack.enter_context(Output(paths, layouts, head, held, **how))
        for note in output.notes:
            tell(note)
        codec.warm_up(formats_used(plan))
        jobs = _with_scales(source, plan, tensor_jobs(source, plan, layouts, importance), threads, cluster)
        tensors = _write(source, plan, output, jobs, _strategy(cluster, threads, progress, tell))
        made = _conversion(output, plan, imatrix, tensors)
        source.check_unchanged()
        if not output.is_published:
            output.seal()
            if verified:
                _verify(output, source, made, threads=threads, cluster=cluster, progress=progress)
            output.publish()
        odd = [line for t in tensors if t.odd is not None for line in t.odd.notes(t.name)]
        made = replace(made, notes=(*notes, *odd))
        record(made)  # without the warnings: they are of the place, and those of an earlier run would be lost
        output.finish()
    return replace(made, notes=(*made.notes, *output.warnings))


def _conversion(output: Output, plan: Plan, imatrix: Imatrix | None, tensors: tuple[Converted, ...]) -> Conversion:
    used = imatrix_used(plan, imatrix)
    return Conversion(
        output=output.paths[0],
        size=total_size(output.layouts),
        header_sha256=headers_sha256(output.layouts),
        version=__version__,
        imatrix=None if used is None else Path(used.path).name,
        imatrix_sha256=None if used is None else used.sha256,
        plan=plan,
        tensors=tensors,
        kernels=KERNELS,
    )


def n_steps(source: Source, plan: Plan, *, verified: bool = True) -> int:
    """What `progress` of `convert` is called with in all."""
    return sum(t.n_bytes for t in source.tensors) + (plan.n_bytes if verified else 0)


def binding(source: Source, asked: Mapping[str, Any] | None = None) -> Line:
    """What must be the same in the run that goes on with an unfinished output, whatever it was planned to be.

    Not the device of the source: that of network and some other file systems changes when they are mounted again.
    """
    files = [
        {
            "name": f.path.name,
            "size": s.st_size,
            "mtime_ns": s.st_mtime_ns,
            "inode": s.st_ino,
            "header": f.header.sha256,
        }
        for f in source.opened
        for s in [f.status]
    ]
    versions = {"journal": _HEAD_VERSION, "requant": __version__, "kernels": SOURCE_STATE}
    return {"asked": dict(asked or {}), "source": files, **versions}


def _head(source: Source, plan: Plan, imatrix: Imatrix | None, asked: Mapping[str, Any] | None) -> Line:
    how = json.loads(plan.to_json())
    del how["sha256"]  # says only that something differs, not what
    return binding(source, asked) | {"imatrix": None if imatrix is None else imatrix.sha256, "plan": how}


def _strategy(cluster: Cluster | None, threads: int, progress: Callable[[int], None], tell: Tell) -> Pieces:
    if cluster is None:
        return partial(write_pieces, threads=threads, progress=progress, tell=tell)
    return partial(write_pieces_on_cluster, cluster, progress=progress, tell=tell)


def _with_scales(
    source: Source, plan: Plan, jobs: Sequence[TensorJob], threads: int, cluster: Cluster | None
) -> list[TensorJob]:
    """The jobs with the second-level scales, one for every matrix, of those that are to have some.

    Their tensors are read once more for it.
    """
    scaled = weight_scale_names(source, plan)
    empty = {name: np.zeros(weight_scale_shape(name, source.tensor(name).shape)[0], np.float32) for name in scaled}
    jobs = [replace(job, scales=empty.get(job.tensor.name)) for job in jobs]
    pieces = [piece for job in jobs if job.scales is not None for piece in pieces_of(job)]
    if cluster is None:
        run = in_order(lambda piece: [find_peak(source, chunk) for chunk in piece.chunks], pieces, threads)
    else:
        run = find_peaks_on_cluster(cluster, source, pieces)
    with contextlib.closing(run) as results:
        for piece, values in zip(pieces, results, strict=True):
            peaks = empty[piece.name]
            for chunk, value in zip(piece.chunks, values, strict=True):
                matrix = chunk.first_row * len(peaks) // piece.job.tensor.n_rows
                peaks[matrix] = max(peaks[matrix], value)
    scales = {n: np.array([codec.second_scale(float(p)) for p in peaks], np.float32) for n, peaks in empty.items()}
    return [replace(job, scales=scales.get(job.tensor.name)) for job in jobs]


def _write(source: Source, plan: Plan, output: Output, jobs: Sequence[TensorJob], run: Pieces) -> tuple[Converted, ...]:
    """Every tensor of the output, in its order, written, or found as an earlier run wrote it."""
    with contextlib.closing(run(source, output, jobs)) as pieces:
        found = {c.name: c for c in describe_tensor(source, output, pieces)}
    scales = {job.tensor.name: job.scales for job in jobs if job.scales is not None}
    for name, companion in weight_scale_names(source, plan).items():
        found[companion] = _write_companion(output, companion, _on_top(source, name, scales[name]))
    return tuple(found[t.name] for layout in output.layouts for t in layout.tensors)


def _verify(output: Output, source: Source, made: Conversion, **how: Any) -> None:
    """Raise InputOutputError where the sealed output does not read back as it was written."""
    with open_files(output.part_files) as target:
        found = verify_source(target, source=source, made=made, **how)
    if not found.ok:
        source.check_unchanged()
        what = f"does not read back as it was written: {found.findings[0]}"
        raise InputOutputError(output.part_files[0], what, hint="check the disk, then run it again")


def _identity(imatrix: Imatrix | None) -> frozenset[Identity]:
    """The imatrix's file is an input too; that it has gone since it was read does no harm."""
    if imatrix is not None:
        with contextlib.suppress(OSError):
            return frozenset([identity(Path(imatrix.path).stat())])
    return frozenset()


def _on_top(source: Source, name: str, scales: Floats) -> Floats:
    """`scales` times what the source already multiplies the matrices of the tensor by."""
    before = read_weight_scales(source, source.tensor(name))
    return scales if before is None else scales * before


def _write_companion(output: Output, name: str, scales: Floats) -> Converted:
    ((file, placed),) = ((i, t) for i, x in enumerate(output.layouts) for t in x.tensors if t.name == name)
    data = scales.astype("<f4").view(np.uint8).reshape(1, -1)
    if not output.is_published:
        output.write_at(file, placed.offset, data)
    return Converted(name, "F32", "F32", data.size, 0.0, 0.0, hashlib.sha256(data.data).hexdigest())
