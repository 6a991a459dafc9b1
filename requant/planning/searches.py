"""Searches over requests: the largest context and the best cache types, one solution per request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from requant.errors import BadInput, InfeasibleBudget, UsageError
from requant.model.engine_settings import CELL_PADDING, engine_settings
from requant.model.memory import memory_for
from requant.planning.request import PlanRequest
from requant.planning.rules import AUTO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from requant.model.hyperparameters import Hyperparameters
    from requant.planning.plan import Plan

Solve = Callable[[PlanRequest], "Plan"]

_PLAIN = ("F16", "F16")  # types of a cache that is not rounded


def feasible_plans(solve: Solve, requests: Iterable[PlanRequest]) -> Iterator[tuple[PlanRequest, Plan]]:
    """Yield each request that can be met with its plan. Raises the last InfeasibleBudget where none can."""
    fault, any_met = None, False
    for request in requests:
        found = attempt(solve, request)
        if isinstance(found, InfeasibleBudget):
            fault = found
        else:
            any_met = True
            yield request, found
    if fault is not None and not any_met:
        raise fault


def attempt(solve: Callable[..., Plan], request: PlanRequest, *args: float, **how: Any) -> Plan | InfeasibleBudget:
    """Return the plan for the request, or the error where none fits."""
    try:
        return solve(request, *args, **how)
    except InfeasibleBudget as fault:
        return fault


def search_context(solve: Solve, request: PlanRequest, hp: Hyperparameters) -> Plan:
    """Return the plan of the largest context, in steps of 256 tokens, that meets the request."""
    step = min(CELL_PADDING, hp.context_length)
    best = solve(replace(request, n_ctx=step))
    whole = attempt(solve, replace(request, n_ctx=hp.context_length))
    if not isinstance(whole, InfeasibleBudget):
        note = f"--ctx max ends at the {hp.context_length} tokens that the model was made for"
        return replace(whole, notes=(*whole.notes, note))
    low, high = 1, max(hp.context_length // step, 1)
    while high - low > 1:
        middle = (low + high) // 2
        found = attempt(solve, replace(request, n_ctx=middle * step))
        if isinstance(found, InfeasibleBudget):
            high = middle
        else:
            low, best = middle, found
    return best


def search_cache_types(
    solve: Callable[[PlanRequest, float], Plan],
    request: PlanRequest,
    hp: Hyperparameters,
    cache_losses: Mapping[str, float],
) -> Plan:
    """Return the plan of the cache types under which what is minimized, with the cache's own loss, is least.

    solve: takes a request and the loss of its cache, which counts towards --max-loss. `cache_losses`: "K type/V type"
    -> measured loss. Raises UsageError where none was measured, or none is allowed.
    """
    pairs = _open_cache_types(request, cache_losses)
    requests = (replace(request, cache_type_k=k, cache_type_v=v) for k, v in pairs)
    possible = (one for one in requests if _can_cache(one, hp))

    def own_loss(one: PlanRequest) -> float:
        return pairs[one.cache_type_k or "", one.cache_type_v or ""]

    found = [
        replace(plan, cache_loss=own_loss(one))
        for one, plan in feasible_plans(lambda one: solve(one, own_loss(one)), possible)
    ]
    best = min(found, key=lambda plan: plan.minimized)
    totals = [
        f"{plan.budget['cache_type_k']}/{plan.budget['cache_type_v']} {plan.total_loss or 0:.4g}".lower()
        for plan in found
    ]
    note = f"predicted loss of weights and cache by cache type (K/V): {'; '.join(totals)}"
    return replace(best, notes=(*best.notes, f"{note}; of it the cache's own {best.cache_loss:.4g}"))


def _open_cache_types(request: PlanRequest, cache_losses: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """(K type, V type) -> measured loss, of the pairs that the request leaves open; unrounded caches lose nothing."""
    measured = {_PLAIN: 0.0}
    for name, loss in cache_losses.items():
        k, _, v = name.partition("/")
        measured[k, v] = loss
    wanted = (request.cache_type_k or "F16").upper(), (request.cache_type_v or "F16").upper()
    left = {
        pair: loss
        for pair, loss in measured.items()
        if all(want in (AUTO, have) for want, have in zip(wanted, pair, strict=True))
    }
    if len(measured) == 1:
        raise UsageError(
            "a cache type of auto needs losses in which caches were measured; `requant plan` measures them"
        )
    if not left:
        known = ", ".join(f"{k}/{v}".lower() for k, v in measured)
        raise UsageError(f"no pair of cache types that was measured has what is asked; give auto for both: {known}")
    return left


def _can_cache(request: PlanRequest, hp: Hyperparameters) -> bool:
    """Return whether a cache of the request's types is possible: their blocks must divide the model's heads.

    Raises BadInput where not even F16 caches are possible.
    """
    try:
        memory_for(hp, engine_settings(hp, request.settings))
    except BadInput:
        if (request.cache_type_k, request.cache_type_v) == _PLAIN:
            raise
        return False
    return True
