"""The table of options: a row for each field of a request, a keyword for each row, nothing listed twice."""

from dataclasses import fields
from pathlib import Path

import click
import pytest

from requant.api.keywords import Planning, Scoring
from requant.cli import convert, options
from requant.cli.help_pages import HEADINGS
from requant.errors import UsageError
from requant.planning.options import PLAN_OPTIONS
from requant.planning.request import (
    MEMORY_OPTIONS,
    OPTIONS_BY_FIELD,
    FromBudget,
    FromModel,
    FromPlan,
    FromPreset,
    FromType,
    PlanRequest,
    build_request,
    check_memory_options,
    choose_plan_from,
    plan_from_option,
)
from requant.planning.rules import Rule

ELSEWHERE = ["preset", "like", "losses"]  # keywords of a plan that are no part of a request


def test_every_field_of_a_request_has_a_row_and_every_row_a_field():
    assert {option.field for option in PLAN_OPTIONS} == {field.name for field in fields(PlanRequest)}


def test_a_row_is_one_option_and_only_rules_have_two():
    flags = [option.flag for option in PLAN_OPTIONS]
    assert len(set(flags)) == len(flags)
    double = [o.flag for o in PLAN_OPTIONS if [other.field for other in PLAN_OPTIONS].count(o.field) > 1]
    assert double == ["--tensor-type", "--tensor-type-file"]


def test_every_row_has_a_typed_keyword_and_every_keyword_a_row():
    typed = [name for name in Planning.__annotations__ if name not in Scoring.__annotations__]
    assert typed == [*(option.keyword for option in OPTIONS_BY_FIELD), *ELSEWHERE]
    described = " ".join(Planning.__doc__.split())
    assert all(f"{name}: " in described or f"{name}, " in described for name in typed)


@pytest.mark.parametrize("option", PLAN_OPTIONS, ids=lambda option: option.flag)
def test_a_row_makes_an_option_of_the_command_line_under_a_heading(option):
    params = {p.opts[-1]: p for p in convert.command.params if isinstance(p, click.Option)}
    param = params[option.flag]
    assert (param.name, param.help, param.multiple) == (option.keyword, option.help, option.kind.multiple)
    assert option.heading in HEADINGS
    assert option.kind.complete in options.COMPLETERS


def test_rules_of_a_file_follow_those_that_were_typed(tmp_path):
    (tmp_path / "rules.txt").write_text("b=Q5_K\n")
    typed = (Rule("--tensor-type", "a", "Q4_K"),)
    found = build_request({"tensor_type": typed, "tensor_type_file": tmp_path / "rules.txt", "bpw": None})
    assert found == PlanRequest(pins=(*typed, Rule("--tensor-type-file", "b", "Q5_K")))
    assert build_request({}) == PlanRequest()


def test_an_option_about_memory_needs_a_limit_on_memory():
    about_memory = set(MEMORY_OPTIONS.values())
    assert len(about_memory) == 12 and {"--ctx", "--reserve", "--time-price"} <= about_memory
    with pytest.raises(UsageError, match="--parallel says how memory is spent"):
        check_memory_options(PlanRequest(bpw=5, n_parallel=2))
    with pytest.raises(UsageError, match="--reserve says how memory is spent"):
        check_memory_options(PlanRequest(bpw=5, reserve=0))
    check_memory_options(PlanRequest(bpw=5, vram=1, n_parallel=2))


@pytest.mark.parametrize(
    ("asked", "given", "decided"),
    [
        (PlanRequest(bpw=5), {}, FromBudget()),
        (PlanRequest(bpw=5), {"like": Path("l.gguf")}, FromBudget(Path("l.gguf"))),
        (PlanRequest(), {"like": Path("l.gguf")}, FromModel(Path("l.gguf"))),
        (PlanRequest(), {"plan": Path("p.json")}, FromPlan(Path("p.json"))),
        (PlanRequest(groups=("a",)), {"type_name": "Q4_K"}, FromType("Q4_K")),
        (PlanRequest(), {"preset": "Q4_K_M"}, FromPreset("Q4_K_M")),
    ],
)
def test_what_decides_the_types_is_one_value(asked, given, decided):
    found = choose_plan_from(asked, **given)
    assert found == decided
    assert plan_from_option(found) == {key.removesuffix("_name"): value for key, value in given.items()}
