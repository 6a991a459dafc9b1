"""Kinds of files, by architecture, keys and names."""

from types import SimpleNamespace

import pytest

from requant.errors import BadInput
from requant.model.kinds import check_is_language_model, describe_kind, kind_of

NEXTN = {"general.architecture": "glm4moe", "glm4moe.nextn_predict_layers": 1, "glm4moe.block_count": 9}


def metadata(values):
    return SimpleNamespace(get=values.get, path="model.gguf")


def arch(name, **keys):
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}


@pytest.mark.parametrize(
    ("keys", "names", "expected"),
    [
        (arch("llama"), ["blk.0.attn_q.weight"], "model"),
        (arch("llama"), [], "model"),
        ({}, [], "model"),
        (arch(7), [], "model"),
        (arch("clip"), ["v.blk.0.attn_q.weight"], "projector"),
        (arch("bert"), [], "embedding"),
        (arch("bert", pooling_type=4), [], "reranker"),
        (arch("qwen3", pooling_type=3), ["blk.0.attn_q.weight"], "embedding"),
        (arch("qwen3", pooling_type=0), ["blk.0.attn_q.weight"], "model"),
        (arch("qwen3", pooling_type=4), ["blk.0.attn_q.weight"], "reranker"),
        (arch("wavtokenizer-dec"), [], "codec"),
        (arch("flux"), [], "diffusion"),
        (arch("qwen_image"), [], "diffusion"),
        (arch("llada"), [], "diffusion-text"),
        (arch("eagle3"), [], "draft-eagle3"),
        (arch("dflash"), ["fc.weight"], "draft-dflash"),
        (arch("dflash"), ["fc.weight", "markov_w1.weight"], "draft-dspark"),
        (arch("gemma4-assistant"), ["blk.0.attn_q.weight"], "draft-mtp"),
        (NEXTN, ["token_embd.weight", "blk.8.nextn.eh_proj.weight"], "draft-mtp"),
        (NEXTN, ["blk.0.attn_norm.weight", "blk.8.nextn.eh_proj.weight"], "model"),  # the trunk is there
        (arch("glm4moe", nextn_predict_layers=0), ["blk.8.attn_q.weight"], "model"),
    ],
)
def test_a_file_has_a_kind(keys, names, expected):
    assert kind_of(metadata(keys), names).name == expected


def test_a_projector_is_described_with_its_types():
    found = metadata({**arch("clip"), "clip.vision.projector_type": "gemma4v", "clip.audio.projector_type": "gemma4a"})
    assert describe_kind(found, kind_of(found, [])) == "a projector of type gemma4a and gemma4v"


@pytest.mark.parametrize(("name", "words"), [("clip", "a projector"), ("sd3", "a diffusion model")])
def test_hyperparameters_are_those_of_language_models(name, words):
    with pytest.raises(BadInput, match=f"is {words}, no language model"):
        check_is_language_model(metadata(arch(name)))
    check_is_language_model(metadata(arch("llama")))
