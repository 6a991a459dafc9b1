"""One decoder layer over one window, forward, and backward from the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from requant.model.forward.architecture import Architecture
from requant.model.forward.ops import Array, Backward, attention, gated_activation, rms_norm
from requant.model.forward.rope import Rotation


class Hook(Protocol):
    """Who looks on at every matrix product; name: of the tensor in its layer, or in the model for the output."""

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """x: (n_tokens, n_per_row), what the matrix is multiplied with."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """X as for inputs, g: (n_tokens, n_rows), the gradient of the log-likelihood at the product."""


class NullHook:
    """A Watch that does not look."""

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Nothing."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Nothing."""


CacheRounding = Callable[
    [Array, Array], tuple[Array, Array]
]  # keys and values (n_tokens, n_heads, size) as attention has them


def exact_cache(keys: Array, values: Array) -> tuple[Array, Array]:
    """A cache that rounds nothing."""
    return keys, values


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's place, its weights, and what it is run with for windows of one length."""

    architecture: Architecture
    index: int
    weights: Mapping[str, Array]
    rotation: Rotation
    cached: CacheRounding

    def run(self, x: Array, watch: Hook) -> tuple[Array, Backward]:
        """x: (n_tokens, n_embd), the residual stream of a window -> the same behind the layer; safe in threads."""
        return _Run(self, watch).layer(x)


@dataclass(frozen=True, slots=True)
class _Run:
    """A layer at work on one window."""

    of: Layer
    watch: Hook

    def layer(self, x: Array) -> tuple[Array, Backward]:
        y, back_norm = self._norm("attn_norm", x)
        mixed, back_mixer = self._attention(y)
        mixed, back_post = self._norm("post_attention_norm", mixed)
        middle = x + mixed
        z, back_ffn_norm = self._norm("ffn_norm", middle)
        added, back_ffn = self._experts(z) if "ffn_gate_inp.weight" in self.of.weights else self._feed_forward(z)
        added, back_post_ffn = self._norm("post_ffw_norm", added)

        def back(g: Array) -> Array:
            g = g + back_ffn_norm(back_ffn(back_post_ffn(g)))
            return g + back_norm(back_mixer(back_post(g)))

        return middle + added, back

    def _norm(self, name: str, x: Array) -> tuple[Array, Backward]:
        """X behind the norm, or x itself where the layer does not have it."""
        weight = self.of.weights.get(f"{name}.weight")
        return (x, lambda g: g) if weight is None else rms_norm(x, weight, self.of.architecture.eps)

    def _product(self, part: str, x: Array, expert: int | None = None) -> tuple[Array, Backward]:
        name = f"{part}.weight"
        weight = self.of.weights[name] if expert is None else self.of.weights[name][expert]
        self.watch.inputs(name, expert, x)
        y = x @ weight.T
        bias = self.of.weights.get(f"{part}.bias")
        if bias is not None:
            y += bias if expert is None else bias[expert]

        def back(g: Array) -> Array:
            self.watch.gradients(name, expert, x, g)
            return g @ weight

        return y, back

    def _attention(self, x: Array) -> tuple[Array, Backward]:
        n, il, hp = len(x), self.of.index, self.of.architecture.hp
        d_k, d_v = self.of.architecture.head_sizes(il)
        (q, k, v), back_qkv = self._qkv(x, hp.n_head[il] * d_k, hp.n_head_kv[il] * d_k)
        q, back_q = self._norm("attn_q_norm", q.reshape(n, -1, d_k))
        k, back_k = self._norm("attn_k_norm", k.reshape(n, -1, d_k))
        keys, values = self.of.cached(self.of.rotation.apply(k), v.reshape(n, -1, d_v))
        mixed, back_mixed = attention(
            self.of.rotation.apply(q),
            keys,
            values,
            scale=self.of.architecture.attention_scale,
            cap=self.of.architecture.attention_cap,
            window=self.of.architecture.windows[il],
        )
        out, back_out = self._product("attn_output", mixed.reshape(n, -1))

        def back(g: Array) -> Array:
            g_q, g_k, g_v = back_mixed(back_out(g).reshape(mixed.shape))
            g_q, g_k = back_q(self.of.rotation.back(g_q)), back_k(self.of.rotation.back(g_k))
            return back_qkv(g_q.reshape(n, -1), g_k.reshape(n, -1), g_v.reshape(n, -1))

        return out, back

    def _qkv(self, x: Array, n_q: int, n_k: int) -> tuple[tuple[Array, Array, Array], Callable[..., Array]]:
        """Queries, keys and values side by side, from one fused matrix or three."""
        if "attn_qkv.weight" in self.of.weights:
            y, back = self._product("attn_qkv", x)
            q, k, v = np.split(y, [n_q, n_q + n_k], axis=1)
            return (q, k, v), lambda *g: back(np.concatenate(g, axis=1))
        (q, back_q), (k, back_k), (v, back_v) = (self._product(f"attn_{part}", x) for part in "qkv")

        def back_all(g_q: Array, g_k: Array, g_v: Array) -> Array:
            return back_q(g_q) + back_k(g_k) + back_v(g_v)

        return (q, k, v), back_all

    def _feed_forward(self, x: Array, suffix: str = "", expert: int | None = None) -> tuple[Array, Backward]:
        """Gate and up projection, from one fused matrix or two, and down."""
        up, back_up = self._product(f"ffn_up{suffix}", x, expert)
        if fused := f"ffn_gate{suffix}.weight" not in self.of.weights:
            gate, up = np.split(up, 2, axis=1)
        else:
            gate, back_gate = self._product(f"ffn_gate{suffix}", x, expert)
        inner, back_inner = gated_activation(gate, up, self.of.architecture.family.activation)
        out, back_down = self._product(f"ffn_down{suffix}", inner, expert)

        def back(g: Array) -> Array:
            g_gate, g_up = back_inner(back_down(g))
            if fused:
                return back_up(np.concatenate((g_gate, g_up), axis=1))
            return back_up(g_up) + back_gate(g_gate)

        return out, back

    def _experts(self, x: Array) -> tuple[Array, Backward]:
        """The experts that the router likes best, weighted by its softmax over them."""
        logits, back_router = self._product("ffn_gate_inp", x)
        used = np.argsort(-logits, axis=1, kind="stable")[:, : self.of.architecture.hp.n_expert_used]
        chosen = np.take_along_axis(logits, used, axis=1)
        shares = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        scale = x.dtype.type(self.of.architecture.expert_scale)
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
