"""Memory beside the weights, against the figures of llama.cpp for real shapes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import ENTRIES, FIXTURE, shape, tiny

from requant.container.header import parse_header
from requant.errors import BadInput, UsageError
from requant.model.engine_settings import CACHE_TYPES, EngineSettings, engine_settings
from requant.model.hyperparameters import read_hyperparameters
from requant.model.memory import (
    compute_bytes,
    default_reserve,
    device_bytes,
    kv_cache_bytes,
    memory_for,
    on_device,
)
from requant.model.roles import is_tied

MIB = 2**20


def hyperparameters(model):
    return read_hyperparameters(shape(model).metadata, shape(model).tensors)


def settings_of(entry):
    return EngineSettings(
        entry["ctx"],
        entry["n_parallel"],
        entry["n_ubatch"],
        entry["cache_type_k"],
        entry["cache_type_v"],
        unified=entry["kv_unified"],
        flash_attn=entry["flash_attn"],
        swa_full=entry.get("swa_full", False),
        n_outputs=entry.get("n_outputs_max"),
    )


def label(entry):
    return f"{entry['model']}-{entry['ctx']}-{entry['n_parallel']}-{entry['n_ubatch']}-{entry['cache_type_k']}"


def test_golden_rows_cover_the_known_architectures():
    archs = {hyperparameters(entry["model"]).arch for entry in ENTRIES}
    assert archs >= {
        "llama",
        "qwen3",
        "qwen3moe",
        "gemma3",
        "gpt-oss",
        "phi3",
        "glm4moe",
        "deepseek2",
        "qwen3next",
        "mamba2",
        "eagle3",
    }
    assert len(ENTRIES) == 115


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_kv_cache_equals_llama_cpp_to_the_byte(entry):
    hp, settings = hyperparameters(entry["model"]), settings_of(entry)
    assert kv_cache_bytes(hp, settings) == entry["kv_bytes"]
    assert kv_cache_bytes(hp, settings, padded=True) == entry["gpu"][1]


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_compute_buffer_is_never_below_llama_cpp_and_little_above(entry):
    ratio = compute_bytes(hyperparameters(entry["model"]), settings_of(entry)) / entry["gpu"][2]
    few_logits_of_experts = entry.get("n_outputs_max") and hyperparameters(entry["model"]).n_expert
    most = (
        1.27 if few_logits_of_experts else 1.15 if "EAGLE3" in entry["model"] else 1.06 if entry["flash_attn"] else 1.08
    )
    assert 1 <= ratio < most


@pytest.mark.parametrize("model", sorted({entry["model"] for entry in ENTRIES}))
def test_weights_on_the_device_equal_llama_cpp_to_the_byte(model):
    hp, tensors = hyperparameters(model), shape(model).tensors
    tied = is_tied({t.name for t in tensors})
    entry = next(e for e in ENTRIES if e["model"] == model and not e.get("load_mtp"))
    on_gpu = [t for t in tensors if on_device(hp, t.name, tied=tied)]
    assert sum(device_bytes(t.format, t.shape) for t in on_gpu) == entry["gpu"][0]


def test_a_tied_embedding_is_on_the_device_and_an_untied_one_is_not():
    gemma, llama = hyperparameters("Gemma-3-12B F16"), hyperparameters("Llama-3.1-8B F16")
    assert on_device(gemma, "token_embd.weight", tied=True)
    assert not on_device(llama, "token_embd.weight", tied=False)
    assert not on_device(llama, "per_layer_token_embd.weight", tied=True)
    assert not on_device(hyperparameters("GLM-4.5-Air F16"), "blk.46.attn_q.weight", tied=False)


def test_an_unknown_cache_is_refused_and_the_way_out_named():
    hp = read_hyperparameters(tiny())
    with pytest.raises(BadInput, match=r"'novel'.*not known.*--assume.*--size and --bpw"):
        memory_for(replace(hp, arch="novel", caches=replace(hp.caches, known=False)), EngineSettings(4096))


@pytest.mark.parametrize("entry", ENTRIES[::7], ids=label)
def test_the_assumption_for_an_unknown_architecture_is_an_upper_bound(entry):
    hp = hyperparameters(entry["model"])
    hp, settings = replace(hp, caches=replace(hp.caches, known=False)), replace(settings_of(entry), assume=True)
    assert kv_cache_bytes(hp, settings) >= entry["kv_bytes"]
    assert compute_bytes(hp, settings) >= entry["gpu"][2]


def test_assuming_changes_nothing_for_an_architecture_that_is_known():
    for entry in ENTRIES[::9]:
        hp, settings = hyperparameters(entry["model"]), settings_of(entry)
        assumed = replace(settings, assume=True)
        assert kv_cache_bytes(hp, assumed) == kv_cache_bytes(hp, settings)
        assert compute_bytes(hp, assumed) == compute_bytes(hp, settings)


@pytest.mark.parametrize("arch", ["muse-glimmer", "nanbeige", "spark2_5", "maple", "granite_swa", "graniteswitch"])
def test_an_architecture_with_the_usual_cache_is_known(arch):
    keys = {key.replace("llama.", f"{arch}."): value for key, value in tiny().values.items()}
    windows = {"attention.sliding_window": ("u32", 8), "attention.sliding_window_pattern": ("arr_bool", [True, False])}
    windows = {f"{arch}.{key}": value for key, value in windows.items()}
    metadata = replace(tiny(), values=keys).with_values(windows | {"general.architecture": ("str", arch)})
    assert memory_for(read_hyperparameters(metadata), EngineSettings(4096)).kv_cache
    again = metadata.with_values({f"{arch}.num_loops": ("u32", 2)})  # each time with a cache of its own
    with pytest.raises(BadInput, match="not known"):
        memory_for(read_hyperparameters(again), EngineSettings(4096))


def test_unusual_keys_of_a_known_architecture_are_refused():
    for change in ({"attention__shared_kv_layers": ("u32", 1)}, {"ssm__state_size": ("u32", 16)}):
        with pytest.raises(BadInput, match="not known"):
            memory_for(read_hyperparameters(tiny(**change)), EngineSettings(512))


def test_the_fixture_in_twelve_mib_leaves_no_room_with_the_default_batch():
    header = parse_header(FIXTURE)
    hp, vram = read_hyperparameters(header.metadata, header.tensors), 12 * MIB
    memory = memory_for(hp, EngineSettings(512), vram=vram)
    assert memory.kv_cache == 10 * 512 * 2 * (2 * 64) * 2  # layers, cells, K and V, values, F16
    assert memory.reserve == vram // 10
    logits, activations, mask = 4 * 4096 * 512, 4 * 4 * 512 * 256, 2 * 512 * 512
    assert logits + activations + mask < memory.compute < 1.03 * (logits + activations + mask)
    assert memory.weights_limit(vram) == vram - memory.kv_cache - memory.compute - memory.reserve < 0


@given(st.integers(1, 2**45))
def test_the_default_reserve_is_at_most_a_tenth_and_a_gib(vram):
    assert default_reserve(vram) == min(vram // 10, 2**30)


def test_a_reserve_asked_for_is_taken_as_it_is():
    hp = hyperparameters("Llama-3.1-8B F16")
    assert memory_for(hp, EngineSettings(4096), vram=2**33, reserve=0).reserve == 0
    assert memory_for(hp, EngineSettings(4096), vram=2**33, reserve=2**32).reserve == 2**32


def test_default_context_is_the_models_but_at_most_4096():
    assert engine_settings(hyperparameters("Llama-3.1-8B F16"), {}).n_ctx == 4096
    assert engine_settings(read_hyperparameters(tiny()), {}).n_ctx == 512
    assert engine_settings(read_hyperparameters(tiny()), {"n_ctx": 100_000}).n_ctx == 100_000


MODELS = st.sampled_from(sorted({entry["model"] for entry in ENTRIES}))
SETTINGS = st.builds(
    EngineSettings,
    st.integers(1, 200_000),
    st.integers(1, 8),
    st.integers(1, 4096),
    st.sampled_from(CACHE_TYPES),
    st.sampled_from(CACHE_TYPES),
    unified=st.booleans(),
    swa_full=st.booleans(),
    n_outputs=st.none() | st.integers(1, 512),
)


def usable(hp, settings):
    """Return `settings` with one cache type where latent attention has one cache."""
    return replace(settings, cache_type_v=settings.cache_type_k) if hp.caches.latent else settings


@given(MODELS, SETTINGS, st.integers(1, 10_000))
def test_memory_never_falls_with_a_longer_context(model, settings, more):
    hp = hyperparameters(model)
    settings = usable(hp, settings)
    longer = replace(settings, n_ctx=settings.n_ctx + more)
    assert kv_cache_bytes(hp, longer) >= kv_cache_bytes(hp, settings)
    assert compute_bytes(hp, longer) >= compute_bytes(hp, settings)


@given(MODELS, SETTINGS)
def test_a_window_never_costs_more_than_the_full_cache(model, settings):
    hp = hyperparameters(model)
    settings = usable(hp, settings)
    full = kv_cache_bytes(hp, replace(settings, swa_full=True))
    assert 0 < kv_cache_bytes(hp, settings) <= full <= kv_cache_bytes(hp, replace(settings, swa_full=True), padded=True)


def test_a_quantized_cache_needs_heads_of_whole_blocks():
    hp = read_hyperparameters(tiny(attention__key_length=("u32", 40)))
    with pytest.raises(BadInput, match=r"cached as Q8_0 \(got 40 values, limit a multiple of 32\)"):
        kv_cache_bytes(hp, EngineSettings(512, cache_type_k="q8_0"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_ctx": 0},
        {"n_ctx": 512, "n_parallel": 0},
        {"n_ctx": 512, "n_ubatch": -1},
        {"n_ctx": 512, "n_outputs": 0},
        {"n_ctx": 512, "cache_type_k": "q4_k"},
        {"n_ctx": 512, "cache_type_v": "Q8_0", "flash_attn": False},
    ],
)
def test_senseless_settings_are_a_usage_error(arguments):
    with pytest.raises(UsageError):
        EngineSettings(**arguments)
