"""The solver: losses and constraints -> the plan of least loss that fits, with the proven gap.

Every item gets one option. Options that another one beats or equals in every respect are left out first, so that each
item's losses fall with its bytes. `knapsack` chooses among the rest; this module turns its answer into a plan or an
error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.common.units import format_budget, format_size, parse_size
from requant.errors import InfeasibleBudget
from requant.planning.constraints import LOSS_STEP, Constraints, Limit, name_part
from requant.planning.plan import Choice, Plan
from requant.planning.solver.problem import Item, Option, Problem, constrain
from requant.scoring.losses import ALREADY_QUANTIZED, loss_unit

if TYPE_CHECKING:
    from requant.planning.solver.knapsack import Answer
    from requant.scoring.losses import Losses, TensorLosses

TIME_LIMIT = 60.0  # seconds
REL_GAP = 1e-6  # at which the search may end, of the value above every item's least
_CONFLICT_SECONDS, _CONFLICT_GAP = 3.0, 1e-3  # for the figure at which each limit could be met
_ROUNDING = 1e-12  # of the sums that a gap compares
BARE = 1024  # bytes; below, the user probably forgot the unit


@dataclass(frozen=True, slots=True)
class Solution:
    """A plan, its value, a proven lower bound of the least value, and the price of a unit of each limit."""

    plan: Plan
    value: float
    bound: float
    prices: tuple[float, ...]


def solve(losses: Losses, constraints: Constraints, *, time_limit: float = TIME_LIMIT) -> Plan:
    """Return the plan of least predicted loss within the limits, or of least bytes where that is the objective.

    `time_limit` in seconds; when it ends the search, the plan is the best found and its gap is what is not proven.
    Raises UsageError for invalid constraints, InfeasibleBudget naming the smallest budget that would do.
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
    """Return the plan of `solve` with the figures behind it. Without `why`, errors do not compute what would do."""
    from requant.planning.solver.knapsack import choose

    problem = constrain(losses, constraints)
    _check_feasible(problem)
    items = [_undominated(item) for item in problem.items]
    rooms = [limit.room for limit in constraints.limits]
    picked = [options[-1] for options in items]
    bound, how = math.fsum(o.value for o in picked), "every tensor has its best type"
    prices = (0.0,) * len(rooms)
    if any(sum(o.costs[k] for o in picked) > room for k, room in enumerate(rooms)):
        answer = choose(
            [[o.value for o in x] for x in items], [[o.costs for o in x] for x in items], rooms, time_limit, rel_gap
        )
        if answer.picked is None:
            raise _conflict_error(constraints, answer, items, why=why)
        picked = [options[index] for options, index in zip(items, answer.picked, strict=True)]
        bound, how, prices = answer.bound, answer.how, answer.prices
    fixed = constraints.fixed_cost
    picked = _break_ties(items, picked)
    value = math.fsum(o.value for o in picked) + fixed
    gap = (value - bound - fixed) / value if value > 0 else 0.0
    gap = gap if gap > _ROUNDING else 0.0
    return Solution(_build_plan(problem, picked, gap, how), value, bound + fixed, prices)


def _undominated(item: Item) -> list[Option]:
    """The options that no other beats or equals in every cost, in bytes and in value; by falling value."""
    best: list[Option] = []
    for option in sorted(item.options, key=lambda o: (o.value, o.n_bytes)):  # stable: the earlier of equals stays
        if not any(
            k.n_bytes <= option.n_bytes and all(a <= b for a, b in zip(k.costs, option.costs, strict=True))
            for k in reversed(best)
        ):
            best.append(option)
    return best[::-1]


def _check_feasible(problem: Problem) -> None:
    """Raise InfeasibleBudget when the smallest options of all items are over a limit."""
    faults = []
    for k, limit in enumerate(problem.constraints.limits):
        smallest = limit.other + problem.least_cost(k)
        if smallest > limit.budget:
            faults.append((limit, smallest))
    if faults:
        limit, smallest = faults[0]
        message = "; ".join(_describe_shortfall(problem, *fault) for fault in faults)
        raise InfeasibleBudget(limit.budget, smallest, f"{message}{_suggest_remedy(problem)}")


