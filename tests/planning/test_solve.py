import ctypes
import itertools
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TYPES, losses, model, tensor

from requant.common.units import format_size, parse_size
from requant.errors import InfeasibleBudget
from requant.planning.constraints import Constraints, Limit, bpw_limit, size_limit, vram_limit
from requant.planning.plan import Plan
from requant.planning.rules import parse_rule
from requant.planning.solver import highs, knapsack
from requant.planning.solver.problem import constrain
from requant.planning.solver.solve import REL_GAP, _round_up, solve


def brute_force(problem):
    """The least loss of all combinations that fit, or None."""
    best = None
    limits = problem.constraints.limits
    for picked in itertools.product(*(item.options for item in problem.items)):
        if all(x.other + sum(o.costs[k] for o in picked) <= x.budget for k, x in enumerate(limits)):
            loss = math.fsum(o.loss for o in picked)
            best = loss if best is None else min(best, loss)
    return best


def between(problem, share, k):
    """A budget that lies `share` of the way from the smallest to the largest plan."""
    low = sum(min(o.costs[k] for o in item.options) for item in problem.items)
    high = sum(max(o.costs[k] for o in item.options) for item in problem.items)
    return low + int(share * (high - low))


def request_of(drawn, shares, groups=()):
    probes = (Limit("--size", 0, alignment=32), Limit("--vram", 0, device="gpu", alignment=128))[: len(shares)]
    problem = constrain(drawn, Constraints(probes, groups=groups))
    limits = [between(problem, share, k) for k, share in enumerate(shares)]
    made = (size_limit(limits[0] + 500, 500), *(vram_limit(x + 100, x) for x in limits[1:]))
    return Constraints(made, groups=groups)


@settings(deadline=None, max_examples=120)
@given(losses(max_tensors=6), st.lists(st.floats(0, 1.05), min_size=1, max_size=2), st.booleans())
def test_plan_is_the_best_that_fits(drawn, shares, tied):
    groups = ("attn",) if tied and any(t.reason is None and "attn" in t.name for t in drawn.tensors) else ()
    constraints = request_of(drawn, shares, groups)
    best = brute_force(constrain(drawn, constraints))
    plan = solve(drawn, constraints)
    assert plan.predicted_loss == pytest.approx(best, rel=2 * REL_GAP, abs=0)
    assert plan.predicted_loss * (1 - plan.gap) <= best * (1 + 1e-12)  # the stated bound is a bound
    assert all(plan.used(limit) <= limit.budget for limit in constraints.limits)


def random_model(n_tensors, seed, types=TYPES):
    draw = random.Random(seed)
    made = []
    for i in range(n_tensors):
        scale = 10 ** draw.gauss(-3, 1)
        shape = (256, draw.choice([16, 64, 64, 100, 333]))
        by_type = {t: scale * 4.0 ** -(2 + k) * draw.lognormvariate(0, 0.2) for k, t in enumerate(types)}
        made.append(tensor(f"blk.{i // 4}.{('attn_q', 'attn_v', 'ffn_up', 'ffn_down')[i % 4]}.weight", by_type, shape))
    return model(*made)


def by_dynamic_programming(problem, room):
    """The least loss within `room` bytes, over every reachable number of bytes."""
    unit = math.gcd(*(o.costs[0] for item in problem.items for o in item.options))
    best = np.full(room // unit + 1, np.inf)
    best[0] = 0.0
    for item in problem.items:
        following = np.full_like(best, np.inf)
        for option in item.options:
            steps = option.costs[0] // unit
            if steps < len(best):
                shifted = best[: len(best) - steps] + option.loss
                np.minimum(following[steps:], shifted, out=following[steps:])
        best = following
    return float(best.min())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.02, 0.2, 0.4])
def test_plan_of_a_medium_model_is_what_dynamic_programming_finds(seed, share):
    drawn = random_model(24, seed)
    constraints = request_of(drawn, [share])
    plan = solve(drawn, constraints)
    limit = constraints.limits[0]
    best = by_dynamic_programming(constrain(drawn, constraints), limit.budget - limit.other)
    assert plan.predicted_loss == pytest.approx(best, rel=2 * REL_GAP)
    assert plan.gap <= 2 * REL_GAP


@pytest.mark.parametrize("seed", range(3))
def test_random_allocation_is_never_better(seed):
    drawn = random_model(80, seed)
    constraints = request_of(drawn, [0.25, 0.2])
    plan, problem = solve(drawn, constraints), constrain(drawn, constraints)
    draw = random.Random(seed)
    for _ in range(30):
        picked = [min(item.options, key=lambda o: o.n_bytes) for item in problem.items]
        for place in draw.sample(range(len(picked)), len(picked)):
            trial = [*picked[:place], draw.choice(problem.items[place].options), *picked[place + 1 :]]
            if all(x.other + sum(o.costs[k] for o in trial) <= x.budget for k, x in enumerate(constraints.limits)):
                picked = trial
        assert math.fsum(o.loss for o in picked) >= plan.predicted_loss * (1 - plan.gap)


