"""Tensor roles: a tensor's role and layer by its name, whether it may be quantized, and to which types.

Sources: tensor_type_fallback and tensor_requires_imatrix in llama.cpp's
src/llama-quant.cpp; the floors and the low-bit ban go beyond it and are based on published measurements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence

from requant.formats import FORMATS, format_of
from requant.model import kept

# `attn_norm.weight`, Gemma 4's `post_ffw_norm_1.weight`, Falcon H1's `ffn_norm`
_NORM = re.compile(r".*norm(_[0-9]+)?(\.weight)?")
_IN_A_LAYER = re.compile(r"(?:(?P<tower>.+)\.)?blk\.(?P<layer>[0-9]+)\.(?P<part>.+)")

# a matrix below both bounds saves too few bytes for the risk
TINY_WEIGHTS = 2**19  # 1 MiB in F16
TINY_SHARE = 10_000  # one part in so many of the model's weights

LOW_BIT_BPW = 2.1  # at or below it: IQ1_S, IQ1_M, IQ2_XXS, TQ1_0, TQ2_0, Q1_0
# attn_qkv and attn_kv_b hold the K and V projections in fused form
_NOT_LOW_BIT = frozenset(
    "token_embd per_layer_token_embd output attn_k attn_v attn_qkv attn_kv_b attn_k_b attn_v_b ssm_out".split()  # noqa: SIM905
)

_NEED_IMPORTANCE = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"])

_FALLBACK = {
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], "IQ4_NL"),
    **dict.fromkeys(["Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

_FLOORS = {
    **dict.fromkeys(("attn_k_b", "attn_v_b", "attn_kv_a_mqa"), "Q8_0"),  # latent attention: every head goes through
    **dict.fromkeys(("inp_gate", "proj"), "Q8_0"),
}
_READ_BY_ROWS = ("markov_w1", "selector_predecessor", "selector_successor")  # on the device, which decodes few types so
_FLOORS_IN_ARCH = {
    **{(arch, "fc"): "Q8_0" for arch in ("eagle3", "dflash")},  # fuses residual streams of the target
    **{(arch, "output"): "Q6_K" for arch in ("eagle3", "dflash")},
    ("gemma4-assistant", "token_embd"): "Q6_K",  # its output
    **{("dflash", part): "Q8_0" for part in _READ_BY_ROWS},
    ("qwen4exp", "per_layer_token_embd"): "Q8_0",  # its rows are of hashed n-grams, many to a row
    **{(arch, part): "Q8_0" for arch in kept.GLM5 for part in ("attn_q_a", "attn_q_b")},
}


def role_of(name: str) -> str:
    """Return the tensor's part in the model: `attn_q`, `ffn_down_exps`, `token_embd`, `output`, `nextn.eh_proj`.

    Normalisations are all `norm`; a tensor that is no weight keeps its suffix (`attn_q.bias`), and one of a second
    tower its prefix (`v.attn_q`).
    """
    match = _IN_A_LAYER.fullmatch(name)
    part = name if match is None else match["part"]
    if _NORM.fullmatch(part):
        return "norm"
    stem = part.removesuffix(".weight")
    return stem if match is None or match["tower"] is None else f"{match['tower']}.{stem}"


def layer_of(name: str) -> int | None:
    """Return N of `blk.N.`, or None outside the layers of the model; layers of a tower of images or sound are not."""
    match = _IN_A_LAYER.fullmatch(name)
    return None if match is None or kept.is_of_tower(name) else int(match["layer"])


def n_dims(shape: Sequence[int]) -> int:
    """Return the number of dimensions without trailing ones, at least 1 (ggml_n_dims)."""
    return max((i for i, n in enumerate(shape, start=1) if n != 1), default=1)


def is_experts(name: str, shape: Sequence[int]) -> bool:
    """Return whether the third dimension counts experts, each with its own inputs and slice of importance.

    In attn_k_b and attn_v_b, which are 3-D too, it counts heads.
    """
    return n_dims(shape) == 3 and role_of(name).endswith(("_exps", "_chexps"))


def has_own_inputs(name: str, shape: Sequence[int]) -> bool:
    """Return whether each matrix of the tensor has inputs of its own: experts, and the heads of latent attention."""
    return is_experts(name, shape) or (n_dims(shape) == 3 and role_of(name) in ("attn_k_b", "attn_v_b"))


def n_matrices(shape: Sequence[int]) -> int:
    """Return the number of (n_rows, n_per_row) matrices in a tensor: the product of the dimensions after the second.

    It is 1 for a tensor without elements.
    """
    return math.prod(shape[2:]) if math.prod(shape) else 1


def is_tied(names: Collection[str]) -> bool:
    """Return whether the token embedding is also the output matrix: the model has no `output.weight`."""
    return "token_embd.weight" in names and "output.weight" not in names


def is_lookup(name: str, *, tied: bool) -> bool:
    """Return whether only single rows are read: such a table stays in host memory and takes no VRAM.

    A tied token embedding is also the output matrix, and llama.cpp copies it to the device.
    """
    return name == "per_layer_token_embd.weight" or (name == "token_embd.weight" and not tied)


def never_quantize(
    arch: str,
    name: str,
    shape: Sequence[int],
    type_id: int,
    *,
    model_weights: int | None = None,
    projectors: Collection[str] = (),
) -> str | None:
    """Return why the tensor must keep its type, or None if it may be quantized.

    projectors: the types that the file states (`kept.projector_types`). With `model_weights`, the number of weights in
    the whole model, tiny matrices keep theirs too: those with fewer than 512 Ki weights (1 MiB in F16) and less than
    1/10000 of the model.
    """
    tiny = 0 if model_weights is None else min(TINY_WEIGHTS, model_weights / TINY_SHARE)
    too_small = "it is too small to save anything" if math.prod(shape) < tiny else None
    return (
        _reason_by_shape(name, shape, type_id)
        or kept.reason_in_llama_quantize(arch, name)
        or kept.reason_in_graph(arch, name, n_dims(shape), projectors)
        or kept.reason_of_this_project(name)
        or too_small
    )


def has_mixture_type(arch: str, name: str, shape: Sequence[int], type_id: int) -> bool:
    """Return whether a mixture gives the tensor a type: llama-quantize quantizes it, and the engine only multiplies."""
    return (
        _reason_by_shape(name, shape, type_id)
        or kept.reason_in_llama_quantize(arch, name)
        or kept.reason_in_graph(arch, name, n_dims(shape))
    ) is None


def _reason_by_shape(name: str, shape: Sequence[int], type_id: int) -> str | None:
    if math.prod(shape) == 0:
        return "it is empty"
    if type_id not in FORMATS or not FORMATS[type_id].can_decode:
        return "weights of its type are not read"
    if n_dims(shape) < 2:
        return "it is a vector, not a matrix"
    return None if name.endswith("weight") else "it is no weight"


def floor_type(arch: str, name: str) -> str | None:
    """Return the smallest type that the tensor may get whatever the budget, or None.

    A tensor whose source has fewer bits is copied.
    """
    role = role_of(name)
    if role.startswith("nextn.") or arch == "clip" or kept.is_of_tower(name):
        return "Q8_0"
    return _FLOORS_IN_ARCH.get((arch, role)) or _FLOORS.get(role)


def needs_importance(type_name: str, role: str) -> bool:
    """Return whether the type requires measured importance.

    As in llama-quantize, IQ3_XXS does not for the embedding and the output, which few imatrix files cover.
    """
    return type_name in _NEED_IMPORTANCE and not (type_name == "IQ3_XXS" and role in ("token_embd", "output"))


def is_below(type_name: str, floor: str) -> bool:
    """Return whether `type_name` has fewer bits per weight than `floor`; both are names in FORMATS."""
    return format_of(type_name).bpw < format_of(floor).bpw


def fallback_type(type_name: str, n_per_row: int) -> str | None:
    """Return the type that llama-quantize takes where a block does not divide the row; None where it refuses."""
    alternative = _FALLBACK.get(type_name)
    if alternative is None:
        return "F16" if format_of(type_name).block_weights <= 32 else None
    return alternative if format_of(alternative).divides(n_per_row) else "F16"


def usable_types(n_per_row: int, types: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the types whose block divides a row of `n_per_row` weights, and for each other type the reason."""
    formats = [(name, format_of(name)) for name in types]
    skipped = {
        name: f"a row of {n_per_row} weights is no multiple of the block of {fmt.block_weights}"
        for name, fmt in formats
        if not fmt.divides(n_per_row)
    }
    return [name for name, _ in formats if name not in skipped], skipped


