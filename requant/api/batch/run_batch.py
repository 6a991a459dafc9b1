"""Runner of a batch: all plans first, from sources scored once, then every output in a worker of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from requant.api.batch.context import BatchContext
from requant.api.batch.items import BatchItem
from requant.api.batch.plan_batch import plan_batch
from requant.api.batch.run_conversions import run_conversions
from requant.api.batch.score_cache import ScoreCache
from requant.api.batch.state import hold_lock


class Reporter(Protocol):
    """Reports on the outputs of a batch."""

    def check_targets(self, items: Sequence[BatchItem], *, make_folders: bool = True) -> None:
        """Raise every error that would keep the reports on these items from being written."""

    def write_reports(self, items: Sequence[BatchItem]) -> None:
        """Write the reports on the outputs that exist."""


def run_batch(context: BatchContext, reporter: Reporter | None = None) -> None:
    """Plan all items, make the outputs that do not exist yet, report on them; results are in the batch's summary.

    A dry run only plans, and writes nothing. A failure of one output is in its row. Raises BadInput, OutputRefused
    where the outputs or the reports cannot be written as a whole, or another run holds the folder of state.
    """
    scores, items, summary = ScoreCache(context), context.batch.items, context.batch.summary
    if context.options.dry_run:
        plan_batch(context, scores)
        if reporter is not None:
            reporter.check_targets(items, make_folders=False)
        return
    with hold_lock(context.folder):
        try:
            if reporter is not None:
                reporter.check_targets(items)
            if not plan_batch(context, scores):
                return
            if reporter is not None:
                reporter.check_targets(items)  # again, as the plans decide the names
            run_conversions(context, scores)
            if reporter is not None:
                reporter.write_reports(items)
        finally:
            summary.stop_running()
            summary.write(context.folder)
