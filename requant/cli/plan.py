"""`requant plan`: a type for each tensor within a budget, shown and written for `requant convert --plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api import plan as planning
from requant.api.session import Session, connect_cluster, open_session
from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.common.atomic_write import check_writable, write_text
from requant.common.units import size_label
from requant.container.source import open_source
from requant.errors import UsageError
from requant.planning.plan import Plan
from requant.planning.request import MAX_CONTEXT, PlanRequest, check_type_source
from requant.report.start_command import start_command
from requant.report.text.table import plans_table
from requant.scoring.calibration_data import CalibrationOptions


@click.command("plan", cls=Command)
@options.model
@options.losses
@options.budget
@options.preset
@options.like
@options.imatrix
@options.calibration
@options.result_file("plan")
@click.option("--emit-tensor-types", "recipe", type=options.FILE, metavar="F", help="Write it for llama-quantize too.")
@click.option("--explain", metavar="NAME", help="Why this tensor has its type, and what another would cost.")
@click.option("--frontier", is_flag=True, help="The whole curve of loss against bytes, as CSV or --json.")
@options.threads
@options.cluster
@options.effort
@options.allow_requantize
@options.force
@options.json_output
def command(
    *,
    model: Path,
    request: PlanRequest,
    vrams: tuple[int, ...],
    calibration: CalibrationOptions,
    out: Path | None,
    recipe: Path | None,
    explain: str | None,
    frontier: bool,
    force: bool,
    as_json: bool,
    cluster: str | None,
    **how: Any,
) -> None:
    """Choose a type, and a device, for each tensor within a budget.

    The choice is of least predicted loss among all that fit, with a proven gap. Without --losses the model is scored
    first. Nothing is converted: give the plan to `requant convert --plan`. Several --vram give several plans.
    """
    if not frontier:
        check_type_source(request, None, None, how["preset"], how["like"], others=())
    elif request.n_ctx == MAX_CONTEXT:
        raise UsageError("--frontier is of one context; give --ctx a number")
    one = len(vrams) < 2 and not frontier
    if explain is not None and not (one and request.has_budget):
        raise UsageError("--explain is of one plan for a budget")
    if explain is not None and how["losses"] is None:
        raise UsageError("--explain solves again and again; give it the losses of `requant score` with --losses")
    if recipe is not None and not one:
        raise UsageError("--emit-tensor-types is of one plan; give one --vram and no --frontier")
    targets = [out] if len(vrams) < 2 or out is None else [_for_budget(out, size) for size in vrams]
    with open_source(model) as source, connect_cluster(cluster, messages.info) as workers:
        messages.warn(*source.warnings)
        job = open_session(source, request, calibration, **how, cluster=workers, monitor=messages.MONITOR)
        for path in (*targets, recipe):
            if path is not None:
                check_writable(path, force=force, inputs=job.inputs)
        if frontier:
            _frontier(job, out, as_json=as_json, force=force)
            return
        plans = planning.make_plans(job, vrams) if len(vrams) > 1 else [job.planned()[0]]
        for plan, path in zip(plans, targets, strict=False):
            if path is not None:
                write_text(path, plan.to_json(), force=force, inputs=job.inputs)
        plan = plans[0]
        if recipe is not None:
            from requant.planning.recipe import tensor_type_file

            write_text(recipe, tensor_type_file(plan), force=force, inputs=job.inputs)
        if explain is not None:
            messages.print_result(_explained(job, plan, explain, as_json=as_json))
            return
    if len(plans) > 1:
        messages.print_result(planning.plans_to_json(plans) if as_json else plans_table(plans, vrams, terminal.width()))
    elif as_json:
        messages.print_result(plan.to_json())
    else:
        messages.print_result(*terminal.plan_parts(plan), start_command(plan, Path("OUT.gguf")))


def _frontier(job: Session, out: Path | None, *, as_json: bool, force: bool) -> None:
    from requant.planning import frontier

    points, losses = planning.compute_curve(job)
    in_json = as_json or (out is not None and out.suffix == ".json")
    text = frontier.curve_to_json(points, losses) if in_json else frontier.curve_to_csv(points)
    if out is not None:
        write_text(out, text, force=force, inputs=job.inputs)
    messages.print_result(text.removesuffix("\n"))


def _explained(job: Session, plan: Plan, name: str, *, as_json: bool) -> str:
    from requant.report.text.explain import explanation_json, explanation_text

    found, more = planning.explain_tensor(job, plan, name)
    return explanation_json(found, plan, more) if as_json else explanation_text(found, plan, more)


def _for_budget(out: Path, size: int) -> Path:
    return out.with_name(f"{out.stem}-{size_label(size)}{out.suffix}")
