"""The architecture of a model as the forward pass needs it: its family, and its keys as one record.

Sources: the architectures' files in src/models, llama-model.cpp and llama-context.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from requant.container.source import Source, require_model
from requant.errors import BadInput, brief
from requant.model.forward.families import FAMILIES, SOME_READ, Family, Routing
from requant.model.forward.rope import Rope
from requant.model.hyperparameters import Hyperparameters, check_counts, read_hyperparameters
from requant.model.keys import ArchitectureKeys
from requant.model.kinds import check_predicts_tokens
from requant.model.tensor_shapes import check_fit, place_in_layer, tensors_by_layer

_LEAST_FACTOR = 1e-6  # of the scaling of rotations, and the largest is its inverse
_GATINGS = ("softmax", "sigmoid", "chosen")  # by the key's value from 1
_LITE_VOCABULARY = 154880  # of GLM 4.7 Flash, whose files may lack the key of the gating


class NotRun(BadInput):
    """A model, or a part of one, that the forward pass does not know; llama.cpp may."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """The growth of queries with their position: 1 + scale * ln(floor(position / length) + 1)."""

    scale: float
    length: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The hyperparameters and constants of the forward pass; tuples have one item per layer."""

    family: Family
    hp: Hyperparameters
    eps: float
    rope: Rope
    rope_swa: Rope  # of layers with a sliding window
    rotates: tuple[bool, ...]
    windows: tuple[int, ...]  # tokens a layer sees at most, 0 for all
    attention_scale: float  # 0 for one over the root of the head's size
    attention_cap: float
    logit_cap: float
    routing: Routing
    expert_scale: float
    expert_groups: tuple[int, int]  # groups of experts, and those that are used
    temperature: Temperature | None
    reach: int  # tokens that attention with an indexer sees all of, 0 without one
    clamps: tuple[float, ...]  # of the inner activations of experts, 0 for none
    shared_clamps: tuple[float, ...]  # of dense parts and shared experts
    layer_norm: bool  # norms subtract the mean
    least_decay: float  # bound of the logarithm of a decay that is sigmoid, 0 for an unbounded one
    n_shared: int  # layers at the end that read keys and values of earlier ones
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def n_layers(self) -> int:
        """Layers that are run: all but those of multi-token prediction."""
        return self.hp.n_trunk

    def key_layer(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads: its own, or the last one of its kind that has some."""
        n_own = self.n_layers - self.n_shared
        if layer < n_own:
            return layer
        return n_own - (2 if self.windows[layer] else 1)

    @property
    def kept_layers(self) -> frozenset[int]:
        """The layers whose keys and values later layers read."""
        return frozenset(self.key_layer(il) for il in range(self.n_layers - self.n_shared, self.n_layers))

    def head_sizes(self, layer: int) -> tuple[int, int]:
        """Return the dimensions of a query or key, and of a value, in the layer."""
        swa = self.windows[layer] > 0
        hp = self.hp
        return (hp.key_length_swa, hp.value_length_swa) if swa else (hp.key_length, hp.value_length)


def read_architecture(source: Source) -> Architecture:
    """Read the architecture of `source`; raise BadInput where it, or a part of it, cannot be run.

    The error is a Misfit where other models of the architecture can be run, NotRun where llama.cpp may run this one.
    """
    arch = require_model(source)
    check_predicts_tokens(source.metadata, {t.name for t in source.tensors})
    if arch not in FAMILIES:
        raise NotRun(source.path, f"the forward pass does not know '{arch}'")
    check_counts(source.metadata)
    hp = read_hyperparameters(source.metadata, source.tensors)
    _check_tensors(source, hp)
    check_fit(source, hp)
    family = FAMILIES[arch]
    keys = ArchitectureKeys(source.metadata, arch, SOME_READ.difference(family.keys.split()))
    windows = (0,) * hp.n_layers
    if hp.windows is not None:
        windows = tuple(hp.windows.size if own else 0 for own in hp.windows.layers)
    rope = _rope(keys, hp, family)
    rope_swa = _rope_swa(keys, family, rope, hp)
    if not family.own_dimensions:
        n_dims = (rope_swa if windows[0] else rope).n_dims
        rope, rope_swa = replace(rope, n_dims=n_dims), replace(rope_swa, n_dims=n_dims)
    logit_scale = keys.number("logit_scale", 0.0) or 1.0
    rms, mean = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    layer_norm = family.layer_norm == "always" or (family.layer_norm == "keyed" and keys.get(rms) is None)
    eps, other = (mean, rms) if layer_norm else (rms, mean)
    found = Architecture(
        family=family,
        hp=hp,
        eps=keys.number(eps, keys.number(other, 0.0) or None),
        layer_norm=layer_norm,
        rope=rope,
        rope_swa=rope_swa,
        rotates=_rotates(keys, family, windows),
        windows=windows,
        attention_scale=_attention_scale(keys, family, hp, rope),
        attention_cap=keys.number("attn_logit_softcapping", family.attention_cap),
        logit_cap=keys.number("final_logit_softcapping", family.logit_cap),
        routing=_routing(keys, family, hp),
        expert_scale=keys.number("expert_weights_scale", 0.0) or 1.0,
        expert_groups=_expert_groups(keys, hp),
        n_shared=keys.count("attention.shared_kv_layers", 0, high=max(0, hp.n_trunk - 2)),
        reach=keys.count("attention.indexer.top_k", 0),
        clamps=_clamps(keys, "swiglu_clamp_exp", hp.n_layers),
        shared_clamps=_clamps(keys, "swiglu_clamp_shexp", hp.n_layers),
        least_decay=keys.number("kda.gate_lower_bound", 0.0),
        temperature=_temperature(keys, rope),
        embedding_scale=keys.number("embedding_scale", 0.0) or (hp.n_embd**0.5 if family.scaled_embedding else 1.0),
        residual_scale=keys.number("residual_scale", 0.0) or 1.0,
        logit_scale=logit_scale if family.multiplied_logits else 1 / logit_scale,
    )
    _check_key_layers(keys, found)
    return found


def _check_key_layers(keys: ArchitectureKeys, architecture: Architecture) -> None:
    """Raise BadInput where a layer would read the keys of a layer whose heads are of another kind."""
    windows = architecture.windows
    for il in range(architecture.n_layers):
        source = architecture.key_layer(il)
        if (windows[source] > 0) != (windows[il] > 0):
            what = f"makes layer {il} read the keys of layer {source}, of which only one has a sliding window"
            raise keys.error("attention.shared_kv_layers", what, got=architecture.n_shared)


def _expert_groups(keys: ArchitectureKeys, hp: Hyperparameters) -> tuple[int, int]:
    """Return the groups of experts, and those that are used."""
    groups = keys.count("expert_group_count", 0)
    if groups > 1 and hp.n_expert % groups:
        raise keys.error("expert_group_count", "is no divisor of the experts", got=groups, limit=hp.n_expert)
    low, high = (1, groups) if groups > 1 else (0, hp.n_expert)
    return groups, keys.count("expert_group_used_count", 0, low=low, high=high)


def _rope(keys: ArchitectureKeys, hp: Hyperparameters, family: Family) -> Rope:
    kind = keys.metadata.get_str(f"{keys.arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise NotRun(keys.metadata.path, f"key '{keys.arch}.rope.scaling.type' is not known", got=brief(str(kind)))
    factor = _scaling_factor(keys)
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        log_mul = _log_multiplier(keys, family)
        own = log_mul if keys.arch == "deepseek2" and log_mul else 1.0
        attn_factor *= _yarn_length(factor, own) / _yarn_length(factor, log_mul) / (1 + 0.1 * math.log(factor))
    n_dims = hp.n_rotated // (2 if family.half_rotated else 1)
    sections = _sections(keys)
    base = keys.positive("rope.freq_base", 10000.0)
    alpha = keys.number("rope.scaling.alpha", 0.0)
    return Rope(
        n_dims=n_dims,
        halves=family.halves or (sections[0] > 0 and sections[1] > 0),
        base=base * alpha ** (hp.key_length / max(1, hp.key_length - 2)) if alpha > 0 else base,
        scale=1.0 if kind == "none" else 1 / factor,
        yarn=kind == "yarn",
        n_ctx_orig=keys.count("rope.scaling.original_context_length", hp.context_length, low=1),
        attn_factor=attn_factor,
        beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
        still=_still_pairs(family, sections, n_dims // 2),
    )


def _scaling_factor(keys: ArchitectureKeys) -> float:
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if not _LEAST_FACTOR <= factor <= 1 / _LEAST_FACTOR:
        limit = f"{_LEAST_FACTOR:g} to {1 / _LEAST_FACTOR:g}"
        raise keys.error("rope.scaling.factor", "is out of range", got=factor, limit=limit)
    return factor


def _log_multiplier(keys: ArchitectureKeys, family: Family) -> float:
    return keys.number("rope.scaling.yarn_log_multiplier", 0.0) * (10 if family.latent else 1)


def _yarn_length(factor: float, multiplier: float) -> float:
    """Return the length of rotated vectors by which yarn makes up for a longer context."""
    return 1 + 0.1 * multiplier * math.log(factor) if factor > 1 else 1.0


def _sections(keys: ArchitectureKeys) -> list[int]:
    """Return the lengths of the four sections of M-RoPE in pairs, zeros without them."""
    key = "rope.dimension_sections"
    if keys.array_length(key) not in (None, 4):
        raise keys.error(key, "has the wrong number of items", got=keys.array_length(key), limit="4 sections")
    value = keys.get(key)
    items = value if isinstance(value, list) else [value or 0] * 4
    return [keys.check_integer(key, item) for item in items]


def _still_pairs(family: Family, sections: Sequence[int], n_pairs: int) -> tuple[int, ...]:
    """Return the pairs of dimensions that follow the fourth position of M-RoPE, which is 0 for text."""

    def is_still(pair: int) -> bool:
        place = pair % total
        if family.sections == "interleaved":
            return place >= 3 * sections[place % 3]
        return place >= total - sections[3]

    total = sum(sections)
    return tuple(filter(is_still, range(n_pairs))) if total else ()


def _rope_swa(keys: ArchitectureKeys, family: Family, rope: Rope, hp: Hyperparameters) -> Rope:
    """Return the rotation of layers with a window."""
    base = keys.positive("rope.freq_base_swa", 10000.0 if family.window_rope == "own" else rope.base)
    usual = min(rope.n_dims * (2 if family.half_rotated else 1), hp.key_length_swa)
    n_dims = keys.count("rope.dimension_count_swa", usual, low=2, high=hp.key_length_swa)
    if family.window_rope == "same":
        # where windows have a base of their own, no type of scaling but the factor alone decides
        scale = rope.scale if "rope.freq_base_swa" in keys.ignored else 1 / _scaling_factor(keys)
        return replace(rope, base=base, n_dims=n_dims, scale=scale)
    return Rope(n_dims, rope.halves, base, attn_factor=1.0 if family.window_rope == "plain" else rope.attn_factor)


def _rotates(keys: ArchitectureKeys, family: Family, windows: tuple[int, ...]) -> tuple[bool, ...]:
    n_dense = keys.count("leading_dense_block_count", 0)

    def rotates(il: int) -> bool:
        match family.unrotated:
            case "full":
                return windows[il] > 0 or not any(windows) or il < n_dense
            case "fourth":
                return (il + 1) % 4 != 0
            case "keyed":
                return keys.get("rope.scaling.finetuned") is not False
        return not family.unrotated

    return tuple(map(rotates, range(len(windows))))


def _attention_scale(keys: ArchitectureKeys, family: Family, hp: Hyperparameters, rope: Rope) -> float:
    """Return the factor on the scores, 0 for one over the root of the head's size."""
    if family.unit_attention:
        return 1.0
    if family.large and family.large == hp.n_layers:
        return 1 / math.sqrt(hp.n_embd // hp.n_head[0])
    if hp.latent is not None and "latent" in family.mixers:
        length = 1.0
        if family.latent:
            growth = -0.1 * math.log(rope.scale)
            length = rope.attn_factor * (1 + growth) * (1 + _log_multiplier(keys, family) * growth)
        return length**2 / math.sqrt(hp.latent.key_length)
    return keys.number("attention.scale", 0.0)


def _routing(keys: ArchitectureKeys, family: Family, hp: Hyperparameters) -> Routing:
    """Return the routing with nothing left to the keys."""
    gating, normalized = family.routing.gating, keys.get("expert_weights_norm")
    if family.latent and hp.n_trunk in (47, 48) and hp.n_vocab == _LITE_VOCABULARY:
        gating = "sigmoid"
    if hp.n_expert:
        default = _GATINGS.index(gating) + 1 if gating else None
        gating = _GATINGS[keys.count("expert_gating_func", default, low=1, high=3) - 1]
    return Routing(gating, family.routing.normalized if normalized is None else bool(normalized))


def _clamps(keys: ArchitectureKeys, key: str, n_layers: int) -> tuple[float, ...]:
    """Return one number per layer, from a scalar or an array; 0 where the key is absent."""
    if not keys.is_per_layer(key, n_layers):
        return (keys.number(key, 0.0),) * n_layers
    return tuple(float(item) for item in keys.get(key))


def _temperature(keys: ArchitectureKeys, rope: Rope) -> Temperature | None:
    scale = keys.number("attention.temperature_scale", 0.0)
    if not scale:
        return None
    key = "attention.temperature_length"
    length = rope.n_ctx_orig if key in keys.ignored else keys.count(key, 0)
    if length < 1:
        raise keys.error(key, "is missing beside attention.temperature_scale")
    return Temperature(scale, length)


def _check_tensors(source: Source, hp: Hyperparameters) -> None:
    """Raise BadInput for a tensor that the forward pass would not use."""
    family = FAMILIES[hp.arch]
    layers, outer = tensors_by_layer(source), family.outer_tensors()
    inner = {layer: family.layer_tensors(names) for layer, names in layers.items() if layer < hp.n_trunk}
    for tensor in source.tensors:
        layer, part = place_in_layer(tensor.name)
        known = tensor.name in outer if layer is None else layer >= hp.n_trunk or part in inner[layer]
        if not known:
            what = f"tensor '{brief(tensor.name)}' is not one that the forward pass of '{hp.arch}' knows"
            what += "" if layer is None else " in such a layer"
            raise NotRun(source.path, what)
