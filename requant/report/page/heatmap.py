"""The heat map of a plan: a table of layers by role, coloured by bits, sensitivity or predicted loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from requant.common.units import format_size
from requant.errors import brief
from requant.planning.plan import Plan
from requant.report.html import table, tag, text
from requant.report.view import LayerRole, layer_roles

LEVELS = 8  # colours of a scale
MOST_WORDED = 32  # layers; with more, a cell is too narrow for a word
_BITS = ("1", "2", "3", "4", "5", "6", "7-8", "16 and more")  # bits per weight, rounded down
Scale = tuple[float, float]  # logarithms of the smallest and the largest value above 0


def heat_section(plan: Plan, index: Mapping[str, int]) -> str:
    """Return the map with its switch and legends; `index`: tensor name -> its row in the table of tensors."""
    found = layer_roles(plan)
    if not found:
        return tag("p", "No tensor of this model can be quantized.")
    scales = {"s": _log_scale(c.sensitivity for c in found), "l": _log_scale(c.loss for c in found)}
    inside = [c for c in found if c.layer is not None]
    outside = [c for c in found if c.layer is None]
    parts = [_outside_table(outside, scales, index)] if outside else []
    parts += [_layer_table(inside, scales, index)] if inside else []
    return tag("div", _mode_switch(plan, scales), _legends(scales), *parts, id="heat")


def _mode_switch(plan: Plan, scales: Mapping[str, Scale | None]) -> str:
    reference = text(plan.runtime.get("reference_type", "a common type"))
    modes = [
        ("b", "bits", True),
        ("s", f"sensitivity: the loss if it were {reference}", scales["s"] is not None),
        ("l", "predicted loss", scales["l"] is not None),
    ]
    boxes = (
        tag("label", f'<input type="radio" name="mode" id="mode-{key}"{" checked" if key == "b" else ""}>', f" {label}")
        for key, label, known in modes
        if known
    )
    return tag("fieldset", tag("legend", "Coloured by"), *boxes, class_="modes")


def _legends(scales: Mapping[str, Scale | None]) -> str:
    swatches = (tag("li", tag("i", class_=f"c b{i}"), label) for i, label in enumerate(_BITS))
    parts = [tag("ul", tag("li", "bits per weight"), *swatches, class_="scale mb")]
    for key, scale in scales.items():
        if scale is not None:
            low, high = scale
            edges = [math.exp(low + (high - low) * i / LEVELS) for i in range(LEVELS)]
            steps = (tag("li", tag("i", class_=f"c {key}{i}"), f"{edge:.0e}") for i, edge in enumerate(edges))
            parts.append(tag("ul", tag("li", "loss from"), *steps, class_=f"scale m{key}"))
    return "".join(parts)


def _outside_table(cells: Sequence[LayerRole], scales: Mapping[str, Scale | None], index: Mapping[str, int]) -> str:
    head = (tag("th", text(c.role), scope="col") for c in cells)
    row = tag("tr", *(_draw_cell(c, scales, index, worded=True) for c in cells))
    caption = tag("caption", "outside the layers")
    return tag("div", table(head, [row], caption=caption, class_="heat worded outside"), class_="scroll")


def _layer_table(cells: Sequence[LayerRole], scales: Mapping[str, Scale | None], index: Mapping[str, int]) -> str:
    """Return roles down and layers across, so that the depth of the model reads from left to right."""
    layers = sorted({c.layer for c in cells if c.layer is not None})
    roles = list(dict.fromkeys(c.role for c in cells))
    worded = len(layers) <= MOST_WORDED
    step = 1 if worded else 5
    numbers = (
        tag("th", tag("span", str(layer)), scope="col", class_=None if i % step == 0 else "quiet")
        for i, layer in enumerate(layers)
    )
    at = {(c.role, c.layer): c for c in cells}
    rows = []
    for role in roles:
        row = [tag("th", text(role), scope="row", title=brief(role))]
        for layer in layers:
            cell = at.get((role, layer))
            row.append(tag("td", class_="none") if cell is None else _draw_cell(cell, scales, index, worded=worded))
        rows.append(tag("tr", *row))
    head = [tag("th", "layer", scope="col"), *numbers]
    kind = "heat worded" if worded else "heat dense"
    return tag("div", table(head, rows, caption=tag("caption", "layers"), class_=kind), class_="scroll")


def _draw_cell(cell: LayerRole, scales: Mapping[str, Scale | None], index: Mapping[str, int], *, worded: bool) -> str:
    figures = {"s": cell.sensitivity, "l": cell.loss}
    levels = [f"b{_bits_level(cell.bpw)}", *(f"{key}{_colour_level(x, scales[key])}" for key, x in figures.items())]
    words = [
        tag("span", "/".join(cell.types) if len(cell.types) < 2 else f"{len(cell.types)} types", class_="mb"),
        *(tag("span", _short_figure(value), class_=f"m{key}") for key, value in figures.items()),
    ]
    return tag(
        "td",
        *(words if worded else ()),
        class_=f"c {' '.join(levels)}",
        data_i=" ".join(str(index[c.name]) for c in cell.choices),
        title=_describe_cell(cell),
    )


def _describe_cell(cell: LayerRole) -> str:
    role = brief(cell.role)
    where = role if cell.layer is None else f"layer {cell.layer}, {role}"
    copied = ", copied" if all(c.copied for c in cell.choices) else ""
    n = f" in {len(cell.choices)} tensors" if len(cell.choices) > 1 else ""
    bits = f"{cell.bpw:.4g} bits per weight, {format_size(cell.n_bytes)}{n}"
    lines = [where, f"{', '.join(cell.types)}{copied}", bits]
    if cell.loss is not None:
        lines.append(f"predicted loss {cell.loss:.3g}")
    if cell.sensitivity is not None:
        lines.append(f"sensitivity {cell.sensitivity:.3g}")
    return "\n".join(lines)


def _bits_level(bpw: float) -> int:
    return LEVELS - 1 if bpw >= 9 else min(max(int(bpw) - 1, 0), LEVELS - 2)


def _log_scale(values: Iterable[float | None]) -> Scale | None:
    logs = [math.log(v) for v in values if v is not None and v > 0]
    return (min(logs), max(*logs, min(logs) + 1e-9)) if logs else None


def _colour_level(value: float | None, scale: Scale | None) -> str:
    if value is None or scale is None:
        return "x"
    if value <= 0:
        return "0"
    low, high = scale
    return str(min(int(LEVELS * (math.log(value) - low) / (high - low)), LEVELS - 1))


def _short_figure(value: float | None) -> str:
    return "?" if value is None else "0" if value <= 0 else f"{value:.0e}".replace("e-0", "e-")
