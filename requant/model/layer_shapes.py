"""The dimensions that keys demand of each tensor, as tables; what no key tells, another tensor of the layer does.

A layer has the table of a decoder, and that of its mixer where it has another than attention; a new mixer is a table in
MIXERS. Source: load_arch_tensors of each architecture in llama.cpp's src/models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from requant.model.hyperparameters import Hyperparameters, Latent


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


WIDTH = Dimension("embedding_length", lambda hp, _: hp.n_embd)
_VOCABULARY = Dimension("the vocabulary", lambda hp, _: hp.n_vocab)
_QUERIES = Dimension("attention.head_count x key_length", _queries)
_KEYS = Dimension("attention.head_count_kv x key_length", _keys)
_VALUES = Dimension("attention.head_count_kv x value_length", _values)
_FUSED = Dimension(
    "attention.head_count x key_length + head_count_kv x (key_length + value_length)",
    lambda hp, il: _queries(hp, il) + _keys(hp, il) + _values(hp, il),
)
MIXED = Dimension("attention.head_count x value_length", lambda hp, il: hp.n_head[il] * _head_sizes(hp, il)[1])
_KEY = Dimension("attention.key_length", lambda hp, il: _head_sizes(hp, il)[0])
_ROTATED = Dimension("rope.dimension_count / 2", lambda hp, _: hp.n_rotated // 2)
_INNER = Dimension("feed_forward_length", lambda hp, il: hp.n_ff[il])
_TWICE = Dimension("2 x feed_forward_length", lambda hp, il: 2 * hp.n_ff[il])
_TWO_EXPERT = Dimension("2 x expert_feed_forward_length", lambda hp, il: 2 * (hp.n_ff_expert or hp.n_ff[il]))
_EXPERTS = Dimension("expert_count", lambda hp, _: hp.n_expert)
_EXPERT = Dimension("expert_feed_forward_length", lambda hp, il: hp.n_ff_expert or hp.n_ff[il])

HEADS = Dimension("attention.head_count", lambda hp, il: hp.n_head[il])
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
_SIDE = Dimension("embedding_length_per_layer_input", lambda hp, _: hp.n_side)
_SIDES = Dimension("block_count x embedding_length_per_layer_input", lambda hp, _: hp.n_trunk * hp.n_side)

Shapes = Mapping[str, tuple[Dimension, ...]]  # name without `blk.N.` -> dimensions in ggml's order, the row first
WITHOUT_GATE = " without a gate"  # after the name of an up projection that holds the gate too
# a pre-norm decoder; a tensor that only some architectures have stands among the others
DECODER: Shapes = {
    **dict.fromkeys(("token_embd.weight", "output.weight"), (WIDTH, _VOCABULARY)),
    **dict.fromkeys(("output_norm.weight", "attn_norm.weight", "ffn_norm.weight"), (WIDTH,)),
    **dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (WIDTH,)),
    **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (_KEY,)),
    "attn_q.weight": (WIDTH, _QUERIES),
    "attn_k.weight": (WIDTH, _KEYS),
    "attn_v.weight": (WIDTH, _VALUES),
    "attn_qkv.weight": (WIDTH, _FUSED),
    "attn_output.weight": (MIXED, WIDTH),
    **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (WIDTH, _INNER)),
    f"ffn_up.weight{WITHOUT_GATE}": (WIDTH, _TWICE),
    "ffn_down.weight": (_INNER, WIDTH),
    "ffn_gate_inp.weight": (WIDTH, _EXPERTS),
    **dict.fromkeys(("ffn_gate_exps.weight", "ffn_up_exps.weight"), (WIDTH, _EXPERT, _EXPERTS)),
    "ffn_gate_up_exps.weight": (WIDTH, _TWO_EXPERT, _EXPERTS),
    "ffn_down_exps.weight": (_EXPERT, WIDTH, _EXPERTS),
    **dict.fromkeys(("exp_probs_b", "exp_probs_b.bias"), (_EXPERTS,)),
    **dict.fromkeys(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"), (_ROTATED,)),
    **dict.fromkeys(("ffn_norm", "token_embd_norm.weight", "ffn_gate_inp_shexp.weight"), (WIDTH,)),
    **dict.fromkeys(("pre_ffw_norm_2.weight", "post_ffw_norm_1.weight", "post_ffw_norm_2.weight"), (WIDTH,)),
    **dict.fromkeys(("ffn_gate_inp.scale", "post_norm.weight"), (WIDTH,)),
    "layer_output_scale.weight": (_ONE,),
    "attn_sinks.weight": (HEADS,),
    "inp_gate.weight": (WIDTH, _SIDE),
    "proj.weight": (_SIDE, WIDTH),
    "per_layer_proj_norm.weight": (_SIDE,),
    "per_layer_model_proj.weight": (WIDTH, _SIDES),
    "per_layer_token_embd.weight": (_SIDES, _VOCABULARY),
}
# tensor -> its dimensions, of which some are a dimension of another tensor, where that is there: (its name, which one)
BY_OTHERS: Mapping[str, tuple[Dimension | tuple[str, int], ...]] = {
    **dict.fromkeys(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), (WIDTH, ("ffn_down_shexp.weight", 0))),
    "ffn_down_shexp.weight": (("ffn_up_shexp.weight", 1), WIDTH),
    "ffn_latent_down.weight": (WIDTH, ("ffn_latent_up.weight", 0)),
    "ffn_latent_up.weight": (("ffn_latent_down.weight", 1), WIDTH),
    "ssm_f_a.weight": (WIDTH, ("ssm_f_b.weight", 0)),
    "ssm_f_b.weight": (("ssm_f_a.weight", 1), _KDA),
    "ssm_g_a.weight": (WIDTH, ("ssm_g_b.weight", 0)),
    "ssm_g_b.weight": (("ssm_g_a.weight", 1), _KDA),
}
_DELTA_NET: Shapes = {
    "attn_qkv.weight": (WIDTH, _DELTA_WIDTH),
    "attn_gate.weight": (WIDTH, _DELTA_VALUES),
    "ssm_conv1d.weight": (_TAPS, _DELTA_WIDTH),
    **dict.fromkeys(("ssm_dt.bias", "ssm_a"), (_STATES,)),
    **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight"), (WIDTH, _STATES)),
    "ssm_ba.weight": (WIDTH, _TWO_STATES),
    "ssm_norm.weight": (_STATE,),
    "ssm_out.weight": (_DELTA_VALUES, WIDTH),
}
# the tensor that tells of a mixer -> the tensors that it has in other shapes than attention, or alone
MIXERS: Mapping[str, Shapes] = {
    "attn_kv_a_mqa.weight": {
        "attn_q.weight": (WIDTH, _LATENT_QUERIES),
        "attn_q_a.weight": (WIDTH, _QUERY_RANK),
        "attn_q_a_norm.weight": (_QUERY_RANK,),
        "attn_q_b.weight": (_QUERY_RANK, _LATENT_QUERIES),
        "attn_kv_a_mqa.weight": (WIDTH, _JOINT),
        "attn_kv_a_norm.weight": (_RANK,),
        "attn_k_b.weight": (_PLAIN, _RANK, HEADS),
        "attn_v_b.weight": (_RANK, _LATENT_VALUE, HEADS),
        "attn_kv_b.weight": (_RANK, _LATENT_BOTH),
        "attn_output.weight": (_LATENT_MIXED, WIDTH),
    },
    "ssm_alpha.weight": _DELTA_NET,
    "ssm_ba.weight": _DELTA_NET,
    "ssm_f_a.weight": {
        **dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_v.weight"), (WIDTH, _KDA)),
        **{f"ssm_conv1d_{part}.weight": (_TAPS, _ONE, _KDA) for part in "qkv"},
        "ssm_dt.bias": (_KDA,),
        "ssm_a": (_ONE, HEADS),
        **dict.fromkeys(("ssm_f_a.weight", "ssm_g_a.weight"), (WIDTH, _KDA)),
        "ssm_beta.weight": (WIDTH, HEADS),
        "ssm_norm.weight": (_STATE,),
        "attn_output.weight": (_KDA, WIDTH),
    },
    "ssm_in.weight": {
        "ssm_in.weight": (WIDTH, _SSM_IN),
        "ssm_conv1d.weight": (_TAPS, _SSM_WIDTH),
        "ssm_conv1d.bias": (_SSM_WIDTH,),
        "ssm_dt.bias": (_STATES,),
        **dict.fromkeys(("ssm_a", "ssm_d"), (_ONE, _STATES)),
        "ssm_norm.weight": (_GROUP, _GROUPS),
        "ssm_out.weight": (_SSM, WIDTH),
    },
    "shortconv.in_proj.weight": {
        "shortconv.conv.weight": (_TAPS, WIDTH),
        "shortconv.in_proj.weight": (WIDTH, _THREE),
        "shortconv.out_proj.weight": (WIDTH, WIDTH),
    },
}
_GATED_QUERIES: Shapes = {"attn_q.weight": (WIDTH, _GATED)}
_ROW_NORMS: Shapes = {"attn_q_norm.weight": (_QUERIES,), "attn_k_norm.weight": (_KEYS,)}
# where architectures differ from the decoder: norms of whole rows, norms with weights per head, queries with gates
IN_ARCH: Mapping[str, Shapes] = {
    **dict.fromkeys(("olmo2", "olmoe", "minimax-m2"), _ROW_NORMS),
    "command-r": {"attn_q_norm.weight": (_KEY, HEADS), "attn_k_norm.weight": (_KEY, _KEY_HEADS)},
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), _GATED_QUERIES),
}