def candidates(
    arch: str, name: str, shape: Sequence[int], types: Iterable[str], *, has_importance: bool, by_name: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Return the `types` that suit the tensor, and for each other type the reason, as `usable_types` does.

    They suit it by block, floor of its role, low-bit ban and importance; by_name: without floor and ban, which are this
    project's, because the user asks for the types. The tensor must be one that may be quantized (`never_quantize`).
    """
    usable, skipped = usable_types(shape[0], types)
    reasons = {t: _reason_unsuitable(arch, name, t, has_importance, by_name) for t in usable}
    skipped |= {t: reason for t, reason in reasons.items() if reason is not None}
    return [t for t in usable if t not in skipped], skipped


def _reason_unsuitable(arch: str, name: str, type_name: str, has_importance: bool, by_name: bool) -> str | None:
    role, floor = role_of(name), floor_type(arch, name)
    free = by_name and role not in _READ_BY_ROWS
    if not free and floor is not None and is_below(type_name, floor):
        return f"{role} gets no type smaller than {floor}"
    if (
        not free
        and role.removeprefix("enc.").removeprefix("dec.") in _NOT_LOW_BIT
        and format_of(type_name).bpw <= LOW_BIT_BPW
    ):
        return f"{role} does not survive {format_of(type_name).bpw:.2f} bits per weight"
    if needs_importance(type_name, role) and not has_importance:
        return "it needs an importance matrix that covers the tensor"
    if type_name == "NVFP4" and arch in ("eagle3", "gemma4-assistant"):
        return "the engine does not apply its second-level scale in a draft head"
    return None
