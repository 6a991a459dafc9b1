"""Verification as one call: of a finished output against its record, its digests, a plan and its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.api.kernels import Purpose, prepare_kernels
from requant.api.measure import read_importance
from requant.common.atomic_write import has_schema
from requant.common.interrupt import run_interruptible
from requant.common.monitor import Monitor
from requant.container.source import Source, open_source
from requant.conversion.compare import compare_with_plan
from requant.conversion.encode_again import Encodings, choose_encodings, compare_encodings
from requant.conversion.prepare import formats_used
from requant.conversion.verification import ENCODINGS, PLAN, Verification
from requant.conversion.verify import find_record, verify_output
from requant.errors import UsageError
from requant.planning.plan import PLAN_SCHEMA, Plan, read_plan


def verify(
    out: Path,
    source: Source | None,
    wanted: Plan | Path | None,
    monitor: Monitor,
    *,
    full: bool,
    imatrix: Path | None,
    threads: int | None,
) -> Verification:
    """Verify `out`; `wanted` is a plan, the file of one, or the record where it is not beside `out`.

    full: encode the source again by the plan or, without one and without a record, in the types of `out`, with the
    importance in the file `imatrix`, and compare every byte.
    Raises UsageError, BadInput, InputOutputError.
    """
    if full and source is None:
        raise UsageError("--full encodes the source again; give it with --source")
    if imatrix is not None and not full:
        raise UsageError("--imatrix is for encoding again; give --full with it")
    plan, path = (wanted, None) if isinstance(wanted, Plan) else (None, wanted)
    if path is not None and has_schema(path, PLAN_SCHEMA):
        plan, path = read_plan(path), None
    with open_source(out) as target:
        record, encodings = find_record(target, path), None
        if full and source is not None:
            encodings = choose_encodings(target, source, record, plan, read_importance(imatrix, source))
        sources = [target] if source is None else [target, source]
        prepare_kernels(monitor, {t.format for s in sources for t in s.tensors}, Purpose.DECODE)
        with monitor.progress("verifying", sum(t.n_bytes for t in target.tensors)) as advance:
            found = run_interruptible(
                verify_output, target, source=source, record=record, threads=threads, progress=advance
            )
        if plan is not None:
            lines = tuple(compare_with_plan(target, plan))
            against = (*found.against, PLAN)
            compared = (*found.compared, "plan: the type of every tensor")
            found = replace(found, against=against, compared=compared, findings=(*found.findings, *lines))
        if encodings is None or source is None or found.other_source:
            return found
        return _encode_again(found, (target, source), encodings, monitor, threads)


def _encode_again(
    found: Verification, files: tuple[Source, Source], encodings: Encodings, monitor: Monitor, threads: int | None
) -> Verification:
    """Return the verification with what encoding again adds to it; files: output and source."""
    prepare_kernels(monitor, formats_used(replace(encodings.plan, choices=encodings.choices)))

    def compare() -> list[tuple[str, str]]:
        return list(compare_encodings(*files, encodings, threads=threads, progress=advance))

    with monitor.progress("encoding again", sum(c.n_bytes for c in encodings.choices)) as advance:
        differences = run_interruptible(compare)
    wrong = dict.fromkeys((*found.wrong_tensors, *(name for name, _ in differences)))
    return replace(
        found,
        against=(*found.against, ENCODINGS) if encodings.is_complete else found.against,
        compared=(*found.compared, *encodings.compared()),
        findings=(*found.findings, *(line for _, line in differences)),
        wrong_tensors=tuple(wrong),
    )
