import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from strategies import losses, model, tensor

from requant.errors import BadInput, InfeasibleBudget
from requant.planning.constraints import Limit, Use
from requant.planning.plan import EDITED, Choice, Plan, read_plan
from requant.scoring.losses import Losses, read_losses

LOSSES = model(
    tensor("blk.0.attn_q.weight", {"Q4_K": 0.25, "Q8_0": 1e-4}, skipped={"IQ2_XS": "needs an importance matrix"}),
    tensor("output_norm.weight", {}, (256,), source_type="F32", reason="1-D"),
)


def choice(name="blk.0.attn_q.weight", type_name="Q4_K", n_bytes=576, **changes):
    return replace(Choice(name, "attn_q", 0, (256, 4), "F16", type_name, n_bytes, 0.25, 0.07, "gpu"), **changes)


def plan(**changes):
    budget = {"limits": {"--vram": "1.00 KiB"}}
    made = Plan(
        "model.gguf",
        "0" * 64,
        "llama",
        "cfix",
        budget,
        (Limit("--vram", 1024, 100, "gpu"),),
        {"kv_cache": 100},
        (choice(),),
        0.25,
        1e-7,
        "milp",
    )
    return replace(made, **changes)


def edited(text, *path, value):
    raw = json.loads(text)
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(raw)


@settings(deadline=None, max_examples=50)
@given(losses())
def test_losses_survive_json(drawn):
    assert Losses.from_json(drawn.to_json()) == drawn


def test_plan_survives_json_and_the_text_is_reproducible():
    assert Plan.from_json(plan().to_json()) == plan()
    assert Plan.from_json(plan().to_json()).to_json() == plan().to_json()


def test_text_has_one_candidate_per_line_and_is_ascii():
    text = replace(LOSSES, source="mod\u00e8le \udcff.gguf").to_json()
    assert text.isascii() and text.endswith("}\n")
    assert sum('"loss": 0.25' in line for line in text.splitlines()) == 1
    assert Losses.from_json(text).source == "mod\u00e8le \udcff.gguf"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), "requant.plan/1", "another kind of file"),
        (("arch",), 3, "arch must be a string"),
        (("metod",), "cfix", "metod is not a key"),
        (("tensors", 0, "candidates", 0, "loss"), -1e-9, r"tensors\[0\].candidates\[0\].loss must be a finite number"),
        (("tensors", 0, "candidates", 0, "loss"), True, "loss must be a finite number"),
        (("tensors", 0, "candidates", 0, "loss"), None, "loss must be a finite number"),
        (("tensors", 0, "candidates", 0, "n_bytes"), 577, "n_bytes of Q4_K is wrong"),
        (("tensors", 0, "candidates", 0, "n_bytes"), 576.0, "n_bytes must be a whole number"),
        (("tensors", 0, "candidates", 0, "type"), "Q4_Z", "not a ggml type.*did you mean"),
        (("tensors", 0, "candidates", 0, "type"), "Q8_0", "no type twice"),
        (("tensors", 0, "candidates", 2, "type"), "BF16", "source's own type"),
        (("tensors", 0, "candidates"), {}, "must be a list"),
        (("tensors", 0, "shape"), [255, 4], "cannot be Q4_K"),
        (("tensors", 0, "n_bytes"), 1, "n_bytes is not that of F16"),
        (("tensors", 1, "name"), "blk.0.attn_q.weight", "appears twice"),
        (("tensors", 0, "on_gpu"), 1, "must be true or false"),
    ],
)
def test_losses_with_a_fault_are_refused_with_its_place(path, value, says):
    with pytest.raises(BadInput, match=says):
        Losses.from_json(edited(LOSSES.to_json(), *path, value=value))


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "1e999", "1" + "0" * 5000])
def test_a_loss_that_is_not_finite_is_refused(figure):
    with pytest.raises(BadInput, match=r"not valid JSON|finite"):
        Losses.from_json(LOSSES.to_json().replace('"loss": 0.25', f'"loss": {figure}'))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"schema": 1, "schema": 1}', "[" * 100_000])
def test_what_is_no_losses_file_is_refused(text):
    with pytest.raises(BadInput):
        Losses.from_json(text)


def test_a_missing_key_is_named():
    raw = json.loads(LOSSES.to_json())
    del raw["tensors"][0]["role"]
    with pytest.raises(BadInput, match=r"x.json: tensors\[0\].role is missing"):
        Losses.from_json(json.dumps(raw), "x.json")


def test_names_from_a_file_are_escaped_in_errors():
    raw = edited(LOSSES.to_json(), "tensors", 0, "skipped", value={"\x1b[2J": 3})
    with pytest.raises(BadInput) as caught:
        Losses.from_json(raw)
    assert str(caught.value).isprintable()


