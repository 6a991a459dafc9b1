"""A bar chart in text: a bar for each layer, as long as its bits per weight and coloured by type.

Colours are SGR numbers (30 to 97) beside the text, never in it: the text of a span is escaped when it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, prod

from requant.common.units import format_size
from requant.errors import brief
from requant.formats import by_bits, format_of
from requant.model.inspection import Inspection
from requant.model.roles import layer_of, role_of
from requant.planning.plan import Plan
from requant.report.figures import bits_per_weight
from requant.report.text.grid import display_width

MOST_LINES = 20  # of layers; further layers are merged
_WIDEST_LABEL = 12  # columns
_BAR = 64  # characters of the longest bar, at most
_LEAST_BAR = 4
_TYPES_FROM = 24  # least characters of a bar that has its types beside it
_SMALL = 0.002  # share of the weights; smaller roles outside the layers, and smaller types, are left out
_CUT = ">"  # end of a bar that is cut because it is longer than any layer's
_EIGHTHS = ("", *map(chr, range(0x258F, 0x2588, -1)))  # of a character: U+258F is one, U+2589 seven
FULL = chr(0x2588)
# bits of a type's weights -> colour, from few (red) to many (grey)
_COLOURS = {1: 91, 2: 31, 3: 33, 4: 32, 5: 36, 6: 34, 7: 34, 8: 35}
_UNROUNDED = 90
_FAINT = 2


@dataclass(frozen=True, slots=True)
class Span:
    """Text and its colour as an SGR parameter."""

    text: str
    colour: int | None = None


Line = tuple[Span, ...]
Drawing = tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class BarTensor:
    """A tensor of the chart; `place` is its layer, or its role outside the layers."""

    place: int | str
    type: str
    n_weights: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """The abilities of the terminal: columns, colours, block characters."""

    width: int
    colours: bool
    blocks: bool


@dataclass(frozen=True, slots=True)
class _BarRow:
    label: str
    types: tuple[tuple[str, int], ...]  # by bits: type, weights
    n_weights: int
    n_bytes: int
    outside: bool

    @property
    def bits(self) -> float:
        return bits_per_weight(self.n_bytes, self.n_weights)


def plan_bars(plan: Plan, canvas: Canvas) -> Drawing:
    """Draw the layers of a plan."""
    return draw_bars((BarTensor(_place_of(c.name), c.type, c.n_weights, c.n_bytes) for c in plan.choices), canvas)


def model_bars(model: Inspection, canvas: Canvas) -> Drawing:
    """Draw the layers of a model as it is."""
    return draw_bars((BarTensor(_place_of(t.name), t.type, prod(t.shape), t.n_bytes) for t in model.tensors), canvas)


def draw_bars(parts: Iterable[BarTensor], canvas: Canvas) -> Drawing:
    """Draw a line for each run of equal layers and each large role outside the layers, then a legend of the types."""
    rows = _bar_rows(list(parts))
    sizes = [format_size(row.n_bytes) for row in rows]
    label = max(5, *(display_width(row.label) for row in rows))
    size = max(4, *map(len, sizes))
    room = canvas.width - label - size - 4 * 2 - 4  # gaps, and the figure
    types = [" ".join(name for name, _ in row.types) for row in rows]
    beside = 2 + max(len("types"), *map(len, types))
    with_types = room - beside >= _TYPES_FROM
    room -= beside if with_types else 0
    bar = max(_LEAST_BAR, min(_BAR, room))
    longest = max((row.bits for row in rows if not row.outside), default=0) or max(row.bits for row in rows)
    head = f"{'layer':{label}}  {'bits per weight':{bar}.{bar}}  {'':>5}  {'size':>{size}}"
    lines: list[Line] = [(Span(head + ("  types" if with_types else ""), _FAINT if canvas.colours else None),)]
    for row, shown, names in zip(rows, sizes, types, strict=True):
        drawn, used = _draw_bar(row, longest, bar, canvas)
        tail = f"{'':{bar - used}}  {row.bits:5.2f}  {shown:>{size}}" + (f"  {names}" if with_types else "")
        lines.append((Span(row.label + " " * (label - display_width(row.label) + 2)), *drawn, Span(tail)))
    return (*lines, *_legend_lines(rows, canvas))


def _place_of(name: str) -> int | str:
    layer = layer_of(name)
    return role_of(name) if layer is None else layer


def _bar_rows(parts: list[BarTensor]) -> list[_BarRow]:
    """Return the rows in the model's order: embeddings, layers, other roles."""
    total = sum(p.n_weights for p in parts)
    outside: dict[str, list[BarTensor]] = {}
    layers: dict[int, list[BarTensor]] = {}
    for part in parts:
        if isinstance(part.place, int):
            layers.setdefault(part.place, []).append(part)
        else:
            outside.setdefault(part.place, []).append(part)
    large = [role for role, found in outside.items() if not layers or sum(p.n_weights for p in found) >= _SMALL * total]
    first, last = (
        [_bar_row(_shorten_label(role), outside[role], outside=True) for role in large if ("embd" in role) is embeds]
        for embeds in (True, False)
    )
    return [*first, *_layer_rows(layers), *last] or [_bar_row("all", parts)]


