"""Click types and callbacks that parse the values of options with the library's parsers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from requant.errors import FILE_NAME, UsageError, brief
from requant.formats import Effort

FILE = click.Path(path_type=Path)  # not checked here: a wrong file is bad input, not usage
Callback = Callable[[click.Context, click.Parameter, Any], Any]


class Count(click.IntRange):
    """A whole number; the help shows where it begins and not the largest that its bits can hold."""

    def _describe_range(self) -> str:
        return f"{self.min} or more"


def parsed_by(parse: Callable[[Any, str], Any]) -> Callback:
    """Return a callback that parses a value that was given; `parse` takes it and the option's name."""

    def callback(_: click.Context, param: click.Parameter, value: Any) -> Any:
        return None if value is None else parse(value, param.opts[0])

    return callback


def check_result_name(_: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Return the path of a result. Raises UsageError where it has the suffix of a model."""
    if value is not None and value.suffix.lower() == ".gguf":
        what = f"'{brief(value.name, FILE_NAME)}' is the name of a model, and the result is none"
        raise UsageError(f"{param.opts[0]}: {what}; name it .json")
    return value


def parse_effort(_: click.Context, __: click.Parameter, value: str | None) -> Effort | None:
    """Return how hard the encoders search."""
    return None if value is None else Effort[value.upper()]
