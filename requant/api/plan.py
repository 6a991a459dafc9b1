"""Planning beyond one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.api.invocation import record_options
from requant.api.session import Session
from requant.common.interrupt import run_interruptible
from requant.common.serialization import dump
from requant.planning.plan import Plan
from requant.planning.planner import Planner
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.planning.explain import Explanation, Outlook
    from requant.planning.frontier import Point


def make_plans(job: Session, vrams: Sequence[int]) -> list[Plan]:
    """Return one plan per budget, all from the same losses."""
    asked = [replace(job, request=replace(job.request, vram=vram)) for vram in vrams]
    job, losses = replace(job, request=replace(job.request, vram=min(vrams))).scored()
    planner, found = Planner(job.source, losses, job.imatrix), []
    with job.monitor.progress("solving", len(asked), " plans") as advance:
        for one in asked:
            found.append(record_options(run_interruptible(planner.best, one.request), one))
            advance(1)
    return found


def plans_to_json(found: Sequence[Plan]) -> str:
    """Return the plans as one JSON object."""
    return dump({"schema": "requant.plans/1", "plans": [json.loads(plan.to_json()) for plan in found]})


def compute_curve(job: Session) -> tuple[list[Point], Losses]:
    """Compute the curve of loss against bytes; return it with the losses."""
    from requant.planning.frontier import N_POINTS, compute_frontier

    job, losses = job.scored()
    planner = Planner(job.source, losses, job.imatrix)
    with job.monitor.progress("solving", N_POINTS, " plans") as advance:
        return run_interruptible(compute_frontier, planner, job.request, progress=advance), losses


def explain_tensor(job: Session, plan: Plan, name: str) -> tuple[Explanation, tuple[Outlook, ...]]:
    """Explain the tensor's type in `plan` and compute the outlook; `plan` was made from the losses that are given."""
    from requant.planning.explain import compute_outlook, explain_choice

    job, losses = job.scored()
    planner = Planner(job.source, losses, job.imatrix)
    with job.monitor.working("solving"):
        found = run_interruptible(explain_choice, planner, job.request, plan, name)
        return found, run_interruptible(compute_outlook, planner, job.request, plan)
