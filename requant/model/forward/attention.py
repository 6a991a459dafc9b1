"""Attention as a mixer of tokens: over keys and values of heads, or over a latent that the heads share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from requant.model.forward.ops import attention, concatenate, replace_value, rms_norm, sigmoid, softplus
from requant.model.forward.tape import Node

if TYPE_CHECKING:
    from requant.model.forward.layer import Layer


def attend(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by attention."""
    n, architecture = len(x), layer.architecture
    d_k, d_v = architecture.head_sizes(layer.index)
    source = architecture.key_layer(layer.index)
    if source == layer.index:
        q, k, v = _project(layer, x)
        k, v = k.reshape(n, -1, d_k), v.reshape(n, -1, d_v)
        if architecture.family.value_norm:
            v = rms_norm(v, 1.0, architecture.eps)
        k = _normalize_and_rotate(layer, "attn_k_norm", k)
        held = layer.round_cache(k.value, v.value)
        k, v = replace_value(k, held[0]), replace_value(v, held[1])
        if layer.side is not None:
            layer.side.keep(source, k, v)
    else:
        assert layer.side is not None
        q, (k, v) = layer.product("attn_q", x), layer.side.take(source)
    gate = None
    if architecture.family.gate == "query":
        both = q.reshape(n, -1, 2 * d_k)
        q, gate = both[..., :d_k], both[..., d_k:]
    mixed = attention(
        heat(layer, _normalize_and_rotate(layer, "attn_q_norm", q.reshape(n, -1, d_k))),
        k,
        v,
        scale=architecture.attention_scale or 1 / math.sqrt(d_k),
        cap=architecture.attention_cap,
        window=architecture.windows[layer.index],
        sinks=layer.weights.get("attn_sinks.weight"),
    )
    if gate is not None:
        mixed = mixed * sigmoid(gate)
    elif layer.has("attn_gate"):
        mixed = _gate(layer, x, mixed)
    return layer.product("attn_output", mixed.reshape(n, -1))


def _project(layer: Layer, x: Node) -> tuple[Node, Node, Node]:
    """Compute queries, keys and values (n_tokens, ..), from one fused matrix or several."""
    if layer.has("attn_qkv"):
        hp, il = layer.architecture.hp, layer.index
        d_k, d_v = layer.architecture.head_sizes(il)
        y = layer.product("attn_qkv", x)
        n_k, n_v = hp.n_head_kv[il] * d_k, hp.n_head_kv[il] * d_v
        n_q = y.shape[1] - n_k - n_v
        return y[:, :n_q], y[:, n_q : n_q + n_k], y[:, n_q + n_k :]
    v = layer.product("attn_v", x) if layer.has("attn_v") else None
    k, q = layer.product("attn_k", x), layer.product("attn_q", x)
    return q, k, k if v is None else v  # the values are the keys in layers without a matrix for them


def _normalize_and_rotate(layer: Layer, name: str, x: Node) -> Node:
    """Normalise queries or keys (n_tokens, n_head, d), per head or whole, and rotate them, in the family's order."""
    weight = layer.weights.get(f"{name}.weight")
    if weight is not None and weight.ndim == 1 and weight.size != x.shape[2]:
        n, n_head, d = x.shape
        x = layer.norm(name, x.reshape(n, n_head * d)).reshape(n, n_head, d)
    elif not layer.architecture.family.late_qk_norm:
        x = layer.norm(name, x)
    x = layer.rotate(x)
    return layer.norm(name, x) if layer.architecture.family.late_qk_norm else x


def heat(layer: Layer, q: Node) -> Node:
    """Scale queries (n_tokens, n_head, d) by the temperature of their positions."""
    temperature = layer.architecture.temperature
    if temperature is None:
        return q
    growth = np.log(np.floor(np.arange(len(q)) / temperature.length) + 1) * temperature.scale + 1
    scaled: Node = q * growth.astype(q.dtype)[:, None, None]
    return scaled


def _gate(layer: Layer, x: Node, mixed: Node) -> Node:
    """Multiply what the heads give (n_tokens, n_head, d) by the gates of attn_gate, one a head or one a number."""
    activation = {"sigmoid": sigmoid, "softplus": softplus}[layer.architecture.family.gate]
    return mixed * activation(layer.product("attn_gate", x)).reshape(*mixed.shape[:2], -1)


def attend_to_latent(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by attention over a latent, which is the key and the value of all heads.

    Matrices that turn a head's query into the space of the latent and its result back are products of their own.
    """
    architecture, n = layer.architecture, len(x)
    sizes = architecture.hp.latent
    assert sizes is not None
    n_plain = sizes.key_length - sizes.n_rotated
    if layer.has("attn_q_a"):
        q = layer.product("attn_q_b", layer.norm("attn_q_a_norm", layer.product("attn_q_a", x)))
    else:
        q = layer.product("attn_q", x)
    q = q.reshape(n, -1, sizes.key_length)
    plain, turned = q[..., :n_plain], layer.rotate(q[..., n_plain:])
    joint = layer.product("attn_kv_a_mqa", x)
    latent = layer.norm("attn_kv_a_norm", joint[:, : sizes.rank])
    position = layer.rotate(joint[:, sizes.rank :].reshape(n, 1, sizes.n_rotated))
    n_head = q.shape[1]
    if layer.has("attn_kv_b"):
        both = layer.product("attn_kv_b", latent).reshape(n, n_head, n_plain + sizes.value_length)
        shared = position * np.ones((1, n_head, 1), position.dtype)
        keys, values = concatenate(both[..., :n_plain], shared, axis=2), both[..., n_plain:]
    else:
        plain = _heads(layer, "attn_k_b", plain)
        keys = concatenate(latent.reshape(n, 1, sizes.rank), position, axis=2)
        keys = replace_value(keys, layer.round_cache(keys.value, keys.value)[0])
        values = keys[..., : sizes.rank]
    queries = heat(layer, concatenate(plain, turned, axis=2))
    mixed = attention(queries, keys, values, scale=architecture.attention_scale)
    if not layer.has("attn_kv_b"):
        mixed = _heads(layer, "attn_v_b", mixed)
    if layer.has("attn_gate"):
        mixed = _gate(layer, x, mixed)
    return layer.product("attn_output", mixed.reshape(n, -1))


def _heads(layer: Layer, part: str, x: Node) -> Node:
    """Multiply each head of x (n_tokens, n_head, d) by its own matrix."""
    heads = [layer.product(part, x[:, head], head) for head in range(x.shape[1])]
    return concatenate(*(y.reshape(len(y), 1, -1) for y in heads), axis=1)
