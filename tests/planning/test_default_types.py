"""The types that are candidates without --types: by engine, device and rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from strategies import model, tensor

from requant.errors import InfeasibleBudget, UsageError
from requant.planning.constraints import Constraints, Rule, size_limit
from requant.planning.engines import ENGINES, SLOW_ON_CPU, engine_named
from requant.planning.output_floor import solve_with_floor
from requant.planning.request import PlanRequest
from requant.planning.runnable import check_runnable
from requant.planning.solver.problem import allowed_candidates
from requant.scoring.losses import ALREADY_QUANTIZED, Candidate, Losses, TensorLosses
from requant.scoring.options import DEFAULT_TYPES

GRIDS = {"IQ3_S", "IQ3_XXS", "IQ2_S"}
WITHOUT_SUPER_BLOCK = {"IQ4_NL", "MXFP4", "Q2_0"}


def losses_of(n_per_row, types, source_type="F16"):
    name = "blk.0.ffn_up.weight"
    found = tuple(Candidate(t, 100 - i, 0.0) for i, t in enumerate((source_type, *types)))
    tensor = TensorLosses(name, "ffn_up", 0, (n_per_row, 8), source_type, 100, True, None, found, {})
    return Losses("m.gguf", "0" * 64, "llama", "dfix", None, None, (tensor,))


@pytest.mark.parametrize(
    ("request_", "has", "lacks"),
    [
        (PlanRequest(vram=1), GRIDS | WITHOUT_SUPER_BLOCK | {"IQ4_XS"}, {"NVFP4"}),
        (PlanRequest(bpw=4.0), GRIDS | WITHOUT_SUPER_BLOCK, {"NVFP4"}),
        (PlanRequest(vram=1, ram=1), GRIDS, set()),
        (PlanRequest(ram=1), {"IQ4_XS", "IQ4_NL", "MXFP4"}, GRIDS | {"Q2_0"}),
        (PlanRequest(ram=1, engine="llama.cpp-cpu"), {"IQ4_XS", "IQ4_NL", "MXFP4"}, GRIDS | {"Q2_0", "NVFP4"}),
        (PlanRequest(vram=1, engine="llama.cpp-blackwell"), GRIDS | {"NVFP4", "MXFP4"}, set()),
        (PlanRequest(vram=1, engine="ollama"), GRIDS | {"MXFP4"}, {"Q2_0", "NVFP4"}),
        (PlanRequest(vram=1, engine="sharpinference"), set(), GRIDS | WITHOUT_SUPER_BLOCK),
        (PlanRequest(ram=1, pins=(Rule("--tensor-type", "x", "IQ3_S"),)), {"IQ3_S"}, {"IQ2_S"}),
    ],
)
def test_candidates_are_the_types_that_the_engine_runs_well(request_, has, lacks):
    found = set(request_.types_to_score)
    assert found >= {*DEFAULT_TYPES} | has and not found & lacks


def test_every_candidate_of_an_engine_runs_on_its_devices():
    for engine in ENGINES.values():
        devices = ("gpu", "cpu") if engine.has_gpu else ("cpu",)
        assert not {t for d in devices for t in engine.cannot.get(d, ())} & {*engine.candidates}
        assert engine.has_gpu or not SLOW_ON_CPU & {*engine.candidates}


@pytest.mark.parametrize(("n_per_row", "kept"), [(576, True), (896, True), (2688, True), (2880, True), (4096, False)])
def test_two_bits_without_a_super_block_are_for_rows_that_none_divides(n_per_row, kept):
    losses, odd = losses_of(n_per_row, ["IQ4_NL", "Q2_0"]), PlanRequest(bpw=3.0).odd_rows
    (found,) = allowed_candidates(losses, Constraints(odd_rows=odd))
    assert [c.type for c in found] == ["F16", "IQ4_NL", *(["Q2_0"] if kept else [])]
    for asked in (PlanRequest(types=("Q2_0",)), PlanRequest(pins=(Rule("--tensor-type", "x", "Q2_0"),))):
        assert not asked.odd_rows
    (found,) = allowed_candidates(losses_of(n_per_row, ["IQ4_NL"], "Q2_0"), Constraints(odd_rows=odd))
    assert [c.type for c in found] == ["Q2_0", "IQ4_NL"]  # what the source has, stays possible


def test_the_cpu_multiplies_with_no_slow_type_unless_it_is_asked_for():
    (tensor,) = losses_of(4096, ["IQ3_S"]).tensors
    held = Constraints(not_on_cpu=PlanRequest(vram=1, ram=1).not_on_cpu)
    assert held.can_run(tensor, "IQ3_S", "gpu") and not held.can_run(tensor, "IQ3_S", "cpu")
    assert held.can_run(tensor, "Q3_K", "cpu") and held.can_run(tensor, "IQ4_XS", "cpu")
    table = Constraints(not_on_cpu=held.not_on_cpu, shares={tensor.name: 0.0})
    assert table.can_run(tensor, "IQ3_S", "cpu")  # rows are only looked up
    (own,) = losses_of(4096, ["Q2_K"], "IQ3_S").tensors
    assert held.can_run(own, "IQ3_S", "cpu")
    assert not PlanRequest(vram=1, ram=1, types=("IQ3_S",)).not_on_cpu and not PlanRequest(bpw=4.0).not_on_cpu


EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
BY_TYPE = {"Q2_0": 0.01, "MXFP4": 1e-3, "IQ4_NL": 1e-4, "Q8_0": 1e-6}


def small_model(*tensors, method):
    return replace(model(*tensors, tensor("blk.0.ffn_up.weight", {}, (576, 64), reason="x")), method=method)


@pytest.mark.parametrize("name", [EMBEDDING, OUTPUT])
@pytest.mark.parametrize(
    ("method", "n_per_row", "has_it"),
    [
        ("dfix", 576, False),
        ("cfix", 576, False),
        ("fisher", 576, True),
        ("kfac", 576, True),
        ("", 576, True),
        ("fisher", 512, False),
    ],
)
def test_without_gradients_the_output_gets_two_bits_only_by_name(name, method, n_per_row, has_it):
    losses = small_model(tensor(name, BY_TYPE, (n_per_row, 64)), method=method)
    for request in (PlanRequest(bpw=3.0), PlanRequest(vram=1), PlanRequest(vram=1, ram=1)):
        found, _ = allowed_candidates(losses, Constraints(odd_rows=request.odd_rows))
        assert ("Q2_0" in {c.type for c in found}) == has_it
    for asked in (PlanRequest(types=("Q2_0",)), PlanRequest(pins=(Rule("--tensor-type", name, "Q2_0"),))):
        found, _ = allowed_candidates(losses, Constraints(odd_rows=asked.odd_rows))
        assert "Q2_0" in {c.type for c in found}


def test_a_table_that_is_not_the_output_may_have_two_bits():
    both = tensor(EMBEDDING, BY_TYPE, (576, 64)), tensor(OUTPUT, BY_TYPE, (576, 64))
    embedding, output, _ = allowed_candidates(
        small_model(*both, method="dfix"), Constraints(odd_rows=PlanRequest(bpw=3.0).odd_rows)
    )
    assert "Q2_0" in {c.type for c in embedding} and "Q2_0" not in {c.type for c in output}


def test_a_budget_that_only_two_bits_for_the_output_would_meet_says_so():
    losses = small_model(tensor(EMBEDDING, BY_TYPE, (576, 64)), method="dfix")
    least, odd = 576 * 64 * 2 + 576 * 64 * 17 // 32 - 1, PlanRequest(bpw=3.0).odd_rows
    within = Constraints((size_limit(least, 0, 32),), odd_rows=odd)
    with pytest.raises(
        InfeasibleBudget, match=r"name Q2_0 in --types: without gradients token_embd.weight gets it only"
    ):
        solve_with_floor(losses, within)
    named = replace(within, types=("Q2_0",), odd_rows=PlanRequest(types=("Q2_0",)).odd_rows)
    assert solve_with_floor(losses, named).plan.types()[EMBEDDING] == "Q2_0"
    assert solve_with_floor(replace(losses, method="fisher"), within).plan.types()[EMBEDDING] == "Q2_0"


@pytest.mark.parametrize(("n_bytes", "is_rough"), [(2.7, True), (3.5, False), (5.0, False)])
def test_a_rough_output_beside_copied_tensors_is_noted(n_bytes, is_rough):
    """No mixture fits beside them, so no floor holds; the note is the warning."""
    by_type = {"Q2_K": 0.01, "Q3_K": 1e-3, "Q4_K": 1e-4}
    copied = tensor("blk.0.ffn_up.weight", {}, (256, 6400), source_type="Q8_0", reason=ALREADY_QUANTIZED)
    losses = replace(model(tensor(EMBEDDING, by_type, (256, 64)), copied), method="dfix")
    limit = size_limit(copied.n_bytes + int(256 * 64 * n_bytes / 8), 0, 32)
    plan = solve_with_floor(losses, Constraints((limit,))).plan
    assert (plan.types()[EMBEDDING] == "Q2_K") == is_rough
    assert any("too small to keep the output" in note for note in plan.notes) == is_rough
    named = solve_with_floor(losses, Constraints((limit,), types=("Q2_K",))).plan
    assert not any("too small to keep the output" in note for note in named.notes)


@pytest.mark.parametrize(
    ("engine", "source_type"), [("ik_llama.cpp", "NVFP4"), ("sharpinference", "MXFP4"), ("sharpinference", "NVFP4")]
)
@pytest.mark.parametrize("n", [1, 3])
def test_types_that_the_engine_does_not_run_are_named(engine, source_type, n):
    names = [f"blk.{i}.ffn_up_exps.weight" for i in range(n)]
    copied = [tensor(x, {}, (2880, 8), source_type=source_type, reason=ALREADY_QUANTIZED) for x in names]
    losses, profile = model(tensor("blk.0.attn_q.weight", {"Q8_0": 0.1}, (2880, 8)), *copied), engine_named(engine)
    with pytest.raises(UsageError) as caught:
        check_runnable(losses, Constraints(), profile)
    message = str(caught.value)
    assert f"{source_type}, which {engine} does not run" in message and names[0] in message
    assert "--allow-requantize" in message and "--engine (llama.cpp-cuda" in message
    assert ("3 tensors" if n > 1 else "tensor blk") in message
    check_runnable(losses, Constraints(), engine_named("llama.cpp-cuda"))
    freed = model(*(tensor(x, {"IQ4_NL": 0.1, "Q4_0": 0.2}, (2880, 8), source_type=source_type) for x in names))
    check_runnable(freed, Constraints(), profile)
    with pytest.raises(UsageError, match="loosen --tensor-type"):
        pinned = Constraints(pins=(Rule("--tensor-type", "exps", source_type),))
        check_runnable(freed, pinned, profile)
