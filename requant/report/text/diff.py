"""Differences of two plans, two models, or a plan and a model, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from requant.common.atomic_write import has_schema
from requant.common.serialization import dump, to_plain
from requant.common.units import format_size
from requant.container.source import open_source
from requant.conversion.record import OUTPUT_SCHEMA, read_any_plan
from requant.errors import FILE_NAME, brief
from requant.planning.plan import COPY, PLAN_SCHEMA
from requant.report.text.grid import grid
from requant.scoring.losses import NATS, UNSCORED, loss_unit

SCHEMA = "requant.diff/1"
_FOREIGN = 10  # most tensors of another model that are listed


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: tensor -> (type, bytes, shape); of a plan its predicted loss and the method."""

    name: str
    tensors: Mapping[str, tuple[str, int, tuple[int, ...]]]
    predicted_loss: float | None
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that differs; its type is None on a side that lacks it."""

    name: str
    type_a: str | None
    type_b: str | None
    bytes_a: int
    bytes_b: int
    reshaped: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """Two sides by name, their bytes, predicted losses and changes."""

    a: str
    b: str
    bytes_a: int
    bytes_b: int
    loss_a: float | None
    loss_b: float | None
    method_a: str | None  # of loss_a
    method_b: str | None
    n_equal: int
    n_one_sided: int  # tensors that one side lacks
    n_reshaped: int  # tensors of both, in other shapes
    changes: tuple[Change, ...]

    @property
    def losses_compare(self) -> bool | None:
        """Return whether the losses are in nats, or by one method; None unless both sides have one that was scored."""
        if self.loss_a is None or self.loss_b is None or UNSCORED in (self.method_a, self.method_b):
            return None
        in_nats = loss_unit(self.method_a) == loss_unit(self.method_b) == NATS
        return in_nats or self.method_a == self.method_b

    def to_json(self) -> str:
        """Return the object that --json prints."""
        units = {"loss_unit_a": loss_unit(self.method_a), "loss_unit_b": loss_unit(self.method_b)}
        return dump({"schema": SCHEMA} | to_plain(self) | units | {"losses_compare": self.losses_compare})


def read_side(path: Path) -> Side:
    """Read the plan, the record of a conversion, or the GGUF at `path`. Raises BadInput, InputOutputError."""
    if has_schema(path, PLAN_SCHEMA) or has_schema(path, OUTPUT_SCHEMA):
        plan = read_any_plan(path)
        tensors = {c.name: (c.type, c.n_bytes, c.shape) for c in plan.choices}
        return Side(path.name, tensors, plan.predicted_loss, plan.method)
    with open_source(path) as source:
        return Side(path.name, {t.name: (t.format.name, t.n_bytes, t.shape) for t in source.tensors}, None)


def compare_sides(a: Side, b: Side) -> Difference:
    """Return the changes from `a` to `b`, in the order of `a`."""
    changes, none = [], (None, 0, ())
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        (type_a, bytes_a, shape_a), (type_b, bytes_b, shape_b) = a.tensors.get(name, none), b.tensors.get(name, none)
        if (type_a, shape_a) != (type_b, shape_b):
            reshaped = type_a is not None and type_b is not None and shape_a != shape_b
            changes.append(Change(name, type_a, type_b, bytes_a, bytes_b, reshaped))
    total_a, total_b = (sum(n for _, n, _ in side.tensors.values()) for side in (a, b))
    return Difference(
        *(a.name, b.name, total_a, total_b, a.predicted_loss, b.predicted_loss, a.method, b.method),
        n_equal=len(a.tensors.keys() | b.tensors.keys()) - len(changes),
        n_one_sided=len(a.tensors.keys() ^ b.tensors.keys()),
        n_reshaped=sum(c.reshaped for c in changes),
        changes=tuple(changes),
    )


def difference_text(diff: Difference) -> str:
    """Return whether both are one model, a line for each changed tensor, and the sums."""
    rows = [["tensor", "A", "B", "bytes"]]
    n_foreign = diff.n_one_sided + diff.n_reshaped
    head = []
    if n_foreign:
        counts = f"{diff.n_one_sided} of {len(diff.changes) + diff.n_equal} tensors are only in one of the two"
        unlisted = "; they are not listed" if n_foreign > _FOREIGN else ""
        head = [f"{counts}, {diff.n_reshaped} have other shapes{unlisted}", ""]
    for c in diff.changes:
        if n_foreign <= _FOREIGN or not (c.reshaped or None in (c.type_a, c.type_b)):
            rows.append([brief(c.name), c.type_a or "-", c.type_b or "-", f"{c.bytes_b - c.bytes_a:+,}"])
    lines = [*head, *grid(rows, right=(3,)), ""] if len(rows) > 1 else head
    lines.append(f"{len(diff.changes)} tensors differ, {diff.n_equal} are alike")
    for label, name, size, loss, method in (
        ("A", diff.a, diff.bytes_a, diff.loss_a, diff.method_a),
        ("B", diff.b, diff.bytes_b, diff.loss_b, diff.method_b),
    ):
        predicted = "" if loss is None else f", predicted loss {loss:.5g} {loss_unit(method)} ({brief(method or '')})"
        predicted = f", no loss: {COPY}" if method == UNSCORED and loss is not None else predicted
        lines.append(f"{label} {brief(name, FILE_NAME)}: {format_size(size)}{predicted}")
    if diff.losses_compare is False:
        lines.append("the predicted losses do not compare: they are by different methods, in units of their own")
    return "\n".join(lines)
