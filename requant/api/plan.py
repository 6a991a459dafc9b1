"""What planning does besides one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from requant.api.invocation import signed
from requant.api.session import Job
from requant.common.interrupt import interruptible
from requant.common.serialization import dump
from requant.planning.best_plan import make_plan
from requant.planning.plan import Plan
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.planning.explain import Explanation, Outlook
    from requant.planning.frontier import Point


def plans(job: Job, vrams: Sequence[int]) -> list[Plan]:
    """One plan per budget, all from the same losses."""
    asked = [replace(job, wishes=replace(job.wishes, vram=vram)) for vram in vrams]
    job, losses = replace(job, wishes=replace(job.wishes, vram=min(vrams))).scored()
    found = []
    with job.teller.progress("solving", len(asked), " plans") as advance:
        for one in asked:
            plan = interruptible(make_plan, job.source, losses, one.wishes, imatrix=job.imatrix)
            found.append(signed(plan, one))
            advance(1)
    return found


def as_list(found: Sequence[Plan]) -> str:
    """The plans in one object."""
    return dump({"schema": "requant.plans/1", "plans": [json.loads(plan.to_json()) for plan in found]})


def frontier(job: Job) -> tuple[list[Point], Losses]:
    """The curve of loss against bytes, and the losses that it was made from."""
    from requant.planning import frontier as frontier_

    job, losses = job.scored()
    with job.teller.progress("solving", frontier_.N_POINTS, " plans") as advance:
        found = interruptible(frontier_.frontier, job.source, losses, job.wishes, imatrix=job.imatrix, progress=advance)
    return found, losses


def explanation(job: Job, plan: Plan, name: str) -> tuple[Explanation, tuple[Outlook, ...]]:
    """Why the tensor has its type in `plan`, and what more would buy; the losses it was made from must be given."""
    from requant.planning.explain import explained, outlook

    job, losses = job.scored()
    common: dict[str, Any] = {"imatrix": job.imatrix}
    with job.teller.working("solving"):
        found = interruptible(explained, job.source, losses, job.wishes, plan, name, **common)
        return found, interruptible(outlook, job.source, losses, job.wishes, plan, **common)
