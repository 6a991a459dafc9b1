"""A model whose tensors do not fit its keys: what runs it refuses it in one line, every other command tells of it."""

import math

import pytest
from commands import assert_failed, names, run
from fuzz.gguf_mutants import value_fields
from fuzz.shape_mutants import INNER, TOKENS, WIDTH, sound
from gguf_files import U32, Tensor
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.model.forward.families import FAMILIES
from requant.model.tensor_shapes import describe_misfits

Q, NORM, BY_HEADS = "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "attention.head_count x key_length"


def tensor(name, shape, type_id=1):
    """Give a tensor another shape or type."""

    def edit(gguf):
        gguf.tensors = [[n, shape, type_id] if n == name.encode() else [n, s, t] for n, s, t in gguf.tensors]

    return edit


def key(name, value):
    """Set a key, in its place where it is there."""

    def edit(gguf):
        new = (gguf.pairs[0][1][2] + b"." + name.encode(), value_fields(U32, value))
        others = [pair for pair in gguf.pairs if pair[0] != new[0]]
        gguf.pairs = [*others, new]

    return edit


def renamed(old, new):
    """Give a tensor another name."""

    def edit(gguf):
        gguf.tensors = [[n.replace(old.encode(), new.encode()), s, t] for n, s, t in gguf.tensors]

    return edit


def without(name):
    """Take a tensor out."""

    def edit(gguf):
        gguf.tensors = [t for t in gguf.tensors if t[0] != name.encode()]

    return edit


# edit, and what must be said
MISFITS = {
    "norm one short": (tensor(NORM, (WIDTH - 1,)), f"got [{WIDTH - 1}], expected [{WIDTH}] by embedding_length"),
    "norm a matrix": (tensor(NORM, (WIDTH, 1)), f"got [{WIDTH}, 1], expected [{WIDTH}]"),
    "one row": (tensor(Q, (WIDTH, 1)), f"got [{WIDTH}, 1], expected [{WIDTH}, {WIDTH}] by {BY_HEADS}"),
    "3-D": (tensor(Q, (WIDTH, 8, 8)), f"got [{WIDTH}, 8, 8]"),
    "4-D": (tensor(Q, (WIDTH, 8, 4, 2)), f"got [{WIDTH}, 8, 4, 2]"),
    "scalar": (tensor(Q, ()), f"got [], expected [{WIDTH}, {WIDTH}]"),
    "no columns": (tensor(Q, (0, WIDTH)), "by embedding_length"),
    "no rows": (tensor(Q, (WIDTH, 0)), f"by {BY_HEADS}"),
    "no columns, huge rows": (tensor(Q, (0, 2**62)), f"got [0, {2**62}]"),
    "huge columns, no rows": (tensor(Q, (2**62, 0)), f"got [{2**62}, 0]"),
    "transposed": (tensor("blk.1.ffn_up.weight", (INNER, WIDTH)), "embedding_length and feed_forward_length"),
    "fewer tokens": (tensor("output.weight", (WIDTH, TOKENS - 1)), "by the vocabulary"),
    **{name: (tensor(Q, (WIDTH, WIDTH), i), f"(got {name},") for name, i in (("F64", 28), ("I8", 24), ("I32", 26))},
    "layers beyond the count": (
        key("block_count", 1),
        "layer that the model does not have (limit llama.block_count 1)",
    ),
    "layer 2^31": (renamed("blk.1.attn_k.", "blk.2147483648.attn_k."), "is of a layer that the model does not have"),
    "layers missing": (key("block_count", 3), "has no tensor 'blk.2.attn_norm.weight' (expected llama.block_count 3)"),
    "tensor missing": (without("blk.0.ffn_down.weight"), "has no tensor 'blk.0.ffn_down.weight'"),
    "wider": (key("embedding_length", 2 * WIDTH), f"expected [{2 * WIDTH}"),
    "other head": (key("attention.key_length", 8), "by attention.head_count x key_length"),
    "rotation odd": (key("rope.dimension_count", 7), "rope.dimension_count' is out of range (got 7, limit"),
    "rotation wide": (key("rope.dimension_count", 32), "an even number up to 16"),
}
# no engine takes these numbers, and no command but inspect, verify and diff
COUNTS = {
    "4 heads to 3": (key("attention.head_count_kv", 3), "4 heads to 3 KV heads; the engine refuses such a model"),
    "no heads": (key("attention.head_count", 0), "head_count' is out of range"),
    "513 layers": (key("block_count", 513), "block_count' is out of range"),
}
RUN = {
    "score": ["{model}", "--tokens", "{ids}", "--window", "32", "--types", "Q8_0", "--json"],
    "convert": ["{model}", "{out}", "--bpw", "12", "--tokens", "{ids}", "--window", "32", "--types", "Q8_0"],
    "plan": ["{model}", "--bpw", "12", "--tokens", "{ids}", "--window", "32", "--types", "Q8_0"],
    "evaluate": ["{model}", "--tokens", "{ids}", "--window", "32"],
    "calibrate": ["{model}", "-o", "{out}", "--tokens", "{ids}", "--window", "32"],
}
TOLD = {
    "inspect": ["{model}"],
    "score": ["{model}", "--quick", "--types", "Q8_0", "--json"],
    "plan": ["{model}", "--bpw", "12", "--quick", "--types", "Q8_0"],
    "convert": ["{model}", "{out}", "--type", "Q8_0"],
}


