"""Pictures of plans: well formed, the same bytes every time, no label on another, names that stay text."""

import ast
import importlib.util
import itertools
import math
import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib.text
import pytest
from made_up import EXPERTS, plan
from matplotlib.transforms import Bbox

from requant.errors import UsageError
from requant.planning.plan import Mixture
from requant.report.kinds import check_library
from requant.report.picture import curve as picture_curve
from requant.report.picture import parts as picture_parts
from requant.report.picture.figure import _STYLE, _draw_figure, render_picture
from requant.report.view import BudgetBar, layer_roles, least_loss_at, loss_curve

HOSTILE = {"attn_$q^2$_\\frac{a}{b}": (256, 256), "<script>alert(1)</script>": (256, 256), "\u540d\u524d$": (256, 256)}
PLANS = {
    "dense": plan(),
    "experts": plan(80, EXPERTS),
    "one layer": plan(1, {"attn_q": (256, 256)}),
    "a file's size": plan(vram=False),
    "types as given": plan(
        limits=(), memory={}, candidates={}, mixtures=(), predicted_loss=None, method="preset Q4_K_M"
    ),
    "no mixtures": plan(mixtures=()),
    "hostile": plan(5, HOSTILE, source="$\\sum$ <b>x</b> \u540d" + "x" * 300),
}
each_plan = pytest.mark.parametrize("of", PLANS.values(), ids=PLANS)


