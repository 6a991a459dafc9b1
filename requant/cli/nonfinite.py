"""`--nonfinite`: the policy of `requant convert` for tensors that hold NaN or infinity."""

from __future__ import annotations

import click

from requant.cli.command import WordChoice
from requant.conversion.options import POLICIES

option = click.option(
    "--nonfinite",
    type=WordChoice(POLICIES),
    default=POLICIES[0],
    show_default=True,
    help="What to do with tensors that hold NaN or infinity: stop, or copy them.",
)
