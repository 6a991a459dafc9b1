"""What planning does besides one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from requant.api.invocation import record_options
from requant.api.session import Session
from requant.common.interrupt import run_interruptible
from requant.common.serialization import dump
from requant.planning.best_plan import make_plan
from requant.planning.plan import Plan
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.planning.explain import Explanation, Outlook
    from requant.planning.frontier import Point


def make_plans(job: Session, vrams: Sequence[int]) -> list[Plan]:
    """One plan per budget, all from the same losses."""
    asked = [replace(job, request=replace(job.request, vram=vram)) for vram in vrams]
    job, losses = replace(job, request=replace(job.request, vram=min(vrams))).scored()
    found = []
    with job.monitor.progress("solving", len(asked), " plans") as advance:
        for one in asked:
            plan = run_interruptible(make_plan, job.source, losses, one.request, imatrix=job.imatrix)
            found.append(record_options(plan, one))
            advance(1)
    return found


def plans_to_json(found: Sequence[Plan]) -> str:
    """The plans in one object."""
    return dump({"schema": "requant.plans/1", "plans": [json.loads(plan.to_json()) for plan in found]})


def compute_curve(job: Session) -> tuple[list[Point], Losses]:
    """The curve of loss against bytes, and the losses that it was made from."""
    from requant.planning import frontier as frontier_

    job, losses = job.scored()
    with job.monitor.progress("solving", frontier_.N_POINTS, " plans") as advance:
        found = run_interruptible(
            frontier_.compute_frontier, job.source, losses, job.request, imatrix=job.imatrix, progress=advance
        )
    return found, losses


def explain_tensor(job: Session, plan: Plan, name: str) -> tuple[Explanation, tuple[Outlook, ...]]:
    """Why the tensor has its type in `plan`, and what more would buy; the losses it was made from must be given."""
    from requant.planning.explain import compute_outlook, explain_choice

    job, losses = job.scored()
    common: dict[str, Any] = {"imatrix": job.imatrix}
    with job.monitor.working("solving"):
        found = run_interruptible(explain_choice, job.source, losses, job.request, plan, name, **common)
        return found, run_interruptible(compute_outlook, job.source, losses, job.request, plan, **common)
