"""The values of options, parsed: each into what it means, or into a UsageError that says what may have been meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from requant.common.units import parse_size
from requant.errors import FILE_NAME, UsageError, brief, suggest
from requant.formats import Effort
from requant.model.engine_settings import OWN_CONTEXT
from requant.planning.request import AUTO, MAX_CONTEXT
from requant.planning.rules import parse_rule, parse_type, parse_types, parse_written_type

FILE = click.Path(path_type=Path)  # not checked here: what is wrong with a file is bad input, not usage


class Count(click.IntRange):
    """A whole number; the help says only where it begins, not at which number of bits it ends."""

    def _describe_range(self) -> str:
        return f"{self.min} or more"


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """Bytes, from a number with its unit."""

    name = "size"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes, or a UsageError that names the option."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value, self.least)
        except UsageError as error:
            raise UsageError(f"{param.opts[0] if param else 'size'}: {error}") from error


class Sizes(Size):
    """Sizes parted by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of bytes."""
        return tuple(Size.convert(self, part, param, ctx) for part in str(value).split(","))


def result_of(_: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Where a result that is text goes."""
    if value is not None and value.suffix.lower() == ".gguf":
        what = f"'{brief(value.name, FILE_NAME)}' is the name of a model, and the result is none"
        raise UsageError(f"{param.opts[0]}: {what}; name it .json")
    return value


def type_of(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The name of a ggml type."""
    return None if value is None else parse_type(value, param.opts[0])


def written_type_of(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The name of a type that can be written."""
    return None if value is None else parse_written_type(value, param.opts[0])


def effort_of(_: click.Context, param: click.Parameter, value: str | None) -> Effort | None:
    """How hard the encoders search."""
    return None if value is None else Effort[value.upper()]


def types_of(_: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Types that commas part."""
    return () if value is None else parse_types(value, param.opts[0])


def rules_of(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    """Rules, REGEX=TYPE each."""
    return tuple(parse_rule(value, param.opts[0]) for value in values)


def bandwidth_of(_: click.Context, __: click.Parameter, value: str | None) -> tuple[tuple[str, float], ...] | None:
    """Devices with their bytes per second."""
    from requant.planning.engines import parse_bandwidth

    return None if value is None else tuple(parse_bandwidth(value).items())


def engine_of(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """The name of a profile."""
    from requant.planning.engines import engine_named

    return None if value is None else engine_named(value).name


def context_of(context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Tokens, OWN_CONTEXT, or MAX_CONTEXT."""
    return MAX_CONTEXT if value is not None and value.lower() == "max" else tokens_of(context, param, value)


def tokens_of(_: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Tokens, `16k` being 16384, or OWN_CONTEXT."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,10})([kK]?)", value)
    n = -1 if match is None else int(match[1]) * (1024 if match[2] else 1)
    if not OWN_CONTEXT <= n < 2**31:
        what = f"'{brief(value)}' is no number of tokens"
        raise UsageError(f"{param.opts[0]}: {what}; write 16384, 16k, or 0 for the model's own")
    return n


def cache_type_of(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The type of a cache, or AUTO."""
    if value is None or value.upper() == AUTO:
        return None if value is None else AUTO
    from requant.model.engine_settings import CACHE_TYPES

    if value.upper() not in CACHE_TYPES:
        names = [AUTO.lower(), *(name.lower() for name in CACHE_TYPES)]
        raise UsageError(f"{param.opts[0]}: '{brief(value)}' is no cache type; {suggest(value, names)}")
    return value.upper()


def one_cache_type_of(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The type of a cache."""
    found = cache_type_of(context, param, value)
    if found == AUTO:
        raise UsageError(f"{param.opts[0]}: a plan chooses among types; name one")
    return found


def preset_of(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """The name of a mixture."""
    from requant.model.mixtures import mixture_names

    if value is not None and value.upper() not in mixture_names():
        raise UsageError(f"--preset: '{brief(value)}' is no mixture known here; {suggest(value, mixture_names())}")
    return value
