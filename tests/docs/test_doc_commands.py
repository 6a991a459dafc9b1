"""Every command of the documentation is run, page by page, and ends as the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import real_models
from doc_blocks import PAGES, ROOT, WRITTEN, blocks, commands
from doc_models import furnish
from doc_running import NOT_RUN, SHELL, check, difference, reason_not_to_run, run_line

from requant.cli.main import COMMANDS, main

LANGUAGES = {"sh", "console", "python", "toml", "json", "text", "yaml", "csv", "make", "js", "powershell", "fish"}
RUN_ELSEWHERE = {"README.md", "python.md"}  # test_python_pages.py runs their Python
named = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
QUICK = {"README.md", "SECURITY.md", "engines.md", "imatrix.md", "index.md", "progress.md"}  # the others take long


def play(page, sandbox, *, compared=lambda line: True):
    """Do what a page says, from its top to its end; compared: of which commands the output is."""
    names = {}
    for block in blocks(page):
        if block.title:
            path = sandbox / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a link to what all pages share
            path.write_text(block.text, encoding="utf-8")
        if block.language == "python" and page.name not in RUN_ELSEWHERE:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)
        for command in commands(block) if block.language in ("sh", "console") else ():
            ran = run_line(command)
            if ran is not None:
                check(command, ran, compared=compared(command.line))


@pytest.mark.parametrize(
    "page",
    [p if p.name in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in WRITTEN],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_do_what_it_says(sandbox, page):
    play(page, sandbox, compared=lambda line: "smollm2" not in line.lower())


@pytest.mark.slow
def test_the_tutorial_is_true_of_the_real_model(tmp_path, tmp_path_factory, monkeypatch):
    furnish(tmp_path, tmp_path_factory.getbasetemp(), real_models.smollm2())
    monkeypatch.chdir(tmp_path)
    play(ROOT / "docs" / "tutorial.md", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_says_what_it_is_and_hides_no_command(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: of what kind is the block?"
        if page in WRITTEN and block.language == "text":
            assert not [line for line in block.lines if re.match(r"\$? ?requant \w(?!.*<TAB>)", line)], block.where


def test_what_is_not_run_has_a_reason_and_is_there():
    lines = [c.line for p in WRITTEN for b in blocks(p) if b.language in ("sh", "console") for c in commands(b)]
    strangers = [line for line in lines if not line.startswith("requant") and line.split()[0] not in SHELL]
    assert all(map(reason_not_to_run, strangers))
    unused = [start for start in NOT_RUN if not any(re.match(start, line) for line in lines)]
    assert not unused, "nothing begins so any more"


def options():
    """Every option of every command, `requant` itself included."""
    found = {option for p in main.params for option in (*p.opts, *p.secondary_opts)}
    for name in COMMANDS:
        found |= {o for p in main.get_command(None, name).params for o in (*p.opts, *p.secondary_opts)}
    return {option for option in found if option.startswith("-")} | {"--help"}


# options of others that the documentation speaks of
FOREIGN = {
    *("--require-hashes", "--no-deps", "--disable-pip", "--upgrade"),  # pip, pip-audit
    *("--nthreads", "--nworkers"),  # dask
    "--strict",  # mkdocs
    *("--n-cpu-moe", "--outtype", "--spec-type", "--embedding", "--reranking"),  # llama.cpp
    "--diffusion-model",  # stable-diffusion.cpp
}


@named
def test_options_in_the_text_are_options_of_a_command_or_a_script(page):
    text = page.read_text(encoding="utf-8")
    known = options() | FOREIGN
    scripts = [s for s in (ROOT / "scripts").rglob("*") if s.suffix in (".py", ".sh") and s.name in text]
    in_scripts = "\n".join(s.read_text(encoding="utf-8") for s in scripts)
    for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) - known):
        assert f'"{option}"' in in_scripts or option in in_scripts, f"{page.name}: {option}"


@named
def test_the_scripts_that_a_page_names_are_there(page):
    for script in re.findall(r"\b(?:scripts|tests)/[\w/]+\.(?:py|sh)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), script


def test_outputs_are_compared_but_for_times_and_the_last_digits():
    shown = ("a  1.00 b", "...", "took 3.2 s", "end")
    assert difference(shown, ["a 1.01 b", "x", "y", "took 12.0 s", "end", ""]) is None
    assert "printed" in difference(shown, ["a 1.10 b", "took 1 s", "end"])
    assert difference(("Q4_K 3.50 KiB free",), ["IQ4_XS  1.00 KiB free"]) is None
    assert "printed" in difference(("Q4_K  3.50 KiB",), ["Q4_K  1.00 KiB"])
    assert "not printed" in difference(shown, ["a 1.00 b", "took 1 s"])
    assert "not shown" in difference(("a",), ["a", "b"])
    assert "printed" in difference(("a",), ["b"])


def test_a_script_prints_its_options():
    ran = subprocess.run(
        [sys.executable, Path(ROOT / "scripts" / "docs" / "reference.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--check" in ran.stdout
