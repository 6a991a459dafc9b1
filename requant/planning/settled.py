"""A settled request: its context and cache types are known, and so are its constraints and deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.container.source import Source, open_source, require_model
from requant.model.memory import layer_caches
from requant.planning.asked_types import add_asked_types
from requant.planning.constraints import Constraints, Limit, bpw_limit, loss_limit
from requant.planning.deployment import Deployment
from requant.planning.options import PREFERENCE
from requant.planning.output_floor import losses_to_try, solve_with_floor
from requant.planning.placement import best_placement
from requant.planning.request import PlanRequest
from requant.planning.solver.solve import solve
from requant.planning.summaries import reference_type, summarize_layers
from requant.planning.ubatch import fit_batch

if TYPE_CHECKING:
    from requant.planning.plan import Plan
    from requant.scoring.losses import Losses


@dataclass(frozen=True, slots=True)
class SettledRequest:
    """Losses, a request, and its constraints, deployment and notes for the user.

    --size comes in `solve`, because the header's size is known only after a solution. `deployment`: None where the
    request is not about devices.
    """

    losses: Losses
    request: PlanRequest
    constraints: Constraints
    deployment: Deployment | None
    notes: tuple[str, ...]

    @classmethod
    def settle(cls, source: Source, losses: Losses, request: PlanRequest) -> SettledRequest:
        """Derive the constraints and the deployment, with a batch that fits where VRAM alone is given."""
        losses = add_asked_types(losses, request.constraints)
        base = replace(request.constraints, unusable=request.profile.cannot)
        deployment, notes = None, tuple[str, ...]()
        if request.on_devices:
            deployment, notes = Deployment.for_request(source, losses, request)
            if leaves_batch_open(request):
                limited = deployment.constraints(losses, base, deployment.n_places)
                to_try = losses_to_try(losses, limited)
                deployment, more = fit_batch(deployment, limited, to_try, default_reserve=request.reserve is None)
                notes += more
        limits, objective = base.limits, base.objective
        if request.bpw is not None:
            limits = (*limits, bpw_limit(request.bpw, losses))
        if request.max_loss is not None:
            limits, objective = (*limits, loss_limit(request.max_loss)), "bytes"
        return cls(losses, request, replace(base, limits=limits, objective=objective), deployment, notes)

    def solve(self, file_limit: Limit | None = None) -> Plan:
        """Return the best plan within the constraints, and `file_limit` where it is given, placed and described."""
        constraints = self.constraints
        if file_limit is not None:
            constraints = replace(constraints, limits=(*constraints.limits, file_limit))
        where = self.deployment
        plan = solve_with_floor(self.losses, constraints).plan if where is None else self._place(where, constraints)
        return self._describe(replace(plan, notes=(*plan.notes, *self.notes)))

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

    def _describe(self, plan: Plan) -> Plan:
        """Return the plan with the request's settings, the settings for the engine, and a summary of its layers."""
        caches: list[int] = []
        budget, runtime = dict(plan.budget), dict(plan.runtime)
        if self.request.engine is not None:
            runtime["engine"] = self.request.profile.name
        if self.deployment is not None:
            budget |= self._budget(self.deployment)
            runtime |= self._auxiliary_models()
            caches = layer_caches(self.deployment.hp, self.deployment.settings, padded=True)
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
            found["draft_arch"] = _read_arch(self.request.draft)
        if self.request.mtp:
            found["mtp"] = True
        return found


def leaves_batch_open(request: PlanRequest) -> bool:
    """Return whether the batch is chosen with the types: only VRAM is limited, and no batch is given."""
    return request.vram is not None and request.ram is None and request.n_ubatch is None


def _read_arch(path: Path) -> str:
    with open_source(path) as source:
        return require_model(source)
