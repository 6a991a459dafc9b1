"""Mixtures of llama-quantize (`Q4_K_M`, ...): the type that each gives every tensor.

Source: llama_tensor_get_type_impl, tensor_get_category and tensor_type_fallback in llama.cpp's src/llama-quant.cpp,
b11434. The kind of a tensor is told by a part of its name, whatever the tower or the suffix, and kinds are counted in
the order in which llama-quantize visits the tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from requant.errors import UsageError, brief, suggest
from requant.formats import format_of
from requant.model.kept import GLM5
from requant.model.roles import fallback_type, has_mixture_type, is_tied

if TYPE_CHECKING:
    from requant.container.source import SourceTensor
    from requant.model.hyperparameters import Hyperparameters

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
MIXTURE_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as in llama-quantize
_OUTPUT_AS_Q5_K = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"])
_EMBEDDING = {
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"], "Q2_K"),
    **dict.fromkeys(["IQ2_S", "IQ2_M", "IQ3_XXS"], "IQ3_S"),
}
_TWO_BITS = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"])  # default types
_VALUES = "attn_v"  # the kind of attn_v and of the matrices that it is fused into
# part of the name -> kind, the first that is found; an expert's and a shared expert's matrix is of the same kind
_KINDS = {
    **dict.fromkeys(("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"), _VALUES),
    **{f"{kind}.weight": kind for kind in ("attn_k", "attn_q", "attn_output")},
    **{kind: kind for kind in ("ffn_up", "ffn_gate", "ffn_down")},
}
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ATTENTION_OUTPUT = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_MORE_BEHIND_EXPERTS = frozenset(
    "Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS".split()  # noqa: SIM905
)
_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}  # layers of what llama.cpp calls a 70B model
_LAYER = re.compile(r"blk\.([0-9]+)\.")


def mixture_names() -> tuple[str, ...]:
    """Return the mixtures known here, by rising size."""
    return tuple(_MIXTURES)


def main_type(mixture: str) -> str:
    """Return the type that a `mixture` such as `Q4_K_M` gives most matrices: Q4_K."""
    return _MIXTURES[mixture][0]


def default_type(mixture: str, name: str, n_per_row: int, *, tied: bool, arch: str = "") -> str:
    """Return the type that llama-quantize gives a matrix in a `mixture` such as `Q4_K_M`.

    For the embeddings and `output.weight` it is exact; for a matrix of a layer it is the mixture's default type,
    which a few layers exceed (see `mixture_types`). Raises UsageError for a mixture that is not known here.
    """
    default = _default_of(mixture)
    if name == "output.weight" or (name in _EMBEDDINGS and tied):
        default = _output_type(mixture, n_per_row, arch)
    elif name in _EMBEDDINGS:
        default = _EMBEDDING.get(mixture, default)
    return _fit_row(default, n_per_row)


def _default_of(mixture: str) -> str:
    if mixture not in _MIXTURES:
        what = f"'{brief(mixture)}' is no mixture of llama-quantize known here"
        raise UsageError(f"{what}; {suggest(mixture, _MIXTURES)}")
    return _MIXTURES[mixture][0]


def _fit_row(type_name: str, n_per_row: int) -> str:
    """Return the type, or what llama-quantize takes instead where its block does not divide the row."""
    if format_of(type_name).divides(n_per_row):
        return type_name
    return fallback_type(type_name, n_per_row) or "F16"


def _output_type(mixture: str, n_per_row: int, arch: str) -> str:
    default = _MIXTURES[mixture][0]
    if arch == "falcon" or not format_of(default).divides(n_per_row) or default == "Q8_0":
        return "Q8_0"
    return "Q5_K" if mixture in _OUTPUT_AS_Q5_K else "Q6_K"


@dataclass(frozen=True, slots=True)
class _Position:
    """The place of a matrix, number `index` of `n`, and the facts of the model that the rules use."""

    index: int
    n: int
    n_gqa: int
    n_expert: int
    is_70b: bool
    is_falcon: bool
    has_imatrix: bool

    @property
    def early(self) -> bool:
        return self.index < self.n // 8

    @property
    def favoured(self) -> bool:
        """Return whether it is in the first or last eighth, or every third between."""
        return self.early or self.index >= 7 * self.n // 8 or (self.index - self.n // 8) % 3 == 2


@dataclass(slots=True)
class _Visit:
    """The visit of all tensors by llama-quantize: the model's facts, and the matrices of each kind seen so far."""

    mixture: str
    hp: Hyperparameters
    has_imatrix: bool
    n_values: int
    seen: Counter[str] = field(default_factory=Counter)

    def type_of(self, name: str) -> str:
        """Return the type of the next matrix of a layer, whatever the length of its rows."""
        if self.hp.arch in GLM5 and any(part in name for part in ("attn_q_a", "attn_q_b", "nextn.eh_proj")):
            return "Q8_0"
        kind = next((kind for part, kind in _KINDS.items() if part in name), "")
        at = self._position(name, kind)
        self.seen[kind] += 1
        return _layer_type(self.mixture, kind, at)

    def _position(self, name: str, kind: str) -> _Position:
        """Count the values, and the first feed-forward matrices; those of a model with experts go by their layer."""
        hp, index = self.hp, self.seen[kind]
        match = _LAYER.match(name)
        if kind != _VALUES and hp.n_expert > 1 and match is not None and _MIXTURES[self.mixture][0] not in _TWO_BITS:
            index = int(match[1])
        heads, kv_heads = hp.n_head[0], hp.n_head_kv[0]
        return _Position(
            index=index,
            n=self.n_values if kind == _VALUES else hp.n_layers,
            n_gqa=heads // kv_heads if kv_heads else 0,  # 0 where the first layer does not attend
            n_expert=hp.n_expert,
            is_70b=_70B.get(hp.arch) == hp.n_layers and (hp.arch != "llama" or heads != kv_heads),
            is_falcon=hp.arch == "falcon",
            has_imatrix=self.has_imatrix,
        )


