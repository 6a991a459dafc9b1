"""The site is built from docs/ without a warning, and needs no network to be read."""

import os
import re
import subprocess
import sys

import pytest
from doc_blocks import DOCS, ROOT

FETCHED = (
    re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"' >]+)"""),
    re.compile(r"""<link\b[^>]*\bhref=["']?([^"' >]+)"""),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr  # links, anchors, and pages that are missing in the navigation
    return out


def test_every_page_is_in_the_site(site):
    pages = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    assert pages <= {str(path.relative_to(site)) for path in site.rglob("*.html")}
    navigation = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}"' in navigation for page in pages - {"index.html"})
    assert 'href="security.html"' in navigation and 'href="changelog.html"' in navigation


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        fetched = [name for tag in FETCHED for name in tag.findall(page.read_text(encoding="utf-8"))]
        assert fetched and not [f for f in fetched if "//" in f], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style
