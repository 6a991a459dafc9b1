"""A plan as data for tables, pages, cards and pictures: parts of its budgets, layers by role, loss against bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from requant.formats import by_name, format_of
from requant.planning.constraints import PART_NAMES as PLANNED_PARTS
from requant.planning.constraints import Limit
from requant.planning.plan import Choice, Plan
from requant.planning.summaries import nearest_type
from requant.report.figures import bits_per_weight

PART_NAMES = PLANNED_PARTS | {"copies": "copies for the CPU's matrices"}  # parts of a budget in pages and pictures
_STEPS, _BEND = 240, 0.9  # of a drawn curve: steps across the chart, and the ratio of two losses in a row
NO_LOSS = 1e-7  # of the largest loss; less is rounding
_LEAST = 0.01  # of a loss; a curve that falls to 0, which has no logarithm, is drawn down to this part of the last loss


@dataclass(frozen=True, slots=True)
class BudgetBar:
    """A limit in bytes: its parts, the weights first, and the bytes that are free."""

    option: str  # --vram, --ram, --size, --bpw
    budget: int
    parts: Mapping[str, int]
    free: int


@dataclass(frozen=True, slots=True)
class LayerRole:
    """The tensors of one role in one layer.

    `loss`: predicted for their types, None if unknown. `sensitivity`: predicted for the plan's reference type (about
    4.5 bits per weight), None if they were not scored.
    """

    layer: int | None  # None: outside the layers
    role: str
    choices: tuple[Choice, ...]
    n_bytes: int
    bpw: float
    loss: float | None
    sensitivity: float | None

    @property
    def types(self) -> tuple[str, ...]:
        """The distinct types."""
        return tuple(dict.fromkeys(c.type for c in self.choices))


@dataclass(frozen=True, slots=True)
class Dot:
    """A point on the chart of loss against bytes."""

    name: str
    n_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Loss against the bytes of the tensors in `pool`: VRAM (if all layers are there), or all tensors.

    `points`: exact plans that no other of fewer or equal bytes beats, each tensor having one of its candidates, without
    regard to --group. The straight lines between them are a lower bound of the loss at every size; no plan need reach
    it. `chosen`: the plan itself. `room`: the bytes that its budget leaves to these tensors.
    """

    pool: str
    points: tuple[Dot, ...]
    chosen: Dot | None
    mixtures: tuple[Dot, ...]
    room: int | None = None

    @property
    def dots(self) -> tuple[Dot, ...]:
        """The plan, if its loss is known, and the mixtures."""
        return (*([] if self.chosen is None else [self.chosen]), *self.mixtures)


def budget_bars(plan: Plan) -> tuple[BudgetBar, ...]:
    """Return a bar for each limit in bytes, in the plan's order."""
    return tuple(budget_bar(plan, limit) for limit in plan.limits if limit.unit == "bytes")


def budget_bar(plan: Plan, limit: Limit) -> BudgetBar:
    """Return the parts of a limit in bytes."""
    return BudgetBar(limit.option, limit.budget, plan.parts(limit), limit.budget - plan.used(limit))


def layer_roles(plan: Plan) -> tuple[LayerRole, ...]:
    """Return the tensors that can be quantized by layer, first those outside of any, and by role in file order."""
    groups: dict[tuple[int | None, str], list[Choice]] = {}
    for c in plan.choices:
        if c.reason is None:
            groups.setdefault((c.layer, c.role), []).append(c)
    order = {role: i for i, role in enumerate(dict.fromkeys(role for _, role in groups))}
    keys = sorted(groups, key=lambda key: (-1 if key[0] is None else key[0], order[key[1]]))
    return tuple(_summarize_role(plan, *key, groups[key]) for key in keys)


def _summarize_role(plan: Plan, layer: int | None, role: str, choices: list[Choice]) -> LayerRole:
    n_bytes = sum(c.n_bytes for c in choices)
    bpw = bits_per_weight(n_bytes, sum(c.n_weights for c in choices))
    loss = None if plan.predicted_loss is None else math.fsum(c.loss for c in choices)
    sensitivities = [_sensitivity(plan, c) for c in choices]
    known = [s for s in sensitivities if s is not None]
    sensitivity = math.fsum(known) if len(known) == len(choices) else None
    return LayerRole(layer, role, tuple(choices), n_bytes, bpw, loss, sensitivity)


def _sensitivity(plan: Plan, choice: Choice) -> float | None:
    """Return the tensor's loss at the plan's reference type, or at the scored type of the nearest size."""
    losses = plan.candidates.get(choice.name)
    reference = by_name(str(plan.runtime.get("reference_type", "")))
    return losses[nearest_type(losses, reference.name)] if losses and reference is not None else None


