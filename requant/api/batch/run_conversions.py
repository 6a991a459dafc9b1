"""Conversions of a batch: every output that does not exist yet, made by a worker of its own."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from requant.api.batch.context import FAILURES, BatchContext, WorkerFailure, plan_file, read_importance_file
from requant.api.batch.items import BatchItem
from requant.api.batch.score_cache import ScoreCache
from requant.api.batch.state import MadeOutput, find_output, read_output, save_output
from requant.api.batch.workers import WorkerExit, WorkerTask
from requant.common.units import format_duration, format_size
from requant.container.source import open_source
from requant.conversion.record import read_conversion, record_path
from requant.errors import InputOutputError


def run_conversions(context: BatchContext, scores: ScoreCache) -> None:
    """Make the outputs of all planned items that do not exist yet; the summary is written after each."""
    runner, tasks = _ConversionRunner(context, scores), list[WorkerTask]()
    for item in context.batch.items:
        if item.row.status == "failed" or item.plan is None:
            continue
        try:
            if not runner.find_existing(item):
                tasks.append(WorkerTask(item, runner.convert_words(item), item.row.output or ""))
        except FAILURES as error:
            context.report_failure(item, error)
            if not context.options.keep_going:
                return
    context.batch.summary.write(context.folder)
    runner.run_tasks(tasks)


@dataclass(frozen=True, slots=True)
class _ConversionRunner:
    context: BatchContext
    scores: ScoreCache

    def run_tasks(self, tasks: list[WorkerTask]) -> None:
        """Run the tasks with a count of those done, an estimate of the time left, and progress."""
        at_once, summary, workers = self.context.options.at_once, self.context.batch.summary, self.context.workers
        done, begun = 0, time.monotonic()

        def on_start(task: WorkerTask) -> None:
            summary.set_status(task.item.row, "running")
            self.context.monitor.info(f"converting {task.item.source.path} to {task.item.out}")

        def on_exit(task: WorkerTask, end: WorkerExit) -> bool:
            nonlocal done
            done += 1
            advance(1)
            self._finish_item(task.item, end, f"{done} of {len(tasks)}", _time_left(begun, done, len(tasks)))
            summary.write(self.context.folder)
            return self.context.options.keep_going or task.item.row.status == "done"

        progress = self.context.monitor.progress
        has_bar = at_once == 1 and workers.draws_bar()
        with nullcontext(int) if has_bar else progress("batch", len(tasks), "outputs") as advance:
            workers.run_tasks(tasks, at_once, on_start, on_exit)

    def convert_words(self, item: BatchItem) -> list[str]:
        """Return the words of the conversion, and make the output's folder."""
        assert item.out is not None
        options, plan = self.context.options, plan_file(self.context.folder, item)
        words = ["convert", str(item.source.path), str(item.out), f"--plan={plan}", "--json", *item.convert_words()]
        imatrix = self._find_importance(item)
        if imatrix is not None:
            words.append(f"--imatrix={imatrix}")
        if item.options.session_options.threads is None and options.at_once > 1:
            words.append(f"--threads={max(1, (os.cpu_count() or 1) // options.at_once)}")
        words += [f"--{name}" for name in ("force", "restart") if getattr(options, name)]
        try:
            item.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputOutputError(item.out.parent, f"cannot be made: {error.strerror}") from error
        return words

    def find_existing(self, item: BatchItem) -> bool:
        """Return whether the output exists, complete and made for this request; then set its row to skipped."""
        assert item.out is not None
        file, known = self.context.find_output(item, lambda: read_importance_file(self._find_importance(item)))
        if file is None:
            return False
        if not known:
            save_output(self.context.made, item.out, read_output(file, item.output_request()))
        self.context.batch.summary.set_status(item.row, "skipped")
        self._describe_output(item)
        return True

    def _find_importance(self, item: BatchItem) -> Path | None:
        with open_source(item.source.path) as source:
            return self.scores.find_importance(item, source)

    def _finish_item(self, item: BatchItem, end: WorkerExit, count: str, left: str) -> None:
        """Set the item's row by how its worker ended, and log it."""
        assert item.out is not None
        item.row.seconds = round(end.seconds, 1)
        try:
            if end.code:
                raise WorkerFailure(end)
            made = self._describe_output(item)
            save_output(self.context.made, item.out, made)
        except FAILURES as error:
            self.context.report_failure(item, error, count)
            return
        self.context.batch.summary.set_status(item.row, "done")
        item.row.exit_code = 0
        self.context.monitor.info(
            f"{count} done: {item.row.output}, {format_size(made.size)}, {end.seconds:.0f} s{left}"
        )

    def _describe_output(self, item: BatchItem) -> MadeOutput:
        """Read the output at the item's path, and set the row's figures."""
        assert item.out is not None
        file = find_output(item.out)
        if file is None:
            raise InputOutputError(item.out, "was made, and is gone")
        record, made = read_conversion(record_path(file)), read_output(file, item.output_request())
        item.row.output, item.row.size = str(file), made.size
        item.row.set_plan(record.plan)
        return made


def _time_left(begun: float, done: int, n: int) -> str:
    """Estimate the time left, if the rest takes as long as what is done."""
    left = (time.monotonic() - begun) / done * (n - done)
    return f"; about {format_duration(left)} left" if done < n else ""
