"""Every Python example of the documentation is run, in order, and prints what stands below it."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CLOSE = 0.2  # of a figure: processors round in their own ways


def examples(page):
    """(line, code, what it prints or None) of each block of Python."""
    text, found = page.read_text(encoding="utf-8"), []
    end = 0
    for match in _BLOCK.finditer(text):
        if match[1] == "python":
            found.append([text.count("\n", 0, match.start()) + 1, match[2], None])
        elif match[1] == "text" and found and not text[end : match.start()].strip():
            found[-1][2] = match[2]
        end = match.end()
    return found


def like(said, wanted):
    """Whether both say the same, figures with a point or an exponent about the same; `...` is anything."""
    lines = said.splitlines(), wanted.splitlines()
    return len(lines[0]) == len(lines[1]) and all(map(_line_like, *lines))


def _line_like(said, wanted):
    words = said.split(), wanted.split()
    if wanted == "...":
        return True
    same = (b in ("...", a) or _about(a.strip("%,"), b.strip("%,")) for a, b in zip(*words, strict=False))
    return len(words[0]) == len(words[1]) and all(same)


def _about(a, b):
    if not re.search(r"[.e]", b):
        return False
    with contextlib.suppress(ValueError):
        return abs(float(a) - float(b)) <= _CLOSE * abs(float(b))
    return False


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", pytest.param(ROOT / "docs" / "python.md", marks=pytest.mark.slow)],
    ids=["README.md", "python.md"],
)
def test_the_python_of_a_page_runs_and_prints_what_is_below_it(page, tmp_path, monkeypatch):
    for name, copy in (("tiny-llama-f16.gguf", "model.gguf"), ("tiny-llama-f16.gguf", ""), ("eval.txt", "")):
        shutil.copyfile(ROOT / "fixtures" / name, tmp_path / (copy or name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    found, names = examples(page), {"__name__": "__main__"}
    assert found
    for line, code, wanted in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, str(page), "exec"), names)
        if wanted is not None:
            assert like(out.getvalue(), wanted), f"{page.name}:{line} prints\n{out.getvalue()}"


def test_a_figure_that_is_another_is_noticed():
    assert like("a 0.0101 12", "a 0.0100 12") and not like("a 0.02 12", "a 0.01 12") and not like("a 13", "a 12")
    assert like("x 0.01", "... 0.01") and like("a b\nc", "...\nc") and not like("a\nb\nc", "...\nc")
    assert not like("a b", "a") and not like("True", "False")
