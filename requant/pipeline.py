"""From a model and what was asked for to a plan: the stages in one go, for whoever holds a budget and not a Request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from requant.budget import bpw_limit, loss_limit, size_limit
from requant.container.infos import padded
from requant.container.metadata import alignment_of
from requant.container.source import Source, open_source, require_model
from requant.container.splitting import total_size
from requant.errors import BadInput, InfeasibleBudget, UsageError, brief
from requant.ground import MIN_UBATCH, batch_note, ground_of, smaller_batches
from requant.guard import guarded
from requant.layers import reference_type, summaries
from requant.mixtures import compared
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import CELL_PADDING, DEFAULT_UBATCH, layer_caches
from requant.placement import REL_GAP as PLACEMENT_GAP
from requant.placement import SECONDS_EACH, Ground, best_placement
from requant.plan import IN_NATS, Losses, Plan
from requant.request import Request
from requant.solve import REL_GAP, TIME_LIMIT, Solution, solve, solved
from requant.wishes import AUTO, MAX_CONTEXT, MEMORY_OPTIONS, PREFERENCE, Wishes, check_wishes

if TYPE_CHECKING:
    from requant.container.layout import Layout
    from requant.imatrix import Imatrix

_UNSEEN = 4e-4  # nats; what llama.cpp's rounding of activations to 8 bits adds to any quantized model


def check_feasible(
    source: Source,
    wishes: Wishes,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    has_importance: bool = False,
) -> None:
    """Raise, without scoring, all that can be wrong with planning for `source` from losses of `types`.

    That is what `make_plan` raises, and BadInput for a source that must not be quantized again.
    """
    from requant.sensitivity import check_requantization, survey

    tensors = survey(source, types=types, imatrix=imatrix, has_importance=has_importance)
    check_requantization(source, tensors, allow_requantize)
    arch = require_model(source)
    pair = [("F16" if x == AUTO else x) for x in (wishes.cache_type_k, wishes.cache_type_v)]
    n_ctx = CELL_PADDING if wishes.n_ctx == MAX_CONTEXT else wishes.n_ctx
    wishes = replace(wishes, cache_type_k=pair[0], cache_type_v=pair[1], n_ctx=n_ctx)
    make_plan(source, Losses(source.name, source.header_sha256, arch, "", None, None, tensors), wishes, imatrix=imatrix)


def fits_as_it_is(source: Source, wishes: Wishes) -> Losses | None:
    """Losses that leave every tensor as it is, where that is within all that was asked; then nothing can be better."""
    from requant.sensitivity import survey

    whole = wishes
    if wishes.vram is not None:  # no smaller batch for it
        whole = replace(wishes, n_ubatch=wishes.n_ubatch or DEFAULT_UBATCH)
    asked = {name: getattr(whole, name) for name in ("vram", "size", "bpw", "engine", *MEMORY_OPTIONS)}
    least = wishes.n_ctx == MAX_CONTEXT or AUTO in (wishes.cache_type_k, wishes.cache_type_v) or wishes.price
    if least or Wishes(**asked) != whole:  # time, bytes or types are asked for too
        return None
    tensors = tuple(
        replace(t, candidates=tuple(c for c in t.candidates if c.type == t.source_type), skipped={})
        for t in survey(source, types=())
    )
    note = "the model fits as it is, so nothing was scored: every tensor is copied"
    arch = require_model(source)
    losses = Losses(source.name, source.header_sha256, arch, IN_NATS[0], None, None, tensors, (note,))
    try:
        make_plan(source, losses, whole)
    except InfeasibleBudget:
        return None
    return losses


def make_plan(source: Source, losses: Losses, wishes: Wishes, *, imatrix: Imatrix | None = None) -> Plan:
    """The best plan for `source` within all that `wishes` limit, with llama-quantize's mixtures beside it.

    `imatrix` is the one that converting will use. Raises UsageError for wishes that cannot be meant, BadInput for
    losses of another model or memory needs that are not known, InfeasibleBudget.
    """
    plan = best_plan(source, losses, wishes, imatrix=imatrix)
    return replace(plan, mixtures=compared(source, losses, has_imatrix=imatrix is not None))


def best_plan(source: Source, losses: Losses, wishes: Wishes, *, imatrix: Imatrix | None = None) -> Plan:
    """What `make_plan` gives, but for the mixtures: for whoever solves again and again."""
    check_wishes(wishes)
    losses = _of(source, losses)
    if wishes.n_ctx == MAX_CONTEXT:
        return _largest_context(source, losses, wishes, imatrix)
    if AUTO in (wishes.cache_type_k, wishes.cache_type_v):
        return _best_cache(source, losses, wishes, imatrix)
    return _plan_for(source, losses, wishes, imatrix)


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


def _plan_for(source: Source, losses: Losses, wishes: Wishes, imatrix: Imatrix | None) -> Plan:
    """The plan where context and cache types are settled, for smaller batches where that halves the loss."""
    if wishes.vram is None or wishes.ram is not None or wishes.n_ubatch is not None:
        return _at_batch(source, losses, wishes, imatrix)
    if wishes.max_loss is not None:
        return _keeping_loss(source, losses, wishes, imatrix)
    first = best = _at_batch(source, losses, wishes, imatrix)
    for n_ubatch in smaller_batches(source, wishes, first):
        if (best.predicted_loss or 0.0) <= _UNSEEN:
            break
        plan = _at_batch(source, losses, replace(wishes, n_ubatch=n_ubatch), imatrix)
        if 2 * (plan.predicted_loss or 0.0) > (best.predicted_loss or 0.0):
            break
        best = plan
    return best if best is first else _with_batch(best)


def _keeping_loss(source: Source, losses: Losses, wishes: Wishes, imatrix: Imatrix | None) -> Plan:
    """The plan for the largest batch at which the loss can be kept."""
    n_ubatch = DEFAULT_UBATCH
    while n_ubatch >= MIN_UBATCH:
        with suppress(InfeasibleBudget):
            plan = _at_batch(source, losses, replace(wishes, n_ubatch=n_ubatch), imatrix)
            return plan if n_ubatch == DEFAULT_UBATCH else _with_batch(plan)
        n_ubatch //= 2
    return _at_batch(source, losses, wishes, imatrix)  # which says what would do


def _with_batch(plan: Plan) -> Plan:
    return replace(plan, notes=(*plan.notes, batch_note(DEFAULT_UBATCH, plan.budget["ubatch"])))


def _at_batch(source: Source, losses: Losses, wishes: Wishes, imatrix: Imatrix | None) -> Plan:
    """The plan where all that is asked of the engine is settled but, perhaps, a batch that fits at all."""
    request, notes = replace(wishes.request, unusable=wishes.profile.cannot), list[str]()
    ground = ground_of(source, losses, wishes, notes) if wishes.on_devices else None
    if wishes.bpw is not None:
        request = replace(request, limits=(*request.limits, bpw_limit(wishes.bpw, losses)))
    if wishes.max_loss is not None:
        request = replace(request, limits=(*request.limits, loss_limit(wishes.max_loss)), objective="bytes")
    solve_ = partial(_placed, ground=ground, wishes=wishes)

    def finish(plan: Plan) -> Plan:
        return _described(replace(plan, notes=(*plan.notes, *notes)), losses, wishes, ground)

    if wishes.size is None:
        return finish(solve_(losses, request))

    def again(limited: Request) -> Plan:
        return finish(solve_(losses, limited))

    return _within_size(source, losses, request, wishes.size, imatrix=imatrix, solve=again)


def _placed(losses: Losses, request: Request, *, ground: Ground | None, wishes: Wishes) -> Plan:
    """The best plan, on the devices of `ground`, with the engine's own type wherever that costs little."""
    if ground is None:
        return _solved(losses, request).plan
    if ground.ram is None or not ground.engine.has_gpu:
        k = ground.n_places if ground.engine.has_gpu and ground.vram != 0 else 0
        plan = _solved(losses, ground.request(losses, request, k, 0)).plan
    else:
        quick = partial(_solved, time_limit=SECONDS_EACH, rel_gap=PLACEMENT_GAP, why=False)
        found = best_placement(losses, request, ground, quick)
        k, plan = found.k, found.solution.plan
        how = f"{plan.solver}; {found.tried} of {ground.n_places + 1} numbers of layers on the GPU tried"
        plan = replace(plan, gap=found.gap, solver=how)
    experts = {c.layer for c in plan.choices if c.device == "cpu" and c.layer in ground.layers(k)}
    runtime = {
        "n_gpu_layers": ground.n_gpu_layers(k),
        "all_layers": k == ground.n_places,
        "experts_on_cpu": sorted(layer for layer in experts if layer is not None),
    }
    plan = replace(plan, runtime=runtime)
    if not ground.engine.preferred or request.objective != "loss":
        return plan
    wanted = ground.request(losses, request, k, plan.memory.get("copies", 0))
    within = PREFERENCE if wishes.prefer_within is None else wishes.prefer_within
    return _preferring(plan, losses, wanted, ground.engine.preferred, within)


