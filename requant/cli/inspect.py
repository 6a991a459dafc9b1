"""`requant inspect`: what a model is made of; reads nothing but the header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.cli import completion, messages, options, terminal, values
from requant.cli.command import Command
from requant.container.source import open_source
from requant.model.inspection import inspect
from requant.report.text.inspection import model_facts, model_tables


def _cache_type(kind: str) -> options.Decorator:
    return click.option(
        f"--cache-type-{kind}",
        metavar="T",
        callback=values.one_cache_type_of,
        shell_complete=completion.cache_types,
        show_default="f16",
        help=f"Type of the {kind.upper()} cache.",
    )


@click.command("inspect", cls=Command)
@options.model
@click.option(
    "--ctx",
    "n_ctx",
    metavar="N",
    callback=values.tokens_of,
    show_default="the model's own, at most 4096",
    help="Context in tokens, over all sequences (16k); 0: the model's own.",
)
@_cache_type("k")
@_cache_type("v")
@options.parallel
@click.option(
    "--ubatch", "n_ubatch", type=options.CONTEXT, metavar="N", show_default="512", help="Tokens computed at once."
)
@click.option(
    "--reserve", type=values.Size(0), metavar="SIZE", show_default="nothing", help="VRAM to leave free, counted in."
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.json_output
def command(*, model: Path, tensors: bool, as_json: bool, **asked: Any) -> None:
    """Show what a model is made of and what it needs in VRAM.

    Types and roles with their bytes and bits per weight, and the VRAM for weights, KV cache and compute buffer,
    counted as a plan counts them. Only the header is read. On a terminal the bits of each layer are drawn as bars.
    """
    with open_source(model) as source:
        found = inspect(source, asked, asked.pop("reserve") or 0)
    messages.warn(*found.warnings)
    if as_json:
        messages.print_result(found.to_json())
    else:
        width = terminal.width()
        picture = terminal.model_picture(found)
        messages.print_result(model_facts(found, width), *picture, *model_tables(found, width, tensors=tensors))
