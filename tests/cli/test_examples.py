"""The help of every command as a man page: headings, examples that run as they are written, exit codes."""

import shlex
import shutil
from pathlib import Path

import click
import pytest
from commands import FIXTURES, TINY, run

from requant.cli import console as speech
from requant.cli.command import Command, common
from requant.cli.help_pages import EXIT_CODES, HEADINGS, MAIN, OTHER, full_headings
from requant.cli.main import COMMANDS, main

PAGES = [MAIN, *(main.get_command(None, name).page for name in COMMANDS)]
EXAMPLES = list(dict.fromkeys(example.command for page in PAGES for example in page.examples))
JOBS = """
[[job]]
source = "model.gguf"
output = "out/{stem}-{encoding}.gguf"
quick = true
budgets = [{ preset = "Q4_K_M" }, { size = "7MiB" }]
"""
each_command = pytest.mark.parametrize("name", COMMANDS)


def help_of(capsys, *words):
    return run(capsys, *words, "--help").out


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with every file that the examples read."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(TINY, folder / "model.gguf")
    (folder / "text.txt").write_text((FIXTURES / "eval.txt").read_text(encoding="utf-8")[:20000], encoding="utf-8")
    (folder / "jobs.toml").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            "calibrate model.gguf --windows 1 --window 64 -o stats.gguf",
            "score model.gguf --windows 1 --window 64 -o losses.json",
            "plan model.gguf --losses losses.json --bpw 4.5 -o plan.json",
            "convert model.gguf out.gguf --plan plan.json",
        ):
            main.main(shlex.split(words), standalone_mode=False)
    return folder


def runs_the_model(line):
    """Whether an example takes a while: the model is run on the text that ships, or on a whole one."""
    scored = line.startswith(("requant score", "requant calibrate")) and "--quick" not in line
    return scored or line.startswith("requant evaluate") or "--jobs" in line


@pytest.mark.parametrize(
    "line", [pytest.param(x, marks=pytest.mark.slow) if runs_the_model(x) else x for x in EXAMPLES]
)
def test_an_example_of_the_help_runs_as_it_is_written(capsys, monkeypatch, tmp_path, made, line):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    program, *words = shlex.split(line)
    for out in [words[words.index("-o") + 1]] if "-o" in words else words[2:3] * (words[0] == "convert"):
        for file in (Path(out), Path(f"{out}.requant.json")):  # what other examples start from
            file.unlink(missing_ok=True)
    ran = run(capsys, *words)
    assert program == "requant" and ran.code == 0 and ran.out, ran


@each_command
def test_a_command_has_three_to_five_examples_that_fit_a_terminal(capsys, name):
    examples = main.get_command(None, name).page.examples
    assert 3 <= len(examples) <= 5
    text = help_of(capsys, name)
    for example in examples:
        assert example.command.startswith(f"requant {name} ") and f"    {example.command}\n" in text
    assert max(map(len, text.splitlines())) <= 80


@each_command
def test_every_option_of_a_command_stands_under_a_heading(capsys, name):
    command = main.get_command(None, name)
    text = help_of(capsys, name)
    sections = [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert OTHER not in sections
    wanted = [heading for heading in HEADINGS if heading in sections]
    files = ["Files"] if command.page.files else []
    assert sections == [*files, *wanted, "Examples", "Exit codes", "See also"]
    for option in command.params:
        assert not isinstance(option, click.Option) or option.opts[-1] in text


def test_no_option_stands_under_two_headings():
    every = [option for options in full_headings().values() for option in options]
    assert len(every) == len(set(every))


@each_command
def test_a_help_says_its_exit_codes_and_where_to_read_on(name):
    page = main.get_command(None, name).page
    assert {0, 2, 3} <= set(page.exit_codes) <= EXIT_CODES.keys()
    assert page.see and set(page.see) <= COMMANDS.keys() - {name}


@each_command
def test_help_with_a_name_is_the_help_of_that_command(capsys, name):
    assert run(capsys, "help", name).out == help_of(capsys, name)


def test_help_alone_is_the_help_of_all(capsys):
    assert run(capsys, "help").out == help_of(capsys)


@each_command
@pytest.mark.parametrize("words", [["-q"], ["-v"], ["--progress", "json"], ["--debug"]], ids=" ".join)
def test_the_common_options_go_before_and_after_a_commands_name(capsys, name, words):
    assert run(capsys, *words, name, "--help").code == 0
    option = next(o for o in main.get_command(None, name).params if words[0] in o.opts)
    assert option.help in {o.help for o in common()}


def test_a_command_needs_no_more_than_the_class(capsys):
    @click.command("new", cls=Command)
    @click.option("--odd", is_flag=True, help="Odd.")
    def new(odd):
        """New."""

    found = new.get_help(click.Context(new, info_name="new"))
    assert "Options:\n  --odd  Odd." in found and "--progress" in found and "Examples" not in found


def test_a_run_does_not_inherit_the_settings_of_another(capsys):
    run(capsys, "-q", "--progress", "json", "inspect", TINY)
    assert (speech.settings.level, speech.settings.progress) == (speech.QUIET, "json")
    run(capsys, "inspect", TINY)
    assert (speech.settings.level, speech.settings.progress) == (speech.NORMAL, "auto")
