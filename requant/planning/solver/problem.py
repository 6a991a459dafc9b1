"""The choices of a problem: tensors that are decided together, and every type and device that they may have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from requant.errors import UsageError, brief, find_similar
from requant.formats import format_of
from requant.planning.constraints import Constraints, Rule, allowed_devices, compile_pattern
from requant.planning.plan import use_of
from requant.scoring.losses import Candidate, Losses, TensorLosses

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


def items_of(losses: Losses, constraints: Constraints, tied: list[Tied]) -> Iterator[Item]:
    """Items in the order of their first tensor; what must be on one device, though it may be on either, is one."""
    units: dict[str, list[int]] = {}  # unit -> the tied tensors that have a member in it
    leader = list(range(len(tied)))
    for k, (members, _) in enumerate(tied):
        for m in members:
            tensor = losses.tensors[m]
            if len(allowed_devices(tensor, constraints)) > 1:
                units.setdefault(constraints.units.get(tensor.name, tensor.name), []).append(k)
    for together in units.values():
        first = min(leader[k] for k in together)
        old = {leader[k] for k in together}
        leader = [first if x in old else x for x in leader]
    for k in range(len(tied)):
        parts = [tied[j] for j in range(k, len(tied)) if leader[j] == k]
        if parts:
            yield _item(losses, constraints, parts)


def _item(losses: Losses, constraints: Constraints, parts: list[Tied]) -> Item:
    members = tuple(m for found, _ in parts for m in found)
    devices = dict.fromkeys(d for m in members for d in allowed_devices(losses.tensors[m], constraints))
    free = any(len(allowed_devices(losses.tensors[m], constraints)) > 1 for m in members)
    options: list[Option] = []
    for device in devices if free else [""]:
        joined: list[Option] = []
        for found, rows in parts:
            own = [o for row in rows if (o := _option(losses, constraints, found, row, device)) is not None]
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
    losses: Losses, constraints: Constraints, members: tuple[int, ...], row: tuple[Candidate, ...], device: str
) -> Option | None:
    """The members with one type each; those that may be anywhere on `device`. None where the type cannot be there."""
    places, uses, other = [], [], 0.0
    for m, c in zip(members, row, strict=True):
        tensor = losses.tensors[m]
        choices = allowed_devices(tensor, constraints)
        place = choices[0] if len(choices) == 1 else device
        if tensor.reason is None and c.type in constraints.unusable.get(place, ()):
            return None
        if place == "cpu" and _is_too_large(tensor, c, constraints):
            return None
        share = constraints.shares.get(tensor.name, 1.0)
        use = use_of(c, place, tensor.role, share, constraints.timing)
        places.append(place)
        uses.append(use)
        if constraints.objective == "preferred":
            other += tensor.n_weights if tensor.reason is None and c.type != constraints.preferred else 0
    n_bytes, loss = sum(u.n_bytes for u in uses), math.fsum(u.loss for u in uses)
    values = {"loss": loss + constraints.price * 1e-9 * sum(u.ns for u in uses), "bytes": float(n_bytes)}
    costs = tuple(sum(limit.cost(u) for u in uses) for limit in constraints.limits)
    types = tuple(c.type for c in row)
    return Option(types, tuple(places), costs, n_bytes, loss, values.get(constraints.objective, other))


def _is_too_large(tensor: TensorLosses, candidate: Candidate, constraints: Constraints) -> bool:
    """Whether it could not be copied to the GPU for a big batch, as all are that are multiplied with."""
    most = constraints.largest_on_cpu
    multiplied = tensor.reason is None and constraints.shares.get(tensor.name, 1.0) > 0
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


@dataclass(frozen=True, slots=True)
class Problem:
    """One choice per item, within the limits: what the solver is given."""

    losses: Losses
    constraints: Constraints
    items: tuple[Item, ...]  # ordered by their first tensor
    notes: tuple[str, ...]


def constrain(losses: Losses, constraints: Constraints) -> Problem:
    """The choices that the constraints leaves. Raises UsageError where it leaves none, or a rule matches nothing."""
    notes: list[str] = []
    allowed = _left(losses, constraints, notes)
    tied = [
        (members, _common_types([allowed[m] for m in members], losses, members, pattern))
        for members, pattern in _groups(losses, constraints.groups, notes)
    ]
    return Problem(losses, constraints, tuple(items_of(losses, constraints, tied)), tuple(notes))


def check_rules(losses: Losses, constraints: Constraints) -> None:
    """Try the constraints's expressions on the names. Raises UsageError where one is none, or matches nothing.

    Python matches without letting another thread go on, the one that hears signals included: called from the main
    thread before `constrain` in another, this is where Ctrl-C ends an expression that takes for ever.
    """
    patterns = [(rule.pattern.lower(), rule.option) for rule in constraints.pins]
    patterns += [(rule.pattern, rule.option) for rule in constraints.floors]
    for pattern, option in (*patterns, *((group, "--group") for group in constraints.groups)):
        _matching(pattern, option, losses)


def allowed_candidates(losses: Losses, constraints: Constraints) -> list[tuple[Candidate, ...]]:
    """What pins, --types and floors leave to each tensor, whatever the groups and the devices."""
    return _left(losses, constraints, [])


def _left(losses: Losses, constraints: Constraints, notes: list[str]) -> list[tuple[Candidate, ...]]:
    pins, floors = _Rules.of(constraints.pins, losses, lower=True), _Rules.of(constraints.floors, losses)
    _check_types(losses, constraints)
    notes.extend(f"{rule} decides nothing: earlier rules match the same tensors" for rule in pins.idle + floors.idle)
    named = _named_pins(losses, constraints)
    return [
        _allowed(t, named.get(t.name) or pins.first.get(i), floors.first.get(i), constraints.types, notes)
        for i, t in enumerate(losses.tensors)
    ]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Which rule decides each tensor (by index), and the rules that never get to."""

    first: dict[int, Rule]
    idle: list[Rule]

    @classmethod
    def of(cls, rules: Iterable[Rule], losses: Losses, *, lower: bool = False) -> _Rules:
        first: dict[int, Rule] = {}
        idle = []
        for rule in rules:
            matched = _matching(rule.pattern.lower() if lower else rule.pattern, rule.option, losses)
            if not matched.keys() - first.keys():
                idle.append(rule)
            first = dict.fromkeys(matched, rule) | first
        return cls(first, idle)


