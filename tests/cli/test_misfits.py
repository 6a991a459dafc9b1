"""A model whose tensors do not fit its keys: what runs it refuses it in one line, every other command tells of it."""

import pytest
from commands import assert_failed, names, run
from fuzz.gguf_mutants import value_fields
from fuzz.shape_mutants import INNER, TOKENS, WIDTH, sound
from gguf_files import U32

from requant.container.source import open_source
from requant.model.forward.architecture import FAMILIES
from requant.model.tensor_shapes import SHAPES, describe_misfits

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


def test_the_forward_pass_runs_no_architecture_without_a_table():
    assert FAMILIES.keys() <= SHAPES.keys()


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
