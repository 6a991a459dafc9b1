"""Keys and tensors that llama.cpp reads for some architectures only: they matter here exactly where they do there."""

import re

import engine_logits
import numpy as np
import pytest
from model.forward.architectures import HEAD, MAKERS
from model.forward.test_architectures import N_TOKENS, TOLERANCE, own_log_probabilities

from requant.errors import BadInput

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
GROUPS = {"expert_group_count": 4, "expert_group_used_count": 1}
TEMPERATURE = {"attention.temperature_scale": 0.2, "attention.temperature_length": 16}
SCALARS = {
    "expert_weights_scale": 2.0,
    "attention.scale": 0.3,
    "logit_scale": 0.3,
    "embedding_scale": 3.0,
    "residual_scale": 0.4,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "swiglu_clamp_exp": 0.3,
    "swiglu_clamp_shexp": 0.3,
    "rope.freq_base_swa": 30.0,
    "rope.scaling.alpha": 1000.0,
    "kda.gate_lower_bound": -2.0,
}
YARN_SCALARS = {
    "rope.scaling.attn_factor": 1.3,
    "rope.scaling.yarn_beta_fast": 8.0,
    "rope.scaling.yarn_beta_slow": 3.0,
    "rope.scaling.yarn_log_multiplier": 0.07,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 1.3,
}
FACTORS = ("rope_freqs",)
LONG_FACTORS = ("rope_factors_long", "rope_factors_short")
ALL = {
    "every scalar": SCALARS | TEMPERATURE | YARN | YARN_SCALARS,
    "linear": LINEAR | {"rope.scaling.attn_factor": 1.3, "rope.scaling.yarn_log_multiplier": 0.07},
    "sections": {"rope.dimension_sections": [2, 1, 1, 0]},
    "a fourth section": {"rope.dimension_sections": [1, 1, 1, 1]},
    "softmax": GROUPS | {"expert_weights_norm": False, "expert_gating_func": 1},
    "sigmoid": GROUPS | {"expert_weights_norm": True, "expert_gating_func": 2},
    "no cap": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "a window": {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
    "no rotation": {"rope.scaling.finetuned": False},
    "other epsilon": {"attention.layer_norm_epsilon": 1e-2},
    "side embedding": {"embedding_length_per_layer_input": 16},
}
EACH = {
    **{key: {key: value} for key, value in SCALARS.items()},
    "temperature": TEMPERATURE | {"rope.scaling.original_context_length": 16},
    "yarn": YARN,
    **{key: YARN | {key: value} for key, value in YARN_SCALARS.items()},
    "a factor below 1": YARN | {"rope.scaling.factor": 0.5},
    "linear alone": LINEAR,
    "a factor without a type": {"rope.scaling.type": None, "rope.scaling.factor": 4.0},
    "the old name": {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0},
    "no scaling": LINEAR | {"rope.scaling.type": "none"},
    "no base": {"rope.freq_base": None},
    "dimensions in windows": {"rope.dimension_count_swa": 8},
    "a latent": {"attention.kv_lora_rank": 32},
}
USUAL = [
    *(("every scalar", name) for name in ("ernie4_5", "qwen3next", "granite", "mistral3", "step35", "deepseek2")),
    *(("every scalar", name) for name in ("bailingmoe3", "hunyuan-dense", "olmo2", "glm-dsa")),
    *(("sections", name) for name in ("glm4", "bailingmoe3", "glm4moe", "paddleocr", "ernie4_5")),
    *(("a fourth section", name) for name in ("glm4", "qwen35", "qwen3vl")),
    *(("softmax", name) for name in ("qwen3vlmoe", "dots1", "minimax-m2")),
    *(("linear", name) for name in ("deepseek2", "kimi-linear", "afmoe", "muse-glimmer")),
    *(("no cap", name) for name in ("gemma4", "muse-glimmer")),
    *(("a window", name) for name in ("lfm2", "ernie4_5")),
    ("other epsilon", "cohere2"),
]


def write_with(folder, name, keys, factors=()):
    """Write a model of `name` with other keys, None for none, and tensors that divide the frequencies."""
    model = MAKERS[name](7)
    model.keys = {key: value for key, value in (model.keys | keys).items() if value is not None}
    for factor in factors:
        model.add(f"M:{factor}.weight", model.keys.get("rope.dimension_count", HEAD) // 2, low=1, high=8)
    return model.write(folder / f"{name} {len(list(folder.iterdir()))}.gguf")


def compare(folder, paths):
    """Compare each model (label -> path) that llama.cpp runs; return the labels of those that it refuses."""
    tokens = np.random.default_rng(0).integers(0, 256, N_TOKENS, np.int32)
    likely = engine_logits.log_probabilities(list(paths.values()), tokens, folder, may_refuse=True)
    for label, path in paths.items():
        if path not in likely or np.isnan(likely[path]).any():
            continue
        try:
            ours = own_log_probabilities(path, tokens)
        except BadInput as error:
            pytest.fail(f"{label}: {error}")
        tolerance = next((size for arch, size in TOLERANCE.items() if arch in label), 1e-4)
        np.testing.assert_allclose(ours, likely[path], atol=tolerance, err_msg=label)
    return {label for label, path in paths.items() if path not in likely}


def test_a_key_matters_where_it_does_in_llama_cpp(tmp_path):
    paths = {f"{name}: {label}": write_with(tmp_path, name, ALL[label]) for label, name in USUAL}
    assert not compare(tmp_path, paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_every_key_matters_where_it_does_in_llama_cpp(tmp_path, name):
    paths = {f"{name}: {label}": write_with(tmp_path, name, keys) for label, keys in (ALL | EACH).items()}
    for factors in (FACTORS, LONG_FACTORS):
        keys = {} if factors == FACTORS else {"rope.scaling.type": "longrope"}
        paths[f"{name}: {factors[0]}"] = write_with(tmp_path, name, keys, factors)
    assert len(compare(tmp_path, paths)) < len(paths) / 2


NO_SHARED = {"expert_shared_count": 0, "expert_shared_feed_forward_length": 0}
OPTIONAL = [
    *((name, "_shexp", NO_SHARED) for name in ("ernie4_5-moe", "afmoe", "cohere2moe")),
    *((name, "ffn_gate_exps", {}) for name in ("ernie4_5-moe", "granitemoe", "hy_v3")),
    *((name, "attn_q_norm", {}) for name in ("glm4moe", "step35")),
    *((name, "exp_probs_b", {}) for name in ("dots1", "deepseek2")),
]
NEEDED = [
    *((name, "_shexp", NO_SHARED) for name in ("dots1", "bailingmoe2", "deepseek2", "laguna", "qwen2moe")),
    *((name, "exp_probs_b", {}) for name in ("glm4moe", "minimax-m2")),
    ("pangu-embedded", "attn_output.bias", {}),
]


def write_without(folder, name, part, keys):
    model = MAKERS[name](3)
    model.tensors = [tensor for tensor in model.tensors if not re.search(part, tensor.name)]
    model.keys |= {key: value for key, value in keys.items() if key in model.keys}
    return model.write(folder / f"{name} {part}.gguf")


def test_what_llama_cpp_does_not_require_may_be_absent_and_nothing_else(tmp_path):
    paths = {(name, part): write_without(tmp_path, name, part, keys) for name, part, keys in OPTIONAL + NEEDED}
    needed = {(name, part) for name, part, _ in NEEDED}
    assert compare(tmp_path, paths) == needed
    for label in needed:
        with pytest.raises(BadInput, match="has no tensor"):
            own_log_probabilities(paths[label], np.zeros(4, np.int32))
