"""A batch run as a library: options, workers and reports come from the caller, and no command line is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from conversions import small_model

import requant
from requant.api.batch.context import BatchContext, BatchOptions
from requant.api.batch.items import ConvertOptions, read_batch
from requant.api.batch.jobs import KeyOption
from requant.api.batch.run_batch import run_batch
from requant.api.batch.workers import WorkerExit, WorkerPool
from requant.api.session_options import SessionOptions
from requant.common.monitor import SILENT
from requant.container.splitting import WHOLE
from requant.errors import UsageError
from requant.planning.request import FromType, PlanRequest
from requant.scoring.options import CalibrationOptions

KEYS = {"type": KeyOption("--type", "type_name", "one")}
JOBS = '[[job]]\nsource = "m.gguf"\noutput = "{encoding}.gguf"\nbudgets = [{type = "Q8_0"}, {type = "Q4_0"}]\n'


def parse_options(words):
    (word,) = words
    return ConvertOptions(
        PlanRequest(), CalibrationOptions(), WHOLE, FromType(word.partition("=")[2]), SessionOptions(), measure=None
    )


def run_tasks(tasks, at_once, on_start, on_exit):
    for task in tasks:
        on_start(task)
        _, source, out, plan = task.words[:4]
        requant.open(source).convert(out, plan=Path(plan.removeprefix("--plan=")))
        if not on_exit(task, WorkerExit(0, "", 0.1)):
            return


def fail_first(tasks, at_once, on_start, on_exit):
    on_start(tasks[0])
    if on_exit(tasks[0], WorkerExit(6, "the disk is full", 0.1)):
        run_tasks(tasks[1:], at_once, on_start, on_exit)


class Reporter:
    def __init__(self):
        self.calls = []

    def check_targets(self, items):
        self.calls.append(("check", [item.row.status for item in items]))

    def write_reports(self, items):
        self.calls.append(("write", [item.row.status for item in items]))


@pytest.fixture
def jobs(tmp_path):
    small_model().write(tmp_path / "m.gguf")
    path = tmp_path / "jobs.toml"
    path.write_text(JOBS)
    return path


def run(jobs, run_tasks=run_tasks, reporter=None, **options):
    batch = read_batch(jobs, KEYS, parse_options)
    workers = WorkerPool(run_tasks, lambda: False)
    run_batch(BatchContext(batch, jobs.parent / "state", BatchOptions(**options), workers, SILENT), reporter)
    return batch.summary


def statuses(summary):
    return [row.status for row in summary.rows]


def test_a_batch_runs_and_resumes_without_the_command_line(jobs):
    reporter = Reporter()
    found = run(jobs, reporter=reporter)
    assert statuses(found) == ["done", "done"] and found.exit_code == 0
    assert [Path(row.output).name for row in found.rows] == ["Q8_0.gguf", "Q4_0.gguf"]
    assert reporter.calls == [("check", ["not started"] * 2)] * 2 + [("write", ["done"] * 2)]
    assert (jobs.parent / "state" / "summary.json").read_text() == found.to_json()
    assert statuses(run(jobs)) == ["skipped", "skipped"]


def test_a_failed_worker_is_a_row_and_the_others_go_on_if_asked(jobs):
    found = run(jobs, fail_first)
    assert statuses(found) == ["failed", "not started"] and found.exit_code == 6
    assert (found.rows[0].exit_code, found.rows[0].error) == (6, "the disk is full")
    assert statuses(run(jobs, fail_first, keep_going=True)) == ["failed", "done"]


def test_a_dry_run_writes_nothing(jobs):
    found = run(jobs, dry_run=True)
    assert statuses(found) == ["planned", "planned"] and all(row.size for row in found.rows)
    assert sorted(path.name for path in jobs.parent.iterdir()) == ["jobs.toml", "m.gguf"]


def test_options_that_make_no_sense_name_their_budget(jobs):
    def refuse(words):
        raise UsageError("nothing decides the types")

    with pytest.raises(requant.errors.BadInput, match=r"\[\[job\]\] 1, budget 1: nothing decides the types"):
        read_batch(jobs, KEYS, refuse)


def test_the_library_imports_no_command_line():
    code = "import sys, requant.api.batch.run_batch; print([m for m in sys.modules if m in ('click', 'requant.cli')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
