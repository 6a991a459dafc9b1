"""The head of the report page: the request, the figures of the result, and the parts of each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from requant.common.units import format_budget, format_size, size_label
from requant.errors import FILE_NAME
from requant.model.engine_settings import DEFAULT_UBATCH
from requant.planning.plan import COPY
from requant.report import shell
from requant.report.figures import percent
from requant.report.html import tag, text
from requant.report.page.origin import may_measure
from requant.report.start_command import DEFAULT_CACHE
from requant.report.view import PART_NAMES, BudgetBar, budget_bars

if TYPE_CHECKING:
    from requant.conversion.record import Conversion
    from requant.planning.plan import Plan
    from requant.scoring.evaluate import Evaluation

_SIZES = ("vram", "ram", "size", "reserve")
_USUAL = {"parallel": 1, "ubatch": DEFAULT_UBATCH, "cache_type_k": DEFAULT_CACHE, "cache_type_v": DEFAULT_CACHE}
_CLASSES = {  # of parts
    **{"weights": "weights", "kv_cache": "kv", "compute": "compute", "reserve": "reserve"},
    **{"padding": "other", "other": "other", "header": "other"},
}


def request_options(plan: Plan) -> list[str]:
    """Return the request as options of the command line, each with its value.

    If the plan does not record its options: its budget without default values.
    """
    found: list[str] = []
    for word in plan.options:
        if word.startswith("--") or not found:
            found.append(word)
        else:
            found[-1] += f" {shell.join_words([word])}"
    if found:
        return found
    for key, value in plan.budget.items():
        if value is None or value is False or _USUAL.get(key) == value:
            continue
        shown = size_label(value) if key in _SIZES and isinstance(value, int) else value
        option = f"--{key.replace('_', '-')}"
        each = shown if isinstance(shown, (list, tuple)) else [shown]
        found += [option if one is True else f"{option} {one}" for one in each]
    return found


def headline(plan: Plan, made: Conversion | None, evaluations: Sequence[Evaluation]) -> str:
    """Return the figures: size, bits, predicted and measured loss, batch, gap, speed."""
    cards = [*_size_cards(plan, made), *_loss_cards(plan)]
    if "ubatch" in plan.budget:
        cards.append(("Batch", f"{plan.budget['ubatch']:,}", "tokens at once (-ub)"))
    for found in [e for e in evaluations if may_measure(e, made)][:1]:
        cards += _measured_cards(found)
    if plan.predicted_loss is not None:
        gap = "not known" if plan.gap is None else percent(plan.gap, ".2g") if plan.gap else "0"
        cards.append(("Proven gap", gap, text(plan.solver, FILE_NAME)))
    copied = sum(c.copied for c in plan.choices)
    cards.append(("Tensors", str(len(plan.choices)), f"{len(plan.choices) - copied} quantized, {copied} copied"))
    speed_matters = any(limit.unit == "ns" for limit in plan.limits) or not plan.runtime.get("all_layers", True)
    if (ns := plan.ns_per_token) is not None and speed_matters:
        cards.append(("Speed", f"{1e9 / max(ns, 1):.1f}", "tokens/s predicted, at a full context"))
    items = (
        tag("div", tag("dt", label), tag("dd", tag("b", figure), " ", tag("small", more)))
        for label, figure, more in cards
    )
    return tag("dl", *items, class_="figures")


def _size_cards(plan: Plan, made: Conversion | None) -> list[tuple[str, str, str]]:
    size = plan.n_bytes if made is None else made.size
    exact = f"{size:,} bytes" + (" of tensors" if made is None else "")
    return [
        ("Size", format_size(size), exact),
        ("Bits per weight", f"{plan.bpw:.3f}", f"over {plan.n_weights:,} weights"),
    ]


def _loss_cards(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.is_copy:
        return [("Loss", "none", COPY)]
    if plan.predicted_loss is None:
        return [("Predicted loss", "not known", "")]
    label, unit = "Predicted KL", plan.loss_unit or ""
    if plan.predicted_kl is None:
        label, unit = "Predicted loss", f"{unit} by {text(plan.method)}; they compare plans and are no KL"
    cards = [(label, f"{plan.predicted_loss:.4g}", unit)]
    if plan.measured_kld is not None:
        cards.append(("Measured KL", f"{plan.measured_kld:.4g}", "nats per token, when the plan was chosen"))
    return cards


def _measured_cards(figures: Evaluation) -> list[tuple[str, str, str]]:
    on = text(figures.text or f"{figures.n_scored} tokens", FILE_NAME)
    cards = []
    if figures.mean_kld is not None:
        cards.append(("Measured KL", f"{figures.mean_kld:.4g}", f"&plusmn; {figures.kld_error or 0:.1g} nats, {on}"))
    if figures.same_top is not None:
        cards.append(("Same top token", percent(figures.same_top, ".2f"), f"of {figures.n_scored:,} tokens"))
    of_base = "" if figures.base_ppl is None else f"; the base {figures.base_ppl:.3f}"
    return [*cards, ("Perplexity", f"{figures.ppl:.3f}", f"&plusmn; {figures.ppl_error:.2g}{of_base}")]


def budget_section(plan: Plan) -> str:
    """Return a bar with its parts for each limit in bytes, a line for each other limit."""
    found = "".join(_draw_budget(bar) for bar in budget_bars(plan))
    others = [limit for limit in plan.limits if limit.unit != "bytes"]
    lines = (f"{text(x.option)}: {text(plan.show(x, plan.used(x)))} of {text(plan.show(x, x.budget))}" for x in others)
    return found + "".join(tag("p", line) for line in lines)


def _draw_budget(bar: BudgetBar) -> str:
    whole = max(bar.budget, 1)
    parts = [(name, n_bytes) for name, n_bytes in bar.parts.items() if n_bytes > 0]
    segments, items, start = [], [], 0
    for i, (name, n_bytes) in enumerate((*parts, ("headroom", bar.free))):
        kind = "free" if name == "headroom" else _CLASSES.get(name, f"more{i % 3}")
        label = text(PART_NAMES.get(name, name.replace("_", " ")))
        share = percent(n_bytes / whole)
        title = tag("title", f"{label}: {format_size(n_bytes)}, {share}")
        x, width = 100 * start / whole, 100 * n_bytes / whole
        segments.append(tag("rect", title, x=f"{x:.3f}%", width=f"{width:.3f}%", height="100%", class_=f"k-{kind}"))
        swatch = tag("svg", tag("rect", width="100%", height="100%", class_=f"k-{kind}"), aria_hidden="true")
        items.append(tag("li", swatch, tag("span", label), " ", tag("b", format_size(n_bytes)), " ", tag("i", share)))
        start += n_bytes
    used, free = format_size(bar.budget - bar.free), format_size(bar.free)
    head = f"{tag('code', text(bar.option))} {format_budget(bar.budget)}: {used} used, {free} free"
    picture = tag("svg", tag("title", f"What fills {text(bar.option)}"), *segments, class_="bar", role="img")
    return tag("figure", tag("figcaption", head), picture, tag("ul", *items, class_="parts"), class_="budget")