def write(folder, edit=lambda _: None):
    gguf = sound()
    edit(gguf)
    (folder / "m.gguf").write_bytes(b"".join(gguf.fields()))
    (folder / "ids.txt").write_text("1 2 3 4 " * 16)
    return folder / "m.gguf"


def go(capsys, folder, command, words):
    places = {"model": folder / "m.gguf", "ids": folder / "ids.txt", "out": folder / "out.gguf"}
    return run(capsys, command, *(word.format(**places) for word in words))


def test_a_sound_model_has_no_misfits_and_is_run(capsys, tmp_path):
    with open_source(write(tmp_path)) as source:
        assert describe_misfits(source) == []
    for command in ("evaluate", "plan"):
        assert go(capsys, tmp_path, command, RUN[command]).code == 0


@pytest.mark.parametrize("command", RUN)
def test_a_command_that_runs_the_model_refuses_a_misfit(capsys, tmp_path, command):
    for edit, said in (MISFITS | COUNTS).values():
        path, before = write(tmp_path, edit), names(tmp_path)
        ran = go(capsys, tmp_path, command, [*RUN[command], "-q"])
        assert_failed(ran, 3, f"{path}: ", said)
        assert names(tmp_path) == before


@pytest.mark.parametrize("command", TOLD)
def test_any_other_command_tells_of_a_misfit(capsys, tmp_path, command):
    for edit, said in MISFITS.values():
        write(tmp_path, edit)
        ran = go(capsys, tmp_path, command, TOLD[command])
        assert ran.code == 0 and "internal error" not in ran.err, ran
        told = [line for line in ran.err.splitlines() if said in line]
        assert told and all(line.startswith("requant: warning: ") for line in told), ran
        for name in names(tmp_path)[2:]:
            (tmp_path / name).unlink()


@pytest.mark.parametrize("command", TOLD)
def test_numbers_that_no_engine_takes_are_told_by_every_command(capsys, tmp_path, command):
    for edit, said in COUNTS.values():
        write(tmp_path, edit)
        ran = go(capsys, tmp_path, command, TOLD[command])
        assert (ran.code, said in ran.err) == (0 if command == "inspect" else 3, True), ran


def test_of_a_million_misfits_some_are_told(tmp_path):
    gguf = sound()
    gguf.tensors += [[b"blk.7.x%d.weight" % i, (1,), 0] for i in range(100)]
    (tmp_path / "m.gguf").write_bytes(b"".join(gguf.fields()))
    with open_source(tmp_path / "m.gguf") as source:
        assert len(describe_misfits(source)) == 21 and describe_misfits(source)[-1] == "80 more misfits like these"


def less(*names):
    """Take tensors out of a model of architectures.py."""

    def edit(model):
        found = [t.name for t in model.tensors]
        assert set(names) <= set(found)
        model.tensors = [t for t in model.tensors if t.name not in names]

    return edit


def more(name, *shape):
    """Give it another tensor."""
    return lambda model: model.tensors.append(Tensor(name, shape, data=b"\0" * 4 * math.prod(shape)))


