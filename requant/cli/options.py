"""Options that several commands share, as decorators; each is parsed into its value before anything is done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from requant.cli import completion, values
from requant.cli.command import Choice
from requant.cli.values import Count, Size, Sizes
from requant.container.splitting import Splitting
from requant.formats import Effort
from requant.planning.request import PREFERENCE, PlanRequest

MIN_CTX = 16  # tokens of a window


CONTEXT = Count(1, 2**31 - 1)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
FILE = values.FILE
GGUF = completion.files(".gguf")
JSON = completion.files(".json")


def _together(*decorators: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), command)

    return decorate


model = click.argument("model", type=FILE, shell_complete=GGUF)
json_output = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
threads = click.option(
    "--threads", type=Count(1, 1024), metavar="N", show_default="all cores", help="Threads that work."
)
cluster = click.option(
    "--cluster", metavar="ADDRESS", help="Let the workers of a Dask scheduler do it: tcp://host:8786."
)
imatrix = click.option(
    "--imatrix", type=FILE, metavar="F", shell_complete=GGUF, help="Importance matrix of this model (GGUF or .dat)."
)
losses = click.option(
    "--losses",
    type=FILE,
    metavar="F",
    shell_complete=JSON,
    help="Losses from `requant score`, instead of scoring now.",
)
force = click.option("--force", is_flag=True, help="Replace files that exist.")
types = click.option(
    "--types",
    metavar="T,..",
    callback=values.types_of,
    shell_complete=completion.types,
    show_default="Q4_0 to Q8_0, Q2_K to Q6_K, more with --engine",
    help="The types to choose from.",
)
single_type = click.option(
    "--type",
    "type_name",
    metavar="T",
    callback=values.written_type_of,
    shell_complete=completion.types,
    help="One type for all that may be quantized.",
)
effort = click.option(
    "--effort",
    type=Choice([e.name.lower() for e in Effort]),
    callback=values.effort_of,
    show_default=Effort.DEFAULT.name.lower(),
    help="How hard the encoders search for less error.",
)
allow_requantize = click.option(
    "--allow-requantize", is_flag=True, help="Accept a model that is already quantized below Q8_0."
)
text = click.option(
    "--text", type=FILE, metavar="F", help="UTF-8 text to run the model on.", show_default="one that ships with requant"
)
tokens = click.option("--tokens", type=FILE, metavar="F", help="Token ids to run the model on, instead of a text.")
window = click.option(
    "--window",
    type=Count(MIN_CTX, 2**17),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a window; windows see nothing of each other.",
)


def windows(default: int | None) -> Decorator:
    """--windows: how many windows of the text are run."""
    return click.option(
        "--windows",
        "n_windows",
        type=Count(1),
        default=default,
        metavar="N",
        show_default="all" if default is None else True,
        help="Windows of the text to run, spread over it.",
    )


def _calibration(command: Callable[..., Any]) -> Callable[..., Any]:
    from requant.scoring.calibration_data import CalibrationOptions, check_calibration  # loads NumPy

    names = {f.name for f in fields(CalibrationOptions)}

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        asked = CalibrationOptions(**{name: given.pop(name) for name in names & given.keys()})
        check_calibration(asked)
        return command(calibration=asked, **given)

    return parsed


calibration = _together(
    _calibration,
    text,
    tokens,
    windows(8),
    window,
    click.option("--quick", is_flag=True, help="Score without running the model: in seconds, but worse."),
    click.option(
        "--statistics",
        type=FILE,
        metavar="F",
        shell_complete=GGUF,
        help="Score with these, from `requant calibrate`.",
    ),
)


def result_file(what: str, *, is_text: bool = True) -> Decorator:
    """-o: where the command's result goes; a text is not written under the name of a model."""
    return click.option(
        "-o",
        "--output",
        "out",
        type=FILE,
        metavar="F",
        callback=values.result_of if is_text else None,
        help=f"Write the {what} here.",
    )