def _preferring(plan: Plan, losses: Losses, wanted: Request, own: str, within: float) -> Plan:
    """`plan`, or the one with most weights in the engine's `own` type that predicts at most `within` more loss."""
    scored = any(c.type == own for t in losses.tensors for c in t.candidates)
    if not scored or not plan.predicted_loss:
        return plan
    placed = {c.name: (c.device,) for c in plan.choices}
    limits = (*wanted.limits, loss_limit(plan.predicted_loss * (1 + within)))
    found = solve(losses, replace(wanted, devices=placed, limits=limits, objective="preferred", preferred=own))
    limits = tuple(limit for limit in found.limits if limit.option != "--max-loss")
    share = sum(c.n_weights for c in found.choices if c.type == own) / found.n_weights
    more = (found.predicted_loss or 0) / plan.predicted_loss - 1
    cost = f"{more:.1%} more predicted loss than the best plan ({within:.0%} allowed)"
    note = f"{own} for {share:.0%} of the weights, at {cost}"
    budget = {key: value for key, value in found.budget.items() if key != "max_loss"} | {"prefer_within": within}
    return replace(
        found,
        limits=limits,
        budget=budget,
        gap=None,
        runtime=plan.runtime,
        notes=(*plan.notes, note),
        solver=plan.solver,
    )


