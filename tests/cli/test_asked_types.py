"""What was asked for by name is given, or refused in one line: types, presets, lines of recipes, older importance."""

import numpy as np
import pytest
from commands import TINY, assert_failed, run
from conversions import half, normal, single, small_model
from gguf_files import STR, U32, File, Tensor, pair
from shapes import tiny as tiny_keys

from requant.container.source import open_source
from requant.formats import codec

BF16 = 30
Q, DOWN, ROUTER = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.ffn_gate_inp.weight"


def brain(name, shape, values=None, seed=0):
    values = np.asarray(normal(shape, seed) if values is None else values, "<f4")
    return Tensor(name, shape, BF16, data=(values.view("<u4") >> 16).astype("<u2").tobytes())


@pytest.fixture
def model(tmp_path):
    """A model in BF16 with a matrix that is too small to save anything, and a router in F32."""
    big, router = brain("output.weight", (256, 20_000), seed=3), single(ROUTER, (256, 8))
    file = small_model(brain(Q, (256, 12)), brain(DOWN, (512, 6), seed=1), big, router)
    return file.write(tmp_path / "model.gguf")


def types(path):
    with open_source(path) as source:
        return {t.name: t.format.name for t in source.tensors}


@pytest.mark.parametrize("asked", ["F16", "F32"])
def test_one_type_without_blocks_is_given_to_every_matrix(capsys, model, tmp_path, asked):
    out = tmp_path / "out.gguf"
    assert run(capsys, "convert", model, out, "--type", asked.lower()).code == 0
    matrices = dict.fromkeys((Q, DOWN, "output.weight"), asked)
    assert types(out) == matrices | {"output_norm.weight": "F32", ROUTER: "F32"}
    with open_source(model) as source, open_source(out) as made:
        for name in matrices:
            old, new = (codec.dequantize(s.read_rows(s.tensor(name)), s.tensor(name).format) for s in (source, made))
            assert np.allclose(old, new, rtol=2**-8, atol=1e-7)
    assert run(capsys, "convert", out, tmp_path / "back.gguf", "--type", "BF16").code == 0
    assert {types(tmp_path / "back.gguf")[name] for name in matrices} == {"BF16"}


@pytest.mark.parametrize("how", [["--type", "Q8_0"], ["--bpw", "17", "--quick"]], ids=["type", "budget"])
def test_a_pin_to_a_type_that_saves_nothing_is_given(capsys, model, tmp_path, how):
    out, pins = tmp_path / "out.gguf", ["--tensor-type", "ffn_down=f16", "--output-tensor-type", "f16"]
    assert run(capsys, "convert", model, out, *how, *pins).code == 0
    found = types(out)
    assert (found[DOWN], found["output.weight"]) == ("F16", "F16")


def test_a_pin_holds_with_losses_that_were_scored_before(capsys, model, tmp_path):
    losses, out = tmp_path / "losses.json", tmp_path / "out.gguf"
    assert run(capsys, "score", model, "--quick", "-o", losses).code == 0
    how = ["--losses", losses, "--bpw", "17", "--tensor-type", "output=f16"]
    assert run(capsys, "convert", model, out, *how).code == 0 and types(out)["output.weight"] == "F16"


def test_weights_that_the_type_cannot_hold_are_refused_and_never_become_infinite(capsys, tmp_path):
    values = normal((256, 12))
    values[5, 7] = -1e5
    path = small_model(brain(Q, (256, 12), values)).write(tmp_path / "model.gguf")
    ran = run(capsys, "convert", path, tmp_path / "out.gguf", "--type", "F16", "-q", "--json")
    assert_failed(ran, 8, f"'{Q}' as F16, row 5 has a weight of 99840, which overflows", f"--tensor-type '^{Q}$=bf16'")
    how = ["--type", "F16", "--tensor-type", f"{Q}=bf16", "--restart"]
    assert run(capsys, "convert", path, tmp_path / "out.gguf", *how).code == 0


