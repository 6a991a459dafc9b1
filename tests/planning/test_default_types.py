"""The types that are candidates without --types: by engine, device and rows."""

from __future__ import annotations

import pytest

from requant.planning.constraints import Constraints, Rule
from requant.planning.engines import ENGINES, SLOW_ON_CPU
from requant.planning.request import PlanRequest
from requant.planning.solver.problem import allowed_candidates
from requant.scoring.losses import Candidate, Losses, TensorLosses
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
