"""The operations of a decoder layer, each with its derivative.

An operation returns its result and a function from the gradient at the result to those at its inputs. All work in the
dtype of their inputs; arrays are (n_tokens, n) unless said otherwise. Source: ggml/src/ggml-cpu/ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Back = Callable[[Array], Array]

_GELU = math.sqrt(2 / math.pi)


def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Back]:
    """x over its root mean square along the last axis, times weight (n,)."""
    inverse = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    unit = x * inverse

    def back(g: Array) -> Array:
        g = g * weight
        g -= unit * (g * unit).mean(axis=-1, keepdims=True)
        g *= inverse
        return g

    return unit * weight, back


def silu(x: Array) -> tuple[Array, Back]:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))

    def back(g: Array) -> Array:
        slope = 1 - sigmoid
        slope *= x
        slope += 1
        slope *= sigmoid
        slope *= g
        return slope

    return x * sigmoid, back


def gelu(x: Array) -> tuple[Array, Back]:
    """The tanh approximation of x * Phi(x), as ggml has it."""
    square = x * x
    tanh = np.tanh(_GELU * x * (1 + 0.044715 * square))

    def back(g: Array) -> Array:
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _GELU * (1 + 3 * 0.044715 * square)
        return g * slope

    return 0.5 * x * (1 + tanh), back


ACTIVATIONS = {"silu": silu, "gelu": gelu}


def gated(gate: Array, up: Array, activation: str) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """activation(gate) * up; back gives the gradients at gate and up."""
    active, back_active = ACTIVATIONS[activation](gate)
    return active * up, lambda g: (back_active(g * up), g * active)


def soft_cap(x: Array, cap: float) -> tuple[Array, Back]:
    """cap * tanh(x / cap); x itself where the cap is 0."""
    if not cap:
        return x, lambda g: g
    tanh = np.tanh(x / cap)
    return cap * tanh, lambda g: g * (1 - tanh * tanh)


def softmax(x: Array) -> Array:
    """Shares along the last axis; x is overwritten with them."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def attention(
    q: Array, k: Array, v: Array, *, scale: float, cap: float, mask: Array
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Softmax attention of one window.

    q: (n_tokens, n_head, d), k: (n_tokens, n_head_kv, d), v: (n_tokens, n_head_kv, d_v), mask: (n_tokens, n_tokens),
    added to the scores -> (n_tokens, n_head, d_v). Queries of a group share their keys and values.
    """
    n, n_head, _ = q.shape
    n_kv = k.shape[1]
    grouped = _grouped(q, n_kv)
    keys, values = k.swapaxes(0, 1), v.swapaxes(0, 1)  # (n_kv, n_tokens, d)
    scores = grouped @ keys.swapaxes(1, 2)
    scores *= scale
    scores, back_cap = soft_cap(scores, cap)
    scores.reshape(n_head, n, n)[...] += mask
    shares = softmax(scores)
    out = _ungrouped(shares @ values, n, n_head)

    def back(g: Array) -> tuple[Array, Array, Array]:
        g = _grouped(g, n_kv)
        g_values = shares.swapaxes(1, 2) @ g
        g_scores = g @ values.swapaxes(1, 2)
        g_scores -= np.einsum("hij,hij->hi", g_scores, shares)[..., None]
        g_scores *= shares
        g_scores = back_cap(g_scores)
        g_scores *= scale
        g_q = _ungrouped(g_scores @ keys, n, n_head)
        g_k = g_scores.swapaxes(1, 2) @ grouped
        return g_q, g_k.swapaxes(0, 1), g_values.swapaxes(0, 1)

    return out, back


def _grouped(x: Array, n_kv: int) -> Array:
    """(n_tokens, n_head, d) -> (n_kv, heads of the group * n_tokens, d)."""
    n, _, d = x.shape
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(n_kv, -1, d)


def _ungrouped(x: Array, n: int, n_head: int) -> Array:
    return x.reshape(n_head, n, -1).swapaxes(0, 1)


def causal_mask(n: int, window: int, dtype: Any) -> Array:
    """(n, n): 0 where a token may look, -inf where not; window: tokens that it sees at most, 0 for all."""
    distance = np.arange(n)[:, None] - np.arange(n)
    blocked = distance < 0
    if window:
        blocked |= distance >= window
    return np.where(blocked, -np.inf, 0).astype(dtype)
