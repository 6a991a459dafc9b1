"""The architecture of a model as the forward pass needs it: its family, and its keys as one record.

A family is a pre-norm decoder with a gated feed-forward part; biases, norms of queries and keys, norms behind a block,
fused projections and experts are used where the file has their tensors. To add one, add a line to FAMILIES.
Sources: the architectures' files in src/models, llama-model.cpp and llama-context.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from requant.container.source import Source, require_model
from requant.errors import BadInput, brief
from requant.model.forward.rope import Rope
from requant.model.hyperparameters import Hyperparameters, check_counts, read_hyperparameters
from requant.model.keys import ArchitectureKeys
from requant.model.kinds import STILL_WORKS, check_predicts_tokens
from requant.model.tensor_shapes import check_fit

_LEAST_FACTOR = 1e-6  # of the scaling of rotations, and the largest is its inverse


@dataclass(frozen=True, slots=True)
class Family:
    """A group of architectures that compute alike.

    halves: which dimensions rotate together (rope.py); scaled_embedding: rows are multiplied by the root of their
    length.
    """

    halves: bool
    activation: str = "silu"
    scaled_embedding: bool = False
    large: int = 0  # number of layers at which attention is scaled by n_embd / n_head instead of the head's size


FAMILIES: Mapping[str, Family] = {
    "llama": Family(halves=False),
    "qwen2": Family(halves=True),
    "qwen3": Family(halves=True),
    "qwen3moe": Family(halves=True),
    "phi3": Family(halves=True),
    "gemma": Family(halves=True, activation="gelu", scaled_embedding=True),
    "gemma2": Family(halves=True, activation="gelu", scaled_embedding=True, large=46),
    "gemma3": Family(halves=True, activation="gelu", scaled_embedding=True, large=62),
}
# the tensors a layer may hold; one of another name would change the computation
_MATRICES = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
)
_NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_KNOWN = frozenset(
    [f"{name}.weight" for name in (*_MATRICES, *_NORMS)]
    + [f"{name}{suffix}" for name in _MATRICES for suffix in (".bias", ".scale")]
    + [*_FACTORS, "attn_rot_embd"]
)
_OUTSIDE = frozenset(
    ["token_embd.weight", "output.weight", "output.bias", "output.scale", "output_norm.weight", *_FACTORS]
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The hyperparameters and constants of the forward pass; tuples have one item per layer."""

    family: Family
    hp: Hyperparameters
    eps: float
    rope: Rope
    rope_swa: Rope  # of layers with a sliding window
    windows: tuple[int, ...]  # tokens a layer sees at most, 0 for all
    attention_scale: float
    attention_cap: float
    logit_cap: float
    expert_scale: float

    @property
    def n_layers(self) -> int:
        """Layers that are run: all but those of multi-token prediction."""
        return self.hp.n_trunk

    def head_sizes(self, layer: int) -> tuple[int, int]:
        """Return the dimensions of a query or key, and of a value, in the layer."""
        swa = self.windows[layer] > 0
        hp = self.hp
        return (hp.key_length_swa, hp.value_length_swa) if swa else (hp.key_length, hp.value_length)


def read_architecture(source: Source) -> Architecture:
    """Read the architecture of `source`; raise BadInput where it, or a part of it, cannot be run.

    The error is a Misfit where other models of the architecture can be run.
    """
    arch = require_model(source)
    check_predicts_tokens(source.metadata, {t.name for t in source.tensors})
    if arch not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BadInput(source.path, f"the forward pass does not know '{arch}' (it knows {known})", hint=STILL_WORKS)
    check_counts(source.metadata)
    hp = read_hyperparameters(source.metadata, source.tensors)
    _check_tensors(source, hp)
    check_fit(source, hp)
    keys = ArchitectureKeys(source.metadata, arch)
    family = FAMILIES[arch]
    windows = (0,) * hp.n_layers
    if hp.windows is not None:
        windows = tuple(hp.windows.size if own else 0 for own in hp.windows.layers)
    per_head = hp.n_embd // hp.n_head[0] if family.large == hp.n_layers else hp.key_length
    rope = _rope(keys, hp, family)
    swa_base = keys.positive("rope.freq_base_swa", rope.base if arch == "gemma2" else 10000.0)
    swa_scale = rope.scale if arch == "gemma2" else 1.0
    swa = Rope(rope.n_dims, rope.halves, swa_base, scale=swa_scale, attn_factor=rope.attn_factor)
    return Architecture(
        family=family,
        hp=hp,
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        rope_swa=swa,
        windows=windows,
        attention_scale=(keys.number("attention.scale", 0.0) if arch == "llama" else 0) or 1 / math.sqrt(per_head),
        attention_cap=keys.number("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0,
        logit_cap=keys.number("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0),
        expert_scale=keys.number("expert_weights_scale", 0.0) or 1.0,
    )


def _rope(keys: ArchitectureKeys, hp: Hyperparameters, family: Family) -> Rope:
    kind = keys.metadata.get_str(f"{keys.arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.error("rope.scaling.type", "is not known", got=brief(str(kind)), hint=STILL_WORKS)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if not _LEAST_FACTOR <= factor <= 1 / _LEAST_FACTOR:
        limit = f"{_LEAST_FACTOR:g} to {1 / _LEAST_FACTOR:g}"
        raise keys.error("rope.scaling.factor", "is out of range", got=factor, limit=limit)
    yarn = kind == "yarn"
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    log_mul = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if yarn and log_mul and factor > 1:  # then the length is not 1 + ln(factor)/10, but that over this
        attn_factor /= 1 + 0.1 * log_mul * math.log(factor)
    return Rope(
        n_dims=hp.n_rotated,
        halves=family.halves,
        base=keys.positive("rope.freq_base", 10000.0),
        scale=1.0 if kind == "none" else 1 / factor,
        yarn=yarn,
        n_ctx_orig=keys.count("rope.scaling.original_context_length", hp.context_length, low=1),
        attn_factor=attn_factor,
        beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
    )


def _check_tensors(source: Source, hp: Hyperparameters) -> None:
    """Raise BadInput for a tensor that the forward pass would not use."""
    for tensor in source.tensors:
        prefix, _, rest = tensor.name.partition(".")
        layer, _, part = rest.partition(".")
        known = part in _KNOWN if prefix == "blk" and layer.isdigit() else tensor.name in _OUTSIDE
        if not known and not (prefix == "blk" and layer.isdigit() and int(layer) >= hp.n_trunk):
            what = f"tensor '{brief(tensor.name)}' is not one that the forward pass of '{hp.arch}' knows"
            raise BadInput(source.path, what, hint=STILL_WORKS)
