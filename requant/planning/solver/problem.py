"""The optimization problem of a plan: tensors that are decided together, and the types and devices they may have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from requant.errors import InfeasibleBudget, UsageError, brief
from requant.formats import format_of
from requant.planning.constraints import Constraints, Rule, Use
from requant.planning.rule_matches import deciding_floors, deciding_pins, match_tensors
from requant.scoring.losses import GRADIENT_FREE, Candidate, Losses, TensorLosses


@dataclass(frozen=True, slots=True)
class Option:
    """A type and a device for every tensor of an item, and what they cost."""

    types: tuple[str, ...]  # one per member
    devices: tuple[str, ...]
    costs: tuple[int, ...]  # one per limit, in its unit
    n_bytes: int
    loss: float
    value: float  # its part of the sum that is minimized


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that are decided together, by their index in the losses, and their options."""

    members: tuple[int, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A multiple-choice problem: one option for every item, within the limits, at the least sum of values."""

    losses: Losses
    constraints: Constraints
    items: tuple[Item, ...]  # ordered by their first tensor
    notes: tuple[str, ...]
    withheld: tuple[str, ...] = ()  # types that the output gets only by name, because its losses are without gradients

    def least_cost(self, limit: int) -> int:
        """The least that all items together take of the limit with this index."""
        return sum(min(option.costs[limit] for option in item.options) for item in self.items)


def constrain(losses: Losses, constraints: Constraints) -> Problem:
    """Build the problem from the candidates that the constraints allow.

    Raises UsageError where the rules allow none or one matches nothing, InfeasibleBudget where none can be on the
    devices: others may do.
    """
    return _ProblemBuilder(losses, constraints).build()


def allowed_candidates(losses: Losses, constraints: Constraints) -> list[tuple[Candidate, ...]]:
    """The candidates of each tensor that pins, --types and floors allow, whatever the groups and the devices."""
    return _ProblemBuilder(losses, constraints).allowed_candidates()


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that get the same type; `rows`: for each type that all may have, a candidate per member."""

    members: tuple[int, ...]
    rows: list[tuple[Candidate, ...]]


class _ProblemBuilder:
    """The steps from losses and constraints to a problem; `notes` collects what the user should know."""

    def __init__(self, losses: Losses, constraints: Constraints) -> None:
        self.losses, self.constraints, self.notes = losses, constraints, list[str]()
        self.guarded = losses.output_name if losses.method in GRADIENT_FREE else None

    def build(self) -> Problem:
        allowed = self.allowed_candidates()
        groups = [
            _Group(members, self._common_rows([allowed[m] for m in members], members, pattern))
            for members, pattern in self._tied_tensors()
        ]
        items = tuple(self._items(groups))
        return Problem(self.losses, self.constraints, items, tuple(self.notes), self._withheld())

    # candidates of each tensor

    def allowed_candidates(self) -> list[tuple[Candidate, ...]]:
        pins, idle_pins = deciding_pins(self.losses, self.constraints)
        floors, idle_floors = deciding_floors(self.losses, self.constraints)
        self._check_types()
        idle = (*idle_pins, *idle_floors)
        self.notes += [f"{rule} decides nothing: earlier rules match the same tensors" for rule in idle]
        return [self._allowed(t, pins.get(i), floors.get(i)) for i, t in enumerate(self.losses.tensors)]

    def _check_types(self) -> None:
        """Raise UsageError unless every type of --types was scored for some tensor."""
        free = [t for t in self.losses.tensors if t.reason is None]
        scored = dict.fromkeys(c.type for t in free for c in t.candidates)
        for type_name in self.constraints.types:
            if free and type_name not in scored:
                reason = next((t.skipped[type_name] for t in free if type_name in t.skipped), None)
                raise UsageError(
                    f"--types: {type_name} {_explain_absence(reason)}; the losses have {', '.join(scored)}"
                )

    def _allowed(self, tensor: TensorLosses, pin: Rule | None, floor: Rule | None) -> tuple[Candidate, ...]:
        """The candidates of a tensor that its rules and --types allow, at least one."""
        if tensor.reason is not None:
            return tuple(c for c in tensor.candidates if c.type == tensor.source_type)
        if pin is not None:
            return (_find_pinned(tensor, pin),)
        types, is_even = self.constraints.types, format_of("Q2_K").divides(tensor.shape[0])
        is_kept_off = is_even or tensor.name == self.guarded
        useless = self.constraints.odd_rows - {tensor.source_type} if is_kept_off else ()
        left = tuple(c for c in tensor.candidates if (not types or c.type in types) and c.type not in useless)
        if not left:
            self.notes.append(f"{brief(tensor.name)} can have none of --types: all that were scored are considered")
            left = tensor.candidates
        if floor is None:
            return left
        fmt = format_of(floor.type)
        least = Fraction(fmt.block_bytes, fmt.block_weights)
        above = tuple(c for c in left if c.type == tensor.source_type or c.n_bytes >= least * tensor.n_weights)
        if not above:
            raise UsageError(f"{floor} leaves {brief(tensor.name)} none of {', '.join(c.type for c in left)}")
        return above

    def _withheld(self) -> tuple[str, ...]:
        """The types that rows without a super-block get, but not the output while its losses are without gradients."""
        guarded = next((t for t in self.losses.tensors if t.name == self.guarded and t.reason is None), None)
        if guarded is None or format_of("Q2_K").divides(guarded.shape[0]):
            return ()
        odd = self.constraints.odd_rows - {guarded.source_type}
        return tuple(c.type for c in guarded.candidates if c.type in odd)

    # tensors of one type

    def _tied_tensors(self) -> list[tuple[tuple[int, ...], str]]:
        """The members of each group, ordered by the first, with the --group pattern that tied them."""
        root = list(range(len(self.losses.tensors)))
        tied_by = [""] * len(root)

        def find(index: int) -> int:
            while root[index] != index:
                index = root[index]
            return index

        for pattern in self.constraints.groups:
            leaders: dict[tuple[str | None, ...], int] = {}
            for index, match in match_tensors(pattern, "--group", self.losses).items():
                leader = leaders.setdefault(match.groups(), index)
                low, high = sorted((find(leader), find(index)))
                root[high] = low
                tied_by[low] = tied_by[low] or pattern
            if all(find(i) == i and root.count(i) == 1 for i in leaders.values()):
                self.notes.append(f"--group '{brief(pattern)}' ties no two tensors together")
        members: dict[int, list[int]] = {}
        for index in range(len(root)):
            members.setdefault(find(index), []).append(index)
        return [(tuple(found), tied_by[leader]) for leader, found in members.items()]

    def _common_rows(
        self, allowed: list[tuple[Candidate, ...]], members: tuple[int, ...], pattern: str
    ) -> list[tuple[Candidate, ...]]:
        """The candidates of all members for each type that all may have. Raises UsageError where there is none."""
        by_type = [{c.type: c for c in candidates} for candidates in allowed]
        common = [name for name in by_type[0] if all(name in types for types in by_type)]
        if not common:
            tensors = [self.losses.tensors[m] for m in members]
            names = ", ".join(brief(t.name) for t in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
            raise UsageError(f"--group '{brief(pattern)}': {names} have no allowed type in common")
        return [tuple(types[name] for types in by_type) for name in common]

    # tensors of one type or one device

    def _items(self, groups: list[_Group]) -> Iterator[Item]:
        """Yield items in the order of their first tensor; groups that must share a free device are one item."""
        units: dict[str, list[int]] = {}  # unit -> the groups that have a member in it
        leader = list(range(len(groups)))
        for k, group in enumerate(groups):
            for tensor in self._members(group):
                if self._is_free(tensor):
                    units.setdefault(self.constraints.units.get(tensor.name, tensor.name), []).append(k)
        for together in units.values():
            first = min(leader[k] for k in together)
            old = {leader[k] for k in together}
            leader = [first if x in old else x for x in leader]
        for k in range(len(groups)):
            joined = [groups[j] for j in range(k, len(groups)) if leader[j] == k]
            if joined:
                yield self._item(joined)

    def _members(self, group: _Group) -> list[TensorLosses]:
        return [self.losses.tensors[m] for m in group.members]

    def _is_free(self, tensor: TensorLosses) -> bool:
        """Return whether the tensor may be on more than one device."""
        return len(self.constraints.allowed_devices(tensor)) > 1

    def _item(self, groups: list[_Group]) -> Item:
        tensors = [tensor for group in groups for tensor in self._members(group)]
        devices = dict.fromkeys(d for tensor in tensors for d in self.constraints.allowed_devices(tensor))
        options: list[Option] = []
        for device in devices if any(self._is_free(tensor) for tensor in tensors) else [""]:
            joint: list[Option] = []
            for group in groups:
                own = [o for row in group.rows if (o := self._option(group, row, device)) is not None]
                joint = _join_options(joint, own) if joint else own
                if not joint:
                    break
            options.extend(joint)
        if not options:
            raise self._placement_error(groups)
        return Item(tuple(m for group in groups for m in group.members), tuple(options))

    def _placement_error(self, groups: list[_Group]) -> InfeasibleBudget:
        """The error where the devices leave tensors that are decided together no type; it names the first of them."""
        tensor, types = self._members(groups[0])[0], [row[0].type for row in groups[0].rows]
        where = " or ".join(f"the {device.upper()}" for device in self.constraints.allowed_devices(tensor))
        what = f"{brief(tensor.name)} must be on {where}, where it can have none of {', '.join(types)}"
        remedy = "; change --vram or --ram, name more types with --types, or loosen a rule"
        limit = next(iter(self.constraints.limits), None)
        return InfeasibleBudget(*((0, 0) if limit is None else (limit.budget, limit.budget)), what + remedy)

    def _option(self, group: _Group, row: tuple[Candidate, ...], device: str) -> Option | None:
        """The members as the candidates of `row`, the free ones on `device`; None where one cannot be there."""
        constraints, tensors = self.constraints, self._members(group)
        places, uses = [], list[Use]()
        for tensor, candidate in zip(tensors, row, strict=True):
            choices = constraints.allowed_devices(tensor)
            place = choices[0] if len(choices) == 1 else device
            if not constraints.can_run(tensor, candidate.type, place):
                return None
            if place == "cpu" and self._is_too_large(tensor, candidate):
                return None
            places.append(place)
            uses.append(constraints.use(tensor, candidate, place))
        n_bytes, loss = sum(u.n_bytes for u in uses), math.fsum(u.loss for u in uses)
        if constraints.objective == "preferred":
            others = (t for t, c in zip(tensors, row, strict=True) if c.type != constraints.preferred)
            value = float(sum(t.n_weights for t in others if t.reason is None))
        else:
            value = constraints.value(Use(n_bytes, "", in_ram=False, ns=sum(u.ns for u in uses), loss=loss))
        costs = tuple(sum(limit.cost(u) for u in uses) for limit in constraints.limits)
        return Option(tuple(c.type for c in row), tuple(places), costs, n_bytes, loss, value)

    def _is_too_large(self, tensor: TensorLosses, candidate: Candidate) -> bool:
        """Return whether the tensor could not be copied to the GPU for a large batch, as every multiplied one is."""
        most = self.constraints.largest_on_cpu
        multiplied = tensor.reason is None and self.constraints.share(tensor) > 0
        return multiplied and most is not None and candidate.n_bytes > most


def _explain_absence(reason: str | None) -> str:
    """The reason why a type is no candidate, as part of a message; None: it was not scored."""
    return (
        "was not scored: score again with it in --types" if reason is None else f"cannot be used: {brief(reason, 300)}"
    )


def _find_pinned(tensor: TensorLosses, pin: Rule) -> Candidate:
    """The candidate of the pin's type. Raises UsageError where the tensor has none."""
    found = next((c for c in tensor.candidates if c.type == pin.type), None)
    if found is None:
        fmt = format_of(pin.type)
        reason = tensor.skipped.get(pin.type)
        if reason is None and not fmt.divides(tensor.shape[0]):
            reason = f"rows of {tensor.shape[0]} are no whole blocks of {fmt.block_weights}"
        raise UsageError(f"{pin}: for {brief(tensor.name)}, {pin.type} {_explain_absence(reason)}")
    return found


def _join_options(a: list[Option], b: list[Option]) -> list[Option]:
    """Every pair of options that no other pair beats or equals in value and in each cost."""
    import numpy as np  # here: most commands need none

    values = np.add.outer([o.value for o in a], [o.value for o in b]).ravel()
    costs = (np.array([o.costs for o in a])[:, None] + np.array([o.costs for o in b])[None]).reshape(len(values), -1)
    order = np.lexsort((*costs.T, values))
    best: list[int] = []
    held = costs[:0]
    for k in order:
        if not (held <= costs[k]).all(axis=1).any():
            best.append(int(k))
            held = costs[best]
    return [_add_options(a[k // len(b)], b[k % len(b)]) for k in best]


def _add_options(a: Option, b: Option) -> Option:
    costs = tuple(x + y for x, y in zip(a.costs, b.costs, strict=True))
    return Option(
        a.types + b.types, a.devices + b.devices, costs, a.n_bytes + b.n_bytes, a.loss + b.loss, a.value + b.value
    )
