"""Planning of a batch: the plan and the path of every output, from cached scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from requant.api.batch.context import FAILURES, BatchContext, plan_file, read_importance_file
from requant.api.batch.items import BatchItem, check_outputs
from requant.api.batch.score_cache import ScoreCache
from requant.api.batch.state import make_folder, seal_entry, write_state
from requant.api.importance import find_importance
from requant.api.invocation import record_options
from requant.api.session import Session, open_session
from requant.common.atomic_write import check_writable
from requant.common.folders import check_space, nearest_folder
from requant.common.inputs import collect_part, own_files
from requant.common.interrupt import run_interruptible
from requant.container.output import journal_path
from requant.container.part import check_place
from requant.container.source import Source, open_source
from requant.container.splitting import WHOLE, output_paths, total_size
from requant.conversion.prepare import prepare_output
from requant.conversion.record import is_record_of_output, record_path
from requant.planning.output_layout import output_layouts
from requant.planning.plan import Plan, read_plan
from requant.planning.planner import check_feasible


def plan_batch(context: BatchContext, scores: ScoreCache) -> bool:
    """Plan every item, and return whether the batch goes on: all are planned, or are allowed to fail.

    Raises BadInput, OutputRefused where the plans give outputs that `check_outputs` refuses.
    """
    planner, summary, items = _BatchPlanner(context, scores), context.batch.summary, context.batch.items
    lenient = context.options.keep_going or context.options.dry_run
    goes_on = lenient or not summary.counts["failed"]
    for step in (planner.check_item, planner.plan_item):  # an impossible request fails before hours of scoring
        for item in items:
            if not goes_on or item.row.status == "failed":
                continue
            try:
                step(item)
            except FAILURES as error:
                context.report_failure(item, error)
                goes_on = lenient
    check_outputs(context.batch.path, [item for item in items if item.row.status != "failed"])
    return goes_on


@dataclass(frozen=True, slots=True)
class _BatchPlanner:
    context: BatchContext
    scores: ScoreCache

    def check_item(self, item: BatchItem) -> None:
        """Take the cached plan; without one, raise every error that can be found before scoring."""
        path = plan_file(self.context.folder, item)
        files = self.context.read_entry(path.parent, item.plan_request())
        if files is not None:
            with own_files():
                item.plan = read_plan(files[path.name])
            return
        with open_source(item.source.path) as source:
            session = self._open_session(item, source)
            session.check_measure(item.options.measure)
            if item.is_scored:
                run_interruptible(
                    check_feasible,
                    *(source, item.options.request, item.types),
                    imatrix=session.imatrix,
                    allow_requantize=item.options.session_options.allow_requantize,
                    has_importance=session.measures_importance,
                    method=session.method_to_come,
                )

    def plan_item(self, item: BatchItem) -> None:
        """Make the plan where there is none yet, and set the output's path and the row's figures."""
        dry_run = self.context.options.dry_run
        with collect_part(), open_source(item.source.path) as source:
            if item.plan is None:
                item.plan = self._make_plan(item, source)
                if item.plan is not None and not dry_run:
                    self._save_plan(item, item.plan)
            item.place_output(self.context.batch.path)
            if dry_run:
                self.context.batch.summary.set_status(item.row, "planned")
            if item.plan is None:
                return
            item.row.set_plan(item.plan)
            if dry_run:
                self._try_item(item, item.plan, source)
            elif item.options.splitting != WHOLE:
                given = read_importance_file(self.scores.find_importance(item, source))
                layouts = output_layouts(source, item.plan, given, item.options.splitting)
                item.files = () if item.out is None else tuple(output_paths(item.out, layouts))

    def _try_item(self, item: BatchItem, plan: Plan, source: Source) -> None:
        """Set the row's size. Raise what can be found before the first byte of an output that is not there yet."""
        given, splitting = read_importance_file(self.scores.find_importance(item, source)), item.options.splitting
        if given is None and item.is_scored and self._open_session(item, source).measures_importance:
            layouts = output_layouts(source, plan, None, splitting)  # the importance is measured with the losses
        else:
            layouts = prepare_output(source, plan, given, None, splitting).layouts
        item.row.size = total_size(layouts)
        if item.out is None:
            return
        item.files = tuple(output_paths(item.out, layouts))
        if self.context.find_output(item, lambda: given)[0] is not None:
            self.context.batch.summary.set_status(item.row, "skipped")
            return
        force = self.context.options.force
        folder = nearest_folder(item.out.parent)
        if folder == item.out.parent:
            for path, layout in zip(item.files, layouts, strict=True):
                check_place(path, layout.size, force=force, has_journal=journal_path(item.out).exists())
            check_writable(record_path(item.out), force=force, is_own=is_record_of_output)
        check_space(folder, item.row.size, [])

    def _make_plan(self, item: BatchItem, source: Source) -> Plan | None:
        """Make the plan of `requant convert`; None where a dry run would have to score."""
        given, n = self._open_session(item, source), item.options.measure
        session = self._with_losses(item, source, given) if item.is_scored else given
        if session is None:
            return None
        plan = record_options(session.make_plan(measure=n).plan, given, n)
        # the file of the importance in the state is private, and outputs do not record it
        return plan if given.imatrix is not None else replace(plan, imatrix_file=None)

    def _save_plan(self, item: BatchItem, plan: Plan) -> None:
        path = plan_file(self.context.folder, item)
        make_folder(path.parent)
        write_state(path, plan.to_json())
        seal_entry(path.parent, item.plan_request(), [path.name])

    def _open_session(self, item: BatchItem, source: Source) -> Session:
        how, monitor = item.options, self.context.monitor
        return open_session(source, how.request, how.calibration, how.plan_from, how.session_options, monitor=monitor)

    def _with_losses(self, item: BatchItem, source: Source, session: Session) -> Session | None:
        """Return the session with its losses and importance; None where a dry run would have to score."""
        if (whole := session.losses_without_scoring()) is not None:
            return replace(session, losses=whole)
        scores = self.scores.find_scores(item, source)
        if scores is None:
            return None
        losses, how = self.scores.read_losses(scores), item.options.session_options
        given = how.imatrix or item.options.calibration.statistics
        importance = find_importance(given, None, losses, source, off=how.no_imatrix)
        session = replace(session, losses=losses, importance=importance)
        if self.context.options.dry_run:
            return session
        session.request.try_rules(losses)
        whole = session.add_cache_losses(losses)
        if whole is not losses:
            self.scores.replace_losses(item, scores, whole)
        return replace(session, losses=whole)
