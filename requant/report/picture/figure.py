"""A plan as one picture, PNG or SVG: parts of its budgets, bits by layer and role, loss against bytes.

It is drawn by matplotlib, an optional dependency. The same plan gives the same bytes with the same matplotlib: without
a clock, the user's settings or other fonts. Names from files are never parsed as formulas.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from requant.common.units import format_size
from requant.errors import brief
from requant.planning.plan import COPY, Plan
from requant.report.picture.curve import draw_curve, drawable_curve
from requant.report.picture.parts import FAINT, INK, draw_bar, draw_heat, draw_outside, draw_scale, drawable_text
from requant.report.view import budget_bars, layer_roles, loss_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _MARGIN, _GAP = 11.0, 0.3, 0.75  # inches
_HEAD, _BAR, _BELOW = 0.72, 0.85, 1.2  # inches: title; a budget; axis and colours under the roles
_ROW = 0.26, 0.5  # inches of a role, at least and at most
_LEAST = 3.5  # least inches of heat map and curve
_DPI = 200
_CURVE = 0.36  # of the width, beside a heat map
_TITLE = 72  # characters
_LETTER = 0.078  # inches of a role's name
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "svg.hashsalt": "requant",
    "svg.fonttype": "path",
}


def render_picture(plan: Plan, kind: str) -> bytes:
    """Draw `plan` as the bytes of a `.png` or `.svg` file."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs the fonts it finds
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        figure = _draw_figure(plan)
        data = io.BytesIO()
        no_metadata = {"Software": None} if kind == ".png" else {"Date": None, "Creator": None}
        figure.savefig(data, format=kind[1:], dpi=_DPI, facecolor="white", metadata=no_metadata)
    return data.getvalue()


@dataclass(slots=True)
class _Sheet:
    """A figure that is filled from the top; lengths in inches."""

    figure: Figure
    height: float
    top: float = 0.0

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes at inches from the top left of the figure."""
        low = self.height - top - height
        return self.figure.add_axes((left / _WIDTH, low / self.height, width / _WIDTH, height / self.height))

    def write(self, text: str, down: float, **style: Any) -> None:
        """Write a line with its base `down` inches below the top."""
        self.figure.text(_MARGIN / _WIDTH, 1 - (self.top + down) / self.height, text, **style)


def _draw_figure(plan: Plan) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets, found, line = budget_bars(plan), layer_roles(plan), drawable_curve(loss_curve(plan))
    roles = {c.role for c in found if c.layer is not None}
    panels = max(_LEAST if line else 0.0, _ROW[0] * max(len(roles), 1) + _BELOW) if found or line else 0.0
    height = _HEAD + _BAR * len(budgets) + panels + _MARGIN
    sheet = _Sheet(Figure(figsize=(_WIDTH, height), dpi=_DPI), height)
    FigureCanvasAgg(sheet.figure)
    sheet.write(drawable_text(plan.source, _TITLE), 0.32, fontsize=13, fontweight="bold")
    sheet.write(_figures_line(plan), 0.56, fontsize=9.5, color=FAINT)
    sheet.top = _HEAD
    for bar in budgets:
        draw_bar(sheet.axes(_MARGIN, sheet.top + 0.26, _WIDTH - 2 * _MARGIN, 0.2), bar)
        sheet.top += _BAR
    inside = _WIDTH - 2 * _MARGIN
    right = (inside * _CURVE if found else inside - _GAP) if line is not None else 0.0
    if found:
        names = _LETTER * max((len(drawable_text(role, 24)) for role in roles), default=0)
        width = inside - names - (right + _GAP if line is not None else 0.0)
        high = min(panels - _BELOW, _ROW[1] * max(len(roles), 1))
        if roles:
            heat = sheet.axes(_MARGIN + names, sheet.top + 0.25, width, high)
            draw_heat(heat, [c for c in found if c.layer is not None])
        strip = sheet.axes(_MARGIN + names, sheet.top + high + 0.6, width, 0.24)
        draw_outside(strip, [c for c in found if c.layer is None])
        draw_scale(sheet.axes(_MARGIN + names, sheet.top + high + 0.95, width, 0.09))
    if line is not None:
        axes = sheet.axes(_WIDTH - _MARGIN - right, sheet.top + 0.25, right, panels - 0.88)
        draw_curve(axes, line, plan)
    return sheet.figure


def _figures_line(plan: Plan) -> str:
    parts = [format_size(plan.n_bytes), f"{plan.bpw:.3f} bits per weight"]
    if plan.is_copy:
        parts.append(f"no loss: {COPY}")
    elif plan.predicted_loss is not None:
        known = plan.predicted_kl is not None
        what = "predicted KL divergence" if known else f"loss predicted by {brief(plan.method)}"
        parts.append(f"{what} {plan.predicted_loss:.4g} {plan.loss_unit}")
    if "ctx" in plan.budget:
        parts.append(f"{plan.budget['ctx']} tokens of context")
    return ", ".join(parts)
