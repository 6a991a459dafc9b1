"""Tensor shapes: the dimensions that the keys of a model demand of its tensors, as tables, and what does not fit.

Every command tells of a misfit; a command that runs the model refuses it. A layer has the table of a decoder, and that
of its mixer where it has another than attention; a new mixer is a table in MIXERS. Source: load_arch_tensors of each
architecture in llama.cpp's src/models, which refuses a model with a misfit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from requant.errors import BadInput, quote
from requant.model.forward.families import FAMILIES
from requant.model.hyperparameters import Hyperparameters, Latent, read_hyperparameters
from requant.model.roles import layer_of

if TYPE_CHECKING:
    from requant.container.source import Source, SourceTensor

_SHOWN = 20  # misfits to tell of; a file may have a million


class Misfit(BadInput):
    """A tensor or key with which no engine runs the model."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """A dimension of a tensor: the keys that give it, and its size by them in a layer."""

    keys: str
    size: Callable[[Hyperparameters, int], int]


def _head_sizes(hp: Hyperparameters, layer: int) -> tuple[int, int]:
    """Return the dimensions of a key and of a value in the layer."""
    windowed = hp.windows is not None and hp.windows.size > 0 and hp.windows.layers[layer]
    return (hp.key_length_swa, hp.value_length_swa) if windowed else (hp.key_length, hp.value_length)


def _queries(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head[layer] * _head_sizes(hp, layer)[0]


def _keys(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head_kv[layer] * _head_sizes(hp, layer)[0]


def _values(hp: Hyperparameters, layer: int) -> int:
    return hp.n_head_kv[layer] * _head_sizes(hp, layer)[1]


_WIDTH = Dimension("embedding_length", lambda hp, _: hp.n_embd)
_VOCABULARY = Dimension("the vocabulary", lambda hp, _: hp.n_vocab)
_QUERIES = Dimension("attention.head_count x key_length", _queries)
_KEYS = Dimension("attention.head_count_kv x key_length", _keys)
_VALUES = Dimension("attention.head_count_kv x value_length", _values)
_FUSED = Dimension(
    "attention.head_count x key_length + head_count_kv x (key_length + value_length)",
    lambda hp, il: _queries(hp, il) + _keys(hp, il) + _values(hp, il),
)
_MIXED = Dimension("attention.head_count x value_length", lambda hp, il: hp.n_head[il] * _head_sizes(hp, il)[1])
_KEY = Dimension("attention.key_length", lambda hp, il: _head_sizes(hp, il)[0])
_ROTATED = Dimension("rope.dimension_count / 2", lambda hp, _: hp.n_rotated // 2)
_INNER = Dimension("feed_forward_length", lambda hp, il: hp.n_ff[il])
_TWICE = Dimension("2 x feed_forward_length", lambda hp, il: 2 * hp.n_ff[il])
_TWO_EXPERT = Dimension("2 x expert_feed_forward_length", lambda hp, il: 2 * (hp.n_ff_expert or hp.n_ff[il]))
_EXPERTS = Dimension("expert_count", lambda hp, _: hp.n_expert)
_EXPERT = Dimension("expert_feed_forward_length", lambda hp, il: hp.n_ff_expert or hp.n_ff[il])

Shapes = Mapping[str, tuple[Dimension, ...]]  # name without `blk.N.` -> dimensions in ggml's order, the row first
_WITHOUT_GATE = " without a gate"  # after the name of an up projection that holds the gate too
# a pre-norm decoder; a tensor that only some architectures have stands among the others
DECODER: Shapes = {
    **dict.fromkeys(("token_embd.weight", "output.weight"), (_WIDTH, _VOCABULARY)),
    **dict.fromkeys(("output_norm.weight", "attn_norm.weight", "ffn_norm.weight"), (_WIDTH,)),
    **dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (_WIDTH,)),
    **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (_KEY,)),
    "attn_q.weight": (_WIDTH, _QUERIES),
    "attn_k.weight": (_WIDTH, _KEYS),
    "attn_v.weight": (_WIDTH, _VALUES),
    "attn_qkv.weight": (_WIDTH, _FUSED),
    "attn_output.weight": (_MIXED, _WIDTH),
    **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (_WIDTH, _INNER)),
    f"ffn_up.weight{_WITHOUT_GATE}": (_WIDTH, _TWICE),
    "ffn_down.weight": (_INNER, _WIDTH),
    "ffn_gate_inp.weight": (_WIDTH, _EXPERTS),
    **dict.fromkeys(("ffn_gate_exps.weight", "ffn_up_exps.weight"), (_WIDTH, _EXPERT, _EXPERTS)),
    f"ffn_up_exps.weight{_WITHOUT_GATE}": (_WIDTH, _TWO_EXPERT, _EXPERTS),
    "ffn_down_exps.weight": (_EXPERT, _WIDTH, _EXPERTS),
    **dict.fromkeys(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"), (_ROTATED,)),
}
_HEADS = Dimension("attention.head_count", lambda hp, il: hp.n_head[il])
_KEY_HEADS = Dimension("attention.head_count_kv", lambda hp, il: hp.n_head_kv[il])
_GATED = Dimension("2 x attention.head_count x key_length", lambda hp, il: 2 * _queries(hp, il))
_THREE = Dimension("3 x embedding_length", lambda hp, _: 3 * hp.n_embd)
_TAPS = Dimension("ssm.conv_kernel or shortconv.l_cache", lambda hp, _: hp.recurrence.n_taps)
_STATE = Dimension("ssm.state_size or kda.head_dim", lambda hp, _: hp.recurrence.n_state)
_STATES = Dimension("ssm.time_step_rank", lambda hp, _: hp.recurrence.n_heads)
_TWO_STATES = Dimension("2 x ssm.time_step_rank", lambda hp, _: 2 * hp.recurrence.n_heads)
_DELTA_VALUES = Dimension(
    "ssm.time_step_rank x state_size", lambda hp, _: hp.recurrence.n_heads * hp.recurrence.n_state
)
_DELTA_WIDTH = Dimension(
    "(2 x ssm.group_count + time_step_rank) x state_size",
    lambda hp, _: (2 * hp.recurrence.n_groups + hp.recurrence.n_heads) * hp.recurrence.n_state,
)
_SSM = Dimension("ssm.inner_size", lambda hp, _: hp.recurrence.n_inner)
_SSM_WIDTH = Dimension(
    "ssm.inner_size + 2 x group_count x state_size",
    lambda hp, _: hp.recurrence.n_inner + 2 * hp.recurrence.n_groups * hp.recurrence.n_state,
)
_SSM_IN = Dimension(
    "2 x (ssm.inner_size + group_count x state_size) + time_step_rank",
    lambda hp, _: 2 * (hp.recurrence.n_inner + hp.recurrence.n_groups * hp.recurrence.n_state) + hp.recurrence.n_heads,
)
_GROUPS = Dimension("ssm.group_count", lambda hp, _: hp.recurrence.n_groups)
_GROUP = Dimension(
    "ssm.inner_size / group_count", lambda hp, _: hp.recurrence.n_inner // max(1, hp.recurrence.n_groups)
)
_KDA = Dimension("attention.head_count x kda.head_dim", lambda hp, il: hp.n_head[il] * hp.recurrence.n_state)
_ONE = Dimension("1", lambda hp, _: 1)


def _of_latent(name: str, size: Callable[[Latent, int], int]) -> Dimension:
    """Return a dimension by the sizes of latent attention and the heads."""
    return Dimension(name, lambda hp, il: 0 if hp.latent is None else size(hp.latent, hp.n_head[il]))


_RANK = _of_latent("attention.kv_lora_rank", lambda own, _: own.rank)
_QUERY_RANK = _of_latent("attention.q_lora_rank", lambda own, _: own.query_rank)
_PLAIN = _of_latent("attention.key_length_mla - rope.dimension_count", lambda own, _: own.key_length - own.n_rotated)
_JOINT = _of_latent("attention.kv_lora_rank + rope.dimension_count", lambda own, _: own.rank + own.n_rotated)
_LATENT_VALUE = _of_latent("attention.value_length_mla", lambda own, _: own.value_length)
_LATENT_QUERIES = _of_latent("attention.head_count x key_length_mla", lambda own, n: n * own.key_length)
_LATENT_MIXED = _of_latent("attention.head_count x value_length_mla", lambda own, n: n * own.value_length)
_LATENT_BOTH = _of_latent(
    "attention.head_count x (key_length_mla - rope.dimension_count + value_length_mla)",
    lambda own, n: n * (own.key_length - own.n_rotated + own.value_length),
)

_DELTA_NET: Shapes = {
    "attn_qkv.weight": (_WIDTH, _DELTA_WIDTH),
    "attn_gate.weight": (_WIDTH, _DELTA_VALUES),
    "ssm_conv1d.weight": (_TAPS, _DELTA_WIDTH),
    **dict.fromkeys(("ssm_dt.bias", "ssm_a"), (_STATES,)),
    **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight"), (_WIDTH, _STATES)),
    "ssm_ba.weight": (_WIDTH, _TWO_STATES),
    "ssm_norm.weight": (_STATE,),
    "ssm_out.weight": (_DELTA_VALUES, _WIDTH),
}
# the tensor that tells of a mixer -> the tensors that it has in other shapes than attention, or alone
MIXERS: Mapping[str, Shapes] = {
    "attn_kv_a_mqa.weight": {
        "attn_q.weight": (_WIDTH, _LATENT_QUERIES),
        "attn_q_a.weight": (_WIDTH, _QUERY_RANK),
        "attn_q_a_norm.weight": (_QUERY_RANK,),
        "attn_q_b.weight": (_QUERY_RANK, _LATENT_QUERIES),
        "attn_kv_a_mqa.weight": (_WIDTH, _JOINT),
        "attn_kv_a_norm.weight": (_RANK,),
        "attn_k_b.weight": (_PLAIN, _RANK, _HEADS),
        "attn_v_b.weight": (_RANK, _LATENT_VALUE, _HEADS),
        "attn_kv_b.weight": (_RANK, _LATENT_BOTH),
        "attn_output.weight": (_LATENT_MIXED, _WIDTH),
    },
    "ssm_alpha.weight": _DELTA_NET,
    "ssm_ba.weight": _DELTA_NET,
    "ssm_f_a.weight": {
        **dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_v.weight"), (_WIDTH, _KDA)),
        **{f"ssm_conv1d_{part}.weight": (_TAPS, _ONE, _KDA) for part in "qkv"},
        "ssm_dt.bias": (_KDA,),
        "ssm_a": (_ONE, _HEADS),
        "ssm_beta.weight": (_WIDTH, _HEADS),
        "ssm_norm.weight": (_STATE,),
        "attn_output.weight": (_KDA, _WIDTH),
    },
    "ssm_in.weight": {
        "ssm_in.weight": (_WIDTH, _SSM_IN),
        "ssm_conv1d.weight": (_TAPS, _SSM_WIDTH),
        "ssm_conv1d.bias": (_SSM_WIDTH,),
        "ssm_dt.bias": (_STATES,),
        **dict.fromkeys(("ssm_a", "ssm_d"), (_ONE, _STATES)),
        "ssm_norm.weight": (_GROUP, _GROUPS),
        "ssm_out.weight": (_SSM, _WIDTH),
    },
    "shortconv.in_proj.weight": {
        "shortconv.conv.weight": (_TAPS, _WIDTH),
        "shortconv.in_proj.weight": (_WIDTH, _THREE),
        "shortconv.out_proj.weight": (_WIDTH, _WIDTH),
    },
}
_GATED_QUERIES: Shapes = {"attn_q.weight": (_WIDTH, _GATED)}
_ROW_NORMS: Shapes = {"attn_q_norm.weight": (_QUERIES,), "attn_k_norm.weight": (_KEYS,)}
# where architectures differ from the decoder: norms of whole rows, norms with weights per head, queries with gates
_IN_ARCH: Mapping[str, Shapes] = {
    **dict.fromkeys(("olmo2", "olmoe", "minimax-m2"), _ROW_NORMS),
    "command-r": {"attn_q_norm.weight": (_KEY, _HEADS), "attn_k_norm.weight": (_KEY, _KEY_HEADS)},
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), _GATED_QUERIES),
}
# widths of experts and of relu2 parts that several keys may give are left to the products


def check_fit(source: Source, hp: Hyperparameters) -> None:
    """Raise Misfit for the first tensor of `source`, or key, with which no engine runs the model."""
    for misfit in find_misfits(source, hp):
        raise misfit


def describe_misfits(source: Source) -> list[str]:
    """Return a line for each misfit of `source`, for commands that do not run the model."""
    try:
        found = [*find_misfits(source, read_hyperparameters(source.metadata, source.tensors))]
    except BadInput:
        return []  # without its keys there is nothing to compare with
    told = (str(misfit).removeprefix(f"{source.path}: ") for misfit in found[:_SHOWN])
    lines = [f"{line}; no engine runs such a model" for line in told]
    return [*lines, f"{len(found) - _SHOWN} more misfits like these"] if len(found) > _SHOWN else lines


def find_misfits(source: Source, hp: Hyperparameters) -> Iterator[Misfit]:
    """Yield an error for each tensor of `source` that is missing, or has the wrong layer, shape or type."""
    known = hp.arch in FAMILIES
    most = hp.key_length  # of layers with a window the key has a name of its own
    if known and FAMILIES[hp.arch].unrotated != "all" and (hp.n_rotated % 2 or not 0 < hp.n_rotated <= most):
        what, limit = f"key '{hp.arch}.rope.dimension_count' is out of range", f"an even number up to {most}"
        yield Misfit(source.path, what, got=hp.n_rotated, limit=limit)
    if known and hp.n_expert and not hp.n_expert_used:
        yield Misfit(source.path, f"key '{hp.arch}.expert_used_count' is missing", expected=f"1 to {hp.n_expert}")
    for tensor in source.tensors:
        what, layer = f"tensor {quote(tensor.name)}", _own_layer(tensor)
        if layer >= hp.n_layers:
            limit = f"{hp.arch}.block_count {hp.n_layers}"
            yield Misfit(source.path, f"{what} is of a layer that the model does not have", limit=limit)
            continue
        wanted = _wanted_dimensions(source, hp.arch, tensor) if known else None
        if wanted is None:
            continue
        sizes = [dimension.size(hp, layer) for dimension in wanted]
        if list(tensor.shape) != sizes:
            pairs = zip_longest(wanted, sizes, tensor.shape)
            keys = dict.fromkeys(d.keys for d, size, own in pairs if d is not None and size != own)
            expected = f"{sizes}" + (f" by {' and '.join(keys)}" if keys else "")
            yield Misfit(source.path, f"{what} has the wrong shape", got=list(tensor.shape), expected=expected)
        elif not tensor.format.can_decode:
            expected = "F32, F16, BF16 or a quantized type"
            yield Misfit(source.path, f"{what} has the wrong type", got=tensor.format.name, expected=expected)
    if known:
        for name in _missing_tensors(source, hp):
            wanted_by = f"{hp.arch}.block_count {hp.n_layers}" if name.startswith("blk.") else None
            yield Misfit(source.path, f"has no tensor {quote(name)}", expected=wanted_by)


def _missing_tensors(source: Source, hp: Hyperparameters) -> Iterator[str]:
    """Yield the names of the tensors that a decoder needs and `source` lacks.

    A prediction head in a file of its own has no layers but its own.
    """
    layers = {_own_layer(t) for t in source.tensors if t.name.startswith("blk.")}
    if layers and min(layers) >= hp.n_trunk:
        return
    norm = "token_embd_norm.weight" if "token_embd_norm.weight" in source else "output_norm.weight"
    needed = ["token_embd.weight", norm]
    if "blk.0.inp_gate.weight" in source:
        needed += [f"per_layer_{name}.weight" for name in ("token_embd", "model_proj", "proj_norm")]
    for il in range(hp.n_trunk):
        needed += [f"blk.{il}.{name}" for name in _needed_in_layer(source, f"blk.{il}.")]
    yield from (name for name in needed if name not in source)


def _needed_in_layer(source: Source, prefix: str) -> Iterator[str]:
    """Yield the tensors that a layer needs beside those that tell of its mixer and its feed-forward part."""

    def has(name: str) -> bool:
        return f"{prefix}{name}.weight" in source

    mixer = next((name for name in MIXERS if prefix + name in source), "")
    optional = {"attn_kv_a_mqa.weight": "attn_q attn_q_a attn_q_a_norm attn_q_b attn_k_b attn_v_b attn_kv_b"}
    left_out = {f"{name}.weight" for name in (optional.get(mixer, "") + " ssm_alpha ssm_beta ssm_ba").split()}
    left_out |= {"ssm_conv1d.bias", "ssm_norm.weight"} if mixer == "ssm_in.weight" else set()
    yield from (name for name in MIXERS.get(mixer, {}) if name not in left_out)
    if mixer == "attn_kv_a_mqa.weight":
        yield "attn_q_b.weight" if has("attn_q_a") else "attn_q.weight"
        yield from ["attn_kv_b.weight"] if has("attn_kv_b") else ["attn_k_b.weight", "attn_v_b.weight"]
    attends = has("attn_q") or has("attn_output") or (has("attn_qkv") and not mixer)
    feeds = has("ffn_up") or has("ffn_gate_inp")
    if (attends or not (mixer or feeds)) and mixer in ("", "ssm_in.weight"):
        yield from ["attn_output.weight"] if has("attn_qkv") else ["attn_q.weight", "attn_output.weight"]
        if not has("attn_qkv") and has("attn_v"):
            yield "attn_k.weight"
    if has("ffn_gate_inp"):
        yield "ffn_down_exps.weight"
        yield "ffn_gate_up_exps.weight" if has("ffn_gate_up_exps") else "ffn_up_exps.weight"
    elif feeds or not (mixer or attends):
        yield from ("ffn_up.weight", "ffn_down.weight")


def _own_layer(tensor: SourceTensor) -> int:
    """Return N of a tensor `blk.N.`; 0 outside the layers and in another tower."""
    return (layer_of(tensor.name) or 0) if tensor.name.startswith("blk.") else 0


def _wanted_dimensions(source: Source, arch: str, tensor: SourceTensor) -> tuple[Dimension, ...] | None:
    """Return the dimensions that the tables give for a tensor or the bias of one; None for another."""
    in_layer = tensor.name.startswith("blk.") and tensor.name.count(".") > 2
    part = tensor.name.split(".", 2)[2] if in_layer else tensor.name
    prefix = tensor.name.removesuffix(part)
    mixer: Shapes = next((shapes for name, shapes in MIXERS.items() if in_layer and prefix + name in source), {})
    shapes = {**DECODER, **_IN_ARCH.get(arch, {}), **mixer}
    if part.endswith("_exps.weight") and f"{prefix}ffn_latent_down.weight" in source:
        return None  # experts of the latent's width, which no key tells
    is_bias = part.endswith(".bias") and part not in shapes
    matrix = part.removesuffix(".bias") + ".weight" if is_bias else part
    gated = FAMILIES[arch].activation != "relu2"
    if gated and matrix.startswith("ffn_up") and prefix + matrix.replace("up", "gate", 1) not in source:
        matrix += _WITHOUT_GATE
    wanted = shapes.get(matrix)
    return wanted[1:] if wanted is not None and is_bias else wanted
