"""`requant convert`: all the stages in one go, from a model to a smaller one, its record beside it, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api.convert import apply_nonfinite_policy, convert_to_file
from requant.api.session import Session, connect_cluster, open_session
from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.cli.nonfinite import option as nonfinite_option
from requant.common.units import format_size
from requant.container.source import open_source
from requant.container.splitting import WHOLE, Splitting, output_paths, total_size
from requant.conversion.options import ConversionOptions
from requant.errors import UsageError, printable
from requant.planning.plan import Plan
from requant.planning.request import PlanRequest, check_type_source
from requant.report import publish
from requant.report.start_command import start_command
from requant.report.text.result import conversion_text
from requant.scoring.calibration_data import CalibrationOptions


@click.command("convert", cls=Command)
@options.model
@click.argument("out", type=options.FILE)
@options.budget
@click.option(
    "--plan",
    type=options.FILE,
    metavar="F",
    shell_complete=options.JSON,
    help="A plan from `requant plan`, perhaps edited.",
)
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
@options.cluster
@options.effort
@options.allow_requantize
@options.splitting
@options.report
@options.force
@click.option("--restart", is_flag=True, help="Discard what an earlier run left unfinished.")
@options.json_output
def command(
    *,
    model: Path,
    out: Path,
    request: PlanRequest,
    vrams: tuple[int, ...],
    calibration: CalibrationOptions,
    measure: int | None,
    dry_run: bool,
    no_verify: bool,
    nonfinite: str,
    splitting: Splitting,
    reports: tuple[Path, ...],
    force: bool,
    restart: bool,
    as_json: bool,
    cluster: str | None,
    **given: Any,
) -> None:
    """Quantize a model to a budget (--vram, --ram, --size, ...), a --plan, a --preset, or one --type for all.

    With a budget all stages run in one go: score, plan, write, verify. The output appears under its name when it is
    complete and was read again. A run that was stopped goes on by the same command.
    """
    check_type_source(request, given["plan"], given["type_name"], given["preset"], given["like"])
    if str(out) == "-":
        raise UsageError("OUT: a model is not written to stdout; name a file")
    if len(vrams) > 1:
        raise UsageError("convert makes one file; give one --vram, or plan for all of them first")
    if reports and dry_run:
        raise UsageError("--dry-run writes nothing; leave --report out")
    with open_source(model) as source, connect_cluster(cluster, messages.info) as workers:
        messages.warn(*source.warnings)
        apply_nonfinite_policy(source, nonfinite, messages.MONITOR, threads=given["threads"])
        job = open_session(source, request, calibration, **given, cluster=workers, monitor=messages.MONITOR)
        if dry_run:
            job.check_measure(measure)
            plan, job = job.planned(weigh=True, measure=measure)
            files = _files(job, plan, out, splitting)
            messages.print_result(*([plan.to_json()] if as_json else [*terminal.plan_parts(plan), *files]))
            return
        publish.check_output_reports(reports, out, force=force, inputs=job.inputs)
        made = convert_to_file(
            job,
            out,
            options=ConversionOptions(splitting, force=force, verify=not no_verify),
            measure=measure,
            restart=restart,
            show=lambda plan: None if as_json else messages.print_result(*terminal.plan_parts(plan)),
        )
    messages.warn(*made.notes)
    publish.write_output_reports(reports, made.output, model, force=force, monitor=messages.MONITOR)
    text = f"\n{conversion_text(made, verified=not no_verify)}\n\n{start_command(made.plan, made.output)}"
    messages.print_result(made.to_json() if as_json else text)


def _files(job: Session, plan: Plan, out: Path, splitting: Splitting) -> list[str]:
    """A line that says which files the output would be, where it is to be split."""
    if splitting == WHOLE:
        return []
    from requant.planning.output_layout import output_layouts

    layouts = output_layouts(job.source, plan, job.imatrix, splitting)
    paths = [printable(str(path)) for path in output_paths(out, layouts)]
    names = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    return [f"{len(paths)} file{'s' * (len(paths) > 1)}, {format_size(total_size(layouts))} in all: {names}"]
