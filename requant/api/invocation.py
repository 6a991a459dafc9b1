"""The options that decided a plan or losses, as one would type them again: values as they were meant, no folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.common.units import size_label
from requant.formats import Effort
from requant.planning.engines import GB
from requant.planning.request import MAX_CONTEXT, PlanRequest
from requant.scoring.calibration_data import CalibrationOptions

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.container.imatrix import Imatrix
    from requant.planning.plan import Plan

Shown = Callable[[Any], str]

_LOSSES = "losses.json"  # the name of those that were given as data


def _number(value: float) -> str:
    return f"{value:.12g}"


def _rates(value: tuple[tuple[str, float], ...]) -> str:
    return ",".join(f"{device}={_number(rate / GB)}" for device, rate in value)


def _name(path: Path) -> str:
    return path.name


# field of PlanRequest or CalibrationOptions -> its option, and how a value of it is typed
_WISHES: Mapping[str, tuple[str, Shown]] = {
    "vram": ("--vram", size_label),
    "ram": ("--ram", size_label),
    "n_ctx": ("--ctx", lambda n: "max" if n == MAX_CONTEXT else str(n)),
    "cache_type_k": ("--cache-type-k", str.lower),
    "cache_type_v": ("--cache-type-v", str.lower),
    "n_parallel": ("--parallel", str),
    "n_ubatch": ("--ubatch", str),
    "reserve": ("--reserve", size_label),
    "draft": ("--draft", _name),
    "mmproj": ("--mmproj", _name),
    "mtp": ("--mtp", str),
    "assume": ("--assume", str),
    "min_speed": ("--min-speed", _number),
    "bandwidth": ("--bandwidth", _rates),
    "price": ("--time-price", _number),
    "engine": ("--engine", str),
    "prefer_within": ("--prefer-within", _number),
    "max_loss": ("--max-loss", _number),
    "size": ("--size", size_label),
    "bpw": ("--bpw", _number),
    "pins": ("--tensor-type", lambda rule: f"{rule.pattern}={rule.type}"),
    "floors": ("--min-type", lambda rule: f"{rule.pattern}={rule.type}"),
    "groups": ("--group", str),
    "output_type": ("--output-tensor-type", str),
    "embedding_type": ("--token-embedding-type", str),
    "types": ("--types", str),
}
_CALIBRATION: Mapping[str, tuple[str, Shown]] = {
    "text": ("--text", _name),
    "tokens": ("--tokens", _name),
    "n_windows": ("--windows", str),
    "window": ("--window", str),
    "quick": ("--quick", str),
    "statistics": ("--statistics", _name),
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
    own = [] if job.losses is not None else _of(job.calibration, CalibrationOptions(), _CALIBRATION)
    how = _how(job.imatrix, job.calibration, job.allow_requantize, job.effort)
    return _split((*_of(job.request, PlanRequest(), _WISHES), *words, *own, *how))


def score_options(
    types: tuple[str, ...],
    imatrix: Imatrix | None,
    calibration: CalibrationOptions,
    *,
    allow_requantize: bool,
    effort: Effort | None,
) -> tuple[str, ...]:
    """Of `requant score`: all that decides the losses."""
    own = _of(calibration, CalibrationOptions(), _CALIBRATION)
    how = _how(imatrix, calibration, allow_requantize, effort)
    return _split((*_of(PlanRequest(types=types), PlanRequest(), _WISHES), *own, *how))


def _of(value: Any, default: Any, options: Mapping[str, tuple[str, Shown]]) -> Iterator[str]:
    """`--option=value` for each field that is not as by default."""
    for name, (option, shown) in options.items():
        found = getattr(value, name)
        if found is None or found == getattr(default, name):
            continue
        if name == "types":
            yield f"{option}={','.join(found)}"
        elif found is True:
            yield option
        elif name in ("pins", "floors", "groups"):
            yield from (f"{option}={shown(item)}" for item in found)
        elif found is not False:
            yield f"{option}={shown(found)}"


def _how(
    imatrix: Imatrix | None, calibration: CalibrationOptions, allow_requantize: bool, effort: Effort | None
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
