from dataclasses import replace
from pathlib import Path

import pytest

from requant.container.source import open_source
from requant.convert import output_layout
from requant.errors import BadInput, InfeasibleBudget, UsageError
from requant.pipeline import check_feasible, make_plan
from requant.plan import Losses
from requant.report.engine import start_command as llama_server
from requant.request import Rule
from requant.sensitivity import survey
from requant.wishes import Wishes, check_ways

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama-f16.gguf"
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
    for t in survey(source, types=TYPES):
        priced = (replace(c, loss=4.0 ** (-8 * c.n_bytes / t.n_weights)) for c in t.candidates)
        tensors.append(
            replace(t, candidates=tuple(replace(c, loss=c.loss * (c.type != t.source_type)) for c in priced))
        )
    return Losses(source.name, source.header_sha256, "llama", "dfix", None, None, tuple(tensors))


@pytest.mark.parametrize("size", [3_500_000, 4_000_001, 5 * MIB, 5 * MIB + 31, 9 * MIB, 30 * MIB])
def test_a_size_is_that_of_the_whole_file(source, losses, size):
    plan = make_plan(source, losses, Wishes(size=size))
    layout = output_layout(source, plan)
    assert layout.size <= size
    limit = plan.limits[0]
    assert limit.other == layout.data_start or size > 20 * MIB  # copied throughout: the header says less


def test_the_least_size_that_an_error_names_is_the_least(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        make_plan(source, losses, Wishes(size=MIB))
    least = caught.value.smallest
    plan = make_plan(source, losses, Wishes(size=least + 4096))
    assert output_layout(source, plan).size <= least + 4096


def test_the_least_vram_that_an_error_names_will_do(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        make_plan(source, losses, Wishes(vram=MIB, n_ctx=512))
    plan = make_plan(source, losses, Wishes(vram=caught.value.smallest, n_ctx=512))
    assert plan.budget["ubatch"] == 32 and plan.used(plan.limits[0]) <= caught.value.smallest
    with pytest.raises(InfeasibleBudget):
        make_plan(source, losses, Wishes(vram=caught.value.smallest - 4096, n_ctx=512))


def test_a_batch_is_made_smaller_only_where_it_must_be(source, losses):
    wide, tight = (make_plan(source, losses, Wishes(vram=x * MIB, n_ctx=512)) for x in (24, 10))
    assert wide.budget["ubatch"] == 512 and "-ub" not in llama_server(wide, Path("m.gguf"))
    assert tight.budget["ubatch"] < 512 and f"-ub {tight.budget['ubatch']}" in llama_server(tight, Path("m.gguf"))
    assert any("batches of" in note for note in tight.notes) and not any("batches of" in note for note in wide.notes)


def test_a_batch_is_made_smaller_rather_than_the_output_poorer(source, losses):
    plan = make_plan(source, losses, Wishes(vram=10 * MIB, n_ctx=512))
    assert next(c.type for c in plan.choices if c.name == "output.weight") in ("Q5_K", "Q6_K", "Q8_0", "F16")


def test_the_guard_rail_gives_way_to_the_budget_and_says_so(source, losses):
    with pytest.raises(InfeasibleBudget) as caught:
        make_plan(source, losses, Wishes(size=MIB))
    plan = make_plan(source, losses, Wishes(size=caught.value.smallest + 4096))
    assert next(c.type for c in plan.choices if c.name == "output.weight") == "Q2_K"
    assert any("too small to keep the output" in note for note in plan.notes)


def test_a_context_beyond_the_models_own_is_noted(source, losses):
    plan = make_plan(source, losses, Wishes(vram=900 * MIB, n_ctx=100_000))
    assert any("above the" in note for note in plan.notes)


def test_reserve_and_cache_types_count(source, losses):
    plain = make_plan(source, losses, Wishes(vram=20 * MIB, n_ctx=1024))
    small = make_plan(source, losses, Wishes(vram=20 * MIB, n_ctx=1024, cache_type_k="q8_0", cache_type_v="Q8_0"))
    spare = make_plan(source, losses, Wishes(vram=20 * MIB, n_ctx=1024, reserve=3 * MIB))
    assert small.memory["kv_cache"] < 0.6 * plain.memory["kv_cache"]
    assert (plain.memory["reserve"], spare.memory["reserve"]) == (2 * MIB, 3 * MIB)
    assert "-ctk q8_0 -ctv q8_0" in llama_server(small, Path("m.gguf"))


def test_losses_of_another_file_are_refused(source, losses):
    with pytest.raises(BadInput, match="another file"):
        make_plan(source, replace(losses, header_sha256="0" * 64), Wishes(bpw=5.0))


def test_what_is_wrong_is_known_without_scoring(source):
    with pytest.raises(InfeasibleBudget):
        check_feasible(source, Wishes(size=MIB), TYPES, imatrix=None, allow_requantize=False)
    with pytest.raises(UsageError, match="matches no tensor"):
        wishes = Wishes(bpw=5.0, pins=(Rule("--tensor-type", "nothing", "Q4_K"),))
        check_feasible(source, wishes, TYPES, imatrix=None, allow_requantize=False)
    check_feasible(source, Wishes(size=5 * MIB), TYPES, imatrix=None, allow_requantize=False)


@pytest.mark.parametrize(
    ("wishes", "plan", "single"),
    [
        (Wishes(), None, None),
        (Wishes(bpw=4.0), "p", None),
        (Wishes(bpw=4.0), None, "Q4_K"),
        (Wishes(), "p", "Q4_K"),
        (Wishes(groups=("a",)), "p", None),
        (Wishes(types=("Q4_K",)), None, "Q4_K"),
        (Wishes(n_ctx=512), None, "Q4_K"),
    ],
)
def test_exactly_one_thing_decides_the_types(wishes, plan, single):
    with pytest.raises(UsageError):
        check_ways(wishes, plan, single)


def test_types_named_in_a_wish_are_scored_too():
    wishes = Wishes(types=("Q4_K",), pins=(Rule("--tensor-type", "x", "Q8_0"),), output_type="Q6_K")
    assert wishes.types_to_score(TYPES) == ("Q4_K", "Q8_0", "Q6_K")
    assert Wishes().types_to_score(TYPES) == TYPES


def test_every_layer_is_offloaded_however_many(source, losses):
    plan = make_plan(source, losses, Wishes(bpw=5.0))
    assert llama_server(plan, Path("m.gguf")) == "llama-server -m m.gguf -ngl 99"
    last = replace(plan.choices[-1], name="blk.125.x.weight", layer=125)
    assert "-ngl 127" in llama_server(replace(plan, limits=(), choices=(*plan.choices, last)), Path("m.gguf"))
