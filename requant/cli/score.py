"""`requant score`: what each type would cost each tensor, written to a file that plans are made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from requant.cli import messages, options, stages, terminal
from requant.cli.calibration import Calibration
from requant.cli.command import Command
from requant.cli.words import score_words
from requant.container.source import open_source
from requant.errors import UsageError
from requant.formats import Effort
from requant.report.table import losses_table
from requant.textfile import check_writable, write_text
from requant.wishes import Wishes


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
    imatrix: Path | None,
    calibration: Calibration,
    types: tuple[str, ...],
    threads: int | None,
    cluster: str | None,
    effort: Effort | None,
    allow_requantize: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what each type would cost each tensor.

    Every matrix is encoded in every type; what that changes is weighed by gradients of the model on a text, which
    gives a predicted KL divergence in nats per token. The model is run a layer at a time, on the CPU. The losses serve
    any number of plans.
    """
    if out is None and not as_json:
        raise UsageError("nowhere to put the losses; say -o LOSSES.json or --json")
    if emit is not None and (imatrix is not None or calibration.quick or calibration.statistics is not None):
        raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
    with open_source(model) as source, stages.connected(cluster) as workers:
        messages.warn(*source.warnings)
        job = stages.prepared(source, Wishes(types=types), calibration, imatrix=imatrix)
        if out is not None:
            check_writable(out, force=force, inputs=job.inputs)
        if emit is not None:
            stages.check_can_run(source)
            check_writable(emit, force=force, inputs=job.inputs)
        scored = stages.score(
            source,
            types,
            job.imatrix,
            calibration,
            threads=threads,
            allow_requantize=allow_requantize,
            effort=effort,
            weigh=emit is not None,
            cluster=workers,
        )
        how: dict[str, Any] = {"allow_requantize": allow_requantize, "effort": effort}
        losses = replace(scored.losses, options=score_words(types, job.imatrix, calibration, **how))
        if out is not None:
            write_text(out, losses.to_json(), force=force, inputs=job.inputs)
        if emit is not None:
            from requant.statistics import write_statistics

            assert scored.measured is not None
            write_statistics(emit, scored.measured[0], source, scored.measured[1], force=force, inputs=job.inputs)
    messages.emit(losses.to_json() if as_json else losses_table(losses, terminal.width()))
