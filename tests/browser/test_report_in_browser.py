"""The report page in a real browser: it renders, answers to mouse and keyboard, and runs nothing but its own."""

import json

import invented
import pytest

from requant.errors import brief

PAGES = ("record", "plan", "hostile")
each_page = pytest.mark.parametrize("name", PAGES)
COLUMN = "return [...document.querySelectorAll('#tensors tbody tr')].filter(r => !r.hidden)"
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


def names(browser):
    return browser.run(f"{COLUMN}.map(r => r.cells[0].innerText)")


def requested(browser):
    """What the browser asked for, but for the page itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    sent = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
    return [url for url in sent if not any(url == browser.uri(page) for page in PAGES) and url != "about:blank"]


@each_page
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_renders_without_an_error_and_asks_the_network_for_nothing(browser, name, scheme):
    browser.open(name, scheme=scheme)
    assert browser.run("return document.querySelectorAll('#tensors tbody tr').length") > 20
    assert browser.text("#count").split()[0] == str(len(names(browser)))
    assert browser.log("browser") == []
    assert requested(browser) == []


@each_page
@pytest.mark.parametrize("width", [360, 768])
def test_a_page_is_never_wider_than_a_small_screen(browser, name, width):
    browser.open(name, width=width, height=780)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return Math.max(...[...document.querySelectorAll('.chart')].map(c => c.clientWidth))") <= width


def test_the_theme_is_the_systems_until_one_is_chosen_which_is_remembered(browser):
    browser.open("record")
    browser.run("localStorage.clear()")
    seen = {}
    for scheme in ("light", "dark"):
        browser.open("record", scheme=scheme)
        seen[scheme] = browser.run(BACKGROUND)
    assert seen["light"] != seen["dark"]
    for label in ("light", "dark", "auto", "light"):  # the system's is dark
        browser.click("#theme")
        assert browser.text("#theme") == f"theme: {label}"
        assert browser.run(BACKGROUND) == seen["dark" if label == "auto" else label]
    browser.open("record", scheme="dark")
    assert (browser.text("#theme"), browser.run(BACKGROUND)) == ("theme: light", seen["light"])
    browser.run("localStorage.clear()")


def test_a_theme_can_be_chosen_where_nothing_can_be_remembered(browser):
    script = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    added = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=script)
    try:
        browser.open("record", scheme="dark")
        before = browser.run(BACKGROUND)
        browser.click("#theme")
        assert browser.run(BACKGROUND) != before
        assert browser.log("browser") == []
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


@pytest.mark.parametrize(("column", "key"), [(0, "name"), (2, "layer"), (6, "bytes"), (9, "loss"), (11, "measured")])
def test_a_heading_sorts_by_the_exact_figures_then_the_other_way_then_not(browser, column, key):
    browser.open("record")
    data = {
        t["name"]: t[key]
        for t in json.loads(browser.run("return document.querySelector('#data').textContent"))["tensors"]
    }
    file_order = names(browser)
    heading = f"#tensors thead th:nth-child({column + 1})"
    sort = f"return document.querySelector('{heading}').getAttribute('aria-sort')"
    browser.click(f"{heading} button")
    up = [data[name] for name in names(browser)]
    known = [value for value in up if value is not None]
    assert known == sorted(known) and up[len(known) :] == [None] * (len(up) - len(known))
    assert browser.run(sort) == "ascending"
    browser.click(f"{heading} button")
    assert [v for name in names(browser) if (v := data[name]) is not None] == sorted(known, reverse=True)
    assert browser.run(sort) == "descending"
    browser.click(f"{heading} button")
    assert names(browser) == file_order and browser.run(sort) is None


def test_tensors_are_filtered_by_name_type_and_role(browser):
    browser.open("record")
    put = "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    browser.run(put, "#of-name", "ATTN_Q")
    assert names(browser) == [f"blk.{i}.attn_q.weight" for i in range(6)]
    browser.run(put, "#of-type", "Q3_K")
    shown = names(browser)
    assert 0 < len(shown) < 6
    assert browser.text("#count").startswith(f"{len(shown)} of ")
    browser.run(put, "#of-name", "")
    browser.run(put, "#of-type", "")
    browser.run(put, "#of-role", "norm")
    assert names(browser) == [f"blk.{i}.attn_norm.weight" for i in range(6)]


def test_a_cell_under_the_mouse_shows_its_figures(browser):
    browser.open("record")
    browser.hover(".heat:not(.outside) td[data-i]", 3)
    assert browser.text("#tip").splitlines()[0] == "layer 3, attn_q"
    assert "bits per weight" in browser.text("#tip") and "sensitivity" in browser.text("#tip")
    browser.mouse("mouseMoved", 2, 2)
    assert browser.text("#tip") == ""


def test_the_map_is_walked_with_the_keyboard(browser):
    browser.open("record")
    browser.run("document.querySelector('.heat:not(.outside) td[tabindex=\"0\"]').focus()")
    first = browser.text("#tip").splitlines()[0]
    for key, where in (("ArrowRight", "layer 1, attn_q"), ("ArrowDown", "layer 1, attn_k"), ("End", "layer 5, attn_k")):
        browser.press(key)
        assert browser.text("#tip").splitlines()[0] == where
    assert first == "layer 0, attn_q"
    assert browser.run("return document.querySelectorAll('.heat:not(.outside) td[tabindex=\"0\"]').length") == 1
    browser.press("Escape")
    assert browser.text("#tip") == ""
    browser.press("Enter")
    assert browser.text("#candidates-title") == "Layer 5, attn_k"


def test_a_click_on_a_cell_lists_its_candidates_with_the_chosen_one_marked(browser):
    browser.open("record")
    browser.click(".heat.outside td[data-i]", 1)
    plan = invented.experts(6)
    choice = next(c for c in plan.choices if c.name == "output.weight")
    lines = browser.run("return [...document.querySelectorAll('#candidates-body tbody tr')].map(r => r.innerText)")
    assert [line.split("\t")[0].strip("\u25c6 ").split(",")[0] for line in lines] == list(invented.TYPES)
    chosen = [line for line in lines if "chosen" in line]
    assert len(chosen) == 1 and choice.type in chosen[0]
    browser.press("Escape")
    assert not browser.run("return document.querySelector('#candidates').open")


def test_the_map_is_coloured_by_bits_by_sensitivity_and_by_loss(browser):
    browser.open("record")
    colours = "return [...document.querySelectorAll('.heat td[data-i]')].map(c => getComputedStyle(c).backgroundColor)"
    words = "return document.querySelectorAll('.heat td[data-i]')[2].innerText"
    seen = []
    for mode in "bsl":
        browser.click(f"#mode-{mode}")
        seen.append((tuple(browser.run(colours)), browser.run(words)))
    assert len(set(seen)) == 3
    assert all(len(set(colour)) > 2 for colour, _ in seen)


@pytest.mark.parametrize("width", [1280, 360])
def test_the_charts_show_their_figures_and_no_label_lies_on_another(browser, width):
    browser.open("record", width=width, height=780)
    chart = ".curve.wide" if width > 640 else ".curve.narrow"
    seen = "return [...document.querySelectorAll('.curve')].filter(c => c.checkVisibility()).map(c => c.classList[2])"
    assert browser.run(seen) == [chart.split(".")[2]]
    browser.hover(f"{chart} .mixture", 0)
    assert browser.text("#tip").startswith("Q3_K_M: ")
    browser.hover(f"{chart} .frontier")
    assert browser.text("#tip").startswith("the best of its size")
    browser.hover(".errors .dots circle", 0)
    assert "predicted error" in browser.text("#tip")
    overlaps = """
        const boxes = [...document.querySelectorAll(arguments[0] + ' .label')].map(t => t.getBoundingClientRect());
        return boxes.filter((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right
            && a.top + 2 < b.bottom && b.top + 2 < a.bottom)).length
    """
    assert browser.run(overlaps, chart) == 0
    assert browser.run("return document.querySelectorAll(arguments[0] + ' .label').length", chart) >= 3


@pytest.mark.parametrize("clipboard", ["works", "is refused", "is not there"])
def test_the_button_copies_the_command(browser, clipboard):
    broken = {
        "works": "document.execCommand = undefined",
        "is refused": "navigator.clipboard.writeText = async () => { throw new DOMException('no', 'NotAllowedError') }",
        "is not there": "navigator.clipboard.writeText = undefined",
    }
    browser.open("record")
    browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run(broken[clipboard])
    browser.click(".copy", 1)
    copied = browser.run("await new Promise(r => setTimeout(r, 50)); return await navigator.clipboard.readText()")
    assert copied == "requant verify out.gguf --source experts.gguf"
    assert browser.run("return document.querySelectorAll('.copy')[1].textContent") == "copied"


def test_without_scripts_the_figures_and_the_table_are_there_and_nothing_that_would_not_work(browser):
    browser.open("record", scripts=False)
    shown = browser.run("return document.body.innerText")
    plan = invented.experts(6)
    assert all(c.name in shown for c in plan.choices)
    assert f"{plan.bpw:.3f}" in shown and "--vram" in shown and "0.04321" in shown
    assert (
        browser.run("return [...document.querySelectorAll('button, select')].filter(e => e.offsetParent).length") == 0
    )
    assert browser.run("return document.querySelector('.heat td').title") != ""


def test_hostile_strings_stay_text_and_run_nothing(browser):
    browser.open("hostile")
    for selector in ("#mode-s", "#tensors thead button", ".heat td[data-i]"):
        browser.hover(selector)
        browser.click(selector)
    made, _ = invented.hostile()
    browser.press("Escape")
    assert set(names(browser)) == {brief(c.name) for c in made.plan.choices}
    assert "owned" not in browser.run("return document.title.split(' - ')[1]")
    assert browser.run("return document.title").startswith(invented.EVERYTHING[:8])
    assert browser.run("return document.querySelectorAll('img, iframe, object, base, link, form').length") == 0
    assert browser.run("return [...document.scripts].map(s => s.type)") == ["application/json", ""]
    attributes = set(browser.run("return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"))
    assert [name for name in attributes if name.startswith("on")] == []
    links = browser.run("return [...document.links].map(a => a.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    assert browser.log("browser") == [] and requested(browser) == []


CONTRAST = """
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const parsed = (colour, under) => {
        canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
    };
    const light = (colour) => {
        const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const [r, g, b] = colour.match(/[0-9]+/g).map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = (e) => e ? parsed(getComputedStyle(e).backgroundColor, behind(e.parentElement)) : 'rgb(255,255,255)';
    const found = [];
    for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!own || !e.checkVisibility({visibilityProperty: true}) || e.closest('script, style, option')) continue;
        const style = getComputedStyle(e), under = behind(e);
        const ink = parsed(e.ownerSVGElement ? style.fill : style.color, under);
        const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
        const name = `${e.tagName} ${e.className.baseVal ?? e.className}`;
        if ((a + .05) / (b + .05) < 4.5) found.push(`${name}: ${ink} on ${under}`);
    }
    return [...new Set(found)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(browser, scheme):
    browser.open("record", scheme=scheme)
    for mode in "bsl":
        browser.click(f"#mode-{mode}")
        browser.mouse("mouseMoved", 2, 2)
        assert browser.run(CONTRAST) == []