def test_the_hash_follows_types_and_source_and_nothing_else():
    same = plan(predicted_loss=0.5, notes=("a",), source="b.gguf", choices=(choice(loss=1.0, notes=("x",)),))
    assert same.sha256() == plan().sha256()
    assert plan(choices=(choice(type_name="Q4_0"),)).sha256() != plan().sha256()
    assert plan(header_sha256="2" * 64).sha256() != plan().sha256()


def test_a_type_edited_by_hand_gets_its_size_and_loses_the_prediction():
    changed = Plan.from_json(edited(plan().to_json(), "choices", 0, "type", value="q5_k"))
    assert (changed.choices[0].type, changed.choices[0].n_bytes) == ("Q5_K", 704)
    assert changed.predicted_loss is None and changed.gap is None and changed.notes == (EDITED,)
    assert Plan.from_json(changed.to_json()) == changed


def test_a_type_edited_by_hand_to_one_that_was_scored_has_the_loss_of_that():
    scored = plan(
        candidates={choice().name: {choice().type: choice().loss, "Q5_K": 0.125}}, predicted_loss=choice().loss
    )
    changed = Plan.from_json(edited(scored.to_json(), "choices", 0, "type", value="Q5_K"))
    assert changed.predicted_loss == changed.choices[0].loss == 0.125
    assert changed.gap is None and changed.choices[0].rmse == 0.0
    back = Plan.from_json(edited(changed.to_json(), "choices", 0, "type", value="Q4_K"))
    assert back.predicted_loss == 0.25


def test_a_cosmetic_edit_keeps_the_prediction():
    assert Plan.from_json(edited(plan().to_json(), "notes", value=["mine"])).predicted_loss == 0.25


def test_an_edit_over_the_limit_is_refused():
    with pytest.raises(InfeasibleBudget, match="over its --vram"):
        Plan.from_json(edited(plan().to_json(), "choices", 0, "type", value="Q8_0"))
    larger = json.loads(edited(plan().to_json(), "choices", 0, "type", value="Q8_0"))
    larger["limits"][0]["budget"] = 1188
    assert Plan.from_json(json.dumps(larger)).n_bytes == 1088


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("choices", 0, "n_bytes"), 1, "not what its type and shape give"),
        (("choices", 0, "shape"), [128, 8], "cannot be Q4_K"),
        (("limits", 0, "alignment"), 0, "alignment"),
        (("limits",), None, "limits must be a list"),
        (("gap",), -1, "gap must be a finite number"),
    ],
)
def test_plans_with_a_fault_are_refused(path, value, says):
    with pytest.raises(BadInput, match=says):
        Plan.from_json(edited(plan().to_json(), *path, value=value))


def test_a_plan_over_its_limit_cannot_be_made():
    with pytest.raises(InfeasibleBudget) as caught:
        plan(choices=(choice(type_name="Q8_0", n_bytes=1088),))
    assert (caught.value.budget, caught.value.smallest) == (1024, 1188)


def test_limits_round_up_and_count_only_the_gpu_where_told():
    limit = Limit("--vram", 1024, device="gpu", alignment=128)
    on_gpu = [limit.cost(Use(n, "gpu", False, 0, 0.0)) for n in (1, 128, 129)]
    assert [*on_gpu, limit.cost(Use(129, "cpu", True, 0, 0.0))] == [128, 128, 256, 0]


def test_files_are_read_and_their_absence_named(tmp_path):
    (tmp_path / "l.json").write_text(LOSSES.to_json())
    (tmp_path / "p.json").write_text(plan().to_json())
    (tmp_path / "b.json").write_bytes(b"\xff{}")
    assert read_losses(tmp_path / "l.json") == LOSSES
    assert read_plan(tmp_path / "p.json") == plan()
    with pytest.raises(BadInput, match="not UTF-8"):
        read_plan(tmp_path / "b.json")
    with pytest.raises(BadInput, match="no such file"):
        read_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("budget", "ctx", "64\nSYSTEM x", "budget.ctx must be a whole number"),
        ("budget", "ctx", [64], "budget.ctx must be a whole number"),
        ("budget", "cache_type_k", "q8_0\nSYSTEM x", "budget.cache_type_k is not a ggml type"),
        ("runtime", "engine", "\x1b[31mbash", r"runtime.engine is not known .got \\x1b\[31mbash"),
        ("runtime", "engine", 5, "runtime.engine must be a string"),
        ("runtime", "n_gpu_layers", "\x1b[31m", "runtime.n_gpu_layers must be a whole number"),
        ("runtime", "experts_on_cpu", "12", "runtime.experts_on_cpu must be a list"),
        ("runtime", "experts_on_cpu", ["0|.*"], r"runtime.experts_on_cpu\[0\] must be a whole number"),
        ("runtime", "draft", ["x"], "runtime.draft must be a string"),
        ("runtime", "reference_type", "\x1b[31m", "runtime.reference_type is not a ggml type"),
    ],
)
def test_what_starts_an_engine_is_checked_when_a_plan_is_read(part, key, value, says):
    with pytest.raises(BadInput, match=says):
        Plan.from_json(edited(plan().to_json(), part, value={key: value}))
