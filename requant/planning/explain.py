"""Why a tensor has its type, what another would cost, what limits a plan and what more memory would buy.

Every figure is the optimum of a problem that was solved again with one thing changed, not an extrapolation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from requant.container.imatrix import Imatrix
from requant.container.source import Source
from requant.errors import InfeasibleBudget, UsageError, brief, suggest
from requant.planning.best_plan import best_plan
from requant.planning.constraints import Rule
from requant.planning.plan import Choice, Plan
from requant.planning.request import PlanRequest
from requant.scoring.losses import Losses, TensorLosses

MORE = 100 * 2**20  # bytes that one is offered


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate of a tensor; `plan_loss`: predicted for the best plan in which the tensor has it, None if none."""

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
    """A limit, what of it is left, and the predicted loss (or bytes, where bytes are least) with `more` of it."""

    option: str
    free: int
    more: int
    value: float | None


def explain_choice(
    source: Source, losses: Losses, request: PlanRequest, plan: Plan, name: str, *, imatrix: Imatrix | None = None
) -> Explanation:
    """Why the tensor called `name` has its type in `plan`. Raises UsageError where there is no such tensor."""
    tensor = next((t for t in losses.tensors if t.name == name), None)
    if tensor is None:
        raise UsageError(f"--explain: no tensor '{brief(name)}'; {suggest(name, [t.name for t in losses.tensors])}")
    choice = next(c for c in plan.choices if c.name == name)
    request = _as_planned(request, plan)
    if tensor.reason is not None:
        return Explanation(choice, ())

    def best_with(type_name: str) -> float | None:
        if type_name == choice.type:
            return plan.predicted_loss
        pinned = replace(request, pins=(_pin(tensor, type_name), *request.pins))
        return _loss(lambda: best_plan(source, losses, pinned, imatrix=imatrix))

    found = sorted(tensor.candidates, key=lambda c: (c.n_bytes, c.type))
    alternatives = (Alternative(c.type, c.n_bytes, c.loss, c.type == choice.type, best_with(c.type)) for c in found)
    return Explanation(choice, tuple(alternatives))


def _as_planned(request: PlanRequest, plan: Plan) -> PlanRequest:
    """`request` with the batch that the plan is for: another one would change the loss for no reason of the types."""
    return replace(request, n_ubatch=plan.budget.get("ubatch"))


def _pin(tensor: TensorLosses, type_name: str) -> Rule:
    return Rule("--explain", f"^{re.escape(tensor.name)}$", type_name)


def _loss(make: Callable[[], Plan]) -> float | None:
    try:
        return make().predicted_loss
    except (InfeasibleBudget, UsageError):  # it does not fit, or the types cannot be had together
        return None


def compute_outlook(
    source: Source, losses: Losses, request: PlanRequest, plan: Plan, *, imatrix: Imatrix | None = None
) -> tuple[Outlook, ...]:
    """For each limit in bytes, what 100 MiB more of it would buy (a tenth of it where that is less)."""
    found, request = [], _as_planned(request, plan)
    for limit in plan.limits:
        more = min(MORE, limit.budget // 10)
        wider = {
            "--vram": replace(request, vram=limit.budget + more),
            "--ram": replace(request, ram=limit.budget + more),
            "--size": replace(request, size=limit.budget + more),
        }.get(limit.option)
        if wider is not None:
            value = _loss(partial(best_plan, source, losses, wider, imatrix=imatrix))
            found.append(Outlook(limit.option, limit.budget - plan.used(limit), more, value))
    return tuple(found)
