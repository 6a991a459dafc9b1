"""The page's table of tensors, and the data of its script: exact figures and candidates."""

from __future__ import annotations

from collections.abc import Mapping

from requant.common.units import format_size
from requant.conversion.record import Converted
from requant.errors import REMARK, brief
from requant.formats import by_name
from requant.planning.plan import Choice, Plan
from requant.report.figures import bits_per_weight
from requant.report.html import head_cells, number_cell, table, tag, text
from requant.report.view import LossCurve

COLUMNS = (
    *("tensor", "role", "layer", "shape", "source", "type", "size", "bpw", "device"),
    *("predicted loss", "predicted error", "measured error", "remark"),
)
_NUMBERS = (2, 6, 7, 9, 10, 11)  # columns that are flush right


def tensor_section(plan: Plan, written: Mapping[str, Converted]) -> str:
    """Return the filters and the table, a row for each tensor in file order."""
    rows = (_tensor_row(c, written.get(c.name), known=plan.predicted_loss is not None) for c in plan.choices)
    listed = table(head_cells(COLUMNS, _NUMBERS), rows, id="tensors", class_="data")
    scrolled = tag("div", listed, class_="scroll tall", tabindex="0", role="region", aria_label="Tensors")
    return _filter_controls(plan) + scrolled


def _filter_controls(plan: Plan) -> str:
    """Return the filters, hidden until the script runs that applies them."""
    selects = []
    for label, values in (("type", {c.type for c in plan.choices}), ("role", {c.role for c in plan.choices})):
        options = (tag("option", text(v), value=brief(v)) for v in sorted(values))
        every = tag("option", f"every {label}", value="")
        selects.append(tag("select", every, *options, id=f"of-{label}", aria_label=label))
    search = '<input type="search" id="of-name" placeholder="part of a name" aria-label="part of a name">'
    count = tag("output", id="count", aria_live="polite")
    return tag("div", search, *selects, count, class_="filters", hidden=True)


def _tensor_row(c: Choice, made: Converted | None, *, known: bool) -> str:
    cells = [
        *(text(c.role), "" if c.layer is None else str(c.layer), " &times; ".join(map(str, c.shape))),
        *(text(c.source_type), text(c.type), format_size(c.n_bytes)),
        *(f"{bits_per_weight(c.n_bytes, c.n_weights):.4g}", text(c.device)),
        *(f"{c.loss:.3g}" if known else "?", _error_figure(c.rmse) if c.rmse or c.copied else "?"),
        *("" if made is None else _error_figure(made.rmse), text("; ".join(_tensor_remarks(c, made)), REMARK)),
    ]
    name = tag("th", text(c.name), scope="row")
    return tag("tr", name, *(number_cell(x) if i in _NUMBERS else tag("td", x) for i, x in enumerate(cells, start=1)))


def _error_figure(value: float) -> str:
    return f"{value:.4f}" if value else "0"


def _tensor_remarks(c: Choice, made: Converted | None) -> list[str]:
    """Return why the tensor was copied or could not have a type, and the anomalies of its numbers."""
    odd = [] if made is None or made.odd is None else made.odd.notes(c.name)
    stayed = [c.reason] if c.reason else ["copied"] if c.copied else []
    return [*stayed, *c.notes, *odd]


def page_data(plan: Plan, written: Mapping[str, Converted], curve: LossCurve | None) -> dict[str, object]:
    """Return the data of the page's script: exact figures to sort by, candidates, points of the curve."""
    names = dict.fromkeys([c.type for c in plan.choices] + [t for losses in plan.candidates.values() for t in losses])
    formats = {name: by_name(name) for name in names}
    return {
        "types": {name: [f.block_weights, f.block_bytes] for name, f in formats.items() if f is not None},
        "tensors": [_tensor_data(plan, c, written.get(c.name)) for c in plan.choices],
        "curve": [] if curve is None else [[p.n_bytes, _round_figure(p.loss)] for p in curve.points],
    }


def _tensor_data(plan: Plan, c: Choice, made: Converted | None) -> dict[str, object]:
    return {
        "name": brief(c.name),
        "role": brief(c.role),
        "layer": c.layer,
        "type": c.type,
        "source": c.source_type,
        "weights": c.n_weights,
        "bytes": c.n_bytes,
        "loss": None if plan.predicted_loss is None else _round_figure(c.loss),
        "error": _round_figure(c.rmse),
        "measured": None if made is None else _round_figure(made.rmse),
        "candidates": {name: _round_figure(loss) for name, loss in plan.candidates.get(c.name, {}).items()},
    }


def _round_figure(value: float) -> float:
    return float(f"{value:.6g}")