parallel = click.option(
    "--parallel", "n_parallel", type=CONTEXT, metavar="N", show_default="1", help="Sequences at once."
)
_BUDGET = (
    click.option(
        "--vram", type=Sizes(), metavar="SIZE,..", help="VRAM for weights, KV cache, buffers and reserve, as in 12GiB."
    ),
    click.option("--ram", type=Size(), metavar="SIZE", help="RAM for what is not on the GPU."),
    click.option(
        "--ctx",
        "n_ctx",
        metavar="N|max",
        callback=values.context_of,
        show_default="the model's own, at most 4096",
        help="Context in tokens, over all sequences (16k); 0: the model's own; max: the largest that keeps --max-loss.",
    ),
    click.option(
        "--cache-type-k",
        metavar="T|auto",
        callback=values.cache_type_of,
        shell_complete=completion.cache_types,
        show_default="f16",
        help="Type of the K cache; auto measures what smaller ones cost.",
    ),
    click.option(
        "--cache-type-v",
        metavar="T|auto",
        callback=values.cache_type_of,
        shell_complete=completion.cache_types,
        show_default="f16",
        help="Type of the V cache.",
    ),
    parallel,
    click.option(
        "--ubatch",
        "n_ubatch",
        type=CONTEXT,
        metavar="N",
        show_default="512 if they fit, else fewer",
        help="Tokens computed at once.",
    ),
    click.option(
        "--reserve",
        type=Size(0),
        metavar="SIZE",
        show_default="1GiB, at most a tenth of --vram",
        help="VRAM to leave free.",
    ),
    click.option(
        "--draft",
        type=FILE,
        metavar="F",
        shell_complete=GGUF,
        help="A draft model or EAGLE-3 head that shares the VRAM.",
    ),
    click.option(
        "--mmproj", type=FILE, metavar="F", shell_complete=GGUF, help="A vision projector that shares the VRAM."
    ),
    click.option("--mtp", is_flag=True, default=None, help="Layers of multi-token prediction are used."),
    click.option("--assume", is_flag=True, default=None, help="Plan for an unknown architecture with an upper bound."),
    click.option(
        "--min-speed", type=float, metavar="X", help="Tokens per second of decoding, predicted from bandwidths."
    ),
    click.option(
        "--bandwidth",
        metavar="D=X,..",
        callback=values.bandwidth_of,
        show_default="the engine's, gpu=400,cpu=50,pcie=16 for most",
        help="GB/s (powers of ten) of GPU, CPU and PCIe.",
    ),
    click.option(
        "--time-price",
        "price",
        type=click.FloatRange(0),
        metavar="X",
        show_default="0.2",
        help="Nats of loss that a second per token is worth, with --ram.",
    ),
    click.option(
        "--engine",
        metavar="E",
        callback=values.engine_of,
        shell_complete=completion.engines,
        show_default="llama.cpp, types that any build reads",
        help="What will run it: llama.cpp-cuda, ollama, ...",
    ),
    click.option(
        "--prefer-within",
        type=click.FloatRange(0, 10),
        metavar="X",
        show_default=str(PREFERENCE),
        help="Share of the loss that the engine's own type (NVFP4) may cost.",
    ),
    click.option(
        "--max-loss", type=float, metavar="X", help="Predicted loss in nats per token to keep, with the fewest bytes."
    ),
    click.option("--size", type=Size(), metavar="SIZE", help="Size of the whole file, header and all."),
    click.option("--bpw", type=float, metavar="X", help="Bits per weight over all tensors."),
    click.option(
        "--tensor-type",
        "pins",
        multiple=True,
        metavar="REGEX=TYPE",
        callback=values.rules_of,
        help="Give the tensors whose names match this type; may be repeated, the first match decides.",
    ),
    click.option("--tensor-type-file", "pins_file", type=FILE, metavar="F", help="A file of REGEX=TYPE lines."),
    click.option(
        "--min-type",
        "floors",
        multiple=True,
        metavar="REGEX=TYPE",
        callback=values.rules_of,
        help="Nothing smaller for the tensors that match; may be repeated.",
    ),
    click.option(
        "--group",
        "groups",
        multiple=True,
        metavar="REGEX",
        help="The tensors that match share a type; may be repeated.",
    ),
    click.option(
        "--output-tensor-type",
        "output_type",
        metavar="T",
        callback=values.type_of,
        shell_complete=completion.types,
        help="The type of output.weight.",
    ),
    click.option(
        "--token-embedding-type",
        "embedding_type",
        metavar="T",
        callback=values.type_of,
        shell_complete=completion.types,
        help="The type of token_embd.weight.",
    ),
    types,
)


def budget(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a budget, which reach the command as `request`; --vram, which may be several, as `vrams`."""
    names = {f.name for f in fields(PlanRequest)}

    @functools.wraps(command)
    def parsed(**given: Any) -> Any:
        path = given.pop("pins_file")
        asked = {name: given.pop(name) for name in names & given.keys()}
        vrams = asked.pop("vram") or ()
        if path is not None:
            from requant.planning.recipe import read_tensor_types

            asked["pins"] += read_tensor_types(path)
        return command(request=PlanRequest(**asked, vram=vrams[0] if vrams else None), vrams=vrams, **given)

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
preset = click.option(
    "--preset",
    metavar="M",
    callback=values.preset_of,
    shell_complete=completion.presets,
    help="The types of llama-quantize's mixture, Q4_K_M for one.",
)
like = click.option(
    "--like",
    type=FILE,
    metavar="F",
    shell_complete=GGUF,
    help="The types of another GGUF, repaired to a budget if one is given.",
)


def report_files(_: click.Context, __: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The names of reports, each of a kind that there is."""
    from requant.report.publish import check_kind

    for path in paths:
        check_kind(path)
    return paths


report = click.option(
    "--report",
    "reports",
    type=FILE,
    multiple=True,
    callback=report_files,
    metavar="F",
    help="Report on the output too: .html a page, .md a model card, .png or .svg a picture.",
)
