"""Conversion of a source by a plan, chunk by chunk in threads or on a cluster, published only when every check passed.

Memory is a few chunks per thread, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant._version import __version__
from requant.common.inputs import add_inputs, collect_inputs, own_files
from requant.common.monitor import SILENT, Monitor
from requant.common.threads import n_threads
from requant.container.digests import fill_in_digests
from requant.container.imatrix import Imatrix
from requant.container.journal import Line
from requant.container.layout import Layout
from requant.container.output import Output, claim_output
from requant.container.source import Source, open_files
from requant.container.splitting import headers_sha256, output_paths, total_size
from requant.conversion.chunks import TensorJob
from requant.conversion.options import DEFAULTS, Claim, ConversionOptions
from requant.conversion.prepare import prepare_output
from requant.conversion.record import Conversion, Converted
from requant.conversion.second_level import add_scales, write_scales
from requant.conversion.verify import verify_output
from requant.conversion.write import WrittenTensors, collect_tensors, write_pieces
from requant.conversion.write_on_cluster import write_pieces_on_cluster
from requant.errors import InputOutputError, quote
from requant.formats import KERNELS
from requant.formats.jit import SOURCE_STATE
from requant.planning.output_metadata import imatrix_used
from requant.planning.plan import Plan
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.conversion.compensation.walk import CompensationText

_HEAD_VERSION = 2


def convert(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    losses: Losses | None = None,
    options: ConversionOptions = DEFAULTS,
    claim: Claim | None = None,
    monitor: Monitor = SILENT,
) -> Conversion:
    """Write what `plan` makes of `source` to the file `out`, and return its record; the bytes do not depend on threads.

    The output gets its name only when all of it is written and, with `options.verify`, it and the source were compared
    once more. The same call resumes a run that was stopped. losses: those that the plan was made from; they are
    checked against the source, the plan and the imatrix. claim: that of the caller on `out`; without one the output is
    claimed here. monitor: is given the bytes of each finished chunk, `count_progress_bytes` in all, and lines about
    what an earlier run left. The kernels of `formats_used` are compiled in the threads that need them where the caller
    has not done so.

    Raises BadInput for a plan or imatrix that does not fit the source, OutputRefused, InputOutputError, SourceChanged,
    and NumericFault for weights that are not finite or do not survive in their type.
    """
    n_bytes = count_progress_bytes(source, plan, verify=options.verify)
    with contextlib.ExitStack() as stack:
        stack.enter_context(collect_inputs())
        source.add_to_inputs()
        add_inputs(None if imatrix is None else Path(imatrix.path))
        stack.enter_context(monitor.resumable())
        progress = stack.enter_context(monitor.progress("converting", n_bytes))
        prepared = prepare_output(source, plan, imatrix, losses, options.splitting)
        claimed = claim or Claim(stack.enter_context(claim_output(out)))
        output = Output(
            output_paths(Path(out), prepared.layouts),
            prepared.layouts,
            _head(source, plan, imatrix, claimed.request, options.compensation),
            claimed.journal,
            force=options.force,
            extras=claimed.extras,
            keep=claimed.keep,
        )
        stack.enter_context(output)
        for note in output.notes:
            monitor.info(note)
        jobs = add_scales(source, prepared.jobs, prepared.scaled, options)
        found = _write(source, output, jobs, options, progress=progress, info=monitor.info)
        found |= {made.name: made for made in write_scales(source, output, jobs, prepared.scaled)}
        tensors = tuple(found[t.name] for layout in output.layouts for t in layout.tensors)
        layouts = fill_in_digests(output.layouts, [t.sha256 for t in tensors])
        made = _add_text(_conversion(output.paths[0], layouts, plan, imatrix, tensors), options.compensation)
        source.check_unchanged()
        if not output.is_published:
            output.seal(layouts)
            if options.verify:
                _verify(output, source, made, options, progress)
            output.publish()
        made = replace(made, notes=(*prepared.notes, *made.notes))
        claimed.record(made)  # without the output's warnings: a resumed run does not know those of earlier runs
        output.finish()
    return replace(made, notes=(*made.notes, *output.warnings))


def count_progress_bytes(source: Source, plan: Plan, *, verify: bool = True) -> int:
    """Return the total of the bytes that a conversion reports as progress."""
    return sum(t.n_bytes for t in source.tensors) + (plan.n_bytes if verify else 0)


def resume_key(source: Source, request: Mapping[str, Any]) -> Line:
    """Return the part of the journal's head that does not depend on the plan; a run that resumes must have the same.

    The device number of the source is left out: on network and some other file systems each mount has a new one.
    """
    files = []
    for f in source.opened:
        status = {"size": f.status.st_size, "mtime_ns": f.status.st_mtime_ns, "inode": f.status.st_ino}
        files.append({"name": f.path.name, **status, "header": f.header.sha256})
    versions = {"journal": _HEAD_VERSION, "requant": __version__, "kernels": SOURCE_STATE}
    return {"asked": dict(request), "source": files, **versions}


def _head(
    source: Source,
    plan: Plan,
    imatrix: Imatrix | None,
    request: Mapping[str, Any],
    compensation: CompensationText | None,
) -> Line:
    choices = json.loads(plan.to_json())
    del choices["sha256"]  # shows only that something differs, not what
    head = resume_key(source, request) | {"imatrix": None if imatrix is None else imatrix.sha256, "plan": choices}
    return head if compensation is None else head | {"compensation_tokens": compensation.sha256}


def _write(
    source: Source,
    output: Output,
    jobs: Sequence[TensorJob],
    options: ConversionOptions,
    *,
    progress: Callable[[int], None],
    info: Callable[[str], None],
) -> dict[str, Converted]:
    """Write the tensors of `jobs`, or take them over as an earlier run wrote them; return them by name."""
    found: dict[str, Converted] = {}
    for batch in _split_into_batches(source, output, jobs, options):
        encoded = [job for job in batch if job.encoded is not None]
        others = [job for job in batch if job.encoded is None]
        runs = [write_pieces(source, output, encoded, threads=n_threads(options.threads), progress=progress, info=info)]
        if options.cluster is None:
            runs.append(
                write_pieces(source, output, others, threads=n_threads(options.threads), progress=progress, info=info)
            )
        else:
            runs.append(write_pieces_on_cluster(options.cluster, source, output, others, progress=progress, info=info))
        for run in runs:
            with contextlib.closing(run) as pieces:
                found |= {made.name: made for made in collect_tensors(source, output, pieces)}
    return found


def _split_into_batches(
    source: Source, output: Output, jobs: Sequence[TensorJob], options: ConversionOptions
) -> Iterable[Sequence[TensorJob]]:
    """Return the jobs in batches, each to be written before the next: all of them, or those of a walk."""
    if options.compensation is None or output.is_published:
        return [jobs]
    from requant.conversion.compensation.walk import Walk

    by_name = {job.tensor.name: job for job in jobs}
    return Walk(source, options.compensation, by_name, WrittenTensors(output), options).batches()


def _conversion(
    path: Path, layouts: Sequence[Layout], plan: Plan, imatrix: Imatrix | None, tensors: tuple[Converted, ...]
) -> Conversion:
    used = imatrix_used(plan, imatrix)
    odd = [line for t in tensors if t.odd is not None for line in t.odd.notes(t.name)]
    return Conversion(
        output=path,
        size=total_size(layouts),
        header_sha256=headers_sha256(layouts),
        version=__version__,
        imatrix=None if used is None else used.name,
        imatrix_sha256=None if used is None else used.sha256,
        plan=plan,
        tensors=tensors,
        notes=tuple(odd),
        kernels=KERNELS,
    )


def _add_text(made: Conversion, text: CompensationText | None) -> Conversion:
    """Return the record with the text by which the encoders compensated their errors."""
    return made if text is None else replace(made, compensation_text=text.name, compensation_tokens=text.sha256)


def _verify(
    output: Output, source: Source, made: Conversion, options: ConversionOptions, progress: Callable[[int], None]
) -> None:
    """Raise InputOutputError where the sealed output is not as it was written, or was not made from the source's bytes.

    The records of the tensors that are wrong are dropped first, so that the next run makes these again.
    Raises SourceChanged where a header of the source reads otherwise than before.
    """
    source.check_headers()
    with own_files(), open_files(output.part_files) as target:
        found = verify_output(
            target, source=source, record=made, threads=options.threads, cluster=options.cluster, progress=progress
        )
    if not found.ok:
        source.check_unchanged()
        output.drop_records(found.wrong_tensors)
        if found.misread_tensors:
            raise _misread_fault(source, found.misread_tensors)
        what = f"does not read back as it was written: {found.findings[0]}"
        hint = f"check the disk, then run it again: {_count_tensors(found.wrong_tensors)} made again"
        raise InputOutputError(output.part_files[0], what, hint=hint)


def _misread_fault(source: Source, names: Sequence[str]) -> InputOutputError:
    """The error for tensors whose bytes in the source are not those that the output was made from."""
    what = f"tensor {quote(names[0])} has other bytes than were read to make the output"
    hint = "a read failed unnoticed, or the file was changed: check disk and memory, then run it again: "
    hint += f"{_count_tensors(names)} made again"
    return InputOutputError(source.files[source.tensor(names[0]).file], what, hint=hint)


def _count_tensors(names: Sequence[str]) -> str:
    return "one tensor is" if len(names) == 1 else f"{len(names)} tensors are" if names else "only the header is"
