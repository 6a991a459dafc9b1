"""A settled request: its context and cache types are known, and so are its constraints and deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from requant.container.source import Source
from requant.model.auxiliary import draft_type
from requant.model.memory import Memory, layer_caches
from requant.planning.asked_types import add_asked_types
from requant.planning.constraints import Constraints, Limit, bpw_limit, loss_limit
from requant.planning.deployment import Deployment
from requant.planning.options import PREFERENCE
from requant.planning.output_floor import smallest_with_floor, solve_with_floor
from requant.planning.placement import best_placement
from requant.planning.request import PlanRequest
from requant.planning.runnable import check_runnable
from requant.planning.solver.solve import solve
from requant.planning.summaries import reference_type, summarize_layers
from requant.planning.ubatch import batch_memories, largest_batch, smallest_memory, weights_room
from requant.scoring.losses import POINTS, loss_unit

if TYPE_CHECKING:
    from requant.planning.plan import Plan
    from requant.scoring.losses import Losses


@dataclass(frozen=True, slots=True)
class SettledRequest:
    """Losses, a request, and its constraints, deployment and notes for the user.

    --size comes in `solve`, because the header's size is known only after a solution. `deployment`: None where the
    request is not about devices. `memories`: with each batch, by rising size, where the batch is open; else ().
    """

    losses: Losses
    request: PlanRequest
    constraints: Constraints
    deployment: Deployment | None
    notes: tuple[str, ...]
    memories: tuple[Memory, ...] = ()

    @classmethod
    def settle(
        cls,
        source: Source,
        losses: Losses,
        request: PlanRequest,
        *,
        cache_loss: float = 0.0,
        spread: bool = True,
    ) -> SettledRequest:
        """Derive the constraints and the deployment, with the smallest batch where the batch is open.

        cache_loss: of the request's cache types, a part of --max-loss. spread: False for all layers on the GPU. Raises
        UsageError for tensors whose types the engine does not run.
        """
        losses = add_asked_types(losses, request.constraints)
        base = replace(
            request.constraints,
            unusable=request.profile.cannot,
            not_on_cpu=request.not_on_cpu,
            odd_rows=request.odd_rows,
        )
        check_runnable(losses, base, request.profile)
        deployment, notes, memories = None, tuple[str, ...](), tuple[Memory, ...]()
        if request.on_devices:
            deployment, notes = Deployment.for_request(source, losses, request)
            deployment = replace(deployment, spread=spread)
            if request.price is None and deployment.price and losses.method and loss_unit(losses.method) == POINTS:
                price = f"{deployment.price:g} {POINTS}"
                notes += (f"a second per token counts as {price}; --min-speed says what you need",)
        limits, objective = base.limits, base.objective
        if request.bpw is not None:
            limits = (*limits, bpw_limit(request.bpw, losses))
        if request.max_loss is not None:
            limits, objective = (*limits, loss_limit(request.max_loss, cache_loss)), "bytes"
        if deployment is not None and leaves_batch_open(request):
            memories = batch_memories(deployment.hp, deployment.memory)
            deployment = _limit_room(deployment, memories, losses, base, request)
        return cls(losses, request, replace(base, limits=limits, objective=objective), deployment, notes, memories)

    def solve(self, file_limit: Limit | None = None) -> Plan:
        """Return the best plan within the constraints, and `file_limit` where it is given, placed and described."""
        constraints, where = self.constraints, self.deployment
        if file_limit is not None:
            constraints = replace(constraints, limits=(*constraints.limits, file_limit))
        if where is None:
            plan = solve_with_floor(self.losses, constraints).plan
        else:
            plan = self._place(where, constraints)
            if self.memories:
                where, plan = self._enlarge_batch(where, constraints, plan)
        return self._describe(replace(plan, notes=(*plan.notes, *self.notes)), where)

    def _enlarge_batch(self, where: Deployment, constraints: Constraints, plan: Plan) -> tuple[Deployment, Plan]:
        """Return the deployment with the largest batch that fits beside the plan's weights, and the plan for it."""
        assert where.vram is not None
        limit = next(limit for limit in plan.limits if limit.option == "--vram")
        beside = sum(where.parts.values())
        memory = largest_batch(self.memories, where.vram - beside, plan.used(limit) - limit.other)
        where = replace(where, memory=memory, room=None)
        found = where.constraints(self.losses, constraints, where.fixed_layers)
        return where, replace(plan, limits=found.limits, memory=found.memory, timing=found.timing)

    def _place(self, where: Deployment, constraints: Constraints) -> Plan:
        """Return the best plan on the devices, with the engine's own type wherever that costs little."""
        if where.chooses_layers:
            found = best_placement(self.losses, constraints, where)
            k, plan = found.k, found.solution.plan
            how = f"{plan.solver}; {found.tried} of {where.n_places + 1} numbers of layers on the GPU tried"
            plan = replace(plan, gap=found.gap, solver=how)
        else:
            k = where.fixed_layers
            plan = solve_with_floor(self.losses, where.constraints(self.losses, constraints, k)).plan
        experts = {c.layer for c in plan.choices if c.device == "cpu" and c.layer in where.layers(k)}
        runtime = {
            "n_gpu_layers": where.n_gpu_layers(k),
            "all_layers": k == where.n_places,
            "experts_on_cpu": sorted(layer for layer in experts if layer is not None),
        }
        plan = replace(plan, runtime=runtime)
        own = where.engine.preferred
        scored = own and any(c.type == own for t in self.losses.tensors for c in t.candidates)
        if not scored or constraints.objective != "loss" or not plan.predicted_loss:
            return plan
        copied = plan.memory.get("copies", 0)
        return self._prefer_type(own, plan, where.constraints(self.losses, constraints, k, copied))

    def _prefer_type(self, own: str, plan: Plan, constraints: Constraints) -> Plan:
        """Return the plan with most weights of type `own` that predicts little more loss, on the devices of `plan`."""
        best = plan.predicted_loss or 0.0
        within = PREFERENCE if self.request.prefer_within is None else self.request.prefer_within
        preferring = replace(
            constraints,
            devices={c.name: (c.device,) for c in plan.choices},
            limits=(*constraints.limits, loss_limit(best * (1 + within))),
            objective="preferred",
            preferred=own,
        )
        found = solve(self.losses, preferring)
        share = sum(c.n_weights for c in found.choices if c.type == own) / found.n_weights
        more = (found.predicted_loss or 0) / best - 1
        cost = f"{more:.1%} more predicted loss than the best plan ({within:.0%} allowed)"
        note = f"{own} for {share:.0%} of the weights, at {cost}"
        return replace(
            found,
            limits=tuple(limit for limit in found.limits if limit.option != "--max-loss"),
            budget={key: value for key, value in found.budget.items() if key != "max_loss"} | {"prefer_within": within},
            gap=None,
            runtime=plan.runtime,
            notes=(*plan.notes, note),
            solver=plan.solver,
        )

    def _describe(self, plan: Plan, where: Deployment | None) -> Plan:
        """Return the plan with the request's settings, the settings for the engine, and a summary of its layers."""
        caches: list[int] = []
        budget, runtime = dict(plan.budget), dict(plan.runtime)
        if self.request.engine is not None:
            runtime["engine"] = self.request.profile.name
        if where is not None:
            budget |= self._budget(where)
            runtime |= self._auxiliary_models()
            caches = layer_caches(where.hp, where.settings, padded=True)
        runtime["reference_type"] = reference_type(self.losses)
        described = replace(plan, budget=budget, runtime=runtime)
        return replace(described, layers=summarize_layers(described, self.losses, caches))

    def _budget(self, where: Deployment) -> dict[str, object]:
        """The deployment's part of a plan's `budget`."""
        found: dict[str, object] = {
            "ctx": where.settings.n_ctx,
            "parallel": where.settings.n_parallel,
            "ubatch": where.settings.n_ubatch,
            "cache_type_k": where.settings.cache_type_k,
            "cache_type_v": where.settings.cache_type_v,
        }
        if self.request.reserve is not None:
            found["reserve"] = self.request.reserve
        if where.price:
            found["time_price"] = where.price
        return found

    def _auxiliary_models(self) -> dict[str, object]:
        """Draft, projector and multi-token prediction, as a plan's `runtime` names them."""
        files = {"draft": self.request.draft, "mmproj": self.request.mmproj}
        found: dict[str, object] = {name: path.name for name, path in files.items() if path is not None}
        if self.request.draft is not None:
            found["draft_type"] = draft_type(self.request.draft)
        if self.request.mtp:
            found["mtp"] = True
        return found


def leaves_batch_open(request: PlanRequest) -> bool:
    """Return whether the batch is chosen with the types: only VRAM is limited, and no batch is given."""
    return request.vram is not None and request.ram is None and request.n_ubatch is None


def _limit_room(
    deployment: Deployment, memories: tuple[Memory, ...], losses: Losses, base: Constraints, request: PlanRequest
) -> Deployment:
    """Return the deployment with the smallest batch, and the room for weights that no larger budget makes less.

    With --max-loss the fewest bytes are sought, for which all that the smallest batch leaves is room.
    """
    assert deployment.vram is not None
    beside = sum(deployment.parts.values())
    smallest = replace(deployment, memory=memories[0])
    limited = smallest.constraints(losses, base, smallest.n_places)
    least = beside + smallest_with_floor(losses, limited, "--vram")
    if memories[0].weights_limit(deployment.vram) < least:
        return replace(smallest, memory=smallest_memory(memories, least, default_reserve=request.reserve is None))
    if request.max_loss is not None:
        return smallest
    return replace(smallest, room=weights_room(memories, deployment.vram, least) - beside)
