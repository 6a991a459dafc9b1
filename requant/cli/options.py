"""Options that several commands share, as decorators; values are parsed before a command begins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from requant.api.session_options import SessionOptions
from requant.cli import completion
from requant.cli.command import WRITTEN, OptionalValue, WordChoice
from requant.common.units import suggest_number
from requant.container.splitting import Splitting
from requant.errors import FILE_NAME, UsageError, brief, is_address
from requant.formats import Effort
from requant.planning.options import PLAN_OPTIONS
from requant.planning.plan import COMPENSATIONS
from requant.planning.request import OPTIONS_BY_FIELD, build_request
from requant.planning.rules import LARGEST, parse_bytes, parse_mixture, parse_written_type
from requant.scoring.options import CalibrationOptions, check_calibration

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
GGUF = completion.files(".gguf")
JSON = completion.files(".json")


_SHOWN = 1024  # the largest number that the help shows as the end of a range


class FilePath(click.Path):
    """The path of a file. It is not checked here: a wrong file is bad input, not usage."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. Raises UsageError for an address where an output is to be written."""
        if param is not None and param.name in WRITTEN and isinstance(value, str) and is_address(value):
            raise UsageError(f"{_shown_name(param)}: '{brief(value)}' is an address; outputs are files on this machine")
        return super().convert(value, param, ctx)


def _shown_name(param: click.Parameter | None) -> str:
    if param is None:
        return "value"
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


def _check_number(kind: type[float], value: Any, param: click.Parameter | None) -> None:
    """Raise UsageError for text that is no number, with the number that was probably meant, or the default."""
    try:
        kind(value)
    except ValueError as error:
        hint = suggest_number(value, whole=kind is int)
        default = param.show_default if isinstance(param, click.Option) else None
        if not hint and isinstance(default, str) and value.isalpha():
            hint = f"leave the option out for the default: {default}"
        what = "no whole number" if kind is int else "no number"
        message = f"{_shown_name(param)}: '{brief(str(value))}' is {what}"
        raise UsageError(f"{message}; {hint or f'write it as in {8 if kind is int else 0.5}'}") from error


class Count(click.IntRange):
    """A whole number; the help shows where it begins and not the largest that its bits can hold."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number. Raises UsageError for other text."""
        _check_number(int, value, param)
        return super().convert(value, param, ctx)

    def _describe_range(self) -> str:
        return f"{self.min} to {self.max}" if self.max is not None and self.max <= _SHOWN else f"{self.min} or more"


class Number(click.FloatRange):
    """A number, whole or not; any number where no range is given."""

    def _describe_range(self) -> str:
        return super()._describe_range() if self.min is not None else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number. Raises UsageError for other text."""
        _check_number(float, value, param)
        return super().convert(value, param, ctx)


FILE = FilePath()


def parsed_by(parse: Callable[[Any, str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that parses a value that was given; `parse` takes it and the option's name."""
    return lambda _, param, value: None if value is None else parse(value, param.opts[0])


def file_option(*names: str, metavar: str = "F", **how: Any) -> Decorator:
    """Add the option `names` whose value is the path of a file."""
    return click.option(*names, type=FILE, metavar=metavar, **how)


def _together(*decorators: Decorator) -> Decorator:
    return lambda command: functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), command)


model = click.argument("model", type=FILE, shell_complete=GGUF)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
threads = click.option(
    "--threads", type=Count(1, 1024), metavar="N", show_default="all cores", help="Threads that work."
)
cluster = click.option(
    "--cluster", metavar="ADDRESS", help="Let the workers of a Dask scheduler do it: tcp://host:8786."
)
imatrix = _together(
    file_option("--imatrix", shell_complete=GGUF, help="Importance matrix of this model (GGUF or .dat)."),
    click.option("--no-imatrix", is_flag=True, help="Weigh no columns, whatever the plan or the losses point to."),
)
losses = file_option("--losses", shell_complete=JSON, help="Losses from `requant score`, instead of scoring now.")
force = click.option("--force", is_flag=True, help="Replace files that exist.")
single_type = click.option(
    *("--type", "type_name"),
    metavar="T",
    callback=parsed_by(parse_written_type),
    shell_complete=completion.types,
    help="One type for all that may be quantized.",
)
effort = click.option(
    "--effort",
    type=WordChoice([e.name.lower() for e in Effort]),
    callback=parsed_by(lambda name, _: Effort[name.upper()]),
    show_default=Effort.DEFAULT.name.lower(),
    help="How hard the encoders search for less error.",
)
compensate = _together(
    click.option(
        "--compensate",
        cls=OptionalValue,
        values=COMPENSATIONS,
        metavar="HOW",
        help="Run the model, and round every weight to make up for the errors of those before it: fast, or best.",
    ),
    click.option("--no-compensate", is_flag=True, help="Round every weight by itself, whatever the plan says."),
)


def max_memory(price: str) -> Decorator:
    """Add --max-memory, which has a price."""
    said = f"Stay below this; {price}."
    return click.option("--max-memory", callback=parsed_by(parse_bytes), metavar="SIZE", help=said)


