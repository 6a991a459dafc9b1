"""`requant plan`: a type for each tensor within a budget, shown and written for `requant convert --plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.cli import messages, options, stages
from requant.cli.calibration import Calibration
from requant.container.source import open_source
from requant.pipeline import Wishes, check_wishes
from requant.report.table import plan_table
from requant.textfile import check_writable, write_text


@click.command()
@options.model
@options.losses
@options.budget
@options.imatrix
@options.calibration
@options.result_file("plan")
@options.threads
@options.effort
@options.allow_requantize
@options.force
@options.json_output
@options.debug
def command(
    *, model: Path, wishes: Wishes, calibration: Calibration, out: Path | None, force: bool, as_json: bool, **how: Any
) -> None:
    """Choose a type for each tensor within a budget: --vram, --size, --bpw, or several at once."""
    check_wishes(wishes)
    with open_source(model) as source:
        messages.warn(*source.warnings)
        job = stages.prepared(source, wishes, calibration, **how)
        if out is not None:
            check_writable(out, force=force, inputs=job.inputs)
        plan, _ = job.planned()
        if out is not None:
            write_text(out, plan.to_json(), force=force, inputs=job.inputs)
    messages.emit(plan.to_json() if as_json else plan_table(plan))
