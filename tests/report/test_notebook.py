"""HTML of results: strings stay text, whatever they hold; pictures have a column for each layer."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile import TRIED
from hypothesis import given
from hypothesis import strategies as st

import requant
from requant.conversion.verification import Verification
from requant.errors import REMARK, brief
from requant.planning.frontier import Curve, Point
from requant.report import html as markup
from requant.scoring.evaluate import Evaluation

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-llama-f16.gguf"
OURS = {
    "div",
    "strong",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "span",
    "svg",
    "rect",
    "title",
    "polyline",
    "circle",
}
ATTRIBUTES = {
    *("style", "xmlns", "role", "aria-label", "viewbox", "width", "height", "preserveaspectratio", "x", "y", "fill"),
    *("fill-opacity", "points", "stroke", "cx", "cy", "r"),
}
EVIL = "\"' onload=alert(1) </title></svg></td><script>alert(1)</script>&lt;" + "".join(TRIED.values())


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element must be closed in its order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self._open = [], set(), "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def safe(html):
    page = Page(html)
    assert set(page.tags) <= OURS and page.attributes <= ATTRIBUTES
    assert html.isprintable() or html.replace("\n", "").isprintable()
    return page


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with requant.open(TINY) as m:
        losses = m.score(quick=True, types="Q4_K,Q8_0")
        plan = m.plan(losses=losses, vram="128MiB", ctx=256, reserve="1MiB")
        made = m.convert(folder / "out.gguf", plan)
        return {
            "model": m,
            "inspection": m.inspect(),
            "losses": losses,
            "plan": plan,
            "sized": m.plan(losses=losses, size="7MB"),
            "conversion": made,
            "copy": m.convert(folder / "copy.gguf", like=TINY),
            "verification": requant.verify(made.output, source=m),
            "evaluation": m.evaluate(text=TINY.with_name("eval.txt"), base=m, windows=2, window=64),
            "statistics": m.calibrate(folder / "stats.gguf", windows=1, window=64),
            "curve": m.frontier(losses=losses),
        }


def test_every_result_shows_itself(results):
    for name, result in results.items():
        assert len(safe(result._repr_html_()).text) > 40, name


def test_a_plan_has_a_column_for_each_layer_and_its_budget(results):
    page = safe(results["plan"]._repr_html_())
    assert page.tags.count("rect") == 10 + len({"weights", "free", *results["plan"].memory})
    assert "layer 9: " in page.text and "--vram 128.00 MiB" in page.text and "free" in page.text
    drawn = [p for p in results["curve"].points if p.predicted_loss > 0]
    assert safe(results["curve"]._repr_html_()).tags.count("circle") == len(drawn) > 10
    assert "header" in safe(results["sized"]._repr_html_()).text


def test_figures_are_those_of_the_result(results):
    page = safe(results["evaluation"]._repr_html_())
    assert f"{results['evaluation'].ppl:.4f}" in page.text and "0.000000" in page.text
    assert "the same bytes as were written" in safe(results["verification"]._repr_html_()).text
    assert f"{results['losses'].tensors[0].candidates[0].loss:.3g}" in safe(results["losses"]._repr_html_()).text


def test_hostile_strings_stay_text(results):
    plan, losses, found = results["plan"], results["losses"], results["inspection"]
    made = results["conversion"]
    evil_plan = replace(
        plan,
        source=EVIL,
        arch=EVIL,
        memory={EVIL: 5} | dict(plan.memory),
        notes=(EVIL,),
        limits=tuple(replace(x, option=EVIL) for x in plan.limits),
        choices=tuple(replace(c, name=EVIL, role=EVIL, type=EVIL) for c in plan.choices),
    )
    tensors = tuple(replace(t, name=EVIL, role=EVIL) for t in losses.tensors)
    shares = tuple(replace(s, name=EVIL) for s in found.types)
    evil = [
        evil_plan,
        replace(losses, source=EVIL, arch=EVIL, method=EVIL, imatrix=EVIL, notes=(EVIL,), tensors=tensors),
        replace(
            found, files=(EVIL,), arch=EVIL, title=EVIL, types=shares, warnings=(EVIL,), hyperparameters={EVIL: EVIL}
        ),
        replace(made, output=Path(EVIL.replace("\0", "")), imatrix=EVIL, notes=(EVIL,), plan=evil_plan),
        replace(results["evaluation"], model=EVIL, base=EVIL, text=EVIL),
        Verification(Path("x"), 1, 1, (EVIL,), (EVIL, EVIL)),
        Curve(EVIL, EVIL, results["curve"].points),
    ]
    for result in evil:
        page = safe(result._repr_html_())
        assert "<script>alert(1)</script>&lt;" in page.text, type(result)


def test_empty_results_are_shown_too(results):
    for result in (
        Curve("a", "fisher", ()),
        Curve("a", "fisher", (Point(4.5, 1, 1, None, 0.0, 0.0),)),
        replace(results["losses"], tensors=()),
        replace(results["plan"], choices=(), limits=()),
        replace(results["conversion"], tensors=()),
        replace(results["inspection"], tensors=(), types=(), needs=None, hyperparameters=None),
        Evaluation(1, 2, 3, 4.0, 0.1),
    ):
        safe(result._repr_html_())


@given(st.text())
def test_escaped_text_reads_as_it_is_printed(text):
    page = Page(markup.tag("td", markup.text(text, REMARK), style=text))
    assert page.tags == ["td"]
    assert page.text == brief(text, REMARK)
