"""Losses and a constraints -> the plan of least loss that fits, with the proven gap.

Every item gets one option; what can never be best (no cheaper and no better than another) is left out first, which
also makes each item's losses fall with its bytes. `knapsack` chooses, this module says what it means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.common.units import format_size, parse_size
from requant.errors import InfeasibleBudget
from requant.planning.constraints import LOSS_UNIT, Constraints, Limit, name_part
from requant.planning.plan import Choice, Plan
from requant.planning.solver.problem import Item, Option, Problem, constrain
from requant.scoring.losses import Losses, TensorLosses

if TYPE_CHECKING:
    from requant.planning.solver.knapsack import Answer

TIME_LIMIT = 60.0  # seconds
_CONFLICT_SECONDS, _CONFLICT_GAP = 3.0, 1e-3  # for what each limit would have to be
REL_GAP = 1e-6  # at which the search may end, of the value above every item's least


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan, its value, what is proven of the least value, and what a unit of each limit is worth."""

    plan: Plan
    value: float
    bound: float
    prices: tuple[float, ...]


def solve(losses: Losses, constraints: Constraints, *, time_limit: float = TIME_LIMIT) -> Plan:
    """The plan of least predicted loss within the constraints's limits, or of least bytes where that is the objective.

    `time_limit` in seconds; when it ends the search, the plan is the best found and its gap says what is not proven.
    Raises UsageError for a constraints that cannot be meant, InfeasibleBudget naming the smallest budget that would do.
    """
    return solve_or_explain(losses, constraints, time_limit=time_limit).plan


def solve_or_explain(
    losses: Losses,
    constraints: Constraints,
    *,
    time_limit: float = TIME_LIMIT,
    rel_gap: float = REL_GAP,
    why: bool = True,
) -> Solution:
    """`solve`, with the figures behind the plan. Without `why` an InfeasibleBudget does not work out what would do."""
    from requant.planning.solver.knapsack import choose

    problem = constrain(losses, constraints)
    _check_feasible(problem)
    items = [_undominated(item) for item in problem.items]
    slack = [limit.budget - limit.other for limit in constraints.limits]
    picked = [options[-1] for options in items]
    bound, how = math.fsum(o.value for o in picked), "every tensor has its best type"
    prices = (0.0,) * len(slack)
    if any(sum(o.costs[k] for o in picked) > room for k, room in enumerate(slack)):
        answer = choose(
            [[o.value for o in x] for x in items], [[o.costs for o in x] for x in items], slack, time_limit, rel_gap
        )
        if answer.picked is None:
            raise _conflict(constraints, answer, items, slack if why else [])
        picked = [options[index] for options, index in zip(items, answer.picked, strict=True)]
        bound, how, prices = answer.bound, answer.how, answer.prices
    fixed = 0.0 if constraints.timing is None else constraints.price * 1e-9 * constraints.timing.fixed_ns
    picked = _canonical(items, picked)
    value = math.fsum(o.value for o in picked) + fixed
    gap = max(0.0, (value - bound - fixed) / value) if value > 0 else 0.0
    return Solution(_plan(problem, picked, gap, how), value, bound + fixed, prices)


def _undominated(item: Item) -> list[Option]:
    """The options that no other beats or equals in every cost, in bytes and in value; by falling value."""
    kept: list[Option] = []
    for option in sorted(item.options, key=lambda o: (o.value, o.n_bytes)):  # stable: the earlier of equals stays
        if not any(
            k.n_bytes <= option.n_bytes and all(a <= b for a, b in zip(k.costs, option.costs, strict=True))
            for k in reversed(kept)
        ):
            kept.append(option)
    return kept[::-1]


def _check_feasible(problem: Problem) -> None:
    """Raises InfeasibleBudget when the smallest option of every item is over a limit."""
    faults = []
    for k, limit in enumerate(problem.constraints.limits):
        smallest = limit.other + sum(min(o.costs[k] for o in item.options) for item in problem.items)
        if smallest > limit.budget:
            faults.append((limit, smallest))
    if faults:
        limit, smallest = faults[0]
        message = "; ".join(_shortfall(*fault, problem.constraints) for fault in faults)
        raise InfeasibleBudget(limit.budget, smallest, f"{message}{_remedy(problem.constraints)}")


_BARE = 1024  # bytes; who has so little forgot the unit


def _shortfall(limit: Limit, smallest: int, constraints: Constraints) -> str:
    """What is asked, what is needed and the figure to ask for, in the words of the option."""
    if limit.unit != "bytes":
        ask = _asking(limit, smallest)
        word = "lower" if limit.unit == "ns" else "raise"
        asked, best = limit.show(limit.budget), limit.show(smallest)
        return f"{limit.option} {asked} cannot be had: the best plan for it has {best}; {word} it to {ask}"
    if limit.n_weights:
        needed = _asking(limit, smallest)
        return (
            f"{limit.option} {limit.bpw:g} is below the smallest plan's {needed} bits per weight; raise it to {needed}"
        )
    parts = {"weights": smallest - limit.other}
    held = limit.device == "gpu"
    parts |= constraints.memory if held else {}
    if not (held and constraints.memory):
        parts |= {"other": limit.other} if limit.other else {}
    listed = ", ".join(f"{name_part(name, limit)} {format_size(size)}" for name, size in parts.items() if size)
    short = f"{limit.option} {format_size(limit.budget)} is {format_size(smallest - limit.budget)} short"
    if limit.budget < _BARE:
        short = f"{limit.option} {limit.budget} is in bytes; did you mean {limit.budget}GiB? It is too little"
    return f"{short}: the smallest plan needs {format_size(smallest)} ({listed}); raise it to {_rounded_up(smallest)}"


