"""Plans and losses as text: tables that fit a width in characters. Names from files are escaped."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from requant.common.units import format_budget, format_size
from requant.errors import FILE_NAME, REMARK, brief
from requant.formats import Effort, by_bits, format_of
from requant.planning.constraints import Limit, name_part
from requant.planning.plan import COPY, EDITED, Plan
from requant.report.figures import count_tensors, loss_heading, percent, reason_lines
from requant.report.text.grid import GAP, WIDTH, display_width, fit_grid, grid, label_lines
from requant.report.view import budget_bar
from requant.scoring.losses import POINTS, Losses, TensorLosses, loss_unit

_POINTS = "points compare types and plans of this file with each other; they are no KL divergence"
_NAMED = 3  # tensors named beside a reason that several share


def plan_table(plan: Plan, width: int = WIDTH) -> str:
    """Return the types by layer and role, the share of each type, and the summary."""
    return "\n\n".join(filter(None, (layer_table(plan, width), type_table(plan), summary(plan, width))))


def plans_table(plans: Sequence[Plan], vrams: Sequence[int], width: int = WIDTH) -> str:
    """Return a line for each VRAM budget: weights, bits, predicted loss, batch, gap, context, cache, GPU layers."""
    loss = loss_heading("loss", plans[0].loss_unit)
    rows = [["--vram", "weights", "bits/weight", loss, "-ub", "gap", "tokens", "K/V cache", "GPU layers", "tokens/s"]]
    for plan, vram in zip(plans, vrams, strict=True):
        asked, ns = plan.budget, plan.ns_per_token
        rows.append(
            [
                format_size(vram),
                format_size(plan.n_bytes),
                f"{plan.bpw:.3f}",
                f"{plan.total_loss:.4g}",
                str(asked.get("ubatch", "")),
                "?" if plan.gap is None else percent(plan.gap, ".2g"),
                str(asked.get("ctx", "")),
                f"{asked.get('cache_type_k')}/{asked.get('cache_type_v')}".lower(),
                "all" if plan.runtime.get("all_layers") else str(plan.runtime.get("n_gpu_layers", "")),
                "" if ns is None else _rate(ns),
            ]
        )
    return "\n".join(fit_grid(rows, width, right=(0, 1, 2, 3, 4, 5, 6, 8, 9), spare=(7, 5, 9, 8)))


def layer_table(plan: Plan, width: int = WIDTH) -> str:
    """Return the types by layer and role; equal neighbours share a row, roles beyond `width` are in further tables.

    A `*` marks a copy. Tensors that are not quantized are left to the summary.
    """
    cells: dict[tuple[int | None, str], list[str]] = {}
    for c in plan.choices:
        if c.reason is None:
            types = cells.setdefault((c.layer, c.role), [])
            types.extend([mark] if (mark := c.type + "*" * c.copied) not in types else [])
    outside = [[brief(role), "/".join(types)] for (layer, role), types in cells.items() if layer is None]
    roles = list(dict.fromkeys(role for layer, role in cells if layer is not None))
    layers = sorted({layer for layer, _ in cells if layer is not None})
    rows = [["/".join(cells.get((layer, role), ["-"])) for role in roles] for layer in layers]
    tables = _split_table([brief(r) for r in roles], _merge_equal_layers(layers, rows), width)
    copied = any(c.copied and c.reason is None for c in plan.choices)
    parts = ["\n".join(grid(outside)), *tables, "* copied from the source" if copied else ""]
    return "\n\n".join(filter(None, parts))


def type_table(plan: Plan) -> str:
    """Return tensors, share of the weights, bytes and share of the predicted loss of each type."""
    total = plan.predicted_loss
    rows = [["type", "bits/weight", "tensors", "weights", "size", "loss"]]
    for name in sorted({c.type for c in plan.choices}, key=by_bits):
        found = [c for c in plan.choices if c.type == name]
        share = sum(c.n_weights for c in found) / max(plan.n_weights, 1)
        loss = "?" if total is None else percent(math.fsum(c.loss for c in found) / total if total else 0.0)
        size = format_size(sum(c.n_bytes for c in found))
        rows.append([name, f"{format_of(name).bpw:.2f}", str(len(found)), percent(share), size, loss])
    loss = "?" if total is None else percent(total > 0)
    rows.append(["all", f"{plan.bpw:.2f}", str(len(plan.choices)), percent(1), format_size(plan.n_bytes), loss])
    return "\n".join(grid(rows, right=(1, 2, 3, 4, 5)))


def summary(plan: Plan, width: int = WIDTH) -> str:
    """Return size, predicted loss, gap, the parts of each limit, and reasons of tensors and types left out."""
    copied = sum(c.copied for c in plan.choices)
    lines = [
        ("source", f"{brief(plan.source, FILE_NAME)} ({brief(plan.arch)})"),
        ("tensors", f"{len(plan.choices)}: {len(plan.choices) - copied} quantized, {copied} copied"),
        ("size", f"{format_size(plan.n_bytes)} of tensors, {plan.bpw:.3f} bits per weight"),
        ("loss", _loss_figures(plan)),
        *([("batch", f"{plan.budget['ubatch']} tokens at once")] if "ubatch" in plan.budget else []),
        *([] if plan.effort == Effort.DEFAULT else [("effort", plan.effort.name.lower())]),
        *(
            []
            if plan.compensation is None
            else [("rounding", f"compensated ({plan.compensation}); the loss is that of plain rounding")]
        ),
        *((brief(limit.option), _limit_figures(plan, limit)) for limit in plan.limits),
        *_device_lines(plan),
        *(("stays", line) for line in _reasons((c.reason, c.name) for c in plan.choices if c.reason is not None)),
        *(("fallback", line) for line in _reasons((note, c.name) for c in plan.choices for note in c.notes)),
        *(("note", brief(note, REMARK)) for note in plan.notes),
    ]
    return "\n".join(label_lines(lines, width))


def losses_table(losses: Losses, width: int = WIDTH) -> str:
    """Return the loss of each role at each type, and reasons of tensors and types left out."""
    free = [t for t in losses.tensors if t.reason is None]
    types = sorted({c.type for t in free for c in t.candidates}, key=by_bits)
    sums: dict[tuple[str, str], list[float]] = {}
    for t in free:
        for c in t.candidates:
            for role in (t.role, ""):
                sums.setdefault((role, c.type), []).append(c.loss)
    counts = Counter(t.role for t in free) | Counter({"": len(free)})
    rows = []
    for role in (*dict.fromkeys(t.role for t in free), ""):
        cells = [_role_loss(sums.get((role, name), []), counts[role]) for name in types]
        rows.append((f"{brief(role) or 'all'} ({counts[role]})", cells))
    partial = any(cell.endswith("+") for _, cells in rows for cell in cells)
    imatrix = f", importance from {brief(losses.imatrix, FILE_NAME)}" if losses.imatrix else ", no importance matrix"
    lines = [
        ("source", f"{brief(losses.source, FILE_NAME)} ({brief(losses.arch)})"),
        ("method", f"{brief(losses.method, REMARK)}{imatrix}; tensors {len(losses.tensors)}, {len(free)} to quantize"),
        *([("unit", _POINTS)] if loss_unit(losses.method) == POINTS else []),
        *(("stays", line) for line in _reasons((t.reason, t.name) for t in losses.tensors if t.reason is not None)),
        *(("left out", line) for line in _reasons(_skip_reasons(free))),
        *(("note", brief(note, REMARK)) for note in losses.notes),
    ]
    unit = loss_unit(losses.method)
    title = f"predicted loss{'' if unit is None else f', in {unit},'} if every tensor of a role had the type"
    tables = ["\n".join(textwrap.wrap(title, max(width, 20))), *_split_table(types, rows, width)] if free else []
    legend = ["+ not every tensor of the role can have the type"] if partial else []
    return "\n\n".join([*tables, *legend, "\n".join(label_lines(lines, width))])


def _role_loss(losses: Sequence[float], n_tensors: int) -> str:
    return "-" if not losses else f"{math.fsum(losses):.3g}" + "+" * (len(losses) < n_tensors)


def _loss_figures(plan: Plan) -> str:
    if plan.is_copy:
        return f"no loss: {COPY}" + (f"; of the KV cache {plan.cache_loss:.4g}" if plan.cache_loss else "")
    if plan.predicted_loss is None:
        edited = EDITED in plan.notes
        return "not known, the plan was edited" if edited else f"not measured ({brief(plan.method, REMARK)})"
    gap = "not known" if plan.gap is None else percent(plan.gap, ".2g")
    what, more = ("predicted KL", "") if plan.predicted_kl is not None else ("predicted", ", no KL divergence")
    loss = f"{what} {plan.predicted_loss:.4g} {plan.loss_unit}{more} ({brief(plan.method, REMARK)})"
    if plan.cache_loss:
        loss = f"{loss}, and of the KV cache {plan.cache_loss:.4g}"
    measured = "" if plan.measured_kld is None else f", measured {plan.measured_kld:.4g} nats on held-out text"
    return f"{loss}{measured}; proven gap {gap} ({brief(plan.solver, REMARK)})"


def _limit_figures(plan: Plan, limit: Limit) -> str:
    used = plan.used(limit)
    if limit.unit != "bytes":
        return f"{plan.show(limit, used)} of {plan.show(limit, limit.budget)}"
    if limit.n_weights:
        return f"{8 * used / limit.n_weights:.4f} of {limit.bpw:.4f} bits per weight"
    filled = budget_bar(plan, limit)
    listed = ", ".join(f"{brief(name_part(name, limit))} {format_size(n)}" for name, n in filled.parts.items())
    return f"{format_size(used)} of {format_budget(limit.budget)}, {format_size(filled.free)} free: {listed}"


def _device_lines(plan: Plan) -> list[tuple[str, str]]:
    if "n_gpu_layers" not in plan.runtime:
        return []
    sizes = []
    for device in ("gpu", "cpu"):
        if held := [c for c in plan.choices if c.device == device]:
            sizes.append(f"{device} {format_size(sum(c.n_bytes for c in held))} in {count_tensors(held)}")
    n = plan.runtime["n_gpu_layers"]
    layers = "all layers" if plan.runtime.get("all_layers") else f"{n or 'no'} layer{'s' * (n != 1)}"
    lines = [("devices", f"{layers} on the GPU; {', '.join(sizes)}")]
    if experts := plan.runtime.get("experts_on_cpu"):
        lines.append(("", f"experts of {len(experts)} layers on the CPU: {', '.join(map(str, experts))}"))
        lines += [("", line) for line in _expert_sensitivities(plan, set(experts))]
    if (ns := plan.ns_per_token) is not None:
        lines.append(("speed", f"{_rate(ns)} tokens/s predicted, at a full context"))
    return lines


def _rate(ns: int) -> str:
    """Return tokens per second in at most four digits, being a prediction."""
    rate = 1e9 / max(ns, 1)
    return f"{rate:.1f}" if rate < 1000 else f"{float(f'{rate:.3g}'):.0f}"


def _expert_sensitivities(plan: Plan, on_cpu: set[int]) -> list[str]:
    """Return a line with the mean sensitivity of the layers on either device, if both have layers."""
    found = [(s.layer in on_cpu, s.sensitivity) for s in plan.layers if s.layer is not None and s.sensitivity]
    sides = [[x for there, x in found if there == side] for side in (False, True)]
    if not all(sides):
        return []
    others, left = (math.fsum(x) / len(x) for x in sides)
    what = f"sensitivity at {plan.runtime.get('reference_type')}, in {plan.loss_unit}"
    return [f"{what}: {left:.3g} a layer of these, {others:.3g} of the others"]


def _skip_reasons(tensors: Iterable[TensorLosses]) -> Iterable[tuple[str, str]]:
    for tensor in tensors:
        for reason in dict.fromkeys(tensor.skipped.values()):
            types = ", ".join(name for name, why in tensor.skipped.items() if why == reason)
            yield f"no {types}: {reason}", tensor.name


def _reasons(pairs: Iterable[tuple[str | None, str]]) -> list[str]:
    return reason_lines(pairs, _NAMED, frequent_first=True)


def _merge_equal_layers(layers: Sequence[int], rows: Sequence[list[str]]) -> list[tuple[str, list[str]]]:
    """Return rows labelled by layer, equal rows of consecutive layers in one: `0-3`."""
    merged: list[tuple[int, int, list[str]]] = []
    for layer, row in zip(layers, rows, strict=True):
        if merged and merged[-1][1] == layer - 1 and merged[-1][2] == row:
            merged[-1] = (merged[-1][0], layer, row)
        else:
            merged.append((layer, layer, row))
    return [(str(a) if a == b else f"{a}-{b}", row) for a, b, row in merged]


def _split_table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int) -> list[str]:
    """Return tables of labelled rows, each of as many columns as fit `width` and at least one."""
    label = max((display_width(name) for name, _ in rows), default=0)
    sizes = [
        max(display_width(head), *(display_width(row[k]) for _, row in rows)) if rows else 0
        for k, head in enumerate(heads)
    ]
    tables, start = [], 0
    while start < len(heads):
        end, used = start + 1, label + len(GAP) + sizes[start]
        while end < len(heads) and used + len(GAP) + sizes[end] <= width:
            used += len(GAP) + sizes[end]
            end += 1
        lines = [["", *heads[start:end]], *([name, *row[start:end]] for name, row in rows)]
        tables.append("\n".join(grid(lines)))
        start = end
    return tables