def _shorten_label(role: str) -> str:
    text = brief(role)
    while display_width(text) > _WIDEST_LABEL:
        text = text[:-1]
    return text


def _layer_rows(layers: dict[int, list[BarTensor]]) -> list[_BarRow]:
    numbers = sorted(layers)
    merged = [list(alike) for _, alike in groupby(numbers, key=lambda n: _type_weights(layers[n]))]
    if len(merged) > MOST_LINES:
        several = ceil(len(numbers) / MOST_LINES)
        merged = [numbers[i : i + several] for i in range(0, len(numbers), several)]
    labels = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in merged)
    return [_bar_row(label, [p for n in run for p in layers[n]]) for label, run in zip(labels, merged, strict=True)]


def _bar_row(label: str, parts: Sequence[BarTensor], *, outside: bool = False) -> _BarRow:
    weights, size = sum(p.n_weights for p in parts), sum(p.n_bytes for p in parts)
    return _BarRow(label, _type_weights(parts), weights, size, outside)


def _type_weights(parts: Sequence[BarTensor]) -> tuple[tuple[str, int], ...]:
    """Return the weights of each type, fewest bits first, without types of small share (norms, biases)."""
    found: dict[str, int] = {}
    for part in parts:
        found[part.type] = found.get(part.type, 0) + part.n_weights
    total = sum(found.values())
    return tuple(sorted(((t, n) for t, n in found.items() if n >= _SMALL * total), key=lambda item: by_bits(item[0])))


def _draw_bar(row: _BarRow, longest: float, width: int, canvas: Canvas) -> tuple[list[Span], int]:
    """Return the spans of a bar, one for each type by its share of the weights, and their characters."""
    cut = row.bits > longest
    length = min(row.bits / longest, 1.0) * width - cut if longest else 0.0
    total, before, used, spans = sum(n for _, n in row.types) or 1, 0, 0, []
    for i, (name, n) in enumerate(row.types):
        before += n
        end = length * before / total
        whole = int(end) if i == len(row.types) - 1 else round(end)
        text = _bar_text(name, whole - used, end - whole if i == len(row.types) - 1 else 0.0, canvas)
        spans.append(_type_span(text, name, canvas))
        used = whole if len(text) == whole - used else whole + 1
    if cut:
        spans.append(Span(_CUT))
    return spans, used + cut


def _bar_text(name: str, n: int, rest: float, canvas: Canvas) -> str:
    """Return `n` blocks and the eighths of one more; without colours or blocks, digits of the type's bits."""
    if canvas.colours and canvas.blocks:
        return FULL * n + _EIGHTHS[int(8 * rest)]
    return _bits_digit(name) * n + (_bits_digit(name) if rest >= 0.5 else "")


def _legend_lines(rows: Sequence[_BarRow], canvas: Canvas) -> list[Line]:
    """Return each type with its colour or digit, in lines that fit."""
    names = sorted({name for row in rows for name, _ in row.types}, key=by_bits)
    lines: list[list[Span]] = [[]]
    used = 0
    for name in names:
        mark = _bar_text(name, 2, 0.0, canvas)
        text = f" {name}   "
        if used and used + len(mark) + len(text) > canvas.width:
            lines.append([])
            used = 0
        lines[-1] += [_type_span(mark, name, canvas), Span(text)]
        used += len(mark) + len(text)
    return [tuple(line) for line in lines]


def _bits_digit(name: str) -> str:
    bits = int(format_of(name).bpw)
    return str(bits) if bits < 10 else "F"


def _type_span(text: str, name: str, canvas: Canvas) -> Span:
    return Span(text, _COLOURS.get(int(format_of(name).bpw), _UNROUNDED) if canvas.colours else None)
