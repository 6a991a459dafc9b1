"""A finished output read again and compared with its record, a plan and its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.container.source import Source, open_source
from requant.interruptible import interruptible
from requant.pipeline import off_plan
from requant.plan import PLAN_SCHEMA, Plan, read_plan
from requant.stages.kernels import prepare_kernels
from requant.teller import Teller
from requant.textfile import has_schema

if TYPE_CHECKING:
    from requant.verification import Verification


def verify(
    out: Path, source: Source | None, wanted: Plan | Path | None, teller: Teller, *, threads: int | None
) -> Verification:
    """What is wrong with `out`; `wanted` is a plan, or the record where it is not beside `out`."""
    from requant.verification import formats_read
    from requant.verification import verify as verify_

    plan, record = (wanted, None) if isinstance(wanted, Plan) else (None, wanted)
    if record is not None and has_schema(record, PLAN_SCHEMA):
        plan, record = read_plan(record), None
    with open_source(out) as target:
        prepare_kernels(teller, formats_read(target, source), encode=False)
        total = sum(t.n_bytes for t in target.tensors)
        differences = () if plan is None else tuple(off_plan(target, plan))
    with teller.progress("verifying", total) as advance:
        found = interruptible(verify_, out, source=source, record=record, threads=threads, progress=advance)
    if plan is None:
        return found
    return replace(found, against=(*found.against, "plan"), findings=(*found.findings, *differences))
