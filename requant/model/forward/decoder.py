"""One decoder layer composed of its parts: a mixer of tokens and a feed-forward part, told by the layer's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from requant.model.forward.attention import attend, attend_to_latent
from requant.model.forward.feed_forward import apply_pair, feed
from requant.model.forward.ops import gelu
from requant.model.forward.recurrence import mix_by_delta_net, mix_by_kda, mix_by_mamba, mix_by_short_convolution

if TYPE_CHECKING:
    from requant.model.forward.layer import Layer
    from requant.model.forward.tape import Node


def run_layer(layer: Layer, x: Node) -> Node:
    """Run one window: x (n_tokens, n_embd), the residual stream -> the stream behind the layer."""
    normed = layer.norm("attn_norm", x)
    mixed = _mix(layer, normed)
    if mixed is None:  # a layer of a feed-forward part alone
        return layer.add(x, feed(layer, normed))
    if not (layer.has("ffn_up") or layer.has("ffn_gate_inp")):
        return layer.add(x, mixed)
    if layer.architecture.family.parallel:
        return layer.add(x, mixed + feed(layer, normed))
    # without a norm of its own, the feed-forward part reads what the norm behind attention gives
    before = "ffn_norm" if layer.has("ffn_norm") or not layer.has("attn_norm") else "post_attention_norm"
    if before != "post_attention_norm":
        mixed = layer.norm("post_attention_norm", mixed)
    x = layer.add(x, mixed)
    added = apply_pair(layer, x) if layer.has("pre_ffw_norm_2") else feed(layer, layer.norm(before, x))
    x = layer.add(x, layer.norm("post_ffw_norm", added))
    if layer.has("inp_gate"):
        assert layer.side is not None
        inner = gelu(layer.product("inp_gate", x)) * layer.side.side_embedding()
        x = x + layer.norm("post_norm", layer.product("proj", inner))
    last = layer.weights.get("layer_output_scale.weight")
    return x if last is None else x * last


def _mix(layer: Layer, x: Node) -> Node | None:
    """Mix the tokens of x; None where the layer has no mixer."""
    if layer.has("attn_kv_a_mqa"):
        return attend_to_latent(layer, x)
    if layer.has("ssm_alpha") or layer.has("ssm_ba"):
        return mix_by_delta_net(layer, x)
    if layer.has("ssm_f_a"):
        return mix_by_kda(layer, x)
    if layer.has("shortconv.in_proj"):
        return mix_by_short_convolution(layer, x)
    attended = attend(layer, x) if layer.has("attn_output") else None
    if not layer.has("ssm_in"):
        return attended
    mixed = mix_by_mamba(layer, x)
    return mixed if attended is None else attended + mixed
