"""The report page of a plan or of an output: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from requant.common.units import format_size
from requant.errors import FILE_NAME
from requant.planning.plan import Plan
from requant.report.html import head_cells, number_cell, script_json, table, tag, text
from requant.report.page.charts import curve_charts, error_chart, error_table
from requant.report.page.headline import budget_section, headline, request_options
from requant.report.page.heatmap import heat_section
from requant.report.page.origin import evaluation_section, origin_section, run_section
from requant.report.page.tensors import page_data, tensor_section
from requant.report.view import LossCurve, least_loss_at, loss_curve

if TYPE_CHECKING:
    from requant.conversion.record import Conversion, Converted
    from requant.scoring.evaluate import Evaluation


def render_page(
    made: Conversion | Plan,
    *,
    evaluations: Sequence[Evaluation] = (),
    source_sha256: str | None = None,
    output_sha256: str | None = None,
) -> str:
    """Return the page, the same for the same arguments; `evaluations` are of the output, the first is in its head."""
    plan = made if isinstance(made, Plan) else made.plan
    record = None if isinstance(made, Plan) else made
    written = {} if record is None else {t.name: t for t in record.tensors}
    index = {c.name: i for i, c in enumerate(plan.choices)}
    found = loss_curve(plan)
    style, script = _read_asset("page.css"), _read_asset("page.js")
    options = " ".join(tag("code", text(option, FILE_NAME)) for option in request_options(plan))
    return Template(_read_asset("page.html")).substitute(
        policy=_content_policy(style, script),
        style=style,
        script=script,
        title=text(plan.source if record is None else record.output.name, FILE_NAME),
        source=text(plan.source, FILE_NAME),
        arch=text(plan.arch),
        asked=f"planned for {options}" if options else "types as given, without a budget",
        figures=headline(plan, record, evaluations),
        budget=budget_section(plan) or tag("p", "No limit in bytes was given."),
        run=run_section(plan, record),
        heat=heat_section(plan, index),
        curve=_curve_section(plan, found),
        errors=evaluation_section(plan, record, evaluations) + _error_section(plan, written, index),
        tensors=tensor_section(plan, written),
        origin=origin_section(plan, record, source_sha256, output_sha256),
        data=script_json(page_data(plan, written, found)),
    )


def _read_asset(name: str) -> str:
    return (files("requant.report") / "assets" / name).read_text(encoding="utf-8")


def _content_policy(style: str, script: str) -> str:
    """Return the content security policy: load nothing, apply and run only these two."""
    hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (style, script))
    allowed = [f"{kind}-src 'sha256-{one}'" for kind, one in zip(("style", "script"), hashes, strict=True)]
    closed = ("base-uri 'none'", "form-action 'none'", "require-trusted-types-for 'script'", "trusted-types 'none'")
    return "; ".join(["default-src 'none'", *allowed, *closed])


def _curve_section(plan: Plan, curve: LossCurve | None) -> str:
    if curve is None:
        return tag("p", "No losses were scored for this plan.")
    rows = []
    for dot in curve.dots:
        least = least_loss_at(curve, dot.n_bytes)
        ratio = f"{dot.loss / least:.2f}" if least and dot.loss else ""
        cells = (format_size(dot.n_bytes), f"{dot.loss:.4g}", ratio)
        kind = "strong-row" if dot is curve.chosen else None
        name = tag("th", text(dot.name), scope="row")
        rows.append(tag("tr", name, *map(number_cell, cells), class_=kind))
    heads = ("", f"bytes of {curve.pool}", "predicted loss", "over the bound")
    dot_table = table(head_cells(heads, range(1, 4)), rows, class_="data")
    hint = (
        "The line is a lower bound of the loss at each size, as if a tensor could be partly of one type and partly of "
        "another. No plan need reach it; the proven gap compares the plan with the best plan that the request allows."
    )
    charts = tag("div", curve_charts(plan, curve), tag("div", dot_table, class_="scroll"), class_="beside")
    return charts + tag("p", hint, class_="hint")


def _error_section(plan: Plan, written: dict[str, Converted], index: dict[str, int]) -> str:
    pairs = [
        (c, written[c.name]) for c in plan.choices if c.name in written and c.rmse > 0 and written[c.name].rmse > 0
    ]
    if not pairs:
        return tag("p", "No tensor has both a predicted and a measured error of its weights.", class_="hint")
    hint = "Relative error of each tensor's weights: what scoring predicted, and what the encoder left."
    chart = tag("div", error_chart(pairs, index), tag("div", error_table(pairs), class_="scroll"), class_="beside")
    return tag("h3", "Error of the weights") + tag("p", hint, class_="hint") + chart
