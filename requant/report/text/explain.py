"""The explanation of one tensor's choice, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from requant.common.serialization import dump, to_plain
from requant.common.units import format_size
from requant.errors import REMARK, brief
from requant.planning.explain import Explanation, Outlook
from requant.planning.plan import Plan
from requant.report.figures import loss_heading
from requant.report.text.grid import grid


def explanation_text(explanation: Explanation, plan: Plan, outlooks: Sequence[Outlook]) -> str:
    """Return the tensor's candidates with the loss of the best plan for each, then the outlook of each limit."""
    c = explanation.choice
    shape = " x ".join(map(str, c.shape))
    head = f"{brief(c.name)}: {c.type}, {format_size(c.n_bytes)}, {shape}, on the {c.device}"
    if not explanation.alternatives:
        return f"{head}\nit stays as it is: {brief(c.reason or '', REMARK)}"
    headings = (loss_heading(what, plan.loss_unit) for what in ("its loss", "best plan with it"))
    rows = [["", "type", "size", *headings, "costs"]]
    for a in explanation.alternatives:
        rows.append(
            [
                "*" if a.chosen else "",
                a.type,
                format_size(a.n_bytes),
                f"{a.loss:.3g}",
                "does not fit" if a.plan_loss is None else f"{a.plan_loss:.5g}",
                "" if a.plan_loss is None or a.chosen else _relative_change(a.plan_loss, plan.predicted_loss),
            ]
        )
    notes = "\n".join(brief(note, REMARK) for note in c.notes)
    parts = [head, "\n".join(grid(rows, right=(2, 3, 4, 5))), notes, _outlook_text(plan, outlooks)]
    return "\n\n".join(filter(None, parts))


def explanation_json(explanation: Explanation, plan: Plan, outlooks: Sequence[Outlook]) -> str:
    """Return the explanation as JSON, schema requant.explanation/1."""
    head = {"schema": "requant.explanation/1", "predicted_loss": plan.predicted_loss}
    head["loss_unit"] = plan.loss_unit
    return dump(head | to_plain(explanation) | {"limits": to_plain(outlooks)})


def _outlook_text(plan: Plan, outlooks: Sequence[Outlook]) -> str:
    """Return for each limit its free bytes and the loss that more of it would give."""
    lines = []
    for o in outlooks:
        bought = "no plan"
        if o.value is not None:
            change = _relative_change(o.value, plan.predicted_loss)
            bought = f"a loss of {o.value:.5g} {plan.loss_unit} ({change})"
        lines.append(f"{o.option} has {format_size(o.free)} free; {format_size(o.more)} more would buy {bought}")
    if plan.predicted_loss == 0:
        lines.append("nothing limits the plan: every tensor is a copy")
    return "\n".join(lines)


def _relative_change(value: float, base: float | None) -> str:
    return f"{100 * (value / base - 1):+.2f} %" if base else f"{value:+.3g}"
