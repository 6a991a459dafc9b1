"""Mixers with a state: the gated delta net, Kimi delta attention, Mamba 2 and short convolutions.

A recurrence is computed in chunks of tokens: within a chunk by products of matrices, between chunks by its state, so
that only the states at the starts of chunks are held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from requant.model.forward.ops import (
    causal_convolution,
    concatenate,
    exp,
    l2_norm,
    repeat_heads,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    solve_unit_lower,
)
from requant.model.forward.tape import Array, Node

if TYPE_CHECKING:
    from requant.model.forward.layer import Layer

CHUNK = 64  # tokens
VECTOR_CHUNK = 16  # of a decay per key dimension, whose pairs of tokens need an array for every dimension


def scan(q: Node, k: Node, v: Node, log_decay: Node, *, beta: Node | None = None, chunk: int = 0) -> Node:
    """Return o_t = S_t^T q_t of a decaying state S (d, d_v), (n_head, n_tokens, d_v).

    S_t = a_t S_{t-1} + k_t v_t^T, or with `beta` the delta rule, which writes beta_t (v_t - a_t S_{t-1}^T k_t) in place
    of v_t. q, k: (n_head, n_tokens, d); v: (n_head, n_tokens, d_v); beta: (n_head, n_tokens, 1); log_decay, the
    logarithm of a: (n_head, n_tokens, 1), or d for one decay per row of the state. chunk: 0 for the usual length.
    Source: the chunked form of src/models/delta-net-base.cpp of llama.cpp.
    """
    single = log_decay.shape[2] == 1
    chunk = chunk or (CHUNK if single else VECTOR_CHUNK)
    parts: list[Node] = []
    state: Node | None = None
    for start in range(0, q.shape[1], chunk):
        at = np.s_[:, start : start + chunk]
        qc, kc, written = q[at], k[at], v[at]
        n = qc.shape[1]
        low = np.tril(np.ones((n, n), q.dtype))
        total = low @ log_decay[at]
        pairs = _pairs_with_decay(total, low)
        grown = exp(total)
        if beta is not None:
            wanted = written if state is None else written - (kc * grown) @ state
            rows = pairs(kc, kc) * (low - np.eye(n, dtype=q.dtype)) * beta[at]
            written = solve_unit_lower(rows + np.eye(n, dtype=q.dtype), wanted * beta[at])
        out = pairs(qc, kc) @ written
        parts.append(out if state is None else out + (qc * grown) @ state)
        end = total[:, -1:]
        added = (kc * exp(end - total)).swap(1, 2) @ written
        state = added if state is None else state * exp(end).swap(1, 2) + added
    return concatenate(*parts, axis=1)


def _pairs_with_decay(total: Node, low: Array) -> Callable[[Node, Node], Node]:
    """Return the function to the products of rows i and j <= i of two arrays, decayed from step j to i, 0 for others.

    total: sums of the logarithms of decays, (n_head, n, 1 or d). Steps that are not past are masked before exp, which
    would overflow.
    """
    n_head, n, d = total.shape
    if d == 1:
        decay = exp((total - total.swap(1, 2)) * low) * low
        return lambda a, b: a @ b.swap(1, 2) * decay
    mask = low[:, :, None]
    decays = exp((total.reshape(n_head, n, 1, d) - total.reshape(n_head, 1, n, d)) * mask) * mask
    return lambda a, b: (a.reshape(n_head, n, 1, d) * decays * b.reshape(n_head, 1, n, d)).sum(3).reshape(n_head, n, n)


def mix_by_delta_net(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by a gated delta net."""
    sizes, n, eps = layer.architecture.hp.recurrence, len(x), layer.architecture.eps
    d, n_keys, n_values = sizes.n_state, sizes.n_groups, sizes.n_heads
    width = n_keys * d
    mixed = silu(_convolve(layer, layer.product("attn_qkv", x)))
    interleaved = layer.architecture.family.interleaved_heads
    q, k = (
        repeat_heads(l2_norm(part.reshape(n, n_keys, d), eps).swap(0, 1), n_values // n_keys, tiled=not interleaved)
        for part in (mixed[:, :width], mixed[:, width : 2 * width])
    )
    v = mixed[:, 2 * width :].reshape(n, n_values, d).swap(0, 1)
    if layer.has("ssm_ba"):
        each = n_values // n_keys
        both = layer.product("ssm_ba", x).reshape(n, n_keys, 2 * each)
        beta, alpha = both[..., :each].reshape(n, n_values), both[..., each:].reshape(n, n_values)
    else:
        beta, alpha = layer.product("ssm_beta", x), layer.product("ssm_alpha", x)
    log_decay = softplus(alpha + layer.weights["ssm_dt.bias"]) * layer.weights["ssm_a"]
    out = scan(q * d**-0.5, k, v, _by_head(log_decay), beta=_by_head(sigmoid(beta))).swap(0, 1)
    gate = layer.product("attn_gate", x).reshape(n, n_values, d)
    return layer.product("ssm_out", (layer.norm("ssm_norm", out) * silu(gate)).reshape(n, n_values * d))


def mix_by_kda(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by Kimi delta attention, whose state has a decay per row."""
    sizes, n, eps = layer.architecture.hp.recurrence, len(x), layer.architecture.eps
    d = sizes.n_state
    q, k, v = (
        silu(causal_convolution(layer.product(f"attn_{part}", x), _kernel(layer, f"ssm_conv1d_{part}"), None))
        .reshape(n, -1, d)
        .swap(0, 1)
        for part in "qkv"
    )
    n_head = len(q)
    rates = _low_rank(layer, "ssm_f", x) + layer.weights["ssm_dt.bias"]
    factor = layer.weights["ssm_a"].reshape(1, n_head, 1)
    rates = rates.reshape(n, n_head, d)
    least = layer.architecture.least_decay
    log_decay = sigmoid(rates * factor) * least if least else softplus(rates) * factor
    beta = sigmoid(layer.product("ssm_beta", x))
    out = scan(l2_norm(q, eps) * d**-0.5, l2_norm(k, eps), v, log_decay.swap(0, 1), beta=_by_head(beta)).swap(0, 1)
    gate = sigmoid(_low_rank(layer, "ssm_g", x)).reshape(n, n_head, d)
    return layer.product("attn_output", (layer.norm("ssm_norm", out) * gate).reshape(n, n_head * d))


def _low_rank(layer: Layer, part: str, x: Node) -> Node:
    """Apply the matrix `part`_a, and `part`_b where the layer has it."""
    y = layer.product(f"{part}_a", x)
    return layer.product(f"{part}_b", y) if layer.has(f"{part}_b") else y


def _kernel(layer: Layer, part: str) -> Array:
    """Return the weights of a convolution, (n_columns, n_taps)."""
    kernel = layer.weights[f"{part}.weight"]
    return kernel.reshape(-1, kernel.shape[-1])


def mix_by_mamba(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by Mamba 2."""
    sizes, n = layer.architecture.hp.recurrence, len(x)
    inner, groups = sizes.n_inner, sizes.n_groups * sizes.n_state
    y = layer.product("ssm_in", x)
    z, dt = y[:, :inner], y[:, 2 * inner + 2 * groups :]
    mixed = silu(_convolve(layer, y[:, inner : 2 * inner + 2 * groups]))
    values = mixed[:, :inner].reshape(n, sizes.n_heads, -1).swap(0, 1)
    k, q = (
        repeat_heads(
            part.reshape(n, sizes.n_groups, sizes.n_state).swap(0, 1), sizes.n_heads // sizes.n_groups, tiled=False
        )
        for part in (mixed[:, inner : inner + groups], mixed[:, inner + groups :])
    )
    dt = softplus(dt + layer.weights["ssm_dt.bias"])
    log_decay = dt * layer.weights["ssm_a"].reshape(-1)
    out = scan(q, k, values * _by_head(dt), _by_head(log_decay))
    out = out + values * layer.weights["ssm_d"].reshape(-1, 1, 1)
    out = out.swap(0, 1).reshape(n, inner) * silu(z)
    norm = layer.weights.get("ssm_norm.weight")
    if norm is not None:  # of each group
        out = rms_norm(out.reshape(n, *norm.shape), norm, layer.architecture.eps).reshape(n, inner)
    return layer.product("ssm_out", out)


def mix_by_short_convolution(layer: Layer, x: Node) -> Node:
    """Mix the tokens of x (n_tokens, n_embd) by a gated convolution over a few of them."""
    y, width = layer.product("shortconv.in_proj", x), x.shape[1]
    before, after, inner = y[:, :width], y[:, width : 2 * width], y[:, 2 * width :]
    mixed = causal_convolution(before * inner, _kernel(layer, "shortconv.conv"), None)
    return layer.product("shortconv.out_proj", after * mixed)


def _convolve(layer: Layer, x: Node) -> Node:
    return causal_convolution(x, _kernel(layer, "ssm_conv1d"), layer.weights.get("ssm_conv1d.bias"))


def _by_head(x: Node) -> Node:
    """Return one number per token and head (n_tokens, n_head) as (n_head, n_tokens, 1)."""
    return x.swap(0, 1).reshape(x.shape[1], x.shape[0], 1)
