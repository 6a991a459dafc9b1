"""The operations of a decoder layer, each with its derivative, as primitives of the tape.

All work in the dtype of their inputs; arrays are (n_tokens, n) unless stated otherwise. Source:
ggml/src/ggml-cpu/ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from requant.model.forward.tape import Array, Backward, Node, PartOf, primitive

_QUERIES = 128  # queries per block; the scores of a block with keys after its last query are never computed
_GELU = math.sqrt(2 / math.pi)


@primitive
def rms_norm(x: Array, weight: Array | float, eps: float) -> tuple[Array, Backward]:
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
def layer_norm(x: Array, weight: Array, eps: float) -> tuple[Array, Backward]:
    """Subtract the mean of x along the last axis, divide by the standard deviation, and multiply by weight (n,)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    unit = centred * inverse

    def back(g: Array) -> Array:
        g = g * weight
        g -= unit * (g * unit).mean(axis=-1, keepdims=True)
        g -= g.mean(axis=-1, keepdims=True)
        g *= inverse
        return g

    return unit * weight, back


@primitive
def l2_norm(x: Array, eps: float) -> tuple[Array, Backward]:
    """Divide x by its Euclidean length along the last axis."""
    inverse = 1 / np.sqrt((x * x).sum(axis=-1, keepdims=True) + x.dtype.type(eps))
    unit = x * inverse
    return unit, lambda g: inverse * (g - unit * (g * unit).sum(axis=-1, keepdims=True))


@primitive
def exp(x: Array) -> tuple[Array, Backward]:
    """Return e^x."""
    y = np.exp(x)
    return y, lambda g: g * y


@primitive
def sigmoid(x: Array) -> tuple[Array, Backward]:
    """Return 1 / (1 + e^-x)."""
    with np.errstate(over="ignore"):
        y = 1 / (1 + np.exp(-x))
    return y, lambda g: g * y * (1 - y)


@primitive
def softplus(x: Array) -> tuple[Array, Backward]:
    """Return ln(1 + e^x)."""
    with np.errstate(over="ignore"):
        slope = 1 / (1 + np.exp(-x))
    return np.logaddexp(x.dtype.type(0), x), lambda g: g * slope


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


@primitive
def clamp(x: Array, *, low: float = -math.inf, high: float) -> tuple[Array, Backward]:
    """Return x within low and high, beyond which it has no slope."""
    return np.clip(x, low, high), lambda g: g * ((x > low) & (x < high))


@primitive
def relu_squared(x: Array) -> tuple[Array, Backward]:
    """Return max(x, 0)^2."""
    positive = np.maximum(x, 0)
    return positive * positive, lambda g: 2 * g * positive


_OAI_LIMIT, _OAI_ALPHA = 7.0, 1.702


@primitive
def swiglu_oai(gate: Array, up: Array) -> tuple[Array, Backward]:
    """Return gate' * sigmoid(1.702 gate') * (up' + 1); the gate is clamped above at 7, up at both sides."""
    low, high = np.minimum(gate, _OAI_LIMIT), np.clip(up, -_OAI_LIMIT, _OAI_LIMIT)
    share = 1 / (1 + np.exp(-_OAI_ALPHA * low))

    def back(g: Array) -> tuple[Array, Array]:
        slope = share * (1 + _OAI_ALPHA * low * (1 - share)) * (high + 1)
        return g * slope * (gate < _OAI_LIMIT), g * low * share * (np.abs(up) < _OAI_LIMIT)

    return low * share * (high + 1), back


def softmax(x: Node) -> Node:
    """Return the softmax of x along the last axis."""
    y = exp(x - x.value.max(axis=-1, keepdims=True))
    return y / y.sum(-1)


GATED: Mapping[str, Callable[[Node, Node], Node]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "swiglu_oai": swiglu_oai,
}


def soft_cap(x: Array, cap: float) -> tuple[Array, Backward]:
    """Return cap * tanh(x / cap), or x itself where the cap is 0, and the derivative; no primitive."""
    if not cap:
        return x, lambda g: g
    tanh = np.tanh(x / cap)
    return cap * tanh, lambda g: g * (1 - tanh * tanh)


