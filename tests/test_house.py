"""The house: what every module keeps to."""

import ast
import importlib
from pathlib import Path

import pytest

from requant.formats import FORMATS, by_name

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "requant").rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


@each_module
def test_a_module_opens_with_one_sentence_that_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "no docstring"
    first = docstring.split("\n\n")[0]
    assert first.endswith("."), first
    assert len(first) < 500


@each_module
def test_a_module_is_short_enough_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@each_module
def test_a_function_is_short_enough_to_be_seen_at_once(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno for f in functions if f.end_lineno - f.lineno >= 60}
    assert not long


@each_module
def test_the_source_is_plain_ascii(path):
    assert path.read_bytes().isascii()


@each_module
def test_nothing_is_swallowed_and_nothing_left_to_do(path):
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("except Exception", "except:", "TODO", "FIXME", "NotImplemented"))


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.can_decode], ids=lambda fmt: fmt.name)
def test_the_layout_of_a_format_is_the_block_it_states(fmt):
    module = fmt.kernels
    assert module.LAYOUT.itemsize == fmt.block_bytes
    assert fmt.block_weights == module.N
    fields = [module.LAYOUT[name] for name in module.LAYOUT.names or ()] or [module.LAYOUT]
    assert sum(field.itemsize for field in fields) == fmt.block_bytes  # no gaps
    assert hasattr(module, "encode") == fmt.can_encode
    assert fmt.block_weights == 1 or f"{fmt.bpw:g} bits per weight" in module.__doc__
    assert by_name(fmt.name.lower()) is fmt


def test_every_module_can_be_imported():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__main__"]
    for name in names:
        importlib.import_module(name.removesuffix(".__init__"))
