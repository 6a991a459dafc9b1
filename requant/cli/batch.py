"""`requant batch`: many conversions from a job file, each source scored once, resumed as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.cli import completion, messages, options
from requant.cli.command import Command
from requant.common.units import format_size
from requant.errors import printable, put_path_first
from requant.report.text.grid import grid
from requant.scoring.losses import NATS, POINTS

if TYPE_CHECKING:
    from requant.api.batch.summary import Row

_UNITS = {
    NATS: f"in {NATS}: a KL divergence",
    POINTS: "in points, which compare plans of one model and are no KL divergence",
}


@click.command("batch", cls=Command)
@click.argument("jobs", metavar="JOBS.toml", type=options.FILE, shell_complete=completion.files(".toml"))
@click.option("--jobs", "at_once", type=options.Count(1, 64), default=1, metavar="N", help="Conversions at a time.")
@click.option("--keep-going", is_flag=True, help="Go on with the others after a failure.")
@options.file_option("--state", metavar="DIR", help="Where to keep scores, plans and what is done.")
@click.option("--dry-run", is_flag=True, help="Show the outputs that would be made; score and write nothing.")
@click.option("--restart", is_flag=True, help="Begin unfinished outputs anew.")
@options.force
@options.json_output
def command(*, jobs: Path, state: Path | None, as_json: bool, **given: Any) -> None:
    """Make the outputs that a file asks for.

    JOBS.toml has a [[job]] with source and output for each set of models, whose budgets and other keys are the options
    of `requant convert`; docs/batch.md describes it. The same command again skips what is done, resumes what was
    interrupted and tries again what failed. State is kept in JOBS.toml.requant unless --state says another folder.

    The exit code is 0 where every output is done, 9 where some are, that of the first failure where none is; a mistake
    in the file is 3, before anything is done.
    """
    from requant.api.batch.context import BatchContext, BatchOptions
    from requant.api.batch.run_batch import run_batch
    from requant.api.batch.state import state_folder
    from requant.cli.batch_options import read_jobs
    from requant.cli.batch_reports import read_reports
    from requant.cli.batch_worker import WORKERS

    batch, folder = read_jobs(jobs), state_folder(jobs) if state is None else state
    reports = read_reports(jobs, folder, force=given["force"])
    run_batch(BatchContext(batch, folder, BatchOptions(**given), WORKERS, messages.MONITOR), reports)
    messages.print_result(batch.summary.to_json() if as_json else _outputs_table(batch.summary.rows))
    batch.summary.check(dry_run=given["dry_run"])


def _outputs_table(rows: Sequence[Row]) -> str:
    """Return a line for each output, then the failures."""
    table = [["source", "budget", "output", "size", "bits/weight", "loss", "-ub", ""]]
    for row in rows:
        unit = [] if row.loss_unit is None else row.loss_unit.split()[:1]
        table.append(
            [
                printable(row.source),
                row.budget,
                printable(row.output or "-"),
                "-" if row.size is None else format_size(row.size),
                "-" if row.bpw is None else f"{row.bpw:.3f}",
                "-" if row.predicted_loss is None else " ".join([f"{row.predicted_loss:.4g}", *unit]),
                "-" if row.ubatch is None else str(row.ubatch),
                row.status if not row.exit_code else f"{row.status} ({row.exit_code})",
            ]
        )
    failed = [put_path_first(row.output or row.source, row.error) for row in rows if row.error]
    units = {row.loss_unit: None for row in rows if row.loss_unit is not None}
    legend = ["", *(f"loss: predicted, {_UNITS[unit]}" for unit in units)] if units else []
    return "\n".join([*grid(table, right=(3, 4, 5, 6)), *legend, *([""] if failed else []), *failed])
