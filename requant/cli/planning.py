"""What `requant plan` does besides one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from requant.cli import messages
from requant.cli.stages import Job
from requant.cli.words import signed
from requant.pipeline import make_plan
from requant.plan import Plan
from requant.records import dump


def plans(job: Job, vrams: Sequence[int]) -> list[Plan]:
    """One plan per budget, all from the same losses."""
    asked = [replace(job, wishes=replace(job.wishes, vram=vram)) for vram in vrams]
    job, losses = job.scored()
    found = []
    with messages.progress("solving", len(asked), "plans") as advance:
        for one in asked:
            plan = messages.interruptible(make_plan, job.source, losses, one.wishes, imatrix=job.imatrix)
            found.append(signed(plan, one))
            advance(1)
    return found


def as_list(found: Sequence[Plan]) -> str:
    """The plans in one object."""
    return dump({"schema": "requant.plans/1", "plans": [json.loads(plan.to_json()) for plan in found]})


def frontier(job: Job, *, as_json: bool) -> str:
    """The curve of loss against bytes, as CSV or JSON."""
    from requant import frontier as frontier_

    job, losses = job.scored()
    with messages.progress("solving", frontier_.N_POINTS, " plans") as advance:
        found = messages.interruptible(
            frontier_.frontier, job.source, losses, job.wishes, imatrix=job.imatrix, progress=advance
        )
    return frontier_.as_json(found, losses) if as_json else frontier_.as_csv(found)


def explanation(job: Job, plan: Plan, name: str) -> str:
    """Why the tensor has its type in `plan`; the losses it was made from must be given."""
    from requant.explain import explained, outlook
    from requant.report.explain import explanation_text

    job, losses = job.scored()
    common: dict[str, Any] = {"imatrix": job.imatrix}
    with messages.working("solving"):
        found = messages.interruptible(explained, job.source, losses, job.wishes, plan, name, **common)
        more = messages.interruptible(outlook, job.source, losses, job.wishes, plan, **common)
    return explanation_text(found, plan, more)
