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

from requant.model.forward.parts import OUTSIDE, SHARED_KEYS, STATEFUL, Blocks, missing_of, tensors_of


@dataclass(frozen=True, slots=True)
class Routing:
    """The choice and the weights of experts where no key tells.

    gating: what becomes of the router's logits: `softmax` or `sigmoid` over all experts, `chosen` for a softmax over
    the chosen ones; empty where the file must say. normalized: the weights are divided by their sum.
    """

    gating: str = "softmax"
    normalized: bool = True


# keys that only some graphs read
_WEIGHTS = "expert_weights_scale expert_weights_norm"
_ROUTER = f"{_WEIGHTS} expert_gating_func"
_MULTIPLIERS = "attention.scale embedding_scale residual_scale logit_scale"
_WINDOW_BASE = "rope.freq_base_swa"
_SECTIONS = "rope.dimension_sections"
_TEMPERATURE = "attention.temperature_scale"
_YARN = "rope.scaling.yarn_log_multiplier"
_LOGIT_CAP = "final_logit_softcapping"
_CLAMPS = "swiglu_clamp_exp swiglu_clamp_shexp"

_MUST_SAY = Routing("", normalized=False)
_SIGMOID = Routing("sigmoid", normalized=False)
_NOT_NORMALIZED = Routing(normalized=False)


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table: what the layers of an architecture may have, and what their tensors and keys do not tell.

    mixers, feeds: of which a layer has one each, or with `single` one of either: parts joined by +, separated by
    commas. norms: of every layer. also: parts that a layer may have beside. outside: tensors outside the layers that
    are needed, too. keys: those keys that llama.cpp reads for the architecture and uses, among those that it reads for
    some only; a key that any row names is not read for the others.

    halves: which dimensions rotate together (rope.py). sections: the order of the sections of M-RoPE, which rotates
    halves: `blocks` or `interleaved`. factors: tensors that divide the frequencies of the rotation; idle_factors: such
    tensors that llama.cpp loads and does not use. scaled_embedding: rows are multiplied by the root of their length;
    normed_embedding: they are divided by their root mean square. large: number of layers at which attention is scaled
    by n_embd / n_head instead of the head's size.

    window_rope: the rotation in layers with a window: `own` has base 10000 where no key has it, `unscaled` the base of
    the others, both with the length of the others and no other scaling; `plain` their base alone, `same` all of theirs.
    unrotated: layers without rotation: those without a window where others have one (`full`), every `fourth`, `all`,
    all where the key rope.scaling.finetuned is false (`keyed`), or none. own_dimensions: layers with a window rotate as
    many dimensions as a key of theirs says; else all rotate as many as the first. half_rotated: half of the dimensions
    that the key names rotate in layers without a window.

    gate: how attention's output is gated: by half of each query head (`query`), or by the matrix attn_gate through this
    activation. late_qk_norm: queries and keys are normalised after the rotation. value_norm: values are normalised.
    unit_attention: scores are not scaled. interleaved_heads: value heads that share a key head are neighbours. latent:
    scaled as in DeepSeek 2.

    parallel: attention and feed-forward part read the same norm. layer_norm: norms subtract the mean, `always` or where
    the file has no key of the other kind (`keyed`). late_eps: the epsilon of norms behind blocks, 0 for that of the
    others. averaged_shared: experts and shared expert count half each. multiplied_logits: the key logit_scale
    multiplies instead of dividing. attention_cap, logit_cap: without the key, 0 for none.
    """

    mixers: str
    feeds: str
    norms: str = "attn_norm ffn_norm"
    also: str = ""
    single: bool = False
    outside: str = ""
    keys: str = ""
    halves: bool = True
    sections: str = ""
    factors: str = ""
    idle_factors: str = ""
    activation: str = "silu"
    scaled_embedding: bool = False
    normed_embedding: bool = False
    large: int = 0
    window_rope: str = "own"
    unrotated: str = ""
    own_dimensions: bool = False
    half_rotated: bool = False
    gate: str = ""
    late_qk_norm: bool = False
    value_norm: bool = False
    unit_attention: bool = False
    interleaved_heads: bool = False
    latent: bool = False
    routing: Routing = field(default_factory=Routing)
    parallel: bool = False
    layer_norm: str = ""
    late_eps: float = 0.0
    averaged_shared: bool = False
    multiplied_logits: bool = False
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def _norms(self) -> list[str]:
        return [f"{name}.weight" for name in self.norms.split()]

    def blocks(self) -> tuple[Blocks, Blocks]:
        """Return the mixers and the feed-forward parts."""
        return Blocks(self.mixers), Blocks(self.feeds)

    def layer_tensors(self, names: Collection[str]) -> frozenset[str]:
        """Return the names that a layer with the tensors `names` may have, without `blk.N.`."""
        beside = (tensors_of(part) for part in filter(None, self.also.split(", ")))
        own = (blocks.tensors(names) for blocks in self.blocks())
        return frozenset(self._norms()).union(*beside, *own)

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
        factors = (f"{name}.weight" for name in f"{self.factors} {self.idle_factors}".split())
        return frozenset(factors).union(*(OUTSIDE.get(part, "").split() for part in ("", *parts)))


_AFTER, _SANDWICH = "attn_norm post_attention_norm", "attn_norm post_attention_norm ffn_norm post_ffw_norm"
_BEHIND = "post_attention_norm post_ffw_norm"
_LONG = "rope_factors_long rope_factors_short"
_LLAMA = Family("attention", "dense, plain experts", halves=False, factors=f"rope_freqs {_LONG}")
_GEMMA = Family("attention", "dense", activation="gelu", scaled_embedding=True)
_COHERE = Family(
    *("attention", "dense", "attn_norm"),
    keys="logit_scale",
    halves=False,
    parallel=True,
    layer_norm="always",
    multiplied_logits=True,
    window_rope="same",
)
_ROUTED = "dense, experts+selection?+shared"  # leading layers are dense
_CHOSEN = "dense, experts+selection+shared"
# without the shared expert, the graphs of glm4moe, hy_v3, step35 and kimi-linear add silu of the input: it is needed
_PLAIN_ROUTED = "dense, plain experts+selection?+shared"
_MLA = Family("latent", _ROUTED, keys=_ROUTER, halves=False, latent=True, routing=_MUST_SAY)
_DEEPSEEK2 = replace(
    _MLA, keys=f"{_ROUTER} {_TEMPERATURE} attention.temperature_length {_YARN}", routing=_NOT_NORMALIZED
)
_TOP_K = "attention.indexer.top_k"
_QWEN3VL = Family("attention+qk norm", "dense", keys=_SECTIONS, sections="interleaved")
_QWEN3NEXT = Family(
    *("attention+qk norm, delta net", "experts+shared+shared gate", _AFTER), gate="query", interleaved_heads=True
)
_QWEN35_MOE = replace(_QWEN3NEXT, keys=_SECTIONS, sections="interleaved", interleaved_heads=False)
_GRANITE = Family(
    *("attention", "dense, plain experts+shared?"),
    keys=f"{_MULTIPLIERS} rope.scaling.finetuned",
    halves=False,
    factors=f"rope_freqs {_LONG}",
    unrotated="keyed",
)
_NEMOTRON = Family(
    *("attention, mamba+group norm", "ungated dense", "attn_norm"), single=True, activation="relu2", unrotated="all"
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral3": replace(_LLAMA, keys=f"{_TEMPERATURE} {_YARN} rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow"),
    "ernie4_5": Family("attention", "dense", halves=False),
    "arcee": Family("attention", "ungated dense", halves=False, factors="rope_freqs", activation="relu2"),
    **dict.fromkeys(("internlm2", "xverse"), Family("attention", "dense", outside="output.weight", halves=False)),
    "glm4": Family("attention", "joined dense", _SANDWICH, keys=_SECTIONS, halves=False, sections="blocks"),
    "phi3": Family("attention", "joined dense", factors=_LONG),
    "qwen2": Family("attention", "dense"),
    "exaone": Family("attention", "dense", factors="rope_freqs"),
    "paddleocr": Family("attention", "dense", keys=_SECTIONS, sections="blocks"),
    "pangu-embedded": Family("attention+output bias", "dense", idle_factors=f"rope_freqs {_LONG}"),
    "qwen3": Family("attention+qk norm", "dense"),
    "qwen3vl": _QWEN3VL,
    "qwen3moe": Family("attention+qk norm", "experts"),
    "qwen3vlmoe": replace(_QWEN3VL, feeds="experts"),
    "seed_oss": Family("attention", "dense", _AFTER),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        norms=_SANDWICH,
        keys=f"{_WINDOW_BASE} attn_logit_softcapping {_LOGIT_CAP}",
        large=46,
        window_rope="same",
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    "gemma3": replace(
        _GEMMA, mixers="attention+qk norm", norms=_SANDWICH, keys=f"{_WINDOW_BASE} {_LOGIT_CAP}", large=62
    ),
    "gemma4": replace(
        _GEMMA,
        mixers=SHARED_KEYS,
        feeds="dense, dense+experts+pair",
        norms=_SANDWICH,
        also="side embedding, scale",
        outside="rope_freqs.weight",
        keys=f"{_WINDOW_BASE} {_LOGIT_CAP} attention.shared_kv_layers",
        own_dimensions=True,
        factors="rope_freqs",
        unit_attention=True,
        value_norm=True,
        logit_cap=30.0,
    ),
    "qwen35": replace(_QWEN35_MOE, feeds="dense"),
    "qwen35moe": _QWEN35_MOE,
    "qwen3next": _QWEN3NEXT,
    "qwen2moe": Family("attention", "experts+shared+shared gate", outside="output.weight", routing=_NOT_NORMALIZED),
    "olmoe": Family("attention+qk norm", "experts", outside="output.weight", routing=_NOT_NORMALIZED),
    "gpt-oss": Family(
        *("attention+output bias+sinks", "experts+biases of experts", _AFTER),
        outside="output.weight",
        keys=_WINDOW_BASE,
        activation="swiglu_oai",
        window_rope="same",
        routing=Routing("chosen", normalized=False),
    ),
    "glm4moe": Family(
        *("attention+q norm?+k norm?", _CHOSEN, _AFTER),
        keys=f"{_ROUTER} {_SECTIONS}",
        sections="blocks",
        routing=_SIGMOID,
    ),
    "hy_v3": Family("attention+qk norm", _PLAIN_ROUTED, keys=_ROUTER, routing=_SIGMOID),
    "ernie4_5-moe": Family("attention", f"{_PLAIN_ROUTED}?", halves=False),
    **dict.fromkeys(
        ("dots1", "bailingmoe2"),
        Family("attention+qk norm", _ROUTED, outside="output.weight", keys=_ROUTER, routing=_MUST_SAY),
    ),
    "lfm2": Family("attention+qk norm, convolution", "dense", window_rope="same"),
    "lfm2moe": Family(
        *("attention+qk norm, convolution", "dense, experts+selection"), keys="expert_gating_func", routing=Routing("")
    ),
    "minimax-m2": Family(
        *("attention+qk norm", "experts+selection"),
        outside="output.weight",
        keys="expert_gating_func",
        routing=Routing(""),
    ),
    **dict.fromkeys(("deepseek2", "mistral4"), _DEEPSEEK2),
    "deepseek32": replace(_MLA, mixers="latent+indexer+indexer norm", keys=f"{_ROUTER} {_YARN} {_TOP_K}"),
    "glm-dsa": replace(_MLA, mixers="latent+indexer?+indexer norm?", keys=f"{_ROUTER} {_TOP_K}", routing=_SIGMOID),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": replace(
        _NEMOTRON,
        feeds="ungated dense, ungated experts+selection+latent experts?+ungated shared",
        keys=_WEIGHTS,
        routing=_SIGMOID,
    ),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, keys=_MULTIPLIERS),
    "granitehybrid": replace(_GRANITE, mixers="attention, mamba+group norm", factors="rope_freqs"),
    "falcon-h1": Family(*("attention+mamba+group norm?", "dense+bare norm", "attn_norm"), idle_factors="rope_freqs"),
    "smollm3": Family("attention", "dense", halves=False, unrotated="fourth"),
    "olmo2": Family("attention+qk norm", "dense", _BEHIND, outside="output.weight", window_rope="plain"),
    "exaone4": Family(
        *("attention+qk norm", "dense", _BEHIND), factors="rope_freqs", window_rope="same", unrotated="full"
    ),
    "hunyuan-dense": Family("attention+qk norm", "dense", keys="rope.scaling.alpha", late_qk_norm=True),
    "hunyuan-moe": Family("attention+qk norm", "experts+shared", late_qk_norm=True),
    "muse-glimmer": Family(
        *("attention+qk norm+gate", "dense", _SANDWICH),
        outside="output.weight",
        keys=f"{_WINDOW_BASE} {_LOGIT_CAP} logit_scale",
        halves=False,
        normed_embedding=True,
        gate="sigmoid",
        unrotated="full",
        window_rope="unscaled",
        late_eps=1e-8,
        multiplied_logits=True,
        logit_cap=30.0,
    ),
    "laguna": Family(
        *("attention+qk norm+gate", _CHOSEN),
        keys=f"{_ROUTER} {_WINDOW_BASE}",
        own_dimensions=True,
        gate="softplus",
        window_rope="plain",
        routing=_SIGMOID,
    ),
    "afmoe": Family(
        *("attention+qk norm+gate", f"{_CHOSEN}?", _SANDWICH),
        keys=f"{_ROUTER} {_WINDOW_BASE}",
        scaled_embedding=True,
        gate="sigmoid",
        unrotated="fourth",
        window_rope="same",
        routing=_SIGMOID,
    ),
    "step35": Family(
        *("attention+q norm?+k norm?+gate?", _PLAIN_ROUTED),
        outside="output.weight",
        keys=f"{_ROUTER} {_WINDOW_BASE} {_CLAMPS}",
        own_dimensions=True,
        factors=f"rope_freqs {_LONG}",
        gate="sigmoid",
        half_rotated=True,
        routing=_SIGMOID,
    ),
    "command-r": replace(_COHERE, mixers="attention+qk norm?"),
    "cohere2": replace(_COHERE, unrotated="full"),
    "cohere2moe": replace(
        _COHERE,
        feeds="dense, experts+shared?",
        keys=f"logit_scale {_ROUTER} leading_dense_block_count",
        unrotated="full",
        layer_norm="keyed",
        averaged_shared=True,
        routing=_SIGMOID,
    ),
    "kimi-linear": Family(
        *("latent, kda+low rank", _CHOSEN),
        outside="output.weight",
        keys="expert_weights_scale expert_gating_func",
        unrotated="all",
        routing=Routing(""),
    ),
    "bailingmoe3": Family(
        *("latent+gate, kda", _CHOSEN),
        keys=f"{_ROUTER} {_CLAMPS} {_SECTIONS} kda.gate_lower_bound",
        halves=False,
        sections="blocks",
        gate="sigmoid",
        routing=_MUST_SAY,
    ),
}

# keys that some rows name, and no others read
SOME_READ = frozenset(key for family in FAMILIES.values() for key in family.keys.split())
