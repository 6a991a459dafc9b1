"""`requant batch`: the conversions that a file asks for, scored once, resumed as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from requant.cli import completion, messages, options
from requant.cli.batch.sources import OWN
from requant.cli.batch.summary import check, to_json
from requant.cli.batch.table import batch_table
from requant.cli.command import Command


@click.command("batch", cls=Command)
@click.argument("jobs", metavar="JOBS.toml", type=options.FILE, shell_complete=completion.files(".toml"))
@click.option("--jobs", "at_once", type=click.IntRange(1, 64), default=1, metavar="N", help="Conversions at a time.")
@click.option("--keep-going", is_flag=True, help="Go on with the others after a failure.")
@click.option("--state", type=options.FILE, metavar="DIR", help="Where to keep scores, plans and what is done.")
@click.option("--dry-run", is_flag=True, help="Show the outputs that would be made; score and write nothing.")
@click.option("--restart", is_flag=True, help="Begin unfinished outputs anew.")
@options.force
@options.json_output
def command(
    *,
    jobs: Path,
    at_once: int,
    keep_going: bool,
    state: Path | None,
    dry_run: bool,
    restart: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make the outputs that a file asks for.

    JOBS.toml has a [[job]] with source and output for each set of models, whose budgets and other keys are the options
    of `requant convert`; docs/batch.md describes it. The same command again skips what is done, resumes what was
    interrupted and tries again what failed. State is kept in JOBS.toml.requant unless --state says another folder.

    The exit code is 0 where every output is there, 9 where some are, that of the first failure where none is; a mistake
    in the file is 3, before anything is done.
    """
    from requant.cli.batch.items import read_matrix
    from requant.cli.batch.reports import read_reports
    from requant.cli.batch.run import Run

    matrix = read_matrix(jobs)
    messages.warn(*(f"{name} is no source: {why}" for name, why in matrix.no_sources.items() if why != OWN))
    folder = jobs.with_name(f"{jobs.name}.requant") if state is None else state
    reports = read_reports(jobs, folder, force=force)
    run = Run(jobs, folder, matrix, at_once, keep_going, force, restart, dry_run, reports)
    run.go()
    messages.print_result(to_json(run.rows, matrix.no_sources) if as_json else batch_table(run.rows))
    check(jobs, run.rows)
