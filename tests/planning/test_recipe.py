import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import losses, model, tensor

from requant.errors import BadInput, UsageError
from requant.planning.constraints import Constraints, Rule
from requant.planning.plan import Plan
from requant.planning.recipe import tensor_type_file
from requant.planning.rules import read_tensor_types
from requant.planning.solver.problem import constrain
from requant.planning.solver.solve import solve


def as_llama_quantize(text, names):
    """What llama-quantize makes of the file: words, the first '=', lower-cased, first match wins."""
    rules = [word.split("=", 1) for word in text.split()]
    return {name: next((t.upper() for p, t in rules if re.search(p.lower(), name)), None) for name in names}


def plan_of(names_and_types):
    tensors = [tensor(name, {"Q4_K": 0.5, "Q6_K": 0.1}) for name in names_and_types]
    plan = solve(model(*tensors), Constraints())
    return replace(
        plan, choices=tuple(replace(c, type=t) for c, t in zip(plan.choices, names_and_types.values(), strict=True))
    )


def test_a_line_names_one_tensor():
    plan = plan_of({"blk.0.attn_q.weight": "Q4_K"})
    assert tensor_type_file(plan) == "^blk\\.0\\.attn_q\\.weight$=q4_k\n"


def test_tensors_that_stay_are_not_in_the_file():
    plan = solve(model(tensor("output_norm.weight", {}, (256,), source_type="F32", reason="no matrix")), Constraints())
    assert tensor_type_file(plan) == ""


@settings(deadline=None, max_examples=30)
@given(losses())
def test_llama_quantize_reads_back_the_plan(drawn):
    plan = solve(drawn, Constraints())
    free = {c.name: c.type for c in plan.choices if c.reason is None}
    assert as_llama_quantize(tensor_type_file(plan), free) == free


@settings(max_examples=200)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_odd_names_are_told_apart_or_refused(names):
    types = {name: ("Q4_K", "Q6_K")[i % 2] for i, name in enumerate(names)}
    try:
        text = tensor_type_file(plan_of(types))
    except UsageError:
        return
    assert as_llama_quantize(text, names) == types


def test_names_that_differ_in_case_only_are_refused():
    with pytest.raises(UsageError, match=r"cannot tell 'A.weight' and 'B.weight' apart"):
        tensor_type_file(plan_of({"A.weight": "Q4_K", "B.weight": "Q6_K"}))


def test_a_file_is_read_with_comments_and_blank_lines(tmp_path):
    path = tmp_path / "types.txt"
    path.write_text("# mine\n\nattn_q=q4_k # all\r\n  ffn=Q6_K output=q8_0\n")
    rules = [Rule("--tensor-type-file", p, t) for p, t in (("attn_q", "Q4_K"), ("ffn", "Q6_K"), ("output", "Q8_0"))]
    assert list(read_tensor_types(path)) == rules


def test_a_file_as_tools_and_people_write_it_is_read(tmp_path):
    path = tmp_path / "types.txt"
    path.write_bytes("\ufeff## Head\r\nATTN_Q = Q4_K\r\nffn[[:digit:]]=q6_K # best\r\nnorm= f32\r\n".encode())
    rules = [("ATTN_Q", "Q4_K"), ("ffn[[:digit:]]", "Q6_K"), ("norm", "F32")]
    assert [(rule.pattern, rule.type) for rule in read_tensor_types(path)] == rules


def test_a_plan_returns_through_its_file(tmp_path):
    drawn = model(*(tensor(f"blk.{i}.attn_q.weight", {"Q4_K": 0.5, "Q6_K": 0.1}) for i in range(3)))
    plan = solve(drawn, Constraints())
    path = tmp_path / "types.txt"
    path.write_text(tensor_type_file(plan))
    again: Plan = solve(drawn, Constraints(pins=read_tensor_types(path)))
    assert again.types() == plan.types()
    assert all(len(item.options) == 1 for item in constrain(drawn, Constraints(pins=read_tensor_types(path))).items)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a=Q4_K\nattn_q\n", r"types.txt: line 2: 'attn_q' is not REGEX=TYPE"),
        ("attn(=Q4_K", r"line 1: 'attn\(' is not a regular expression"),
        ("attn=Q4_Z", r"line 1: 'Q4_Z' is not a ggml type; did you mean"),
        ("# nothing\n", "holds no REGEX=TYPE"),
        (
            "a=iq5_ks\nb=q4_k\nc\n",
            r"line 1: 'iq5_ks' is a type of ik_llama.cpp, .*; line 3: 'c' is not REGEX=TYPE",
        ),
        ("x\n" * 30, r"line 10: 'x' is not REGEX=TYPE; and 20 more"),
    ],
)
def test_a_file_with_a_fault_is_refused_with_its_line(tmp_path, text, says):
    path = tmp_path / "types.txt"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read_tensor_types(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none.txt: no such file"):
        read_tensor_types(tmp_path / "none.txt")
