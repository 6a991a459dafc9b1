import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from requant.container.source import open_source
from requant.container.splitting import total_size
from requant.errors import BadInput, InfeasibleBudget, UsageError
from requant.planning.constraints import Rule
from requant.planning.explain import compute_outlook, explain_choice
from requant.planning.frontier import compute_frontier, curve_to_csv
from requant.planning.output_layout import output_layouts
from requant.planning.output_metadata import output_metadata
from requant.planning.plan import Plan
from requant.planning.planner import Planner, check_feasible, losses_without_scoring
from requant.planning.recipe import preset_plan
from requant.planning.request import PlanRequest, choose_plan_from
from requant.planning.rules import AUTO, MAX_CONTEXT
from requant.report.start_command import start_command as llama_server
from requant.scoring.candidates import survey_tensors
from requant.scoring.losses import Losses, loss_unit

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-llama-f16.gguf"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
MIB = 2**20


@pytest.fixture(scope="module")
def source():
    with open_source(TINY) as opened:
        yield opened


@pytest.fixture(scope="module")
def losses(source):
    """Invented: every tensor as sensitive as the next, fourfold per bit."""
    tensors = []
    for t in survey_tensors(source, types=TYPES):
        priced = (replace(c, loss=4.0 ** (-8 * c.n_bytes / t.n_weights)) for c in t.candidates)
        tensors.append(
            replace(t, candidates=tuple(replace(c, loss=c.loss * (c.type != t.source_type)) for c in priced))
        )
    return Losses(source.name, source.header_sha256, "llama", "dfix", None, None, tuple(tensors))


@pytest.mark.parametrize("size", [3_500_000, 4_000_001, 5 * MIB, 5 * MIB + 31, 9 * MIB, 30 * MIB])
def test_a_size_is_that_of_the_whole_file(source, losses, size):
    plan = Planner(source, losses).best(PlanRequest(size=size))
    (layout,) = output_layouts(source, plan)
    assert layout.size <= size
    limit = plan.limits[0]
    assert limit.other == layout.data_start or size > 20 * MIB  # copied throughout: the header says less


