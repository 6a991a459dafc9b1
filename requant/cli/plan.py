"""`requant plan`: a type for each tensor within a budget, shown and written for `requant convert --plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from requant.api import plan as planning
from requant.api.importance import Importance, importance_file
from requant.api.session import Session
from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.cli.sessions import open_model_session, without_unkept
from requant.common.atomic_write import check_writable, write_text
from requant.common.units import size_label
from requant.errors import UsageError
from requant.planning.frontier import curve_to_csv, curve_to_json
from requant.planning.recipe import tensor_type_file
from requant.planning.request import FromBudget, PlanRequest, check_frontier, choose_plan_from
from requant.report.start_command import start_command
from requant.report.text.explain import explanation_json, explanation_text
from requant.report.text.table import plans_table

if TYPE_CHECKING:
    from requant.planning.plan import Plan
    from requant.report.text.bars import Drawing


@dataclass(frozen=True, slots=True)
class PlanOutputs:
    """The number of plans, and how they are written and shown; vrams: the sizes of --vram."""

    vrams: tuple[int, ...]
    out: Path | None
    recipe: Path | None
    explain: str | None
    frontier: bool
    force: bool
    as_json: bool

    def check_options(self, request: PlanRequest, *, has_losses: bool) -> None:
        """Raise UsageError for options that need one plan."""
        one = len(self.vrams) < 2 and not self.frontier
        if self.explain is not None and not (one and request.has_budget):
            raise UsageError("--explain is of one plan for a budget")
        if self.explain is not None and not has_losses:
            what = "--explain makes a plan for each other type, and for that it needs losses in a file"
            raise UsageError(f"{what}: run requant score MODEL -o LOSSES.json, then give --losses LOSSES.json")
        if self.recipe is not None and not one:
            raise UsageError("--emit-tensor-types is of one plan; give one --vram and no --frontier")

    def check_paths(self, session: Session) -> None:
        """Raise OutputRefused or InputOutputError for a file that cannot be written."""
        measured = self.out is not None and session.needs_scoring and session.measures_importance and not self.frontier
        for path in (*self.plan_paths(), self.recipe, *([importance_file(self.out)] if measured and self.out else [])):
            if path is not None:
                check_writable(path, force=self.force)

    def plan_paths(self) -> Sequence[Path | None]:
        """Return the path of each plan; with several --vram the budget is part of the name."""
        out = self.out
        if len(self.vrams) < 2 or out is None:
            return [out] * max(1, len(self.vrams))
        return [out.with_name(f"{out.stem}-{size_label(size)}{out.suffix}") for size in self.vrams]

    def keep_importance(self, session: Session, importance: Importance, plans: Sequence[Plan]) -> list[Plan]:
        """Write importance that scoring measured beside -o, and return the plans with its path from their folder."""
        measured = None
        if self.out is not None:
            measured = importance.save(importance_file(self.out), session.source, force=self.force)
        file = measured or importance.path_from(Path() if self.out is None else self.out.parent)
        return [replace(plan, imatrix_file=file) if plan.imatrix is not None else plan for plan in plans]

    def write(self, path: Path | None, text: str) -> None:
        """Write a text, if there is a path for it."""
        if path is not None:
            write_text(path, text, force=self.force)


@click.command("plan", cls=Command)
@options.model
@options.losses
@options.budget
@options.preset
@options.like
@options.imatrix
@options.calibration
@options.result_file("plan")
@options.file_option("--emit-tensor-types", "recipe", help="Write it for llama-quantize too.")
@click.option("--explain", metavar="NAME", help="Why this tensor has its type, and what another would cost.")
@click.option("--frontier", is_flag=True, help="The whole curve of loss against bytes, as CSV or --json.")
@options.threads
@options.cluster
@options.effort
@options.allow_requantize
@options.force
@options.json_output
@options.session_options
@options.collected("outputs", PlanOutputs)
def command(*, outputs: PlanOutputs, preset: str | None, like: Path | None, **given: Any) -> None:
    """Choose a type, and a device, for each tensor within a budget.

    The choice is of least predicted loss among all that fit, with a proven gap. Without --losses the model is scored
    first, and the importance measured on the way is written beside -o. Nothing is converted: give the plan to `requant
    convert --plan`. --vram 8GiB,12GiB gives several plans.
    """
    request: PlanRequest = given["request"]
    if outputs.frontier:
        check_frontier(request)
    plan_from = FromBudget(like) if outputs.frontier else choose_plan_from(request, None, None, preset, like, others=())
    outputs.check_options(request, has_losses=given["session_options"].losses is not None)
    with open_model_session(**given, plan_from=plan_from) as opened:
        unkept = outputs.as_json and opened.needs_scoring and not outputs.frontier
        session = without_unkept(opened, outputs.out) if unkept else opened
        if session.importance.missing is not None:
            messages.warn(str(session.importance.missing))
        outputs.check_paths(session)
        make = _frontier if outputs.frontier else _several_plans if len(outputs.vrams) > 1 else _one_plan
        parts = make(session, outputs)
    messages.print_result(*parts)


def _frontier(session: Session, outputs: PlanOutputs) -> Sequence[str]:
    points, losses = planning.compute_curve(session)
    in_json = outputs.as_json or (outputs.out is not None and outputs.out.suffix == ".json")
    text = curve_to_json(points, losses) if in_json else curve_to_csv(points, losses)
    outputs.write(outputs.out, text)
    return [text.removesuffix("\n")]


def _several_plans(session: Session, outputs: PlanOutputs) -> Sequence[str]:
    (found, importance), vrams = planning.make_plans(session, outputs.vrams), outputs.vrams
    plans = outputs.keep_importance(session, importance, found)
    for plan, path in zip(plans, outputs.plan_paths(), strict=True):
        outputs.write(path, plan.to_json())
    return [planning.plans_to_json(plans) if outputs.as_json else plans_table(plans, vrams, terminal.width())]


def _one_plan(session: Session, outputs: PlanOutputs) -> Sequence[str | Drawing]:
    planned = session.make_plan()
    [plan] = outputs.keep_importance(session, planned.importance, [planned.plan])
    outputs.write(outputs.out, plan.to_json())
    if outputs.recipe is not None:
        outputs.write(outputs.recipe, tensor_type_file(plan))
    if outputs.explain is not None:
        found, more = planning.explain_tensor(session, plan, outputs.explain)
        return [explanation_json(found, plan, more) if outputs.as_json else explanation_text(found, plan, more)]
    if outputs.as_json:
        return [plan.to_json()]
    return [*terminal.plan_parts(plan), start_command(plan, Path("OUT.gguf"))]
