"""The architectures that can be run: what the tensors and keys of a model of each do not tell.

A layer is a mixer (attention, latent attention, delta net, Mamba 2, short convolution, none, or two side by side) and a
feed-forward part (dense, experts, experts and shared ones, a dense and a routed branch, none). Which ones, with which
biases and norms, is told by the tensors that the layer has. The other differences are the fields of `Family`. To add an
architecture, add a line to FAMILIES (docs/extending.md). Sources: the architectures' files in src/models of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


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
_SIGMOID = Routing("sigmoid", normalized=None, keyed=True)
_SOFTMAX = Routing("softmax", normalized=None, keyed=True)
_NOT_NORMALIZED = Routing("softmax", normalized=False)


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture does that its tensors and keys do not tell.

    halves: which dimensions rotate together (rope.py). scaled_embedding: rows are multiplied by the root of their
    length. large: number of layers at which attention is scaled by n_embd / n_head instead of the head's size.
    window_rope: the rotation in layers with a window: `own` has base 10000 where no key has it and no scaling, `plain`
    the base of the others and no scaling, `same` both of the others. unrotated: layers without rotation: those
    without a window (`full`), every `fourth`, `all`, all where the key rope.scaling.finetuned is false (`keyed`), or
    none. gate: how attention's output is gated: by half of each query head (`query`), or by
    the matrix attn_gate through this activation. late_qk_norm: queries and keys are normalised after the rotation.
    interleaved_heads: value heads that share a key head are neighbours. parallel: attention and feed-forward part read
    the same norm. layer_norm: norms subtract the mean. unit_attention: scores are not scaled. value_norm: values are
    normalised. multiplied_logits: the key logit_scale multiplies instead of dividing. latent: scaled as in DeepSeek 2.
    """

    halves: bool = True
    activation: str = "silu"
    scaled_embedding: bool = False
    large: int = 0
    window_rope: str = "own"
    unrotated: str = ""
    gate: str = ""
    routing: Routing = field(default_factory=Routing)
    late_qk_norm: bool = False
    interleaved_heads: bool = False
    parallel: bool = False
    layer_norm: bool = False
    unit_attention: bool = False
    value_norm: bool = False
    multiplied_logits: bool = False
    latent: bool = False


_GEMMA = Family(activation="gelu", scaled_embedding=True)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "ernie4_5", "glm4", "internlm2", "mistral3", "xverse"), Family(halves=False)),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "phi3"), Family()),
    **dict.fromkeys(("exaone", "paddleocr", "pangu-embedded"), Family()),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, large=46, window_rope="plain"),
    "gemma3": replace(_GEMMA, large=62),
    "gemma4": replace(_GEMMA, unit_attention=True, value_norm=True),
    **dict.fromkeys(("qwen35", "qwen35moe"), Family(gate="query")),
    "qwen3next": Family(gate="query", interleaved_heads=True),
    "qwen2moe": Family(routing=_NOT_NORMALIZED),
    "gpt-oss": Family(activation="swiglu_oai", window_rope="same", routing=Routing("chosen", normalized=False)),
    **dict.fromkeys(("glm4moe", "hy_v3"), Family(routing=_SIGMOID)),
    "ernie4_5-moe": Family(halves=False),
    "dots1": Family(routing=_BY_KEYS),
    "bailingmoe2": Family(routing=_BY_KEYS),
    "lfm2": Family(),
    "lfm2moe": Family(routing=Routing("", keyed=True)),
    **dict.fromkeys(("deepseek2", "mistral4"), Family(halves=False, routing=_SOFTMAX, latent=True)),
    "nemotron_h": Family(activation="relu2", unrotated="all"),
    "nemotron_h_moe": Family(activation="relu2", unrotated="all", routing=Routing("sigmoid", normalized=None)),
    **dict.fromkeys(("granite", "granitemoe", "granitehybrid"), Family(halves=False, unrotated="keyed")),
    "falcon-h1": Family(),
    "smollm3": Family(halves=False, unrotated="fourth"),
}
