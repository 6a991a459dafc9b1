"""What pictures are drawn from: bars that add up, cells that hold every tensor, a curve that nothing beats."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.formats import by_name
from requant.planning.constraints import Limit
from requant.planning.plan import Choice, Mixture, Plan
from requant.report.view import NO_LOSS, budget_bars, layer_roles, least_loss_at, loss_curve, sample_curve

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
SHAPES = ((256, 4), (256, 8), (512, 8))


def choice(name, shape, type_name, loss, device="gpu"):
    n_bytes = by_name(type_name).n_bytes(math.prod(shape))
    parts = name.split(".")
    role, layer = (parts[2], int(parts[1])) if parts[0] == "blk" else (parts[0], None)
    return Choice(name, role, layer, shape, "F16", type_name, n_bytes, loss, 0.01, device)


@st.composite
def plans(draw):
    """A plan of up to four tensors, each with up to four types of any loss, and any of them chosen."""
    choices, candidates = [], {}
    for i in range(draw(st.integers(1, 4))):
        name, shape = f"blk.{i}.ffn_down.weight", draw(st.sampled_from(SHAPES))
        found = draw(st.lists(st.sampled_from(TYPES), min_size=2, max_size=4, unique=True))
        losses = {t: draw(st.floats(0, 1)) for t in found}
        candidates[name] = losses
        choices.append(choice(name, shape, found[0], losses[found[0]]))
    loss = math.fsum(c.loss for c in choices)
    return Plan("m.gguf", "00", "llama", "fisher", {}, (), {}, tuple(choices), loss, 0.0, candidates=candidates)


def allocations(plan):
    """(bytes, loss) of every way to give the tensors their types."""
    rows = [
        [(by_name(t).n_bytes(c.n_weights), loss) for t, loss in plan.candidates[c.name].items()] for c in plan.choices
    ]
    for picked in itertools.product(*rows):
        yield sum(size for size, _ in picked), math.fsum(loss for _, loss in picked)


@given(plans())
def test_no_allocation_beats_a_point_of_the_curve(plan):
    found = loss_curve(plan)
    every = list(allocations(plan))
    for point in found.points:
        best = min(loss for size, loss in every if size <= point.n_bytes)
        assert point.loss == pytest.approx(best, abs=1e-9)
    assert found.points[0].n_bytes == min(size for size, _ in every)
    assert found.points[-1].loss == pytest.approx(min(loss for _, loss in every), abs=1e-9)
    assert (found.chosen.n_bytes, found.chosen.loss) == (plan.n_bytes, plan.predicted_loss)


def test_a_curve_of_many_tensors_is_drawn_with_fewer_points_and_keeps_its_ends():
    choices, candidates = [], {}
    for i in range(400):
        name = f"blk.{i}.ffn_down.weight"
        candidates[name] = {t: (i + 1) * 4.0 ** -by_name(t).bpw for t in TYPES}
        choices.append(choice(name, (256, 8), "Q4_K", candidates[name]["Q4_K"]))
    plan = Plan("m", "00", "llama", "fisher", {}, (), {}, tuple(choices), 1.0, 0.0, candidates=candidates)
    found = loss_curve(plan)
    drawn = sample_curve(found, found.points[0].n_bytes, found.points[-1].n_bytes)
    assert 100 < len(drawn) < 400 < len(found.points)
    assert (drawn[0], drawn[-1]) == (found.points[0], found.points[-1])
    assert found.points[0].n_bytes == sum(by_name("Q2_K").n_bytes(c.n_weights) for c in choices)
    assert found.points[-1].n_bytes == sum(by_name("F16").n_bytes(c.n_weights) for c in choices)
    assert all(a.n_bytes < b.n_bytes and a.loss >= b.loss for a, b in itertools.pairwise(found.points))


def in_vram(**runtime):
    embedding = choice("token_embd.weight", (256, 16), "F16", 0.0, device="cpu")
    down = choice("blk.0.ffn_down.weight", (256, 8), "Q4_K", 0.25)
    candidates = {embedding.name: {"F16": 0.0, "Q8_0": 0.5}, down.name: {"Q4_K": 0.25, "F16": 0.0}}
    limit = Limit("--vram", 10_000, 3_000, device="gpu")
    memory = {"weights": 1152, "kv_cache": 2_000, "compute": 600, "reserve": 400}
    return Plan(
        "m.gguf",
        "00",
        "llama",
        "fisher",
        {},
        (limit,),
        memory,
        (embedding, down),
        0.25,
        0.0,
        runtime={"all_layers": True, "reference_type": "Q4_K", **runtime},
        candidates=candidates,
        mixtures=(Mixture("Q4_K_M", 5_000, 1_300, 0.4),),
    )


def test_in_vram_only_what_is_there_counts_and_the_rest_has_its_best():
    found = loss_curve(in_vram())
    assert found.pool == "VRAM"
    assert [p.n_bytes for p in found.points] == [1152, 4096]
    assert [p.loss for p in found.points] == [0.25, 0.0]
    assert (found.chosen.n_bytes, found.mixtures[0].n_bytes) == (1152, 1_300)


def test_over_two_devices_all_bytes_count():
    found = loss_curve(in_vram(experts_on_cpu=[0]))
    assert found.pool == "all tensors"
    assert (found.chosen.n_bytes, found.mixtures[0].n_bytes) == (1152 + 8192, 5_000)


def test_a_plan_of_one_type_has_no_curve():
    assert loss_curve(replace(in_vram(), candidates={})) is None


def test_the_parts_of_a_budget_add_up_to_it():
    (found,) = budget_bars(in_vram())
    assert sum(found.parts.values()) + found.free == found.budget == 10_000
    assert list(found.parts) == ["weights", "kv_cache", "compute", "reserve"]


def test_cells_hold_every_tensor_with_its_sensitivity_at_the_reference_type():
    outside, down = layer_roles(in_vram())
    assert (outside.layer, outside.role, outside.types, outside.bpw) == (None, "token_embd", ("F16",), 16.0)
    assert outside.sensitivity == 0.5, "no Q4_K was scored; the nearest is Q8_0"
    assert (down.layer, down.role, down.types, down.loss, down.sensitivity) == (0, "ffn_down", ("Q4_K",), 0.25, 0.25)


@given(plans(), st.floats(0, 1), st.floats(0, 1))
def test_the_drawn_curve_is_the_bound_on_a_logarithmic_axis_too(plan, one, other):
    found = loss_curve(plan)
    first, span = found.points[0].n_bytes, found.points[-1].n_bytes - found.points[0].n_bytes
    drawn = sample_curve(found, first + min(one, other) * span, first + max(one, other) * span)
    for dot in drawn:
        assert dot.loss == pytest.approx(least_loss_at(found, dot.n_bytes), rel=1e-9, abs=1e-12)
    for a, b in itertools.pairwise(drawn):
        middle = (a.n_bytes + b.n_bytes) // 2
        if b.loss > NO_LOSS * drawn[0].loss and b.n_bytes - a.n_bytes > 200:  # bytes are whole; 0 has no logarithm
            assert math.sqrt(a.loss * b.loss) == pytest.approx(least_loss_at(found, middle), rel=0.06)


@given(plans())
def test_no_allocation_lies_below_the_line_of_the_curve(plan):
    found = loss_curve(plan)
    for size, loss in allocations(plan):
        line = least_loss_at(found, size)
        assert line is None or loss >= line - 1e-9
    assert (
        least_loss_at(found, found.points[0].n_bytes - 1) is None
        and least_loss_at(found, found.points[-1].n_bytes + 1) is None
    )


def test_the_room_of_the_curve_is_what_the_budget_leaves_to_its_tensors():
    c = choice("blk.0.ffn_down.weight", SHAPES[0], "Q4_K", 0.1)
    plan = Plan(
        "m", "00", "llama", "fisher", {}, (), {}, (c,), 0.1, 0.0, candidates={c.name: {"Q4_K": 0.1, "Q8_0": 0.0}}
    )
    assert loss_curve(plan).room is None
    assert loss_curve(replace(plan, limits=(Limit("--size", 9000, 100), Limit("--ram", 10, 0, "cpu")))).room == 8900
    in_vram = replace(plan, limits=(Limit("--vram", 9000, 4000, "gpu"),), runtime={"all_layers": True})
    assert loss_curve(in_vram).room == 5000
