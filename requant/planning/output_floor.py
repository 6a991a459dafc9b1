"""Output floor: the output, where losses are without gradients, is not below its type in a mixture of the plan's size.

Such losses can misjudge one large tensor, and nothing after the output repairs an error in the logits. The floor of a
tied embedding is the mixture's type for an untied one: with the output's type as its floor, it took so much of a small
model that the rest suffered more (seen on SmolLM2-135M, against one type for all at the same bytes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from requant.errors import InfeasibleBudget
from requant.formats import format_of
from requant.model.mixtures import default_type, mixture_names
from requant.model.roles import is_below
from requant.planning.solver.problem import Problem, constrain
from requant.planning.solver.solve import REL_GAP, TIME_LIMIT, Solution, solve_or_explain
from requant.scoring.losses import GRADIENT_FREE, Candidate, Losses, TensorLosses

if TYPE_CHECKING:
    from requant.planning.constraints import Constraints, Limit

_LEAST_WITHOUT_NOTE = "Q3_K"  # tiny model, Q2_K for embedding and output alone: divergence 0.074 nats, Q3_K 0.021
_BELOW_FLOOR = "the budget is too small to keep the output at the type of llama-quantize's mixtures"


def solve_with_floor(
    losses: Losses,
    constraints: Constraints,
    *,
    time_limit: float = TIME_LIMIT,
    rel_gap: float = REL_GAP,
    why: bool = True,
) -> Solution:
    """Solve with the output floor; without it, and with a note, where the budget is too small for it.

    A floor rises with the budget and could make a larger budget's plan worse. So the best plan of the smaller budgets
    with a lower floor is taken while it is better; it fits the larger budget too.
    """

    def solve(losses: Losses, within: Constraints) -> Solution | None:
        try:
            return solve_or_explain(losses, within, time_limit=time_limit, rel_gap=rel_gap, why=False)
        except InfeasibleBudget:
            return None

    floors = _floors(losses, constraints)
    top = next(floors)
    if top.losses is losses:
        found = solve_or_explain(losses, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why)
        return _note_floor(found) if _lacks_floor(found, losses, constraints) else found
    best, caps = solve(top.losses, constraints), top.least
    for floor in floors:
        better = False
        for within in _cap_rooms(constraints, caps, floor.least):
            free = solve(losses, within)
            if free is None or (best is not None and free.value >= best.value):
                continue  # a floor only adds to that
            better = True
            held = free if floor.losses is losses else solve(floor.losses, within)
            if held is not None and (best is None or held.value < best.value):
                best = _note_floor(replace(held, plan=replace(held.plan, limits=constraints.limits)))
        if not better and best is not None:
            break
        caps = tuple(map(min, caps, floor.least))
    if best is not None:
        return best
    return _note_floor(solve_or_explain(losses, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why))


def _note_floor(solution: Solution) -> Solution:
    return replace(solution, plan=replace(solution.plan, notes=(*solution.plan.notes, _BELOW_FLOOR)))


def _lacks_floor(found: Solution, losses: Losses, constraints: Constraints) -> bool:
    """Return whether a mixture fits, but not the smallest types with its floor; or none fits, and the output is rough.

    None fits where most tensors are copied in more bits than the mixtures give them.
    """
    steps = [*_steps(losses, constraints)]
    if not steps:
        return False
    if any(not step.holds(constraints) and step.mixture_costs(losses, constraints) for step in steps):
        return True
    chosen = next(c for c in found.plan.choices if c.name == losses.output_name)
    return not constraints.types and not chosen.copied and is_below(chosen.type, _LEAST_WITHOUT_NOTE)


def smallest_with_floor(losses: Losses, constraints: Constraints, option: str) -> int:
    """Return the least part of the limit `option` that tensors take with each floor that holds.

    It never falls with the budget. If not even the smallest types fit, there is no floor.
    """
    k = next(k for k, limit in enumerate(constraints.limits) if limit.option == option)
    found = constrain(losses, constraints).least_cost(k)
    for step in _steps(losses, constraints):
        if step.least[k] > found and step.holds(constraints) and step.mixture_costs(losses, constraints):
            found = step.least[k]
    return found


def with_output_floor(losses: Losses, constraints: Constraints) -> Losses:
    """Return `losses` without the output's (or tied embedding's) candidates below its type in a llama-quantize mixture.

    The mixture is the largest that meets the limits; where none does, there is no floor. A tensor that the user pinned
    has no floor, and neither has one that could then only be copied, with more bits than the floor.
    """
    return next(_floors(losses, constraints)).losses


@dataclass(frozen=True, slots=True)
class _Floor:
    """Losses with a floor, and the least room of each limit from which the floor holds; 0 for limits not in bytes."""

    losses: Losses
    least: tuple[int, ...]


def _floors(losses: Losses, constraints: Constraints) -> Iterator[_Floor]:
    """Yield the floors that hold within the limits, the highest first; the last is none."""
    for step in _steps(losses, constraints):
        if step.holds(constraints) and (costs := step.mixture_costs(losses, constraints)):
            tensors = tuple(step.held if t.name == step.held.name else t for t in losses.tensors)
            least = tuple(max(n, min(column)) for n, *column in zip(step.least, *costs, strict=True))
            yield _Floor(losses if tensors == losses.tensors else replace(losses, tensors=tensors), least)
    yield _Floor(losses, (0,) * len(constraints.limits))


@dataclass(frozen=True, slots=True)
class _Step:
    """The output above a floor, the mixtures that give that floor, and the least cost of all tensors by limit."""

    held: TensorLosses
    mixtures: tuple[str, ...]
    least: tuple[int, ...]

    def holds(self, constraints: Constraints) -> bool:
        """Return whether the smallest types fit with the floor."""
        return _fits(self.least, constraints.limits)

    def mixture_costs(self, losses: Losses, constraints: Constraints) -> list[tuple[int, ...]]:
        """Return the costs of each of the mixtures that meets the limits."""
        costs = (_mixture_costs(losses, constraints, mixture) for mixture in self.mixtures)
        return [found for found in costs if _fits(found, constraints.limits)]


def _steps(losses: Losses, constraints: Constraints) -> Iterator[_Step]:
    """Yield the floors from that of the largest mixture to that of the smallest."""
    last = losses.output_name
    index = next((i for i, t in enumerate(losses.tensors) if t.name == last and t.reason is None), None)
    bounded = losses.method in GRADIENT_FREE and any(limit.unit == "bytes" for limit in constraints.limits)
    if not bounded or index is None or _is_pinned(last, constraints):
        return
    problem, tensor = constrain(losses, constraints), losses.tensors[index]
    floors = ((_hold_output(tensor, name, losses.arch, constraints.types), name) for name in reversed(mixture_names()))
    for _, group in groupby(floors, lambda pair: pair[0].candidates):
        (held, *_), mixtures = zip(*group, strict=True)
        least = _least_costs(problem, index, held)
        if least is not None:
            yield _Step(held, mixtures, least)


def _fits(costs: tuple[int, ...], limits: tuple[Limit, ...]) -> bool:
    return all(n <= limit.room for n, limit in zip(costs, limits, strict=True) if limit.unit == "bytes")


def _hold_output(tensor: TensorLosses, mixture: str, arch: str, types: tuple[str, ...]) -> TensorLosses:
    """Return the output, or tied embedding, without candidates below its type in the mixture."""
    return _drop_below(tensor, default_type(mixture, tensor.name, tensor.shape[0], tied=False, arch=arch), types)


def _least_costs(problem: Problem, index: int, held: TensorLosses) -> tuple[int, ...] | None:
    """Return the least that all tensors take of each limit in bytes with the output as `held`; None if impossible."""
    allowed = {c.type for c in held.candidates}
    item = next(x for x in problem.items if index in x.members)
    place = item.members.index(index)
    left = [o for o in item.options if o.types[place] in allowed]
    if not left:
        return None
    found = []
    for k, limit in enumerate(problem.constraints.limits):
        others = problem.least_cost(k) - min(o.costs[k] for o in item.options)
        found.append(others + min(o.costs[k] for o in left) if limit.unit == "bytes" else 0)
    return tuple(found)


def _cap_rooms(constraints: Constraints, caps: tuple[int, ...], least: tuple[int, ...]) -> Iterator[Constraints]:
    """Yield the constraints with one limit in bytes reduced to below its cap, if it then still has the least room."""
    for k, limit in enumerate(constraints.limits):
        if limit.unit == "bytes" and least[k] < caps[k]:
            reduced = replace(limit, other=limit.budget - caps[k] + 1)
            yield replace(constraints, limits=(*constraints.limits[:k], reduced, *constraints.limits[k + 1 :]))


def _mixture_costs(losses: Losses, constraints: Constraints, mixture: str) -> tuple[int, ...]:
    """Return the approximate part that a mixture takes of each limit in bytes; 0 of the others."""

    def n_bytes(tensor: TensorLosses) -> int:
        if tensor.reason is not None:
            return tensor.n_bytes
        fmt = format_of(default_type(mixture, tensor.name, tensor.shape[0], tied=False, arch=losses.arch))
        return min(tensor.n_bytes, fmt.n_bytes(tensor.n_weights))

    uses = [
        constraints.use(t, Candidate("", n_bytes(t), 0.0), constraints.allowed_devices(t)[0]) for t in losses.tensors
    ]
    return tuple(sum(map(x.cost, uses)) if x.unit == "bytes" else 0 for x in constraints.limits)


def _is_pinned(name: str, constraints: Constraints) -> bool:
    named = {"output.weight": constraints.output_type, "token_embd.weight": constraints.embedding_type}
    return named.get(name) is not None or any(re.search(rule.pattern.lower(), name) for rule in constraints.pins)


def _drop_below(tensor: TensorLosses, floor: str, types: tuple[str, ...]) -> TensorLosses:
    """Return the tensor without candidates below the floor; a copy stays among them."""
    left = tuple(c for c in tensor.candidates if c.type == tensor.source_type or not is_below(c.type, floor))
    usable = [c for c in left if c.type != tensor.source_type and (not types or c.type in types)]
    if not usable and not is_below(tensor.source_type, floor) and tensor.source_type != floor:
        return tensor
    reason = f"{tensor.role} is not below {floor} in a plan of this size, as in llama-quantize's mixtures"
    dropped = {c.type: reason for c in tensor.candidates if c not in left}
    return replace(tensor, candidates=left, skipped={**tensor.skipped, **dropped})
