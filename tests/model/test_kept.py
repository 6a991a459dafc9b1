"""Tensors that an engine reads otherwise than as the matrix of a product keep their types, by the engine's graphs."""

import pytest

from requant.model.roles import has_mixture_type, never_quantize

F16 = 1
# (projector type, tensor, shape, whether the graph only multiplies with it): tools/mtmd/models of llama.cpp b11434
GRAPHS = [
    ("gemma3", "mm.input_projection.weight", (2560, 1152), False),  # transposed and copied
    ("gemma4v", "mm.input_projection.weight", (1152, 2560), True),
    ("gemma3nv", "mm.input_projection.weight", (2048, 2048), False),  # the converter forces F16
    ("gemma3nv", "v.blk.1.0.pw_exp.conv.weight", (1, 1, 256, 512), False),  # mobilenet convolves
    ("gemma3nv", "v.blk.2.1.attn.query.proj.weight", (1, 1, 256, 512), False),
    ("mlp", "mm.0.weight", (1024, 4096), True),
    ("mlp", "mm.2.weight", (4096, 4096), True),
    ("step3vl", "mm.0.weight", (3, 3, 256, 512), False),  # a convolution
    ("step3vl", "mm.model.fc.weight", (1024, 4096), True),
    ("hunyuanvl", "mm.2.weight", (1, 1, 1024, 4096), False),
    ("ldp", "mm.model.mb_block.1.block.0.0.weight", (3, 3, 1, 2048), False),
    ("ldp", "mm.model.mb_block.1.block.1.fc1.weight", (2048, 512), True),
    ("ldpv2", "mm.model.peg.0.weight", (3, 3, 1, 2048), False),
    ("internvl", "mm.model.mlp.3.weight", (2048, 4096), True),
    ("resampler", "resampler.query", (4096, 64), False),
    ("resampler", "resampler.pos_embed_k", (4096, 4900), False),
    ("resampler", "resampler.attn.q.weight", (4096, 4096), True),
    ("adapter", "adapter.conv.weight", (2, 2, 1024, 1024), False),
    ("adapter", "adapter.linear.gate.weight", (1024, 4096), True),
    ("pixtral", "mm.patch_merger.weight", (4096, 1024), False),
    ("pixtral", "v.token_embd.img_break", (5120, 1), False),
    ("qwen3vl_merger", "v.deepstack.5.fc1.weight", (4096, 4096), True),
    ("minicpmv4_6", "v.vit_merger.ds_ffn_up.weight", (4608, 4608), True),
    ("deepseekocr", "v.sam.pos_embd.weight", (768, 64, 64), False),
    ("deepseekocr", "v.sam.blk.3.attn.qkv.weight", (768, 2304), True),
    ("deepseekocr", "v.sam.blk.3.attn.pos_h.weight", (64, 127), False),
    ("deepseekocr2", "v.resample_query_1024.weight", (896, 256), False),
    ("llama4", "v.class_embd", (1408, 1), False),
    ("llama4", "v.patch_embd.weight", (588, 1408), False),
    ("yasa2", "v.stage.0.blk.1.dw.weight", (7, 7, 1, 128), False),
    ("yasa2", "v.stage.0.blk.1.pw1.weight", (128, 512), True),
    ("yasa2", "v.vision_pos_embed", (1024, 64), False),
    ("ultravox", "a.conv1d.1.weight", (3, 128, 1280), False),
    ("ultravox", "a.position_embd.weight", (1280, 1500), False),
    ("ultravox", "mm.a.mlp.1.weight", (10240, 4096), True),
    ("ultravox", "a.blk.7.ffn_up.weight", (1280, 5120), True),
    ("qwen2a", "mm.a.fc.weight", (1280, 4096), True),
    ("qwen2.5o", "mm.a.fc.weight", (1280, 4096), True),
    ("qwen3a", "a.conv2d.2.weight", (3, 3, 480, 480), False),
    ("qwen3a", "a.conv_out.weight", (7680, 1280), False),  # the converter forces F16
    ("lfm2a", "a.blk.0.conv_dw.weight", (9, 512), False),
    ("lfm2a", "a.blk.0.conv_pw1.weight", (512, 1024), False),  # the converter forces F32
    ("lfm2a", "a.blk.0.pos_bias_u", (64, 8), False),
    ("lfm2a", "a.blk.0.linear_pos.weight", (512, 512), True),
    ("gemma4a", "a.blk.0.attn_k_rel.weight", (1024, 1024), True),
    ("granite_speech", "a.blk.0.attn_rel_pos_emb", (128, 1025), False),
    ("granite_speech", "a.proj_query", (1024, 3), False),
    ("granite_speech", "a.proj_blk.1.cross_attn_k.weight", (1024, 1024), True),
    ("granite4_vision", "v.proj_blk.0.img_pos", (1152, 64), False),
    ("mimo_audio", "a.rvq.codebook.weight", (1280, 1024, 20), False),
    ("mimo_audio", "a.downsample.conv.weight", (2, 1280, 1280), False),
    ("mimo_audio", "mm.a.local_blk.2.ffn_down.weight", (4096, 1024), True),
    ("dots3note_v", "v.blk.9.ffn_up_exps.weight", (1536, 768, 16), True),
    ("dots3note_v", "v.blk.9.ffn_gate_inp.weight", (1536, 16), False),
    ("qwen3tts_gen", "a.gen.code.embd.weight", (1024, 2048, 15), False),
    ("qwen3tts_gen", "a.gen.wav.pre_conv.weight", (3, 512, 1024), False),
    ("qwen3tts_gen", "a.gen.code.blk.0.attn_q.weight", (1024, 2048), True),
    ("pockettts_gen", "a.gen.flow.blk.0.up.weight", (512, 512), False),  # of speech, and tiny
]


