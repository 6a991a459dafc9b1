"""Explanation of a plan: the cost of every other type of a tensor, and the gain from more of each limit.

Every figure is the optimum of a problem that was solved again with one thing changed, not an extrapolation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from requant.errors import InfeasibleBudget, UsageError, brief, suggest
from requant.planning.constraints import Rule

if TYPE_CHECKING:
    from requant.planning.plan import Choice, Plan
    from requant.planning.planner import Planner
    from requant.planning.request import PlanRequest

_LISTED = 40  # names in a message
MORE = 100 * 2**20  # bytes more of a limit, for the outlook


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate of a tensor; `plan_loss`: predicted for the best plan with it, None where no plan has it."""

    type: str
    n_bytes: int
    loss: float
    chosen: bool
    plan_loss: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One tensor's choice and its alternatives."""

    choice: Choice
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """A limit, the bytes of it that are free, and the predicted loss of the best plan with `more` bytes of it."""

    option: str
    free: int
    more: int
    value: float | None


def explain_choice(planner: Planner, request: PlanRequest, plan: Plan, name: str) -> Explanation:
    """Explain the type that the tensor called `name` has in `plan`. Raises UsageError where there is no such tensor."""
    tensors = {t.name: t for t in planner.losses.tensors}
    if name not in tensors:
        part = [brief(known) for known in tensors if name in known]
        hint = f"it is part of {', '.join(part[:_LISTED])}" + ", ..." * (len(part) > _LISTED)
        raise UsageError(f"--explain: no tensor '{brief(name)}'; {hint if part else suggest(name, list(tensors))}")
    tensor, choice = tensors[name], next(c for c in plan.choices if c.name == name)
    if tensor.reason is not None:
        return Explanation(choice, ())

    def best_with(type_name: str) -> float | None:
        if type_name == choice.type:
            return plan.predicted_loss
        pin = Rule("--explain", f"^{re.escape(name)}$", type_name)
        return _predict_loss(planner, replace(request, pins=(pin, *request.pins)))

    found = sorted(tensor.candidates, key=lambda c: (c.n_bytes, c.type))
    alternatives = (Alternative(c.type, c.n_bytes, c.loss, c.type == choice.type, best_with(c.type)) for c in found)
    return Explanation(choice, tuple(alternatives))


def compute_outlook(planner: Planner, request: PlanRequest, plan: Plan) -> tuple[Outlook, ...]:
    """Solve again with 100 MiB more of each limit in bytes (a tenth of it where that is less)."""
    found = []
    for limit in plan.limits:
        more = min(MORE, limit.budget // 10)
        wider = {
            "--vram": replace(request, vram=limit.budget + more),
            "--ram": replace(request, ram=limit.budget + more),
            "--size": replace(request, size=limit.budget + more),
        }.get(limit.option)
        if wider is not None:
            value = _predict_loss(planner, wider)
            found.append(Outlook(limit.option, limit.budget - plan.used(limit), more, value))
    return tuple(found)


def _predict_loss(planner: Planner, request: PlanRequest) -> float | None:
    """The predicted loss of the best plan; None where the request cannot be met."""
    try:
        return planner.solve(request).predicted_loss
    except (InfeasibleBudget, UsageError):  # it does not fit, or no tensor or group can have these types together
        return None
