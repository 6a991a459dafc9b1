"""Links within the documentation lead somewhere, to the heading too."""

import re

import pytest
from doc_blocks import DOCS, PAGES, ROOT, blocks

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """The lines outside of blocks."""
    inside = {n for b in blocks(page) for n in range(b.line, b.line + len(b.lines) + 2)}
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line for number, line in enumerate(lines, 1) if number not in inside]


def anchors(page):
    """What the headings of a page are called in links, as GitHub and the site do."""
    found = set()
    for line in prose(page):
        if line.startswith("#"):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip()).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(slug)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page):
    for target in LINK.findall("\n".join(prose(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"
        if DOCS in page.parents:  # the site has docs/ and these two of the root
            known = there.is_relative_to(DOCS) or there in (ROOT / "SECURITY.md", ROOT / "CHANGELOG.md")
            assert known, f"{page.name}: {target} is not in the site"


def test_a_heading_is_an_anchor(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `B`, C\n\n```sh\n# no heading\n```\n\n## [D](e.md) & f\n")
    assert anchors(page) == {"a-b-c", "d--f"}
