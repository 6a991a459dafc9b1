"""The type table, the file types and the names of metadata keys, against those of the gguf package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, Keys

from requant.formats import FORMATS
from requant.planning.output_metadata import file_type

PACKAGE = Path(__file__).parents[2] / "requant"
MISSING = {"Q2_0"}  # in gguf 0.19
# llama_ftype of llama.h: of Q3_K, Q4_K and Q5_K the mixture M
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25},
    **{"IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38},
    **{"NVFP4": 39, "Q1_0": 40, "Q2_0": 41},
}
STANDARD = ("general", "tokenizer", "split", "quantize", "imatrix")  # first parts of keys
OURS = {  # that gguf 0.19 does not name; {} stands for a part that is filled in
    "general.source.huggingface.repository",  # of converters before 2024
    "general.tensor_extra.name",  # of NVFP4 models
    "general.tensor_extra.prec_a4",
    "quantize.imatrix.{}",  # of llama-quantize
}
OURS_OF_ARCHITECTURES = {
    "attention.recurrent_layers",  # of llama.cpp only
    "hyper_connection.count",  # of llama.cpp only
    "kda.gate_lower_bound",  # of llama.cpp only
    "num_loops",  # of llama.cpp only
    "rope.scale_linear",  # of files before 2023-10, which llama.cpp still reads
}


def test_the_types_are_those_of_gguf():
    theirs = {t.name: (t.value, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}
    ours = {f.name: (f.type_id, f.block_weights, f.block_bytes) for f in FORMATS.values()}
    assert ours.keys() - theirs.keys() == MISSING
    assert theirs.keys() - ours.keys() == {"Q8_1", "Q8_K"}  # of activations, in no file
    assert {name: ours[name] for name in ours.keys() - MISSING} == {
        name: theirs[name] for name in ours.keys() - MISSING
    }


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_file_type_of_each_type_is_that_of_llama_cpp(fmt):
    assert file_type(fmt.name) == FILE_TYPES.get(fmt.name)
    assert (file_type(fmt.name) is not None) == fmt.can_decode


def names_of_gguf(names: type = Keys) -> Iterator[str]:
    """Every key of gguf, without the architecture's name, {} where a part is filled in."""
    for name, value in vars(names).items():
        if isinstance(value, type):
            yield from names_of_gguf(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield re.sub(r"\{\w+\}", "{}", value.removeprefix("{arch}."))


def text_of(node: ast.AST) -> str | None:
    """The text of a literal, {} where a part is filled in; None of what is no literal."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def literals(tree: ast.AST) -> Iterator[str]:
    """Every whole literal."""
    for node in ast.iter_child_nodes(tree):
        text = text_of(node)
        if text is None:
            yield from literals(node)
        else:
            yield text


def keys_read(tree: ast.AST) -> Iterator[str]:
    """Keys of an architecture: what follows its name in a literal, what its reader is asked for, and every `key`."""
    for text in literals(tree):
        if re.fullmatch(r"\{\}\.[a-z0-9_.{}]*[a-z_]", text) and "." in text[3:]:
            yield text[3:]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "key":
            yield text_of(node.value) or ""
        if not isinstance(node, ast.Call):
            continue
        subject = node.func.value if isinstance(node.func, ast.Attribute) else next(iter(node.args), None)
        if ast.unparse(node.func) == "count" or (isinstance(subject, ast.Name) and subject.id == "keys"):
            yield from (text for text in map(text_of, node.args[:2]) if text and " " not in text)


def is_known(key: str, known: set[str]) -> bool:
    """Whether gguf has the key, or one that it may become when its parts are filled in."""
    pattern = re.escape(key).replace(r"\{\}", r"[\w{}]+")
    return any(re.fullmatch(pattern, name) for name in known)


def test_every_standard_key_is_one_of_gguf():
    known, found = set(names_of_gguf()), set()
    for path in PACKAGE.rglob("*.py"):
        found |= {
            text
            for text in literals(ast.parse(path.read_text(encoding="utf-8")))
            if text.partition(".")[0] in STANDARD and re.fullmatch(r"\w+(\.(\w|\{\})+)+", text)
        }
    assert len(found) > 40, sorted(found)
    assert {key for key in found if not is_known(key, known)} == OURS


def test_every_key_of_an_architecture_is_one_of_gguf():
    known, found = set(names_of_gguf()), set()
    for path in (PACKAGE / "model").rglob("*.py"):
        found |= {key for key in keys_read(ast.parse(path.read_text(encoding="utf-8"))) if key}
    assert len(found) > 40, sorted(found)
    assert {key for key in found if not is_known(key, known)} == OURS_OF_ARCHITECTURES