def test_the_same_question_has_the_same_answer():
    drawn = random_model(60, 1)
    constraints = request_of(drawn, [0.3])
    assert solve(drawn, constraints).to_json() == solve(drawn, constraints).to_json()


def test_more_budget_never_means_more_loss():
    drawn = random_model(30, 2)
    found = [solve(drawn, request_of(drawn, [s / 20])).predicted_loss for s in range(21)]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(found))
    assert found[-1] == 0.0


def test_among_equal_tensors_the_earlier_one_gets_more(monkeypatch):
    answer = knapsack.Answer((0, 1, 0, 1), 1.2, "as some other version of HiGHS might")
    monkeypatch.setattr(knapsack, "choose", lambda *_: answer)
    drawn = model(*(tensor(f"blk.{i}.attn_q.weight", {"Q4_K": 0.5, "Q8_0": 0.1}) for i in range(4)))
    plan = solve(drawn, Constraints((size_limit(2 * 576 + 2 * 1088, 0),)))
    assert [c.type for c in plan.choices] == ["Q8_0", "Q8_0", "Q4_K", "Q4_K"]


def test_equal_loss_goes_to_fewer_bytes_and_then_to_the_earlier_type():
    drawn = model(tensor("blk.0.attn_q.weight", {"Q8_0": 0.0, "IQ4_NL": 0.0, "Q4_0": 0.0, "Q4_K": 0.0}))
    assert solve(drawn, Constraints()).choices[0].type == "IQ4_NL"


def test_a_better_type_of_more_bytes_but_more_loss_is_never_taken():
    drawn = model(tensor("blk.0.attn_q.weight", {"Q4_K": 0.1, "Q5_K": 0.3}))
    assert solve(drawn, Constraints((size_limit(1000, 0),))).choices[0].type == "Q4_K"


def test_without_limits_everything_is_copied_at_no_loss():
    plan = solve(random_model(5, 0), Constraints())
    assert all(c.copied for c in plan.choices) and (plan.predicted_loss, plan.gap) == (0.0, 0.0)


def test_pinned_loss_does_not_blur_the_rest():
    # 1e-6 of the total would be more than all that is left to decide
    small = random_model(24, 3)
    large = tensor("output.weight", {"Q2_K": 1e6}, (256, 16))
    drawn = model(*small.tensors, large)
    constraints = request_of(small, [0.2])
    free = solve(small, constraints).predicted_loss
    limit = constraints.limits[0]
    limits = (size_limit(limit.budget + 84 * 16, 500),)
    plan = solve(drawn, Constraints(limits, pins=(parse_rule("^output=Q2_K"),)))
    assert math.fsum(c.loss for c in plan.choices[:-1]) == pytest.approx(free, rel=1e-5)


def test_groups_share_a_type_and_types_survive_the_plan_file():
    drawn = random_model(24, 4)
    constraints = request_of(drawn, [0.2], (r"blk\.(\d+)\.attn",))
    plan = solve(drawn, constraints)
    for a, b in zip(plan.choices[::4], plan.choices[1::4], strict=True):
        assert a.type == b.type
    assert Plan.from_json(plan.to_json()) == plan


def test_gpu_bytes_and_all_bytes_are_limited_apart():
    names = [f"blk.{i}.ffn_up.weight" for i in range(6)]
    by_type = {"Q2_K": 4.0, "Q4_K": 1.0, "Q8_0": 0.01}
    drawn = model(*(tensor(n, by_type, (256, 64), on_gpu=i < 3) for i, n in enumerate(names)))
    q2, q8 = 84 * 64, 272 * 64
    plan = solve(drawn, Constraints((vram_limit(3 * q2 + 200, 3 * q2), size_limit(3 * q2 + 3 * q8, 0))))
    assert [c.type for c in plan.choices] == ["Q2_K"] * 3 + ["Q8_0"] * 3


def test_an_infeasible_vram_says_what_is_needed_and_that_is_enough():
    drawn = random_model(200, 0)
    with pytest.raises(InfeasibleBudget) as caught:
        solve(drawn, Constraints((vram_limit(500_000, 100_000),), memory={"kv_cache": 300_000, "compute": 100_000}))
    error = caught.value
    assert "--vram 488.28 KiB (500 KB) is" in str(error) and "KV cache 292.97 KiB" in str(error)
    suggested = parse_size(str(error).split("raise it to ")[1].split(",")[0])
    assert suggested >= error.smallest
    assert solve(drawn, Constraints((vram_limit(suggested, suggested - 400_000),))).n_bytes <= suggested
    assert solve(drawn, Constraints((vram_limit(error.smallest, error.smallest - 400_000),)))
    with pytest.raises(InfeasibleBudget):
        solve(drawn, Constraints((vram_limit(error.smallest - 1, error.smallest - 1 - 400_000),)))


