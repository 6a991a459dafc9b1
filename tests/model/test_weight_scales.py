"""The matrices that the engine multiplies by a weight scale."""

import pytest

from requant.model.weight_scales import applies_weight_scale, scaled_matrix_name, weight_scale_name, weight_scale_shape

LAYER = "blk.3.{}.weight"


@pytest.mark.parametrize(
    ("arch", "part", "applied"),
    [
        ("llama", "attn_q", True),
        ("llama", "ffn_down", True),
        ("llama", "ffn_up_exps", True),
        ("gemma3", "attn_output", True),
        ("gemma3", "ffn_down", False),  # build_ffn gets NULL for it
        ("qwen2", "ffn_gate", False),
        ("qwen3moe", "ffn_gate_exps", True),
        ("qwen3moe", "ffn_gate_inp", False),
        ("qwen3moe", "ffn_gate_up_exps", False),
        ("qwen35moe", "ffn_up_shexp", True),
        ("qwen35moe", "ssm_out", False),
        ("phi3", "attn_qkv", True),
        ("eagle3", "attn_q", False),
        ("bitnet", "attn_q", False),  # its scales are the model's own
        ("deepseek2", "attn_k_b", False),
        ("no-such", "attn_q", False),
    ],
)
def test_only_what_the_graph_passes_on_is_scaled(arch, part, applied):
    assert applies_weight_scale(arch, LAYER.format(part), ()) == applied


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.bias", "blk.0.attn_q", "v.blk.0.attn_q.weight"])
def test_embeddings_biases_and_other_towers_have_no_scale(name):
    assert not applies_weight_scale("llama", name, ())


def test_an_output_has_a_scale_where_it_is_its_own_tensor_and_the_graph_passes_it_on():
    assert applies_weight_scale("llama", "output.weight", ())
    assert not applies_weight_scale("qwen35", "output.weight", ())


def test_a_feed_forward_matrix_with_a_bias_has_no_scale():
    assert not applies_weight_scale("llama", "blk.0.ffn_up.weight", ("blk.0.ffn_up.bias",))
    assert applies_weight_scale("llama", "blk.0.ffn_up.weight", ("blk.1.ffn_up.bias",))
    assert applies_weight_scale("llama", "blk.0.attn_q.weight", ("blk.0.attn_q.bias",))  # added after the scale


def test_experts_have_a_scale_each():
    assert weight_scale_name("blk.0.ffn_up_exps.weight") == "blk.0.ffn_up_exps.scale"
    assert scaled_matrix_name("blk.0.ffn_up_exps.scale") == "blk.0.ffn_up_exps.weight"
    assert weight_scale_shape("blk.0.ffn_up_exps.weight", (64, 32, 8)) == (8,)
    assert weight_scale_shape("blk.0.attn_q.weight", (64, 32)) == (1,)
