"""The pictures of the docs: the tiny model's report in Chromium, its picture, and commands as a terminal shows them.

    python scripts/docs/screenshots.py [-o docs/images]

requant is run on fixtures/tiny-llama-f16.gguf; what it prints is drawn by Chromium, with the colours of its escapes.
Pictures are reduced to 255 colours where Pillow is installed (the dev extra).
"""

import argparse
import base64
import fcntl
import html
import importlib.util
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
import chromium
from real_models import FIXTURES, TINY

BUDGET = ["--vram", "11MiB", "--ctx", "512"]
COLUMNS = 100
MOST_BYTES = 300_000
# xterm's 16 colours, a little softer on white text's deployment
PALETTE = (
    *("#1d1f21", "#d54e53", "#8abf5a", "#d9b13b", "#5f9edc", "#b98fd6", "#5fbfb9", "#d0d3d6"),
    *("#7f868d", "#f2777a", "#a8d977", "#f0d264", "#86bbf0", "#d3b0ea", "#86dcd6", "#ffffff"),
)
SGR = re.compile(r"\x1b\[([\d;:]*)m")
OTHER = re.compile(r"\x1b(?:\[[\d;?]*[A-Za-ln-z]|\][^\x07\x1b]*(?:\x07|\x1b\\))")


def requant(*words, **how):
    """Run requant; its stdout."""
    run = [sys.executable, "-m", "requant", *map(str, words)]
    return subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, **how).stdout


def on_a_terminal(folder, *words):
    """What requant, run in `folder`, writes to a terminal of COLUMNS columns, escapes and all, without progress."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm-256color"}
    run = [sys.executable, "-m", "requant", *map(str, words)]
    process = subprocess.Popen(run, cwd=folder, stdout=theirs, stderr=subprocess.DEVNULL, env=env)
    os.close(theirs)
    found = []
    while part := _read(ours):
        found.append(part)
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{' '.join(run)} ended with {process.returncode}")
    return b"".join(found).decode().replace("\r\n", "\n")


def _read(file):
    try:
        return os.read(file, 65536)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


def colour(number):
    """One of the 256 colours."""
    if number < 16:
        return PALETTE[number]
    if number >= 232:
        return "#" + f"{8 + 10 * (number - 232):02x}" * 3
    steps = (0, 95, 135, 175, 215, 255)
    return "#" + "".join(f"{steps[(number - 16) // k % 6]:02x}" for k in (36, 6, 1))


def styled(state, codes):
    """The state after an SGR sequence: bold, dim, underline, reverse, foreground, background."""
    codes, state = [int(c or 0) for c in re.split("[;:]", codes)], dict(state)
    while codes:
        code = codes.pop(0)
        if code == 0:
            state = {}
        elif code in (1, 2, 4, 7):
            state[code] = True
        elif code in (22, 24, 27):
            for one in {22: (1, 2), 24: (4,), 27: (7,)}[code]:
                state.pop(one, None)
        elif code in (39, 49):
            state.pop(code - 9, None)
        elif code in (38, 48):
            kind = codes.pop(0)
            state[code - 8] = colour(codes.pop(0)) if kind == 5 else "#" + "".join(f"{codes.pop(0):02x}" for _ in "rgb")
        else:
            for first, key, bright in ((30, 30, 0), (40, 40, 0), (90, 30, 8), (100, 40, 8)):
                if first <= code < first + 8:
                    state[key] = PALETTE[code - first + bright]
    return state


def css(state):
    """A style attribute's value for a state."""
    ink, deployment = state.get(30, "#d0d3d6"), state.get(40, "transparent")
    if state.get(7):
        ink, deployment = ("#16181b" if deployment == "transparent" else deployment), ink
    words = [f"color:{ink};background:{deployment}"]
    words += [
        word
        for key, word in ((1, "font-weight:700"), (2, "opacity:.65"), (4, "text-decoration:underline"))
        if state.get(key)
    ]
    return ";".join(words)