def test_a_recipe_that_lists_every_tensor_is_taken(capsys, model, tmp_path):
    recipe, out = tmp_path / "recipe.txt", tmp_path / "out.gguf"
    lines = [r"^output_norm\.weight$=f32", rf"^{ROUTER}$=f32", rf"^{Q}$=q8_0", rf"^{DOWN}$=f16", "^output=q6_K"]
    recipe.write_text("\n".join(lines))
    assert run(capsys, "convert", model, out, "--type", "Q4_0", "--tensor-type-file", recipe).code == 0
    found = types(out)
    assert [found[name] for name in (ROUTER, Q, DOWN, "output.weight")] == ["F32", "Q8_0", "F16", "Q6_K"]
    recipe.write_text("\n".join([*lines, "zzz=q4_k", "output_norm=q8_0"]))
    ran = run(capsys, "convert", model, out, "--type", "Q4_0", "--tensor-type-file", recipe, "--force")
    assert_failed(ran, 2, "'zzz' matches no tensor", "output_norm.weight is F32: it is a vector, not a matrix")


@pytest.mark.parametrize(("asked", "given"), [("q4_k", "Q4_K_M"), ("Q5_K", "Q5_K_M"), ("q3_k", "Q3_K_M")])
def test_a_preset_by_its_short_name_is_the_one_that_llama_quantize_takes(capsys, tmp_path, asked, given):
    plans = [tmp_path / name for name in ("short.json", "long.json")]
    for path, name in zip(plans, (asked, given), strict=True):
        assert run(capsys, "plan", TINY, "--preset", name, "-o", path).code == 0
    short, long = (path.read_text().replace(asked, given) for path in plans)
    assert short == long and f"preset {given}" in short


def test_a_type_as_a_preset_names_the_option(capsys, tmp_path):
    for name in ("F16", "bf16", "TQ1_0"):
        ran = run(capsys, "convert", TINY, tmp_path / "out.gguf", "--preset", name)
        assert_failed(ran, 2, "--preset: ", f"it is one type: --type {name.upper()}")


@pytest.fixture
def predicting(tmp_path):
    """A model whose last layer is for multi-token prediction, and an imatrix of the other one."""
    keys = tiny_keys(nextn_predict_layers=("u32", 1), embedding_length=("u32", 256), feed_forward_length=("u32", 512))
    names = [f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_q", "attn_v", "ffn_up")]
    matrices = [half(name, (256, 256), seed=i) for i, name in enumerate([*names, "blk.1.nextn.eh_proj.weight"])]
    pairs = tuple(pair(key, U32, value) for key in keys if isinstance(value := keys.get(key), int))
    path = small_model(half("token_embd.weight", (256, 100)), *matrices, pairs=pairs).write(tmp_path / "model.gguf")
    entries = [
        Tensor(f"{name}.{kind}", shape, 0, data=np.full(shape[::-1], 3, "<f4").tobytes())
        for name in names[:3]
        for kind, shape in (("in_sum2", (256, 1)), ("counts", (1, 1)))
    ]
    imatrix = File((pair("general.type", STR, "imatrix"),), tuple(entries)).write(tmp_path / "imatrix.gguf")
    return path, imatrix


def test_tensors_that_an_imatrix_of_the_trunk_leaves_out_get_what_they_can_have(capsys, predicting, tmp_path):
    path, imatrix = predicting
    how = ["convert", path, tmp_path / "out.gguf", "--preset", "IQ2_XS", "--imatrix", imatrix]
    dry = run(capsys, *how, "--dry-run")
    assert dry.code == 0 and "does not cover 3 tensors whose type would need it: they are Q8_0" in " ".join(
        dry.out.split()
    )
    assert run(capsys, *how).code == 0
    found = types(tmp_path / "out.gguf")
    assert found["blk.0.attn_q.weight"] == "IQ2_XS"
    assert {found[f"blk.1.{part}.weight"] for part in ("attn_q", "ffn_up", "nextn.eh_proj")} == {"Q8_0"}
    like = ["convert", path, tmp_path / "like.gguf", "--like", tmp_path / "out.gguf", "--imatrix", imatrix]
    assert run(capsys, *like).code == 0 and types(tmp_path / "like.gguf") == found
