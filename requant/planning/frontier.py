"""Frontier: the curve of predicted loss against bytes from one scoring, as numbers for a table or a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from requant.common.notebook import html
from requant.common.serialization import dump, to_plain
from requant.container.splitting import total_size
from requant.errors import BadInput, InfeasibleBudget
from requant.model.engine_settings import engine_settings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import Memory, memory_for
from requant.planning.output_layout import output_layouts
from requant.planning.request import PlanRequest
from requant.scoring.losses import loss_unit

if TYPE_CHECKING:
    from requant.planning.plan import Plan
    from requant.planning.planner import Planner
    from requant.scoring.losses import Losses

FRONTIER_SCHEMA = "requant.frontier/1"
N_POINTS = 40


@dataclass(frozen=True, slots=True)
class Point:
    """The best plan of at most so many bits per weight: its size, the VRAM it needs without a reserve, its loss.

    `vram_bytes` counts cache and buffers at the request's context for batches of `ubatch` tokens, with all layers on
    the GPU; both are None where that is not known for the architecture. `predicted_loss` is in the losses' unit.
    """

    bpw: float
    tensor_bytes: int
    file_bytes: int
    vram_bytes: int | None
    predicted_loss: float
    gap: float
    ubatch: int | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """Plans for one source from the smallest to the largest; losses in the unit of the scoring `method`."""

    source: str
    method: str
    points: tuple[Point, ...]

    def _repr_html_(self) -> str:
        return html(self)


def compute_frontier(
    planner: Planner,
    request: PlanRequest,
    *,
    n: int = N_POINTS,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Point]:
    """Compute up to `n` different plans from the smallest to the largest, spaced evenly in the logarithm of bytes.

    The request's rules for types hold; of its memory options only context, batch and cache types count. Raises as
    `Planner.solve`.
    """
    memory = _memory_beside_weights(planner, request)
    free = PlanRequest(
        engine=request.engine,
        pins=request.pins,
        floors=request.floors,
        groups=request.groups,
        types=request.types,
        output_type=request.output_type,
        embedding_type=request.embedding_type,
    )
    weights = sum(t.n_weights for t in planner.losses.tensors)
    smallest, largest = _smallest_bytes(planner, free), planner.solve(replace(free, bpw=64.0)).n_bytes
    points: dict[int, Point] = {}
    low, high = 8 * smallest / weights, 8 * largest / weights
    for i in range(n):
        bpw = low * (high / low) ** (i / max(n - 1, 1)) if i else low
        plan = planner.solve(replace(free, bpw=round(bpw + 1e-4, 4)))
        points.setdefault(plan.n_bytes, _build_point(planner, plan, memory))
        progress(1)
    return sorted(points.values(), key=lambda p: p.tensor_bytes)


def _smallest_bytes(planner: Planner, request: PlanRequest) -> int:
    """Bytes of all tensors in the smallest plan, which the error of an impossible budget names."""
    try:
        return planner.solve(replace(request, bpw=1e-6)).n_bytes
    except InfeasibleBudget as fault:
        return fault.smallest


def _memory_beside_weights(planner: Planner, request: PlanRequest) -> Memory | None:
    """Cache and buffers at the request's context and batch; None where they are not known."""
    try:
        hp = read_hyperparameters(planner.source.metadata, planner.source.tensors)
        return memory_for(hp, engine_settings(hp, request.settings), reserve=0)
    except BadInput:
        return None


def _build_point(planner: Planner, plan: Plan, memory: Memory | None) -> Point:
    on_gpu = sum(c.n_bytes for c in plan.choices if c.device == "gpu")
    return Point(
        bpw=round(plan.bpw, 4),
        tensor_bytes=plan.n_bytes,
        file_bytes=total_size(output_layouts(planner.source, plan, planner.imatrix)),
        vram_bytes=None if memory is None else on_gpu + memory.total,
        predicted_loss=plan.predicted_loss or 0.0,
        gap=plan.gap or 0.0,
        ubatch=None if memory is None else memory.settings.n_ubatch,
    )


def curve_to_csv(points: list[Point], losses: Losses) -> str:
    """Return one line per point, with unit and method of its loss, under a line of names.

    A field is empty where the figure is not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*(f.name for f in fields(Point)), "loss_unit", "method"))
    how = [loss_unit(losses.method), losses.method]
    writer.writerows(["" if v is None else v for v in (*to_plain(p).values(), *how)] for p in points)
    return text.getvalue()


def curve_to_json(points: list[Point], losses: Losses) -> str:
    """Return the object with the schema requant.frontier/1."""
    head = {"schema": FRONTIER_SCHEMA, "source": losses.source, "header_sha256": losses.header_sha256}
    how = {"method": losses.method, "loss_unit": loss_unit(losses.method)}
    return dump(head | how | {"points": [to_plain(p) for p in points]})