def _described(plan: Plan, losses: Losses, wishes: Wishes, ground: Ground | None) -> Plan:
    """The plan with what was asked for, how the engine is to be started, and its layers."""
    caches: list[int] = []
    budget, runtime = dict(plan.budget), dict(plan.runtime)
    if wishes.engine is not None:
        runtime["engine"] = wishes.profile.name
    if ground is not None:
        settings = ground.memory.settings
        budget |= {
            "ctx": settings.n_ctx,
            "parallel": settings.n_parallel,
            "ubatch": settings.n_ubatch,
            "cache_type_k": settings.cache_type_k,
            "cache_type_v": settings.cache_type_v,
        }
        if wishes.reserve is not None:
            budget["reserve"] = wishes.reserve
        if ground.price:
            budget["time_price"] = ground.price
        files = {"draft": wishes.draft, "mmproj": wishes.mmproj}
        runtime |= {name: path.name for name, path in files.items() if path is not None}
        if wishes.draft is not None:
            runtime["draft_arch"] = _arch_of(wishes.draft)
        if wishes.mtp:
            runtime["mtp"] = True
        caches = layer_caches(ground.hp, settings, padded=True)
    runtime["reference_type"] = reference_type(losses)
    described = replace(plan, budget=budget, runtime=runtime)
    return replace(described, layers=summaries(described, losses, caches))


