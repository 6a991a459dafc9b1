"""Losses and a request -> the plan of least loss that fits, with the proven gap.

Every item gets one option; what can never be best (no cheaper and no better than another) is left out first, which
also makes each item's losses fall with its bytes. `knapsack` chooses, this module says what it means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from requant.budget import Item, Option, Problem, Request, constrain
from requant.errors import InfeasibleBudget
from requant.plan import Choice, Limit, Losses, Plan, TensorLosses
from requant.units import format_size

TIME_LIMIT = 60.0  # seconds


def solve(losses: Losses, request: Request, *, time_limit: float = TIME_LIMIT) -> Plan:
    """The plan of least predicted loss within the request's limits.

    `time_limit` in seconds; when it ends the search, the plan is the best found and its gap says what is not proven.
    Raises UsageError for a request that cannot be meant, InfeasibleBudget naming the smallest budget that would do.
    """
    from requant.knapsack import choose

    problem = constrain(losses, request)
    _check_feasible(problem)
    items = [_undominated(item) for item in problem.items]
    slack = [limit.budget - limit.other for limit in request.limits]
    picked = [options[-1] for options in items]
    bound, how = math.fsum(o.loss for o in picked), "every tensor has its best type"
    if any(sum(o.costs[k] for o in picked) > room for k, room in enumerate(slack)):
        answer = choose([[o.loss for o in x] for x in items], [[o.costs for o in x] for x in items], slack, time_limit)
        if answer.picked is None:
            raise _conflict(request, answer.how)
        picked = [options[index] for options, index in zip(items, answer.picked, strict=True)]
        bound, how = answer.bound, answer.how
    return _plan(problem, _canonical(items, picked), bound, how)


def _undominated(item: Item) -> list[Option]:
    """The options that no other beats or equals in every cost, in bytes and in loss; by falling loss."""
    kept: list[Option] = []
    for option in sorted(item.options, key=lambda o: (o.loss, o.n_bytes)):  # stable: the earlier of equals stays
        if not any(
            k.n_bytes <= option.n_bytes and all(a <= b for a, b in zip(k.costs, option.costs, strict=True))
            for k in kept
        ):
            kept.append(option)
    return kept[::-1]


def _check_feasible(problem: Problem) -> None:
    """Raises InfeasibleBudget when the smallest option of every item is over a limit."""
    faults = []
    for k, limit in enumerate(problem.request.limits):
        smallest = limit.other + sum(min(o.costs[k] for o in item.options) for item in problem.items)
        if smallest > limit.budget:
            faults.append((limit, smallest))
    if faults:
        limit, smallest = faults[0]
        message = "; ".join(_shortfall(*fault, problem.request) for fault in faults)
        raise InfeasibleBudget(limit.budget, smallest, f"{message}{_remedy(problem.request)}")


def _shortfall(limit: Limit, smallest: int, request: Request) -> str:
    """What is asked, what is needed and the figure to ask for, in the words of the option."""
    if limit.n_weights:
        needed = math.ceil(8000 * smallest / limit.n_weights) / 1000
        return f"{limit.option} {limit.bpw:g} is below the smallest plan's {needed:g}; raise it to {needed:g}"
    parts = {"weights": smallest - limit.other}
    parts |= request.memory if limit.gpu_only else {}
    if not (limit.gpu_only and request.memory):
        parts |= {"other": limit.other} if limit.other else {}
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    short = f"{limit.option} {format_size(limit.budget)} is {format_size(smallest - limit.budget)} short"
    return f"{short}: the smallest plan needs {format_size(smallest)} ({listed}); raise it to {_rounded_up(smallest)}"


def _rounded_up(n_bytes: int) -> str:
    """A size as one types it, at least `n_bytes` and less than 1 % above."""
    unit, name = (2**20, "MiB") if n_bytes >= 100 * 2**20 else (2**10, "KiB") if n_bytes >= 100 * 2**10 else (1, "B")
    return f"{-(-n_bytes // unit)}{name}"


def _remedy(request: Request) -> str:
    """What else can be given up."""
    given = (
        ("--tensor-type", request.pins),
        ("--min-type", request.floors),
        ("--types", request.types),
        ("--output-tensor-type", request.output_type),
        ("--token-embedding-type", request.embedding_type),
    )
    options = [option for option, value in given if value]
    return f" or loosen {', '.join(options)}" if options else ", or score smaller types"


def _conflict(request: Request, how: str) -> InfeasibleBudget:
    """No choice was found though each limit alone can be met."""
    limit = request.limits[0]
    options = " and ".join(x.option for x in request.limits)
    return InfeasibleBudget(limit.budget, limit.budget, f"no plan meets {options} together ({how}); raise one of them")


def _canonical(items: Sequence[Sequence[Option]], picked: Sequence[Option]) -> list[Option]:
    """Among items with the same options, which are interchangeable, the earlier one gets the more bytes."""
    alike: dict[tuple[Option, ...], list[int]] = {}
    for index, options in enumerate(items):
        alike.setdefault(tuple(options), []).append(index)
    result = list(picked)
    for places in alike.values():
        for place, option in zip(places, sorted((picked[i] for i in places), key=lambda o: -o.n_bytes), strict=True):
            result[place] = option
    return result


def _plan(problem: Problem, picked: Sequence[Option], bound: float, how: str) -> Plan:
    """The plan that gives every tensor its item's type."""
    losses, request = problem.losses, problem.request
    types = {m: option.type for item, option in zip(problem.items, picked, strict=True) for m in item.members}
    choices = tuple(_choice(tensor, types[index]) for index, tensor in enumerate(losses.tensors))
    loss = math.fsum(c.loss for c in choices)
    return Plan(
        source=losses.source,
        header_sha256=losses.header_sha256,
        arch=losses.arch,
        method=losses.method,
        budget=request.describe(),
        limits=request.limits,
        memory=dict(request.memory),
        choices=choices,
        predicted_loss=loss,
        gap=max(0.0, (loss - bound) / loss) if loss > 0 else 0.0,
        solver=how,
        notes=(*losses.notes, *problem.notes),
        effort=losses.effort,
    )


def _choice(tensor: TensorLosses, type_name: str) -> Choice:
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
        on_gpu=tensor.on_gpu,
        reason=tensor.reason,
        notes=() if tensor.reason else tuple(f"no {', '.join(types)}: {reason}" for reason, types in because.items()),
    )