def test_an_infeasible_bpw_is_answered_in_bpw():
    drawn = random_model(10, 0)
    with pytest.raises(
        InfeasibleBudget, match=r"--bpw 2.5 is below the smallest plan's 2.62[5-9] bits per weight; raise it to 2.62"
    ) as e:
        solve(drawn, Constraints((bpw_limit(2.5, drawn),)))
    assert solve(drawn, Constraints((bpw_limit(float(str(e.value).split("raise it to ")[1].split(",")[0]), drawn),)))


def test_an_infeasible_budget_names_the_options_that_could_go():
    drawn = random_model(10, 0)
    constraints = Constraints((bpw_limit(3, drawn),), pins=(parse_rule(".=Q8_0"),))
    with pytest.raises(InfeasibleBudget, match=r"or loosen --tensor-type$"):
        solve(drawn, constraints)


def test_two_infeasible_limits_are_both_named():
    drawn = random_model(10, 0)
    with pytest.raises(InfeasibleBudget, match=r"--vram .*; --size "):
        solve(drawn, Constraints((vram_limit(100, 50), size_limit(1000, 10))))


def test_a_time_limit_gives_a_plan_that_fits_and_an_honest_gap():
    drawn = random_model(200, 5)
    constraints = request_of(drawn, [0.25, 0.2])
    hasty, patient = solve(drawn, constraints, time_limit=1e-3), solve(drawn, constraints)
    assert patient.gap <= 2 * REL_GAP
    assert patient.predicted_loss <= hasty.predicted_loss * (1 + 1e-6)
    assert hasty.predicted_loss * (1 - hasty.gap) <= patient.predicted_loss * (1 + 1e-12)


def test_a_solver_that_fails_leaves_the_bounded_plan(monkeypatch):
    failed = highs.HighsResult(None, np.zeros(1), -math.inf, "failed")
    monkeypatch.setattr(highs, "solve_choice", lambda *_: failed)
    drawn = random_model(40, 6)
    plan = solve(drawn, request_of(drawn, [0.25]))
    assert 0 < plan.gap < 0.1 and "HiGHS failed" in plan.solver


def test_a_solver_that_overruns_the_budget_is_repaired(monkeypatch):
    def over(values, *_):  # the best of every item, which cannot fit
        return highs.HighsResult((values == 0).astype(float), np.zeros(1), 0.0, "optimal")

    monkeypatch.setattr(highs, "solve_choice", over)
    drawn = random_model(40, 6)
    constraints = request_of(drawn, [0.25])
    plan = solve(drawn, constraints)
    assert plan.used(constraints.limits[0]) <= constraints.limits[0].budget


def test_what_the_solver_prints_does_not_reach_stdout(capfd, monkeypatch):
    solver, calls = highspy.Highs, []

    def talkative():
        calls.append(ctypes.CDLL(None).printf(b"from C, held back\n"))
        os.write(1, b"at once\n")
        return solver()

    monkeypatch.setattr(highspy, "Highs", talkative)
    drawn = random_model(40, 7)
    with ThreadPoolExecutor(2) as pool:  # one must not take the other's silence for stdout
        list(pool.map(lambda _: solve(drawn, request_of(drawn, [0.25])), range(4)))
    os.write(1, b"stdout is as it was\n")
    ctypes.CDLL(None).fflush(None)
    assert calls and capfd.readouterr().out == "stdout is as it was\n"


def test_reasons_for_missing_types_reach_the_choice():
    skipped = {"IQ2_XS": "it needs importance", "IQ1_S": "it needs importance", "Q4_K": "rows of 96"}
    drawn = model(tensor("blk.0.attn_q.weight", {"Q4_0": 0.1}, (96, 4), skipped=skipped))
    choice = solve(drawn, Constraints()).choices[0]
    assert choice.notes == ("no IQ2_XS, IQ1_S: it needs importance", "no Q4_K: rows of 96")


@given(st.integers(1, 2**45))
def test_a_size_to_raise_a_budget_to_has_the_unit_of_the_figure_and_suffices(n_bytes):
    asked = _round_up(n_bytes)
    assert asked.lstrip("0123456789.") == format_size(n_bytes).split()[1]
    assert n_bytes <= parse_size(asked) <= 1.01 * n_bytes
