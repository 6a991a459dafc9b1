"""The reference is what the code says, and says all of it."""

import re
import subprocess
import sys

import pytest
from doc_blocks import GENERATED, ROOT
from test_doc_commands import options

from requant import errors
from requant.api.batch.summary import SOME
from requant.cli.command import common
from requant.cli.main import COMMANDS, main


def test_the_reference_is_not_stale():
    words = [sys.executable, ROOT / "scripts" / "docs" / "reference.py", "--check"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_page_of_architectures_is_not_stale():
    words = [sys.executable, ROOT / "scripts" / "docs" / "architectures.py", "--check"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_stale_page_is_noticed(monkeypatch, tmp_path):
    sys.path.insert(0, str(ROOT / "scripts" / "docs"))
    import reference

    for name in reference.PAGES:
        (tmp_path / name).write_text((GENERATED / name).read_text(encoding="utf-8") + "\n")
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    with pytest.raises(SystemExit, match=r"commands.md, python.md, .* run python scripts/docs/reference.py"):
        reference.run()


def test_every_option_of_every_command_is_in_the_reference():
    text = (GENERATED / "commands.md").read_text(encoding="utf-8")
    everywhere = text.partition("\n## ")[0]
    sections = dict(re.findall(r"^## requant (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert list(sections) == list(COMMANDS)
    for name, section in sections.items():
        for parameter in main.get_command(None, name).params:
            if not getattr(parameter, "hidden", False) and parameter.param_type_name == "option":
                said = everywhere if parameter.name in {p.name for p in common()} else section
                assert all(re.search(rf"{option}\b", said) for option in parameter.opts), (name, parameter.opts)
    assert options() - {"--help", "-h", "--debug", "--version"} <= set(re.findall(r"--?[a-z][a-z-]*", text))


def test_every_exit_code_is_documented():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.RequantError)]
    codes = {k.exit_code for k in kinds} | {0, 1, 2, SOME, 129, 130, 143}
    rows = re.findall(r"^\| \d.*", (GENERATED / "exit-codes.md").read_text(encoding="utf-8"), re.M)
    assert codes == {int(n) for row in rows for n in re.findall(r"\b\d{1,3}\b", row)}


def test_every_schema_and_every_error_is_documented():
    files = (GENERATED / "files.md").read_text(encoding="utf-8")
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "requant").rglob("*.py"))
    schemas = set(re.findall(r'"(requant\.[a-z]+/\d+)"', sources))
    assert schemas and all(f"| `{schema}` | " in files and f"| `{schema}` | |" not in files for schema in schemas)
    kinds = [n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.RequantError)]
    assert all(f"requant.errors.{name}" in (GENERATED / "python.md").read_text(encoding="utf-8") for name in kinds)
