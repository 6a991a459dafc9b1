"""Summary of a batch: a row for each output, the files left out, the counts and the exit code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from requant.api.batch.state import SUMMARY, state_folder, write_state
from requant.common.atomic_write import has_schema
from requant.common.serialization import dump, parse, read_text, to_plain
from requant.conversion.record import record_path
from requant.errors import BadInput, RequantError, printable

if TYPE_CHECKING:
    from requant.planning.plan import Plan

SCHEMA = "requant.batch/1"
SOME = 9  # the exit code where only some of the outputs exist
Status = Literal["planned", "done", "skipped", "running", "stopped", "failed", "not started"]  # skipped: existed before
GOOD: tuple[Status, ...] = ("done", "skipped", "planned")


class Incomplete(RequantError):
    """Outputs of a batch are missing: `there` of `n` are done, or in a dry run can be made."""

    def __init__(self, path: Path, code: int, there: int, n: int, *, dry_run: bool) -> None:
        self.exit_code, self.there, self.n = code, there, n
        what = f"{there or 'none'} of {n} outputs {'can be made' if dry_run else 'are done'}"
        super().__init__(
            f"{printable(str(path))}: {what}; correct what the errors name, then run the same command again"
        )


@dataclass(slots=True)
class Row:
    """An output, or a source that cannot be opened. Sizes in bytes.

    ubatch: the batch for which VRAM was planned. error: the message of the failure.
    """

    job: str
    source: str
    budget: str
    output: str | None = None
    status: Status = "not started"
    exit_code: int | None = None
    error: str | None = None
    size: int | None = None
    bpw: float | None = None
    predicted_loss: float | None = None
    ubatch: int | None = None
    loss_unit: str | None = None  # of predicted_loss
    seconds: float | None = None

    def set_plan(self, plan: Plan) -> None:
        """Set the figures of the plan."""
        self.bpw, self.predicted_loss, self.ubatch = plan.bpw, plan.total_loss, plan.budget.get("ubatch")
        self.loss_unit = None if plan.predicted_loss is None else plan.loss_unit


@dataclass(slots=True)
class Summary:
    """The rows of the jobs in the file at `path`; a row's status is set here, which keeps the counts.

    excluded: file -> the reason to leave it out.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    counts: Counter[Status] = field(default_factory=Counter)

    def add_row(self, job: str, source: Path, budget: str) -> Row:
        """Add a row that is not started, and return it."""
        row = Row(job, str(source), budget)
        self.rows.append(row)
        self.counts[row.status] += 1
        return row

    def set_status(self, row: Row, status: Status) -> None:
        """Set the status of a row that has not failed."""
        self.counts[row.status] -= 1
        self.counts[status] += 1
        row.status = status

    def record_failure(self, row: Row, code: int, error: str) -> None:
        """Set the row to failed, with the exit code and the message of the failure."""
        self.set_status(row, "failed")
        row.exit_code, row.error = code, error

    def stop_running(self) -> None:
        """Set the rows that are running to stopped."""
        for row in self.rows:
            if row.status == "running":
                self.set_status(row, "stopped")

    @property
    def n_good(self) -> int:
        """Return the number of outputs that exist, or are planned in a dry run."""
        return sum(self.counts[status] for status in GOOD)

    @property
    def exit_code(self) -> int:
        """Return 0 where all outputs exist (or are planned), SOME where some do, else the code of the first failure."""
        if self.n_good == len(self.rows):
            return 0
        return SOME if self.n_good else next((row.exit_code for row in self.rows if row.exit_code), 1)

    def check(self, *, dry_run: bool = False) -> None:
        """Raise Incomplete where an output is missing, or in a dry run cannot be made."""
        if self.exit_code:
            raise Incomplete(self.path, self.exit_code, self.n_good, len(self.rows), dry_run=dry_run)

    def to_json(self) -> str:
        """Return the summary as one JSON object."""
        head = {"schema": SCHEMA, "exit_code": self.exit_code}
        counts = {status.replace(" ", "_"): self.counts[status] for status in get_args(Status)}
        return dump(head | counts | {"no_sources": self.excluded, "jobs": [_printable_row(row) for row in self.rows]})

    def write(self, folder: Path) -> None:
        """Write `summary.json` into the folder of state."""
        write_state(folder / SUMMARY, self.to_json())


def _printable_row(row: Row) -> object:
    return {k: printable(v) if isinstance(v, str) else v for k, v in to_plain(row).items()}


def output_records(path: Path) -> list[Path]:
    """Return the records of a batch's outputs, where `path` is its JOBS.toml or summary; else `path` itself."""
    if path.is_dir():
        return [path]
    if path.suffix.lower() == ".toml":
        path = state_folder(path) / SUMMARY
        if not path.exists():
            raise BadInput(path, "is not there: the batch has not been run, or keeps its state elsewhere")
    if not has_schema(path, SCHEMA):
        return [path]
    rows = parse(read_text(path), SCHEMA, path).get("jobs")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    outputs = [str(row.get("output")) for row in rows if row.get("status") in GOOD and row.get("output")]
    if not outputs:
        raise BadInput(path, "says of no output that it is there")
    folders = (Path(), path.parent.parent)  # that in which the batch was run, or that of its jobs
    found = [next((f / name for f in folders if record_path(f / name).exists()), Path(name)) for name in outputs]
    return [record_path(path) for path in found]
