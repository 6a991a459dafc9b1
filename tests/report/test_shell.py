"""Command lines to copy: the shell makes of them the very words, and a terminal acts on none."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conversions import plan_for
from hostile import EVERYTHING, TRIED
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import TINY

from requant.container.source import open_source
from requant.errors import printable
from requant.planning.engines import ENGINES
from requant.report import shell
from requant.report.start_command import start_command

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@pytest.fixture(scope="module")
def plan():
    with open_source(TINY) as source:
        plan = plan_for(source, "Q4_K")
    runtime = {"n_gpu_layers": 2, "all_layers": False, "draft": EVERYTHING, "mmproj": "-" + EVERYTHING}
    return replace(plan, budget={"ctx": 512, "cache_type_k": "Q8_0"}, runtime=runtime)


def words_of(line, program="bash"):
    """The words that a shell makes of a line, by writing each with a NUL behind it."""
    path = shutil.which(program)
    assert path, program
    ran = subprocess.run([path, "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return [word.decode("utf-8", "surrogateescape") for word in ran.stdout.split(b"\0")[:-1]]


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=1))
def test_a_shell_reads_back_every_word(words):
    line = shell.join_words(words)
    assert printable(line) == line
    assert words_of(line) == words


@pytest.mark.parametrize("text", [*TRIED.values(), "a\udcffb", "it's \\ \x1b0", "", "~", "-x", "#"])
def test_a_shell_reads_back_what_was_meant_for_it(text):
    assert words_of(shell.join_words(["a", text])) == ["a", text]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["plain.gguf", "two words.gguf", "-rf.gguf", EVERYTHING.replace("/", "_") + ".gguf"])
def test_every_engine_is_told_the_very_file(plan, engine, name):
    text = start_command(replace(plan, runtime=plan.runtime | {"engine": engine}), Path(name))
    assert all(printable(line) == line for line in text.split("\n"))
    expected = f"./{name}" if name.startswith("-") else name
    if ENGINES[engine].family != "ollama":
        words = words_of(text)
        assert expected in words and "\n" not in text
        beside = {EVERYTHING, f"./-{EVERYTHING}"} <= set(words)
        assert beside == (ENGINES[engine].family != "sharpinference")
        return
    lines = text.split("\n")
    spelled = [line for line in lines if line.startswith("FROM ")]
    assert len(spelled) == 1 and all(line.startswith(("FROM ./", "PARAMETER num_", "# ")) for line in lines)
    assert spelled == [f"FROM ./{printable(name)}"] and ("rename the file" in lines[0]) == (printable(name) != name)
