"""The site in a real browser, opened from a folder: no errors, nothing fetched, search, copying, a phone's width."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "tutorial.html", "reference/commands.html", "reference/engines.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", out]
    subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return out


def opened(chromium, path, *, width=1300, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    chromium.get(path)


def eventually(ask, seconds=10.0):
    """What `ask` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 1300])
def test_a_page_opens_from_a_folder_without_an_error_or_the_network(chromium, site, name, width):
    opened(chromium, (site / name).as_uri(), width=width)
    assert eventually(lambda: chromium.execute_script("return document.querySelector('h1').innerText"))
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize(("scheme", "ours"), [("light", "default"), ("dark", "slate")])
def test_the_colours_are_the_systems(chromium, site, scheme, ours):
    opened(chromium, (site / "index.html").as_uri(), scheme=scheme)
    chromium.execute_script("localStorage.clear()")
    opened(chromium, (site / "index.html").as_uri(), scheme=scheme)
    is_ours = f"return document.body.getAttribute('data-md-color-scheme') == '{ours}'"
    assert eventually(lambda: chromium.execute_script(is_ours))


def test_the_search_finds_pages_from_a_folder(chromium, site):
    opened(chromium, (site / "index.html").as_uri() + "?q=recurrent")
    found = "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.getAttribute('href'))"
    links = eventually(lambda: chromium.execute_script(found))
    assert any("memory.html" in link for link in links)


def test_a_console_block_is_copied_without_prompt_and_output(chromium, site):
    opened(chromium, (site / "tutorial.html").as_uri())
    script = """
        const code = [...document.querySelectorAll('pre code')].find(c => c.querySelector('.go'))
        code.setAttribute('data-md-copying', '')  // as the theme's button does while it reads
        const text = code.innerText
        code.removeAttribute('data-md-copying')
        return [text.trim(), code.innerText]
    """
    copied, shown = chromium.execute_script(script)
    assert copied == "requant inspect fixtures/tiny-llama-f16.gguf --ctx 512"
    assert shown.startswith(f"$ {copied}\n") and len(shown.splitlines()) > 5
