import pytest
from strategies import model, tensor

from requant.planning.constraints import Constraints, bpw_limit, size_limit, vram_limit
from requant.planning.output_floor import with_output_floor
from requant.planning.rules import parse_rule
from requant.planning.solver.solve import solve

BY_TYPE = {"Q2_K": 1e-3, "Q4_K": 1e-4, "Q5_K": 1e-5, "Q6_K": 1e-6, "Q8_0": 1e-7}  # the output seems to matter little


def drawn(name="output.weight", **options):
    others = [tensor(f"blk.{i}.ffn_up.weight", {t: 1e6 * x for t, x in BY_TYPE.items()}, (256, 64)) for i in range(8)]
    return model(tensor("token_embd.weight", {}, reason="x"), tensor(name, BY_TYPE, (256, 64), **options), *others)


def output_type(losses, constraints):
    return solve(with_output_floor(losses, constraints), constraints).choices[1].type


@pytest.mark.parametrize(("bpw", "least"), [(3.3, "Q6_K"), (4.9, "Q6_K"), (5.0, "Q6_K")])
def test_the_output_is_not_below_the_stock_type_of_the_plans_size(bpw, least):
    losses = drawn()
    constraints = Constraints((bpw_limit(bpw, losses),))
    assert solve(losses, constraints).choices[1].type == "Q2_K"
    assert output_type(losses, constraints) == least


def test_other_tensors_and_losses_from_gradients_are_left_alone():
    losses = drawn("blk.9.ffn_up.weight")
    constraints = Constraints((bpw_limit(3, losses),))
    assert with_output_floor(losses, constraints) is losses
    measured = drawn().__class__(**{f: getattr(drawn(), f) for f in drawn().__slots__} | {"method": "fisher"})
    assert with_output_floor(measured, constraints) is measured


def test_without_a_limit_nothing_is_guarded():
    assert with_output_floor(drawn(), Constraints()) == drawn()


@pytest.mark.parametrize("wish", [{"pins": (parse_rule("^OUTPUT=Q2_K"),)}, {"output_type": "Q2_K"}])
def test_a_pinned_output_is_the_users_business(wish):
    losses = drawn()
    assert output_type(losses, Constraints((bpw_limit(4, losses),), **wish)) == "Q2_K"


def test_types_that_the_guard_forbids_but_the_user_wants_are_kept():
    losses = drawn()
    constraints = Constraints((bpw_limit(4.8, losses),), types=("Q2_K", "Q4_K"))
    assert output_type(losses, constraints) in ("Q2_K", "Q4_K")


def test_a_source_below_the_guard_is_copied():
    losses = drawn(source_type="Q5_0")
    kept = with_output_floor(losses, Constraints((size_limit(10**6, 0),))).tensors[1]
    assert [c.type for c in kept.candidates] == ["Q8_0", "Q5_0"]
    assert "never" in kept.skipped["Q2_K"] or "not below" in kept.skipped["Q2_K"]


def test_the_size_counts_only_what_the_limit_is_over():
    losses = drawn(on_gpu=False)
    n_gpu = 8 * 256 * 64 + 1024
    generous = Constraints((vram_limit(2 * n_gpu, n_gpu),))  # 8 bits for each weight on the GPU
    kept = with_output_floor(losses, generous).tensors[1].candidates
    assert [c.type for c in kept] == ["Q6_K", "Q8_0", "F16"]


def test_a_tied_embedding_is_guarded_as_an_untied_one_is_given():
    losses = model(tensor("token_embd.weight", BY_TYPE, (256, 64)), *drawn().tensors[2:])
    kept = with_output_floor(losses, Constraints((bpw_limit(4.9, losses),))).tensors[0]
    assert [c.type for c in kept.candidates] == ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"]
