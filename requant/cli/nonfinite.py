"""`--nonfinite`: what `requant convert` does with tensors that hold weights which are no numbers."""

from __future__ import annotations

import click

from requant.cli import messages
from requant.cli.command import Choice
from requant.container.source import Source

option = click.option(
    "--nonfinite",
    type=Choice(["error", "keep-type"]),
    default="error",
    show_default=True,
    help="What to do with tensors that hold NaN or infinity: stop, or copy them.",
)


def settle(source: Source, nonfinite: str, threads: int | None) -> None:
    """With `keep-type`, read all of the model, and have the tensors that are not finite stay as they are."""
    from requant.finite import keep_nonfinite

    if nonfinite != "keep-type":
        return
    messages.prepare_kernels({t.format for t in source.tensors}, encode=False)
    with messages.progress("scanning", sum(t.n_bytes for t in source.tensors)) as advance:
        found = messages.interruptible(keep_nonfinite, source, threads=threads, progress=advance)
    messages.warn(*found)
