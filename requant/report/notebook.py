"""Notebook cards: a result as HTML with the figures that matter and a small chart, shown by its `_repr_html_`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from statistics import median_high

from requant.common.units import format_size
from requant.conversion.record import Conversion
from requant.conversion.verification import Verification
from requant.errors import FILE_NAME, brief
from requant.model.inspection import Inspection
from requant.model.roles import layer_of
from requant.planning.frontier import Curve
from requant.planning.plan import COPY, Choice, Plan
from requant.planning.summaries import REFERENCE_BPW, nearest_type, reference_type
from requant.report.figures import bits_per_weight, percent
from requant.report.notebook_parts import card, fact_table, figure_table, layer_chart, line_chart, stacked_bar
from requant.report.text.inspection import count_weights, name_files
from requant.report.text.result import VERDICTS
from requant.report.view import budget_bars
from requant.scoring.evaluate import Evaluation
from requant.scoring.losses import Losses, TensorLosses, loss_unit
from requant.scoring.statistics import Statistics

_MOST_FINDINGS = 20


@singledispatch
def html(result: object) -> str:
    """Return the card of a result. Raises TypeError for an object that is none."""
    raise TypeError(f"no card for a {type(result).__name__}")


@html.register
def _inspection_card(model: Inspection) -> str:
    shape = {} if model.hyperparameters is None else model.hyperparameters
    rows = [
        ("model", model.title),
        ("architecture", f"{model.arch}, {'already' if model.quantized else 'not'} quantized"),
        ("file", f"{name_files(model)}, {format_size(model.file_bytes)}, GGUF {model.version}"),
        ("weights", count_weights(model)),
        ("shape", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items() if value)),
    ]
    layers = ((layer_of(t.name), t.n_bytes, math.prod(t.shape)) for t in model.tensors)
    types = [(s.name, s.tensors, f"{s.weights:,}", format_size(s.n_bytes), f"{s.bpw:.2f}") for s in model.types]
    type_table = figure_table(("type", "tensors", "weights", "size", "bpw"), types)
    needs = ""
    if model.needs is not None:
        n = model.needs
        parts = (("weights", n.weights), ("KV cache", n.kv_cache), ("compute", n.compute))
        needs = stacked_bar(f"in VRAM, all layers, a context of {n.n_ctx}: {format_size(n.total)}", parts)
    return card("Model", fact_table(rows), _bits_chart(layers), type_table, needs, _note_table(model.warnings))


@html.register
def _losses_card(losses: Losses) -> str:
    free = [t for t in losses.tensors if t.reason is None]
    reference = reference_type(losses)
    layers: dict[int, float] = {}
    for t in free:
        if t.layer is not None:
            by_type = {c.type: c.loss for c in t.candidates}
            layers[t.layer] = layers.get(t.layer, 0.0) + by_type[nearest_type(by_type, reference)]
    chart = layer_chart(f"loss of each layer at about {REFERENCE_BPW:g} bits per weight", layers, "{:.3g}")
    rows = [
        ("source", f"{brief(losses.source, FILE_NAME)} ({losses.arch})"),
        ("method", f"{losses.method}, in {loss_unit(losses.method) or 'no unit'}"),
        ("importance", losses.imatrix),
        ("tensors", f"{len(losses.tensors)}, {len(free)} to quantize"),
    ]
    return card("Losses", fact_table(rows), chart, _role_table(free), _note_table(losses.notes))


@html.register
def _plan_card(plan: Plan) -> str:
    loss = "not known" if plan.predicted_loss is None else f"{plan.predicted_loss:.4g} {plan.loss_unit}"
    gap = f", at most {plan.gap:.1e} of it above the best there is" if plan.gap else ", the best there is"
    loss = f"none: {COPY}" if plan.is_copy else loss if plan.gap is None else loss + gap
    rows = [
        ("source", f"{brief(plan.source, FILE_NAME)} ({plan.arch})"),
        ("size", f"{format_size(plan.n_bytes)}, {plan.bpw:.3f} bits per weight"),
        ("predicted loss", loss),
        ("batch", f"{plan.budget['ubatch']} tokens at once" if "ubatch" in plan.budget else None),
        ("measured", None if plan.measured_kld is None else f"{plan.measured_kld:.4g} nats per token"),
    ]
    budgets = (
        stacked_bar(f"{bar.option} {format_size(bar.budget)}", [*bar.parts.items(), ("free", bar.free)])
        for bar in budget_bars(plan)
    )
    tables = _type_table(plan.choices), _note_table(plan.notes)
    return card("Plan", fact_table(rows), *budgets, _plan_bits_chart(plan), *tables)


@html.register
def _conversion_card(made: Conversion) -> str:
    rows = [
        ("output", made.output),
        ("size", f"{format_size(made.size)}, {made.plan.bpw:.3f} bits per weight"),
        ("importance", None if made.imatrix is None else brief(made.imatrix, FILE_NAME)),
    ]
    errors: dict[str, list[float]] = {}
    for t in made.tensors:
        if t.type != t.source_type:
            errors.setdefault(t.type, []).append(t.rmse)
    types = [
        (name, len(rmse), f"{median_high(rmse):.4f}", f"{max(rmse):.4f}")
        for name, rmse in sorted(errors.items(), key=lambda item: max(item[1]))
    ]
    error_table = figure_table(("type", "tensors", "relative error, middle", "largest"), types) if types else ""
    return card("Conversion", fact_table(rows), _plan_bits_chart(made.plan), error_table, _note_table(made.notes))


@html.register
def _evaluation_card(measured: Evaluation) -> str:
    rows: list[tuple[str, object]] = [
        ("model", measured.model),
        ("text", measured.text),
        *([("run by", measured.engine)] if measured.engine else []),
        ("scored", f"{measured.n_scored:,} tokens of {measured.n_windows} windows of {measured.n_ctx}"),
        ("perplexity", f"{measured.ppl:.4f} +- {measured.ppl_error:.4f}"),
    ]
    if measured.mean_kld is not None and measured.same_top is not None:
        rows += [
            ("base", measured.base),
            ("perplexity of the base", f"{measured.base_ppl:.4f}"),
            ("KL divergence", f"{measured.mean_kld:.6f} +- {measured.kld_error:.6f} nats per token"),
            ("99 and 99.9 %", f"{measured.p99_kld:.5f} and {measured.p999_kld:.5f} nats"),
            ("same top token", percent(measured.same_top, ".2f")),
        ]
    return card("Evaluation", fact_table(rows))


@html.register
def _verification_card(checked: Verification) -> str:
    findings = checked.findings
    rows = [
        ("output", checked.output),
        ("read", f"{checked.n_tensors} tensors, {format_size(checked.n_bytes)}"),
        ("verdict", VERDICTS[checked.verdict]),
        ("compared", "; ".join(checked.compared) or "nothing"),
        ("found", f"{len(findings)} findings" if findings else "nothing"),
    ]
    listed = figure_table(("finding",), [(finding,) for finding in findings[:_MOST_FINDINGS]]) if findings else ""
    return card("Verification", fact_table(rows), listed)


@html.register
def _statistics_card(statistics: Statistics) -> str:
    experts = sum(expert is not None for _, expert in statistics.matrices)
    rows = [
        ("tokens", f"{statistics.n_tokens:,} in windows of {statistics.n_ctx}"),
        ("matrices", f"{len(statistics.matrices)}" + (f", {experts} of them experts" if experts else "")),
    ]
    return card("Statistics", fact_table(rows))


@html.register
def _curve_card(curve: Curve) -> str:
    if not curve.points:
        return card("Frontier")
    points = [
        (p.file_bytes, p.predicted_loss, f"{format_size(p.file_bytes)}, {p.bpw:.3f} bpw: {p.predicted_loss:.4g}")
        for p in curve.points
        if p.predicted_loss > 0  # copies of everything lose nothing, which has no logarithm
    ]
    first, last = curve.points[0], curve.points[-1]
    rows = [
        ("source", brief(curve.source, FILE_NAME)),
        ("files", f"{format_size(first.file_bytes)} to {format_size(last.file_bytes)}"),
        ("predicted loss", f"{first.predicted_loss:.4g} to {last.predicted_loss:.4g} {loss_unit(curve.method)}"),
    ]
    chart = line_chart("predicted loss, logarithmic, against the bytes of the file", points)
    return card("Frontier", fact_table(rows), chart)


def _plan_bits_chart(plan: Plan) -> str:
    return _bits_chart((c.layer, c.n_bytes, c.n_weights) for c in plan.choices)


def _bits_chart(tensors: Iterable[tuple[int | None, int, int]]) -> str:
    """Return a chart with a column for each layer; tensors are (layer, bytes, weights)."""
    sums: dict[int, tuple[int, int]] = {}
    for layer, n_bytes, n_weights in tensors:
        if layer is not None:
            before = sums.get(layer, (0, 0))
            sums[layer] = before[0] + n_bytes, before[1] + n_weights
    bits = {layer: bits_per_weight(*both) for layer, both in sums.items()}
    title = f"bits per weight of each layer, {max(bits.values(), default=0):.2f} the most"
    return layer_chart(title, bits, "{:.3f} bits")


def _role_table(tensors: Sequence[TensorLosses]) -> str:
    """Return the sum of losses for each role and type, types by bits."""
    sums: dict[tuple[str, str], float] = {}
    bits: dict[str, float] = {}
    for t in tensors:
        for c in t.candidates:
            sums[t.role, c.type] = sums.get((t.role, c.type), 0.0) + c.loss
            bits.setdefault(c.type, bits_per_weight(c.n_bytes, t.n_weights))
    types = sorted(bits, key=lambda name: (bits[name], name))
    roles = dict.fromkeys(t.role for t in tensors)
    rows = [[role, *(f"{sums[role, name]:.3g}" if (role, name) in sums else "-" for name in types)] for role in roles]
    return figure_table(["role", *types], rows)


def _type_table(choices: Sequence[Choice]) -> str:
    """Return tensors, bits, bytes and predicted loss of each type, types by bits."""
    rows = []
    for name in {c.type for c in choices}:
        group = [c for c in choices if c.type == name]
        n_bytes = sum(c.n_bytes for c in group)
        bpw = bits_per_weight(n_bytes, sum(c.n_weights for c in group))
        loss = f"{sum(c.loss for c in group):.3g}"
        rows.append((bpw, name, (name, len(group), f"{bpw:.2f}", format_size(n_bytes), loss)))
    return figure_table(("type", "tensors", "bpw", "size", "predicted loss"), [row for *_, row in sorted(rows)])


def _note_table(notes: Iterable[str]) -> str:
    return fact_table(("note", note) for note in notes)
