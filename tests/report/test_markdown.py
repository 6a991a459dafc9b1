"""Strings from files in Markdown and YAML: read back by parsers of others, they are what they were."""

from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from requant.errors import REMARK, brief, printable
from requant.report.card import markdown as md

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "`x`",
    "``",
    "*a* _b_ __c__",
    "[x](javascript:alert(1))",
    "![i](http://e.vil)",
    "# head",
    "- item",
    "1. one",
    "1) one",
    "> quote",
    "~~gone~~",
    "&lt;b&gt;",
    "&#42;",
    "\\",
    "a\\|b",
    "\\`",
    "$\\sum$",
    "<!-- ",
    "http://e.vil/x",
    "www.e.vil",
    "me@e.vil",
    "a\nb",
    "---",
    "===",
    "\u202eevil",
    "\u540d\u524d",
    "+ x",
    " a  b ",
    "<https://e.vil>",
    "[a]: /x",
    "no",
    "true",
    "'",
    '"',
    "{{x}}",
    "x\x7fy",
    "\ud800",
    "\U0001f600",
    "\x85",
    "a: b",
    "@x",
]
strings = st.text(max_size=60) | st.sampled_from(HOSTILE)


class Read(HTMLParser):
    """The tags of rendered Markdown, and the text of each table cell or of all."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text, self.cells = [], "", []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


def rendered(markdown):
    return Read(PARSER.render(markdown))


@given(strings.filter(bool))
@example("2. x")
def test_text_reads_as_it_is_spelled_in_headings_items_and_emphasis(string):
    shown = md.text(string)
    wanted = brief(string, REMARK)
    for before, tags in (("# ", ["h1"]), ("- ", ["ul", "li"]), ("a ", ["p"])):
        found = rendered(f"{before}{shown}\n")
        assert [tag for tag, _ in found.tags] == tags
        assert found.text.strip("\n") == f"{'a ' if before == 'a ' else ''}{wanted}"


@given(strings, strings)
def test_cells_hold_what_was_put_into_them(a, b):
    found = rendered(md.table(["x", "y"], [[md.code(a), md.text(b) or "-"]]))
    allowed = {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert {tag for tag, _ in found.tags} <= allowed
    cells = [cell.strip("\n") for cell in found.cells]
    assert cells == ["x", "y", brief(a, REMARK), brief(b, REMARK) or "-"]


@given(strings)
def test_a_block_keeps_its_lines(string):
    found = rendered(md.block(string, "sh"))
    assert [tag for tag, _ in found.tags] == ["pre", "code"]
    assert found.text.rstrip("\n") == "\n".join(map(printable, string.split("\n"))).rstrip("\n")


@given(strings)
def test_a_scalar_is_the_same_string_for_another_parser_of_yaml(string):
    wanted = printable(string)
    values = {"key": string, "list": [string, "x"]}
    lines = md.front_matter(values).split("\n")
    assert lines[0] == lines[-1] == "---"
    found = yaml.safe_load("\n".join(lines[1:-1]))
    assert found == ({"key": wanted} if string else {}) | {"list": [wanted, "x"]}


@pytest.mark.parametrize(
    "word", ["no", "NO", "true", "on", "null", "Y", "1.0", "0x1", "1e3", "~", "", "2024-01-01", ".inf"]
)
def test_what_yaml_takes_for_something_else_is_quoted(word):
    assert yaml.safe_load(f"key: {md.scalar(word)}") == {"key": word}
    assert md.scalar(word).startswith('"')


@pytest.mark.parametrize("word", ["apache-2.0", "HuggingFaceTB/SmolLM2-135M", "text-generation", "en", "a b"])
def test_what_nobody_mistakes_stays_plain(word):
    assert md.scalar(word) == word
    assert yaml.safe_load(f"key: {md.scalar(word)}") == {"key": word}


def test_names_of_types_and_tensors_stay_readable():
    assert md.text("Q4_K_M, 0.1.0 (fisher); it's 2 x 3") == "Q4_K_M, 0.1.0 (fisher); it's 2 x 3"
    assert md.code("blk.0.attn_q.weight") == "`blk.0.attn_q.weight`"


def test_an_address_leads_nowhere_else():
    assert md.address("a b)|(x#?.gguf") == "a%20b%29%7C%28x%23%3F.gguf"
    assert md.address("javascript:alert(1)").startswith("javascript%3A")
