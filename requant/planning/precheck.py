"""Checks of a request before the model is scored: whether it can be met at all, and whether it needs any scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.container.source import Source
from requant.errors import InfeasibleBudget
from requant.model.engine_settings import CELL_PADDING, DEFAULT_UBATCH
from requant.planning.planner import Planner
from requant.planning.request import MEMORY_OPTIONS, PlanRequest
from requant.planning.rules import AUTO, MAX_CONTEXT
from requant.scoring.losses import IN_NATS, Losses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix


def check_feasible(
    source: Source,
    request: PlanRequest,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    has_importance: bool = False,
) -> None:
    """Raise, without scoring, all errors of planning for `source` from losses of `types`.

    Those are the errors of `Planner.best`, and BadInput for a source that must not be quantized again.
    """
    from requant.scoring.candidates import build_losses, check_requantization, survey

    tensors = survey(source, types=types, imatrix=imatrix, has_importance=has_importance)
    check_requantization(source, tensors, allow_requantize)
    types_kv = [("F16" if x == AUTO else x) for x in (request.cache_type_k, request.cache_type_v)]
    n_ctx = CELL_PADDING if request.n_ctx == MAX_CONTEXT else request.n_ctx
    smallest = replace(request, cache_type_k=types_kv[0], cache_type_v=types_kv[1], n_ctx=n_ctx)
    Planner(source, build_losses(source, tensors, ""), imatrix).solve(smallest)


def losses_without_scoring(source: Source, request: PlanRequest) -> Losses | None:
    """Losses that keep every tensor as it is, where that meets the request and so no plan is better; else None."""
    from requant.scoring.candidates import build_losses, survey

    whole = request
    if request.vram is not None:  # no smaller batch is chosen
        whole = replace(request, n_ubatch=request.n_ubatch or DEFAULT_UBATCH)
    asked = {name: getattr(whole, name) for name in ("vram", "size", "bpw", "engine", *MEMORY_OPTIONS)}
    least = request.n_ctx == MAX_CONTEXT or AUTO in (request.cache_type_k, request.cache_type_v) or request.price
    if least or PlanRequest(**asked) != whole:  # the request is about time, least bytes or types too
        return None
    tensors = tuple(
        replace(t, candidates=tuple(c for c in t.candidates if c.type == t.source_type), skipped={})
        for t in survey(source, types=())
    )
    note = "the model fits as it is, so nothing was scored: every tensor is copied"
    losses = build_losses(source, tensors, IN_NATS[0], notes=(note,))
    try:
        Planner(source, losses).solve(whole)
    except InfeasibleBudget:
        return None
    return losses