def mixture_types(
    mixture: str, tensors: Sequence[SourceTensor], hp: Hyperparameters, *, has_imatrix: bool
) -> dict[str, str]:
    """Return, by name, the types of the tensors that llama-quantize would quantize to `mixture`.

    Tensors without a type stay as they are. Raises UsageError for a mixture that is not known here.
    """
    _default_of(mixture)
    tied = is_tied({t.name for t in tensors})
    n_values = sum(any(part in t.name for part, kind in _KINDS.items() if kind == _VALUES) for t in tensors)
    visit = _Visit(mixture, hp, has_imatrix, n_values)
    types = {}
    for tensor in sorted(tensors, key=lambda t: _visiting_order(t.name)):
        if not has_mixture_type(hp.arch, tensor.name, tensor.shape, tensor.type_id):
            continue
        n_per_row = tensor.shape[0]
        if tensor.name == "output.weight" or tensor.name in _EMBEDDINGS:
            types[tensor.name] = default_type(mixture, tensor.name, n_per_row, tied=tied, arch=hp.arch)
        else:
            types[tensor.name] = _fit_row(visit.type_of(tensor.name), n_per_row)
    return {t.name: types[t.name] for t in tensors if t.name in types}


def _visiting_order(name: str) -> tuple[int, str]:
    """Return the key that sorts names as llama-quantize visits them: by `blk.N.`, those without it first."""
    match = _LAYER.match(name)
    return -1 if match is None else int(match[1]), name


def _layer_type(mixture: str, kind: str, at: _Position) -> str:
    default = _MIXTURES[mixture][0]
    if default in _TWO_BITS:
        return _two_bit_type(mixture, kind, at)
    chosen = default
    if kind == _VALUES:
        chosen = _value_type(mixture, at)
    elif kind == "ffn_down":
        chosen = _falcon_down_type(mixture, at) if at.is_falcon else _down_type(mixture, at)
    elif kind == "attn_k" and at.n_expert == 8:
        chosen = "Q8_0"
    elif kind in ("attn_k", "attn_q"):
        chosen = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, default)
    elif kind == "attn_output":
        chosen = _attention_output_type(mixture, at)
    elif kind in ("ffn_gate", "ffn_up") and mixture == "IQ3_XS" and at.n // 8 <= at.index < 7 * at.n // 8:
        chosen = "IQ3_XXS"
    return chosen


