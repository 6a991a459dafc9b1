import pytest
from strategies import model, tensor

from requant.errors import UsageError
from requant.planning.asked_types import add_asked_types
from requant.planning.constraints import (
    Constraints,
    Limit,
    Rule,
    Timing,
    Use,
    bpw_limit,
    compile_pattern,
    loss_limit,
    ram_limit,
    size_limit,
    speed_limit,
    vram_limit,
)
from requant.planning.rule_matches import check_rules
from requant.planning.rules import parse_rule, parse_type, parse_types
from requant.planning.solver.problem import constrain
from requant.planning.solver.solve import solve
from requant.scoring.losses import TOO_SMALL

SOME = {"Q2_K": 3.0, "Q4_K": 0.5, "Q6_K": 0.1}
LOSSES = model(
    tensor("token_embd.weight", SOME, on_gpu=False),
    tensor("blk.0.attn_q.weight", SOME),
    tensor("blk.0.attn_k.weight", SOME, (256, 2)),
    tensor("blk.1.attn_q.weight", SOME),
    tensor("blk.1.attn_k.weight", SOME, (256, 2)),
    tensor("blk.1.ffn_down.weight", {"Q4_0": 0.5}, (96, 4), skipped={"Q4_K": "its rows are too short"}),
    tensor("output_norm.weight", {}, (256,), source_type="F32", reason="it is a vector, not a matrix"),
)


def types_of(name, constraints):
    problem = constrain(LOSSES, constraints)
    return next(
        [o.types[0] for o in item.options]
        for item in problem.items
        if name in [LOSSES.tensors[m].name for m in item.members]
    )


def pins(*texts):
    return Constraints(pins=tuple(parse_rule(t) for t in texts))


def test_without_rules_every_tensor_has_all_its_candidates_and_kept_ones_have_one():
    problem = constrain(LOSSES, Constraints())
    assert [len(item.options) for item in problem.items] == [4, 4, 4, 4, 4, 2, 1]
    assert problem.notes == ()


def test_the_first_pin_that_matches_decides_and_a_pin_is_lower_cased():
    constraints = pins(r"BLK\.0\.ATTN_Q=q6_K", "attn=Q4_K")
    assert types_of("blk.0.attn_q.weight", constraints) == ["Q6_K"]
    assert types_of("blk.1.attn_q.weight", constraints) == ["Q4_K"]
    assert types_of("token_embd.weight", constraints) == ["Q2_K", "Q4_K", "Q6_K", "F16"]


def test_a_pin_that_never_decides_is_reported():
    assert "'attn_q=Q4_K' decides nothing" in constrain(LOSSES, pins("attn=Q6_K", "attn_q=Q4_K")).notes[0]


def test_a_pin_leaves_tensors_alone_that_stay_as_they_are():
    assert types_of("output_norm.weight", pins("token|norm=Q4_K")) == ["F32"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_v=Q4_K", "matches no tensor; did you mean attn_"),
        ("zzzzz=Q4_K", "matches no tensor; names look like token_embd.weight"),
        ("norm=Q4_K", "matches only tensors that stay"),
        ("ffn_down=Q4_K", "blk.1.ffn_down.weight, Q4_K cannot be used: its rows are too short"),
        ("ffn_down=Q5_K", "cannot be used: rows of 96 are no whole blocks of 256"),
        ("attn_q=Q5_K", "was not scored: score again with it in --types"),
    ],
)
def test_a_pin_that_cannot_be_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        constrain(LOSSES, pins(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_q", "is not REGEX=TYPE"),
        ("=Q4_K", "is not REGEX=TYPE"),
        ("attn(=Q4_K", "is not a regular expression"),
        ("[[:digits:]]=Q4_K", "is not a regular expression"),
        ("[[=a=]]=Q4_K", "is not a regular expression"),
        ("attn_q=Q4_K,attn_k=Q6_K", "is more than one rule; write each alone, without commas"),
        ("a{9999999999999}=Q4_K", "is not a regular expression"),
        ("attn_q=Q4_K_M", "'Q4_K_M' is not a ggml type; it is a mixture of types: did you mean Q4_K?"),
        ("attn_q=iq5_ks", "'iq5_ks' is a type of ik_llama.cpp, .*; of as many bits are Q5_0, Q5_1, Q5_K"),
        ("attn_q=q4_0_r8", "'q4_0_r8' is a type of ik_llama.cpp, .*; did you mean Q4_0?"),
        ("attn_q=", "is not a ggml type"),
        ("attn_q=zzz", "known are F32, F16"),
    ],
)
def test_a_rule_that_is_none_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        parse_rule(text)


