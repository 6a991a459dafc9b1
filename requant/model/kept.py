"""Kept tensors: those that an engine reads otherwise than as the matrix of a product, by name.

Sources, at llama.cpp b11434: tensor_allows_quantization in src/llama-quant.cpp; the graphs in src/models, and those of
projectors in tools/mtmd/clip.cpp and tools/mtmd/models, where a tensor is transposed, added, multiplied element by
element, convolved with, or read by rows; tensor_force_quant of the converters in conversion/.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requant.container.metadata import Metadata

# part of the name -> why the tensor keeps its type; llama-quantize keeps these too
_KEEP: dict[str, str] = {
    "_norm.weight": "normalisation weights are applied element by element",
    "ffn_gate_inp.weight": "a router decides which experts run",
    "ffn_gate_tid2eid.weight": "a routing table holds indices",
    "altup": "the alternating-update matrices are tiny",
    "laurel": "the low-rank residual matrices are tiny",
    "per_layer_model_proj": "the per-layer projection is small and sensitive",
    **dict.fromkeys(("ssm_conv1d", "shortconv.conv.weight"), "a short convolution is tiny"),
    **dict.fromkeys(("indexer.k_proj.weight", "indexer.q_proj.weight"), "the indexer's projections are tiny"),
    **dict.fromkeys(("attn_rel_b.weight", ".rel_pos"), "a position bias is tiny"),
    **dict.fromkeys(
        (
            f"time_mix_{part}.weight"
            for part in "first w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2 decay_w1 decay_w2 lerp_fused".split()  # noqa: SIM905
        ),
        "the time-mix matrices are small and sensitive",
    ),
    **dict.fromkeys((".position_embd", "sam.pos_embd"), "a position table is added to the stream"),
    **dict.fromkeys(
        ("sam.neck.", "sam.net_", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
        "the engine reads this multimodal tensor as it is",
    ),
}
_KEEP_EXACTLY = {
    "position_embd.weight": "a position table is added to the stream",
    "token_types.weight": "a token type table is added to the stream",
}
GLM5 = ("glm5-next", "glm5next")  # the engine's spelling, and that of files published before it
_KEEP_IN_ARCH: dict[str, tuple[str, ...]] = dict.fromkeys(
    GLM5,
    (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj"),
        *("indexer_compressor_gate", "indexer_compressor_ape"),
        *("ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight"),
        *("attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    ),
)

# llama-quantize would quantize these, and the engine reads them otherwise than as the matrix of a product
_ENGINE_KEEPS: dict[str, str] = {
    "compressor_ape": "a position table is added to the stream",
    "ple_conv1d": "a short convolution is read by columns",
    "ple_norm_": "normalisation weights are applied element by element",
    **dict.fromkeys(("_conv_base", "hrm.z_l_init", "time_mix_r_k"), "the engine reads it element by element"),
}
_ENGINE_KEEPS_IN_ARCH: dict[str, dict[str, str]] = {
    "wavtokenizer-dec": dict.fromkeys(("conv1d.", "posnet.", ".dw."), "the engine convolves with it"),
    "hy_v4": {"hc_": "the converter keeps the mixing of streams in F32"},
    "minimax-m3": {"indexer.": "the converter keeps the indexer in F32"},
}
# rules of this project alone; a preset has llama-quantize's types there
_SENSITIVE: dict[str, str] = {
    "ffn_gate_inp": "a router decides which experts run",
    **dict.fromkeys(
        ("ssm_alpha", "ssm_beta", "ssm_ba", "ssm_dt"), "the gates of a recurrent state are small and sensitive"
    ),
}

_TOWER = re.compile(r"(v|a|mm|resampler|adapter)\.")
# matrices of products in every graph that has them: layers of an encoder or decoder
_LAYER_PRODUCT = re.compile(
    r"(v|a|a\.gen\.code|a\.gen\.wav\.tfm)\.blk\.[0-9]+\."
    r"(attn_(qkv|q|k|v|out|k_rel)|ffn_(up|down|gate)(_1|_exps)?|linear_pos)\.weight"
)
# matrices of products outside the layers -> the projector types whose graph multiplies with them
_PRODUCTS = {
    r"mm\.0": "mlp qwen2vl_merger qwen2.5vl_merger qwen2.5o qwen3vl_merger exaone4_5 ling3vl mimovl youtuvl phi4 "
    "janus_pro dots_ocr dots3note_v yasa2 muse-glimmer",
    r"mm\.1": "lfm2 kimivl paddleocr kimik25 deepseek4v minimax_m3 pixtral lightonocr janus_pro muse-glimmer",
    r"mm\.2": "mlp qwen2vl_merger qwen2.5vl_merger qwen2.5o qwen3vl_merger exaone4_5 ling3vl mimovl youtuvl phi4 lfm2 "
    "kimivl paddleocr kimik25 deepseek4v minimax_m3 pixtral lightonocr dots_ocr dots3note_v yasa2 muse-glimmer",
    r"mm\.3": "mlp",
    r"mm\.(up|down)": "cogvlm glm4v glm5v minicpmv4_6",
    r"mm\.gate": "cogvlm glm4v glm5v",
    r"mm\.merger\.fc[12]": "minimax_m3",
    r"mm\.input_projection": "gemma4v gemma4uv",  # transposed for gemma3; gemma3nv: the converter forces F16
    r"mm\.model\.fc": "idefics3 step3vl glm4v glm5v llama4 cogvlm hunyuanvl deepseekocr deepseekocr2",
    r"mm\.model\.mlp\.[02]": "ldpv2",
    r"mm\.model\.mlp\.[13]": "ldp internvl nemotron_v2_vl",
    r"mm\.model\.mlp\.[12]": "llama4",
    r"mm\.model\.mb_block\.[12]\.block\.1\.fc[12]": "ldp",
    r"mm\.a\.mlp\.[12]": "ultravox voxtral musicflamingo glma meralion qwen3a mimo_audio parakeet",
    r"mm\.a\.mlp\.[03]": "meralion",
    r"mm\.a\.mlp\.[13]": "lfm2a dots3note_a",
    r"mm\.a\.fc": "qwen2a qwen2.5o",
    r"mm\.a\.input_projection": "gemma4a gemma4ua",
    r"mm\.a\.local_blk\.[0-9]+\.(attn_(q|k|v|out)|ffn_(up|down|gate))": "mimo_audio",
    r"a\.input_projection": "gemma4a granite_speech",
    r"a\.pre_encode\.out": "gemma4a lfm2a parakeet",
    r"a\.enc_ctc_out(_mid)?": "granite_speech",
    r"[av]\.(proj_linear|proj_blk\.[0-9]+\.((self|cross)_attn_(q|k|v|out)|ffn_(up|down)|linear))": "granite_speech "
    "granite4_vision",
    r"v\.deepstack\.[0-9]+\.fc[12]": "qwen3vl_merger",
    r"v\.vit_merger\.(attn_(q|k|v|out)|ds_ffn_(up|down))": "minicpmv4_6",
    r"v\.stage\.[0-9]+\.blk\.[0-9]+\.pw[12]": "yasa2",
    r"v\.sam\.blk\.[0-9]+\.(attn\.(qkv|out)|mlp\.lin[12])": "deepseekocr deepseekocr2",
    r"resampler\.(proj|kv|attn\.(q|k|v|out))": "resampler",
    r"adapter\.linear\.(linear|gate|dense_h_to_4h|dense_4h_to_h)": "adapter",
}
_OF_PROJECTOR = tuple((re.compile(rf"{name}\.weight"), frozenset(types.split())) for name, types in _PRODUCTS.items())
_TYPE_KEYS = ("clip.projector_type", *(f"clip.{part}.projector_type" for part in ("vision", "audio", "gen.audio")))


def is_of_tower(name: str) -> bool:
    """Return whether the tensor belongs to an encoder of images or sound, or connects one to a language model."""
    return _TOWER.match(name) is not None


def projector_types(metadata: Metadata) -> frozenset[str]:
    """Return the projector types that a file states, one per modality; none for a file without projectors."""
    found = (metadata.get(key) for key in _TYPE_KEYS)
    return frozenset(value for value in found if isinstance(value, str))


def reason_in_llama_quantize(arch: str, name: str) -> str | None:
    """Return why llama-quantize keeps the type of a tensor with this name, or None where it quantizes it."""
    if name in _KEEP_EXACTLY:
        return _KEEP_EXACTLY[name]
    if any(part in name for part in _KEEP_IN_ARCH.get(arch, ())):
        return f"{arch} needs it as it is"
    return _first_reason(_KEEP, name)


def reason_in_graph(arch: str, name: str, dims: int, projectors: Collection[str] = ()) -> str | None:
    """Return why the engine's graph needs the tensor as it is, or None where it only multiplies with it.

    A tensor of a tower must be known as the matrix of a product in the graph of one of the `projectors`; with none of
    them known, only the matrices of a tower's layers are.
    """
    if arch != "clip" and not is_of_tower(name):
        return _first_reason(_ENGINE_KEEPS | _ENGINE_KEEPS_IN_ARCH.get(arch, {}), name)
    is_product = _LAYER_PRODUCT.fullmatch(name) or any(
        pattern.fullmatch(name) and not types.isdisjoint(projectors) for pattern, types in _OF_PROJECTOR
    )
    if is_product and dims <= (3 if "_exps" in name else 2):
        return None
    return "how the engine uses it is not known"


def reason_of_this_project(name: str) -> str | None:
    """Return why a tensor that llama-quantize and the engine allow to be quantized keeps its type all the same."""
    return _first_reason(_SENSITIVE, name)


def _first_reason(reasons: dict[str, str], name: str) -> str | None:
    return next((reason for part, reason in reasons.items() if part in name), None)
