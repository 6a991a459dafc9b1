"""Placement: the number of layers on the GPU, and the device of every tensor, that give the best plan.

An engine takes whole layers, from one end of the model, and some leave the experts of single layers on the CPU. So a
placement is a number k of layers and, within them, a device for the experts of each layer, which the solver chooses
along with the types. A few k spread over all are solved first, then those around the best. The prices (duals) of one
solution give a lower bound of the value at every other k; a k whose bound is not below the best value is skipped.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from requant.errors import InfeasibleBudget
from requant.model.roles import is_tied
from requant.planning.output_floor import solve_with_floor
from requant.planning.solver.problem import allowed_candidates
from requant.planning.solver.solve import Solution, solve_or_explain

if TYPE_CHECKING:
    from requant.planning.constraints import Constraints
    from requant.planning.deployment import Deployment
    from requant.scoring.losses import Losses, TensorLosses

TOLERANCE = 1e-4  # of the value; a placement that cannot be better by more is not tried
SECONDS = 7.0  # for all placements; after that the best found, and its gap
SECONDS_EACH = 2.0
REL_GAP = 2e-4  # of one placement's solution
_COARSE = 8  # numbers of layers that are tried first
_REFINED = 6  # sizes of the largest tensor on the CPU that are tried once the number of layers is settled
_CODES: dict[tuple[str, ...], int] = {("gpu",): 0, ("cpu",): 1, ("none",): 2, ("gpu", "cpu"): 3}
_FREE = _CODES["gpu", "cpu"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Placement:
    """The best plan, the number of places on the GPU, its proven gap, and how many numbers were solved."""

    solution: Solution
    k: int
    gap: float
    tried: int


def best_placement(losses: Losses, base: Constraints, deployment: Deployment) -> Placement:
    """Return the plan of least value over every number of layers on the GPU. `base`: constraints without devices.

    Raises InfeasibleBudget where none fits, with the message of the placement that came nearest.
    """
    deadline = time.monotonic() + SECONDS
    bounds = _Bounds(losses, base, deployment)
    left = [k for k in range(deployment.n_places + 1) if (deployment.engine.has_gpu or k == 0) and bounds.short[k] <= 0]
    # a few k spread over all come first; where experts can stay on the CPU, the likeliest k, the largest, leads them
    first = left[:: max(1, math.ceil(len(left) / _COARSE))]
    if (bounds.codes == _FREE).any():
        first = [*left[-1:], *(k for k in first if k != left[-1])]
    best: tuple[Solution, int] | None = None
    faults: list[InfeasibleBudget] = []
    unsolved: list[int] = []
    while left and (best is None or time.monotonic() < deadline):
        near = best[1] if best is not None else deployment.n_places
        k = first.pop(0) if first else min(left, key=lambda k: (abs(k - near), k))
        left.remove(k)
        if best is not None and bounds.least[k] >= best[0].value * (1 - TOLERANCE):
            unsolved.append(k)
            continue
        try:
            solution = _solve_at(bounds, k)
        except InfeasibleBudget as fault:
            faults.append(fault)
            unsolved += [] if fault.proven else [k]
            continue
        if best is None or solution.value < best[0].value:
            best = solution, k
    if best is None:
        nearest = max(range(deployment.n_places + 1), key=lambda k: (-bounds.short[k], k))
        # raises the error that names what is short
        solve_or_explain(losses, bounds.constraints[nearest], time_limit=SECONDS_EACH, rel_gap=REL_GAP)
        raise faults[0]
    solution, k = best
    if time.monotonic() < deadline:
        solution = _refine_copies(bounds, k, solution)
    proven = min(*bounds.solved, *(bounds.least[j] for j in (*left, *unsolved)), solution.bound)
    gap = max(0.0, (solution.value - proven) / solution.value) if solution.value > 0 else 0.0
    return Placement(solution, k, gap, len(bounds.solved))


def _solve_at(bounds: _Bounds, k: int) -> Solution:
    """Solve with `k` layers on the GPU.

    In large batches the GPU copies CPU tensors to VRAM one by one. Solve first with the smallest copy buffer (a lower
    bound), then with one for the largest tensor chosen.
    """
    first = _solve_quickly(bounds.losses, replace(bounds.constraints[k], largest_on_cpu=None))
    bounds.add(k, first)
    largest = max((c.n_bytes for c in first.plan.choices if c.device == "cpu" and c.share > 0), default=0)
    if k == 0 or largest <= bounds.smallest_copy[k]:
        return first
    return replace(_solve_quickly(bounds.losses, bounds.constraints_at(k, largest)), bound=first.bound)


def _refine_copies(bounds: _Bounds, k: int, known: Solution) -> Solution:
    """Return the best at `k` over all sizes of the largest tensor on the CPU below its size in `known`."""
    least, most = bounds.smallest_copy[k], known.plan.memory.get("copies", 0)
    on_cpu = {c.name for c in known.plan.choices if c.device == "cpu" and c.share > 0}
    sizes = {n for name in on_cpu for n in bounds.sizes_on_cpu[name] if least <= n < most}
    best = known
    for size in sorted(sizes, reverse=True)[:_REFINED]:
        try:
            found = _solve_quickly(bounds.losses, bounds.constraints_at(k, size))
        except InfeasibleBudget:
            break
        if found.value < best.value:
            best = replace(found, bound=known.bound)
    return best


def _solve_quickly(losses: Losses, constraints: Constraints) -> Solution:
    return solve_with_floor(losses, constraints, time_limit=SECONDS_EACH, rel_gap=REL_GAP, why=False)


class _Bounds:
    """Constraints and a lower bound of the value at every k; the prices of every solution raise the bounds.

    sizes_on_cpu: for each tensor, the bytes of the candidates that the CPU multiplies with.
    codes: (n_places + 1, n_tensors) the column of a table for the devices of each tensor. constraints: at each k, with
    the smallest copy. short: at each k, the largest part of a limit by which the smallest types are over it, 0 or less
    where they fit.
    """

    def __init__(self, losses: Losses, base: Constraints, deployment: Deployment) -> None:
        self.losses, self.base, self.deployment = losses, base, deployment
        self.tied = is_tied({t.name for t in losses.tensors})
        allowed = allowed_candidates(losses, base)
        self.allowed = {t.name: found for t, found in zip(losses.tensors, allowed, strict=True)}
        self.sizes_on_cpu = {
            t.name: [c.n_bytes for c in self.allowed[t.name] if base.can_run(t, c.type, "cpu")] for t in losses.tensors
        }
        places = range(deployment.n_places + 1)
        self.codes = np.array(
            [[_CODES[deployment.devices(t, k, tied=self.tied)] for t in losses.tensors] for k in places]
        )
        self.smallest_copy = [self._find_copy(k) for k in places]
        self.constraints = [self.constraints_at(k, self.smallest_copy[k]) for k in places]
        self.least = [-math.inf] * len(places)
        self.solved: list[float] = []  # the proven bound of every solution
        self.short = self._find_shortages()

    def constraints_at(self, k: int, copied: int) -> Constraints:
        return self.deployment.constraints(self.losses, self.base, k, copied)

    def _find_copy(self, k: int) -> int:
        """Bytes of the largest tensor that is multiplied but must be on the CPU at `k`, in its smallest type."""
        forced = (t for t, code in zip(self.losses.tensors, self.codes[k], strict=True) if code == _CODES["cpu",])
        multiplied = (t for t in forced if self.deployment.share(t, tied=self.tied) > 0)
        return max((min(self.sizes_on_cpu[t.name], default=0) for t in multiplied), default=0)

    def _find_shortages(self) -> list[float]:
        tables: dict[str, Floats] = {}
        found = []
        for k, constraints in enumerate(self.constraints):
            worst = -math.inf
            for j, limit in enumerate(constraints.limits):
                if limit.option not in tables:
                    prices = [float(i == j) for i in range(len(constraints.limits))]
                    tables[limit.option] = self._table(constraints, prices, 0.0)
                least = limit.other + float(self._sum(tables[limit.option], k))
                worst = max(worst, (least - limit.budget) / max(limit.budget, 1))
            found.append(worst)
        return found

    def add(self, k: int, solution: Solution) -> None:
        """Raise the bounds of every other k by the prices of `solution`, which is the best at `k`."""
        self.solved.append(solution.bound)
        prices = dict(zip((x.option for x in self.constraints[k].limits), solution.prices, strict=True))
        tables: dict[tuple[str, ...], Floats] = {}
        for other, constraints in enumerate(self.constraints):
            vector = [prices.get(limit.option, 0.0) for limit in constraints.limits]
            key = tuple(limit.option for limit in constraints.limits)
            if key not in tables:
                tables[key] = self._table(constraints, vector, 1.0)
            rooms = sum(p * limit.room for p, limit in zip(vector, constraints.limits, strict=True))
            bound = float(self._sum(tables[key], other)) - rooms + constraints.fixed_cost
            self.least[other] = max(self.least[other], bound)

    def _sum(self, table: Floats, k: int) -> np.float64:
        total: np.float64 = table[np.arange(len(table)), self.codes[k]].sum()
        return total

    def _table(self, constraints: Constraints, prices: list[float], weight: float) -> Floats:
        """Return (n_tensors, 4): each tensor's least cost on the GPU, on the CPU, not loaded, and on either device.

        Cost: `weight` times the tensor's part of the value, and its use of each limit times the limit's price.
        """
        rows = [
            [self._least_cost(t, device, constraints, prices, weight) for device in ("gpu", "cpu", "none")]
            for t in self.losses.tensors
        ]
        table = np.array(rows)
        return np.column_stack([table, table[:, :2].min(axis=1)])

    def _least_cost(
        self, tensor: TensorLosses, device: str, constraints: Constraints, prices: list[float], weight: float
    ) -> float:
        """The least of the tensor's weighted value and priced costs over its candidates that run on the device."""
        least = math.inf
        for c in self.allowed[tensor.name]:
            if constraints.can_run(tensor, c.type, device):
                use = constraints.use(tensor, c, device)
                costs = sum(p * limit.cost(use) for p, limit in zip(prices, constraints.limits, strict=True) if p)
                least = min(least, weight * constraints.value(use) + costs)
        return least
