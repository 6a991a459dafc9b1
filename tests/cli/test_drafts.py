"""Draft heads, multi-token prediction and projectors: converted by their own rules, counted in the target's budget."""

import json

import engine
import pytest
import real_models
from commands import TINY, assert_failed, run
from draft_heads import (
    N_EMBD,
    N_VOCAB,
    assistant,
    dflash,
    eagle3,
    gemma3_projector,
    head_file,
    prediction_head,
    projector,
    weights,
)
from gguf_files import ARCHITECTURE, ARR, STR, U32, File, pair

from requant.container.source import open_source
from requant.planning.plan import read_plan


@pytest.fixture
def head(tmp_path):
    return eagle3().write(tmp_path / "eagle3.gguf")


@pytest.mark.parametrize("words", [("--type", "Q4_K"), ("--bpw", "6", "--quick")])
def test_a_head_is_converted_with_its_map_copied_and_its_fusion_kept(capsys, tmp_path, head, words):
    out = tmp_path / "out.gguf"
    ran = run(capsys, "convert", head, out, *words)
    assert ran.code == 0, ran.err
    with open_source(head) as source, open_source(out) as made:
        assert [t.name for t in made.tensors] == [t.name for t in source.tensors]  # nothing borrowed is put in
        assert (made.read_rows(made.tensor("d2t")) == source.read_rows(source.tensor("d2t"))).all()
        assert made.tensor("d2t").format.name == "I64"
        assert made.tensor("fc.weight").format.bpw >= 8.5 and made.tensor("output.weight").format.bpw >= 6.5
        assert made.tensor("blk.0.ffn_up.weight").format.bpw < 16
        assert made.metadata.get("eagle3.target_layers") == [1, 4, 8]


def test_a_draft_takes_its_part_of_the_budget(capsys, tmp_path, head):
    plans = []
    for words in ((), ("--draft", head)):
        out = tmp_path / f"{len(words)}.json"
        asked = ("--vram", "40MiB", "--ctx", "512", "--ubatch", "32", "--quick", "-o", out)
        ran = run(capsys, "plan", TINY, *asked, *words)
        assert ran.code == 0, ran.err
        plans.append(read_plan(out))
    alone, drafted = plans
    parts = {name for name in drafted.memory if name.startswith("draft")}
    assert parts == {"draft weights", "draft KV cache", "draft compute"} and not parts & alone.memory.keys()
    assert drafted.memory["draft KV cache"] == 512 * 2 * 128 * 2
    with open_source(head) as source:
        assert drafted.memory["draft weights"] >= sum(t.n_bytes for t in source.tensors)
    assert "-md eagle3.gguf" in ran.out and "--spec-type draft-eagle3" in ran.out


def test_a_draft_that_cannot_draft_for_the_model_is_refused(capsys, tmp_path):
    asked = ("plan", TINY, "--vram", "40MiB", "--quick", "--draft")
    other = eagle3(n_vocab=1000).write(tmp_path / "other.gguf")
    assert_failed(run(capsys, *asked, other), 3, "another vocabulary", "got 1000", "limit 4096")
    wide = eagle3(hidden=512).write(tmp_path / "wide.gguf")
    assert_failed(run(capsys, *asked, wide), 3, "another width", "got 512", "limit 256")
    assert_failed(run(capsys, *asked, tmp_path / "none.gguf"), 3, "no such file")


def test_a_projector_keeps_what_the_engine_reads_as_it_is(capsys, tmp_path):
    model, out = projector().write(tmp_path / "mmproj.gguf"), tmp_path / "out.gguf"
    ran = run(capsys, "convert", model, out, "--type", "Q8_0")
    assert ran.code == 0, ran.err
    with open_source(out) as made:
        types = {t.name: t.format.name for t in made.tensors}
    assert types["v.patch_embd.weight"] == types["v.position_embd.weight"] == "F16"
    assert types["v.blk.0.attn_q.weight"] == types["v.blk.0.ffn_down.weight"] == "Q8_0"
    small = run(capsys, "convert", model, tmp_path / "small.gguf", "--type", "Q4_0")
    assert small.code == 0
    with open_source(tmp_path / "small.gguf") as made:
        assert {t.format.name for t in made.tensors} <= {"F16", "Q8_0"}
    asked = ("plan", TINY, "--vram", "40MiB", "--ctx", "512", "--quick", "--mmproj")
    ran = run(capsys, *asked, model)
    assert ran.code == 0 and "mmproj" in ran.out and "--mmproj mmproj.gguf" in ran.out
    assert_failed(run(capsys, *asked, TINY), 3, "is no projector")


