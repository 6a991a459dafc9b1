"""One headless Chromium for all tests of a process, and the pages that they open."""

from types import SimpleNamespace

import invented
import pytest
from chromium import programs, start

from requant.report.page.document import render_page


@pytest.fixture(scope="session")
def chromium():
    """A browser; whoever lacks Chromium skips, scripts/test.sh installs it where it can."""
    if programs() is None:
        pytest.skip("no chromium here")
    driver = start()
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Pages as files: a record with evaluations, a plan of many layers, and hostile ones."""
    folder = tmp_path_factory.mktemp("pages")
    made, evaluations = invented.record(invented.experts(6))
    hostile, more = invented.hostile()
    texts = {
        "record": render_page(made, evaluations=evaluations, source_sha256="12" * 32, output_sha256="34" * 32),
        "plan": render_page(invented.experts(80)),
        "hostile": render_page(hostile, evaluations=more),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def browser(chromium, files):
    """What the tests do with the browser: open a page at a size and colour scheme, ask it, point at it."""

    def cdp(name, **parameters):
        return chromium.execute_cdp_cmd(name, parameters)

    def opened(name, *, width=1280, height=800, scheme="light", scripts=True):
        cdp("Emulation.setScriptExecutionDisabled", value=not scripts)
        cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        chromium.get((files / f"{name}.html").as_uri())

    def run(script, *arguments):
        return chromium.execute_script(script, *arguments)

    def box(selector, index=0):
        run("document.querySelectorAll(arguments[0])[arguments[1]].scrollIntoView({block: 'center'})", selector, index)
        script = "const b = document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect();"
        return run(f"{script} return [b.left + b.width / 2, b.top + b.height / 2]", selector, index)

    def mouse(kind, x, y):
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def hover(selector, index=0):
        mouse("mouseMoved", *box(selector, index))

    def click(selector, index=0):
        at = box(selector, index)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            mouse(kind, *at)

    def press(key):
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "End": 35}[key]
        how = {"key": key, "code": key, "windowsVirtualKeyCode": code} | ({"text": "\r"} if key == "Enter" else {})
        cdp("Input.dispatchKeyEvent", type="keyDown", **how)
        cdp("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in how.items() if k != "text"})

    def text(selector):
        return run("const e = document.querySelector(arguments[0]); return e.hidden ? '' : e.innerText", selector)

    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    yield SimpleNamespace(
        **{"open": opened, "run": run, "box": box, "mouse": mouse, "hover": hover, "click": click, "press": press},
        **{"text": text, "cdp": cdp, "log": chromium.get_log, "uri": lambda n: (files / f"{n}.html").as_uri()},
    )
    cdp("Emulation.setScriptExecutionDisabled", value=False)
    cdp("Emulation.clearDeviceMetricsOverride")
    cdp("Browser.resetPermissions")
