"""The options that decided a plan or losses, as one would type them again; files without their folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.formats import Effort
from requant.planning.options import PLAN_OPTIONS
from requant.planning.request import FromPlan, PlanRequest, plan_from_option
from requant.scoring.options import CalibrationOptions

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.planning.plan import Plan

_LOSSES = "losses.json"  # the name of losses that were given as data


def record_options(plan: Plan, session: Session, measure: int | None = None) -> Plan:
    """Return the plan with the effort and compensation given, the options that decided it, and those of given losses.

    A plan that was given keeps its options as long as effort and compensation stay the same.
    """
    given = session.options.effort
    effort, (compensation, notes) = plan.effort if given is None else given, _find_compensation(plan, session)
    changed = replace(plan, effort=effort, compensation=compensation, notes=tuple(dict.fromkeys((*plan.notes, *notes))))
    if isinstance(session.plan_from, FromPlan):
        return changed if changed.sha256() == plan.sha256() else replace(changed, options=())
    scoring = () if session.losses is None else session.losses.options
    return replace(changed, options=plan_arguments(session, measure), scoring=scoring)


def _find_compensation(plan: Plan, session: Session) -> tuple[str | None, list[str]]:
    """Return the compensation of a conversion by the plan, and notes: none where the model cannot be run."""
    from requant.scoring.fisher import find_run_obstacle

    options = session.options
    wanted = None if options.no_compensate else options.compensate or plan.compensation
    if wanted is None or plan.is_copy:
        return None, []
    obstacle = find_run_obstacle(session.source)
    if obstacle is None:
        return wanted, []
    return None, [f"the encoders do not compensate their errors: the model cannot be run, {obstacle.what}"]


def plan_arguments(session: Session, measure: int | None = None) -> tuple[str, ...]:
    """Return the options of `requant plan` or `requant convert` that decide the plan."""
    given = dict[str, object](plan_from_option(session.plan_from))
    if session.losses is not None:
        file = session.options.losses
        given["losses"] = file if isinstance(file, Path) else _LOSSES
    if measure is not None:
        given["measure"] = measure
    words = [f"--{name}={value.name if isinstance(value, Path) else value}" for name, value in given.items()]
    own = _calibration_words(session.calibration) if session.losses is None or session.compensates else ()
    return _split((*_request_words(session.request), *words, *own, *_encoding_words(session)))


def score_arguments(session: Session) -> tuple[str, ...]:
    """Return the options of `requant score` that decide the losses."""
    types = PlanRequest(types=session.request.types)
    return _split((*_request_words(types), *_calibration_words(session.calibration), *_encoding_words(session)))


def _request_words(request: PlanRequest) -> Iterator[str]:
    """Yield `--option=value` for each field that is given, in the order of the fields."""
    for field in fields(PlanRequest):
        value = getattr(request, field.name)
        if value is None or value is False or value == ():
            continue
        option = next(option for option in PLAN_OPTIONS if option.field == field.name)
        if value is True:
            yield option.flag
            continue
        for each in value if option.kind.multiple else [value]:
            yield f"{option.flag}={option.kind.show(each)}"


def _calibration_words(calibration: CalibrationOptions) -> Iterator[str]:
    """Yield `--option=value` for each field that differs from its default."""
    for field in fields(CalibrationOptions):
        value, flag = getattr(calibration, field.name), f"--{field.name.removeprefix('n_')}"
        if value is not None and value != field.default:
            yield flag if value is True else f"{flag}={value.name if isinstance(value, Path) else value}"


def _encoding_words(session: Session) -> Iterator[str]:
    """Yield --imatrix, --no-imatrix, --effort, --allow-requantize, --max-memory and --compensate where given."""
    imatrix, effort = session.options.imatrix, session.options.effort
    if imatrix is not None:
        yield f"--imatrix={imatrix.name}"
    if session.options.no_imatrix:
        yield "--no-imatrix"
    if effort is not None and effort != Effort.DEFAULT:
        yield f"--effort={effort.name.lower()}"
    if session.options.allow_requantize:
        yield "--allow-requantize"
    if session.options.max_memory is not None:
        yield f"--max-memory={session.options.max_memory}B"
    if session.options.compensate is not None:
        yield f"--compensate={session.options.compensate}"


def _split(words: tuple[str, ...]) -> tuple[str, ...]:
    """Split `--option=value` into two words, unless the value begins with a dash."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        found += [word] if not equals or value.startswith("-") else [option, value]
    return tuple(found)
