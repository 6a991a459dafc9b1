"""The <architecture>.* keys as a record, and the window patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import metadata_of, shape, tiny

from requant.errors import BadInput, RequantError
from requant.model.hyperparameters import read_hyperparameters
from requant.model.windows import windows_of


def test_real_shapes_are_read():
    hp = read_hyperparameters(shape("GLM-4.5-Air F16").metadata)
    assert (hp.arch, hp.n_layers, hp.n_nextn, hp.n_trunk) == ("glm4moe", 47, 1, 46)
    assert (hp.n_head[0], hp.n_head_kv[0], hp.key_length) == (96, 8, 128)
    assert (hp.n_expert, hp.n_expert_used, hp.n_ff_expert, hp.n_ff_shared) == (128, 8, 1408, 1408)
    assert read_hyperparameters(shape("DeepSeek-V2-Lite F16").metadata).caches.latent
    assert read_hyperparameters(shape("Mamba-Codestral-7B F16").metadata).caches.recurrent[0]


def test_head_length_defaults_to_the_width_over_the_heads():
    hp = read_hyperparameters(tiny())
    assert (hp.key_length, hp.value_length, hp.key_length_swa) == (16, 16, 16)


def test_heads_of_the_cache_default_to_all_heads():
    assert read_hyperparameters(tiny(attention__head_count_kv=None)).n_head_kv == (4, 4)


def test_an_array_gives_each_layer_its_own_and_may_hold_zeros():
    assert read_hyperparameters(tiny(attention__head_count_kv=("arr_u32", [0, 3]))).n_head_kv == (0, 3)


def test_an_unknown_architecture_with_the_usual_keys_is_read():
    keys = {k.replace("llama.", "newest."): (v.type_name, tiny().get(k)) for k, v in tiny().values.items()}
    hp = read_hyperparameters(metadata_of({**keys, "general.architecture": ("str", "newest")}))
    assert (hp.arch, hp.n_layers) == ("newest", 2)


def test_the_vocabulary_is_the_token_list_then_the_key_then_the_table():
    tensors = shape("Llama-3.1-8B F16").tensors
    assert read_hyperparameters(tiny(), tensors).n_vocab == 100
    assert read_hyperparameters(tiny(vocab_size=None), tensors).n_vocab == 128256
    tokens = tiny().with_values({"tokenizer.ggml.tokens": ("arr_str", ["a", "b"])})
    assert read_hyperparameters(tokens).n_vocab == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, r"'llama.block_count' is missing"),
        ("block_count", ("u32", 2**31), r"block_count' is out of range \(got 2147483648, limit 1 to 512\)"),
        ("block_count", ("u32", 0), "out of range"),
        ("block_count", ("f32", 2.0), r"is no integer \(got float\)"),
        ("block_count", ("bool", True), "is no integer"),
        ("block_count", ("arr_u32", [2]), "is no integer"),
        ("context_length", None, "is missing"),
        ("embedding_length", ("u32", 0), "out of range"),
        ("attention__head_count", None, "is missing"),
        ("attention__head_count", ("u32", 0), r"head_count' is out of range \(got 0"),
        ("attention__head_count", ("arr_u32", [0, 0]), "out of range"),
        ("attention__head_count", ("arr_u32", [4, 4, 4]), r"wrong number of items \(got 3, limit 2 layers\)"),
        ("attention__head_count", ("arr_i32", [4, -1]), "out of range"),
        ("attention__head_count_kv", ("arr_str", ["a", "b"]), "is no integer"),
        ("attention__key_length", ("i32", -1), "out of range"),
        ("attention__sliding_window_pattern", ("arr_bool", [True]), "wrong number of items"),
        ("nextn_predict_layers", ("u32", 2), "out of range"),
        ("vocab_size", None, "is missing"),
    ],
)
def test_bad_values_name_the_file_and_the_key(key, value, message):
    with pytest.raises(BadInput, match=message) as caught:
        read_hyperparameters(tiny(**{key: value}))
    assert str(caught.value).startswith("shape.gguf: key 'llama.")


@pytest.mark.parametrize("keys", [{}, {"general.architecture": ("u32", 1)}, {"general.architecture": ("str", "")}])
def test_a_file_without_an_architecture_is_no_model(keys):
    with pytest.raises(BadInput, match=r"general\.architecture"):
        read_hyperparameters(metadata_of(keys))


def test_a_name_from_the_file_is_escaped():
    with pytest.raises(BadInput) as caught:
        read_hyperparameters(metadata_of({"general.architecture": ("str", "\x1b[31m")}))
    assert "\x1b" not in str(caught.value)


KEYS = ["block_count", "embedding_length", "attention__head_count", "expert_used_count", "attention__sliding_window"]
VALUES = st.one_of(
    st.tuples(st.sampled_from(["i64"]), st.integers(-(2**40), 2**40)),
    st.tuples(st.sampled_from(["u32"]), st.integers(0, 600)),
    st.tuples(st.just("arr_i32"), st.lists(st.integers(-2, 5), max_size=4)),
    st.tuples(st.just("str"), st.sampled_from(["", "2"])),
    st.none(),
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_keys_give_a_record_or_an_error_of_ours(changes):
    try:
        hp = read_hyperparameters(tiny(**changes))
    except RequantError:
        return
    assert len(hp.n_head) == len(hp.n_head_kv) == hp.n_layers
    assert all(0 <= n < 2**31 for n in hp.n_head)


@pytest.mark.parametrize(
    ("arch", "size", "pattern", "expected"),
    [
        ("gemma3", 1024, None, "wwwwwfww"),
        ("gemma3", None, None, "ffffffff"),
        ("gemma3", 0, None, "ffffffff"),
        ("gemma2", None, None, "wfwfwfwf"),
        ("gpt-oss", 128, None, "wfwfwfwf"),
        ("gpt-oss", 128, 4, "wwwfwwwf"),
        ("gpt-oss", 128, [True, True, False, False, True, True, False, False], "wwffwwff"),
        ("gpt-oss", 128, 0, "wwwwwwww"),
        ("gpt-oss", 128, 1, "ffffffff"),
        ("smallthinker", 100, None, "fwwwfwww"),
        ("llama4", None, None, "wwwfwwwf"),
        ("phi3", 2048, None, "ffffffff"),
        ("llama", 4096, None, "ffffffff"),
        ("exaone4", 4096, None, "ffffffff"),
    ],
)
def test_windows_follow_the_architecture(arch, size, pattern, expected):
    windows = windows_of(arch, 8, 8, size, pattern)
    assert "".join("w" if w else "f" for w in windows.layers) == expected


def test_window_sizes_follow_the_architecture():
    assert windows_of("gemma2", 2, 2, None, None).size == 4096
    assert windows_of("llama4", 8, 8, 100, None).size == 8192
    assert windows_of("gemma3", 8, 8, 1024, None).size == 1024
    assert windows_of("exaone4", 64, 64, None, None).layers[:4] == (True, True, True, False)


def test_a_window_that_the_architecture_requires_is_missed():
    assert windows_of("gpt-oss", 8, 8, None, None) is None


def test_prediction_layers_have_no_window():
    assert windows_of("gpt-oss", 3, 2, 128, None).layers == (True, False, False)
