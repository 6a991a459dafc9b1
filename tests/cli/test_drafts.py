"""Draft heads, multi-token prediction and projectors: converted by their own rules, counted in the target's budget."""

import pytest
from commands import TINY, assert_failed, run
from draft_heads import N_EMBD, N_VOCAB, eagle3, projector, weights
from gguf_files import ARCHITECTURE, STR, U32, File, pair

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
