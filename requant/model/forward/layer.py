"""One decoder layer over one window of tokens: forward, and backward from the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from requant.model.forward.ops import Array, Backward, attention, gated_activation, rms_norm

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

    def run(self, x: Array) -> tuple[Array, Backward]:
        """Run one window: x (n_tokens, n_embd), the residual stream -> the stream behind the layer."""
        y, back_norm = self._norm("attn_norm", x)
        mixed, back_mixer = self._attention(y)
        mixed, back_post = self._norm("post_attention_norm", mixed)
        middle = x + mixed
        z, back_ffn_norm = self._norm("ffn_norm", middle)
        added, back_ffn = self._experts(z) if "ffn_gate_inp.weight" in self.weights else self._feed_forward(z)
        added, back_post_ffn = self._norm("post_ffw_norm", added)

        def back(g: Array) -> Array:
            g = g + back_ffn_norm(back_ffn(back_post_ffn(g)))
            return g + back_norm(back_mixer(back_post(g)))

        return middle + added, back

    def _norm(self, name: str, x: Array) -> tuple[Array, Backward]:
        """Apply a norm, or return x itself where the layer does not have it."""
        weight = self.weights.get(f"{name}.weight")
        return (x, lambda g: g) if weight is None else rms_norm(x, weight, self.architecture.eps)

    def _product(self, part: str, x: Array, expert: int | None = None) -> tuple[Array, Backward]:
        name = f"{part}.weight"
        weight = self.weights[name] if expert is None else self.weights[name][expert]
        self.hook.inputs(name, expert, x)
        y = x @ weight.T
        bias = self.weights.get(f"{part}.bias")
        if bias is not None:
            y += bias if expert is None else bias[expert]

        def back(g: Array) -> Array:
            self.hook.gradients(name, expert, x, g)
            return g @ weight

        return y, back

    def _attention(self, x: Array) -> tuple[Array, Backward]:
        n, il, hp = len(x), self.index, self.architecture.hp
        d_k, d_v = self.architecture.head_sizes(il)
        (q, k, v), back_qkv = self._qkv(x, hp.n_head[il] * d_k, hp.n_head_kv[il] * d_k)
        q, back_q = self._norm("attn_q_norm", q.reshape(n, -1, d_k))
        k, back_k = self._norm("attn_k_norm", k.reshape(n, -1, d_k))
        keys, values = self.round_cache(self.rotation.apply(k), v.reshape(n, -1, d_v))
        mixed, back_mixed = attention(
            self.rotation.apply(q),
            keys,
            values,
            scale=self.architecture.attention_scale,
            cap=self.architecture.attention_cap,
            window=self.architecture.windows[il],
        )
        out, back_out = self._product("attn_output", mixed.reshape(n, -1))

        def back(g: Array) -> Array:
            g_q, g_k, g_v = back_mixed(back_out(g).reshape(mixed.shape))
            g_q, g_k = back_q(self.rotation.back(g_q)), back_k(self.rotation.back(g_k))
            return back_qkv(g_q.reshape(n, -1), g_k.reshape(n, -1), g_v.reshape(n, -1))

        return out, back

    def _qkv(self, x: Array, n_q: int, n_k: int) -> tuple[tuple[Array, Array, Array], Callable[..., Array]]:
        """Compute queries, keys and values, from one fused matrix or three."""
        if "attn_qkv.weight" in self.weights:
            y, back = self._product("attn_qkv", x)
            q, k, v = np.split(y, [n_q, n_q + n_k], axis=1)
            return (q, k, v), lambda *g: back(np.concatenate(g, axis=1))
        (q, back_q), (k, back_k), (v, back_v) = (self._product(f"attn_{part}", x) for part in "qkv")

        def back_all(g_q: Array, g_k: Array, g_v: Array) -> Array:
            return back_q(g_q) + back_k(g_k) + back_v(g_v)

        return (q, k, v), back_all

    def _feed_forward(self, x: Array, suffix: str = "", expert: int | None = None) -> tuple[Array, Backward]:
        """Apply the gate and up projections, from one fused matrix or two, and the down projection."""
        up, back_up = self._product(f"ffn_up{suffix}", x, expert)
        if fused := f"ffn_gate{suffix}.weight" not in self.weights:
            gate, up = np.split(up, 2, axis=1)
        else:
            gate, back_gate = self._product(f"ffn_gate{suffix}", x, expert)
        inner, back_inner = gated_activation(gate, up, self.architecture.family.activation)
        out, back_down = self._product(f"ffn_down{suffix}", inner, expert)

        def back(g: Array) -> Array:
            g_gate, g_up = back_inner(back_down(g))
            if fused:
                return back_up(np.concatenate((g_gate, g_up), axis=1))
            return back_up(g_up) + back_gate(g_gate)

        return out, back

    def _experts(self, x: Array) -> tuple[Array, Backward]:
        """Apply the experts that the router ranks highest, weighted by its softmax over them."""
        logits, back_router = self._product("ffn_gate_inp", x)
        used = np.argsort(-logits, axis=1, kind="stable")[:, : self.architecture.hp.n_expert_used]
        chosen = np.take_along_axis(logits, used, axis=1)
        shares = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        scale = x.dtype.type(self.architecture.expert_scale)
        out, parts = np.zeros_like(x), []
        for expert in range(logits.shape[1]):
            tokens, slots = np.nonzero(used == expert)
            if tokens.size:
                y, back_y = self._feed_forward(x[tokens], "_exps", expert)
                out[tokens] += y * (scale * shares[tokens, slots])[:, None]
                parts.append((tokens, slots, y, back_y))

        def back(g: Array) -> Array:
            g_x, g_shares = np.zeros_like(x), np.zeros_like(shares)
            for tokens, slots, y, back_y in parts:
                own = g[tokens] * scale
                g_shares[tokens, slots] = (own * y).sum(axis=1)
                g_x[tokens] += back_y(own * shares[tokens, slots][:, None])
            g_chosen = shares * (g_shares - (shares * g_shares).sum(axis=1, keepdims=True))
            g_logits = np.zeros_like(logits)
            np.put_along_axis(g_logits, used, g_chosen, axis=1)
            return g_x + back_router(g_logits)

        return out, back