def _attention_output_type(mixture: str, at: _Position) -> str:
    default = _MIXTURES[mixture][0]
    if at.is_falcon:
        return "Q4_K" if mixture == "Q3_K_L" else default
    if at.n_expert == 8:
        return "Q5_K" if mixture in _MORE_BEHIND_EXPERTS else default
    return _ATTENTION_OUTPUT.get(mixture, default)


def _value_type(mixture: str, at: _Position) -> str:
    default, grouped = _MIXTURES[mixture][0], at.n_gqa >= 4
    chosen = {
        "Q2_K": "Q4_K" if grouped else "Q3_K",
        "Q2_K_S": "Q4_K" if grouped else default,
        "IQ3_XXS": "Q4_K" if grouped else "IQ3_XXS" if at.has_imatrix else "IQ3_S",
        "IQ3_XS": "Q4_K" if grouped else default,
        "IQ3_S": "Q4_K" if grouped else default,
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if at.index < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if grouped else default,
        "IQ4_XS": "Q5_K" if grouped else default,
        "Q4_K_M": "Q6_K" if at.favoured else default,
        "Q5_K_M": "Q6_K" if at.favoured else default,
        "Q4_K_S": "Q5_K" if at.index < 4 else default,
    }.get(mixture, default)
    if at.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if at.n_expert == 8 else chosen


def _down_type(mixture: str, at: _Position) -> str:
    default = _MIXTURES[mixture][0]
    return {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if at.early else default,
        "IQ3_XXS": default if at.has_imatrix else "Q4_K" if at.early else "Q3_K",
        "Q3_K_M": "Q5_K" if at.index < at.n // 16 else "Q4_K",
        "IQ3_M": "Q4_K" if at.early or (at.n_expert == 8 and at.favoured) else default,
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if at.favoured else default,
        "Q5_K_M": "Q6_K" if at.favoured else default,
        "IQ4_NL": "Q5_K" if at.early and not at.has_imatrix else default,
        "IQ4_XS": "Q5_K" if at.early and not at.has_imatrix else default,
        "Q4_K_S": "Q5_K" if at.early else default,
        "Q4_0": "Q4_1" if at.early and at.has_imatrix else default,
        "Q5_0": "Q5_1" if at.early and at.has_imatrix else default,
    }.get(mixture, default)


def _falcon_down_type(mixture: str, at: _Position) -> str:
    chosen = {
        "Q3_K_M": "Q5_K" if at.index < at.n // 16 else "Q4_K" if at.favoured else "Q3_K",
        "Q3_K_L": "Q4_K",
        "Q4_K_M": "Q6_K" if at.index < at.n // 16 else "Q5_K" if at.favoured else "Q4_K",
        "Q4_K_S": "Q4_K",
    }.get(mixture)
    return chosen or _down_type(mixture, at)


def _two_bit_type(mixture: str, kind: str, at: _Position) -> str:
    default = _MIXTURES[mixture][0]
    better = "IQ3_S" if mixture in ("IQ2_S", "IQ2_M") else "Q2_K"
    chosen = default
    if kind == _VALUES:
        chosen = "Q4_K" if at.n_gqa >= 4 or at.n_expert >= 4 else better
    elif kind == "attn_k" and at.n_expert == 8:
        chosen = "Q4_K"
    elif kind == "ffn_down" and at.early:
        chosen = better
    elif kind == "attn_output" and at.n_expert == 8:
        chosen = "Q5_K"
    elif kind == "attn_output":
        chosen = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mixture, default)
    return chosen
