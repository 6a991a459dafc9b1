"""The options that plans remember: every one there is, and typed again they mean the same."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from requant.api import invocation
from requant.api.importance import Importance
from requant.api.session import Session
from requant.api.session_options import SessionOptions
from requant.cli import convert
from requant.cli.batch_options import collect_options
from requant.formats import Effort
from requant.planning.constraints import Rule
from requant.planning.request import FromBudget, FromModel, FromPreset, FromType, PlanRequest
from requant.planning.rules import MAX_CONTEXT
from requant.scoring.losses import Losses
from requant.scoring.options import CalibrationOptions

REQUEST = PlanRequest(
    **{"vram": 12 * 2**30, "ram": 1234567, "n_ctx": 16384, "cache_type_k": "Q8_0", "cache_type_v": "AUTO"},
    **{"n_parallel": 2, "n_ubatch": 256, "reserve": 2**20, "draft": Path("d.gguf"), "mmproj": Path("p.gguf")},
    **{"mtp": True, "assume": True, "size": 6 * 10**9, "bpw": 4.5, "max_loss": 0.02, "min_speed": 12.25, "price": 0.1},
    **{"bandwidth": (("gpu", 448e9), ("cpu", 60.5e9)), "engine": "llama.cpp-cuda", "prefer_within": 0.1},
    pins=(Rule("--tensor-type", "-v=x", "Q6_K"), Rule("--tensor-type", "ffn.*", "Q4_K")),
    floors=(Rule("--min-type", "attn", "Q4_K"),),
    groups=(r"blk\.(\d+)\.attn", "-x"),
    types=("Q4_K", "Q6_K"),
    output_type="Q8_0",
    embedding_type="Q6_K",
)
CALIBRATION = CalibrationOptions(text=Path("t.txt"), n_windows=3, window=128)


def session(request=None, calibration=None, **changes):
    given = {"request": request or PlanRequest(), "calibration": calibration or CalibrationOptions(), "losses": None}
    given |= {"plan_from": FromBudget(), "options": SessionOptions(), "importance": Importance(), "plan": None}
    return Session(source=None, **(given | changes))


def parsed(typed):
    with convert.command.make_context("convert", ["M", "O", *typed]) as context:
        return collect_options(**context.params)


def test_every_option_has_a_value_here_that_is_not_its_default():
    assert all(getattr(REQUEST, f.name) != getattr(PlanRequest(), f.name) for f in fields(PlanRequest))


@pytest.mark.parametrize(
    "asked",
    [
        REQUEST,
        PlanRequest(),
        *(replace(PlanRequest(), **{f.name: getattr(REQUEST, f.name)}) for f in fields(PlanRequest)),
    ],
)
def test_typed_again_the_options_mean_the_same(asked):
    typed = invocation.plan_arguments(session(asked, CALIBRATION))
    again = parsed(typed)
    assert (again["request"], again["calibration"]) == (asked, CALIBRATION)


@pytest.mark.parametrize(
    ("calibration", "typed"),
    [
        (CalibrationOptions(), ()),
        (CalibrationOptions(quick=True), ("--quick",)),
        (CalibrationOptions(tokens=Path("a/b.txt"), n_windows=None), ("--tokens", "b.txt")),
        (CalibrationOptions(statistics=Path("s.gguf")), ("--statistics", "s.gguf")),
    ],
)
def test_only_what_is_not_by_default_is_said_and_no_folder(calibration, typed):
    assert invocation.plan_arguments(session(calibration=calibration)) == typed
    assert invocation.score_arguments(session(PlanRequest(bpw=4.5), calibration)) == typed


@pytest.mark.parametrize(
    ("plan_from", "name", "value"),
    [
        (FromType("Q4_K"), "type_name", "Q4_K"),
        (FromPreset("Q4_K_M"), "preset", "Q4_K_M"),
        (FromModel(Path("a/l.gguf")), "like", Path("l.gguf")),
        (FromBudget(Path("a/l.gguf")), "like", Path("l.gguf")),
    ],
)
def test_what_is_no_part_of_a_request_is_recorded_too(plan_from, name, value):
    options = SessionOptions(imatrix=Path("x/i.gguf"), effort=Effort.BEST, allow_requantize=True)
    typed = invocation.plan_arguments(session(plan_from=plan_from, options=options), 6)
    again = parsed(typed)
    assert (again[name], again["measure"]) == (value, 6)
    assert again["session_options"] == replace(options, imatrix=Path("i.gguf"))


def test_losses_from_a_file_are_named_and_how_they_were_scored_is_not_said_of_the_plan():
    losses = Losses("m.gguf", "0" * 64, "llama", "fisher", None, None, ())
    for given, name in ((Path("x/l.json"), "l.json"), (losses, "losses.json")):
        asked = session(calibration=CALIBRATION, options=SessionOptions(losses=given), losses=losses)
        assert invocation.plan_arguments(asked) == ("--losses", name)


def test_the_largest_context_is_asked_for_by_its_word():
    assert invocation.plan_arguments(session(PlanRequest(n_ctx=MAX_CONTEXT))) == ("--ctx", "max")
    assert invocation.plan_arguments(session(PlanRequest(n_ctx=0, reserve=0))) == ("--ctx", "0", "--reserve", "0GiB")
