"""Pictures of plans and models: how wide and how high they are, and what they show."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.errors import printable
from requant.formats import FORMATS, by_name
from requant.report.text.bars import FULL, MOST_LINES, BarTensor, Canvas, Span, draw_bars
from requant.report.text.grid import display_width

TYPES = [f.name for f in FORMATS.values()]
COLOURED, DIGITS = Canvas(80, True, True), Canvas(80, False, True)


def part(place, type_name, n_weights=1 << 20):
    return BarTensor(place, type_name, n_weights, by_name(type_name).n_bytes(n_weights))


def lines_of(parts, canvas=DIGITS):
    return ["".join(span.text for span in line).rstrip() for line in draw_bars(parts, canvas)]


def model(n_layers, types=("Q2_K", "Q4_K", "Q6_K")):
    parts = [part("token_embd", "Q6_K", 1 << 24)]
    for n in range(n_layers):
        parts += [part(n, types[n % len(types)]), part(n, "Q4_K"), part(n, "F32", 256)]
    return [*parts, part("output", "Q8_0", 1 << 24), part("norm", "F32", 256)]


@given(
    st.lists(st.tuples(st.one_of(st.integers(0, 200), st.text(max_size=40)), st.sampled_from(TYPES)), min_size=1),
    st.integers(40, 160),
    st.booleans(),
    st.booleans(),
)
def test_a_picture_keeps_to_its_width_and_height(parts, width, colours, blocks):
    drawn = draw_bars([part(*p) for p in parts], Canvas(width, colours, blocks))
    outside = len({place for place, _ in parts if isinstance(place, str)})
    texts = ["".join(span.text for span in line) for line in drawn]
    types = {name for _, name in parts}
    assert max(map(display_width, texts)) <= width
    assert len(drawn) <= 1 + MOST_LINES + outside + -(-len(types) * 12 // width) + 1
    assert colours or all(span.colour is None for line in drawn for span in line)
    assert all(span.text == printable(span.text) for line in drawn for span in line)


@pytest.mark.parametrize("n", [80, 126, 1000])
def test_many_layers_fit_a_screen(n):
    rows = [re.split(r" {2,}", line) for line in lines_of(model(n))[1:-1]]
    layers = [row[0] for row in rows if row[0][:1].isdigit()]
    assert len(layers) <= MOST_LINES and layers[0].startswith("0") and layers[-1].endswith(str(n - 1))
    assert [row[0] for row in rows if not row[0][:1].isdigit()] == ["token_embd", "output"]


def test_alike_neighbours_are_one_line():
    shown = lines_of([*(part(n, "Q4_K") for n in range(4)), part(4, "Q6_K"), *(part(n, "Q4_K") for n in (5, 6))])
    assert [line.split()[0] for line in shown[1:-1]] == ["0-3", "4", "5-6"]


def test_figures_are_bits_per_weight_and_bytes():
    (_, row, legend) = lines_of([part(0, "Q4_K"), part(0, "Q8_0")])
    assert row.split()[0] == "0" and "  6.50  " in row and row.split()[3:5] == ["1.62", "MiB"]
    assert legend == "44 Q4_K   88 Q8_0"


def test_a_bar_is_as_long_as_its_bits_and_parted_by_weights():
    bars = [line.split()[1] for line in lines_of([part(0, "Q8_0"), part(1, "Q4_0"), part(1, "Q4_1")])[1:3]]
    assert set(bars[0]) == {"8"} and abs(len(bars[0]) * (4.75 / 8.5) - len(bars[1])) <= 1
    assert abs(bars[1].count("4") - bars[1].count("5")) <= 1


def test_blocks_end_in_eighths():
    _, *rows, _ = draw_bars([part(0, "Q8_0"), part(1, "Q4_K")], COLOURED)
    whole, bar = (next(span.text for span in row if FULL in span.text) for row in rows)
    width = len(whole)
    eighths = 8 * bar.count(FULL) + (0x2590 - ord(bar[-1]) if bar[-1] != FULL else 0)
    assert abs(eighths - 8 * width * 4.5 / 8.5) <= 1


def test_what_is_larger_than_any_layer_is_cut_and_says_so():
    first, layer = lines_of([part("token_embd", "F16"), part(0, "Q4_K")])[1:3]
    assert first.split()[1].endswith("F>") and len(first.split()[1]) == len(layer.split()[1]) and "16.00" in first


def test_small_tensors_outside_the_layers_are_left_out():
    assert not any(line.startswith("norm") for line in lines_of(model(3)))
    assert lines_of([part("norm", "F32", 256)])[1].startswith("norm")


def test_colours_go_by_bits():
    def colour(name):
        return next(s.colour for s in draw_bars([part(0, name)], COLOURED)[1] if FULL in s.text)

    assert colour("Q4_0") == colour("Q4_K") == colour("IQ4_XS") != colour("Q2_K")
    assert len({colour(name) for name in ("IQ1_S", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")}) == 8


def test_names_from_a_file_are_escaped_and_never_colours():
    drawn = draw_bars([part("ev\x1b[31mil", "Q4_K"), part(0, "Q4_K")], COLOURED)
    assert all("\x1b" not in span.text for line in drawn for span in line)
    assert all(span.colour is None or type(span.colour) is int for line in drawn for span in line)


def test_the_text_of_a_span_is_escaped_when_it_is_printed(capsys):
    from requant.cli import messages

    messages.print_result(((Span("a\x1b[2Jb", 31),),), "c\x1b[2J")
    assert capsys.readouterr().out == "\x1b[31ma\\x1b[2Jb\x1b[0m\n\nc\\x1b[2J\n"


def test_a_plan_and_the_model_it_makes_have_the_same_picture(tmp_path):
    from real_models import TINY

    from requant.container.source import open_source
    from requant.conversion.convert import convert
    from requant.model.inspection import inspect
    from requant.planning.recipe import preset_plan
    from requant.report.text.bars import model_bars, plan_bars

    with open_source(TINY) as source:
        plan = preset_plan(source, "Q3_K_M")
        convert(source, plan, tmp_path / "out.gguf")
    with open_source(tmp_path / "out.gguf") as made:
        canvas = replace(COLOURED, width=100)
        assert plan_bars(plan, canvas) == model_bars(inspect(made), canvas)
