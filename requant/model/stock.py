"""What llama-quantize's mixtures give the embedding and the output, and the guard rail that follows from it.

Source: llama_tensor_get_type_impl and tensor_type_fallback in llama.cpp's src/llama-quant.cpp.
"""

from __future__ import annotations

from requant.errors import UsageError
from requant.model.roles import fallback_type

# mixture -> (its default type, its bits per weight on Llama-3.1-8B: llama.cpp, tools/quantize/README.md); by size
_MIXTURES = {
    "IQ1_S": ("IQ1_S", 2.0),
    "IQ1_M": ("IQ1_M", 2.15),
    "IQ2_XXS": ("IQ2_XXS", 2.38),
    "IQ2_XS": ("IQ2_XS", 2.59),
    "IQ2_S": ("IQ2_XS", 2.74),
    "IQ2_M": ("IQ2_S", 2.93),
    "Q2_K_S": ("Q2_K", 2.97),
    "Q2_K": ("Q2_K", 3.16),
    "IQ3_XXS": ("IQ3_XXS", 3.25),
    "IQ3_XS": ("IQ3_S", 3.5),
    "Q3_K_S": ("Q3_K", 3.64),
    "IQ3_S": ("IQ3_S", 3.66),
    "IQ3_M": ("IQ3_S", 3.76),
    "Q3_K_M": ("Q3_K", 4.0),
    "Q3_K_L": ("Q3_K", 4.3),
    "IQ4_XS": ("IQ4_XS", 4.46),
    "Q4_0": ("Q4_0", 4.64),
    "Q4_K_S": ("Q4_K", 4.67),
    "IQ4_NL": ("IQ4_NL", 4.68),
    "Q4_K_M": ("Q4_K", 4.89),
    "Q4_1": ("Q4_1", 5.1),
    "Q5_0": ("Q5_0", 5.57),
    "Q5_K_S": ("Q5_K", 5.57),
    "Q5_K_M": ("Q5_K", 5.7),
    "Q5_1": ("Q5_1", 6.04),
    "Q6_K": ("Q6_K", 6.56),
    "Q8_0": ("Q8_0", 8.5),
}
_OUTPUT_AS_Q5_K = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"])
_EMBEDDING = {
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"], "Q2_K"),
    **dict.fromkeys(["IQ2_S", "IQ2_M", "IQ3_XXS"], "IQ3_S"),
}
_BLOCKS_OF_32 = frozenset(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])


def stock_type(mixture: str, name: str, n_per_row: int, *, tied: bool, arch: str = "") -> str:
    """The type that llama-quantize gives `token_embd.weight` or `output.weight` in a `mixture` such as `Q4_K_M`.

    Raises UsageError for a mixture that is not known here.
    """
    assert name in ("token_embd.weight", "output.weight"), name
    if mixture not in _MIXTURES:
        raise UsageError(f"'{mixture}' is no mixture of llama-quantize known here; use {', '.join(_MIXTURES)}")
    default = _MIXTURES[mixture][0]
    if name == "output.weight" or tied:
        chosen = _output_type(mixture, default, n_per_row, arch)
    else:
        chosen = _EMBEDDING.get(mixture, default)
    block = 32 if chosen in _BLOCKS_OF_32 else 256
    return chosen if n_per_row % block == 0 else fallback_type(chosen, n_per_row) or "F16"


def _output_type(mixture: str, default: str, n_per_row: int, arch: str) -> str:
    block = 32 if default in _BLOCKS_OF_32 else 256
    if arch == "falcon" or n_per_row % block or default == "Q8_0":
        return "Q8_0"
    return "Q5_K" if mixture in _OUTPUT_AS_Q5_K else "Q6_K"


def mixtures() -> tuple[str, ...]:
    """The mixtures known here, by rising size."""
    return tuple(_MIXTURES)


def mixture_type(mixture: str, name: str, n_per_row: int, *, tied: bool, arch: str = "") -> str:
    """The type of a matrix in a `mixture`, but for the few layers that it gives more than its default type."""
    if name in ("token_embd.weight", "output.weight"):
        return stock_type(mixture, name, n_per_row, tied=tied, arch=arch)
    default = _MIXTURES[mixture][0]
    block = 32 if default in _BLOCKS_OF_32 else 256
    return default if n_per_row % block == 0 else fallback_type(default, n_per_row) or "F16"
