"""`requant score`: what each type would cost each tensor, written to a file that plans are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api.score import score_to_files
from requant.api.session import connect_cluster, open_session
from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.common.atomic_write import check_writable, write_text
from requant.container.source import open_source
from requant.errors import UsageError
from requant.planning.request import PlanRequest
from requant.report.text.table import losses_table
from requant.scoring.calibration_data import CalibrationOptions


@click.command("score", cls=Command)
@options.model
@options.result_file("losses")
@click.option(
    "--emit-imatrix",
    "emit",
    type=options.FILE,
    metavar="F",
    help="Write the importance measured on the way: an --imatrix for convert.",
)
@options.imatrix
@options.calibration
@options.types
@options.threads
@options.cluster
@options.effort
@options.allow_requantize
@options.force
@options.json_output
def command(
    *,
    model: Path,
    out: Path | None,
    emit: Path | None,
    calibration: CalibrationOptions,
    types: tuple[str, ...],
    cluster: str | None,
    force: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure what each type would cost each tensor.

    Every matrix is encoded in every type; what that changes is weighed by gradients of the model on a text, which
    gives a predicted KL divergence in nats per token. The model is run a layer at a time, on the CPU. The losses serve
    any number of plans.
    """
    if out is None and not as_json:
        raise UsageError("nowhere to put the losses; say -o LOSSES.json or --json")
    with open_source(model) as source, connect_cluster(cluster, messages.info) as workers:
        messages.warn(*source.warnings)
        job = open_session(
            source, PlanRequest(types=types), calibration, **how, cluster=workers, monitor=messages.MONITOR
        )
        if out is not None:
            check_writable(out, force=force, inputs=job.inputs)
        losses = score_to_files(job, emitted=emit, force=force)
        if out is not None:
            write_text(out, losses.to_json(), force=force, inputs=job.inputs)
    messages.print_result(losses.to_json() if as_json else losses_table(losses, terminal.width()))
