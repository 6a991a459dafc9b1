"""Planning beyond one plan: several budgets, the frontier, explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from requant.api.importance import Importance, point_to_importance
from requant.api.invocation import record_options
from requant.api.session import Session
from requant.common.interrupt import run_interruptible
from requant.common.serialization import dump
from requant.common.units import format_size
from requant.planning.explain import Explanation, Outlook, compute_outlook, explain_choice
from requant.planning.frontier import N_POINTS, Point, compute_frontier
from requant.planning.plan import Plan
from requant.planning.planner import Planner
from requant.scoring.losses import Losses


def make_plans(session: Session, vrams: Sequence[int]) -> tuple[list[Plan], Importance]:
    """Return one plan per budget, all from the same losses, and the importance to convert them with.

    No plan is worse than that of a smaller budget.
    """
    sessions = [replace(session, request=replace(session.request, vram=vram)) for vram in vrams]
    losses, importance = sessions[vrams.index(min(vrams))].find_losses()
    planner, found = Planner(session.source, losses, importance.imatrix), dict[int, Plan]()
    with session.monitor.progress("solving", len(sessions), " plans") as advance:
        for vram in sorted(set(vrams)):
            one = sessions[vrams.index(vram)]
            plan = run_interruptible(planner.best, one.request)
            smaller = min(found.values(), key=lambda plan: plan.minimized, default=plan)
            plan = point_to_importance(_take_better(plan, smaller, vram), importance, session.losses)
            found[vram] = record_options(plan, one)
            advance(1)
    return [found[vram] for vram in vrams], importance


def _take_better(plan: Plan, smaller: Plan, vram: int) -> Plan:
    """Return `plan`, or a better one for a smaller --vram as one for `vram`.

    The plan for a smaller budget is better where a search ended at its time limit.
    """
    if plan.minimized <= smaller.minimized:
        return plan
    bound = None if plan.gap is None else (1 - plan.gap) * plan.minimized
    gap = None if bound is None else max(0.0, 1 - bound / smaller.minimized) if smaller.minimized else 0.0
    limits = tuple(replace(x, budget=vram) if x.option == "--vram" else x for x in smaller.limits)
    note = f"the plan for --vram {format_size(smaller.budget['vram'])}: better than what was found for this one"
    budget = {**smaller.budget, "vram": vram}
    return replace(smaller, limits=limits, budget=budget, gap=gap, notes=(*smaller.notes, note))


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