@pytest.mark.parametrize(("projector", "name", "shape", "product"), GRAPHS)
def test_a_projector_keeps_what_its_graph_does_not_multiply_with(projector, name, shape, product):
    reason = never_quantize("clip", name, shape, F16, projectors={projector})
    assert (reason is None) == product, reason


def test_of_an_unknown_projector_only_the_matrices_of_its_layers_are_quantized():
    def is_free(name, projectors=("of-tomorrow",)):
        return never_quantize("clip", name, (1024, 4096), F16, projectors=projectors) is None

    assert is_free("v.blk.0.attn_q.weight") and is_free("a.blk.11.ffn_down.weight")
    assert not is_free("mm.0.weight") and not is_free("mm.input_projection.weight") and not is_free("v.anything.weight")
    assert is_free("mm.0.weight", ("gemma3", "mlp")), "a file states a type for each modality"
    assert not is_free("mm.0.weight", ()) and not is_free("t.blk.0.attn_q.weight") and not is_free("other.weight")


@pytest.mark.parametrize(
    ("arch", "name", "shape"),
    [
        ("wavtokenizer-dec", "posnet.2.attn_q.weight", (1, 768, 768)),
        ("wavtokenizer-dec", "conv1d.weight", (7, 512, 768)),
        ("wavtokenizer-dec", "convnext.3.dw.weight", (7, 1, 768)),
        ("deepseek4", "blk.3.attn_compressor_ape.weight", (512, 256)),
        ("qwen4exp", "blk.3.ple_conv1d.weight", (4, 8192)),
        ("qwen4exp", "blk.3.ple_norm_key.weight", (2048, 4)),
        ("minimax-m3", "blk.3.indexer.attn_k.weight", (4096, 128)),
        ("hy_v4", "blk.3.hc_attn_fn.weight", (16384, 24)),
    ],
)
def test_a_language_model_keeps_what_its_graph_does_not_multiply_with(arch, name, shape):
    assert never_quantize(arch, name, shape, F16) is not None
    assert not has_mixture_type(arch, name, shape, F16)


def test_a_decoder_of_speech_is_quantized_where_it_multiplies():
    assert never_quantize("wavtokenizer-dec", "convnext.3.pw1.weight", (768, 2304), F16) is None


@pytest.mark.parametrize("part", ["ssm_alpha", "ssm_beta", "ssm_ba"])
def test_rules_of_this_project_alone_are_none_of_a_mixture(part):
    name, shape = f"blk.0.{part}.weight", (2048, 64)
    assert never_quantize("qwen3next", name, shape, F16) is not None
    assert has_mixture_type("qwen3next", name, shape, F16)
