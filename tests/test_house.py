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


def test_the_top_of_the_package_is_a_table_of_contents():
    entries = [p for p in (ROOT / "requant").iterdir() if not p.name.startswith("_") and p.name != "py.typed"]
    assert len(entries) <= 12, sorted(p.name for p in entries)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=lambda path: path.parent.name)
def test_a_package_says_its_purpose_in_one_sentence(path):
    sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert sentence.count("\n") <= 1 and sentence.rstrip(".").count(". ") == 0, sentence


def test_a_class_name_means_one_thing():
    found = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


@each_module
def test_a_docstring_begins_with_what_a_thing_is_or_does(path):
    riddles = ("What", "Whether", "Nothing", "Who", "As", "Where", "Of", "With", "When")
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(",.:") in riddles:
                found.append(f"{getattr(node, 'lineno', 1)}: {' '.join(words[:8])}")
    assert found == []


def test_no_function_takes_more_than_eight_parameters():
    found = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                n = len(names) - (names[:1] in (["self"], ["cls"]))
                if n > 8:
                    found[f"{path.relative_to(ROOT)}: {node.name}"] = n
    assert not [name for name in found if "requant/api/model.py" not in name], found  # the public API


def test_every_module_can_be_imported():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__main__"]
    for name in names:
        importlib.import_module(name.removesuffix(".__init__"))
