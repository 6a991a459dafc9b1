"""Where every tensor goes: the best number of layers on the GPU, and of the rest the best plan.

An engine takes whole layers, from one end of the model, and some leave the experts of single layers on the CPU. So a
placement is a number k of layers and, within them, a device for the experts of each layer, which the programme of the
types chooses along with them. Some k, spread over all, are solved, then those around the best: what a unit of each
limit is worth in one solution bounds the value at every other k (any prices do), so most of them are never solved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from requant.errors import InfeasibleBudget
from requant.model.roles import is_tied
from requant.planning.constraints import Constraints, Use
from requant.planning.deployment import Deployment
from requant.planning.plan import use_of
from requant.planning.solver.problem import allowed_candidates
from requant.planning.solver.solve import Solution, solve_or_explain
from requant.scoring.losses import Losses, TensorLosses

TOLERANCE = 1e-4  # of the value; a placement that cannot be better by more is not tried
SECONDS = 7.0  # for all placements; after that the best found, and its gap
SECONDS_EACH = 2.0
REL_GAP = 2e-4  # of one placement's programme
_COARSE = 8  # numbers of layers that are tried first
_REFINED = 6  # sizes of the largest tensor on the CPU that are tried once the number of layers is settled

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Placement:
    """The best plan, the number of places on the GPU, what is proven of it, and how many numbers were solved."""

    solution: Solution
    k: int
    gap: float
    tried: int


def best_placement(
    losses: Losses, request: Constraints, deployment: Deployment, solve: Callable[[Losses, Constraints], Solution]
) -> Placement:
    """The plan of least value over every number of layers on the GPU.

    Raises InfeasibleBudget where none fits, in the words of the placement that came nearest.
    """
    deadline = time.monotonic() + SECONDS
    bounds = _Bounds(losses, request, deployment)
    left = [k for k in range(deployment.n_places + 1) if (deployment.engine.has_gpu or k == 0) and bounds.feasible[k]]
    # spread over all of them, then around the best; where experts can stay behind, all layers are the likeliest
    first = left[:: max(1, math.ceil(len(left) / _COARSE))]
    if any(3 in row for row in bounds.codes):
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
            solution = _with_copies(bounds, k, solve)
        except InfeasibleBudget as fault:
            faults.append(fault)
            unsolved += [] if fault.proven else [k]
            continue
        if best is None or solution.value < best[0].value:
            best = solution, k
    if best is None:
        nearest = max(range(deployment.n_places + 1), key=lambda k: (-bounds.short[k], k))
        solve_or_explain(
            losses, bounds.requests[nearest], time_limit=SECONDS_EACH, rel_gap=REL_GAP
        )  # which says what is short
        raise faults[0]
    solution, k = best
    if time.monotonic() < deadline:
        solution = _refined(bounds, k, solution, solve)
    proven = min(*bounds.solved, *(bounds.least[j] for j in (*left, *unsolved)), solution.bound)
    gap = max(0.0, (solution.value - proven) / solution.value) if solution.value > 0 else 0.0
    return Placement(solution, k, gap, len(bounds.solved))


def _with_copies(bounds: _Bounds, k: int, solve: Callable[[Losses, Constraints], Solution]) -> Solution:
    """The plan at `k`. Of what the GPU multiplies with in big batches but does not hold, the largest is copied there.

    First that is taken to be as small as it can be, which bounds the value; then as large as it came out.
    """
    first = solve(bounds.losses, replace(bounds.requests[k], largest_on_cpu=None))
    bounds.add(k, first)
    largest = max((c.n_bytes for c in first.plan.choices if c.device == "cpu" and c.share > 0), default=0)
    if k == 0 or largest <= bounds.smallest_copy[k]:
        return first
    again = solve(bounds.losses, bounds.deployment.constraints(bounds.losses, bounds.request, k, largest))
    return replace(again, bound=first.bound)


def _refined(bounds: _Bounds, k: int, known: Solution, solve: Callable[[Losses, Constraints], Solution]) -> Solution:
    """The best at `k` over every size that the largest tensor on the CPU could have below what it has in `known`."""
    losses, deployment = bounds.losses, bounds.deployment
    least, most = bounds.smallest_copy[k], known.plan.memory.get("copies", 0)
    on_cpu = {c.name for c in known.plan.choices if c.device == "cpu" and c.share > 0}
    sizes = {c.n_bytes for name in on_cpu for c in bounds.allowed[name] if least <= c.n_bytes < most}
    best = known
    for size in sorted(sizes, reverse=True)[:_REFINED]:
        try:
            found = solve(losses, deployment.constraints(losses, bounds.request, k, size))
        except InfeasibleBudget:
            break
        if found.value < best.value:
            best = replace(found, bound=known.bound)
    return best


class _Bounds:
    """A lower bound of the value at every k, from the prices of the solutions so far.

    `feasible` and `short`: whether the smallest types are within each limit at k, and by what part of a limit not.
    """

    def __init__(self, losses: Losses, request: Constraints, deployment: Deployment) -> None:
        self.losses, self.request, self.deployment = losses, request, deployment
        self.tied = is_tied({t.name for t in losses.tensors})
        allowed = allowed_candidates(losses, request)
        self.allowed = {t.name: found for t, found in zip(losses.tensors, allowed, strict=True)}
        places = range(deployment.n_places + 1)
        codes = [[_CODES[deployment.devices(t, k, tied=self.tied)] for t in losses.tensors] for k in places]
        self.codes = np.array(codes)  # (n_places + 1, n_tensors) columns of a table by device
        self.smallest_copy = [self._copy(k) for k in places]
        # with the smallest copy
        self.requests = [deployment.constraints(losses, request, k, self.smallest_copy[k]) for k in places]
        self.least = [-math.inf] * len(places)
        self.solved: list[float] = []
        self.short = self._shortages()
        self.feasible = [short <= 0 for short in self.short]

    def _copy(self, k: int) -> int:
        """Bytes of the largest tensor that must be on the CPU at `k` though it is multiplied with, at its smallest."""
        forced = (t for t, code in zip(self.losses.tensors, self.codes[k], strict=True) if code == 1)
        multiplied = (t for t in forced if self.deployment.share(t, tied=self.tied) > 0)
        return max((min(c.n_bytes for c in self.allowed[t.name]) for t in multiplied), default=0)

    def _shortages(self) -> list[float]:
        """At every k, the largest part of a limit by which the smallest types are over it; 0 or less where none is."""
        tables: dict[str, Floats] = {}
        found = []
        for k, constraints in enumerate(self.requests):
            worst = -math.inf
            for j, limit in enumerate(constraints.limits):
                if limit.option not in tables:
                    tables[limit.option] = self._table(
                        constraints, [float(i == j) for i in range(len(constraints.limits))], 0.0
                    )
                least = limit.other + float(self._sum(tables[limit.option], k))
                worst = max(worst, (least - limit.budget) / max(limit.budget, 1))
            found.append(worst)
        return found

    def add(self, k: int, solution: Solution) -> None:
        """Raise the bounds of every other k by the prices of `solution`, which is the best at `k`."""
        self.solved.append(solution.bound)
        prices = dict(zip((x.option for x in self.requests[k].limits), solution.prices, strict=True))
        tables: dict[tuple[str, ...], Floats] = {}
        for other, constraints in enumerate(self.requests):
            vector = [prices.get(limit.option, 0.0) for limit in constraints.limits]
            key = tuple(limit.option for limit in constraints.limits)
            if key not in tables:
                tables[key] = self._table(constraints, vector, 1.0)
            rooms = sum(p * (x.budget - x.other) for p, x in zip(vector, constraints.limits, strict=True))
            fixed = 0.0 if constraints.timing is None else constraints.price * 1e-9 * constraints.timing.fixed_ns
            self.least[other] = max(self.least[other], float(self._sum(tables[key], other)) - rooms + fixed)

    def _sum(self, table: Floats, k: int) -> np.float64:
        total: np.float64 = table[np.arange(len(table)), self.codes[k]].sum()
        return total

    def _table(self, constraints: Constraints, prices: list[float], weight: float) -> Floats:
        """(n_tensors, 4) each tensor's least priced cost on the GPU, on the CPU, not loaded, and on either device.

        Its value counts `weight` times.
        """
        rows = [
            [self._priced(t, device, constraints, prices, weight) for device in ("gpu", "cpu", "none")]
            for t in self.losses.tensors
        ]
        table = np.array(rows)
        return np.column_stack([table, table[:, :2].min(axis=1)])

    def _priced(
        self, tensor: TensorLosses, device: str, constraints: Constraints, prices: list[float], weight: float
    ) -> float:
        least, share = math.inf, constraints.shares[tensor.name]
        for c in self.allowed[tensor.name]:
            if tensor.reason is None and c.type in constraints.unusable.get(device, ()):
                continue
            use = use_of(c, device, tensor.role, share, constraints.timing)
            value = weight * _value(use, constraints)
            least = min(
                least, value + sum(p * x.cost(use) for p, x in zip(prices, constraints.limits, strict=True) if p)
            )
        return least


def _value(use: Use, constraints: Constraints) -> float:
    return float(use.n_bytes) if constraints.objective == "bytes" else use.loss + constraints.price * 1e-9 * use.ns


_CODES: dict[tuple[str, ...], int] = {("gpu",): 0, ("cpu",): 1, ("none",): 2, ("gpu", "cpu"): 3}
