"""What a notebook shows of a result, as HTML: the figures that matter, and a small picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

from requant.common.units import format_size
from requant.conversion.record import Conversion
from requant.conversion.verify import Verification
from requant.errors import FILE_NAME, brief
from requant.model.inspection import Inspection
from requant.planning.frontier import Curve
from requant.planning.plan import Plan
from requant.report.html import card, columns, facts, line, stack, table
from requant.scoring.evaluate import Evaluation
from requant.scoring.losses import Losses
from requant.scoring.statistics import Statistics

_LAYER = re.compile(r"blk\.(\d+)\.")
_USUAL = 4.5  # bits per weight of the type whose losses are drawn
_IN_NATS = ("fisher", "kfac")
_FINDINGS = 20  # of those that are listed


@singledispatch
def html(found: object) -> str:
    """The card of a result: the figures that matter and a small picture."""
    raise TypeError(f"no card for a {type(found).__name__}")


@html.register
def _inspection(found: Inspection) -> str:
    """A model: what it is, bits of each layer, its types and what it needs in VRAM."""
    more = f" and {len(found.files) - 1} more" if len(found.files) > 1 else ""
    shape = {} if found.hyperparameters is None else found.hyperparameters
    rows = [
        ("model", found.title),
        ("architecture", f"{found.arch}, {'already' if found.quantized else 'not'} quantized"),
        ("file", f"{brief(found.files[0], FILE_NAME)}{more}, {format_size(found.file_bytes)}, GGUF {found.version}"),
        ("weights", f"{found.weights:,} in {len(found.tensors)} tensors, {found.bpw:.3f} bits per weight"),
        ("shape", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items() if value)),
    ]
    layers = (
        (int(match[1]) if (match := _LAYER.match(t.name)) else None, t.n_bytes, math.prod(t.shape))
        for t in found.tensors
    )
    types = [(s.name, s.tensors, f"{s.weights:,}", format_size(s.n_bytes), f"{s.bpw:.2f}") for s in found.types]
    needs = ""
    if found.needs is not None:
        n = found.needs
        parts = (("weights", n.weights), ("KV cache", n.kv_cache), ("compute", n.compute))
        title = f"in VRAM, all layers, a context of {n.n_ctx}: {format_size(n.total)}"
        needs = stack(title, [(name, size, format_size(size)) for name, size in parts])
    listed = table(("type", "tensors", "weights", "size", "bpw"), types)
    return card("Model", facts(rows), _bits(layers), listed, needs, _notes(found.warnings))


@html.register
def _losses(found: Losses) -> str:
    """Losses: how they were measured, each layer's at about 4.5 bits, and each role's by type."""
    free = [t for t in found.tensors if t.reason is None]
    layers: dict[int, float] = {}
    for t in free:
        if t.layer is not None:
            _, usual = min((abs(8 * c.n_bytes / max(t.n_weights, 1) - _USUAL), c.loss) for c in t.candidates)
            layers[t.layer] = layers.get(t.layer, 0.0) + usual
    picture = columns(
        "loss of each layer at about 4.5 bits per weight",
        [(f"layer {layer}", loss, f"{loss:.3g}") for layer, loss in sorted(layers.items())],
    )
    sums: dict[tuple[str, str], float] = {}
    bits: dict[str, float] = {}
    for t in free:
        for c in t.candidates:
            sums[t.role, c.type] = sums.get((t.role, c.type), 0.0) + c.loss
            bits.setdefault(c.type, 8 * c.n_bytes / max(t.n_weights, 1))
    types = sorted(bits, key=lambda name: (bits[name], name))
    roles = list(dict.fromkeys(t.role for t in free))
    rows = [[role, *(f"{sums[role, name]:.3g}" if (role, name) in sums else "-" for name in types)] for role in roles]
    rows_of = [
        ("source", f"{brief(found.source, FILE_NAME)} ({found.arch})"),
        ("method", found.method),
        ("importance", found.imatrix),
        ("tensors", f"{len(found.tensors)}, {len(free)} to quantize"),
    ]
    return card("Losses", facts(rows_of), picture, table(["role", *types], rows), _notes(found.notes))


@html.register
def _plan(found: Plan) -> str:
    """A plan: size, predicted loss, what fills its budgets, bits of each layer, its types."""
    loss = "not known" if found.predicted_loss is None else f"{found.predicted_loss:.4g}"
    unit = " nats per token" if found.method in _IN_NATS and found.predicted_loss is not None else ""
    gap = f", at most {found.gap:.1e} of it above the best there is" if found.gap else ", the best there is"
    gap = "" if found.gap is None else gap
    rows = [
        ("source", f"{brief(found.source, FILE_NAME)} ({found.arch})"),
        ("size", f"{format_size(found.n_bytes)}, {found.bpw:.3f} bits per weight"),
        ("predicted loss", f"{loss}{unit}{gap}"),
        ("measured", None if found.measured_kld is None else f"{found.measured_kld:.4g} nats per token"),
    ]
    budgets = [_budget(found, limit) for limit in found.limits if limit.unit == "bytes"]
    return card("Plan", facts(rows), *budgets, _bits_of(found), _types(found.choices), _notes(found.notes))


@html.register
def _conversion(made: Conversion) -> str:
    """An output: where it is, its size, the errors of its types, bits of each layer."""
    weighed = None if made.imatrix is None else brief(made.imatrix, FILE_NAME)
    rows = [
        ("output", made.output),
        ("size", f"{format_size(made.size)}, {made.plan.bpw:.3f} bits per weight"),
        ("importance", weighed),
    ]
    errors: dict[str, list[float]] = {}
    for t in made.tensors:
        if t.type != t.source_type:
            errors.setdefault(t.type, []).append(t.rmse)
    types = [
        (name, len(of), f"{sorted(of)[len(of) // 2]:.4f}", f"{max(of):.4f}")
        for name, of in sorted(errors.items(), key=lambda item: max(item[1]))
    ]
    listed = table(("type", "tensors", "relative error, middle", "largest"), types) if types else ""
    return card("Conversion", facts(rows), _bits_of(made.plan), listed, _notes(made.notes))


@html.register
def _evaluation(found: Evaluation) -> str:
    """An evaluation: perplexity, and the divergence where there was a base."""
    scored = f"{found.n_scored:,} tokens of {found.n_windows} windows of {found.n_ctx}"
    rows: list[tuple[str, object]] = [
        ("model", found.model),
        ("text", found.text),
        ("scored", scored),
        ("perplexity", f"{found.ppl:.4f} +- {found.ppl_error:.4f}"),
    ]
    if found.mean_kld is not None and found.same_top is not None:
        rows += [
            ("base", found.base),
            ("perplexity of the base", f"{found.base_ppl:.4f}"),
            ("KL divergence", f"{found.mean_kld:.6f} +- {found.kld_error:.6f} nats per token"),
            ("99 and 99.9 %", f"{found.p99_kld:.5f} and {found.p999_kld:.5f} nats"),
            ("same top token", f"{100 * found.same_top:.2f} %"),
        ]
    return card("Evaluation", facts(rows))


@html.register
def _verification(found: Verification) -> str:
    """A verification: sound or not, and what was found."""
    rows = [
        ("output", found.output),
        ("read", f"{found.n_tensors} tensors, {format_size(found.n_bytes)}"),
        ("against", " and ".join(found.against)),
        ("found", f"{len(found.findings)} findings" if found.findings else "nothing: it is sound"),
    ]
    listed = table(("finding",), [(finding,) for finding in found.findings[:_FINDINGS]]) if found.findings else ""
    return card("Verification", facts(rows), listed)


@html.register
def _statistics(found: Statistics) -> str:
    """Statistics: of how many tokens, and for how many matrices."""
    experts = sum(expert is not None for _, expert in found.matrices)
    rows = [
        ("tokens", f"{found.n_tokens:,} in windows of {found.n_ctx}"),
        ("matrices", f"{len(found.matrices)}" + (f", {experts} of them experts" if experts else "")),
    ]
    return card("Statistics", facts(rows))


@html.register
def _curve(found: Curve) -> str:
    """Loss against the size of the file."""
    said = [
        (p.file_bytes, p.predicted_loss, f"{format_size(p.file_bytes)}, {p.bpw:.3f} bpw: {p.predicted_loss:.4g}")
        for p in found.points
    ]
    if not said:
        return card("Frontier")
    drawn = [point for point in said if point[1] > 0]  # copies of everything lose nothing, whose logarithm is none
    first, last = found.points[0], found.points[-1]
    rows = [
        ("source", brief(found.source, FILE_NAME)),
        ("files", f"{format_size(first.file_bytes)} to {format_size(last.file_bytes)}"),
        ("predicted loss", f"{first.predicted_loss:.4g} to {last.predicted_loss:.4g}"),
    ]
    return card("Frontier", facts(rows), line("predicted loss, logarithmic, against the bytes of the file", drawn))


def _budget(found: Any, limit: Any) -> str:
    parts = found.parts(limit) | {"free": limit.budget - found.used(limit)}
    title = f"{limit.option} {format_size(limit.budget)}"
    return stack(title, [(name, size, format_size(size)) for name, size in parts.items()])


def _bits_of(found: Any) -> str:
    return _bits((c.layer, c.n_bytes, c.n_weights) for c in found.choices)


def _bits(tensors: Iterable[tuple[int | None, int, int]]) -> str:
    """A column for each layer; tensors are (layer, bytes, weights)."""
    sums: dict[int, tuple[int, int]] = {}
    for layer, n_bytes, n_weights in tensors:
        if layer is not None:
            before = sums.get(layer, (0, 0))
            sums[layer] = before[0] + n_bytes, before[1] + n_weights
    values = [(f"layer {i}", 8 * b / max(n, 1), f"{8 * b / max(n, 1):.3f} bits") for i, (b, n) in sorted(sums.items())]
    highest = max((value for _, value, _ in values), default=0)
    return columns(f"bits per weight of each layer, {highest:.2f} the most", values)


def _types(choices: Iterable[Any]) -> str:
    sums: dict[str, tuple[int, int, int, float]] = {}
    for c in choices:
        n, n_weights, n_bytes, loss = sums.get(c.type, (0, 0, 0, 0.0))
        sums[c.type] = n + 1, n_weights + c.n_weights, n_bytes + c.n_bytes, loss + c.loss
    by_bits = sorted(sums.items(), key=lambda item: (item[1][2] / max(item[1][1], 1), item[0]))
    rows = [
        (name, n, f"{8 * n_bytes / max(n_weights, 1):.2f}", format_size(n_bytes), f"{loss:.3g}")
        for name, (n, n_weights, n_bytes, loss) in by_bits
    ]
    return table(("type", "tensors", "bpw", "size", "predicted loss"), rows)


def _notes(notes: Iterable[str]) -> str:
    return facts([("note", note) for note in notes])