def _matching(pattern: str, option: str, losses: Losses) -> dict[int, re.Match[str]]:
    """Index of each tensor that may be quantized and matches, with the match."""
    compiled = compile_pattern(pattern, option)
    every = {i: match for i, t in enumerate(losses.tensors) if (match := compiled.search(t.name))}
    free = {i: match for i, match in every.items() if losses.tensors[i].reason is None}
    if not free:
        what = "matches only tensors that stay as they are" if every else "matches no tensor"
        hint = _like(pattern, [t.name for t in losses.tensors if t.reason is None])
        raise UsageError(f"{option}: '{brief(pattern)}' {what}; {hint}")
    return free


def _like(pattern: str, names: Sequence[str]) -> str:
    """Which names, or parts of names, may have been meant by an expression that matches none of them."""
    if not names:
        return "no tensor of this model can be quantized"
    word = re.sub(r"\W+", ".", re.sub(r"\\.|\[[^]]*\]|\(|\)|[*+?^$|]", ".", pattern)).strip(".")
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = (
        find_similar(word, names, 1) or find_similar(word, parts, 1) or find_similar(word.rpartition(".")[2], parts, 1)
    )
    return f"did you mean {brief(near[0])}?" if near else f"names look like {brief(names[0])}"


def _check_types(losses: Losses, constraints: Constraints) -> None:
    """Every type of --types was scored for some tensor."""
    free = [t for t in losses.tensors if t.reason is None]
    scored = dict.fromkeys(c.type for t in free for c in t.candidates)
    for type_name in constraints.types:
        if free and type_name not in scored:
            reason = next((t.skipped[type_name] for t in free if type_name in t.skipped), None)
            raise UsageError(f"--types: {type_name} {_why_not(reason)}; the losses have {', '.join(scored)}")


def _why_not(reason: str | None) -> str:
    return (
        "was not scored: score again with it in --types" if reason is None else f"cannot be used: {brief(reason, 300)}"
    )