def test_prediction_layers_are_pinned_high_and_only_loaded_when_used(capsys, tmp_path):
    keys = {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "context_length": 512,
        "embedding_length": N_EMBD,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "vocab_size": N_VOCAB,
    }
    pairs = [pair(ARCHITECTURE, STR, "glm4moe"), *(pair(f"glm4moe.{k}", U32, v) for k, v in keys.items())]
    layer = [("attn_q", 256, 256), ("attn_k", 256, 256), ("attn_v", 256, 256), ("attn_output", 256, 256)]
    layer += [("ffn_gate", 256, 512), ("ffn_up", 256, 512), ("ffn_down", 512, 256)]
    tensors = [weights("token_embd.weight", N_EMBD, N_VOCAB), weights("output.weight", N_EMBD, N_VOCAB)]
    tensors += [weights(f"blk.{il}.{name}.weight", *shape) for il in range(3) for name, *shape in layer]
    tensors += [weights("blk.2.nextn.eh_proj.weight", 512, 256)]
    model = File(tuple(pairs), tuple(tensors)).write(tmp_path / "mtp.gguf")
    plans = []
    for words in ((), ("--mtp",)):
        out = tmp_path / f"{len(words)}.json"
        ran = run(
            capsys, "plan", model, "--vram", "14MiB", "--ctx", "512", "--ubatch", "32", "--quick", "-o", out, *words
        )
        assert ran.code == 0, ran.err
        plans.append(read_plan(out))
    without, used = plans
    assert {c.device for c in without.choices if c.layer == 2} == {"none"}
    assert {c.device for c in used.choices if c.layer == 2} == {"gpu"}
    assert used.memory["MTP KV cache"] == 512 * 2 * 256 * 2 and "MTP KV cache" not in without.memory
    for plan in plans:
        (projection,) = (c for c in plan.choices if c.name == "blk.2.nextn.eh_proj.weight")
        assert projection.type in ("F16", "Q8_0")
    assert "--spec-type draft-mtp" in ran.out
    assert_failed(run(capsys, "plan", TINY, "--vram", "14MiB", "--mtp", "--quick"), 2, "no layers of multi-token")