def terminal_page(text):
    """HTML of `text` with its colours, as a terminal would show it."""
    parts, state, at = [], {}, 0
    text = OTHER.sub("", text).rstrip("\n")
    for found in [*SGR.finditer(text), None]:
        end = len(text) if found is None else found.start()
        if end > at:
            parts.append(f'<span style="{css(state)}">{html.escape(text[at:end])}</span>')
        if found is not None:
            state, at = styled(state, found[1]), found.end()
    look = (
        "html{background:#16181b}body{margin:0;padding:18px 22px;display:inline-block;white-space:pre;"
        "font:14px/1.3 'DejaVu Sans Mono',ui-monospace,monospace}"
    )
    return f"<!DOCTYPE html><meta charset=utf-8><style>{look}</style><body>{''.join(parts)}"


class Camera:
    """Chromium, taking pictures into a folder."""

    def __init__(self, folder):
        self.folder, self.driver = folder, chromium.start()
        self.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})

    def look(self, page, width, height, *, scheme="light", scale=1):
        """Open a file at a size."""
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(Path(page).resolve().as_uri())

    def shoot(self, name, *, clip=None):
        """A picture of what is seen, or of the `clip` (left, top, width, height); raises where it became too large."""
        how = {"format": "png"}
        if clip is not None:
            how |= {"clip": dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1}}
            how["captureBeyondViewport"] = True
        data = small(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", how)["data"]))
        if len(data) > MOST_BYTES:
            raise SystemExit(f"{name} has {len(data)} bytes, the limit is {MOST_BYTES}")
        (self.folder / name).write_bytes(data)
        print(f"{self.folder / name}: {len(data):,} bytes", file=sys.stderr)

    def terminal(self, text, name):
        """A picture of `text` as a terminal shows it."""
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "terminal.html"
            page.write_text(terminal_page(text), encoding="utf-8")
            self.look(page, 1400, 800)
            size = self.driver.execute_script(
                "const b = document.body.getBoundingClientRect(); return [Math.ceil(b.width), Math.ceil(b.height)]"
            )
            self.shoot(name, clip=(0, 0, *size))


def small(png):
    """The picture in 255 colours; as it is without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        return png
    from PIL import Image

    out = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(255, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def report(folder, picture):
    """Convert and evaluate the tiny model in `folder`, draw its `picture` and write its page; the page's path."""
    out, measured, made = folder / "tiny.gguf", folder / "evaluation.json", folder / "report.html"
    requant("convert", TINY, out, *BUDGET)
    measured.write_text(requant("evaluate", out, "--base", TINY, "--text", FIXTURES / "eval.txt", "--json"))
    requant("report", out, "--evaluation", measured, "-o", made, "-o", picture, "--force")
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, default=ROOT / "docs" / "images", dest="folder", help="where the pictures go")
    folder = parser.parse_args().folder.absolute()
    if chromium.programs() is None:
        raise SystemExit("chromium and chromedriver are needed; on Debian: apt-get install chromium chromium-driver")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        made = report(Path(work), folder / "report-picture.png")
        camera = Camera(folder)
        try:
            for scheme in ("light", "dark"):
                camera.look(made, 1200, 1520, scheme=scheme)
                camera.shoot(f"report-{scheme}.png")
            camera.look(made, 1200, 760)
            camera.driver.execute_script("document.querySelector('#mode-s').click()")
            camera.driver.execute_script("document.querySelectorAll('.heat td[data-i]')[40].click()")
            camera.shoot("report-candidates.png")
            camera.look(made, 1200, 1080)
            camera.driver.execute_script("document.querySelector('#curve').scrollIntoView()")
            camera.shoot("report-charts.png")
            camera.look(made, 360, 780, scale=2)
            camera.shoot("report-phone.png")
            shutil.copy(TINY, work)
            camera.terminal(on_a_terminal(work, "plan", TINY.name, *BUDGET, "-o", "plan.json"), "plan.png")
        finally:
            camera.driver.quit()


if __name__ == "__main__":
    main()
