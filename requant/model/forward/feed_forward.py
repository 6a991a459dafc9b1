"""The feed-forward part of a layer: dense, or experts that a router chooses for each token, with shared ones beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from requant.model.forward.ops import GATED, clamp, pick, relu_squared, rms_norm, scatter, sigmoid, silu, softmax
from requant.model.forward.tape import Array, Node

if TYPE_CHECKING:
    from requant.model.forward.layer import Layer

_LEAST_CLAMP = 1e-6  # below it, the engine does not clamp
_LEAST_SUM = 2.0**-14  # the engine divides weights by no smaller sum


def feed(layer: Layer, x: Node) -> Node:
    """Apply the dense or shared part, the experts, or both, to x (n_tokens, n_embd)."""
    if not layer.has("ffn_gate_inp"):
        return apply_dense(layer, x)
    out = apply_experts(layer, x, layer.product("ffn_gate_inp", x))
    if not layer.has("ffn_up_shexp"):
        return out
    shared = apply_dense(layer, x, "_shexp")
    if layer.has("ffn_gate_inp_shexp"):
        gate = layer.weights["ffn_gate_inp_shexp.weight"].reshape(-1, 1)
        shared = shared * sigmoid(x @ gate)
    return (out + shared) * 0.5 if layer.architecture.family.averaged_shared else out + shared


def apply_dense(layer: Layer, x: Node, suffix: str = "", expert: int | None = None) -> Node:
    """Apply the gate and up projections, from one fused matrix or two, and the down projection."""
    activation = layer.architecture.family.activation
    if layer.has(f"ffn_gate_up{suffix}"):
        inner = _gate_halves(layer.product(f"ffn_gate_up{suffix}", x, expert), activation)
    else:
        up = layer.product(f"ffn_up{suffix}", x, expert)
        if activation == "relu2":
            inner = relu_squared(up)
        elif layer.has(f"ffn_gate{suffix}"):
            gate = layer.product(f"ffn_gate{suffix}", x, expert)
            architecture = layer.architecture
            limit = (architecture.shared_clamps if expert is None else architecture.clamps)[layer.index]
            if limit > _LEAST_CLAMP:
                inner = clamp(silu(gate), high=limit) * clamp(up, low=-limit, high=limit)
            else:
                inner = GATED[activation](gate, up)
        elif expert is not None:
            inner = silu(up)
        else:
            inner = _gate_halves(up, activation)
    return layer.product(f"ffn_down{suffix}", inner, expert)


def _gate_halves(both: Node, activation: str) -> Node:
    n = both.shape[1] // 2
    return GATED[activation](both[:, :n], both[:, n:])


def apply_experts(layer: Layer, x: Node, logits: Node) -> Node:
    """Apply to each token of x (n_tokens, n_embd) the experts that its logits (n_tokens, n_expert) choose."""
    used, shares = _route(layer, logits)
    inner = layer.product("ffn_latent_down", x) if layer.has("ffn_latent_down") else x
    parts, rows = [], []
    for expert in range(logits.shape[1]):
        tokens, slots = np.nonzero(used == expert)
        if tokens.size:
            y = apply_dense(layer, layer.select(inner, tokens), "_exps", expert)
            parts.append(y * shares[tokens, slots].reshape(-1, 1))
            rows.append(tokens)
    out = scatter(*parts, rows=rows, n=len(x))
    return layer.product("ffn_latent_up", out) if layer.has("ffn_latent_up") else out


def _route(layer: Layer, logits: Node) -> tuple[Array, Node]:
    """Return the experts of each token (n_tokens, n_used) and their weights; a choice has no gradient."""
    architecture = layer.architecture
    routing, n_used = architecture.routing, architecture.hp.n_expert_used
    bias = layer.weights.get("exp_probs_b.bias", layer.weights.get("exp_probs_b"))
    # a softmax over all that is normalised over the chosen is a softmax over the chosen; groups add up the former
    same = routing.gating == "softmax" and routing.normalized and bias is None and architecture.expert_groups[0] < 2
    chosen_only = routing.gating == "chosen" or same
    activation = {"softmax": softmax, "sigmoid": sigmoid}
    scores = logits if chosen_only else activation[routing.gating](logits)
    ranked = scores.value if bias is None else scores.value + bias
    used = np.argsort(-_mask_groups(ranked, *architecture.expert_groups), axis=1, kind="stable")[:, :n_used]
    shares = pick(scores, used)
    if chosen_only:
        shares = softmax(shares)
    elif routing.normalized:
        total = shares.sum(1)
        shares = shares / total if (total.value > _LEAST_SUM).all() else shares / np.maximum(total.value, _LEAST_SUM)
    return used, shares * architecture.expert_scale


def _mask_groups(scores: Array, n_groups: int, n_used: int) -> Array:
    """Return the scores with -inf for experts outside the groups whose two best experts score most."""
    if n_groups < 2:
        return scores
    by_group = scores.reshape(len(scores), n_groups, -1)
    best = np.sort(by_group, axis=2)[..., -2:].sum(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, :n_used]
    masked = np.full_like(by_group, -np.inf)
    rows = np.arange(len(scores))[:, None]
    masked[rows, kept] = by_group[rows, kept]
    return masked.reshape(scores.shape)


def apply_pair(layer: Layer, x: Node) -> Node:
    """Apply Gemma 4's two branches, dense and experts, each between norms of its own, to the stream x."""
    architecture = layer.architecture
    dense = layer.norm("post_ffw_norm_1", apply_dense(layer, layer.norm("ffn_norm", x)))
    scale = layer.weights["ffn_gate_inp.scale"] * architecture.hp.n_embd**-0.5
    logits = layer.product("ffn_gate_inp", rms_norm(x, scale.astype(x.dtype), architecture.eps))
    routed = apply_experts(layer, layer.norm("pre_ffw_norm_2", x), logits)
    return dense + layer.norm("post_ffw_norm_2", routed)
