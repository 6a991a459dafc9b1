"""Larger budgets never make a plan worse: over batches, output floors, cache types, files, losses and RAM."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import model, tensor

from requant.api.plan import make_plans
from requant.api.session import open_session
from requant.container.source import open_source
from requant.errors import InfeasibleBudget
from requant.model.engine_settings import EngineSettings
from requant.model.memory import memory_for
from requant.planning.constraints import Constraints, bpw_limit, size_limit, vram_limit
from requant.planning.output_floor import solve_with_floor
from requant.planning.planner import Planner
from requant.planning.request import PlanRequest
from requant.planning.rules import AUTO
from requant.planning.ubatch import BATCHES, batch_memories, largest_batch, weights_room
from requant.report.text.table import plans_table
from requant.scoring.candidates import survey_tensors
from requant.scoring.losses import Losses
from requant.scoring.options import CalibrationOptions

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-llama-f16.gguf"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
MIB = 2**20
SLACK = 1 + 2e-6  # the gap at which the solver ends
NEWCOMERS = (12, 13, 15, 16, 20, 24)  # MiB of the tiny model, of which some larger ones once had worse plans


@pytest.fixture(scope="module")
def source():
    with open_source(TINY) as opened:
        yield opened


def drawn(source, seed, method):
    """Losses that fall fourfold per bit, times a factor for each tensor."""
    draw = random.Random(seed)
    tensors = []
    for t in survey_tensors(source, types=TYPES):
        scale = 10 ** draw.gauss(0, 1)
        bits = [(c, 8 * c.n_bytes / t.n_weights) for c in t.candidates]
        priced = (replace(c, loss=scale * 4.0**-b * (c.type != t.source_type)) for c, b in bits)
        tensors.append(replace(t, candidates=tuple(priced)))
    caches = {"Q8_0/Q8_0": 10 ** draw.uniform(-7, -3), "Q4_0/Q4_0": 10 ** draw.uniform(-5, -1)}
    return Losses(source.name, source.header_sha256, "llama", method, None, None, tuple(tensors), caches=caches)


def solve_all(planner, requests):
    """Return the plans of rising budgets; None where none fits."""
    found = []
    for request in requests:
        try:
            found.append(planner.solve(request))
        except InfeasibleBudget:
            found.append(None)
    return found


def check_never_worse(plans, figure=lambda plan: plan.minimized):
    for less, more in itertools.combinations(plans, 2):
        if less is not None:
            assert more is not None, "a larger budget has no plan"
            assert figure(more) <= figure(less) * SLACK + 1e-12


BUDGETS = st.lists(st.integers(7 * MIB, 40 * MIB), min_size=3, max_size=4).map(sorted)
METHODS = st.sampled_from(["fisher", "dfix"])


@given(st.integers(0, 99), METHODS, BUDGETS, st.sampled_from([256, 512]))
@settings(max_examples=6, deadline=None)
def test_more_vram_is_never_worse(source, seed, method, budgets, n_ctx):
    planner = Planner(source, drawn(source, seed, method))
    plans = solve_all(planner, [PlanRequest(vram=n, n_ctx=n_ctx) for n in budgets])
    check_never_worse(plans, lambda plan: plan.predicted_loss)


@given(st.integers(0, 99), METHODS, BUDGETS)
@settings(max_examples=3, deadline=None)
def test_more_vram_is_never_worse_with_the_cache_types_open(source, seed, method, budgets):
    planner = Planner(source, drawn(source, seed, method))
    plans = solve_all(planner, [PlanRequest(vram=n, cache_type_k=AUTO, cache_type_v=AUTO) for n in budgets])
    check_never_worse(plans, lambda plan: plan.total_loss)


@given(st.integers(0, 99), METHODS, BUDGETS, st.floats(0.05, 0.5))
@settings(max_examples=2, deadline=None)
def test_more_vram_and_more_loss_never_take_more_bytes(source, seed, method, budgets, most):
    planner = Planner(source, drawn(source, seed, method))
    check_never_worse(solve_all(planner, [PlanRequest(vram=n, max_loss=most) for n in budgets]))
    check_never_worse(solve_all(planner, [PlanRequest(vram=budgets[0], max_loss=most * k) for k in (1, 2, 4)]))


@given(st.integers(0, 99), METHODS, st.lists(st.integers(3 * MIB, 20 * MIB), min_size=3, max_size=4).map(sorted))
@settings(max_examples=3, deadline=None)
def test_a_larger_file_is_never_worse(source, seed, method, sizes):
    planner = Planner(source, drawn(source, seed, method))
    check_never_worse(solve_all(planner, [PlanRequest(size=n) for n in sizes]))


@pytest.mark.parametrize("ram", [4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["fisher", "dfix"])
def test_ram_never_makes_a_plan_worse(source, method, ram):
    planner = Planner(source, drawn(source, 1, method))
    budgets = [n * MIB for n in ((24, 30) if ram == 4 else (9, 16, 40))]
    alone = solve_all(planner, [PlanRequest(vram=n, n_ctx=512) for n in budgets])
    both = solve_all(planner, [PlanRequest(vram=n, ram=ram * MIB, n_ctx=512) for n in budgets])
    for less, more in zip(alone, both, strict=True):
        assert more.predicted_loss <= less.predicted_loss * SLACK + 1e-12
    for less, more in itertools.pairwise(both):
        assert more.minimized * (1 - more.gap) <= less.minimized * SLACK


@given(st.integers(0, 999), st.integers(2, 20), st.booleans())
@settings(max_examples=3, deadline=None)
def test_a_floor_of_the_output_never_makes_a_larger_budget_worse(seed, n_rows, two_limits):
    draw = random.Random(seed)
    by_type = {name: 10.0 ** -(k + draw.random()) for k, name in enumerate(TYPES)}
    others = [tensor(f"blk.{i}.ffn_up.weight", {t: 50 * x for t, x in by_type.items()}, (256, 64)) for i in range(6)]
    losses = replace(model(tensor("token_embd.weight", by_type, (256, 20 * n_rows)), *others), method="dfix")
    values = []
    for bpw in range(280, 800, 26):
        limits = (bpw_limit(bpw / 100, losses), *([size_limit(bpw * 300, 100)] if two_limits else []))
        try:
            values.append(solve_with_floor(losses, Constraints(limits)).value)
        except InfeasibleBudget:
            assert not values
    assert all(more <= less * SLACK for less, more in itertools.pairwise(values))


def test_a_higher_floor_waits_until_it_costs_no_loss():
    by_type = {"Q2_K": 1e-3, "Q3_K": 3e-4, "Q4_K": 1e-4, "Q5_K": 1e-5, "Q6_K": 1e-6, "Q8_0": 1e-7}
    others = [tensor(f"blk.{i}.ffn_up.weight", {t: 100 * x for t, x in by_type.items()}, (256, 64)) for i in range(12)]
    losses = replace(model(tensor("token_embd.weight", by_type, (256, 400)), *others), method="dfix")
    at = {x: solve_with_floor(losses, Constraints((bpw_limit(x, losses),))) for x in (3.18, 3.2, 3.6)}
    assert at[3.2].value == at[3.18].value and "too small to keep the output" in at[3.2].plan.notes[-1]
    assert at[3.2].plan.limits[0].budget > at[3.18].plan.limits[0].budget
    assert at[3.6].plan.choices[0].type == "Q3_K" and at[3.6].value < at[3.2].value


@given(st.integers(0, 2**24), st.integers(0, 2**22), st.integers(0, 2**24))
def test_the_room_for_weights_never_falls_and_the_batch_takes_a_small_share(source, vram, more, smallest):
    planner = Planner(source, drawn(source, 0, "fisher"))
    memories = batch_memories(planner._hyperparameters(), memory_for(planner._hyperparameters(), EngineSettings(512)))
    room = weights_room(memories, vram, smallest)
    assert weights_room(memories, vram + more, smallest) >= room
    assert room >= min(smallest, memories[0].weights_limit(vram))
    assert largest_batch(memories, vram, room).weights_limit(vram) >= room
    if room > smallest:
        assert memories[0].weights_limit(vram) - room <= room * (len(BATCHES) - 1) / 20 + 1


def test_a_larger_batch_is_taken_only_where_it_costs_nothing_and_its_price_is_told(source):
    planner = Planner(source, drawn(source, 1, "fisher"))
    plan = planner.best(PlanRequest(vram=20 * MIB, n_ctx=512))
    own = plan.budget["ubatch"]
    assert own < 512 and f"batches of {own}" in plan.notes[-1]
    usual = planner.solve(PlanRequest(vram=20 * MIB, n_ctx=512, n_ubatch=512))
    assert f"-ub 512 would cost {usual.predicted_loss - plan.predicted_loss:.3g} of loss" in plan.notes[-1]
    for n in [n for n in BATCHES if n > own]:
        larger = planner.solve(PlanRequest(vram=20 * MIB, n_ctx=512, n_ubatch=n))
        assert larger.predicted_loss > plan.predicted_loss
    assert planner.best(PlanRequest(vram=60 * MIB, n_ctx=512)).budget["ubatch"] == 512


@pytest.mark.parametrize("vram", [9, 12, 30])
def test_a_speed_limit_changes_no_batch(source, vram):
    planner = Planner(source, drawn(source, 1, "fisher"))
    plain, fast = solve_all(planner, [PlanRequest(vram=vram * MIB, min_speed=x) for x in (None, 1.0)])
    assert fast.budget["ubatch"] == plain.budget["ubatch"] and fast.types() == plain.types()


def test_a_cache_counts_towards_a_loss_to_keep(source):
    losses = replace(drawn(source, 1, "fisher"), caches={"Q8_0/Q8_0": 0.02})
    request = PlanRequest(vram=40 * MIB, cache_type_k=AUTO, cache_type_v=AUTO, max_loss=0.1)
    plan = Planner(source, losses).best(request)
    assert plan.cache_loss == 0.02 and plan.total_loss <= 0.1
    assert plan.used(next(x for x in plan.limits if x.option == "--max-loss")) >= 0.02e12


def test_a_table_of_budgets_falls_and_has_the_batch(source, monkeypatch):
    losses, given = drawn(source, 2, "dfix"), [n * MIB for n in NEWCOMERS]
    session = open_session(source, PlanRequest(vram=given[0]), CalibrationOptions())
    best = Planner.best

    def poor(self, request):
        """End the search for one budget early, with a plan of another budget."""
        return best(self, replace(request, vram=9 * MIB) if request.vram == given[-1] else request)

    monkeypatch.setattr(Planner, "best", poor)
    plans, _ = make_plans(replace(session, losses=losses), given)
    check_never_worse(plans)
    assert "better than what was found" in plans[-1].notes[-1] and plans[-1].budget["vram"] == given[-1]
    assert next(x.budget for x in plans[-1].limits if x.option == "--vram") == given[-1]
    head, *lines = plans_table(plans, given, 200).splitlines()
    assert "-ub" in head.split() and all(
        str(p.budget["ubatch"]) in line.split() for p, line in zip(plans, lines, strict=True)
    )


def test_a_limit_of_vram_without_an_alignment_is_reduced_to_the_byte():
    by_type = {"Q2_K": 1e-3, "Q6_K": 1e-6, "Q8_0": 1e-7}
    losses = replace(model(tensor("token_embd.weight", by_type, (256, 64))), method="dfix")
    values = [solve_with_floor(losses, Constraints((vram_limit(n, n),))).value for n in range(8000, 20000, 500)]
    assert values == sorted(values, reverse=True)
