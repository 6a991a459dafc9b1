"""Parts of a plan's picture: a budget, the heat map of bits by layer and role, roles outside the layers, the scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.common.units import format_size
from requant.errors import brief
from requant.report.view import PART_NAMES, BudgetBar, LayerRole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, _EMPTY = "#222222", "#767676", "#ececec"
# of Okabe and Ito's palette, which is safe for colour-blind readers
_COLOURS = {"weights": "#0072b2", "kv_cache": "#e69f00", "compute": "#009e73", "reserve": "#c8c8c8"}
_OTHERS = ("#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a")
_POOLS = {"--vram": "VRAM", "--ram": "RAM", "--size": "File", "--bpw": "All tensors"}
_BITS = (1.5, 8.5)  # ends of the colour scale; more bits have the last colour
_TICKS = (2, 3, 4, 5, 6, 8)
_ROLE = 24  # characters of a role's name
_LABELLED = 0.4  # least width in inches of a cell with its type's name
_MIDDLE = 0.21  # luminance at which dark and white letters have equal contrast
_MOST_PARTS = 7  # parts of a budget that have a name of their own
_EDGES = 60  # most layers with lines between the cells


def drawable_text(text: str, most: int) -> str:
    """Return `text` with characters that the font lacks as escapes."""
    letters = _font_letters()
    return "".join(c if ord(c) in letters else c.encode("unicode_escape").decode() for c in brief(text, most))


@cache
def _font_letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())


def draw_bar(axes: Axes, bar: BudgetBar) -> None:
    """Draw a budget and its parts, with the figures under it."""
    others, left = iter(_OTHERS * 2), 0.0
    parts = _merge_small_parts(bar.parts)
    for name, n_bytes in parts:
        label = f"{PART_NAMES.get(name) or drawable_text(name, _ROLE)} {format_size(n_bytes)}"
        colour = _COLOURS.get(name) or next(others)
        axes.barh(0, n_bytes, left=left, height=1, color=colour, label=label, edgecolor="white", linewidth=0.6)
        left += n_bytes
    label = f"free {format_size(bar.free)}"
    axes.barh(0, bar.free, left=left, height=1, color="white", label=label, edgecolor=FAINT, linewidth=0.6)
    axes.set(xlim=(0, max(bar.budget, 1)), ylim=(-0.5, 0.5), xticks=[], yticks=[])
    title = f"{_POOLS.get(bar.option, drawable_text(bar.option, _ROLE))} {format_size(bar.budget)}"
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=4)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.1),
        ncols=len(parts) + 1,
        frameon=False,
        borderpad=0.2,
        borderaxespad=0,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.4,
        columnspacing=1.2,
        fontsize=8.5 if len(parts) < 6 else 7,
    )


def _merge_small_parts(parts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the largest parts, in their order, and the rest as one."""
    if len(parts) <= _MOST_PARTS:
        return list(parts.items())
    largest = sorted(parts, key=lambda name: -parts[name])[: _MOST_PARTS - 1]
    rest = sum(n_bytes for name, n_bytes in parts.items() if name not in largest)
    return [*((name, n_bytes) for name, n_bytes in parts.items() if name in largest), ("the rest", rest)]


def draw_heat(axes: Axes, cells: Sequence[LayerRole]) -> None:
    """Draw the bits of layers, across, and roles, down, with the names of the types if they fit."""
    roles = list(dict.fromkeys(c.role for c in cells))
    layers = sorted({c.layer for c in cells if c.layer is not None})
    bits = np.full((len(roles), len(layers)), np.nan)
    places = [(roles.index(c.role), layers.index(c.layer or 0), c) for c in cells]
    for i, k, cell in places:
        bits[i, k] = cell.bpw
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.8} if len(layers) <= _EDGES else {}
    axes.set_facecolor(_EMPTY)
    axes.pcolormesh(np.ma.masked_invalid(bits), cmap=_colour_map(), norm=_colour_norm(), rasterized=not edges, **edges)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(roles)) + 0.5, [drawable_text(role, _ROLE) for role in roles])
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if len(layers) <= 24 * s)
    across = [k for k, layer in enumerate(layers) if layer % step == 0]
    axes.set_xticks([k + 0.5 for k in across], [str(layers[k]) for k in across])
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("layer", labelpad=2)
    axes.set_title("Bits per weight", loc="left", fontsize=9.5, fontweight="bold", pad=5)
    for side in axes.spines.values():
        side.set_visible(False)
    width = axes.bbox.width / axes.figure.dpi / max(len(layers), 1)
    if width >= _LABELLED:
        for i, k, cell in places:
            _write_types(axes, (k + 0.5, i + 0.5), "/".join(cell.types), cell.bpw, 6.5 if width > 0.55 else 5.5)


def _write_types(axes: Axes, at: tuple[float, float], text: str, bpw: float, size: float) -> None:
    axes.text(*at, text, ha="center", va="center", fontsize=size, color=_ink_on(bpw), clip_on=True)


def draw_outside(axes: Axes, cells: Sequence[LayerRole]) -> None:
    """Draw the roles outside the layers, a box each."""
    axes.axis("off")
    if not cells:
        return
    colours, norm = _colour_map(), _colour_norm()
    axes.set(xlim=(0, len(cells)), ylim=(0, 1))
    for i, cell in enumerate(cells):
        axes.barh(0.5, 0.985, left=i, height=1, color=colours(norm(cell.bpw)))
        _write_types(axes, (i + 0.49, 0.5), f"{drawable_text(cell.role, _ROLE)}: {'/'.join(cell.types)}", cell.bpw, 7.5)


def draw_scale(axes: Axes) -> None:
    """Draw the scale of the colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FixedLocator, NullLocator

    bar = axes.figure.colorbar(ScalarMappable(_colour_norm(), _colour_map()), cax=axes, orientation="horizontal")
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_TICKS, [f"{n} bits" if n == _TICKS[0] else "8+" if n == 8 else str(n) for n in _TICKS])
    axes.tick_params(length=2, pad=2, labelsize=7.5)
    bar.outline.set_visible(False)


def _colour_norm() -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(*_BITS, clip=True)


def _colour_map() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _ink_on(bpw: float) -> str:
    """Return the colour of letters that is legible on the colour of so many bits."""
    linear = [((c + 0.055) / 1.055) ** 2.4 for c in _colour_map()(_colour_norm()(bpw))[:3]]  # of sRGB
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > _MIDDLE else "white"
