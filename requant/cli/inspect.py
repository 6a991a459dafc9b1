"""`requant inspect`: what a model is made of; reads nothing but the header."""

from __future__ import annotations

from pathlib import Path

import click

from requant.cli import messages, options
from requant.container.source import open_source
from requant.report.inspect import as_text, inspect


@click.command()
@options.model
@click.option("--ctx", "n_ctx", type=options.CONTEXT, metavar="N", help="Context for the figures in VRAM.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.json_output
@options.debug
def command(*, model: Path, n_ctx: int | None, tensors: bool, as_json: bool) -> None:
    """Show what a model is made of and what it needs in VRAM."""
    with open_source(model) as source:
        found = inspect(source, n_ctx)
    messages.warn(*found.warnings)
    messages.emit(found.to_json() if as_json else as_text(found, tensors=tensors))