def loss_curve(plan: Plan) -> LossCurve | None:
    """Return the curve of best loss per size, with this plan as a point; None if nothing was scored."""
    if not any(len(losses) > 1 for losses in plan.candidates.values()):
        return None
    in_vram = any(limit.device == "gpu" for limit in plan.limits) and plan.runtime.get("all_layers", False)
    pool = "VRAM" if in_vram and not plan.runtime.get("experts_on_cpu") else "all tensors"
    fixed, loss, steps = 0, 0.0, list[tuple[float, int, float]]()
    for c in plan.choices:
        losses = plan.candidates.get(c.name)
        if c.device == "none" or (pool == "VRAM" and c.device != "gpu"):
            loss += min(losses.values(), default=0.0) if losses else 0.0
        elif not losses:
            fixed += c.n_bytes
        else:
            (first, start), *rest = _lower_hull((format_of(name).n_bytes(c.n_weights), x) for name, x in losses.items())
            fixed, loss = fixed + first, loss + start
            for size, value in rest:
                steps.append(((value - start) / (size - first), size - first, value - start))
                first, start = size, value
    points = [Dot("", fixed, loss)]
    for _, size, change in sorted(steps):
        points.append(Dot("", points[-1].n_bytes + size, max(points[-1].loss + change, 0.0)))
    n_bytes = sum(c.n_bytes for c in plan.choices if pool != "VRAM" or c.device == "gpu")
    chosen = None if plan.predicted_loss is None else Dot("this plan", n_bytes, plan.predicted_loss)
    mixtures = (Dot(m.name, m.gpu_bytes if pool == "VRAM" else m.n_bytes, m.loss) for m in plan.mixtures)
    device = "gpu" if pool == "VRAM" else ""
    room = min((x.budget - x.other for x in plan.limits if x.unit == "bytes" and x.device == device), default=None)
    return LossCurve(pool, tuple(points), chosen, tuple(mixtures), room)


def least_loss_at(curve: LossCurve, n_bytes: int) -> float | None:
    """Return the lower bound of the loss at `n_bytes`; None beyond the ends of the curve."""
    for a, b in pairwise(curve.points):
        if a.n_bytes <= n_bytes <= b.n_bytes:
            return _loss_between(a, b, n_bytes)
    return None


def _loss_between(a: Dot, b: Dot, n_bytes: int) -> float:
    return a.loss + (b.loss - a.loss) * (n_bytes - a.n_bytes) / max(b.n_bytes - a.n_bytes, 1)


def sample_curve(curve: LossCurve, low: float, high: float) -> list[Dot]:
    """Return points of the lower bound from `low` to `high` bytes, for a chart with a logarithmic axis of losses.

    The bound is straight in bytes and loss, and so bent on that axis: the points are near enough to each other that the
    lines between them do not differ from it to the eye.
    """
    found: list[Dot] = []
    for a, b in pairwise(curve.points):
        start, stop = int(max(a.n_bytes, low)), int(min(b.n_bytes, high))
        if start > stop or a.n_bytes == b.n_bytes:
            continue
        sizes = {start, stop, *(size for size in _bending_sizes(a, b) if start < size < stop)}
        found += [Dot("", size, _loss_between(a, b, size)) for size in sorted(sizes)]
    kept = found[:1]
    for dot in found[1:-1]:
        if dot.n_bytes - kept[-1].n_bytes >= (high - low) / _STEPS or dot.loss < _BEND * kept[-1].loss:
            kept.append(dot)
    return [*kept, *found[1:][-1:]]


def _bending_sizes(a: Dot, b: Dot) -> Iterable[int]:
    """Yield the sizes between two points at which the loss has fallen by one more step."""
    if a.loss <= b.loss:
        return
    ratio = b.loss / a.loss
    n = math.ceil(math.log(_LEAST if ratio < NO_LOSS else ratio, _BEND))
    for k in range(1, n):
        share = (a.loss - a.loss * _BEND**k) / (a.loss - b.loss)
        yield int(a.n_bytes + share * (b.n_bytes - a.n_bytes))


def _lower_hull(options: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the lower convex hull of (bytes, loss), bytes rising and loss falling."""
    found: list[tuple[int, float]] = []
    for size, loss in sorted(options):
        if found and loss >= found[-1][1]:
            continue
        if found and size == found[-1][0]:
            found.pop()
        while len(found) > 1 and _is_above(found[-2], found[-1], (size, loss)):
            found.pop()
        found.append((size, loss))
    return found


def _is_above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Return whether `b` is on or above the line from `a` to `c`."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