ONE_LAYER = 512 * 2 * 128 * 2  # bytes: F16 keys and values of two heads of 64 for 512 tokens
HEADS = {
    "draft-mtp": (prediction_head, ONE_LAYER),
    "draft-dflash": (dflash, 2 * ONE_LAYER),
    "draft-dspark": (lambda: dflash(weights("markov_w1.weight", 64, N_VOCAB)), 2 * ONE_LAYER),
    "draft-mtp of Gemma 4": (assistant, 0),  # it attends to the target's cache
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_a_file_of_its_own_counts_and_has_its_option(capsys, tmp_path, name):
    make, cache = HEADS[name]
    head, out = make().write(tmp_path / "head.gguf"), tmp_path / "plan.json"
    asked = ("--vram", "60MiB", "--ctx", "512", "--ubatch", "32", "--quick", "-o", out)
    ran = run(capsys, "plan", TINY, *asked, "--draft", head)
    assert ran.code == 0, ran.err
    assert f"-md head.gguf -ngld 99 --spec-type {name.split()[0]}" in ran.out
    memory = read_plan(out).memory
    assert memory.get("draft KV cache", 0) == cache and memory["draft compute"] > 0
    with open_source(head) as source:
        on_device = [t for t in source.tensors if t.name != "token_embd.weight" or name.endswith("4")]
    assert memory["draft weights"] >= sum(t.n_bytes for t in on_device)
    found = json.loads(run(capsys, "inspect", head, "--ctx", "512", "--json").out)
    assert found["needs"]["weights"] == memory["draft weights"] and found["needs"]["kv_cache"] == cache


def test_a_head_is_converted_for_its_model_and_has_no_budget_of_its_own(capsys, tmp_path):
    head, out = prediction_head().write(tmp_path / "mtp-m.gguf"), tmp_path / "out.gguf"
    ran = run(capsys, "convert", head, out, "--type", "Q4_0")
    assert ran.code == 0 and f"llama-server -m MODEL.gguf -md {out} --spec-type draft-mtp" in ran.out, ran
    with open_source(out) as made:
        assert made.tensor("blk.8.nextn.eh_proj.weight").format.bpw >= 8.5
        assert made.tensor("blk.8.ffn_up.weight").format.name == "Q4_0"
    failed = run(capsys, "plan", head, "--vram", "60MiB", "--quick")
    assert_failed(failed, 3, "a head of multi-token prediction", "--draft")


def test_heads_that_cannot_start_with_the_model_or_the_engine_are_refused(capsys, tmp_path):
    asked = ("plan", TINY, "--vram", "60MiB", "--quick", "--draft")
    far = dflash(layers=(1, 99)).write(tmp_path / "far.gguf")
    assert_failed(run(capsys, *asked, far), 3, "dflash.target_layers", "limit below 10")
    wide = assistant(hidden=512).write(tmp_path / "wide.gguf")
    assert_failed(run(capsys, *asked, wide), 3, "another width", "got 512", "limit 256")
    picture = gemma3_projector().write(tmp_path / "mmproj.gguf")
    assert_failed(run(capsys, *asked, picture), 3, "a projector, no draft")
    head = prediction_head().write(tmp_path / "mtp.gguf")
    assert_failed(run(capsys, *asked, head, "--engine", "koboldcpp"), 2, "koboldcpp", "draft-mtp")


def test_the_fusion_of_a_block_head_is_kept_high(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", dflash().write(tmp_path / "d.gguf"), out, "--type", "Q4_0").code == 0
    with open_source(out) as made:
        assert made.tensor("fc.weight").format.bpw >= 8.5 and made.tensor("blk.0.ffn_up.weight").format.name == "Q4_0"


def test_a_projector_has_words_and_a_line_of_its_own(capsys, tmp_path):
    model, out = gemma3_projector().write(tmp_path / "mmproj.gguf"), tmp_path / "out.gguf"
    ran = run(capsys, "inspect", model)
    assert ran.code == 0 and ran.err == "" and "a projector of type gemma3" in ran.out
    ran = run(capsys, "convert", model, out, "--type", "Q8_0")
    assert ran.code == 0 and "block_count" not in ran.err, ran
    assert f"llama-server -m MODEL.gguf --mmproj {out}" in ran.out and f"-m {out}" not in ran.out
    with open_source(out) as made:
        types = {t.name: t.format.name for t in made.tensors}
    assert types["mm.input_projection.weight"] == "F16" and types["v.blk.0.attn_q.weight"] == "Q8_0"
    for words in (("--vram", "60MiB", "--quick"), ("--preset", "Q4_K_M")):
        assert_failed(run(capsys, "plan", model, *words), 3, "is a projector, no language model", "--mmproj")
    page = tmp_path / "page.html"
    assert run(capsys, "report", out, "-o", page).code == 0
    assert "--mmproj out.gguf" in page.read_text() and "requant evaluate" not in page.read_text()


def other_file(arch):
    return File((pair(ARCHITECTURE, STR, arch),), (weights("blk.0.attn_q.weight", 256, 256),))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (gemma3_projector(), "is a projector, no language model"),
        (eagle3(), "is a draft head of EAGLE-3, which runs only together with its model"),
        (prediction_head(), "is a head of multi-token prediction, which runs only together with its model"),
        (other_file("flux"), "is a diffusion model, no language model"),
        (other_file("bert"), "is an embedding model, which is an encoder and predicts no next token"),
        (other_file("llada"), "is a language model that diffuses, which predicts no next token"),
        (
            File((pair(ARCHITECTURE, STR, "llama"), pair("tokenizer.ggml.tokens", ARR, (STR, ["a"]))), ()),
            "a vocabulary",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_no_text_runs_on_says_what_it_is(capsys, tmp_path, file, words):
    model, out = file.write(tmp_path / "model.gguf"), tmp_path / "out.json"
    assert_failed(run(capsys, "calibrate", model, "-o", tmp_path / "s.gguf"), 3, words)
    assert_failed(run(capsys, "evaluate", model), 3, words)
    for command in (("score", model, "--types", "Q8_0", "-o", out), ("plan", model, "--bpw", "15")):
        ran = run(capsys, *command)
        assert words in ran.err and (ran.code == 3 or "points and no KL divergence" in ran.err), ran
        assert ran.code == 3 or "no KL divergence" in ran.out


@pytest.mark.parametrize("option", ["--tensor-type", "--min-type"])
def test_a_rule_for_a_projector_names_the_matrix_that_it_meant(capsys, tmp_path, option):
    model = gemma3_projector().write(tmp_path / "mmproj.gguf")
    words = ("plan", model, "--quick", "--size", "1MiB", option)
    said = "matches only tensors that stay as they are; mm.input_projection.weight is F16"
    assert_failed(run(capsys, *words, "mm.*=q8_0"), 2, said)
    assert_failed(run(capsys, *words, "soft_emb=q8_0"), 2, "mm.soft_emb_norm.weight is F32: it is a vector")
    assert run(capsys, *words, "v.blk=q8_0").code == 0  # it matches norms and biases too


@pytest.mark.slow
def test_the_engine_runs_a_converted_projector(capsys, tmp_path):
    """It transposes and copies the input projection: with another type than F16 or F32 there it crashes."""
    model, out = gemma3_projector().write(tmp_path / "mmproj.gguf"), tmp_path / "out.gguf"
    assert run(capsys, "convert", model, out, "--type", "Q8_0").code == 0
    assert engine.describe_picture(real_models.gemma3(), out)


def test_a_tower_in_the_models_own_file_has_a_device_and_a_line_in_the_budget(capsys, tmp_path):
    tower = [weights(f"v.blk.{il}.attn_q.weight", 256, 256) for il in range(4)]
    tower += [weights("v.patch_embd.weight", 14, 14, 3, 256), weights("mm.input_projection.weight", 256, 256)]
    head = [weights("token_embd.weight", N_EMBD, N_VOCAB), weights("output.weight", N_EMBD, N_VOCAB)]
    model = head_file("llama", [0, 1], 2, tensors=(*head, *tower)).write(tmp_path / "m.gguf")
    out = tmp_path / "plan.json"
    asked = ("--ram", "60MiB", "--vram", "5MiB", "--reserve", "0", "--ctx", "512", "--ubatch", "32", "--quick")
    ran = run(capsys, "plan", model, *asked, "-o", out)
    assert ran.code == 0, ran.err
    plan = read_plan(out)
    mine = [c for c in plan.choices if c.name.startswith(("v.", "mm."))]
    assert {(c.layer, c.device, c.share) for c in mine} == {(None, "gpu", 0.0)}
    n_bytes = sum(c.n_weights * 2 for c in mine)
    assert plan.memory["tower compute"] == int(0.3 * n_bytes)
    types = {c.name: c.type for c in mine}
    assert types["v.patch_embd.weight"] == types["mm.input_projection.weight"] == "F16"
    assert {layer.layer for layer in plan.layers} == {0, 1, None}  # its four layers are none of the model's two


def test_an_embedding_model_is_started_as_one(capsys, tmp_path):
    head = [weights("token_embd.weight", N_EMBD, N_VOCAB), weights("output.weight", N_EMBD, N_VOCAB)]
    keys = (pair("qwen3.pooling_type", U32, 3),)
    model = head_file("qwen3", [0, 1], 2, keys=keys, tensors=head).write(tmp_path / "m.gguf")
    ran = run(capsys, "plan", model, "--vram", "40MiB", "--ctx", "512", "--quick")
    assert ran.code == 0 and "llama-server -m OUT.gguf --embedding -ngl 99 -c 512" in ran.out, ran
    ran = run(capsys, "plan", model, "--size", "8MB", "--quick")
    assert ran.code == 0 and "llama-server -m OUT.gguf --embedding -ngl 99" in ran.out, ran
    assert "an embedding model" in run(capsys, "inspect", model).out
