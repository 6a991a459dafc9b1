"""The operations of a decoder layer, each with its derivative, as primitives of the tape.

All work in the dtype of their inputs; arrays are (n_tokens, n) unless stated otherwise. Source:
ggml/src/ggml-cpu/ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from requant.model.forward.tape import Array, Backward, PartOf, primitive

_QUERIES = 128  # queries per block; the scores of a block with keys after its last query are never computed
_GELU = math.sqrt(2 / math.pi)


@primitive
def rms_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Backward]:
    """Divide x by its root mean square along the last axis, and multiply by weight (n,)."""
    inverse = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    unit = x * inverse

    def back(g: Array) -> Array:
        g = g * weight
        g -= unit * (g * unit).mean(axis=-1, keepdims=True)
        g *= inverse
        return g

    return unit * weight, back


@primitive
def exp(x: Array) -> tuple[Array, Backward]:
    """Return e^x."""
    y = np.exp(x)
    return y, lambda g: g * y


@primitive
def silu(x: Array) -> tuple[Array, Backward]:
    """Return x * sigmoid(x)."""
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


@primitive
def gelu(x: Array) -> tuple[Array, Backward]:
    """Return the tanh approximation of x * Phi(x) that ggml uses."""
    square = x * x
    tanh = np.tanh(_GELU * x * (1 + 0.044715 * square))

    def back(g: Array) -> Array:
        slope: Array = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _GELU * (1 + 3 * 0.044715 * square)
        slope *= g
        return slope

    return 0.5 * x * (1 + tanh), back


ACTIVATIONS = {"silu": silu, "gelu": gelu}


def soft_cap(x: Array, cap: float) -> tuple[Array, Backward]:
    """Return cap * tanh(x / cap), or x itself where the cap is 0, and the derivative; no primitive."""
    if not cap:
        return x, lambda g: g
    tanh = np.tanh(x / cap)
    return cap * tanh, lambda g: g * (1 - tanh * tanh)


def softmax(x: Array) -> Array:
    """Replace x by its softmax along the last axis; no primitive."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x *= 1 / x.sum(axis=-1, keepdims=True)
    return x


@primitive
def linear(
    x: Array, weight: Array, bias: Array | None, on_gradient: Callable[[Array, Array], None]
) -> tuple[Array, Backward]:
    """Multiply x (n, n_per_row) by the rows of weight, add the bias; on_gradient: called with x and the gradient."""
    y = x @ weight.T
    if bias is not None:
        y += bias

    def back(g: Array) -> Array:
        on_gradient(x, g)
        return g @ weight

    return y, back


@primitive
def concatenate(*parts: Array, axis: int) -> tuple[Array, Backward]:
    """Join arrays along an axis."""
    ends = np.cumsum([part.shape[axis] for part in parts])[:-1]
    return np.concatenate(parts, axis=axis), lambda g: tuple(np.split(g, ends, axis=axis))


@primitive
def pick(x: Array, columns: Array) -> tuple[Array, Backward]:
    """Return of each row of x (n, m) its items at columns (n, k), which differ."""
    rows = np.arange(len(x))[:, None]
    return x[rows, columns], lambda g: PartOf((rows, columns), g)


@primitive
def scatter(*parts: Array, rows: Sequence[Array], n: int) -> tuple[Array, Backward]:
    """Return n rows, to which those of each part are added at its `rows`, which differ within the part."""
    out = np.zeros((n, *parts[0].shape[1:]), parts[0].dtype)
    for part, own in zip(parts, rows, strict=True):
        out[own] += part
    return out, lambda g: tuple(g[own] for own in rows)


@primitive
def replace_value(x: Array, value: Array) -> tuple[Array, Backward]:
    """Return `value` in place of x, which it approximates: the gradient passes unchanged."""
    return value, lambda g: g


@primitive
def attention(q: Array, k: Array, v: Array, *, scale: float, cap: float, window: int) -> tuple[Array, Backward]:
    """Compute causal softmax attention within one window of tokens.

    q: (n_tokens, n_head, d), k: (n_tokens, n_head_kv, d), v: (n_tokens, n_head_kv, d_v) -> (n_tokens, n_head, d_v).
    Queries of a group share their keys and values. window: the most tokens that a query attends to, 0 for all.
    """
    n, n_head, _ = q.shape
    queries, keys, values = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (q, k, v))  # (n_head, n_tokens, d)
    out = np.empty((n_head, n, v.shape[2]), q.dtype)
    blocks = []
    for start in range(0, n, _QUERIES):
        rows = slice(start, min(start + _QUERIES, n))
        seen = slice(max(0, start - window + 1) if window else 0, rows.stop)  # by any of these queries
        part = _join_groups(queries[:, rows], len(keys))
        scores = part @ keys[:, seen].swapaxes(1, 2)
        scores *= scale
        scores, back_cap = soft_cap(scores, cap)
        by_head = scores.reshape(n_head, -1, scores.shape[2])
        by_head += _mask(rows, seen, window, q.dtype)
        shares = softmax(scores)
        out[:, rows] = (shares @ values[:, seen]).reshape(n_head, -1, v.shape[2])
        blocks.append((rows, seen, part, shares, back_cap))

    def back(g: Array) -> tuple[Array, Array, Array]:
        g = np.ascontiguousarray(g.swapaxes(0, 1))
        g_q, g_k, g_v = np.empty_like(queries), np.zeros_like(keys), np.zeros_like(values)
        for rows, seen, part, shares, back_cap in blocks:
            g_part = _join_groups(g[:, rows], len(keys))
            g_v[:, seen] += shares.swapaxes(1, 2) @ g_part
            g_scores = g_part @ values[:, seen].swapaxes(1, 2)
            g_scores -= np.einsum("hij,hij->hi", g_scores, shares)[..., None]
            g_scores *= shares
            g_scores = back_cap(g_scores)
            g_scores *= scale
            g_q[:, rows] = (g_scores @ keys[:, seen]).reshape(n_head, -1, q.shape[2])
            g_k[:, seen] += g_scores.swapaxes(1, 2) @ part
        return g_q.swapaxes(0, 1), g_k.swapaxes(0, 1), g_v.swapaxes(0, 1)

    return out.swapaxes(0, 1), back


def _join_groups(x: Array, n_kv: int) -> Array:
    """Join the heads of each group: (n_head, n, d) -> (n_kv, heads of the group * n, d)."""
    return np.ascontiguousarray(x).reshape(n_kv, -1, x.shape[2])


def _mask(rows: slice, seen: slice, window: int, dtype: Any) -> Array:
    """Return 0 where a query of `rows` may attend to a key of `seen`, -inf elsewhere."""
    distance = np.arange(rows.start, rows.stop)[:, None] - np.arange(seen.start, seen.stop)
    blocked = (distance < 0) | ((distance >= window) if window else False)
    mask: Array = np.where(blocked, dtype.type(-np.inf), dtype.type(0))
    return mask
