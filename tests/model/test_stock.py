"""What llama-quantize gives embedding and output, against its own dry runs."""

import pytest
from shapes import GOLDEN, shape

from requant.errors import UsageError
from requant.formats import by_name
from requant.model.stock import mixture_type, stock_type


@pytest.mark.parametrize("model", sorted(GOLDEN["stock_types"]))
def test_embedding_and_output_get_what_llama_quantize_gives(model):
    n_embd = shape(f"{model} F16").metadata.get(next(k for k in shape(f"{model} F16").metadata if "embedding" in k))
    for mixture, types in GOLDEN["stock_types"][model].items():
        for name, expected in types.items():
            tied = "output.weight" not in types
            assert stock_type(mixture, name, n_embd, tied=tied) == expected, (mixture, name)


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
    assert stock_type(mixture, name, n_per_row, tied=tied) == expected


def test_a_falcon_has_its_output_in_q8_0():
    assert stock_type("Q4_K_M", "output.weight", 4096, tied=False, arch="falcon") == "Q8_0"


def test_an_unknown_mixture_is_a_usage_error():
    with pytest.raises(UsageError, match="Q4_K_M"):
        stock_type("Q4_K_XL", "output.weight", 4096, tied=False)


def test_other_matrices_get_the_default_of_the_mixture_or_its_fallback():
    assert mixture_type("Q4_K_M", "blk.0.ffn_up.weight", 4096, tied=False) == "Q4_K"
    assert mixture_type("Q4_K_M", "blk.0.ffn_up.weight", 2880, tied=False) == "Q5_0"
    assert mixture_type("Q4_K_M", "output.weight", 4096, tied=False) == "Q6_K"


@pytest.mark.parametrize("n_per_row", [32, 2880, 40, 256])
def test_stock_types_always_divide_the_row(n_per_row):
    for mixture in ("IQ1_S", "IQ2_M", "Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0"):
        for tied in (False, True):
            assert by_name(stock_type(mixture, "token_embd.weight", n_per_row, tied=tied)).divides(n_per_row)
