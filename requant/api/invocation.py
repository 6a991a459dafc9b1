"""The options that decided a plan or losses, as one would type them again: values as they were meant, no folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.formats import Effort
from requant.planning.options import PLAN_OPTIONS
from requant.planning.request import PlanRequest
from requant.scoring.calibration_data import Calibration

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.container.imatrix import Imatrix
    from requant.planning.plan import Plan

_LOSSES = "losses.json"  # the name of losses that were given as data


_CALIBRATION = {
    "text": "--text",
    "tokens": "--tokens",
    "n_windows": "--windows",
    "window": "--window",
    "quick": "--quick",
    "statistics": "--statistics",
}


def record_options(plan: Plan, job: Session, measure: int | None = None) -> Plan:
    """`plan` with the effort asked for, saying which options decided it, and those of its losses where they were given.

    One that was given says so already, as long as its effort stays what it was.
    """
    effort = plan.effort if job.effort is None else job.effort
    if job.plan_file is not None or job.given_plan is not None:
        return plan if effort == plan.effort else replace(plan, effort=effort, options=())
    scoring = () if job.losses is None else job.losses.options
    return replace(plan, effort=effort, options=_plan_words(job, measure), scoring=scoring)


def _plan_words(job: Session, measure: int | None) -> tuple[str, ...]:
    """Of `requant plan` or `requant convert`: all that decides the plan of the job."""
    given = {
        "--type": job.type_name,
        "--preset": job.preset,
        "--like": None if job.like is None else job.like.name,
        "--losses": None if job.losses is None else _LOSSES if job.losses_file is None else job.losses_file.name,
        "--measure": measure,
    }
    words = [f"{option}={value}" for option, value in given.items() if value is not None]
    own = [] if job.losses is not None else _calibration_words(job.calibration)
    how = _how(job.imatrix, job.calibration, job.allow_requantize, job.effort)
    return _split((*_request_words(job.request), *words, *own, *how))


def score_options(
    types: tuple[str, ...],
    imatrix: Imatrix | None,
    calibration: Calibration,
    *,
    allow_requantize: bool,
    effort: Effort | None,
) -> tuple[str, ...]:
    """Of `requant score`: all that decides the losses."""
    own = _calibration_words(calibration)
    how = _how(imatrix, calibration, allow_requantize, effort)
    return _split((*_request_words(PlanRequest(types=types)), *own, *how))


def _request_words(request: PlanRequest) -> Iterator[str]:
    """`--option=value` for each field that is given, in the order of the fields."""
    for field in fields(PlanRequest):
        value = getattr(request, field.name)
        if value is None or value is False or value == ():
            continue
        option = next(option for option in PLAN_OPTIONS if option.field == field.name)
        if value is True:
            yield option.flag
        else:
            yield from (
                f"{option.flag}={option.kind.show(each)}" for each in (value if option.kind.multiple else [value])
            )


def _calibration_words(calibration: Calibration) -> Iterator[str]:
    """`--option=value` for each field that differs from its default."""
    for name, flag in _CALIBRATION.items():
        value = getattr(calibration, name)
        if value is not None and value != getattr(Calibration(), name):
            yield flag if value is True else f"{flag}={value.name if isinstance(value, Path) else value}"


def _how(
    imatrix: Imatrix | None, calibration: Calibration, allow_requantize: bool, effort: Effort | None
) -> Iterator[str]:
    # --statistics is an imatrix too, where none is given
    if imatrix is not None and (calibration.statistics is None or Path(imatrix.path) != calibration.statistics):
        yield f"--imatrix={Path(imatrix.path).name}"
    if effort is not None and effort != Effort.DEFAULT:
        yield f"--effort={effort.name.lower()}"
    if allow_requantize:
        yield "--allow-requantize"


def _split(words: tuple[str, ...]) -> tuple[str, ...]:
    """`--option value` as two words; a value that begins with a dash stays with its option."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        found += [word] if not equals or value.startswith("-") else [option, value]
    return tuple(found)
