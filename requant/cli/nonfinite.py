"""`--nonfinite`: what `requant convert` does with tensors that hold weights which are no numbers."""

from __future__ import annotations

import click

from requant.api.convert import POLICIES
from requant.cli.command import Choice

option = click.option(
    "--nonfinite",
    type=Choice(POLICIES),
    default=POLICIES[0],
    show_default=True,
    help="What to do with tensors that hold NaN or infinity: stop, or copy them.",
)
