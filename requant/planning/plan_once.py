"""One plan for a constraints in which context, cache types and batch are settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from requant.container.infos import round_up
from requant.container.metadata import read_alignment
from requant.container.source import Source, open_source, require_model
from requant.container.splitting import total_size
from requant.errors import InfeasibleBudget
from requant.model.memory import layer_caches
from requant.planning.constraints import Constraints, bpw_limit, loss_limit, size_limit
from requant.planning.deployment import Deployment, deployment_for
from requant.planning.output_floor import with_output_floor
from requant.planning.placement import REL_GAP as PLACEMENT_GAP
from requant.planning.placement import SECONDS_EACH, best_placement
from requant.planning.plan import Plan
from requant.planning.request import PREFERENCE, PlanRequest
from requant.planning.solver.solve import REL_GAP, TIME_LIMIT, Solution, solve, solve_or_explain
from requant.planning.summaries import reference_type, summarize_layers
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix
    from requant.container.layout import Layout


def _at_batch(source: Source, losses: Losses, request: PlanRequest, imatrix: Imatrix | None) -> Plan:
    """The plan where all that is asked of the engine is settled but, perhaps, a batch that fits at all."""
    constraints, notes = replace(request.constraints, unusable=request.profile.cannot), list[str]()
    deployment = deployment_for(source, losses, request, notes) if request.on_devices else None
    if request.bpw is not None:
        constraints = replace(constraints, limits=(*constraints.limits, bpw_limit(request.bpw, losses)))
    if request.max_loss is not None:
        constraints = replace(
            constraints, limits=(*constraints.limits, loss_limit(request.max_loss)), objective="bytes"
        )
    solve_ = partial(_placed, deployment=deployment, request=request)

    def finish(plan: Plan) -> Plan:
        return _described(replace(plan, notes=(*plan.notes, *notes)), losses, request, deployment)

    if request.size is None:
        return finish(solve_(losses, constraints))

    def again(limited: Constraints) -> Plan:
        return finish(solve_(losses, limited))

    return _within_size(source, losses, constraints, request.size, imatrix=imatrix, solve=again)


def _placed(losses: Losses, constraints: Constraints, *, deployment: Deployment | None, request: PlanRequest) -> Plan:
    """The best plan, on the devices of `deployment`, with the engine's own type wherever that costs little."""
    if deployment is None:
        return _solved(losses, constraints).plan
    if deployment.ram is None or not deployment.engine.has_gpu:
        k = deployment.n_places if deployment.engine.has_gpu and deployment.vram != 0 else 0
        plan = _solved(losses, deployment.constraints(losses, constraints, k, 0)).plan
    else:
        quick = partial(_solved, time_limit=SECONDS_EACH, rel_gap=PLACEMENT_GAP, why=False)
        found = best_placement(losses, constraints, deployment, quick)
        k, plan = found.k, found.solution.plan
        how = f"{plan.solver}; {found.tried} of {deployment.n_places + 1} numbers of layers on the GPU tried"
        plan = replace(plan, gap=found.gap, solver=how)
    experts = {c.layer for c in plan.choices if c.device == "cpu" and c.layer in deployment.layers(k)}
    runtime = {
        "n_gpu_layers": deployment.n_gpu_layers(k),
        "all_layers": k == deployment.n_places,
        "experts_on_cpu": sorted(layer for layer in experts if layer is not None),
    }
    plan = replace(plan, runtime=runtime)
    if not deployment.engine.preferred or constraints.objective != "loss":
        return plan
    wanted = deployment.constraints(losses, constraints, k, plan.memory.get("copies", 0))
    within = PREFERENCE if request.prefer_within is None else request.prefer_within
    return _preferring(plan, losses, wanted, deployment.engine.preferred, within)


def _preferring(plan: Plan, losses: Losses, wanted: Constraints, own: str, within: float) -> Plan:
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


def _described(plan: Plan, losses: Losses, request: PlanRequest, deployment: Deployment | None) -> Plan:
    """The plan with what was asked for, how the engine is to be started, and its layers."""
    caches: list[int] = []
    budget, runtime = dict(plan.budget), dict(plan.runtime)
    if request.engine is not None:
        runtime["engine"] = request.profile.name
    if deployment is not None:
        settings = deployment.memory.settings
        budget |= {
            "ctx": settings.n_ctx,
            "parallel": settings.n_parallel,
            "ubatch": settings.n_ubatch,
            "cache_type_k": settings.cache_type_k,
            "cache_type_v": settings.cache_type_v,
        }
        if request.reserve is not None:
            budget["reserve"] = request.reserve
        if deployment.price:
            budget["time_price"] = deployment.price
        files = {"draft": request.draft, "mmproj": request.mmproj}
        runtime |= {name: path.name for name, path in files.items() if path is not None}
        if request.draft is not None:
            runtime["draft_arch"] = _arch_of(request.draft)
        if request.mtp:
            runtime["mtp"] = True
        caches = layer_caches(deployment.hp, settings, padded=True)
    runtime["reference_type"] = reference_type(losses)
    described = replace(plan, budget=budget, runtime=runtime)
    return replace(described, layers=summarize_layers(described, losses, caches))


def _arch_of(path: Path) -> str:
    with open_source(path) as source:
        return require_model(source)


def _solved(
    losses: Losses,
    constraints: Constraints,
    *,
    time_limit: float = TIME_LIMIT,
    rel_gap: float = REL_GAP,
    why: bool = True,
) -> Solution:
    """The best plan behind the guard rail; without it, and with a note, where the budget is too small for that."""
    behind = with_output_floor(losses, constraints)
    try:
        return solve_or_explain(behind, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why)
    except InfeasibleBudget:
        if behind is losses:
            raise
    solution = solve_or_explain(losses, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why)
    note = "the budget is too small to keep the output at the type of llama-quantize's mixtures"
    return replace(solution, plan=replace(solution.plan, notes=(*solution.plan.notes, note)))


def _within_size(
    source: Source,
    losses: Losses,
    constraints: Constraints,
    size: int,
    *,
    imatrix: Imatrix | None,
    solve: Callable[[Constraints], Plan],
) -> Plan:
    """The best plan whose file, header and padding included, has at most `size` bytes.

    The header says a little about the plan, so its size is known only afterwards: it is taken from the last try until
    it has stopped growing.
    """
    from requant.planning.output_layout import output_layouts

    alignment = read_alignment(source.metadata)
    plan, overhead = solve(constraints), 0
    while (found := _overhead(output_layouts(source, plan, imatrix), plan, alignment)) > overhead:
        overhead = found
        plan = solve(replace(constraints, limits=(*constraints.limits, size_limit(size, overhead, alignment))))
    return plan


def _overhead(layouts: Sequence[Layout], plan: Plan, alignment: int) -> int:
    """Bytes of the file that are in no tensor of the plan: the header, and scales that it adds."""
    return total_size(layouts) - sum(round_up(c.n_bytes, alignment) for c in plan.choices)
