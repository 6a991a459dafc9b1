"""The keywords of the Python API: the options of the command line as types, signatures and parsed values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any, TypedDict, TypeVar

from requant.api.arrays import parse_effort
from requant.api.session_options import SessionOptions
from requant.common.monitor import Progress
from requant.errors import UsageError, brief
from requant.planning.options import PLAN_OPTIONS
from requant.planning.plan import COMPENSATIONS
from requant.planning.request import (
    OPTIONS_BY_FIELD,
    FromBudget,
    PlanFrom,
    PlanRequest,
    build_request,
    check_frontier,
    choose_plan_from,
)
from requant.planning.rules import parse_bytes, parse_count, parse_mixture, parse_written_type
from requant.scoring.losses import Losses
from requant.scoring.options import CalibrationOptions, check_calibration

Function = TypeVar("Function", bound=Callable[..., object])
Where = str | os.PathLike[str]
Size = int | str  # bytes, or a number with its unit: "12GiB"
Words = str | Iterable[str]  # "Q4_K,Q6_K", or its parts
Report = Callable[[Progress], object]


class Scoring(TypedDict, total=False):
    """How losses are measured.

    imatrix: importance of this model (GGUF or .dat). no_imatrix: no importance, whatever plan or losses point to. text,
    tokens: files to run the model on, by default the text that ships with requant. windows, window: how many (8), of
    how many tokens (512). quick: without running the model. statistics: a file from `calibrate`. threads: all cores by
    default. cluster: address of a Dask scheduler. effort: fast, default or best. allow_requantize: accept a source
    below Q8_0. progress: called with a `Progress` every now and then.
    """

    imatrix: Where | None
    no_imatrix: bool
    text: Where | None
    tokens: Where | None
    windows: int
    window: int
    quick: bool
    statistics: Where | None
    threads: int | None
    cluster: str | None
    effort: str | None
    allow_requantize: bool
    progress: Report | None


class Planning(Scoring, total=False):
    """The options of a plan, and how losses are measured where none are given."""

    vram: Size | None
    ram: Size | None
    ctx: int | str | None
    cache_type_k: str | None
    cache_type_v: str | None
    parallel: int | None
    ubatch: int | None
    reserve: Size | None
    draft: Where | None
    mmproj: Where | None
    mtp: bool
    assume: bool
    min_speed: float | None
    bandwidth: str | Mapping[str, float] | None
    time_price: float | None
    engine: str | None
    prefer_within: float | None
    max_loss: float | None
    size: Size | None
    bpw: float | None
    tensor_type: Mapping[str, str] | None
    tensor_type_file: Where | None
    min_type: Mapping[str, str] | None
    group: Words | None
    output_tensor_type: str | None
    token_embedding_type: str | None
    types: Words | None
    preset: str | None
    like: Where | None
    losses: Losses | Where | None


_DOCS = {
    **{o.keyword: o.doc or f"{o.help[:1].lower()}{o.help[1:-1]}" for o in OPTIONS_BY_FIELD},
    "preset": "a mixture of llama-quantize, Q4_K_M for one",
    "like": "a GGUF whose types are taken",
    "losses": "from `score`, or their file",
}
_DEFAULTS = {"windows": 8, "window": 512}


def _describe_keywords(docs: Mapping[str, str]) -> str:
    """Return a sentence for each of `docs`, with all the keywords that share it."""
    sharing: dict[str, list[str]] = {}
    for keyword, doc in docs.items():
        sharing.setdefault(doc, []).append(keyword)
    return fill(" ".join(f"{', '.join(names)}: {doc}." for doc, names in sharing.items()), 116)


Planning.__doc__ = f"{Planning.__doc__}\n\n{_describe_keywords(_DOCS)}"


def document_keywords(group: type[Any]) -> Callable[[Function], Function]:
    """Return a decorator that names the keywords of `group` in a signature, for help() and for notebooks."""

    def decorate(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_DEFAULTS.get(name, False if ref.__forward_arg__ == "bool" else None),
                annotation=ref.__forward_arg__,
            )
            for name, ref in sorted(group.__annotations__.items(), key=lambda item: item[0] in Scoring.__annotations__)
        ]
        signature = inspect.signature(function).replace(parameters=[*own, *more])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


def check_keywords(given: Mapping[str, Any], group: type[Any], function: str) -> None:
    """Raise TypeError, as Python does, for a keyword that `group` does not have, naming near ones."""
    for name in given:
        if name not in group.__annotations__:
            near = get_close_matches(name, group.__annotations__, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'{hint}")


def parse_request(given: Mapping[str, Any]) -> PlanRequest:
    """Return the request that the keywords of `Planning` make. Raises UsageError, and BadInput for a file of rules."""
    return build_request(
        {o.keyword: o.kind.parse(given[o.keyword], o.flag) for o in PLAN_OPTIONS if given.get(o.keyword) is not None}
    )


def parse_calibration(given: Mapping[str, Any]) -> CalibrationOptions:
    """Return the data to run the model on. Raises UsageError."""
    n, window = (given.get(name, default) for name, default in _DEFAULTS.items())
    calibration = CalibrationOptions(
        **{name: _parse_path(given, name) for name in ("text", "tokens", "statistics")},
        n_windows=None if n is None else parse_count(n, "--windows"),
        window=parse_count(window, "--window", 16, 2**17),
        quick=bool(given.get("quick")),
    )
    check_calibration(calibration)
    return calibration


def parse_plan_from(request: PlanRequest, given: Mapping[str, Any]) -> PlanFrom:
    """Return what decides the types. Raises UsageError unless exactly one keyword, or a budget, does."""
    plan, type_name = given.get("plan"), given.get("type")
    return choose_plan_from(
        request,
        plan=Path(plan) if isinstance(plan, str | os.PathLike) else plan,
        type_name=None if type_name is None else parse_written_type(type_name, "--type"),
        preset=None if given.get("preset") is None else parse_mixture(given["preset"], "--preset"),
        like=_parse_path(given, "like"),
    )


def parse_frontier_from(request: PlanRequest, given: Mapping[str, Any]) -> PlanFrom:
    """Return what decides the types of a frontier: its budgets, and `like`. Raises UsageError."""
    check_frontier(request)
    return FromBudget(_parse_path(given, "like"))


def _parse_path(given: Mapping[str, Any], keyword: str) -> Path | None:
    return None if given.get(keyword) is None else Path(given[keyword])


def parse_threads(threads: int | None) -> int | None:
    """Return the number of threads, None for one per processor. Raises UsageError."""
    return None if threads is None else parse_count(threads, "--threads", 1, 1024)


def parse_session_options(given: Mapping[str, Any]) -> SessionOptions:
    """Return how losses are measured and weights are encoded. Raises UsageError."""
    losses, effort, compensate = given.get("losses"), given.get("effort"), given.get("compensate")
    max_memory = given.get("max_memory")
    if not isinstance(compensate, bool | None) and compensate not in COMPENSATIONS:
        raise UsageError(f"--compensate: '{brief(str(compensate))}' is not known; it is {' or '.join(COMPENSATIONS)}")
    return SessionOptions(
        imatrix=_parse_path(given, "imatrix"),
        no_imatrix=bool(given.get("no_imatrix")),
        compensate=COMPENSATIONS[0] if compensate is True else compensate or None,
        no_compensate=bool(given.get("no_compensate")) or compensate is False,
        max_memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
        losses=Path(losses) if isinstance(losses, str | os.PathLike) else losses,
        threads=parse_threads(given.get("threads")),
        effort=None if effort is None else parse_effort(effort),
        allow_requantize=bool(given.get("allow_requantize")),
    )