def _named_pins(losses: Losses, constraints: Constraints) -> dict[str, Rule]:
    """--output-tensor-type and --token-embedding-type, which go before --tensor-type as in llama-quantize."""
    pins = {}
    present = {t.name: t for t in losses.tensors}
    for name, type_name, option in (
        ("output.weight", constraints.output_type, "--output-tensor-type"),
        ("token_embd.weight", constraints.embedding_type, "--token-embedding-type"),
    ):
        if type_name is None:
            continue
        if name not in present:
            tied = name == "output.weight" and "token_embd.weight" in present
            hint = "; the embedding is the output too, use --token-embedding-type" if tied else ""
            raise UsageError(f"{option}: the model has no {name}{hint}")
        if (reason := present[name].reason) is not None:
            raise UsageError(f"{option}: {name} stays as it is: {brief(reason, 300)}")
        pins[name] = Rule(option, name, type_name)
    return pins


def _allowed(
    tensor: TensorLosses, pin: Rule | None, floor: Rule | None, types: Sequence[str], notes: list[str]
) -> tuple[Candidate, ...]:
    """The candidates that pins, --types and floors leave to a tensor, at least one."""
    if tensor.reason is not None:
        return tuple(c for c in tensor.candidates if c.type == tensor.source_type)
    if pin is not None:
        return (_pinned(tensor, pin),)
    left = tuple(c for c in tensor.candidates if not types or c.type in types)
    if not left:
        notes.append(f"{brief(tensor.name)} can have none of --types: all that were scored are considered")
        left = tensor.candidates
    if floor is None:
        return left
    fmt = format_of(floor.type)
    least = Fraction(fmt.block_bytes, fmt.block_weights)
    above = tuple(c for c in left if c.type == tensor.source_type or c.n_bytes >= least * tensor.n_weights)
    if not above:
        raise UsageError(f"{floor} leaves {brief(tensor.name)} none of {', '.join(c.type for c in left)}")
    return above


def _pinned(tensor: TensorLosses, pin: Rule) -> Candidate:
    found = next((c for c in tensor.candidates if c.type == pin.type), None)
    if found is None:
        fmt = format_of(pin.type)
        reason = tensor.skipped.get(pin.type)
        if reason is None and not fmt.divides(tensor.shape[0]):
            reason = f"rows of {tensor.shape[0]} are no whole blocks of {fmt.block_weights}"
        raise UsageError(f"{pin}: for {brief(tensor.name)}, {pin.type} {_why_not(reason)}")
    return found


def _groups(losses: Losses, patterns: Sequence[str], notes: list[str]) -> list[tuple[tuple[int, ...], str]]:
    """The members of each item, ordered by the first, with the pattern that tied them."""
    root = list(range(len(losses.tensors)))
    tied_by = [""] * len(root)

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for pattern in patterns:
        leaders: dict[tuple[str | None, ...], int] = {}
        for index, match in _matching(pattern, "--group", losses).items():
            leader = leaders.setdefault(match.groups(), index)
            low, high = sorted((find(leader), find(index)))
            root[high] = low
            tied_by[low] = tied_by[low] or pattern
        if all(find(i) == i and root.count(i) == 1 for i in leaders.values()):
            notes.append(f"--group '{brief(pattern)}' ties no two tensors together")
    members: dict[int, list[int]] = {}
    for index in range(len(root)):
        members.setdefault(find(index), []).append(index)
    return [(tuple(found), tied_by[leader]) for leader, found in members.items()]


def _common_types(
    allowed: list[tuple[Candidate, ...]], losses: Losses, members: tuple[int, ...], pattern: str
) -> list[tuple[Candidate, ...]]:
    """The candidates of all members for each type they all may have. Raises UsageError where there is none."""
    by_type = [{c.type: c for c in candidates} for candidates in allowed]
    common = [name for name in by_type[0] if all(name in types for types in by_type)]
    if not common:
        tensors = [losses.tensors[m] for m in members]
        names = ", ".join(brief(t.name) for t in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        raise UsageError(f"--group '{brief(pattern)}': {names} have no allowed type in common")
    return [tuple(types[name] for types in by_type) for name in common]
