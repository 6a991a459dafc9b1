"""`requant inspect`: what a model is made of; reads nothing but the header."""

from __future__ import annotations

from pathlib import Path

import click

from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.container.source import open_source
from requant.report.inspect import facts, inspect, tables


@click.command("inspect", cls=Command)
@options.model
@click.option("--ctx", "n_ctx", type=options.CONTEXT, metavar="N", help="Context for the figures in VRAM.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.json_output
def command(*, model: Path, n_ctx: int | None, tensors: bool, as_json: bool) -> None:
    """Show what a model is made of and what it needs in VRAM.

    Types and roles with their bytes and bits per weight, and the VRAM for weights, KV cache and compute buffer at
    --ctx. Only the header is read. On a terminal the bits of each layer are drawn as bars.
    """
    with open_source(model) as source:
        found = inspect(source, n_ctx)
    messages.warn(*found.warnings)
    if as_json:
        messages.emit(found.to_json())
    else:
        width = terminal.width()
        picture = terminal.model_picture(found)
        messages.emit(facts(found, width), *picture, *tables(found, width, tensors=tensors))
