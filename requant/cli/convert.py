"""`requant convert`: score, plan, write and verify in one run, with a record beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.api.convert import convert_to_file, try_conversion
from requant.cli import messages, options, terminal
from requant.cli.command import Command, WordChoice
from requant.cli.sessions import open_model_session
from requant.common.units import format_size
from requant.container.part import resolve_target
from requant.container.splitting import WHOLE, Splitting, output_paths, total_size
from requant.conversion.options import POLICIES, ConversionOptions
from requant.errors import UsageError, printable
from requant.planning.request import choose_plan_from
from requant.report import publish
from requant.report.start_command import start_command
from requant.report.text.result import conversion_text

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.container.layout import Layout
    from requant.conversion.record import Conversion
    from requant.report.text.bars import Drawing


@dataclass(frozen=True, slots=True)
class ConversionOutput:
    """The output of a conversion, and how it is written and shown; vrams: the sizes of --vram."""

    out: Path
    vrams: tuple[int, ...]
    measure: int | None
    splitting: Splitting
    reports: tuple[Path, ...]
    dry_run: bool
    no_verify: bool
    force: bool
    restart: bool
    as_json: bool

    @property
    def options(self) -> ConversionOptions:
        """Return how the output is written."""
        return ConversionOptions(self.splitting, force=self.force, verify=not self.no_verify)

    def check(self) -> None:
        """Raise UsageError for options that cannot go together."""
        if str(self.out) == "-":
            raise UsageError("OUT: a model is not written to stdout; name a file")
        if len(self.vrams) > 1:
            raise UsageError("convert makes one file; give one --vram, or plan for all of them first")


@click.command("convert", cls=Command)
@options.model
@click.argument("out", type=options.FILE)
@options.budget
@options.file_option("--plan", shell_complete=options.JSON, help="A plan from `requant plan`, perhaps edited.")
@options.single_type
@options.preset
@options.like
@options.imatrix
@options.calibration
@options.losses
@click.option("--measure", type=options.Count(1, 64), metavar="N", help="Measure N plans near the best; keep the best.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make all checks that come before the first byte, show the plan, write nothing.",
)
@click.option("--no-verify", is_flag=True, help="Read neither the output nor the source again.")
@click.option(
    "--nonfinite",
    type=WordChoice(POLICIES),
    default=POLICIES[0],
    show_default=True,
    help="What to do with tensors that hold NaN or infinity: stop, or copy them.",
)
@options.threads
@options.cluster
@options.effort
@options.compensate
@options.max_memory("--compensate may gain less")
@options.allow_requantize
@options.splitting
@options.report
@options.force
@click.option("--restart", is_flag=True, help="Discard what an earlier run left unfinished.")
@options.json_output
@options.session_options
@options.collected("how", ConversionOutput)
def command(*, how: ConversionOutput, **given: Any) -> None:
    """Quantize a model to a budget (--vram, --ram, --size, ...), a --plan, a --preset, or one --type for all.

    With a budget all stages run in one go: score, plan, write, verify. The output appears under its name when it is
    complete and was read again. A run that was stopped goes on by the same command.
    """
    decided = [given.pop(name) for name in ("plan", "type_name", "preset", "like")]
    plan_from = choose_plan_from(given["request"], *decided)
    how.check()
    with open_model_session(**given, plan_from=plan_from) as session:
        resolve_target(how.out)
        publish.check_output_reports(how.reports, how.out, force=how.force)
        if how.dry_run:
            messages.print_result(*_dry_run(session, how))
            return
        made = _convert(session, how)
    messages.warn(*made.notes)
    publish.write_output_reports(how.reports, made.output, given["model"], force=how.force, monitor=messages.MONITOR)
    text = f"\n{conversion_text(made, verified=not how.no_verify)}\n\n{start_command(made.plan, made.output)}"
    messages.print_result(made.to_json() if how.as_json else text)


def _convert(session: Session, how: ConversionOutput) -> Conversion:
    return convert_to_file(
        session,
        how.out,
        options=how.options,
        measure=how.measure,
        restart=how.restart,
        show=lambda plan: None if how.as_json else messages.print_result(*terminal.plan_parts(plan)),
    )


def _dry_run(session: Session, how: ConversionOutput) -> Sequence[str | Drawing]:
    found = try_conversion(session, how.out, options=how.options, measure=how.measure, restart=how.restart)
    messages.warn(*found.prepared.notes)
    if how.as_json:
        return [found.planned.plan.to_json()]
    return [*terminal.plan_parts(found.planned.plan), *_list_files(found.prepared.layouts, how)]


def _list_files(layouts: Sequence[Layout], how: ConversionOutput) -> list[str]:
    """Return a line that names the files of an output that is split."""
    if how.splitting == WHOLE:
        return []
    paths = [printable(str(path)) for path in output_paths(how.out, layouts)]
    names = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    return [f"{len(paths)} file{'s' * (len(paths) > 1)}, {format_size(total_size(layouts))} in all: {names}"]