def reshaped(name, *shape):
    """Give a tensor another shape."""

    def edit(model):
        less(name)(model)
        more(name, *shape)(model)

    return edit


def keyed(**keys):
    """Set keys, dots as __, or leave them out."""

    def edit(model):
        model.keys |= {key.replace("__", "."): value for key, value in keys.items()}
        model.keys = {key: value for key, value in model.keys.items() if value is not None}

    return edit


NO_ENGINE = "no engine runs such a model; score, plan and convert with --quick still work"
# model, edit, what is said: of one that no engine runs
BROKEN = [
    ("qwen35moe", less("blk.0.ssm_alpha.weight"), "has no tensor 'blk.0.ssm_alpha.weight'"),
    ("qwen35moe", less("blk.0.attn_norm.weight"), "has no tensor 'blk.0.attn_norm.weight'"),
    ("qwen35moe", less("blk.1.ffn_gate_inp.weight"), "has no tensor 'blk.1.ffn_gate_inp.weight'"),
    ("qwen35moe", reshaped("blk.0.ffn_down_shexp.weight", 16, 64), "'blk.0.ffn_gate_shexp.weight' has the wrong shape"),
    ("qwen35moe", keyed(full_attention_interval=2), "layer 1 attends or only feeds forward by the keys"),
    ("qwen35moe", keyed(ssm__group_count=0), "'blk.0.attn_qkv.weight' has the wrong shape"),
    ("gemma4-side", less("blk.1.attn_k.weight"), "has no tensor 'blk.1.attn_k.weight'"),
    ("gemma4-side", less("per_layer_model_proj.weight"), "has no tensor 'per_layer_model_proj.weight'"),
    ("gemma4-side", keyed(embedding_length_per_layer_input=8), "x embedding_length_per_layer_input"),
    ("gemma4-experts", less("blk.0.ffn_up.weight"), "has no tensor 'blk.0.ffn_up.weight'"),
    ("gpt-oss", less("blk.2.attn_sinks.weight"), "has no tensor 'blk.2.attn_sinks.weight'"),
    ("gpt-oss", less("output.weight"), "has no tensor 'output.weight'"),
    ("deepseek32", less("blk.3.attn_v_b.weight"), "has no tensor 'blk.3.attn_v_b.weight'"),
    ("deepseek2", keyed(attention__kv_lora_rank=16), "by attention.kv_lora_rank"),
    ("nemotron_h_moe", less("blk.0.ssm_in.weight"), "has no tensor 'blk.0.ssm_in.weight'"),
    ("nemotron_h_moe", less("blk.5.ffn_up_shexp.weight"), "has no tensor 'blk.5.ffn_up_shexp.weight'"),
    ("lfm2moe", less("blk.0.shortconv.in_proj.weight"), "has no tensor 'blk.0.shortconv.in_proj.weight'"),
    ("lfm2moe", keyed(attention__head_count_kv=[0, 2, 0, 0]), "layer 1 attends or only feeds forward by the keys"),
    ("falcon-h1", less("blk.0.ffn_norm"), "has no tensor 'blk.0.ffn_norm'"),
    ("kimi-linear", less("blk.0.ssm_g_b.weight"), "has no tensor 'blk.0.ssm_g_b.weight'"),
    ("bailingmoe3", reshaped("blk.2.attn_gate.weight", 64, 3), "'blk.2.attn_gate.weight' has the wrong shape"),
]
# of one that requant does not run, or of no model
REFUSED = [
    ("qwen35", more("blk.0.attn_extra.weight", 64, 64), "'blk.0.attn_extra.weight' is not one that the forward pass"),
    ("gpt-oss", more("blk.0.ffn_up.weight", 64, 96), "'blk.0.ffn_up.weight' is not one that the forward pass"),
    ("lfm2", more("blk.0.attn_q_norm.weight", 16), "'blk.0.attn_q_norm.weight' is not one that the forward pass"),
    ("nemotron_h", more("hc_base.weight", 64), "'hc_base.weight' is not one that the forward pass of 'nemotron_h'"),
    ("deepseek32", keyed(attention__indexer__top_k=16), "which is not run", "(got 32, limit 16); --window 16"),
    ("glm-dsa", keyed(attention__indexer__top_k=31), "which is not run", "(got 32, limit 31); --window 31"),
]
# of one whose keys contradict each other
CONTRADICTORY = [
    ("glm4moe", keyed(attention__head_count=0), "key 'glm4moe.attention.head_count' is out of range"),
    ("lfm2", keyed(attention__head_count=0), "key 'lfm2.attention.head_count' is out of range"),
    ("nemotron_h", keyed(attention__head_count=0), "key 'nemotron_h.attention.head_count' is out of range"),
    ("deepseek2", keyed(expert_group_count=3), "'deepseek2.expert_group_count' is no divisor of the experts"),
    ("deepseek2", keyed(expert_used_count=9), "'deepseek2.expert_used_count' is out of range"),
    ("gemma4-side", keyed(attention__shared_kv_layers=3), "of which only one has a sliding window"),
    ("step35", keyed(attention__sliding_window_pattern=[True, False]), "has the wrong number of items"),
    ("mistral4", keyed(attention__temperature_length=None), "temperature_length' is missing beside"),
]