def test_the_least_size_that_an_error_names_is_the_least(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        Planner(source, losses).best(PlanRequest(size=MIB))
    least = caught.value.smallest
    plan = Planner(source, losses).best(PlanRequest(size=least + 4096))
    assert total_size(output_layouts(source, plan)) <= least + 4096


def test_the_least_vram_that_an_error_names_will_do(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        Planner(source, losses).best(PlanRequest(vram=MIB, n_ctx=512))
    plan = Planner(source, losses).best(PlanRequest(vram=caught.value.smallest, n_ctx=512))
    assert plan.budget["ubatch"] == 32 and plan.used(plan.limits[0]) <= caught.value.smallest
    with pytest.raises(InfeasibleBudget):
        Planner(source, losses).best(PlanRequest(vram=caught.value.smallest - 4096, n_ctx=512))


def test_a_batch_is_made_smaller_only_where_it_must_be(source, losses):
    wide, tight = (Planner(source, losses).best(PlanRequest(vram=x * MIB, n_ctx=512)) for x in (40, 10))
    assert wide.budget["ubatch"] == 512 and "-ub" not in llama_server(wide, Path("m.gguf"))
    assert tight.budget["ubatch"] < 512 and f"-ub {tight.budget['ubatch']}" in llama_server(tight, Path("m.gguf"))
    assert any("batches of" in note for note in tight.notes) and not any("batches of" in note for note in wide.notes)


def test_a_batch_is_made_smaller_rather_than_the_output_poorer(source, losses):
    plan = Planner(source, losses).best(PlanRequest(vram=10 * MIB, n_ctx=512))
    assert next(c.type for c in plan.choices if c.name == "output.weight") in ("Q5_K", "Q6_K", "Q8_0", "F16")


def test_a_loss_is_kept_at_a_smaller_batch_where_the_usual_one_leaves_no_room(source, losses):
    kept = Planner(source, losses).best(PlanRequest(vram=10 * MIB, n_ctx=512)).predicted_loss
    plan = Planner(source, losses).best(PlanRequest(vram=11 * MIB, n_ctx=512, max_loss=1.5 * kept))
    assert plan.budget["ubatch"] < 512 and any("batches of" in note for note in plan.notes)
    with pytest.raises(InfeasibleBudget):
        Planner(source, losses).best(PlanRequest(vram=11 * MIB, n_ctx=512, n_ubatch=512, max_loss=1.5 * kept))


def test_what_losses_without_scoring_needs_no_scoring(source):
    for request in (
        PlanRequest(vram=64 * MIB),
        PlanRequest(size=64 * MIB),
        PlanRequest(bpw=17.0),
        PlanRequest(bpw=17.0, size=64 * MIB),
    ):
        plan = Planner(source, losses_without_scoring(source, request)).best(request)
        assert all(c.copied for c in plan.choices) and plan.predicted_loss == 0
        assert any("nothing was scored" in note for note in plan.notes)
    assert plan.budget.get("ubatch", 512) == 512
    smaller = (
        PlanRequest(vram=20 * MIB),
        PlanRequest(size=10 * MIB),
        PlanRequest(bpw=8.0),
        PlanRequest(bpw=17.0, size=10 * MIB),
    )
    asking = (
        PlanRequest(bpw=17.0, max_loss=0.1),
        PlanRequest(bpw=17.0, types=("Q8_0",)),
        PlanRequest(vram=64 * MIB, ram=64 * MIB),
        PlanRequest(vram=64 * MIB, pins=(Rule("--tensor-type", "ffn_down", "Q4_K"),)),
        PlanRequest(vram=64 * MIB, n_ctx=MAX_CONTEXT),
    )
    assert all(losses_without_scoring(source, request) is None for request in (*smaller, *asking))


def test_the_largest_context_says_where_the_models_own_ends_it(source, losses):
    plan = Planner(source, losses).best(PlanRequest(vram=64 * MIB, max_loss=1.0, n_ctx=MAX_CONTEXT))
    assert plan.budget["ctx"] == 512 and any("ends at the 512 tokens" in note for note in plan.notes)


def test_more_memory_never_buys_a_loss(source, losses):
    for n in range(9, 20):
        request = PlanRequest(vram=n * MIB, n_ctx=512)
        plan = Planner(source, losses).best(request)
        (more,) = compute_outlook(Planner(source, losses), request, plan)
        assert more.value <= plan.predicted_loss


def test_the_guard_rail_gives_way_to_the_budget_and_says_so(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        Planner(source, losses).best(PlanRequest(size=MIB))
    plan = Planner(source, losses).best(PlanRequest(size=caught.value.smallest + 4096))
    assert next(c.type for c in plan.choices if c.name == "output.weight") == "Q2_K"
    assert any("too small to keep the output" in note for note in plan.notes)


def test_a_context_beyond_the_models_own_is_noted(source, losses):
    plan = Planner(source, losses).best(PlanRequest(vram=900 * MIB, n_ctx=100_000))
    assert any("above the" in note for note in plan.notes)


def test_reserve_and_cache_types_count(source, losses):
    plain = Planner(source, losses).best(PlanRequest(vram=20 * MIB, n_ctx=1024))
    small = Planner(source, losses).best(
        PlanRequest(vram=20 * MIB, n_ctx=1024, cache_type_k="q8_0", cache_type_v="Q8_0")
    )
    spare = Planner(source, losses).best(PlanRequest(vram=20 * MIB, n_ctx=1024, reserve=3 * MIB))
    assert small.memory["kv_cache"] < 0.6 * plain.memory["kv_cache"]
    assert (plain.memory["reserve"], spare.memory["reserve"]) == (2 * MIB, 3 * MIB)
    assert "-ctk q8_0 -ctv q8_0" in llama_server(small, Path("m.gguf"))


def test_losses_of_another_model_are_refused_and_a_siblings_taken_over(source, losses):
    sibling = replace(losses, header_sha256="0" * 64, source="finetune.gguf")
    plan = Planner(source, sibling).best(PlanRequest(bpw=5.0))
    assert (
        plan.header_sha256 == source.header_sha256
        and plan.types() == Planner(source, losses).best(PlanRequest(bpw=5.0)).types()
    )
    assert any("sibling, finetune.gguf" in note for note in plan.notes)
    for other in (replace(sibling, tensors=sibling.tensors[1:]), replace(sibling, arch="qwen2")):
        with pytest.raises(BadInput, match="another model"):
            Planner(source, other).best(PlanRequest(bpw=5.0))


def test_the_fewest_bytes_for_a_loss_and_the_least_loss_for_those_bytes_agree(source, losses):
    losses = replace(losses, method="fisher")  # without the guard rail, which depends on the budget
    for most in (0.05, 0.2, 1.0):
        plan = Planner(source, losses).best(PlanRequest(max_loss=most))
        assert plan.predicted_loss <= most
        again = Planner(source, losses).best(PlanRequest(bpw=8 * plan.n_bytes / plan.n_weights + 1e-4))
        assert again.predicted_loss <= plan.predicted_loss * (1 + 1e-6)
        fewer = Planner(source, losses).best(PlanRequest(bpw=8 * plan.n_bytes / plan.n_weights * 0.99))
        assert fewer.predicted_loss > most * (1 - 1e-9)


def test_budgets_that_contradict_each_other_are_told_what_would_do(source, losses):
    with pytest.raises(
        InfeasibleBudget, match=r"--max-loss and --bpw together|--bpw and --max-loss together"
    ) as caught:
        Planner(source, losses).best(PlanRequest(bpw=4.0, max_loss=1e-3))
    loss = float(str(caught.value).split("--max-loss ")[-1].split()[0])
    assert Planner(source, losses).best(PlanRequest(bpw=4.0, max_loss=loss)).predicted_loss <= loss
    with pytest.raises(InfeasibleBudget, match="--min-speed"):
        Planner(source, losses).best(PlanRequest(vram=14 * MIB, ram=30 * MIB, min_speed=9e5, n_ctx=512))


def test_more_of_a_budget_is_never_worse(source, losses):
    budgets = [PlanRequest(vram=n * MIB // 4, n_ctx=512, n_ubatch=64) for n in range(32, 60)]
    found = [Planner(source, losses).best(request).predicted_loss for request in budgets]
    assert found == sorted(found, reverse=True)


def test_the_largest_context_keeps_the_loss_and_a_larger_one_would_not(source, losses):
    request = PlanRequest(vram=10 * MIB, n_ubatch=32)
    short, long = (Planner(source, losses).best(replace(request, n_ctx=n)).predicted_loss for n in (256, 512))
    assert short < long
    for most, n_ctx in ((long * 1.001, 512), ((short + long) / 2, 256)):
        plan = Planner(source, losses).best(replace(request, n_ctx=MAX_CONTEXT, max_loss=most))
        assert plan.predicted_loss <= most and plan.budget["ctx"] == n_ctx
    with pytest.raises(InfeasibleBudget, match="would do"):
        Planner(source, losses).best(replace(request, n_ctx=MAX_CONTEXT, max_loss=short / 2))


def test_a_cache_type_is_chosen_by_what_it_frees_and_what_it_costs(source, losses):
    request = PlanRequest(vram=10 * MIB, n_ctx=512, n_ubatch=32, cache_type_k=AUTO, cache_type_v=AUTO)
    cheap = replace(losses, caches={"Q8_0/Q8_0": 1e-6, "Q4_0/Q4_0": 10.0})
    assert Planner(source, cheap).best(request).budget["cache_type_k"] == "Q8_0"
    dear = replace(losses, caches={"Q8_0/Q8_0": 10.0})
    assert Planner(source, dear).best(request).budget["cache_type_k"] == "F16"
    with pytest.raises(UsageError, match="caches were measured"):
        Planner(source, losses).best(request)


def test_a_plan_says_what_each_type_that_was_open_would_have_cost(source, losses):
    pinned = Rule("--tensor-type", "ffn_down", "Q4_K")
    plan = Planner(source, losses).best(PlanRequest(size=6 * MIB, pins=(pinned,)))
    assert Plan.from_json(plan.to_json()) == plan
    priced = {t.name: {c.type: c.loss for c in t.candidates} for t in losses.tensors}
    assert set(plan.candidates) == {c.name for c in plan.choices if c.reason is None}
    for c in plan.choices:
        if c.reason is None:
            found = plan.candidates[c.name]
            assert found == pytest.approx({name: priced[c.name][name] for name in found}, rel=1e-5)
            open_to_it = {"ffn_down": {"Q4_K"}, "output": {"Q6_K", "Q8_0", "F16"}}  # a pin, and the guard rail
            assert set(found) == open_to_it.get(c.role, set(priced[c.name]))
            assert found[c.type] == pytest.approx(c.loss, rel=1e-5)


def test_mixtures_beside_a_plan_have_the_types_and_sizes_of_their_presets(source, losses):
    plan = Planner(source, losses).best(PlanRequest(vram=12 * MIB))
    assert {"Q2_K", "Q4_K_M", "Q6_K"} <= {m.name for m in plan.mixtures}
    assert "IQ3_S" not in {m.name for m in plan.mixtures}, "its types were not scored"
    on_gpu = {t.name for t in losses.tensors if t.on_gpu}
    for mixture in plan.mixtures:
        preset = preset_plan(source, mixture.name)
        assert mixture.n_bytes == preset.n_bytes
        assert mixture.gpu_bytes == sum(c.n_bytes for c in preset.choices if c.name in on_gpu)
        priced = [
            c.loss
            for t in losses.tensors
            for c in t.candidates
            if c.type == preset.types()[t.name] and c.type != t.source_type
        ]
        assert mixture.loss == pytest.approx(sum(priced))


def test_layers_are_summed_up_in_plan_and_metadata(source, losses, tmp_path):
    plan = Planner(source, losses).best(PlanRequest(vram=11 * MIB, ram=30 * MIB, n_ctx=512))
    assert [s.layer for s in plan.layers] == [*range(10), None]
    assert sum(s.n_bytes for s in plan.layers) == plan.n_bytes
    assert sum(s.loss for s in plan.layers) == pytest.approx(plan.predicted_loss)
    assert all(s.sensitivity > 0 and s.kv_bytes == 512 * 2 * 128 * 2 for s in plan.layers[:-1])
    assert Plan.from_json(plan.to_json()) == plan
    metadata = output_metadata(source, plan, None, 0)
    assert metadata.get("requant.layer.bytes") == [s.n_bytes for s in plan.layers[:-1]]
    assert metadata.get("requant.layer.device") == [s.device for s in plan.layers[:-1]]
    assert metadata.get("requant.source.header_sha256") == source.header_sha256


def test_an_engines_own_type_is_preferred_within_a_tolerance(source, losses):
    tensors = []
    for t in losses.tensors:
        q4 = next((c for c in t.candidates if c.type == "Q4_K"), None)
        more = () if q4 is None else (replace(q4, type="NVFP4", loss=1.02 * q4.loss),)
        tensors.append(replace(t, candidates=(*t.candidates, *more)))
    drawn = replace(losses, tensors=tuple(tensors))
    request = PlanRequest(vram=11 * MIB, n_ctx=512, engine="llama.cpp-blackwell", prefer_within=0.05)
    best = Planner(source, drawn).best(replace(request, engine="llama.cpp-cuda", prefer_within=None, types=TYPES))
    plan = Planner(source, drawn).best(request)
    assert sum(c.type == "NVFP4" for c in plan.choices) > sum(c.type == "NVFP4" for c in best.choices)
    assert plan.predicted_loss <= 1.05 * best.predicted_loss * (1 + 1e-6)


def test_the_frontier_falls_from_the_smallest_to_the_largest_plan(source, losses):
    points = compute_frontier(Planner(source, losses), PlanRequest(n_ctx=512), n=7)
    assert len(points) == 7 and points[-1].predicted_loss == 0
    pairs = list(itertools.pairwise(points))
    assert all(a.predicted_loss >= b.predicted_loss and a.file_bytes < b.file_bytes for a, b in pairs)
    head, *lines = curve_to_csv(points, losses).splitlines()
    assert head == "bpw,tensor_bytes,file_bytes,vram_bytes,predicted_loss,gap,ubatch,loss_unit,method"
    assert lines and all(line.endswith(f",{loss_unit(losses.method)},{losses.method}") for line in lines)
    plan = Planner(source, losses).best(PlanRequest(bpw=points[3].bpw + 1e-4))
    assert plan.n_bytes == points[3].tensor_bytes and total_size(output_layouts(source, plan)) == points[3].file_bytes


def test_an_explanation_says_what_every_alternative_would_cost(source, losses):
    request, name = PlanRequest(bpw=4.5), "blk.3.ffn_down.weight"
    plan = Planner(source, losses).best(request)
    found = explain_choice(Planner(source, losses), request, plan, name)
    (chosen,) = (a for a in found.alternatives if a.chosen)
    assert chosen.type == plan.types()[name] and chosen.plan_loss == plan.predicted_loss
    assert all(a.plan_loss is None or a.plan_loss >= plan.predicted_loss * (1 - 1e-5) for a in found.alternatives)
    with pytest.raises(UsageError, match=r"no tensor 'blk.3.ffn_dwn.weight'.*blk.3.ffn_down.weight"):
        explain_choice(Planner(source, losses), request, plan, "blk.3.ffn_dwn.weight")
    within = PlanRequest(size=6 * MIB)
    (more,) = compute_outlook(Planner(source, losses), within, Planner(source, losses).best(within))
    assert more.option == "--size" and more.value < Planner(source, losses).best(within).predicted_loss


def test_what_is_wrong_is_known_without_scoring(source):
    with pytest.raises(InfeasibleBudget):
        check_feasible(source, PlanRequest(size=MIB), TYPES, imatrix=None, allow_requantize=False)
    with pytest.raises(UsageError, match="matches no tensor"):
        request = PlanRequest(bpw=5.0, pins=(Rule("--tensor-type", "nothing", "Q4_K"),))
        check_feasible(source, request, TYPES, imatrix=None, allow_requantize=False)
    check_feasible(source, PlanRequest(size=5 * MIB), TYPES, imatrix=None, allow_requantize=False)


@pytest.mark.parametrize(
    ("given", "plan", "single"),
    [
        (PlanRequest(), None, None),
        (PlanRequest(bpw=4.0), "p", None),
        (PlanRequest(bpw=4.0), None, "Q4_K"),
        (PlanRequest(), "p", "Q4_K"),
        (PlanRequest(groups=("a",)), "p", None),
        (PlanRequest(types=("Q4_K",)), None, "Q4_K"),
        (PlanRequest(n_ctx=512), None, "Q4_K"),
    ],
)
def test_exactly_one_thing_decides_the_types(given, plan, single):
    with pytest.raises(UsageError):
        choose_plan_from(given, plan, single)


def test_types_named_in_a_wish_are_scored_too():
    request = PlanRequest(types=("Q4_K",), pins=(Rule("--tensor-type", "x", "Q8_0"),), output_type="Q6_K")
    assert request.types_to_score == ("Q4_K", "Q8_0", "Q6_K")


def test_every_layer_is_offloaded_however_many(source, losses):
    plan = Planner(source, losses).best(PlanRequest(bpw=5.0))
    assert llama_server(plan, Path("m.gguf")) == "llama-server -m m.gguf -ngl 99"
    last = replace(plan.choices[-1], name="blk.125.x.weight", layer=125)
    assert "-ngl 127" in llama_server(replace(plan, limits=(), choices=(*plan.choices, last)), Path("m.gguf"))
