"""`requant score`: what each type would cost each tensor, written to a file that plans are made from."""

from __future__ import annotations

from pathlib import Path

import click

from requant.cli import messages, options, stages
from requant.cli.calibration import Calibration
from requant.container.source import open_source
from requant.errors import UsageError
from requant.formats import Effort
from requant.report.table import losses_table
from requant.textfile import check_writable, write_text
from requant.wishes import Wishes


@click.command()
@options.model
@options.result_file("losses")
@options.imatrix
@options.calibration
@options.types
@options.threads
@options.cluster
@options.effort
@options.allow_requantize
@options.force
@options.json_output
@options.debug
def command(
    *,
    model: Path,
    out: Path | None,
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
    """Measure what each type would cost each tensor."""
    if out is None and not as_json:
        raise UsageError("nowhere to put the losses; say -o LOSSES.json or --json")
    with open_source(model) as source, stages.connected(cluster) as workers:
        messages.warn(*source.warnings)
        job = stages.prepared(source, Wishes(types=types), calibration, imatrix=imatrix)
        if out is not None:
            check_writable(out, force=force, inputs=job.inputs)
        scored = stages.score(
            source,
            types,
            job.imatrix,
            calibration,
            threads=threads,
            allow_requantize=allow_requantize,
            effort=effort,
            cluster=workers,
        )
        losses = scored.losses
        if out is not None:
            write_text(out, losses.to_json(), force=force, inputs=job.inputs)
    messages.emit(losses.to_json() if as_json else losses_table(losses))
