"""The keywords of the Python API, which are the options of the command line, and what is made of their values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from requant.api.arrays import parse_effort
from requant.common.monitor import Progress
from requant.common.units import parse_size
from requant.errors import UsageError, brief
from requant.model.engine_settings import OWN_CONTEXT
from requant.planning.engines import engine_named, parse_bandwidth
from requant.planning.request import MAX_CONTEXT, PlanRequest
from requant.planning.rules import parse_rule, parse_type, parse_types, parse_written_type
from requant.scoring.calibration_data import CalibrationOptions, check_calibration

if TYPE_CHECKING:
    from requant.planning.constraints import Rule
    from requant.scoring.losses import Losses

Function = TypeVar("Function", bound=Callable[..., object])
Where = str | os.PathLike[str]
Size = int | str  # bytes, or a number with its unit: "12GiB"
Words = str | Iterable[str]  # "Q4_K,Q6_K", or its parts
Report = Callable[[Progress], object]

_LARGEST = 2**31 - 1


class Scoring(TypedDict, total=False):
    """How losses are measured.

    imatrix: importance of this model (GGUF or .dat). text, tokens: files to run the model on, by default the text that
    ships with requant. windows, window: how many (8), of how many tokens (512). quick: without running the model.
    statistics: a file from `calibrate`. threads: all cores by default. cluster: address of a Dask scheduler. effort:
    fast, default or best. allow_requantize: accept a source below Q8_0. progress: called with a `Progress` every now
    and then.
    """

    imatrix: Where | None
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
    """What limits a plan, the request that go with it, and how losses are measured where none are given.

    vram, ram, size, reserve: bytes, or text with a unit. ctx: tokens over all sequences, or "max". cache_type_k,
    cache_type_v: a type, or "auto". parallel: sequences at once. ubatch: tokens computed at once. draft, mmproj: files
    that share the VRAM. mtp: layers of multi-token prediction are used. assume: an upper bound for a cache that is not
    known. min_speed: tokens per second. bandwidth: GB/s by device, {"gpu": 448}. time_price: loss that a second per
    token is worth. engine: what will run it, llama.cpp-cuda for one. prefer_within: share of the loss that the engine's
    own type may cost. max_loss: predicted loss, in the losses' unit. bpw: bits per weight over all tensors.
    tensor_type, min_type: {regular expression: type}, the first that matches decides. tensor_type_file: a file of
    REGEX=TYPE lines. group: expressions; what matches one shares a type. types: those to choose from.
    output_tensor_type, token_embedding_type: the type of output.weight, of token_embd.weight. preset: a mixture of
    llama-quantize, Q4_K_M for one. like: a GGUF whose types are taken. losses: from `score`, or their file.
    """

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


_DEFAULTS = {"windows": 8, "window": 512}


def keywords(group: type[Any]) -> Callable[[Function], Function]:
    """Name the keywords of `group` in the signature of a function that takes them, for help() and for notebooks."""

    def decorate(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(name, hint), annotation=hint)
            for name, hint in sorted(_hints(group).items(), key=lambda item: item[0] in Scoring.__annotations__)
        ]
        signature = inspect.signature(function).replace(parameters=[*own, *more])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


def _hints(group: type[Any]) -> dict[str, str]:
    return {name: ref.__forward_arg__ for name, ref in group.__annotations__.items()}


def _default(name: str, hint: str) -> object:
    return _DEFAULTS.get(name, False if hint == "bool" else None)


def check_known(given: Mapping[str, Any], group: type[Any], function: str) -> None:
    """Raise TypeError, as Python does, for a keyword that is none of `group`, naming those that are near."""
    for name in given:
        if name not in group.__annotations__:
            near = get_close_matches(name, group.__annotations__, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'{hint}")


def option(keyword: str) -> str:
    """The keyword as the command line's option, which messages name."""
    return f"--{keyword.replace('_', '-')}"


def size_of(name: str, value: Size, least: int = 1) -> int:
    """Bytes, at least `least`. Raises UsageError."""
    try:
        return parse_size(str(int(value)) if _is_whole(value) else value, least)  # type: ignore[arg-type]
    except (UsageError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error


def count_of(name: str, value: Any, low: int = 1, high: int = _LARGEST) -> int:
    """A whole number from `low` to `high`. Raises UsageError."""
    if not _is_whole(value) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high} (got {brief(repr(value))})")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's numbers too


