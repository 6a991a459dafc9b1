"""Parts of a model card that come from one plan: budget, types, memory, method."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from requant.common.units import format_budget, format_size, size_label
from requant.conversion.record import Conversion
from requant.errors import FILE_NAME
from requant.formats import Effort, by_bits
from requant.planning.constraints import Limit
from requant.planning.plan import COPY, Choice, Plan
from requant.report.card import markdown as md
from requant.report.figures import bits_per_weight, describe_compensation, percent
from requant.report.view import PART_NAMES, budget_bars
from requant.scoring.losses import NATS

_LEAST_SHARE = 0.01  # of the weights; types of less are not listed
_PARTS = PART_NAMES | {"copies": "copies of matrices on the CPU"}
_UNITS = ((1e9, "GB", 2**30, "GiB"), (1e6, "MB", 2**20, "MiB"), (1e3, "kB", 2**10, "KiB"))


def format_both_units(n_bytes: int) -> str:
    """Return a size in powers of ten and of two: `4.92 GB (4.58 GiB)`."""
    for ten, decimal, two, binary in _UNITS:
        if n_bytes >= ten:
            return f"{n_bytes / ten:.2f} {decimal} ({n_bytes / two:.2f} {binary})"
    return f"{n_bytes} B"


def describe_budget(plan: Plan) -> str:
    """Return the budgets in words, with the context after the first; without a budget, the method."""
    parts = [_describe_limit(plan, limit) for limit in plan.limits]
    budget = plan.budget
    if "ctx" in budget:
        context = f"{budget['ctx']} tokens of context"
        caches = [str(budget.get(f"cache_type_{x}", "F16")) for x in "kv"]
        if caches != ["F16", "F16"]:
            context += f" in {'/'.join(caches)}"
        if budget.get("parallel", 1) != 1:
            context += f", {budget['parallel']} sequences"
        parts.insert(1, context)
    return md.text(", ".join(parts) or plan.method)


def _describe_limit(plan: Plan, limit: Limit) -> str:
    if limit.unit == "ns":
        return f"at least {plan.show(limit, limit.budget)}"
    if limit.unit == "loss":
        return f"predicted loss up to {plan.show(limit, limit.budget)}"
    if limit.n_weights:
        return f"{limit.bpw:g} bits per weight"
    exact = re.fullmatch(r"(\d+)([MG]iB)", size_label(limit.budget))
    size = f"{exact[1]} {exact[2]}" if exact else format_both_units(limit.budget)
    return {"--vram": f"{size} of VRAM", "--ram": f"{size} of RAM"}.get(limit.option, f"file of up to {size}")


def type_shares(plan: Plan) -> str:
    """Return the types with their shares of the weights, the largest first."""
    weights: Counter[str] = Counter()
    for c in plan.choices:
        weights[c.type] += c.n_weights
    total = max(plan.n_weights, 1)
    found = [(n / total, name) for name, n in weights.most_common()]
    return ", ".join(f"{name} {percent(share, '.0f')}" for share, name in found if share >= _LEAST_SHARE)


def roles_table(plan: Plan) -> str:
    """Return tensors, types, bits per weight, bytes and predicted loss, if known, of each role."""
    groups: dict[str, list[Choice]] = {}
    for c in plan.choices:
        groups.setdefault(c.role if c.reason is None else "", []).append(c)
    left = groups.pop("", [])
    known = plan.predicted_kl is not None
    rows = [_role_row(md.code(role), found, known) for role, found in groups.items()]
    rows += [_role_row("left as they are", left, known)] if left else []
    rows.append(_role_row("all", plan.choices, known))
    head = ["Role", "Tensors", "Types", "Bits per weight", "Size", *(["KL, predicted"] if known else [])]
    return md.table(head, rows, (1, 3, 4, 5))


def _role_row(role: str, choices: Sequence[Choice], known: bool) -> list[str]:
    counts = Counter(c.type for c in choices)
    listed = ", ".join(f"{name} \u00d7 {n}" for name, n in sorted(counts.items(), key=lambda i: by_bits(i[0])))
    n_bytes = sum(c.n_bytes for c in choices)
    bpw = bits_per_weight(n_bytes, sum(c.n_weights for c in choices))
    loss = [f"{math.fsum(c.loss for c in choices):.3g}"] if known else []
    return [role, str(len(choices)), listed, f"{bpw:.3f}", format_size(n_bytes), *loss]


def budget_lines(plan: Plan) -> str:
    """Return the parts of each budget in bytes, a line each."""
    lines = []
    for bar in budget_bars(plan):
        parts = ", ".join(f"{md.text(_PARTS.get(name, name))} {format_size(n)}" for name, n in bar.parts.items())
        used, free = format_size(bar.budget - bar.free), format_size(bar.free)
        lines.append(f"- {md.code(bar.option)} {format_budget(bar.budget)}: {used} used ({parts}), {free} free")
    return "\n".join(lines)


def mixtures_table(outputs: Sequence[tuple[str, Plan]]) -> str:
    """Return outputs of one source and llama-quantize's mixtures of it by rising size; '' without comparable losses."""
    plans = [(name, p) for name, p in outputs if p.mixtures and p.predicted_loss is not None and p.loss_unit == NATS]
    if not plans:
        return ""
    first = plans[0][1]
    rows = [(p.n_bytes, p.predicted_loss or 0.0, f"**{md.code(name, FILE_NAME)}**") for name, p in plans]
    rows += [(m.n_bytes, m.loss, f"{md.text(m.name)}, of llama-quantize") for m in first.mixtures]
    table = [
        [name, format_both_units(n_bytes), f"{bits_per_weight(n_bytes, first.n_weights):.3f}", f"{loss:.4g}"]
        for n_bytes, loss, name in sorted(rows)
    ]
    return md.table(["", "Size", "Bits per weight", "KL, predicted"], table, (1, 2, 3))


def method_lines(made: Conversion) -> str:
    """Return how the types were chosen and the weights encoded, a line each."""
    plan = made.plan
    solver = f"; {md.text(plan.solver)}" if plan.solver else ""
    gap = "" if plan.gap is None else f", proven gap {plan.gap:.1e}" if plan.gap else ", proven gap 0"
    lines = [f"No loss: {COPY}." if plan.is_copy else f"Method: {md.text(plan.method)}{solver}{gap}."]
    if made.imatrix is not None:
        lines.append(f"Columns were weighed by importance from {md.code(made.imatrix, FILE_NAME)}.")
    if plan.effort != Effort.DEFAULT:
        lines.append(f"Effort of the encoders: {plan.effort.name.lower()}.")
    if plan.compensation is not None:
        lines.append(f"{md.text(describe_compensation(made))}.")
    if plan.measured_kld is not None:
        lines.append(f"KL divergence measured on held-out text while planning: {plan.measured_kld:.4g} nats per token.")
    lines += [f"{md.text(note[:1].upper() + note[1:])}." for note in (*plan.notes, *made.notes)]
    return "\n".join(f"- {line}" for line in lines)