@pytest.mark.parametrize(
    ("pattern", "found", "others"),
    [
        (r"blk\.[[:digit:]]\.", "blk.7.", "blk.x."),
        (r"^[^[:digit:]]+$", "attn", "attn1"),
        (r"^[[:alpha:]_]+$", "attn_q", "attn.q"),
        (r"^[a[:digit:]-]+$", "a-7", "b"),
        (r"^[][:digit:]]+$", "]7", "["),
        (r"^[[:lower:]][[:upper:]]$", "aB", "Ab"),
        (r"^[[:alnum:]]$", "Z", "_"),
        (r"^[[:xdigit:]]$", "f", "g"),
        (r"^[[:punct:]]$", "[", "a"),
        (r"^[[:space:]]$", "\t", "t"),
        (r"^[[:blank:]]$", " ", "\n"),
        (r"^[[:w:]]$", "_", "-"),
        (r"^[[:print:]]$", "~", "\x7f"),
        (r"^[[:graph:]]$", "~", " "),
        (r"^[[:cntrl:]]$", "\x7f", "a"),
        (r"\[:digit:]", "[:digit:]", "7"),
        (r"^[:digit:]+$", "git:", "7"),
    ],
)
def test_the_classes_of_posix_are_those_of_llama_quantize(pattern, found, others):
    compiled = compile_pattern(pattern, "--tensor-type")
    assert compiled.search(found) and not compiled.search(others)


def test_a_pin_of_the_type_that_tensors_keep_decides_nothing_and_is_no_error():
    problem = constrain(LOSSES, pins("^output_norm=F32", "norm=f32", "attn_q=Q4_K"))
    assert not problem.notes and types_of("blk.0.attn_q.weight", pins("norm=F32", "attn_q=Q4_K")) == ["Q4_K"]
    check_rules(LOSSES, pins("norm=F32"))


def test_all_rules_that_cannot_be_used_are_told_at_once():
    for check in (constrain, check_rules):
        with pytest.raises(UsageError) as caught:
            check(LOSSES, pins("zzz=Q4_K", "attn_q=Q4_K", "norm=Q8_0", "yyy=Q4_K"))
        said = str(caught.value)
        assert "'zzz' matches no tensor" in said and "'yyy' matches no tensor" in said
        assert (
            "'norm=Q8_0' matches only tensors that stay as they are; output_norm.weight is F32: it is a vector" in said
        )
        with pytest.raises(UsageError, match=r"; and more like these$"):
            check(LOSSES, pins(*(f"zz{i}=Q4_K" for i in range(1000))))


@pytest.mark.parametrize(
    ("source_type", "asked"), [("BF16", "F16"), ("F16", "BF16"), ("BF16", "F32"), ("Q4_K", "Q8_0"), ("Q4_K", "F16")]
)
def test_a_type_that_saves_nothing_is_had_by_name(source_type, asked):
    losses = model(
        tensor("blk.0.attn_q.weight", {}, (256, 4), source_type=source_type), tensor("norm", {}, reason="1-D")
    )
    constraints = pins(f"attn_q={asked.lower()}")
    found = solve(add_asked_types(losses, constraints), constraints)
    assert found.types() == {"blk.0.attn_q.weight": asked, "norm": "F16"} and found.predicted_loss == 0
    assert found.notes == ("1 tensor has a type that was not scored there, as asked for by name; its loss counts as 0",)


def test_a_matrix_that_is_only_too_small_is_had_by_name():
    small = tensor("blk.0.attn_q.weight", {}, (256, 4), reason=TOO_SMALL)
    for constraints in (pins("attn_q=Q4_K"), pins("blk=q4_k")):
        assert solve(add_asked_types(model(small), constraints), constraints).types() == {small.name: "Q4_K"}
    constraints = pins("attn_q=f16")
    assert solve(add_asked_types(model(small), constraints), constraints).types() == {small.name: "F16"}


def test_types_that_a_tensor_cannot_have_are_not_had_by_name_either():
    losses = model(tensor("blk.0.attn_k_b.weight", {}, (96, 4), source_type="Q4_0"))
    with pytest.raises(UsageError, match="rows of 96 are no whole blocks of 256"):
        solve(add_asked_types(losses, pins("attn_k_b=Q6_K")), pins("attn_k_b=Q6_K"))


def test_a_rule_may_hold_an_equals_sign():
    assert parse_rule("blk(?=.0)=q4_k") == Rule("--tensor-type", "blk(?=.0)", "Q4_K")


def test_control_characters_of_a_rule_are_escaped():
    with pytest.raises(UsageError) as caught:
        constrain(LOSSES, pins("\x1b[2J=Q4_K"))
    assert str(caught.value).isprintable()


def test_type_lists_are_canonical():
    assert parse_types("q4_k, Q6_K,q4_K") == ("Q4_K", "Q6_K")
    with pytest.raises(UsageError, match="--output-tensor-type: 'Q44'"):
        parse_type("Q44", "--output-tensor-type")


def test_types_restrict_every_tensor_that_can_have_one_of_them():
    constraints = Constraints(types=("Q4_K", "Q6_K"))
    assert types_of("blk.0.attn_q.weight", constraints) == ["Q4_K", "Q6_K"]
    assert types_of("blk.1.ffn_down.weight", constraints) == ["Q4_0", "F16"]
    assert "blk.1.ffn_down.weight can have none of --types" in constrain(LOSSES, constraints).notes[0]


