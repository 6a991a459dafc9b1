"""The real llama.cpp loads what requant writes, and says what it said of the source."""

import engine
import ggml
import numpy as np
import pytest
from conversions import convert, plan_for
from real_models import IMATRIX, TINY, gemma3, smollm2

from requant.container.imatrix import read_imatrix
from requant.container.source import open_source
from requant.formats import FORMATS
from requant.planning.constraints import Constraints, bpw_limit
from requant.planning.planner import Planner
from requant.planning.recipe import uniform_plan
from requant.planning.request import PlanRequest
from requant.planning.rules import parse_rule
from requant.planning.solver.solve import solve
from requant.scoring.layerwise import score
from requant.scoring.options import ScoringOptions

VOCABULARY = 4096  # of the tiny model
PROMPTS = (  # cut where the next word is open
    "It was a truth",
    "And the Lord said unto Moses,",
    "The whale was",
    "I have the honor to transmit to the",
    "Elinor could not",
    "In the beginning God created the",
    "Call me",
    "The treaty between the United States and",
)
FRANCE = "The capital of France is"
# mean KL divergence over the prompts; of all of eval.txt it is 0.00014 for Q8_0 and 0.0070 for Q4_K
CEILINGS = {
    **dict.fromkeys(("F32", "F16"), 2e-5),
    "BF16": 2e-4,
    "Q8_0": 1e-3,
    "Q6_K": 4e-3,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.015),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 0.05),
    "Q3_K": 0.15,
    "Q2_K": 0.6,
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), 0.06),
    **dict.fromkeys(("IQ3_S", "IQ3_XXS"), 0.2),
    **dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS"), 0.25),  # embedding and output stay: the imatrix lacks them
    **dict.fromkeys(("IQ1_M", "IQ1_S"), 0.6),
    "Q2_0": 1.5,
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0"), 0.3),  # for one matrix
}
FOR_MODELS_TRAINED_SO = ("TQ1_0", "TQ2_0", "Q1_0")  # three values or two: other models lose rows


@pytest.fixture(scope="module")
def before():
    """What the tiny model says before it is quantized."""
    return engine.answers(TINY, *PROMPTS, n_likely=VOCABULARY)


@pytest.fixture(scope="module")
def imatrix():
    return read_imatrix(IMATRIX)


def assert_ggml_sees(path, plan):
    found = {name: FORMATS[type_id].name for name, (type_id, _, _) in ggml.file_tensors(path).items()}
    assert plan.types().items() <= found.items()
    assert all(name.endswith(".scale") for name in found.keys() - plan.types().keys())


def divergences(before, after):
    assert all(len(answer.likely) == VOCABULARY for answer in after)
    return [engine.divergence(a, b) for a, b in zip(before, after, strict=True)]


def plan_of(source, type_name, imatrix):
    """The type for all that can have it."""
    if type_name in FOR_MODELS_TRAINED_SO:
        constraints = Constraints(pins=(parse_rule(f"^blk.5.ffn_up={type_name}"),))
        return uniform_plan(source, "F16", constraints=constraints)
    if type_name.startswith("IQ"):
        return uniform_plan(source, type_name, imatrix=imatrix)
    return plan_for(source, type_name)


@pytest.mark.parametrize("type_name", [f.name for f in FORMATS.values() if f.can_encode])
def test_the_engine_reads_every_type_that_is_written(tmp_path, before, imatrix, type_name):
    with open_source(TINY) as source:
        made = convert(source, plan_of(source, type_name, imatrix), tmp_path / "out.gguf", imatrix=imatrix)
    assert_ggml_sees(made.output, made.plan)
    after = engine.answers(made.output, *PROMPTS, n_tokens=1, n_likely=VOCABULARY)
    assert np.mean(divergences(before, after)) <= CEILINGS[type_name]


def test_six_bits_keep_the_likeliest_token(tmp_path, before, imatrix):
    with open_source(TINY) as source:
        made = convert(source, uniform_plan(source, "Q6_K", imatrix=imatrix), tmp_path / "out.gguf", imatrix=imatrix)
    after = engine.answers(made.output, *PROMPTS, n_likely=VOCABULARY)
    for a, b in zip(before, after, strict=True):
        rivals = sorted(a.likely.values())[-2:]
        assert a.top == b.top or rivals[1] - rivals[0] < 0.1  # nats; closer than that is a tie
        assert len(b.text.split()) > 2
    assert np.mean([a.top == b.top for a, b in zip(before, after, strict=True)]) >= 0.75