def _describe_shortfall(problem: Problem, limit: Limit, smallest: int) -> str:
    """The budget given, the budget needed and the figure to give, in the option's terms."""
    if limit.unit != "bytes":
        ask = _figure_to_give(limit, smallest)
        word = "lower" if limit.unit == "ns" else "raise"
        unit = loss_unit(problem.losses.method)
        asked, best = (limit.show(amount, unit) for amount in (limit.budget, smallest))
        return f"{limit.option} {asked} cannot be had: the best plan for it has {best}; {word} it to {ask}"
    if limit.n_weights:
        needed = _figure_to_give(limit, smallest)
        return (
            f"{limit.option} {limit.bpw:g} is below the smallest plan's {needed} bits per weight; raise it to {needed}"
        )
    parts = {"weights": smallest - limit.other}
    if limit.device == "gpu" and problem.constraints.memory:
        parts |= problem.constraints.memory
    elif limit.other:
        parts["other"] = limit.other
    listed = ", ".join(f"{name_part(name, limit)} {format_size(size)}" for name, size in parts.items() if size)
    short = f"{limit.option} {format_budget(limit.budget)} is {format_size(smallest - limit.budget)} short"
    if limit.budget < BARE:
        short = f"{limit.option} {limit.budget} is in bytes; did you mean {limit.budget}GiB? It is too little"
    return f"{short}: the smallest plan needs {format_size(smallest)} ({listed}); raise it to {_round_up(smallest)}"


def _round_up(n_bytes: int) -> str:
    """A size to type, at least `n_bytes` and less than 1 % above."""
    name = format_size(n_bytes).split()[1]  # the unit of the figures beside it
    unit = parse_size(f"1{name}")
    return f"{-(-100 * n_bytes // unit) / 100:g}{name}" if unit > 1 else f"{n_bytes}B"


def _suggest_remedy(problem: Problem) -> str:
    """The other options to loosen, as the end of a message."""
    constraints, options = problem.constraints, problem.constraints.given_rules
    loosen = f" or loosen {', '.join(options)}" if options else ""
    if problem.withheld:
        output, types = problem.losses.output_name, ", ".join(problem.withheld)
        loosen += f", or name {types} in --types: without gradients {output} gets it only by name"
    elif not options:
        loosen = ", or allow smaller types with --types"
    copied = sum(t.reason == ALREADY_QUANTIZED for t in problem.losses.tensors)
    if copied:
        loosen += f", or give --allow-requantize to quantize again the {copied} tensors that are already below Q8_0"
    held = {limit.option for limit in constraints.limits}
    return loosen + (", or give --ram SIZE for layers on the CPU" if "--vram" in held and "--ram" not in held else "")


def _conflict_error(
    constraints: Constraints, ended: Answer, items: Sequence[Sequence[Option]], *, why: bool
) -> InfeasibleBudget:
    """The error where no choice meets all limits though each alone can be met.

    With `why` it names, for each limit, the figure that would do while the others stay.
    """
    from requant.planning.solver.knapsack import choose

    found = []
    for k, limit in enumerate(constraints.limits if why else ()):
        others = [j for j in range(len(constraints.limits)) if j != k]
        costs = [[tuple(o.costs[j] for j in others) for o in options] for options in items]
        values = [[float(o.costs[k]) for o in options] for options in items]
        rooms = [constraints.limits[j].room for j in others]
        answer = choose(values, costs, rooms, _CONFLICT_SECONDS, _CONFLICT_GAP)
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
    ways = " or ".join(f"{x.option} {_figure_to_give(x, n)}" for x, n in found)
    return InfeasibleBudget(limit.budget, needed, f"{what}; {ways} would do", proven=proven)


def _figure_to_give(limit: Limit, amount: int) -> str:
    """`amount` of the limit's unit as the option takes it, rounded to the safe side."""
    if limit.unit == "ns":
        return f"{math.floor(1e5 / amount * 1e6) / 100:g}"
    if limit.unit == "loss":
        return f"{1.001 * amount * LOSS_STEP:.4g}"
    return f"{math.ceil(8000 * amount / limit.n_weights) / 1000:g}" if limit.n_weights else _round_up(amount)


def _break_ties(items: Sequence[Sequence[Option]], picked: Sequence[Option]) -> list[Option]:
    """Give the earlier of items with equal options, which are interchangeable, the more bytes."""
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


def _build_plan(problem: Problem, picked: Sequence[Option], gap: float, how: str) -> Plan:
    """The plan that gives every tensor its item's type and device."""
    losses, constraints = problem.losses, problem.constraints
    chosen = {
        m: (type_name, device)
        for item, option in zip(problem.items, picked, strict=True)
        for m, type_name, device in zip(item.members, option.types, option.devices, strict=True)
    }
    choices = tuple(
        _build_choice(tensor, *chosen[index], constraints.share(tensor)) for index, tensor in enumerate(losses.tensors)
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


def _build_choice(tensor: TensorLosses, type_name: str, device: str, share: float) -> Choice:
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
