"""The architectures that can be run: what the tensors and keys of a model of each do not tell.

A layer is a mixer (attention, latent attention, delta net, Mamba 2, short convolution, none, or two side by side) and a
feed-forward part (dense, experts, experts and shared ones, a dense and a routed branch, none). Which ones, with which
biases and norms, is told by the layer's tensors, among the parts that its architecture's row names. The other
differences are the fields of `Family`. To add an architecture, add a row to FAMILIES (docs/extending.md). Sources: the
architectures' files in src/models of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# part of a layer -> its tensors: first matrices, which may have a bias and a weight scale, then others by full names
_PARTS: Mapping[str, tuple[str, str]] = {
    "attention": ("attn_q attn_k attn_v attn_qkv attn_output", "attn_rot_embd"),
    "qk norm": ("", "attn_q_norm.weight attn_k_norm.weight"),
    "sinks": ("", "attn_sinks.weight"),
    "gate": ("attn_gate", ""),
    "latent": (
        "attn_q attn_q_a attn_q_b attn_kv_a_mqa attn_kv_b attn_k_b attn_v_b attn_output",
        "attn_q_a_norm.weight attn_kv_a_norm.weight",
    ),
    "indexer": (
        "indexer.proj indexer.attn_k indexer.attn_q_b",
        "indexer.k_norm.weight indexer.k_norm.bias",
    ),
    "delta net": (
        "attn_qkv attn_gate ssm_alpha ssm_beta ssm_ba ssm_out",
        "ssm_conv1d.weight ssm_dt.bias ssm_a ssm_norm.weight",
    ),
    "kda": (
        "attn_q attn_k attn_v attn_output ssm_f_a ssm_f_b ssm_g_a ssm_g_b ssm_beta",
        "ssm_conv1d_q.weight ssm_conv1d_k.weight ssm_conv1d_v.weight ssm_dt.bias ssm_a ssm_norm.weight",
    ),
    "mamba": ("ssm_in ssm_out", "ssm_conv1d.weight ssm_conv1d.bias ssm_dt.bias ssm_a ssm_d ssm_norm.weight"),
    "convolution": ("shortconv.in_proj shortconv.out_proj", "shortconv.conv.weight"),
    "dense": ("ffn_gate ffn_up ffn_down", ""),
    "experts": ("ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps ffn_gate_up_exps", ""),
    "selection": ("", "exp_probs_b.bias exp_probs_b"),
    "latent experts": ("ffn_latent_down ffn_latent_up", ""),
    "shared": ("ffn_gate_shexp ffn_up_shexp ffn_down_shexp", ""),
    "shared gate": ("", "ffn_gate_inp_shexp.weight"),
    "norms": ("", "attn_norm.weight ffn_norm.weight"),
    "late norms": ("", "post_attention_norm.weight post_ffw_norm.weight"),
    "pair": ("", "ffn_gate_inp.scale pre_ffw_norm_2.weight post_ffw_norm_1.weight post_ffw_norm_2.weight"),
    "side embedding": ("inp_gate proj", "post_norm.weight"),
    "scale": ("", "layer_output_scale.weight"),
    "bare norm": ("", "ffn_norm"),
}
_OUTSIDE = {
    "": "token_embd.weight output.weight output.bias output.scale output_norm.weight",
    "convolution": "token_embd_norm.weight",
    "side embedding": "per_layer_token_embd.weight per_layer_model_proj.weight per_layer_proj_norm.weight",
}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, slots=True)
class Routing:
    """The choice and the weights of experts.

    gating: what becomes of the router's logits: `softmax` or `sigmoid` over all experts, `chosen` for a softmax over
    the chosen ones. keyed: the key expert_gating_func, if the file has it, replaces `gating`. normalized: the weights
    are divided by their sum; None: where the key expert_weights_norm says so.
    """

    gating: str = "softmax"
    normalized: bool | None = True
    keyed: bool = False


_BY_KEYS = Routing("", normalized=None, keyed=True)  # the file must say how
_KEYED = Routing("", keyed=True)
_SIGMOID = Routing("sigmoid", normalized=None, keyed=True)
_SOFTMAX = Routing("softmax", normalized=None, keyed=True)
_NOT_NORMALIZED = Routing("softmax", normalized=False)


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table: what the layers of an architecture may have, and what their tensors and keys do not tell.

    parts: names in the table of parts, separated by commas; norms in front of blocks are a part of all.

    halves: which dimensions rotate together (rope.py). scaled_embedding: rows are multiplied by the root of their
    length; normed_embedding: they are divided by their root mean square. large: number of layers at which attention is
    scaled by n_embd / n_head instead of the head's size.

    window_rope: the rotation in layers with a window: `own` has base 10000 where no key has it and no scaling, `plain`
    the base of the others and no scaling, `same` both of the others. unrotated: layers without rotation: those
    without a window where others have one (`full`), every `fourth`, `all`, all where the key rope.scaling.finetuned is
    false (`keyed`), or none. half_rotated: half of the dimensions that the key names rotate in layers without a window.

    gate: how attention's output is gated: by half of each query head (`query`), or by the matrix attn_gate through this
    activation. late_qk_norm: queries and keys are normalised after the rotation. value_norm: values are normalised.
    unit_attention: scores are not scaled. interleaved_heads: value heads that share a key head are neighbours. latent:
    scaled as in DeepSeek 2.

    parallel: attention and feed-forward part read the same norm. layer_norm: norms subtract the mean, unless the file
    has the key of the other kind. late_eps: the epsilon of norms behind blocks, 0 for that of the others.
    averaged_shared: experts and shared expert count half each. multiplied_logits: the key logit_scale multiplies
    instead of dividing.
    """

    parts: str
    halves: bool = True
    activation: str = "silu"
    scaled_embedding: bool = False
    normed_embedding: bool = False
    large: int = 0
    window_rope: str = "own"
    unrotated: str = ""
    half_rotated: bool = False
    gate: str = ""
    late_qk_norm: bool = False
    value_norm: bool = False
    unit_attention: bool = False
    interleaved_heads: bool = False
    latent: bool = False
    routing: Routing = field(default_factory=Routing)
    parallel: bool = False
    layer_norm: bool = False
    late_eps: float = 0.0
    averaged_shared: bool = False
    multiplied_logits: bool = False

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts that a layer may have."""
        return ("norms", *filter(None, map(str.strip, self.parts.split(","))))

    def layer_tensors(self) -> frozenset[str]:
        """Return the names that tensors of a layer may have, without `blk.N.`."""
        found = set(_FACTORS)
        for part in self.part_names:
            matrices, others = _PARTS[part]
            found.update(f"{name}{suffix}" for name in matrices.split() for suffix in (".weight", ".bias", ".scale"))
            found.update(others.split())
        return frozenset(found)

    def outer_tensors(self) -> frozenset[str]:
        """Return the names that tensors outside the layers may have."""
        return frozenset(_FACTORS).union(*(_OUTSIDE.get(part, "").split() for part in ("", *self.part_names)))


_DENSE, _MOE = "attention, dense", "attention, experts"
_GEMMA = Family(_DENSE, activation="gelu", scaled_embedding=True)
_COHERE = Family(
    f"{_DENSE}, qk norm", halves=False, parallel=True, layer_norm=True, multiplied_logits=True, window_rope="same"
)
_MLA = Family("latent, dense, experts, selection, shared", halves=False, latent=True)
_QWEN35 = Family(f"{_DENSE}, qk norm, delta net, late norms", gate="query")
_QWEN35_MOE = replace(_QWEN35, parts=f"{_MOE}, qk norm, delta net, late norms, shared, shared gate")
_SHARED = f"{_DENSE}, experts, selection, shared"  # leading layers are dense
_GRANITE = Family(f"{_DENSE}, experts, shared", halves=False, unrotated="keyed")
_NEMOTRON = "attention, mamba"

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral3"), Family(f"{_DENSE}, experts", halves=False)),
    **dict.fromkeys(("ernie4_5", "internlm2", "xverse"), Family(_DENSE, halves=False)),
    "glm4": Family(f"{_DENSE}, late norms", halves=False),
    **dict.fromkeys(("qwen2", "phi3", "exaone", "paddleocr", "pangu-embedded"), Family(_DENSE)),
    **dict.fromkeys(("qwen3", "qwen3vl"), Family(f"{_DENSE}, qk norm")),
    **dict.fromkeys(("qwen3moe", "qwen3vlmoe"), Family(f"{_MOE}, qk norm")),
    "seed_oss": Family(f"{_DENSE}, late norms"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, parts=f"{_DENSE}, late norms", large=46, window_rope="same"),
    "gemma3": replace(_GEMMA, parts=f"{_DENSE}, qk norm, late norms", large=62),
    "gemma4": replace(
        _GEMMA,
        parts=f"{_DENSE}, qk norm, late norms, experts, pair, side embedding, scale",
        unit_attention=True,
        value_norm=True,
    ),
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35_MOE,
    "qwen3next": replace(_QWEN35_MOE, interleaved_heads=True),
    "qwen2moe": Family(f"{_MOE}, shared, shared gate", routing=_NOT_NORMALIZED),
    "olmoe": Family(f"{_MOE}, qk norm", routing=_NOT_NORMALIZED),
    "gpt-oss": Family(
        f"{_MOE}, sinks, late norms",
        activation="swiglu_oai",
        window_rope="same",
        routing=Routing("chosen", normalized=False),
    ),
    "glm4moe": Family(f"{_SHARED}, qk norm, late norms", routing=_SIGMOID),
    "hy_v3": Family(f"{_SHARED}, qk norm", routing=_SIGMOID),
    "ernie4_5-moe": Family(_SHARED, halves=False),
    **dict.fromkeys(("dots1", "bailingmoe2"), Family(f"{_SHARED}, qk norm", routing=_BY_KEYS)),
    "lfm2": Family(f"{_DENSE}, qk norm, convolution"),
    "lfm2moe": Family(f"{_DENSE}, qk norm, convolution, experts, selection", routing=_KEYED),
    "minimax-m2": Family(f"{_MOE}, qk norm, selection", routing=_KEYED),
    **dict.fromkeys(("deepseek2", "mistral4"), replace(_MLA, routing=_SOFTMAX)),
    "deepseek32": replace(_MLA, parts=f"{_MLA.parts}, indexer", routing=_BY_KEYS),
    "glm-dsa": replace(_MLA, parts=f"{_MLA.parts}, indexer", routing=_SIGMOID),
    "nemotron_h": Family(f"{_NEMOTRON}, dense", activation="relu2", unrotated="all"),
    "nemotron_h_moe": Family(
        f"{_NEMOTRON}, dense, experts, selection, latent experts, shared",
        activation="relu2",
        unrotated="all",
        routing=Routing("sigmoid", normalized=None),
    ),
    **dict.fromkeys(("granite", "granitemoe"), _GRANITE),
    "granitehybrid": replace(_GRANITE, parts=f"{_GRANITE.parts}, mamba"),
    "falcon-h1": Family(f"{_DENSE}, mamba, bare norm"),
    "smollm3": Family(_DENSE, halves=False, unrotated="fourth"),
    "olmo2": Family(f"{_DENSE}, qk norm, late norms", window_rope="plain"),
    "exaone4": Family(f"{_DENSE}, qk norm, late norms", window_rope="same", unrotated="full"),
    "hunyuan-dense": Family(f"{_DENSE}, qk norm", late_qk_norm=True),
    "hunyuan-moe": Family(f"{_MOE}, qk norm, shared", late_qk_norm=True),
    "muse-glimmer": Family(
        f"{_DENSE}, qk norm, late norms, gate",
        halves=False,
        normed_embedding=True,
        gate="sigmoid",
        unrotated="full",
        window_rope="plain",
        late_eps=1e-8,
        multiplied_logits=True,
    ),
    "laguna": Family(f"{_SHARED}, qk norm, gate", gate="softplus", window_rope="plain", routing=_SIGMOID),
    "afmoe": Family(
        f"{_SHARED}, qk norm, late norms, gate",
        scaled_embedding=True,
        gate="sigmoid",
        unrotated="fourth",
        window_rope="same",
        routing=_SIGMOID,
    ),
    "step35": Family(f"{_SHARED}, qk norm, gate", gate="sigmoid", half_rotated=True, routing=_SIGMOID),
    "command-r": _COHERE,
    "cohere2": replace(_COHERE, parts=_DENSE, unrotated="full"),
    "cohere2moe": replace(
        _COHERE, parts=f"{_DENSE}, experts, shared", unrotated="full", averaged_shared=True, routing=_SIGMOID
    ),
    "kimi-linear": Family(f"{_MLA.parts}, kda", unrotated="all", routing=_KEYED),
    "bailingmoe3": Family(f"{_MLA.parts}, kda, gate", halves=False, gate="sigmoid", routing=_BY_KEYS),
}
