"""`requant inspect`: types, sizes and memory needs of a model, from its header alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.container.source import open_source
from requant.model.inspection import inspect
from requant.planning.request import build_request
from requant.planning.rules import parse_fixed_cache_type, parse_tokens
from requant.report.text.inspection import model_facts, model_tables


def _cache_type(kind: str) -> options.Decorator:
    parse, what = options.parsed_by(parse_fixed_cache_type), f"Type of the {kind} cache."
    return options.plan_option(f"--cache-type-{kind.lower()}", metavar="T", callback=parse, help=what)


@click.command("inspect", cls=Command)
@options.model
@options.plan_option(
    "--ctx",
    metavar="N",
    callback=options.parsed_by(parse_tokens),
    help="Context in tokens, over all sequences (16k); 0: the model's own.",
)
@_cache_type("K")
@_cache_type("V")
@options.plan_option("--parallel")
@options.plan_option("--ubatch", show_default="512")
@options.plan_option("--reserve", show_default="nothing", help="VRAM to leave free, counted in.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.json_output
def command(*, model: Path, tensors: bool, as_json: bool, **given: Any) -> None:
    """Show what a model is made of and what it needs in VRAM.

    Types and roles with their bytes and bits per weight, and the VRAM for weights, KV cache and compute buffer,
    counted as a plan counts them. Only the header is read. On a terminal the bits of each layer are drawn as bars.
    """
    request = build_request(given)
    with open_source(model) as source:
        found = inspect(source, request.settings, request.reserve or 0)
    messages.warn(*found.warnings)
    if as_json:
        messages.print_result(found.to_json())
    else:
        width = terminal.width()
        picture = terminal.model_picture(found)
        messages.print_result(model_facts(found, width), *picture, *model_tables(found, width, tensors=tensors))
