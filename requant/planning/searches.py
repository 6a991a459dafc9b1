"""Searches over requests: the largest context, the best cache types and the best batch, one solution per request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from requant.errors import BadInput, InfeasibleBudget, UsageError
from requant.model.engine_settings import CELL_PADDING, DEFAULT_UBATCH, engine_settings
from requant.model.memory import memory_for
from requant.planning.request import PlanRequest
from requant.planning.rules import AUTO
from requant.planning.ubatch import describe_batch, halve_batches, smaller_batches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from requant.model.hyperparameters import Hyperparameters
    from requant.planning.plan import Plan

Solve = Callable[[PlanRequest], "Plan"]

_UNSEEN = 4e-4  # nats; the loss that llama.cpp's rounding of activations to 8 bits adds to any quantized model
_PLAIN = ("F16", "F16")  # types of a cache that is not rounded


def feasible_plans(solve: Solve, requests: Iterable[PlanRequest]) -> Iterator[tuple[PlanRequest, Plan]]:
    """Yield each request that can be met with its plan. Raises the last InfeasibleBudget where none can."""
    fault, any_met = None, False
    for request in requests:
        found = _attempt(solve, request)
        if isinstance(found, InfeasibleBudget):
            fault = found
        else:
            any_met = True
            yield request, found
    if fault is not None and not any_met:
        raise fault


def _attempt(solve: Solve, request: PlanRequest) -> Plan | InfeasibleBudget:
    try:
        return solve(request)
    except InfeasibleBudget as fault:
        return fault


def search_context(solve: Solve, request: PlanRequest, hp: Hyperparameters) -> Plan:
    """Return the plan of the largest context, in steps of 256 tokens, that meets the request."""
    step = min(CELL_PADDING, hp.context_length)
    best = solve(replace(request, n_ctx=step))
    whole = _attempt(solve, replace(request, n_ctx=hp.context_length))
    if not isinstance(whole, InfeasibleBudget):
        note = f"--ctx max ends at the {hp.context_length} tokens that the model was made for"
        return replace(whole, notes=(*whole.notes, note))
    low, high = 1, max(hp.context_length // step, 1)
    while high - low > 1:
        middle = (low + high) // 2
        found = _attempt(solve, replace(request, n_ctx=middle * step))
        if isinstance(found, InfeasibleBudget):
            high = middle
        else:
            low, best = middle, found
    return best


def search_cache_types(
    solve: Solve, request: PlanRequest, hp: Hyperparameters, cache_losses: Mapping[str, float]
) -> Plan:
    """Return the plan of the cache types under which model and cache lose least together.

    `cache_losses`: "K type/V type" -> measured loss. Raises UsageError where none was measured, or none is allowed.
    """
    pairs = _open_cache_types(request, cache_losses)
    requests = (replace(request, cache_type_k=k, cache_type_v=v) for k, v in pairs)
    possible = (one for one in requests if _can_cache(one, hp))
    found = [
        ((plan.predicted_loss or 0.0) + pairs[one.cache_type_k or "", one.cache_type_v or ""], plan)
        for one, plan in feasible_plans(solve, possible)
    ]
    total, best = min(found, key=lambda pair: pair[0])
    names = [f"{plan.budget['cache_type_k']}/{plan.budget['cache_type_v']}".lower() for _, plan in found]
    listed = "; ".join(f"{name} {total:.4g}" for name, (total, _) in zip(names, found, strict=True))
    own = total - (best.predicted_loss or 0.0)
    note = f"predicted loss of weights and cache by cache type (K/V): {listed}; of it the cache's own {own:.4g}"
    return replace(best, notes=(*best.notes, note))


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


def search_batch(solve: Solve, request: PlanRequest, hp: Hyperparameters) -> Plan:
    """Return the plan of the largest batch that keeps --max-loss, or of smaller ones while each halves the loss."""
    if request.max_loss is not None:
        halves = (replace(request, n_ubatch=n) for n in halve_batches())
        # the request as given comes last: where no plan is feasible, its error says what would be enough
        met, plan = next(feasible_plans(solve, chain(halves, [request])))
        return plan if met.n_ubatch in (None, DEFAULT_UBATCH) else _note_batch(plan)
    first = best = solve(request)
    for n_ubatch in smaller_batches(hp, engine_settings(hp, request.settings), first):
        if (best.predicted_loss or 0.0) <= _UNSEEN:
            break
        plan = solve(replace(request, n_ubatch=n_ubatch))
        if 2 * (plan.predicted_loss or 0.0) > (best.predicted_loss or 0.0):
            break
        best = plan
    return best if best is first else _note_batch(best)


def _note_batch(plan: Plan) -> Plan:
    return replace(plan, notes=(*plan.notes, describe_batch(DEFAULT_UBATCH, plan.budget["ubatch"])))