def test_a_plan_for_a_budget_says_what_the_source_said(tmp_path, before, imatrix):
    with open_source(TINY) as source:
        losses = score(source, ScoringOptions(imatrix=imatrix))
        plan = solve(losses, Constraints((bpw_limit(4.5, losses),)))
        made = convert(source, plan, tmp_path / "out.gguf", imatrix=imatrix, losses=losses)
    assert len(set(plan.types().values())) > 3
    assert made.size < 0.3 * TINY.stat().st_size
    assert_ggml_sees(made.output, plan)
    after = engine.answers(made.output, *PROMPTS, n_likely=VOCABULARY)
    assert np.mean(divergences(before, after)) <= CEILINGS["Q4_K"]


def test_smollm2_is_quantized_again_only_if_asked_and_then_still_knows_paris(tmp_path):
    (source_answer,) = engine.answers(smollm2(), FRANCE, n_likely=50)
    with open_source(smollm2()) as source:
        kept = uniform_plan(source, "Q4_0")
        assert {c.type for c in kept.choices if c.source_type == "Q4_1"} == {"Q4_1"}
        assert kept.types()["token_embd.weight"] == "Q4_0" and "are already quantized below Q8_0" in kept.notes[0]
        plan = uniform_plan(source, "Q4_K", allow_requantize=True)
        made = convert(source, plan, tmp_path / "out.gguf")
    assert made.size < smollm2().stat().st_size
    assert_ggml_sees(made.output, plan)
    (answer,) = engine.answers(made.output, FRANCE, n_likely=50)
    assert answer.text.startswith(" Paris") and source_answer.text.startswith(" Paris")
    assert engine.divergence(source_answer, answer) < 0.3


def test_smollm2_in_eight_bits_begins_word_for_word(tmp_path):
    prompts = (FRANCE, "Water boils at", "def fibonacci(n):")
    with open_source(smollm2()) as source:
        made = convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf")
    before = engine.answers(smollm2(), *prompts, n_tokens=3, n_likely=50)
    after = engine.answers(made.output, *prompts, n_tokens=3, n_likely=50)
    assert [answer.top for answer in after] == [answer.top for answer in before]
    assert max(engine.divergence(a, b) for a, b in zip(before, after, strict=True)) < 0.02
    assert [answer.text for answer in after] == [answer.text for answer in before]


def gemma_speaks(folder, plan_of):
    """Mean KL divergence of Gemma 3 as planned from Gemma 3 as it is; and llama.cpp loads it."""
    prompts = (
        FRANCE,
        "The sun rises in the",
        "Water boils at",
        "My name is",
        "She opened the door and",
        "One two three",
    )
    with open_source(gemma3()) as source:
        made = convert(source, plan_of(source), folder / "out.gguf", force=True)
    assert made.size < gemma3().stat().st_size
    assert_ggml_sees(made.output, made.plan)
    before, after = (engine.answers(path, *prompts, n_tokens=3, n_likely=1000) for path in (gemma3(), made.output))
    assert all(answer.text.strip() for answer in after)
    return np.mean([engine.divergence(a, b) for a, b in zip(before, after, strict=True)])


def gemma_in_four_bits(source):
    return uniform_plan(source, "Q4_K", allow_requantize=True)


@pytest.mark.slow
def test_gemma3_in_fewer_bits_loads_and_speaks(tmp_path):
    assert gemma_speaks(tmp_path, gemma_in_four_bits) < 0.2


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="losses without gradients: 1.7 times, on a file that one type nearly copies")
def test_a_plan_for_gemma3_is_no_worse_than_one_type_of_its_size(tmp_path):
    def planned(source):
        losses = score(source, ScoringOptions(allow_requantize=True))
        return Planner(source, losses).best(PlanRequest(bpw=gemma_in_four_bits(source).bpw))

    assert gemma_speaks(tmp_path, planned) <= 1.1 * gemma_speaks(tmp_path, gemma_in_four_bits)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gemma3_in_every_type_loads(tmp_path, type_name):
    with open_source(gemma3()) as source:
        plan = uniform_plan(source, type_name, allow_requantize=True)
        made = convert(source, plan, tmp_path / "out.gguf")
    assert_ggml_sees(made.output, plan)
    (answer,) = engine.answers(made.output, FRANCE)
    assert answer.text
