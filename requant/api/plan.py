"""Planning beyond one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from requant.api.invocation import record_options
from requant.api.session import Session
from requant.common.interrupt import run_interruptible
from requant.common.serialization import dump
from requant.planning.explain import Explanation, Outlook, compute_outlook, explain_choice
from requant.planning.frontier import N_POINTS, Point, compute_frontier
from requant.planning.plan import Plan
from requant.planning.planner import Planner
from requant.scoring.losses import Losses


def make_plans(session: Session, vrams: Sequence[int]) -> list[Plan]:
    """Return one plan per budget, all from the same losses."""
    sessions = [replace(session, request=replace(session.request, vram=vram)) for vram in vrams]
    losses, importance = sessions[vrams.index(min(vrams))].find_losses()
    planner, found = Planner(session.source, losses, importance.imatrix), []
    with session.monitor.progress("solving", len(sessions), " plans") as advance:
        for one in sessions:
            found.append(record_options(run_interruptible(planner.best, one.request), one))
            advance(1)
    return found


def plans_to_json(found: Sequence[Plan]) -> str:
    """Return the plans as one JSON object."""
    return dump({"schema": "requant.plans/1", "plans": [json.loads(plan.to_json()) for plan in found]})


def compute_curve(session: Session) -> tuple[list[Point], Losses]:
    """Compute the curve of loss against bytes; return it with the losses."""
    losses, importance = session.find_losses(any_budget=True)
    planner = Planner(session.source, losses, importance.imatrix)
    with session.monitor.progress("solving", N_POINTS, " plans") as advance:
        return run_interruptible(compute_frontier, planner, session.request, progress=advance), losses


def explain_tensor(session: Session, plan: Plan, name: str) -> tuple[Explanation, tuple[Outlook, ...]]:
    """Explain the tensor's type in `plan`, and compute the outlook; the plan was made from losses that are given."""
    losses, importance = session.find_losses()
    planner = Planner(session.source, losses, importance.imatrix)
    with session.monitor.working("solving"):
        found = run_interruptible(explain_choice, planner, session.request, plan, name)
        return found, run_interruptible(compute_outlook, planner, session.request, plan)