def _number(name: str, value: Any, high: float = float("inf")) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= high:
        raise UsageError(f"{name} must be a number that is not negative, {high:g} at most (got {brief(repr(value))})")
    return float(value)


def path_of(_: str, value: Where) -> Path:
    """The path as one."""
    return Path(value)


def _context(name: str, value: Any) -> int:
    return MAX_CONTEXT if value == "max" else count_of(name, value, OWN_CONTEXT)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text (got {brief(repr(value))})")
    return value


def _bandwidth(_: str, value: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    text = value if isinstance(value, str) else ",".join(f"{device}={rate}" for device, rate in value.items())
    return tuple(parse_bandwidth(text).items())


def _rules(name: str, value: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(parse_rule(f"{pattern}={type_name}", name) for pattern, type_name in value.items())


def types_of(name: str, value: Words) -> tuple[str, ...]:
    """The names of types. Raises UsageError."""
    return parse_types(value if isinstance(value, str) else ",".join(value), name)


def _several(_: str, value: Words) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


# keyword -> the field of Wishes, and what makes its value
_WISHES: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    **{name: (name, size_of) for name in ("vram", "ram", "size")},
    "reserve": ("reserve", partial(size_of, least=0)),
    **{name: (name, path_of) for name in ("draft", "mmproj")},
    **{name: (name, lambda _, value: bool(value) or None) for name in ("mtp", "assume")},
    **{name: (name, _number) for name in ("min_speed", "max_loss", "bpw")},
    **{name: (name, lambda name, value: _text(name, value).upper()) for name in ("cache_type_k", "cache_type_v")},
    "ctx": ("n_ctx", _context),
    "parallel": ("n_parallel", count_of),
    "ubatch": ("n_ubatch", count_of),
    "bandwidth": ("bandwidth", _bandwidth),
    "time_price": ("price", _number),
    "engine": ("engine", lambda name, value: engine_named(_text(name, value)).name),
    "prefer_within": ("prefer_within", partial(_number, high=10)),
    "tensor_type": ("pins", _rules),
    "min_type": ("floors", _rules),
    "group": ("groups", _several),
    "types": ("types", types_of),
    "output_tensor_type": ("output_type", lambda name, value: parse_type(_text(name, value), name)),
    "token_embedding_type": ("embedding_type", lambda name, value: parse_type(_text(name, value), name)),
}


def parse_request(given: Mapping[str, Any]) -> PlanRequest:
    """What the keywords of `Planning` ask of a plan. Raises UsageError, and BadInput for a file of rules."""
    found = {
        field: make(option(keyword), given[keyword])
        for keyword, (field, make) in _WISHES.items()
        if given.get(keyword) is not None
    }
    if given.get("tensor_type_file") is not None:
        from requant.planning.recipe import read_tensor_types

        found["pins"] = found.get("pins", ()) + read_tensor_types(Path(given["tensor_type_file"]))
    return PlanRequest(**found)


def parse_calibration(given: Mapping[str, Any], n_windows: int | None = _DEFAULTS["windows"]) -> CalibrationOptions:
    """What the model is to be run on. Raises UsageError."""
    files = {name: None if given.get(name) is None else Path(given[name]) for name in ("text", "tokens", "statistics")}
    n = given.get("windows", n_windows)
    asked = CalibrationOptions(
        **files,
        n_windows=None if n is None else count_of("--windows", n),
        window=count_of("--window", given.get("window", _DEFAULTS["window"]), 16, 2**17),
        quick=bool(given.get("quick")),
    )
    check_calibration(asked)
    return asked


def parse_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `stages.job.prepared` that are in the keywords. Raises UsageError."""
    found: dict[str, Any] = {"allow_requantize": bool(given.get("allow_requantize"))}
    parsers: dict[str, Callable[[str, Any], Any]] = {
        "imatrix": path_of,
        "like": path_of,
        "losses": _data,
        "plan": _data,
        "preset": _text,
        "threads": partial(count_of, high=1024),
        "effort": lambda _, value: parse_effort(value),
    }
    found |= {name: make(option(name), given[name]) for name, make in parsers.items() if given.get(name) is not None}
    if given.get("type") is not None:
        found["type_name"] = parse_written_type(_text("--type", given["type"]), "--type")
    return found


def _data(_: str, value: Any) -> Any:
    return Path(value) if isinstance(value, str | os.PathLike) else value