def test_types_that_were_not_scored_are_refused():
    with pytest.raises(UsageError, match=r"Q8_0 was not scored.*the losses have Q2_K"):
        constrain(LOSSES, Constraints(types=("Q4_K", "Q8_0")))


def test_a_floor_drops_fewer_bits_but_never_the_copy():
    floors = (parse_rule("attn=Q4_K", "--min-type"), parse_rule("attn_q=Q6_K", "--min-type"))
    assert types_of("blk.0.attn_q.weight", Constraints(floors=floors)) == ["Q4_K", "Q6_K", "F16"]
    low = model(tensor("blk.0.attn_q.weight", {"Q2_K": 3.0}, source_type="Q3_K"))
    problem = constrain(low, Constraints(floors=floors[:1]))
    assert [o.types[0] for o in problem.items[0].options] == ["Q3_K"]


def test_a_floor_above_all_types_is_refused():
    floors = (parse_rule("attn_q=Q8_0", "--min-type"),)
    with pytest.raises(UsageError, match=r"--min-type 'attn_q=Q8_0' leaves blk.0.attn_q.weight none of Q4_K"):
        constrain(LOSSES, Constraints(floors=floors, types=("Q4_K",)))


def members(*groups):
    problem = constrain(LOSSES, Constraints(groups=groups))
    return [item.members for item in problem.items], problem.notes


def test_a_group_ties_what_shares_its_captures():
    assert members(r"blk\.(\d+)\.attn")[0] == [(0,), (1, 2), (3, 4), (5,), (6,)]
    assert members("attn_q")[0] == [(0,), (1, 3), (2,), (4,), (5,), (6,)]


def test_groups_that_overlap_merge():
    assert members(r"blk\.(\d+)\.attn", "attn_q")[0] == [(0,), (1, 2, 3, 4), (5,), (6,)]


def test_a_group_that_ties_nothing_is_reported():
    assert members(r"blk\.(\d+)\.attn_q")[1] == (r"--group 'blk\.(\d+)\.attn_q' ties no two tensors together",)


def test_a_group_offers_what_all_members_can_have_at_summed_cost_and_loss():
    problem = constrain(LOSSES, Constraints((Limit("--size", 10**6, alignment=32),), groups=(r"blk\.(0)\.attn",)))
    option = next(o for o in problem.items[1].options if o.types[0] == "Q2_K")
    assert (option.n_bytes, option.loss, option.costs) == (336 + 168, 6.0, (352 + 192,))


def test_a_group_without_a_common_type_is_refused():
    constraints = Constraints(groups=("blk",), pins=(parse_rule("ffn=Q4_0"),))
    with pytest.raises(UsageError, match=r"--group 'blk': blk.0.attn_q.weight, .* no allowed type in common"):
        constrain(LOSSES, constraints)


def test_embedding_and_output_options_come_before_pins():
    constraints = Constraints(embedding_type="Q6_K")
    assert types_of("token_embd.weight", constraints) == ["Q6_K"]
    both = Constraints(pins=(parse_rule("token|attn=Q4_K"),), embedding_type="Q6_K")
    assert types_of("token_embd.weight", both) == ["Q6_K"]
    with pytest.raises(UsageError, match=r"no output.weight; the embedding is the output too"):
        constrain(LOSSES, Constraints(output_type="Q6_K"))


def test_limits_count_what_their_option_means():
    vram, size = vram_limit(1000, 600), size_limit(5000, 700)
    on_gpu, on_cpu = (Use(33, device, device == "cpu", 5, 1e-9) for device in ("gpu", "cpu"))
    assert (vram.other, vram.device, vram.cost(on_gpu), vram.cost(on_cpu)) == (400, "gpu", 128, 0)
    assert (size.other, size.cost(on_cpu), size.cost(on_gpu)) == (700, 64, 64)
    ram, speed, loss = ram_limit(1000, 7), speed_limit(50, Timing(1e9, 1e9, 11)), loss_limit(0.5)
    assert (ram.other, ram.cost(on_gpu), ram.cost(on_cpu)) == (7, 0, 64)
    assert (speed.budget, speed.other, speed.cost(on_cpu)) == (20_000_000, 11, 5)
    assert loss.budget == 500_000_000_000 and 1000 <= loss.cost(on_cpu) <= 1001


def test_bpw_is_over_all_tensors_and_never_rounded_up():
    n_weights = sum(t.n_weights for t in LOSSES.tensors)
    assert bpw_limit(4.1, LOSSES).budget == int(4.1 * n_weights // 8)
    assert bpw_limit(4.1, LOSSES).bpw == pytest.approx(4.1, abs=0.01)
    for wrong in (0, -1, float("nan"), 65):
        with pytest.raises(UsageError, match="--bpw"):
            bpw_limit(wrong, LOSSES)


def test_the_request_describes_what_was_given_and_nothing_else():
    constraints = Constraints((vram_limit(1000, 600),), pins=(parse_rule("attn=Q4_K"),), types=("Q4_K",))
    assert constraints.describe() == {"vram": 1000, "tensor_type": ["attn=Q4_K"], "types": ["Q4_K"]}
