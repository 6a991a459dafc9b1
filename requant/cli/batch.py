"""`requant batch`: many conversions from a job file, each source scored once, resumed as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.cli import completion, messages, options
from requant.cli.command import Command


@click.command("batch", cls=Command)
@click.argument("jobs", metavar="JOBS.toml", type=options.FILE, shell_complete=completion.files(".toml"))
@click.option("--jobs", "at_once", type=click.IntRange(1, 64), default=1, metavar="N", help="Conversions at a time.")
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

    The exit code is 0 where every output is there, 9 where some are, that of the first failure where none is; a mistake
    in the file is 3, before anything is done.
    """
    from requant.api.batch.context import BatchContext, BatchOptions
    from requant.api.batch.run_batch import run_batch
    from requant.api.batch.state import state_folder
    from requant.cli.batch_options import read_jobs
    from requant.cli.batch_reports import read_reports
    from requant.cli.batch_table import batch_table
    from requant.cli.batch_worker import WORKERS

    batch, folder = read_jobs(jobs), state_folder(jobs) if state is None else state
    reports = read_reports(jobs, folder, force=given["force"])
    run_batch(BatchContext(batch, folder, BatchOptions(**given), WORKERS, messages.MONITOR), reports)
    messages.print_result(batch.summary.to_json() if as_json else batch_table(batch.summary.rows))
    batch.summary.check()