def _arch_of(path: Path) -> str:
    with open_source(path) as source:
        return require_model(source)


def _best_cache(source: Source, losses: Losses, wishes: Wishes, imatrix: Imatrix | None) -> Plan:
    """Of the cache types whose own loss was measured, those under which model and cache lose least together."""
    pairs = _cache_pairs(losses, wishes)
    found: list[tuple[float, Plan]] = []
    fault: InfeasibleBudget | None = None
    for (k, v), loss in pairs.items():
        try:
            plan = _plan_for(source, losses, replace(wishes, cache_type_k=k, cache_type_v=v), imatrix)
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


def _cache_pairs(losses: Losses, wishes: Wishes) -> dict[tuple[str, str], float]:
    """(K type, V type) -> measured loss, of the pairs that the wishes leave open; unrounded caches lose nothing."""
    measured = {("F16", "F16"): 0.0}
    for name, loss in losses.caches.items():
        k, _, v = name.partition("/")
        measured[k, v] = loss
    asked = (wishes.cache_type_k or "F16").upper(), (wishes.cache_type_v or "F16").upper()
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


def _largest_context(source: Source, losses: Losses, wishes: Wishes, imatrix: Imatrix | None) -> Plan:
    """The plan for the largest context, in steps of 256 tokens, at which the loss can be kept."""
    hp = read_hyperparameters(source.metadata, source.tensors)

    def tried(n_ctx: int) -> Plan | InfeasibleBudget:
        try:
            return best_plan(source, losses, replace(wishes, n_ctx=n_ctx), imatrix=imatrix)
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


def off_plan(target: Source, plan: Plan) -> Iterator[str]:
    """A line for each tensor of `target` that is missing, or not of the type that the plan gives it."""
    for name, type_name in plan.types().items():
        if name not in target:
            yield f"tensor '{brief(name)}' of the plan is missing"
        elif (found := target.tensor(name).format.name) != type_name:
            yield f"tensor '{brief(name)}' is {found}, the plan says {type_name}"


def _solved(
    losses: Losses, request: Request, *, time_limit: float = TIME_LIMIT, rel_gap: float = REL_GAP, why: bool = True
) -> Solution:
    """The best plan behind the guard rail; without it, and with a note, where the budget is too small for that."""
    behind = guarded(losses, request)
    try:
        return solved(behind, request, time_limit=time_limit, rel_gap=rel_gap, why=why)
    except InfeasibleBudget:
        if behind is losses:
            raise
    solution = solved(losses, request, time_limit=time_limit, rel_gap=rel_gap, why=why)
    note = "the budget is too small to keep the output at the type of llama-quantize's mixtures"
    return replace(solution, plan=replace(solution.plan, notes=(*solution.plan.notes, note)))


def _within_size(
    source: Source,
    losses: Losses,
    request: Request,
    size: int,
    *,
    imatrix: Imatrix | None,
    solve: Callable[[Request], Plan],
) -> Plan:
    """The best plan whose file, header and padding included, has at most `size` bytes.

    The header says a little about the plan, so its size is known only afterwards: it is taken from the last try until
    it has stopped growing.
    """
    from requant.outline import output_layouts

    alignment = alignment_of(source.metadata)
    plan, overhead = solve(request), 0
    while (found := _overhead(output_layouts(source, plan, imatrix), plan, alignment)) > overhead:
        overhead = found
        plan = solve(replace(request, limits=(*request.limits, size_limit(size, overhead, alignment))))
    return plan


def _overhead(layouts: Sequence[Layout], plan: Plan, alignment: int) -> int:
    """Bytes of the file that are in no tensor of the plan: the header, and scales that it adds."""
    return total_size(layouts) - sum(padded(c.n_bytes, alignment) for c in plan.choices)
