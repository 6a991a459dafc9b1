"""The whole curve of loss against bytes from one scoring, as numbers for a table or a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from requant.common.notebook import html
from requant.common.serialization import dump, to_plain
from requant.container.imatrix import Imatrix
from requant.container.source import Source
from requant.container.splitting import total_size
from requant.errors import BadInput, InfeasibleBudget
from requant.model.engine_settings import engine_settings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import memory_for
from requant.planning.best_plan import best_plan
from requant.planning.output_layout import output_layouts
from requant.planning.plan import Plan
from requant.planning.request import PlanRequest
from requant.scoring.losses import Losses

FRONTIER_SCHEMA = "requant.frontier/1"
N_POINTS = 40


@dataclass(frozen=True, slots=True)
class Point:
    """The best plan of at most so many bits per weight: its size, the VRAM it needs without a reserve, its loss.

    `vram_bytes` counts cache and buffers at the request' context, with all layers on the GPU; None where that is not
    known for the architecture. `predicted_loss` is in the losses' unit, nats per token if they are from gradients.
    """

    bpw: float
    tensor_bytes: int
    file_bytes: int
    vram_bytes: int | None
    predicted_loss: float
    gap: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Plans for one source from the smallest to the largest; losses in the unit of the `method` they were found by."""

    source: str
    method: str
    points: tuple[Point, ...]

    def _repr_html_(self) -> str:
        return html(self)


def compute_frontier(
    source: Source,
    losses: Losses,
    request: PlanRequest,
    *,
    n: int = N_POINTS,
    imatrix: Imatrix | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Point]:
    """Up to `n` different plans from the smallest to the largest, equally spaced in bytes on a logarithmic scale.

    All that `request` say of types holds; what they say of VRAM gives the context. Raises what `best_plan` does.
    """
    beside = _beside(source, request)
    free = PlanRequest(
        engine=request.engine,
        pins=request.pins,
        floors=request.floors,
        groups=request.groups,
        types=request.types,
        output_type=request.output_type,
        embedding_type=request.embedding_type,
    )
    weights = sum(t.n_weights for t in losses.tensors)
    largest = best_plan(source, losses, replace(free, bpw=64.0), imatrix=imatrix)
    smallest = _smallest(source, losses, free, weights, imatrix)
    points: dict[int, Point] = {}
    low, high = 8 * smallest / weights, 8 * largest.n_bytes / weights
    for i in range(n):
        bpw = low * (high / low) ** (i / max(n - 1, 1)) if i else low
        plan = best_plan(source, losses, replace(free, bpw=round(bpw + 1e-4, 4)), imatrix=imatrix)
        points.setdefault(plan.n_bytes, _point(source, plan, imatrix, beside))
        progress(1)
    return sorted(points.values(), key=lambda p: p.tensor_bytes)


def _smallest(source: Source, losses: Losses, request: PlanRequest, weights: int, imatrix: Imatrix | None) -> int:
    """Bytes of all tensors in the smallest plan, which the error of an impossible budget names."""
    try:
        return best_plan(source, losses, replace(request, bpw=1e-6), imatrix=imatrix).n_bytes
    except InfeasibleBudget as fault:
        return fault.smallest


def _beside(source: Source, request: PlanRequest) -> int | None:
    try:
        hp = read_hyperparameters(source.metadata, source.tensors)
        memory = memory_for(hp, engine_settings(hp, request.settings), reserve=0)
    except BadInput:
        return None
    return memory.kv_cache + memory.compute


def _point(source: Source, plan: Plan, imatrix: Imatrix | None, beside: int | None) -> Point:
    on_gpu = sum(c.n_bytes for c in plan.choices if c.device == "gpu")
    return Point(
        bpw=round(plan.bpw, 4),
        tensor_bytes=plan.n_bytes,
        file_bytes=total_size(output_layouts(source, plan, imatrix)),
        vram_bytes=None if beside is None else on_gpu + beside,
        predicted_loss=plan.predicted_loss or 0.0,
        gap=plan.gap or 0.0,
    )


def curve_to_csv(points: list[Point]) -> str:
    """One line per point under a line of names; empty where a figure is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.name for f in fields(Point))
    writer.writerows(["" if v is None else v for v in to_plain(p).values()] for p in points)
    return text.getvalue()


def curve_to_json(points: list[Point], losses: Losses) -> str:
    """The object with the schema requant.frontier/1."""
    head = {"schema": FRONTIER_SCHEMA, "source": losses.source, "header_sha256": losses.header_sha256}
    return dump(head | {"method": losses.method, "points": [to_plain(p) for p in points]})
