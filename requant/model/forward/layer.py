"""One decoder layer over one window of tokens, written forward only: the tape gives the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from requant.model.forward.ops import (
    ACTIVATIONS,
    attention,
    exp,
    linear,
    pick,
    replace_value,
    rms_norm,
    scatter,
)
from requant.model.forward.tape import Array, Node

if TYPE_CHECKING:
    from requant.model.forward.architecture import Architecture
    from requant.model.forward.rope import Rotation


class Hook(Protocol):
    """An observer of every matrix product.

    name: of the tensor within its layer, or within the model for the output; expert: its index, None for other
    matrices.
    """

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Observe the inputs of a product, x: (n_tokens, n_per_row)."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Observe the gradient of the log-likelihood at the product, g: (n_tokens, n_rows), with the inputs x."""


class NullHook:
    """A hook that does nothing."""

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Ignore the product."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Ignore the gradient."""


NULL_HOOK: Hook = NullHook()

# keys and values (n_tokens, n_heads, size) -> the same as the cache holds them
CacheRounding = Callable[[Array, Array], tuple[Array, Array]]


def exact_cache(keys: Array, values: Array) -> tuple[Array, Array]:
    """Return the keys and values as they are: a cache that rounds nothing."""
    return keys, values


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with its weights, its rotation for windows of one length, and the hook of a window."""

    architecture: Architecture
    index: int
    weights: Mapping[str, Array]
    rotation: Rotation
    round_cache: CacheRounding
    hook: Hook = NULL_HOOK

    def run(self, x: Node) -> Node:
        """Run one window: x (n_tokens, n_embd), the residual stream -> the stream behind the layer."""
        x = x + self._norm("post_attention_norm", self._attention(self._norm("attn_norm", x)))
        z = self._norm("ffn_norm", x)
        added = self._experts(z) if "ffn_gate_inp.weight" in self.weights else self._feed_forward(z)
        return x + self._norm("post_ffw_norm", added)

    def _norm(self, name: str, x: Node) -> Node:
        """Apply a norm, or return x itself where the layer does not have it."""
        weight = self.weights.get(f"{name}.weight")
        return x if weight is None else rms_norm(x, weight, self.architecture.eps)

    def _product(self, part: str, x: Node, expert: int | None = None) -> Node:
        name = f"{part}.weight"
        weight, bias = self.weights[name], self.weights.get(f"{part}.bias")
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
        self.hook.inputs(name, expert, x.value)
        return linear(x, weight, bias, partial(self.hook.gradients, name, expert))

    def _attention(self, x: Node) -> Node:
        n, il, hp = len(x), self.index, self.architecture.hp
        d_k, d_v = self.architecture.head_sizes(il)
        q, k, v = self._qkv(x, hp.n_head[il] * d_k, hp.n_head_kv[il] * d_k)
        k = self.rotation.apply(self._norm("attn_k_norm", k.reshape(n, -1, d_k)))
        q = self.rotation.apply(self._norm("attn_q_norm", q.reshape(n, -1, d_k)))
        v = v.reshape(n, -1, d_v)
        held = self.round_cache(k.value, v.value)
        mixed = attention(
            q,
            replace_value(k, held[0]),
            replace_value(v, held[1]),
            scale=self.architecture.attention_scale,
            cap=self.architecture.attention_cap,
            window=self.architecture.windows[il],
        )
        return self._product("attn_output", mixed.reshape(n, -1))

    def _qkv(self, x: Node, n_q: int, n_k: int) -> tuple[Node, Node, Node]:
        """Compute queries, keys and values, from one fused matrix or three."""
        if "attn_qkv.weight" in self.weights:
            y = self._product("attn_qkv", x)
            return y[:, :n_q], y[:, n_q : n_q + n_k], y[:, n_q + n_k :]
        v, k, q = (self._product(f"attn_{part}", x) for part in "vkq")
        return q, k, v

    def _feed_forward(self, x: Node, suffix: str = "", expert: int | None = None) -> Node:
        """Apply the gate and up projections, from one fused matrix or two, and the down projection."""
        up = self._product(f"ffn_up{suffix}", x, expert)
        if f"ffn_gate{suffix}.weight" in self.weights:
            gate = self._product(f"ffn_gate{suffix}", x, expert)
        else:
            n = up.shape[1] // 2
            gate, up = up[:, :n], up[:, n:]
        inner = ACTIVATIONS[self.architecture.family.activation](gate) * up
        return self._product(f"ffn_down{suffix}", inner, expert)

    def _experts(self, x: Node) -> Node:
        """Apply the experts that the router ranks highest, weighted by its softmax over them."""
        logits = self._product("ffn_gate_inp", x)
        used = np.argsort(-logits.value, axis=1, kind="stable")[:, : self.architecture.hp.n_expert_used]
        chosen = pick(logits, used)
        shares = exp(chosen - chosen.value.max(axis=1, keepdims=True))
        shares = shares / shares.sum(1) * self.architecture.expert_scale
        parts, rows = [], []
        for expert in range(logits.shape[1]):
            tokens, slots = np.nonzero(used == expert)
            if tokens.size:
                y = self._feed_forward(x[tokens], "_exps", expert)
                parts.append(y * shares[tokens, slots].reshape(-1, 1))
                rows.append(tokens)
        return scatter(*parts, rows=rows, n=len(x))