def _rounded_up(n_bytes: int) -> str:
    """A size as one types it, at least `n_bytes` and less than 1 % above."""
    name = format_size(n_bytes).split()[1]  # the unit of the figures beside it
    unit = parse_size(f"1{name}")
    return f"{-(-100 * n_bytes // unit) / 100:g}{name}" if unit > 1 else f"{n_bytes}B"


def _remedy(constraints: Constraints) -> str:
    """What else can be given up."""
    given = (
        ("--tensor-type", constraints.pins),
        ("--min-type", constraints.floors),
        ("--types", constraints.types),
        ("--output-tensor-type", constraints.output_type),
        ("--token-embedding-type", constraints.embedding_type),
    )
    options = [option for option, value in given if value]
    loosen = f" or loosen {', '.join(options)}" if options else ", or allow smaller types with --types"
    held = {limit.option for limit in constraints.limits}
    return loosen + (", or give --ram SIZE for layers on the CPU" if "--vram" in held and "--ram" not in held else "")


def _conflict(
    constraints: Constraints, ended: Answer, items: Sequence[Sequence[Option]], slack: Sequence[int]
) -> InfeasibleBudget:
    """No choice was found though each limit alone can be met: what each would have to be, the others as they are."""
    from requant.planning.solver.knapsack import choose

    found = []
    for k, limit in enumerate(constraints.limits if slack else ()):
        others = [j for j in range(len(slack)) if j != k]
        costs = [[tuple(o.costs[j] for j in others) for o in options] for options in items]
        values = [[float(o.costs[k]) for o in options] for options in items]
        answer = choose(values, costs, [slack[j] for j in others], _CONFLICT_SECONDS, _CONFLICT_GAP)
        if answer.picked is not None:
            needed = limit.other + sum(options[p].costs[k] for options, p in zip(items, answer.picked, strict=True))
            found.append((limit, max(needed, limit.budget + 1)))
    what = f"no plan meets {' and '.join(x.option for x in constraints.limits)} together"
    if not (proven := ended.bound == math.inf):
        what = f"{what}, as far as was found ({ended.how})"
    if not found:
        limit = constraints.limits[0]
        return InfeasibleBudget(limit.budget, limit.budget, f"{what}; loosen one of them", proven=proven)
    limit, needed = found[0]
    ways = " or ".join(f"{x.option} {_asking(x, n)}" for x, n in found)
    return InfeasibleBudget(limit.budget, needed, f"{what}; {ways} would do", proven=proven)


def _asking(limit: Limit, amount: int) -> str:
    """`amount` of the limit's unit as one types it, on the safe side."""
    if limit.unit == "ns":
        return f"{math.floor(1e5 / amount * 1e6) / 100:g}"
    if limit.unit == "loss":
        return f"{1.001 * amount * LOSS_UNIT:.4g}"
    return f"{math.ceil(8000 * amount / limit.n_weights) / 1000:g}" if limit.n_weights else _rounded_up(amount)


def _canonical(items: Sequence[Sequence[Option]], picked: Sequence[Option]) -> list[Option]:
    """Among items with the same options, which are interchangeable, the earlier one gets the more bytes."""
    alike: dict[tuple[Option, ...], list[int]] = {}
    for index, options in enumerate(items):
        alike.setdefault(tuple(options), []).append(index)
    result = list(picked)
    for options, places in alike.items():
        if len(options[0].types) > 1:
            continue
        for place, option in zip(places, sorted((picked[i] for i in places), key=lambda o: -o.n_bytes), strict=True):
            result[place] = option
    return result


def _plan(problem: Problem, picked: Sequence[Option], gap: float, how: str) -> Plan:
    """The plan that gives every tensor its item's type and device."""
    losses, constraints = problem.losses, problem.constraints
    chosen = {
        m: (type_name, device)
        for item, option in zip(problem.items, picked, strict=True)
        for m, type_name, device in zip(item.members, option.types, option.devices, strict=True)
    }
    choices = tuple(
        _choice(tensor, *chosen[index], constraints.shares.get(tensor.name, 1.0))
        for index, tensor in enumerate(losses.tensors)
    )
    possible: dict[int, set[str]] = {}
    for item in problem.items:
        for option in item.options:
            for m, type_name in zip(item.members, option.types, strict=True):
                possible.setdefault(m, set()).add(type_name)
    return Plan(
        source=losses.source,
        header_sha256=losses.header_sha256,
        arch=losses.arch,
        method=losses.method,
        budget=constraints.describe(),
        limits=constraints.limits,
        memory=dict(constraints.memory),
        choices=choices,
        predicted_loss=math.fsum(c.loss for c in choices),
        gap=gap,
        solver=how,
        notes=(*losses.notes, *problem.notes),
        effort=losses.effort,
        timing=constraints.timing,
        candidates={
            tensor.name: {c.type: float(f"{c.loss:.6g}") for c in tensor.candidates if c.type in possible[index]}
            for index, tensor in enumerate(losses.tensors)
            if tensor.reason is None
        },
    )


def _choice(tensor: TensorLosses, type_name: str, device: str, share: float) -> Choice:
    found = next(c for c in tensor.candidates if c.type == type_name)
    because: dict[str, list[str]] = {}
    for skipped, reason in tensor.skipped.items():
        because.setdefault(reason, []).append(skipped)
    return Choice(
        name=tensor.name,
        role=tensor.role,
        layer=tensor.layer,
        shape=tensor.shape,
        source_type=tensor.source_type,
        type=found.type,
        n_bytes=found.n_bytes,
        loss=found.loss,
        rmse=found.rmse,
        device=device,
        reason=tensor.reason,
        notes=() if tensor.reason else tuple(f"no {', '.join(types)}: {reason}" for reason, types in because.items()),
        share=share,
    )
