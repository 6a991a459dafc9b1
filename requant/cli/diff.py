"""`requant diff`: the differences between two plans or two models."""

from __future__ import annotations

from pathlib import Path

import click

from requant.cli import completion, messages, options
from requant.cli.command import Command
from requant.report.text.diff import compare_sides, difference_text, read_side


@click.command("diff", cls=Command)
@click.argument("a", type=options.FILE, shell_complete=completion.files(".json", ".gguf"))
@click.argument("b", type=options.FILE, shell_complete=completion.files(".json", ".gguf"))
@options.json_output
def command(*, a: Path, b: Path, as_json: bool) -> None:
    """Compare two plans, records or GGUFs: types, bytes, predicted loss.

    A line for each tensor whose type differs, with the bytes that B has more, then the sums of both.
    """
    found = compare_sides(read_side(a), read_side(b))
    messages.print_result(found.to_json() if as_json else difference_text(found))
