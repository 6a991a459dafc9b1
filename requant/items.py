"""The choices of a problem: tensors that are decided together, and every type and device that they may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from requant.errors import UsageError, brief
from requant.plan import Candidate, Losses, TensorLosses, use_of
from requant.request import Request, devices_of

Tied = tuple[tuple[int, ...], list[tuple[Candidate, ...]]]  # tensors of one type, and the candidates of each type


@dataclass(frozen=True, slots=True)
class Option:
    """A type and a device for every tensor of an item, with what that takes of each limit."""

    types: tuple[str, ...]  # one per member
    devices: tuple[str, ...]
    costs: tuple[int, ...]  # one per limit, in its unit
    n_bytes: int
    loss: float
    value: float  # what is to be least


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that are decided together, by their place in the losses, and what they may have."""

    members: tuple[int, ...]
    options: tuple[Option, ...]


def items_of(losses: Losses, request: Request, tied: list[Tied]) -> Iterator[Item]:
    """Items in the order of their first tensor; what must be on one device, though it may be on either, is one."""
    units: dict[str, list[int]] = {}  # unit -> the tied tensors that have a member in it
    leader = list(range(len(tied)))
    for k, (members, _) in enumerate(tied):
        for m in members:
            tensor = losses.tensors[m]
            if len(devices_of(tensor, request)) > 1:
                units.setdefault(request.units.get(tensor.name, tensor.name), []).append(k)
    for together in units.values():
        first = min(leader[k] for k in together)
        old = {leader[k] for k in together}
        leader = [first if x in old else x for x in leader]
    for k in range(len(tied)):
        parts = [tied[j] for j in range(k, len(tied)) if leader[j] == k]
        if parts:
            yield _item(losses, request, parts)


def _item(losses: Losses, request: Request, parts: list[Tied]) -> Item:
    members = tuple(m for found, _ in parts for m in found)
    devices = dict.fromkeys(d for m in members for d in devices_of(losses.tensors[m], request))
    free = any(len(devices_of(losses.tensors[m], request)) > 1 for m in members)
    options: list[Option] = []
    for device in devices if free else [""]:
        joined: list[Option] = []
        for found, rows in parts:
            own = [o for row in rows if (o := _option(losses, request, found, row, device)) is not None]
            joined = _joined(joined, own) if joined else own
            if not joined:
                break
        options.extend(joined)
    if not options:
        tensor = losses.tensors[members[0]]
        raise UsageError(
            f"{brief(tensor.name)} can have no type that runs where it must be; score more types, or loosen a pin"
        )
    return Item(members, tuple(options))


def _option(
    losses: Losses, request: Request, members: tuple[int, ...], row: tuple[Candidate, ...], device: str
) -> Option | None:
    """The members with one type each; those that may be anywhere on `device`. None where the type cannot be there."""
    places, uses, other = [], [], 0.0
    for m, c in zip(members, row, strict=True):
        tensor = losses.tensors[m]
        choices = devices_of(tensor, request)
        place = choices[0] if len(choices) == 1 else device
        if tensor.reason is None and c.type in request.unusable.get(place, ()):
            return None
        if place == "cpu" and _is_too_large(tensor, c, request):
            return None
        share = request.shares.get(tensor.name, 1.0)
        use = use_of(c, place, tensor.role, share, request.timing)
        places.append(place)
        uses.append(use)
        if request.objective == "preferred":
            other += tensor.n_weights if tensor.reason is None and c.type != request.preferred else 0
    n_bytes, loss = sum(u.n_bytes for u in uses), math.fsum(u.loss for u in uses)
    values = {"loss": loss + request.price * 1e-9 * sum(u.ns for u in uses), "bytes": float(n_bytes)}
    costs = tuple(sum(limit.cost(u) for u in uses) for limit in request.limits)
    types = tuple(c.type for c in row)
    return Option(types, tuple(places), costs, n_bytes, loss, values.get(request.objective, other))


def _is_too_large(tensor: TensorLosses, candidate: Candidate, request: Request) -> bool:
    """Whether it could not be copied to the GPU for a big batch, as all are that are multiplied with."""
    most = request.largest_on_cpu
    multiplied = tensor.reason is None and request.shares.get(tensor.name, 1.0) > 0
    return multiplied and most is not None and candidate.n_bytes > most


def _joined(a: list[Option], b: list[Option]) -> list[Option]:
    """Every pair of options that no other pair beats or equals in value and in each cost."""
    import numpy as np  # here: most commands need none

    values = np.add.outer([o.value for o in a], [o.value for o in b]).ravel()
    costs = (np.array([o.costs for o in a])[:, None] + np.array([o.costs for o in b])[None]).reshape(len(values), -1)
    order = np.lexsort((*costs.T, values))
    kept: list[int] = []
    held = costs[:0]
    for k in order:
        if not (held <= costs[k]).all(axis=1).any():
            kept.append(int(k))
            held = costs[kept]
    return [_sum(a[k // len(b)], b[k % len(b)]) for k in kept]


def _sum(a: Option, b: Option) -> Option:
    costs = tuple(x + y for x, y in zip(a.costs, b.costs, strict=True))
    return Option(
        a.types + b.types, a.devices + b.devices, costs, a.n_bytes + b.n_bytes, a.loss + b.loss, a.value + b.value
    )
