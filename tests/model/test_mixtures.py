"""The types of llama-quantize's mixtures, against its own dry runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import real_models
from gguf_files import ARR, BOOL, F32, STR, U32, File, pair
from shapes import GOLDEN, shape

from requant.container.source import open_source
from requant.errors import UsageError
from requant.formats import FORMATS, by_name
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import default_type, mixture_names, mixture_types

FIXTURES = real_models.FIXTURES


@pytest.mark.parametrize("model", sorted(GOLDEN["stock_types"]))
def test_embedding_and_output_get_what_llama_quantize_gives(model):
    n_embd = shape(f"{model} F16").metadata.get(next(k for k in shape(f"{model} F16").metadata if "embedding" in k))
    for mixture, types in GOLDEN["stock_types"][model].items():
        for name, expected in types.items():
            tied = "output.weight" not in types
            assert default_type(mixture, name, n_embd, tied=tied) == expected, (mixture, name)


@pytest.mark.parametrize(
    ("mixture", "name", "n_per_row", "tied", "expected"),
    [
        ("IQ2_XS", "output.weight", 4096, False, "Q5_K"),
        ("IQ2_XS", "token_embd.weight", 4096, True, "Q5_K"),
        ("IQ2_XS", "token_embd.weight", 4096, False, "Q2_K"),
        ("IQ3_XXS", "token_embd.weight", 4096, False, "IQ3_S"),
        ("Q4_K_M", "output.weight", 2880, False, "Q8_0"),
        ("Q4_K_M", "token_embd.weight", 2880, False, "Q5_0"),
        ("Q4_0", "output.weight", 2880, False, "Q8_0"),
        ("Q8_0", "output.weight", 4096, False, "Q8_0"),
    ],
)
def test_exceptions_of_the_mixtures(mixture, name, n_per_row, tied, expected):
    assert default_type(mixture, name, n_per_row, tied=tied) == expected


def test_a_falcon_has_its_output_in_q8_0():
    assert default_type("Q4_K_M", "output.weight", 4096, tied=False, arch="falcon") == "Q8_0"


def test_an_unknown_mixture_is_a_usage_error():
    with pytest.raises(UsageError, match="Q4_K_M"):
        default_type("Q4_K_XL", "output.weight", 4096, tied=False)


def test_other_matrices_get_the_default_of_the_mixture_or_its_fallback():
    assert default_type("Q4_K_M", "blk.0.ffn_up.weight", 4096, tied=False) == "Q4_K"
    assert default_type("Q4_K_M", "blk.0.ffn_up.weight", 2880, tied=False) == "Q5_0"
    assert default_type("Q4_K_M", "output.weight", 4096, tied=False) == "Q6_K"


@pytest.mark.parametrize("n_per_row", [32, 2880, 40, 256])
def test_the_blocks_of_a_mixture_always_divide_the_row(n_per_row):
    for mixture in ("IQ1_S", "IQ2_M", "Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0"):
        for tied in (False, True):
            assert by_name(default_type(mixture, "token_embd.weight", n_per_row, tied=tied)).divides(n_per_row)


MIXTURES = json.loads((FIXTURES / "mixtures_golden.json").read_text())
SIZES = json.loads((FIXTURES / "perplexity_golden.json").read_text())["llama_quantize_mixes"]["models"]


@pytest.mark.parametrize("name", sorted(MIXTURES["shapes"]))
def test_every_tensor_gets_what_llama_quantize_gives(name):
    golden = MIXTURES["shapes"][name]
    tensors, expected = [], {}
    for row, layers, dims, type_id, letters in golden["rows"]:
        names = [row.replace("blk.N.", f"blk.{layer}.") for layer in layers] or [row]
        tensors += [Placed(name, tuple(dims), type_id) for name in names]
        expected |= {name: [MIXTURES["types"][letter] for letter in letters] for name in names}
    hp = hyperparameters(golden["keys"])
    own = {t.name: FORMATS[t.type_id].name for t in tensors}
    for i, mixture in enumerate(MIXTURES["mixtures"]):
        types = mixture_types(mixture.removesuffix("+"), tensors, hp, has_imatrix=mixture.endswith("+"))
        assert {n: types.get(n, own[n]) for n in own} == {n: e[i] for n, e in expected.items()}, mixture


def test_the_golden_table_has_every_mixture():
    assert set(mixture_names()) <= set(MIXTURES["mixtures"])


@pytest.mark.parametrize(
    ("model", "path"),
    [("tiny-llama", lambda: real_models.TINY), ("smollm2-135m-dithered", real_models.smollm2)],
)
def test_mixtures_with_an_imatrix_have_the_size_of_llama_quantizes_files(model, path):
    """The rest of a file, its header, has the same size in all."""
    with open_source(path()) as source:
        hp = read_hyperparameters(source.metadata, source.tensors)
        headers = set()
        for entry in SIZES[model]:
            if entry["imatrix"] and "--pure" not in entry["type"] and entry["type"] != "F16":
                types = mixture_types(entry["type"], source.tensors, hp, has_imatrix=True)
                assert all(types.get(t.name) or t.format.name == "F32" for t in source.tensors)
                sizes = [by_name(types.get(t.name, "F32")).n_bytes(t.n_weights) for t in source.tensors]
                headers.add(entry["bytes"] - sum(sizes))
    assert len(headers) == 1 and min(headers) > 0


@dataclass(frozen=True)
class Placed:
    name: str
    shape: tuple
    type_id: int


def hyperparameters(keys):
    kinds = {int: U32, float: F32, str: STR}
    file = File(tuple(_pair(key, value, kinds) for key, value in keys.items()))
    with TemporaryDirectory() as folder, open_source(file.write(Path(folder) / "model.gguf")) as source:
        return read_hyperparameters(source.metadata, source.tensors)


def _pair(key, value, kinds):
    if isinstance(value, list):
        return pair(key, ARR, (BOOL if isinstance(value[0], bool) else U32, value))
    return pair(key, BOOL if isinstance(value, bool) else kinds[type(value)], value)