allow_requantize = click.option(
    "--allow-requantize", is_flag=True, help="Accept a model that is already quantized below Q8_0."
)
text = file_option("--text", help="UTF-8 text to run the model on.", show_default="one that ships with requant")
engine = click.option("--engine", is_flag=True, help="Run it in llama.cpp, which the extra `engine` installs.")
own_text = file_option("--text", help="UTF-8 text to run the model on; this or --tokens is needed.")
tokens = file_option("--tokens", help="Token ids to run the model on, instead of a text.")
window = click.option(
    "--window",
    type=Count(16, 2**17),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a window; windows see nothing of each other.",
)


def windows(default: int | None) -> Decorator:
    """Add --windows, the number of windows of the text to run."""
    return click.option(
        *("--windows", "n_windows"),
        type=Count(1),
        default=default,
        metavar="N",
        show_default="all" if default is None else True,
        help="Windows of the text to run, spread over it.",
    )


def collected(name: str, kind: type[Any], check: Callable[[Any], None] = lambda _: None) -> Decorator:
    """Return a decorator that passes the parameters named like fields of `kind` as one checked value, `name`."""
    names = {f.name for f in fields(kind)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def collecting(**given: Any) -> Any:
            value = kind(**{name: given.pop(name) for name in names & given.keys()})
            check(value)
            return command(**{name: value}, **given)

        return collecting

    return decorate


session_options = collected("session_options", SessionOptions)
calibration = _together(
    collected("calibration", CalibrationOptions, check_calibration),
    text,
    tokens,
    windows(8),
    window,
    click.option("--quick", is_flag=True, help="Score without running the model: in seconds, but worse."),
    file_option("--statistics", shell_complete=GGUF, help="Score with these, from `requant calibrate`."),
)


def _check_result_name(_: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() == ".gguf":
        what = f"'{brief(value.name, FILE_NAME)}' is the name of a model, and the result is none"
        raise UsageError(f"{param.opts[0]}: {what}; name it .json")
    return value


def result_file(what: str, *, is_text: bool = True) -> Decorator:
    """Add -o, the file of the result; a text is not written under the name of a model."""
    check = _check_result_name if is_text else None
    return file_option("-o", "--output", "out", callback=check, help=f"Write the {what} here.")


COMPLETERS = {
    "": None,
    "types": completion.types,
    "cache_types": completion.cache_types,
    "engines": completion.engines,
    "ggufs": GGUF,
}


def plan_option(flag: str, **changes: Any) -> Decorator:
    """Add the option of a plan called `flag`, with `changes` to the arguments of click."""
    option = next(option for option in PLAN_OPTIONS if option.flag == flag)
    kind, how = option.kind, dict[str, Any]()
    if kind.python_type is bool:
        how = {"is_flag": True, "default": None}
    elif kind.python_type is Path:
        how = {"type": FILE}
    elif kind.python_type is int:
        how = {"type": Count(1, LARGEST)}
    elif kind.python_type is float:
        how = {"type": Number(kind.low, kind.high)}
    else:
        how = {"callback": parsed_by(kind.parse_text or kind.parse)}
    how |= {"metavar": kind.metavar or None, "multiple": kind.multiple, "shell_complete": COMPLETERS[kind.complete]}
    how |= {"show_default": option.show_default, "help": option.help}
    return click.option(flag, **(how | changes))


def budget(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a plan, which reach the command as `request`; the sizes of --vram also as `vrams`."""

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        asked = {option.keyword: given.pop(option.keyword) for option in PLAN_OPTIONS}
        vrams = asked["vram"] or ()
        asked["vram"] = vrams[0] if vrams else None
        return command(request=build_request(asked), vrams=vrams, **given)

    return _together(*(plan_option(option.flag) for option in OPTIONS_BY_FIELD))(parsed)


splitting = _together(
    collected("splitting", Splitting),
    click.option(
        "--keep-split", "keep", is_flag=True, help="Split the output as the model is: OUT-00001-of-0000N.gguf."
    ),
    click.option(
        *("--max-shard-size", "max_size"),
        callback=parsed_by(parse_bytes),
        metavar="SIZE",
        help="Split the output into files of at most SIZE.",
    ),
)
preset = click.option(
    "--preset",
    metavar="M",
    callback=parsed_by(parse_mixture),
    shell_complete=completion.presets,
    help="The types of llama-quantize's mixture, Q4_K_M for one.",
)
like = file_option(
    "--like", shell_complete=GGUF, help="The types of another GGUF, repaired to a budget if one is given."
)


def check_report_names(_: click.Context, __: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the paths of reports. Raises UsageError for a suffix that no report has."""
    from requant.report.kinds import check_kind

    for path in paths:
        check_kind(path)
    return paths


report = file_option(
    *("--report", "reports"),
    multiple=True,
    callback=check_report_names,
    help="Report on the output too: .html a page, .md a model card, .png or .svg a picture.",
)
