"""The report page as text: the same for the same plan, well formed, complete, and closed to what files hold."""

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import invented
import pytest
from conversions import plan_for
from hypothesis import given
from hypothesis import strategies as st
from real_models import TINY

from requant.common.units import format_size
from requant.container.source import open_source
from requant.conversion.record import Conversion
from requant.errors import brief
from requant.planning.plan import EDITED, Plan
from requant.report.html import script_json, tag, text
from requant.report.page.axes import Axis, Box, Label, cover_line, place_labels
from requant.report.page.document import render_page
from requant.report.page.headline import request_options
from requant.report.page.tensors import COLUMNS
from requant.scoring.evaluate import Evaluation

VOID = {"meta", "input", "link", "br", "hr", "img"}
ALLOWED = (
    "html head meta title style body svg defs pattern rect circle g line polyline path text a header div p button h1 "
    "h2 h3 nav main section dl dt dd b small code span figure figcaption ul li i pre fieldset legend label input table "
    "caption thead tbody tr th td select option output dialog script"
)


class Reader(HTMLParser):
    """What is in a page: its elements with their attributes, its ids, the cells of its tables; nesting is checked."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.ids, self.rows, self.scripts = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("script", "style"):
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts[-1] += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def recorded():
    made, evaluations = invented.record(invented.experts(4))
    return render_page(made, evaluations=evaluations, source_sha256="12" * 32, output_sha256="34" * 32)


def hostile():
    made, evaluations = invented.hostile()
    return render_page(
        made, evaluations=evaluations, source_sha256=invented.EVERYTHING, output_sha256=invented.EVERYTHING
    )


def edited():
    plan = invented.experts(4)
    return render_page(replace(plan, predicted_loss=None, gap=None, notes=(EDITED,), candidates={}, mixtures=()))


def types_alone():
    with open_source(TINY) as source:
        return render_page(plan_for(source, "Q4_K", "Q6_K"))


PAGES = {f.__name__: f for f in (recorded, hostile, edited, types_alone)}
each_page = pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)


@each_page
def test_the_page_is_the_same_each_time(make):
    assert make() == make()


def test_the_page_of_a_record_that_was_written_and_read_is_the_same():
    made, evaluations = invented.record(invented.experts(4))
    read = [Evaluation.from_json(found.to_json()) for found in evaluations]
    assert render_page(Conversion.from_json(made.to_json()), evaluations=read) == render_page(
        made, evaluations=evaluations
    )
    assert render_page(Plan.from_json(made.plan.to_json())) == render_page(made.plan)


@each_page
def test_the_page_is_well_formed_and_of_known_elements(make):
    found = Reader(make())
    assert {name for name, _ in found.elements} <= set(ALLOWED.split())
    assert len(found.ids) == len(set(found.ids))
    references = [a[key].lstrip("#") for _, a in found.elements for key in ("href", "aria-labelledby") if key in a]
    assert references and set(references) <= set(found.ids)


@each_page
def test_no_attribute_runs_styles_or_loads_anything(make):
    attributes = {name for _, given_ in Reader(make()).elements for name in given_}
    assert not {name for name in attributes if name.startswith("on")} | (
        attributes & {"style", "src", "srcdoc", "action"}
    )


@each_page
def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(make):
    found = Reader(make())
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    style, _, script = found.scripts
    for kind, source in (("style", style), ("script", script)):
        hashed = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{hashed}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy


def test_every_tensor_has_a_row_with_its_figures():
    made, _ = invented.record(invented.experts(4))
    rows = {row[0]: row for row in Reader(recorded()).rows if len(row) == len(COLUMNS)}
    for c, t in zip(made.plan.choices, made.tensors, strict=True):
        row = rows[c.name]
        assert row[1:3] == [c.role, "" if c.layer is None else str(c.layer)]
        assert row[3] == " \u00d7 ".join(map(str, c.shape))
        assert row[4:7] == [c.source_type, c.type, format_size(c.n_bytes)]
        assert float(row[7]) == pytest.approx(8 * c.n_bytes / c.n_weights, rel=1e-3)
        assert row[8] == c.device
        assert [float(x) for x in row[9:12]] == pytest.approx([c.loss, c.rmse, t.rmse], rel=6e-3, abs=5e-5)
        assert row[12] == (c.reason or "")


def test_every_figure_of_the_plan_is_on_the_page():
    made, evaluations = invented.record(invented.experts(4))
    shown, plan = recorded(), made.plan
    figures = [
        *(format_size(made.size), f"{made.size:,}", f"{plan.bpw:.3f}", f"{plan.predicted_loss:.4g}", "0.1 %"),
        *(format_size(size) for size in plan.memory.values()),
        *(made.header_sha256, made.imatrix_sha256, plan.header_sha256, plan.sha256(), "12" * 32, "34" * 32),
        *("qwen3moe", made.version, made.imatrix, *made.notes, plan.solver, "it is a vector, not a matrix: 4 tensors"),
        *(f"{evaluations[0].mean_kld:.4g}", "93.21 %", "51.234", "eval.txt"),
        *(m.name for m in plan.mixtures),
        "llama-server -m out.gguf -ngl 99 -c 32768",
    ]
    assert [figure for figure in figures if figure not in shown] == []


def test_an_evaluation_of_another_file_is_not_in_the_head_and_is_said_to_be_one():
    made, (own, other) = invented.record(invented.experts(4))
    other = replace(other, mean_kld=0.98765)
    shown = render_page(made, evaluations=[other, own])
    head = shown[shown.index('<section aria-label="Figures">') : shown.index('<section id="budget">')]
    assert "0.04321" in head and "0.9877" not in head
    assert "of another file, else.gguf" in shown


def test_names_from_files_are_shown_as_a_table_shows_them():
    made, _ = invented.hostile()
    names = [row[0] for row in Reader(hostile()).rows if len(row) == len(COLUMNS)][1:]
    assert names == [brief(c.name) for c in made.plan.choices]


def test_the_data_of_the_page_is_json_that_ends_no_script():
    shown = hostile()
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', shown, re.S)[1]
    assert not set("<>&\u2028\u2029") & set(raw)
    made, _ = invented.hostile()
    assert [t["name"] for t in json.loads(raw)["tensors"]] == [brief(c.name) for c in made.plan.choices]


@given(st.text())
def test_text_and_attributes_come_back_as_they_were_meant(value):
    assert Reader(tag("p", text(value), title=value)).elements == [("p", {"title": value})]
    assert html.unescape(text(value)) == brief(value)
    assert json.loads(script_json([value])) == [value]


def test_a_budget_is_said_as_the_command_line_says_it():
    plan = invented.experts(2)
    budget = {
        **{"vram": 12 * 2**30, "bpw": 4.5, "ctx": 8192, "parallel": 1, "cache_type_k": "Q8_0", "cache_type_v": "F16"},
        **{"mtp": True, "assume": False, "min_type": ["a=Q4_K", "b=Q5_K"]},
    }
    assert request_options(replace(plan, budget=budget)) == [
        *("--vram 12GiB", "--bpw 4.5", "--ctx 8192", "--cache-type-k Q8_0", "--mtp"),
        *("--min-type a=Q4_K", "--min-type b=Q5_K"),
    ]


def test_what_was_asked_is_said_as_it_was_typed_where_the_plan_knows_that():
    typed = ("--vram", "12GiB", "--tensor-type", "a b=Q4_K", "--quick", "--group=-x")
    assert request_options(replace(invented.experts(2), options=typed)) == [
        *("--vram 12GiB", "--tensor-type 'a b=Q4_K'", "--quick", "--group=-x")
    ]
    assert request_options(replace(invented.experts(2), options=("<b>", "odd"))) == ["<b> odd"]


def test_what_is_not_known_is_said_to_be_so():
    shown = edited()
    assert "not known" in shown and "No losses were scored" in shown and 'id="mode-s"' not in shown
    assert "without a budget" in types_alone() and "without a budget" not in shown


def test_plans_at_the_edges_have_a_page():
    plan = invented.experts(2)
    first, *_ = plan.choices
    own = {first.name: {first.type: first.loss}}
    for odd in (
        replace(plan, mixtures=()),
        replace(plan, mixtures=(), predicted_loss=0.0, gap=None),
        replace(plan, candidates=own),
        replace(plan, candidates={name: dict.fromkeys(losses, 0.0) for name, losses in plan.candidates.items()}),
        replace(plan, choices=plan.choices[:2], limits=()),
        replace(plan, choices=tuple(c for c in plan.choices if c.reason), limits=()),
        replace(plan, choices=(), limits=(), candidates={}),
        replace(plan, limits=(), memory={}, runtime={}, method="cfix"),
        replace(plan, choices=tuple(replace(c, loss=0.0) for c in plan.choices), predicted_loss=0.0),
    ):
        Reader(render_page(odd))


@given(
    st.lists(st.tuples(st.text("QK_M0123456789", min_size=1, max_size=8), st.floats(60, 330), st.floats(20, 290))),
    st.lists(st.tuples(st.floats(60, 330), st.floats(20, 290)), min_size=2, max_size=5),
)
def test_labels_lie_in_the_frame_and_on_nothing(wanted, line):
    frame, obstacles = Box(58, 14, 340, 300), cover_line(line)
    found = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', place_labels([Label(*w) for w in wanted], frame, obstacles)
    )
    boxes = []
    for x, y, word in found:
        half = 3 * len(word)  # 6 of the 6.6 pixels that are kept free for a character
        boxes.append(Box(float(x) - half, float(y) - 8, float(x) + half, float(y) + 2))
    assert len(found) <= len(wanted)
    assert all(frame.holds(box) for box in boxes)
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in [*boxes[i + 1 :], *obstacles])


@given(st.floats(1e-12, 1e3), st.floats(1.05, 1e9), st.booleans(), st.integers(2, 8))
def test_ticks_are_round_rising_and_on_the_axis(low, factor, log, n):
    axis = Axis(low, low * factor, 50, 700, log)
    ticks = axis.ticks(n)
    assert all(low * (1 - 1e-9) <= tick <= low * factor * (1 + 1e-9) for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert all(50 <= axis.at(tick) <= 700 for tick in ticks)
    digits = {round(tick / 10 ** math.floor(math.log10(tick)), 6) for tick in ticks if tick > 0}
    assert log is False or digits <= {1, 2, 5, 10}
