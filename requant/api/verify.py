"""Verification as one call: of a finished output against its record, a plan and its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.api.kernels import prepare_kernels
from requant.common.atomic_write import has_schema
from requant.common.interrupt import run_interruptible
from requant.common.monitor import Monitor
from requant.container.source import Source, open_source
from requant.conversion.compare import compare_with_plan
from requant.conversion.verify import Verification
from requant.conversion.verify import verify as verify_
from requant.planning.plan import PLAN_SCHEMA, Plan, read_plan


def verify(
    out: Path, source: Source | None, wanted: Plan | Path | None, monitor: Monitor, *, threads: int | None
) -> Verification:
    """Verify `out`; `wanted` is a plan, the file of one, or the record where it is not beside `out`."""
    plan, record = (wanted, None) if isinstance(wanted, Plan) else (None, wanted)
    if record is not None and has_schema(record, PLAN_SCHEMA):
        plan, record = read_plan(record), None
    with open_source(out) as target:
        sources = [target] if source is None else [target, source]
        prepare_kernels(monitor, {t.format for s in sources for t in s.tensors}, encode=False)
        total = sum(t.n_bytes for t in target.tensors)
        differences = () if plan is None else tuple(compare_with_plan(target, plan))
    with monitor.progress("verifying", total) as advance:
        found = run_interruptible(verify_, out, source=source, record=record, threads=threads, progress=advance)
    if plan is None:
        return found
    return replace(found, against=(*found.against, "plan"), findings=(*found.findings, *differences))
