"""Context of a running batch: its items, options, folder of state, workers and monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from requant.api.batch.items import Batch, BatchItem
from requant.api.batch.state import find_output, is_made, matches_record, read_entry
from requant.api.batch.workers import WorkerExit, WorkerPool
from requant.common.monitor import Monitor
from requant.container.imatrix import Imatrix, read_imatrix
from requant.errors import BadInput, InputOutputError, RequantError, printable
from requant.planning.output_metadata import imatrix_used

FAILURES = (RequantError, MemoryError, OSError)  # of one output, which leave the others unaffected


class WorkerFailure(RequantError):
    """A worker that ended with an error."""

    def __init__(self, end: WorkerExit) -> None:
        self.exit_code = end.code
        super().__init__(end.error or f"ended with exit code {end.code}")


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options of a run."""

    at_once: int = 1  # conversions at a time
    keep_going: bool = False  # after failures
    force: bool = False  # replace files that exist
    restart: bool = False  # discard unfinished outputs
    dry_run: bool = False  # plan, but neither score nor write


@dataclass(frozen=True, slots=True)
class BatchContext:
    """A batch and how to run it; `folder` is that of its state."""

    batch: Batch
    folder: Path
    options: BatchOptions
    workers: WorkerPool
    monitor: Monitor

    def read_entry(self, folder: Path, request: str) -> dict[str, Path] | None:
        """Return the cached files that answer `request`, None without any; warn where they are damaged."""
        try:
            return read_entry(folder, request)
        except (BadInput, OSError) as error:
            self.monitor.warn(f"{error}; it is made again")
            return None

    @property
    def made(self) -> Path:
        """The folder with an entry for each finished output."""
        return self.folder / "outputs"

    def find_output(self, item: BatchItem, read_importance: Callable[[], Imatrix | None]) -> tuple[Path | None, bool]:
        """Return the (first) file of the item's output if it is complete and made for this request, and has an entry.

        read_importance: reads the importance of an output without an entry, which its own record must name.
        """
        assert item.out is not None and item.plan is not None
        try:
            known = is_made(self.made, item.out, item.output_request())
        except BadInput as error:
            known = None
            self.monitor.warn(f"{error}; the output's own record counts")
        file = find_output(item.out)
        if known is None and file is not None:
            used = imatrix_used(item.plan, read_importance())
            same = matches_record(file, item.plan, None if used is None else used.sha256, item.source.newest)
            return (file if same else None), False
        return (file if known else None), known is not None

    def report_failure(self, item: BatchItem, error: BaseException, count: str = "") -> None:
        """Set the item's row to failed and log the failure; `count`: "2 of 5", if known."""
        code, what = _describe_failure(error)
        self.batch.summary.record_failure(item.row, code, what)
        if item.out is None:
            budget = f", {item.row.budget}" if item.row.budget else ""
            what = f"{item.source.path}{budget}: {what.removeprefix(f'{printable(str(item.source.path))}: ')}"
        self.monitor.info(f"{count} failed ({code}): {what}".strip())


def _describe_failure(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of a failure."""
    if isinstance(error, RequantError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return InputOutputError.exit_code, "out of memory"
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename is not None else ""
    return InputOutputError.exit_code, f"{where}{error.strerror or error}"


def plan_file(folder: Path, item: BatchItem) -> Path:
    """Return the file of the item's plan in the folder of state."""
    return folder / "plans" / item.plan_request()[:16] / "plan.json"


def read_importance_file(path: Path | None) -> Imatrix | None:
    """Read the importance matrix at `path`; None without one."""
    return None if path is None else read_imatrix(path)
