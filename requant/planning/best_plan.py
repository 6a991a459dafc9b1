"""From a model and what was asked for to a plan: the stages in one go, for whoever holds a budget and not a Request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.container.source import Source, require_model
from requant.errors import BadInput, InfeasibleBudget, UsageError, brief
from requant.model.engine_settings import CELL_PADDING, DEFAULT_UBATCH
from requant.model.hyperparameters import read_hyperparameters
from requant.planning.deployment import MIN_UBATCH, describe_batch, smaller_batches
from requant.planning.plan import Plan
from requant.planning.plan_once import _at_batch
from requant.planning.request import MEMORY_OPTIONS, PlanRequest, check_request
from requant.planning.rules import AUTO, MAX_CONTEXT
from requant.planning.summaries import compare_mixtures
from requant.scoring.losses import IN_NATS, Losses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix

_UNSEEN = 4e-4  # nats; what llama.cpp's rounding of activations to 8 bits adds to any quantized model


def check_feasible(
    source: Source,
    request: PlanRequest,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    has_importance: bool = False,
) -> None:
    """Raise, without scoring, all that can be wrong with planning for `source` from losses of `types`.

    That is what `make_plan` raises, and BadInput for a source that must not be quantized again.
    """
    from requant.scoring.candidates import build_losses, check_requantization, survey

    tensors = survey(source, types=types, imatrix=imatrix, has_importance=has_importance)
    check_requantization(source, tensors, allow_requantize)
    pair = [("F16" if x == AUTO else x) for x in (request.cache_type_k, request.cache_type_v)]
    n_ctx = CELL_PADDING if request.n_ctx == MAX_CONTEXT else request.n_ctx
    request = replace(request, cache_type_k=pair[0], cache_type_v=pair[1], n_ctx=n_ctx)
    make_plan(source, build_losses(source, tensors, ""), request, imatrix=imatrix)


def fits_as_it_is(source: Source, request: PlanRequest) -> Losses | None:
    """Losses that leave every tensor as it is, where that is within all that was asked; then nothing can be better."""
    from requant.scoring.candidates import build_losses, survey

    whole = request
    if request.vram is not None:  # no smaller batch for it
        whole = replace(request, n_ubatch=request.n_ubatch or DEFAULT_UBATCH)
    asked = {name: getattr(whole, name) for name in ("vram", "size", "bpw", "engine", *MEMORY_OPTIONS)}
    least = request.n_ctx == MAX_CONTEXT or AUTO in (request.cache_type_k, request.cache_type_v) or request.price
    if least or PlanRequest(**asked) != whole:  # time, bytes or types are asked for too
        return None
    tensors = tuple(
        replace(t, candidates=tuple(c for c in t.candidates if c.type == t.source_type), skipped={})
        for t in survey(source, types=())
    )
    note = "the model fits as it is, so nothing was scored: every tensor is copied"
    losses = build_losses(source, tensors, IN_NATS[0], notes=(note,))
    try:
        make_plan(source, losses, whole)
    except InfeasibleBudget:
        return None
    return losses


def make_plan(source: Source, losses: Losses, request: PlanRequest, *, imatrix: Imatrix | None = None) -> Plan:
    """The best plan for `source` within all that `request` limit, with llama-quantize's mixtures beside it.

    `imatrix` is the one that converting will use. Raises UsageError for request that cannot be meant, BadInput for
    losses of another model or memory needs that are not known, InfeasibleBudget.
    """
    plan = best_plan(source, losses, request, imatrix=imatrix)
    return replace(plan, mixtures=compare_mixtures(source, losses, has_imatrix=imatrix is not None))


def best_plan(source: Source, losses: Losses, request: PlanRequest, *, imatrix: Imatrix | None = None) -> Plan:
    """What `make_plan` gives, but for the mixtures: for whoever solves again and again."""
    check_request(request)
    losses = _of(source, losses)
    if request.n_ctx == MAX_CONTEXT:
        return _largest_context(source, losses, request, imatrix)
    if AUTO in (request.cache_type_k, request.cache_type_v):
        return _best_cache(source, losses, request, imatrix)
    return _plan_for(source, losses, request, imatrix)


def _of(source: Source, losses: Losses) -> Losses:
    """`losses`, taken over where they are of a sibling: a file with the same tensors in shape and type."""
    if losses.header_sha256 == source.header_sha256:
        return losses
    hint = "score this file first, or leave --losses out"
    ours = [(t.name, t.shape, t.format.name) for t in source.tensors]
    theirs = [(t.name, t.shape, t.source_type) for t in losses.tensors]
    if losses.arch != require_model(source) or sorted(ours) != sorted(theirs):
        odd = next((a for a in sorted(ours) if a not in set(theirs)), None)
        what = "the losses are of another model" + ("" if odd is None else f": tensor {brief(odd[0])} differs")
        raise BadInput(source.path, what, got=losses.source, expected=source.name, hint=hint)
    tensors = {t.name: t for t in losses.tensors}
    note = f"the losses are those of a sibling, {brief(losses.source)}: same tensors, other weights"
    return replace(
        losses,
        source=source.name,
        header_sha256=source.header_sha256,
        tensors=tuple(tensors[t.name] for t in source.tensors),
        notes=(*losses.notes, note),
    )


def _plan_for(source: Source, losses: Losses, request: PlanRequest, imatrix: Imatrix | None) -> Plan:
    """The plan where context and cache types are settled, for smaller batches where that halves the loss."""
    if request.vram is None or request.ram is not None or request.n_ubatch is not None:
        return _at_batch(source, losses, request, imatrix)
    if request.max_loss is not None:
        return _keeping_loss(source, losses, request, imatrix)
    first = best = _at_batch(source, losses, request, imatrix)
    for n_ubatch in smaller_batches(source, request, first):
        if (best.predicted_loss or 0.0) <= _UNSEEN:
            break
        plan = _at_batch(source, losses, replace(request, n_ubatch=n_ubatch), imatrix)
        if 2 * (plan.predicted_loss or 0.0) > (best.predicted_loss or 0.0):
            break
        best = plan
    return best if best is first else _with_batch(best)


def _keeping_loss(source: Source, losses: Losses, request: PlanRequest, imatrix: Imatrix | None) -> Plan:
    """The plan for the largest batch at which the loss can be kept."""
    n_ubatch = DEFAULT_UBATCH
    while n_ubatch >= MIN_UBATCH:
        with suppress(InfeasibleBudget):
            plan = _at_batch(source, losses, replace(request, n_ubatch=n_ubatch), imatrix)
            return plan if n_ubatch == DEFAULT_UBATCH else _with_batch(plan)
        n_ubatch //= 2
    return _at_batch(source, losses, request, imatrix)  # which says what would do


def _with_batch(plan: Plan) -> Plan:
    return replace(plan, notes=(*plan.notes, describe_batch(DEFAULT_UBATCH, plan.budget["ubatch"])))


def _best_cache(source: Source, losses: Losses, request: PlanRequest, imatrix: Imatrix | None) -> Plan:
    """Of the cache types whose own loss was measured, those under which model and cache lose least together."""
    pairs = _cache_pairs(losses, request)
    found: list[tuple[float, Plan]] = []
    fault: InfeasibleBudget | None = None
    for (k, v), loss in pairs.items():
        try:
            plan = _plan_for(source, losses, replace(request, cache_type_k=k, cache_type_v=v), imatrix)
        except InfeasibleBudget as error:
            fault = error
            continue
        except BadInput:  # its heads cannot be cached so
            if (k, v) == ("F16", "F16"):
                raise
            continue
        found.append(((plan.predicted_loss or 0.0) + loss, plan))
    if not found:
        assert fault is not None
        raise fault
    total, best = min(found, key=lambda pair: pair[0])
    names = [f"{plan.budget['cache_type_k']}/{plan.budget['cache_type_v']}".lower() for _, plan in found]
    listed = "; ".join(f"{name} {total:.4g}" for name, (total, _) in zip(names, found, strict=True))
    own = total - (best.predicted_loss or 0.0)
    note = f"predicted loss of weights and cache by cache type (K/V): {listed}; of it the cache's own {own:.4g}"
    return replace(best, notes=(*best.notes, note))


def _cache_pairs(losses: Losses, request: PlanRequest) -> dict[tuple[str, str], float]:
    """(K type, V type) -> measured loss, of the pairs that the request leave open; unrounded caches lose nothing."""
    measured = {("F16", "F16"): 0.0}
    for name, loss in losses.caches.items():
        k, _, v = name.partition("/")
        measured[k, v] = loss
    asked = (request.cache_type_k or "F16").upper(), (request.cache_type_v or "F16").upper()
    left = {
        pair: loss
        for pair, loss in measured.items()
        if all(want in (AUTO, have) for want, have in zip(asked, pair, strict=True))
    }
    if len(measured) == 1:
        raise UsageError(
            "a cache type of auto needs losses in which caches were measured; `requant plan` measures them"
        )
    if not left:
        known = ", ".join(f"{k}/{v}".lower() for k, v in measured)
        raise UsageError(f"no pair of cache types that was measured has what is asked; give auto for both: {known}")
    return left


def _largest_context(source: Source, losses: Losses, request: PlanRequest, imatrix: Imatrix | None) -> Plan:
    """The plan for the largest context, in steps of 256 tokens, at which the loss can be kept."""
    hp = read_hyperparameters(source.metadata, source.tensors)

    def tried(n_ctx: int) -> Plan | InfeasibleBudget:
        try:
            return best_plan(source, losses, replace(request, n_ctx=n_ctx), imatrix=imatrix)
        except InfeasibleBudget as fault:
            return fault

    step = min(CELL_PADDING, hp.context_length)
    low, best = 1, tried(step)
    if isinstance(best, InfeasibleBudget):
        raise best
    high = max(hp.context_length // step, 1)
    if isinstance(whole := tried(hp.context_length), Plan):
        note = f"--ctx max ends at the {hp.context_length} tokens that the model was made for"
        return replace(whole, notes=(*whole.notes, note))
    while high - low > 1:
        middle = (low + high) // 2
        plan = tried(middle * step)
        if isinstance(plan, Plan):
            low, best = middle, plan
        else:
            high = middle
    return best
