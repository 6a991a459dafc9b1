"""Shell completion: in a real bash, through the entry point that is installed; what is offered for what."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY

from requant.cli.main import COMMANDS
from requant.formats import FORMATS

DOCS = Path(__file__).parents[2] / "docs" / "install.md"


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A PATH on which `requant` is this one."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "requant"
    program.write_text(f"#!{sys.executable}\nfrom requant.cli import run\n\nrun()\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def environment(path):
    return os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def complete(environment, tmp_path):
    """What bash offers for the last of the words, with the line that the documentation gives."""

    def go(*words, where=tmp_path):
        script = f"""
            {bash_line()}
            COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
            compopt() {{ echo "compopt $*"; }}
            _requant_completion requant
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        how = {"capture_output": True, "text": True, "timeout": 60}
        ran = subprocess.run(["bash", "--norc", "-c", script], check=True, env=environment, cwd=where, **how)
        assert ran.stderr == ""
        return ran.stdout.split()

    return go


def bash_line():
    line = next(line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| bash"))
    return line.split("`")[1]


def test_commands_are_completed_without_being_imported(complete):
    assert complete("requant", "") == [*COMMANDS, "help"]
    assert complete("requant", "pl") == ["plan"]
    assert complete("requant", "-q", "ev") == ["evaluate"]


def test_options_are_completed(complete):
    assert complete("requant", "plan", "--vr") == ["--vram"]
    assert "--progress" in complete("requant", "--") and "--progress" in complete("requant", "batch", "--")


def test_types_are_completed_in_any_case_and_after_commas(complete):
    written = [f.name for f in FORMATS.values() if f.can_encode]
    assert complete("requant", "convert", "m", "o", "--type", "") == written
    assert complete("requant", "convert", "m", "o", "--type", "q4_") == ["Q4_0", "Q4_1", "Q4_K"]
    assert complete("requant", "plan", "m", "--types", "Q4_K,IQ4") == ["Q4_K,IQ4_NL", "Q4_K,IQ4_XS"]


def test_presets_engines_cache_types_and_choices_are_completed(complete):
    assert complete("requant", "plan", "m", "--preset", "Q4_K") == ["Q4_K_S", "Q4_K_M"]
    assert complete("requant", "plan", "m", "--engine", "oll") == ["ollama"]
    assert complete("requant", "plan", "m", "--cache-type-k", "q8") == ["q8_0"]
    assert complete("requant", "plan", "m", "--effort", "b") == ["best"]
    assert complete("requant", "plan", "m", "--progress", "j") == ["json"]


def test_models_are_completed_with_ggufs(complete, tmp_path):
    for name in ("a.gguf", "ab.gguf", "a.txt", "b.json"):
        (tmp_path / name).touch()
    assert complete("requant", "inspect", "a") == ["a.gguf", "ab.gguf"]
    assert complete("requant", "plan", "a.gguf", "--losses", "") == ["b.json"]
    (tmp_path / "sub").mkdir()
    shutil.copy(TINY, tmp_path / "sub" / "t.gguf")
    assert complete("requant", "inspect", "sub/") == ["sub/t.gguf"]


def test_folders_and_odd_names_are_left_to_the_shell(complete, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "model.gguf").touch()
    assert complete("requant", "inspect", "mo") == ["compopt", "-o", "default"]
    (tmp_path / "x y; rm z.gguf").touch()
    assert complete("requant", "inspect", "x") == ["compopt", "-o", "default"]


def test_a_wrong_word_before_is_no_error(complete):
    assert complete("requant", "covnert", "pl") == ["plan"]
    assert complete("requant", "plan", "m", "--vram", "12G", "--ra") == ["--ram"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(environment, shell):
    ran = subprocess.run(
        ["requant"],
        env=environment | {"_REQUANT_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_requant_completion" in ran.stdout and f"{shell}_complete" in ran.stdout and ran.stderr == ""
    assert f"_REQUANT_COMPLETE={shell}_source requant" in DOCS.read_text(encoding="utf-8")
