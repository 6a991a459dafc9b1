"""The options that plans remember: every one there is, and typed again they mean the same."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from requant.api import invocation as words
from requant.api.session import Session
from requant.cli import convert
from requant.cli.batch_options import collect_options
from requant.container.imatrix import Imatrix
from requant.formats import Effort
from requant.planning.constraints import Rule
from requant.planning.request import MAX_CONTEXT, PlanRequest
from requant.scoring.calibration_data import CalibrationOptions
from requant.scoring.losses import Losses

WISHES = PlanRequest(
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


def job(**changes):
    given = {f.name: None for f in fields(Session)} | {"request": PlanRequest(), "calibration": CalibrationOptions()}
    return Session(**(given | {"inputs": frozenset(), "allow_requantize": False} | changes))


def parsed(typed):
    with convert.command.make_context("convert", ["M", "O", *typed]) as context:
        return collect_options(**context.params)


def test_every_wish_has_its_option():
    assert set(words._WISHES) == {f.name for f in fields(PlanRequest)}
    assert set(words._CALIBRATION) == {f.name for f in fields(CalibrationOptions)}
    assert all(getattr(WISHES, f.name) != getattr(PlanRequest(), f.name) for f in fields(PlanRequest))


@pytest.mark.parametrize(
    "request",
    [
        WISHES,
        PlanRequest(),
        *(replace(PlanRequest(), **{f.name: getattr(WISHES, f.name)}) for f in fields(PlanRequest)),
    ],
)
def test_typed_again_the_options_mean_the_same(request):
    typed = words._plan_words(job(request=request, calibration=CALIBRATION), None)
    again = parsed(typed)
    assert (again["request"], again["calibration"]) == (request, CALIBRATION)


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
    assert words._plan_words(job(calibration=calibration), None) == typed
    assert words.score_options((), None, calibration, allow_requantize=False, effort=None) == typed


def test_what_is_no_wish_is_said_too():
    given = {"type_name": "Q4_K", "preset": "Q4_K_M", "like": Path("a/l.gguf"), "allow_requantize": True}
    imatrix = Imatrix(path="x/i.gguf", sha256="", entries={}, datasets=(), chunk_count=0, legacy=False)
    typed = words._plan_words(job(**given, imatrix=imatrix, effort=Effort.BEST), 6)
    again = parsed(typed)
    assert (again["type_name"], again["preset"], str(again["like"]), again["measure"]) == (
        "Q4_K",
        "Q4_K_M",
        "l.gguf",
        6,
    )
    assert (str(again["imatrix"]), again["effort"], again["allow_requantize"]) == ("i.gguf", Effort.BEST, True)


def test_losses_from_a_file_are_named_and_how_they_were_scored_is_not_said_of_the_plan():
    losses = Losses("m.gguf", "0" * 64, "llama", "fisher", None, None, ())
    given = job(losses=losses, losses_file=Path("x/l.json"), calibration=CALIBRATION)
    assert words._plan_words(given, None) == ("--losses", "l.json")
    assert words._plan_words(replace(given, losses_file=None), None) == ("--losses", "losses.json")


def test_the_largest_context_is_asked_for_by_its_word():
    assert words._plan_words(job(request=PlanRequest(n_ctx=MAX_CONTEXT)), None) == ("--ctx", "max")
