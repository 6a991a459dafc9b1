"""`requant convert`: all the stages in one go, from a model to a smaller one, its record beside it, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.cli import messages, options, stages
from requant.cli.calibration import Calibration
from requant.cli.nonfinite import option as nonfinite_option
from requant.cli.nonfinite import settle
from requant.container.source import open_source
from requant.errors import UsageError
from requant.report.engine import start_command
from requant.report.result import conversion_text
from requant.report.table import plan_table
from requant.wishes import Wishes, check_ways


@click.command()
@options.model
@click.argument("out", type=options.FILE)
@options.budget
@click.option("--plan", "plan_file", type=options.FILE, metavar="F", help="A plan from `requant plan`, perhaps edited.")
@options.single_type
@options.preset
@options.like
@options.imatrix
@options.calibration
@options.losses
@click.option(
    "--measure", type=click.IntRange(1, 64), metavar="N", help="Measure N plans near the best; keep the best."
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--no-verify", is_flag=True, help="Do not read the output again.")
@nonfinite_option
@options.threads
@options.effort
@options.allow_requantize
@options.force
@options.json_output
@options.debug
def command(
    *,
    model: Path,
    out: Path,
    wishes: Wishes,
    vrams: tuple[int, ...],
    calibration: Calibration,
    measure: int | None,
    dry_run: bool,
    no_verify: bool,
    nonfinite: str,
    force: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Quantize a model to a budget (--vram, --ram, --size, ...), a --plan, a --preset, or one --type for all."""
    check_ways(wishes, how["plan_file"], how["type_name"], how["preset"], how["like"])
    if len(vrams) > 1:
        raise UsageError("convert makes one file; give one --vram, or plan for all of them first")
    if measure is not None and not wishes.has_budget:
        raise UsageError("--measure chooses among plans for a budget; give --vram, --size or --bpw with it")
    with open_source(model) as source:
        messages.warn(*source.warnings)
        settle(source, nonfinite, how["threads"])
        job = stages.prepared(source, wishes, calibration, **how)
        if measure is not None:
            stages.check_can_run(source)
        if not dry_run:
            job.check_output(out, force)
        plan, job = job.planned(weigh=True, measure=measure)
        if dry_run or not as_json:
            messages.emit(plan.to_json() if as_json else plan_table(plan))
        if dry_run:
            return
        made = job.convert(plan, out, force)
        checked = None if no_verify else job.verify(out)
    messages.warn(*made.notes)
    messages.emit(made.to_json() if as_json else f"\n{conversion_text(made, checked)}\n\n{start_command(plan, out)}")