def _softmax(x: Array) -> Array:
    """Replace x by its softmax along the last axis."""
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
def attention(
    q: Array, k: Array, v: Array, *, scale: float, cap: float = 0.0, window: int = 0, sinks: Array | None = None
) -> tuple[Array, Backward]:
    """Compute causal softmax attention within one window of tokens.

    q: (n_tokens, n_head, d), k: (n_tokens, n_head_kv, d), v: (n_tokens, n_head_kv, d_v) -> (n_tokens, n_head, d_v).
    Queries of a group share their keys and values. window: the most tokens that a query attends to, 0 for all. sinks:
    (n_head,), the score of a key per head whose value is zero.
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
        shares = _softmax(scores) if sinks is None else _softmax_with(scores, sinks)
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


def _softmax_with(scores: Array, sinks: Array) -> Array:
    """Return the shares of the keys in scores (n_kv, heads of the group * n, n_keys), with one more key per head."""
    last = np.repeat(sinks.astype(scores.dtype), scores.shape[0] * scores.shape[1] // len(sinks))
    joined = np.concatenate((scores, last.reshape(*scores.shape[:2], 1)), axis=-1)
    return _softmax(joined)[..., :-1]


def _join_groups(x: Array, n_kv: int) -> Array:
    """Join the heads of each group: (n_head, n, d) -> (n_kv, heads of the group * n, d)."""
    return np.ascontiguousarray(x).reshape(n_kv, -1, x.shape[2])


def _mask(rows: slice, seen: slice, window: int, dtype: Any) -> Array:
    """Return 0 where a query of `rows` may attend to a key of `seen`, -inf elsewhere."""
    distance = np.arange(rows.start, rows.stop)[:, None] - np.arange(seen.start, seen.stop)
    blocked = (distance < 0) | ((distance >= window) if window else False)
    mask: Array = np.where(blocked, dtype.type(-np.inf), dtype.type(0))
    return mask


@primitive
def causal_convolution(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, Backward]:
    """Convolve each column of x (n, m) with its row of kernel (m, k), whose last item meets the current token."""
    n, k = len(x), kernel.shape[1]
    padded = np.concatenate((np.zeros((k - 1, x.shape[1]), x.dtype), x))
    y = padded[:n] * kernel[:, 0]
    for j in range(1, k):
        y += padded[j : j + n] * kernel[:, j]
    if bias is not None:
        y += bias

    def back(g: Array) -> Array:
        out = np.zeros_like(padded)
        for j in range(k):
            out[j : j + n] += g * kernel[:, j]
        return out[k - 1 :]

    return y, back


@primitive
def repeat_heads(x: Array, n: int, *, tiled: bool) -> tuple[Array, Backward]:
    """Repeat each head of x (n_head, ..) n times in a row, or with `tiled` all heads n times."""
    m, rest = len(x), x.shape[1:]
    axis = 0 if tiled else 1
    y = np.repeat(np.expand_dims(x, axis), n, axis=axis).reshape(m * n, *rest)
    shape = (n, m, *rest) if tiled else (m, n, *rest)
    return y, lambda g: g.reshape(shape).sum(axis=axis)


@primitive
def solve_unit_lower(a: Array, b: Array) -> tuple[Array, Backward]:
    """Return x with a @ x = b; a (.., n, n): lower triangular with ones on the diagonal, b (.., n, m)."""
    inverse = _invert_unit_lower(a)
    x = inverse @ b

    def back(g: Array) -> tuple[Array, Array]:
        g_b = inverse.swapaxes(-1, -2) @ g
        return -g_b @ x.swapaxes(-1, -2), g_b

    return x, back


def _invert_unit_lower(a: Array) -> Array:
    """Return the inverse of a lower triangular a (.., n, n) with ones on the diagonal, by halves."""
    n = a.shape[-1]
    if n == 1:
        return np.ones_like(a)
    h = n // 2
    out = np.zeros_like(a)
    out[..., :h, :h] = first = _invert_unit_lower(a[..., :h, :h])
    out[..., h:, h:] = last = _invert_unit_lower(a[..., h:, h:])
    out[..., h:, :h] = -last @ (a[..., h:, :h] @ first)
    return out