def make(folder, name, edit):
    model = MAKERS[name](1)
    edit(model)
    (folder / "ids.txt").write_text("1 2 3 4 " * 16)
    return model.write(folder / "m.gguf")


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_broken_model_of_any_architecture_is_refused_in_one_line(capsys, tmp_path, command):
    for name, edit, *said in (*BROKEN, *REFUSED, *CONTRADICTORY):
        path = make(tmp_path, name, edit)
        ran = go(capsys, tmp_path, command, [*RUN[command], "-q"])
        assert_failed(ran, 3, f"{path}: ", *said, *([NO_ENGINE] if (name, edit, *said) in BROKEN else []))
        assert names(tmp_path) == ["ids.txt", "m.gguf"]


@pytest.mark.parametrize("command", ["score", "plan", "convert"])
def test_other_commands_that_run_it_refuse_it_too(capsys, tmp_path, command):
    for name, edit, said in BROKEN[::4]:
        make(tmp_path, name, edit)
        assert_failed(go(capsys, tmp_path, command, [*RUN[command], "-q"]), 3, said, NO_ENGINE)
    for name, edit, said in CONTRADICTORY[::2]:
        make(tmp_path, name, edit)
        assert_failed(go(capsys, tmp_path, command, [*RUN[command], "-q"]), 3, said, "still")


@pytest.mark.parametrize("command", TOLD)
def test_what_still_works_with_a_broken_model_works(capsys, tmp_path, command):
    for name, edit, said in BROKEN[1::4]:
        make(tmp_path, name, edit)
        ran = go(capsys, tmp_path, command, TOLD[command])
        assert ran.code == 0 and said in ran.err, ran
        for other in set(names(tmp_path)) - {"ids.txt", "m.gguf"}:
            (tmp_path / other).unlink()


@pytest.mark.parametrize("name", MAKERS)
def test_a_tensor_that_is_taken_out_is_missed_or_not_needed(tmp_path, name):
    """A layer of each kind: what the run does not miss, the engine does not either."""
    optional = ("attn_v", "output.", "bias", "exp_probs_b", "scale", "attn_gate", "shexp", "qk_norm")
    optional = (*optional, "indexer", "ssm_norm", "_norm", "ffn_gate_inp_shexp", "rope_freqs")
    whole, kinds = MAKERS[name](1), {}
    optional += ("ffn_gate_exps",) if "plain experts" in FAMILIES[whole.arch].feeds else ()
    for tensor in whole.tensors:
        layer, _, part = tensor.name.removeprefix("blk.").partition(".")
        kinds.setdefault(layer if tensor.name.startswith("blk.") else "", set()).add(part)
    firsts = {frozenset(parts): layer for layer, parts in reversed(kinds.items())}.values()
    for layer in firsts:
        for tensor in whole.tensors:
            if tensor.name.startswith(f"blk.{layer}." if layer else ("token", "output", "per_layer")):
                model = MAKERS[name](1)
                less(tensor.name)(model)
                with open_source(model.write(tmp_path / "m.gguf")) as source:
                    missed = any(
                        "has no tensor 'blk." in line or tensor.name in line for line in describe_misfits(source)
                    )
                assert missed or any(part in tensor.name for part in optional), tensor.name