def chunks(png):
    """(kind, data) of each chunk of a PNG file, its checksum right."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, []
    while at < len(png):
        (n,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + n]
        assert struct.unpack_from(">I", png, at + 8 + n)[0] == zlib.crc32(kind + data)
        found.append((kind, data))
        at += 12 + n
    return found


@each_plan
def test_a_png_is_whole_wide_and_says_nothing_of_when_and_by_what_it_was_made(of):
    found = chunks(render_picture(of, ".png"))
    assert found[-1][0] == b"IEND"
    width, height = struct.unpack_from(">II", found[0][1])
    assert width == 2200 and 500 < height < 2000
    assert not {kind for kind, _ in found} & {b"tEXt", b"iTXt", b"zTXt", b"tIME"}


@each_plan
def test_an_svg_is_xml_without_scripts_dates_and_references_to_elsewhere(of):
    data = render_picture(of, ".svg")
    root = ET.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in names and "date" not in names and "foreignObject" not in names
    for element in root.iter():
        for key, value in element.attrib.items():
            if key.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,")), value
    assert b"matplotlib.org" not in data


@pytest.mark.parametrize("kind", [".png", ".svg"])
def test_the_same_plan_gives_the_same_bytes_whatever_the_users_settings(kind):
    first = render_picture(PLANS["dense"], kind)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "text.usetex": False, "svg.hashsalt": None}):
        assert render_picture(PLANS["dense"], kind) == first


@each_plan
def test_no_text_is_a_formula_lies_on_another_or_leaves_the_picture(of):
    with matplotlib.style.context(["default", _STYLE]):
        figure = _draw_figure(of)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
        hidden = _not_drawn(figure)
        boxes = [(t, matplotlib.text.Text.get_window_extent(t, renderer)) for t in texts if id(t) not in hidden]
    assert len(boxes) > 3
    for i, (text, box) in enumerate(boxes):
        assert not text.get_parse_math()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, text.get_text()
        for other, second in boxes[i + 1 :]:
            assert not box.overlaps(second), (text.get_text(), other.get_text())


def _not_drawn(figure):
    """The labels of ticks that axes keep for when they are in view."""
    axes = [axis for a in figure.axes for axis in (a.xaxis, a.yaxis)]
    drawn = {id(tick) for axis in axes for tick in axis._update_ticks()}
    kept = [tick for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) if id(tick) not in drawn]
    return {id(label) for tick in kept for label in (tick.label1, tick.label2)}


def test_letters_that_the_font_lacks_are_escaped():
    assert picture_parts.drawable_text("a\u540d\u524d b", 24) == "a\\u540d\\u524d b"
    assert picture_parts.drawable_text("\u00e9\u03b1", 24) == "\u00e9\u03b1"
    assert picture_parts.drawable_text("\x1b[31m", 24) == "\\x1b[31m"


def test_the_heat_map_holds_every_cell():
    figure = _draw_figure(PLANS["dense"])
    mesh = next(
        c for axes in figure.axes for c in axes.collections if c.get_array() is not None and c.get_array().ndim == 2
    )
    bits = mesh.get_array()
    found = [c for c in layer_roles(PLANS["dense"]) if c.layer is not None]
    assert bits.count() == len(found)
    assert sorted(bits.compressed()) == pytest.approx(sorted(c.bpw for c in found))


def test_a_budget_is_filled_to_its_end_and_names_at_most_seven_parts():
    parts = {f"part {i}": 10 + i for i in range(12)}
    found = picture_parts._merge_small_parts(parts)
    assert len(found) == 7 and sum(size for _, size in found) == sum(parts.values())
    figure = matplotlib.figure.Figure()
    axes = figure.add_subplot()
    picture_parts.draw_bar(axes, BudgetBar("--vram", 1000, parts, 1000 - sum(parts.values())))
    assert sum(patch.get_width() for patch in axes.patches) == 1000


def test_the_curve_shows_the_plan_and_every_mixture():
    of = PLANS["dense"]
    figure = _draw_figure(of)
    axes = next(a for a in figure.axes if a.get_yscale() == "log")
    unit = 2**20 if "MiB" in axes.get_xlabel() else 2**10
    dots = {round(x * unit) for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()}
    assert dots == {m.n_bytes for m in of.mixtures}
    (x, y) = next((line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "D")
    assert (round(x * unit), y) == (loss_curve(of).chosen.n_bytes, loss_curve(of).chosen.loss)
    assert "this plan" in {t.get_text() for t in axes.texts}


def test_the_curve_between_distant_points_is_the_bound_and_says_so():
    of = plan(1, {"ffn_down": (256, 256)}, mixtures=())
    c = next(c for c in of.choices if c.role == "ffn_down")
    of = replace(of, candidates={c.name: {"Q2_K": 1.0, "Q8_0": 0.001}})
    axes = next(a for a in _draw_figure(of).axes if a.get_yscale() == "log")
    (drawn,) = (line for line in axes.lines if line.get_marker() == "None")
    unit = next(n for n, name in picture_curve._UNITS if name in axes.get_xlabel())
    curve = loss_curve(of)
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(*drawn.get_data(), strict=True)):
        middle = least_loss_at(curve, round((x0 + x1) / 2 * unit))
        assert math.sqrt(y0 * y1) == pytest.approx(middle, rel=0.02)  # bytes are whole
    assert "bound" in drawn.get_label() and len(drawn.get_xdata()) > 20


def test_labels_of_dots_in_one_place_are_left_out_and_not_piled_up():
    of = replace(PLANS["dense"], mixtures=tuple(Mixture(f"M{i}", 300_000, 300_000, 1e-4) for i in range(60)))
    figure = _draw_figure(of)
    axes = next(a for a in figure.axes if a.get_yscale() == "log")
    figure.canvas.draw()
    boxes = [matplotlib.text.Text.get_window_extent(t, figure.canvas.get_renderer()) for t in axes.texts]
    assert 1 < len(boxes) < 50
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_label_lies_on_the_side_to_which_its_offset_leads():
    box = picture_curve._text_box((100.0, 50.0), (40.0, 10.0), (6.0, 0.0))
    assert box.x0 == 98 and box.x1 == 142 and (box.y0 + box.y1) / 2 == 50
    box = picture_curve._text_box((100.0, 50.0), (40.0, 10.0), (-6.0, -6.0))
    assert isinstance(box, Bbox) and box.x1 == 102 and box.y1 == 52


def test_matplotlib_is_imported_for_pictures_alone_and_only_when_one_is_drawn():
    for path in sorted((Path(__file__).parents[2] / "requant").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [getattr(n, "module", None) or n.names[0].name for n in imports]
        if any(name.partition(".")[0] == "matplotlib" for name in names):
            assert path.parent.name == "picture", path
        top = [n for n in tree.body if n in imports]
        assert not any((getattr(n, "module", None) or n.names[0].name).startswith("matplotlib") for n in top), path


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"matplotlib, which is not installed; pip install 'requant\[report\]'"):
        check_library([".html", ".svg"])
