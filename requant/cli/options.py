"""Options that several commands share, as decorators; each is parsed into its value before anything is done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from requant.budget import parse_rule, parse_type, parse_types
from requant.cli.calibration import Calibration
from requant.container.splitting import Splitting
from requant.errors import UsageError, printable
from requant.formats import FORMATS, Effort
from requant.units import parse_size
from requant.wishes import MAX_CONTEXT, Wishes

MIN_CTX = 16  # tokens of a window

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
FILE = click.Path(path_type=Path)  # not checked here: what is wrong with a file is bad input, not usage
CONTEXT = click.IntRange(1, 2**31 - 1)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """Bytes, from a number with its unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes, or a UsageError that names the option."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            raise UsageError(f"{param.opts[0] if param else 'size'}: {error}") from error


def _type(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else parse_type(value, param.opts[0])


def _written_type(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    name = _type(context, param, value)
    written = [f.name for f in FORMATS.values() if f.can_encode]
    if name is not None and name not in written:
        raise UsageError(f"{param.opts[0]}: {name} cannot be written; choose among {', '.join(written)}")
    return name


def _effort(_: click.Context, param: click.Parameter, value: str | None) -> Effort | None:
    return None if value is None else Effort[value.upper()]


def _types(_: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return () if value is None else parse_types(value, param.opts[0])


def _rules(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(parse_rule(value, param.opts[0]) for value in values)


def _together(*decorators: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), command)

    return decorate


model = click.argument("model", type=FILE)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
threads = click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads; all cores by default.")
cluster = click.option(
    "--cluster", metavar="ADDRESS", help="Let the workers of a Dask scheduler do it: tcp://host:8786."
)
imatrix = click.option("--imatrix", type=FILE, metavar="F", help="Importance matrix of this model (GGUF or .dat).")
losses = click.option("--losses", type=FILE, metavar="F", help="Losses from `requant score`, instead of scoring now.")
force = click.option("--force", is_flag=True, help="Replace files that exist.")
types = click.option("--types", metavar="T,..", callback=_types, help="The types to choose from.")
single_type = click.option(
    "--type", "type_name", metavar="T", callback=_written_type, help="One type for all that may be quantized."
)
effort = click.option(
    "--effort",
    type=click.Choice([e.name.lower() for e in Effort]),
    callback=_effort,
    help="How hard the encoders search for less error.",
)
allow_requantize = click.option(
    "--allow-requantize", is_flag=True, help="Accept a model that is already quantized below Q8_0."
)
text = click.option("--text", type=FILE, metavar="F", help="UTF-8 text to run the model on.")
tokens = click.option("--tokens", type=FILE, metavar="F", help="Token ids to run the model on, instead of a text.")
window = click.option(
    "--window",
    type=click.IntRange(MIN_CTX, 2**17),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a window; windows see nothing of each other.",
)


def windows(default: int | None) -> Decorator:
    """--windows: how many windows of the text are run."""
    shown = "all" if default is None else str(default)
    return click.option(
        "--windows",
        "n_windows",
        type=click.IntRange(1),
        default=default,
        metavar="N",
        help=f"Windows of the text to run, spread over it; {shown} by default.",
    )


def _calibration(command: Callable[..., Any]) -> Callable[..., Any]:
    names = {f.name for f in fields(Calibration)}

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        asked = Calibration(**{name: given.pop(name) for name in names & given.keys()})
        if asked.text is not None and asked.tokens is not None:
            raise UsageError("--text and --tokens cannot be given together")
        if asked.quick and (asked.text or asked.tokens or asked.statistics):
            raise UsageError("--quick scores without data; leave --text, --tokens and --statistics out")
        return command(calibration=asked, **given)

    return parsed


calibration = _together(
    _calibration,
    text,
    tokens,
    windows(8),
    window,
    click.option("--quick", is_flag=True, help="Score without running the model: in seconds, but worse."),
    click.option("--statistics", type=FILE, metavar="F", help="Score with these, from `requant calibrate`."),
)


def result_file(what: str) -> Decorator:
    """-o: where the command's result goes."""
    return click.option("-o", "--output", "out", type=FILE, metavar="F", help=f"Write the {what} here.")


def _bandwidth(_: click.Context, __: click.Parameter, value: str | None) -> tuple[tuple[str, float], ...] | None:
    from requant.runtime import parse_bandwidth

    return None if value is None else tuple(parse_bandwidth(value).items())


def _engine(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    from requant.runtime import engine_named

    return None if value is None else engine_named(value).name


def _context(_: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None or value.lower() == "max":
        return None if value is None else MAX_CONTEXT
    try:
        n = int(value)
    except ValueError:
        n = 0
    if not 1 <= n < 2**31:
        raise UsageError(f"--ctx: '{printable(value)}' is no number of tokens, nor max")
    return n


def _upper(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    return None if value is None else value.upper()


class Sizes(Size):
    """Sizes parted by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of bytes."""
        return tuple(Size.convert(self, part, param, ctx) for part in str(value).split(","))


_BUDGET = (
    click.option(
        "--vram", type=Sizes(), metavar="SIZE,..", help="VRAM for weights, KV cache, buffers and reserve: 12GiB."
    ),
    click.option("--ram", type=Size(), metavar="SIZE", help="RAM for what is not on the GPU."),
    click.option("--ctx", "n_ctx", metavar="N|max", callback=_context, help="Context, over all sequences."),
    click.option("--cache-type-k", metavar="T|auto", callback=_upper, help="Type of the K cache, f16 by default."),
    click.option("--cache-type-v", metavar="T|auto", callback=_upper, help="Type of the V cache, f16 by default."),
    click.option("--parallel", "n_parallel", type=CONTEXT, metavar="N", help="Sequences at once."),
    click.option("--ubatch", "n_ubatch", type=CONTEXT, metavar="N", help="Tokens computed at once; 512 if they fit."),
    click.option("--reserve", type=Size(), metavar="SIZE", help="VRAM to leave free (1GiB, at most a tenth)."),
    click.option("--draft", type=FILE, metavar="F", help="A draft model or EAGLE-3 head that shares the VRAM."),
    click.option("--mmproj", type=FILE, metavar="F", help="A vision projector that shares the VRAM."),
    click.option("--mtp", is_flag=True, default=None, help="Layers of multi-token prediction are used."),
    click.option("--assume", is_flag=True, default=None, help="Plan for an unknown architecture with an upper bound."),
    click.option("--min-speed", type=float, metavar="X", help="Tokens per second, predicted from bandwidths."),
    click.option("--bandwidth", metavar="D=X,..", callback=_bandwidth, help="GB/s: gpu=448,cpu=60,pcie=16."),
    click.option(
        "--time-price", "price", type=click.FloatRange(0), metavar="X", help="Loss a second per token is worth: 0.2."
    ),
    click.option("--engine", metavar="E", callback=_engine, help="What will run it: llama.cpp-cuda, ollama, ..."),
    click.option(
        "--prefer-within",
        type=click.FloatRange(0, 10),
        metavar="X",
        help="Share of the loss that the engine's own type (NVFP4) may cost: 0.05.",
    ),
    click.option("--max-loss", type=float, metavar="X", help="Predicted loss to keep, with the fewest bytes."),
    click.option("--size", type=Size(), metavar="SIZE", help="Size of the whole file."),
    click.option("--bpw", type=float, metavar="X", help="Bits per weight over all tensors."),
    click.option(
        "--tensor-type",
        "pins",
        multiple=True,
        metavar="REGEX=TYPE",
        callback=_rules,
        help="Give these tensors this type.",
    ),
    click.option("--tensor-type-file", "pins_file", type=FILE, metavar="F", help="A file of REGEX=TYPE lines."),
    click.option(
        "--min-type",
        "floors",
        multiple=True,
        metavar="REGEX=TYPE",
        callback=_rules,
        help="Nothing smaller for these tensors.",
    ),
    click.option("--group", "groups", multiple=True, metavar="REGEX", help="These tensors share a type."),
    click.option("--output-tensor-type", "output_type", metavar="T", callback=_type, help="The type of output.weight."),
    click.option(
        "--token-embedding-type", "embedding_type", metavar="T", callback=_type, help="The type of token_embd.weight."
    ),
    types,
)


def budget(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a budget, which reach the command as `wishes`; --vram, which may be several, as `vrams`."""
    names = {f.name for f in fields(Wishes)}

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        path = given.pop("pins_file")
        asked = {name: given.pop(name) for name in names & given.keys()}
        vrams = asked.pop("vram") or ()
        if path is not None:
            from requant.recipe import read_tensor_types  # needs NumPy, which most commands' help does not

            asked["pins"] += read_tensor_types(path)
        return command(wishes=Wishes(**asked, vram=vrams[0] if vrams else None), vrams=vrams, **given)

    return _together(*_BUDGET)(parsed)


def _splitting(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def parsed(*, keep_split: bool, max_shard_size: int | None, **given: Any) -> Any:
        return command(splitting=Splitting(keep_split, max_shard_size), **given)

    return parsed


splitting = _together(
    _splitting,
    click.option("--keep-split", is_flag=True, help="Split the output as the model is: OUT-00001-of-0000N.gguf."),
    click.option("--max-shard-size", type=Size(), metavar="SIZE", help="Split the output into files of at most SIZE."),
)
preset = click.option("--preset", metavar="M", help="The types of llama-quantize's mixture, Q4_K_M for one.")
like = click.option("--like", type=FILE, metavar="F", help="The types of another GGUF, repaired to a budget if given.")
