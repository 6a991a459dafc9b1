"""Tensor names, what must stay unquantized, and the types that suit the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import FIXTURE, GOLDEN, shape

from requant.container.header import parse_header
from requant.formats import FORMATS, by_name
from requant.model.roles import (
    LOW_BIT_BPW,
    candidates,
    fallback_type,
    floor_type,
    is_experts,
    is_lookup,
    is_tied,
    layer_of,
    n_dims,
    needs_importance,
    never_quantize,
    role_of,
    usable_types,
)

F16, I32 = 1, 26
ENCODED = [f.name for f in FORMATS.values() if f.block_weights > 1]
LOW_BIT = {"IQ1_S", "IQ1_M", "IQ2_XXS", "TQ1_0", "TQ2_0", "Q1_0"}


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("token_embd.weight", "token_embd", None),
        ("output.weight", "output", None),
        ("output_norm.weight", "norm", None),
        ("blk.0.attn_q.weight", "attn_q", 0),
        ("blk.31.ffn_down_exps.weight", "ffn_down_exps", 31),
        ("blk.7.attn_q_norm.weight", "norm", 7),
        ("blk.7.attn_q.bias", "attn_q.bias", 7),
        ("blk.46.nextn.eh_proj.weight", "nextn.eh_proj", 46),
        ("blk.46.nextn.enorm.weight", "norm", 46),
        *((f"blk.0.{part}.weight", "norm", 0) for part in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")),
        ("blk.0.ffn_norm", "norm", 0),
        ("blk.0.attn_norm.bias", "attn_norm.bias", 0),
        ("blk.0.ple_norm_up.weight", "ple_norm_up", 0),
        ("v.blk.3.attn_q.weight", "v.attn_q", None),
        ("rope_freqs.weight", "rope_freqs", None),
        ("blk.x.attn_q.weight", "blk.x.attn_q", None),
        ("blk.²3.attn_q.weight", "blk.²3.attn_q", None),
    ],
)
def test_names_give_role_and_layer(name, role, layer):
    assert (role_of(name), layer_of(name)) == (role, layer)


@given(st.text(st.characters(codec="ascii"), max_size=63), st.lists(st.integers(0, 9), max_size=4))
def test_any_name_has_a_role(name, dims):
    assert isinstance(role_of(name), str)
    assert isinstance(never_quantize("llama", name, dims, F16), str | None)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.ssm_alpha.weight",
        "blk.0.ssm_beta.weight",
        "blk.0.ssm_dt.weight",
        "blk.0.shortconv.conv.weight",
        "blk.0.time_mix_decay_w2.weight",
        "blk.0.indexer.k_proj.weight",
        "blk.0.laurel_l.weight",
        "altup_proj.weight",
        "per_layer_model_proj.weight",
        "position_embd.weight",
        "token_types.weight",
        "v.position_embd.weight",
        "v.patch_embd.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_q.scale",
        "blk.0.ssm_a",
    ],
)
def test_sensitive_tensors_are_never_quantized(name):
    assert never_quantize("llama", name, (4096, 4096), F16)


@pytest.mark.parametrize(
    ("shape_", "type_id"), [((4096,), F16), ((4096, 1, 1), F16), ((), F16), ((0, 4), F16), ((4096, 4096), I32)]
)
def test_a_tensor_that_is_no_matrix_of_weights_is_never_quantized(shape_, type_id):
    assert never_quantize("llama", "blk.0.attn_q.weight", shape_, type_id)


@pytest.mark.parametrize("arch", ["glm5-next", "glm5next"])
def test_one_architecture_in_both_spellings_keeps_its_latent_attention(arch):
    name = "blk.0.attn_k_b.weight"
    assert never_quantize(arch, name, (128, 512, 64), F16)
    assert floor_type(arch, "blk.0.attn_q_a.weight") == "Q8_0"
    assert never_quantize("deepseek2", name, (128, 512, 64), F16) is None


def test_every_matrix_of_the_small_fixture_may_be_quantized():
    tensors = parse_header(FIXTURE).tensors
    total = sum(t.n_weights for t in tensors)
    free = [t for t in tensors if never_quantize("llama", t.name, t.shape, t.type_id, model_weights=total) is None]
    assert len(free) == 72


def test_a_matrix_is_tiny_in_itself_and_next_to_the_model():
    def free(n_rows, model_weights):
        return never_quantize("llama", "cls.weight", (256, n_rows), F16, model_weights=model_weights) is None

    assert free(256, 10**7)
    assert not free(256, 10**10)
    assert free(2048, 10**10)
    assert not free(2047, 10**10)


@pytest.mark.parametrize("model", sorted(GOLDEN["models"]))
def test_the_matrices_of_real_models_are_free(model):
    tensors = shape(model).tensors
    total = sum(t.n_weights for t in tensors)
    kept = [t for t in tensors if never_quantize("any", t.name, t.shape, t.type_id, model_weights=total)]
    assert sum(t.n_weights for t in kept) < total / 1000
    matrices = {role_of(t.name) for t in kept if n_dims(t.shape) > 1 and t.name.endswith("weight")}
    assert matrices <= {"ffn_gate_inp", "ssm_ba", "ssm_conv1d", "norm"}


def test_experts_are_stacked_and_heads_are_not_experts():
    assert is_experts("blk.0.ffn_down_exps.weight", (768, 2048, 128))
    assert not is_experts("blk.0.attn_k_b.weight", (128, 512, 16))
    assert not is_experts("blk.0.ffn_down_shexp.weight", (768, 2048))


def test_tied_models_have_no_output_of_their_own():
    assert is_tied({"token_embd.weight", "output_norm.weight"})
    assert not is_tied({"token_embd.weight", "output.weight"})
    assert not is_tied({"fc.weight"})


def test_lookup_tables_are_the_untied_embedding_and_the_per_layer_one():
    assert is_lookup("token_embd.weight", tied=False)
    assert not is_lookup("token_embd.weight", tied=True)
    assert is_lookup("per_layer_token_embd.weight", tied=True)
    assert not is_lookup("output.weight", tied=False)


@pytest.mark.parametrize(
    ("arch", "name", "floor"),
    [
        ("glm4moe", "blk.46.nextn.eh_proj.weight", "Q8_0"),
        ("deepseek2", "blk.0.attn_kv_a_mqa.weight", "Q8_0"),
        ("deepseek2", "blk.0.attn_k_b.weight", "Q8_0"),
        ("gemma4", "per_layer_token_embd.weight", None),
        ("qwen4exp", "per_layer_token_embd.weight", "Q8_0"),
        ("gemma4", "blk.0.inp_gate.weight", "Q8_0"),
        ("gemma4", "blk.0.proj.weight", "Q8_0"),
        ("eagle3", "fc.weight", "Q8_0"),
        ("eagle3", "output.weight", "Q6_K"),
        ("clip", "v.blk.0.attn_q.weight", "Q8_0"),
        ("llama", "blk.0.attn_q.weight", None),
    ],
)
def test_floors_follow_role_and_architecture(arch, name, floor):
    assert floor_type(arch, name) == floor


@pytest.mark.parametrize(
    ("type_name", "n_per_row", "expected"),
    [
        ("IQ3_S", 2880, "IQ4_NL"),
        ("Q2_K", 2880, "Q4_0"),
        ("Q4_K", 2880, "Q5_0"),
        ("Q5_K", 2880, "Q5_1"),
        ("Q6_K", 2880, "Q8_0"),
        ("Q6_K", 2888, "F16"),
        ("Q8_0", 40, "F16"),
        ("NVFP4", 32, None),
        ("Q1_0", 32, None),
    ],
)
def test_fallbacks_are_those_of_llama_quantize(type_name, n_per_row, expected):
    assert fallback_type(type_name, n_per_row) == expected


@given(st.integers(1, 10_000), st.lists(st.sampled_from(ENCODED), unique=True))
def test_every_type_is_usable_or_skipped_with_its_block(n_per_row, types):
    usable, skipped = usable_types(n_per_row, types)
    assert sorted(usable + list(skipped)) == sorted(types)
    assert all(by_name(t).divides(n_per_row) for t in usable)
    for name, reason in skipped.items():
        assert not by_name(name).divides(n_per_row)
        assert f"block of {by_name(name).block_weights}" in reason


def chosen(arch, name, shape_=(4096, 4096), has_importance=True):
    return candidates(arch, name, shape_, ENCODED, has_importance=has_importance)


@pytest.mark.parametrize("role", ["attn_k", "attn_v", "ssm_out"])
def test_low_bit_types_are_not_offered_where_they_ruin_a_model(role):
    assert not LOW_BIT & set(chosen("llama", f"blk.0.{role}.weight")[0])
    assert set(chosen("llama", "blk.0.ffn_up.weight")[0]) >= LOW_BIT


def test_types_that_need_importance_are_offered_only_with_it():
    types, skipped = chosen("llama", "blk.0.ffn_up.weight", has_importance=False)
    assert set(ENCODED) - set(types) == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    assert "importance" in skipped["IQ2_XS"]
    assert needs_importance("IQ3_XXS", "ffn_up")
    assert not needs_importance("IQ3_XXS", "output")


ROLES = st.sampled_from(["output", "blk.0.attn_v", "blk.0.ffn_up", "fc", "blk.0.nextn.eh_proj", "blk.0.attn_k_b"])


@given(
    st.sampled_from(["llama", "eagle3", "glm5-next", "clip"]),
    ROLES,
    st.sampled_from([32, 64, 128, 256, 2880]),
    st.booleans(),
)
def test_candidates_keep_order_and_explain_every_other_type(arch, role, n_per_row, has_importance):
    name = f"{role}.weight"
    types, skipped = chosen(arch, name, (n_per_row, 64), has_importance=has_importance)
    assert [t for t in ENCODED if t in types] == types
    assert set(types).isdisjoint(skipped)
    assert set(types) | set(skipped) == set(ENCODED)
    floor = floor_type(arch, name)
    assert floor is None or all(by_name(t).bpw >= by_name(floor).bpw for t in types)
    if role_of(name) in ("output", "attn_v"):
        assert all(by_name(t).bpw > LOW_BIT_BPW for t in types)


def test_dimensions_of_one_do_not_count():
    assert [n_dims(s) for s in [(), (1,), (5,), (5, 1), (1, 5), (5, 4, 3, 1)]] == [1, 1, 1, 1, 2, 3]
