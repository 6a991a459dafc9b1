"""How two plans, two models, or a plan and a model differ, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from requant.container.source import open_source
from requant.conversion import OUTPUT_SCHEMA, read_any_plan
from requant.errors import FILE_NAME, brief
from requant.plan import PLAN_SCHEMA
from requant.records import dump, plain
from requant.report.grid import grid
from requant.report.table import loss_unit
from requant.textfile import has_schema
from requant.units import format_size

SCHEMA = "requant.diff/1"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: tensor -> (type, bytes), and the predicted loss where it is a plan."""

    name: str
    tensors: Mapping[str, tuple[str, int]]
    predicted_loss: float | None
    method: str | None = None  # that predicted it


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that differs; None where one side lacks it."""

    name: str
    type_a: str | None
    type_b: str | None
    bytes_a: int
    bytes_b: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Two sides by name, their bytes and predicted losses, and what differs."""

    a: str
    b: str
    bytes_a: int
    bytes_b: int
    loss_a: float | None
    loss_b: float | None
    method_a: str | None  # what predicted the loss
    method_b: str | None
    n_equal: int
    changes: tuple[Change, ...]

    def to_json(self) -> str:
        """The object that --json prints."""
        return dump({"schema": SCHEMA} | plain(self))


def read_side(path: Path) -> Side:
    """The plan, the record of a conversion, or the GGUF at `path`. Raises BadInput, InputOutputError."""
    if has_schema(path, PLAN_SCHEMA) or has_schema(path, OUTPUT_SCHEMA):
        plan = read_any_plan(path)
        return Side(path.name, {c.name: (c.type, c.n_bytes) for c in plan.choices}, plan.predicted_loss, plan.method)
    with open_source(path) as source:
        return Side(path.name, {t.name: (t.format.name, t.n_bytes) for t in source.tensors}, None)


def difference(a: Side, b: Side) -> Difference:
    """What differs from `a` to `b`, in the order of `a`."""
    changes = []
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        (type_a, bytes_a), (type_b, bytes_b) = a.tensors.get(name, (None, 0)), b.tensors.get(name, (None, 0))
        if type_a != type_b:
            changes.append(Change(name, type_a, type_b, bytes_a, bytes_b))
    total_a, total_b = (sum(n for _, n in side.tensors.values()) for side in (a, b))
    equal = len(a.tensors.keys() | b.tensors.keys()) - len(changes)
    losses = a.predicted_loss, b.predicted_loss, a.method, b.method
    return Difference(a.name, b.name, total_a, total_b, *losses, n_equal=equal, changes=tuple(changes))


def difference_text(found: Difference) -> str:
    """A line per tensor that differs, then the sums."""
    rows = [["tensor", "A", "B", "bytes"]]
    for c in found.changes:
        more = f"{c.bytes_b - c.bytes_a:+,}"
        rows.append([brief(c.name), c.type_a or "-", c.type_b or "-", more])
    lines = [*grid(rows, right=(3,)), ""] if found.changes else []
    lines.append(f"{len(found.changes)} tensors differ, {found.n_equal} are alike")
    for label, name, size, loss, method in (
        ("A", found.a, found.bytes_a, found.loss_a, found.method_a),
        ("B", found.b, found.bytes_b, found.loss_b, found.method_b),
    ):
        predicted = "" if loss is None else f", predicted loss {loss:.5g} {loss_unit(method)} ({brief(method or '')})"
        lines.append(f"{label} {brief(name, FILE_NAME)}: {format_size(size)}{predicted}")
    return "\n".join(lines)
