"""The architectures that can be run: what the tensors and keys of a model of each do not tell.

A layer is a mixer (attention, latent attention, delta net, Mamba 2, short convolution, none, or two side by side) and a
feed-forward part (dense, experts, experts and shared ones, a dense and a routed branch, none). A row names those that
its layers may have, and each layer's tensors tell which one it is (parts.py). The other differences are the fields of
`Family`. To add an architecture, add a row to FAMILIES (docs/extending.md). Sources: the
architectures' files in src/models of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from requant.model.forward.parts import FACTORS, OUTSIDE, SHARED_KEYS, STATEFUL, Blocks, missing_of, tensors_of


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

    mixers, feeds: of which a layer has one each, or with `single` one of either: parts joined by +, separated by
    commas. norms: of every layer. also: parts that a layer may have beside. outside: tensors
    outside the layers that are needed, too.

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

    mixers: str
    feeds: str
    norms: str = "attn_norm ffn_norm"
    also: str = ""
    single: bool = False
    outside: str = ""
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

    def _norms(self) -> list[str]:
        return [f"{name}.weight" for name in self.norms.split()]

    def blocks(self) -> tuple[Blocks, Blocks]:
        """Return the mixers and the feed-forward parts."""
        return Blocks(self.mixers), Blocks(self.feeds)

    def layer_tensors(self, names: Collection[str]) -> frozenset[str]:
        """Return the names that a layer with the tensors `names` may have, without `blk.N.`."""
        beside = (tensors_of(part) for part in filter(None, self.also.split(", ")))
        own = (blocks.tensors(names) for blocks in self.blocks())
        return FACTORS.union(self._norms(), *beside, *own)

    def missing_tensors(self, names: Collection[str]) -> Iterator[str]:
        """Yield the names of tensors that a layer with the tensors `names` needs and lacks, without `blk.N.`."""
        yield from (name for name in self._norms() if name not in names)
        found = [blocks for blocks in self.blocks() if blocks.chosen(names)]
        for blocks in self.blocks():
            if blocks in found or not (self.single and found):
                yield from blocks.missing(names)
        yield from (name for part in filter(None, self.also.split(", ")) for name in missing_of(f"{part}?", names))

    @property
    def shares_keys(self) -> bool:
        """Return whether layers may read the keys of earlier ones."""
        return SHARED_KEYS in self.mixers

    def has_state(self, names: Collection[str]) -> bool:
        """Return whether a layer with the tensors `names` keeps a state."""
        return any(part in STATEFUL for part in self.blocks()[0].chosen(names))

    def outer_tensors(self) -> frozenset[str]:
        """Return the names that tensors outside the layers may have."""
        parts = [*self.mixers.replace("+", ", ").split(", "), *self.also.split(", ")]
        return FACTORS.union(*(OUTSIDE.get(part, "").split() for part in ("", *parts)))


_AFTER, _SANDWICH = "attn_norm post_attention_norm", "attn_norm post_attention_norm ffn_norm post_ffw_norm"
_BEHIND = "post_attention_norm post_ffw_norm"
_GEMMA = Family("attention", "dense", activation="gelu", scaled_embedding=True)
_COHERE = Family(
    *("attention", "dense", "attn_norm"),
    halves=False,
    parallel=True,
    layer_norm=True,
    multiplied_logits=True,
    window_rope="same",
)
_ROUTED = "dense, experts+selection?+shared"  # leading layers are dense
_CHOSEN = "dense, experts+selection+shared"
_MLA = Family("latent", _ROUTED, halves=False, latent=True)
_QWEN35 = Family("attention+qk norm, delta net", "dense", _AFTER, gate="query")
_QWEN35_MOE = replace(_QWEN35, feeds="experts+shared+shared gate")
_GRANITE = Family("attention", "dense, experts+shared?", halves=False, unrotated="keyed")
_NEMOTRON = Family(
    *("attention, mamba+group norm", "ungated dense", "attn_norm"), single=True, activation="relu2", unrotated="all"
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral3"), Family("attention", "dense, experts", halves=False)),
    "ernie4_5": Family("attention", "dense", halves=False),
    "arcee": Family("attention", "ungated dense", halves=False, activation="relu2"),
    **dict.fromkeys(("internlm2", "xverse"), Family("attention", "dense", outside="output.weight", halves=False)),
    "glm4": Family("attention", "joined dense", _SANDWICH, halves=False),
    "phi3": Family("attention", "joined dense"),
    **dict.fromkeys(("qwen2", "exaone", "paddleocr", "pangu-embedded"), Family("attention", "dense")),
    **dict.fromkeys(("qwen3", "qwen3vl"), Family("attention+qk norm", "dense")),
    **dict.fromkeys(("qwen3moe", "qwen3vlmoe"), Family("attention+qk norm", "experts")),
    "seed_oss": Family("attention", "dense", _AFTER),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=_SANDWICH, large=46, window_rope="same"),
    "gemma3": replace(_GEMMA, mixers="attention+qk norm", norms=_SANDWICH, large=62),
    "gemma4": replace(
        _GEMMA,
        mixers=SHARED_KEYS,
        feeds="dense, dense+experts+pair",
        norms=_SANDWICH,
        also="side embedding, scale",
        outside="rope_freqs.weight",
        unit_attention=True,
        value_norm=True,
    ),
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35_MOE,
    "qwen3next": replace(_QWEN35_MOE, interleaved_heads=True),
    "qwen2moe": Family("attention", "experts+shared+shared gate", outside="output.weight", routing=_NOT_NORMALIZED),
    "olmoe": Family("attention+qk norm", "experts", outside="output.weight", routing=_NOT_NORMALIZED),
    "gpt-oss": Family(
        *("attention+output bias+sinks", "experts+biases of experts", _AFTER),
        outside="output.weight",
        activation="swiglu_oai",
        window_rope="same",
        routing=Routing("chosen", normalized=False),
    ),
    "glm4moe": Family("attention+qk norm?", _CHOSEN, _AFTER, routing=_SIGMOID),
    "hy_v3": Family("attention+qk norm", _ROUTED, routing=_SIGMOID),
    "ernie4_5-moe": Family("attention", _ROUTED, halves=False),
    **dict.fromkeys(
        ("dots1", "bailingmoe2"), Family("attention+qk norm", _ROUTED, outside="output.weight", routing=_BY_KEYS)
    ),
    "lfm2": Family("attention+qk norm, convolution", "dense"),
    "lfm2moe": Family("attention+qk norm, convolution", "dense, experts+selection", routing=_KEYED),
    "minimax-m2": Family("attention+qk norm", "experts+selection", outside="output.weight", routing=_KEYED),
    **dict.fromkeys(("deepseek2", "mistral4"), replace(_MLA, routing=_SOFTMAX)),
    "deepseek32": replace(_MLA, mixers="latent+indexer+indexer norm", routing=_BY_KEYS),
    "glm-dsa": replace(_MLA, mixers="latent+indexer?+indexer norm?", routing=_SIGMOID),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": replace(
        _NEMOTRON,
        feeds="ungated dense, ungated experts+selection+latent experts?+ungated shared",
        routing=Routing("sigmoid", normalized=None),
    ),
    **dict.fromkeys(("granite", "granitemoe"), _GRANITE),
    "granitehybrid": replace(_GRANITE, mixers="attention, mamba+group norm"),
    "falcon-h1": Family("attention+mamba+group norm?", "dense+bare norm", "attn_norm"),
    "smollm3": Family("attention", "dense", halves=False, unrotated="fourth"),
    "olmo2": Family("attention+qk norm", "dense", _BEHIND, outside="output.weight", window_rope="plain"),
    "exaone4": Family("attention+qk norm", "dense", _BEHIND, window_rope="same", unrotated="full"),
    "hunyuan-dense": Family("attention+qk norm", "dense", late_qk_norm=True),
    "hunyuan-moe": Family("attention+qk norm", "experts+shared", late_qk_norm=True),
    "muse-glimmer": Family(
        *("attention+qk norm+gate", "dense", _SANDWICH),
        outside="output.weight",
        halves=False,
        normed_embedding=True,
        gate="sigmoid",
        unrotated="full",
        window_rope="plain",
        late_eps=1e-8,
        multiplied_logits=True,
    ),
    "laguna": Family("attention+qk norm+gate", _CHOSEN, gate="softplus", window_rope="plain", routing=_SIGMOID),
    "afmoe": Family(
        *("attention+qk norm+gate", _CHOSEN, _SANDWICH),
        scaled_embedding=True,
        gate="sigmoid",
        unrotated="fourth",
        window_rope="same",
        routing=_SIGMOID,
    ),
    "step35": Family(
        *("attention+qk norm?+gate?", _ROUTED),
        outside="output.weight",
        gate="sigmoid",
        half_rotated=True,
        routing=_SIGMOID,
    ),
    "command-r": replace(_COHERE, mixers="attention+qk norm?"),
    "cohere2": replace(_COHERE, unrotated="full"),
    "cohere2moe": replace(
        _COHERE, feeds="dense, experts+shared", unrotated="full", averaged_shared=True, routing=_SIGMOID
    ),
    "kimi-linear": Family("latent, kda+low rank", _CHOSEN, outside="output.weight", unrotated="all", routing=_KEYED),
    "bailingmoe3": Family("latent+gate, kda", _CHOSEN, halves=False, gate="sigmoid", routing=_BY_KEYS),
}
