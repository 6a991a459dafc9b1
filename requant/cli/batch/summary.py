"""How a batch stands: a row for each output, what was no source, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from requant.common.atomic_write import has_schema
from requant.common.serialization import dump, parse, read_text, to_plain
from requant.conversion.record import record_path
from requant.errors import BadInput, RequantError, printable

SCHEMA = "requant.batch/1"
GOOD = ("done", "skipped", "planned")
SOME = 9  # the exit code where some outputs are there and others are not
Status = Literal["planned", "done", "skipped", "running", "stopped", "failed", "not started"]  # skipped: was there


class Incomplete(RequantError):
    """Outputs of a batch are missing: `there` of `n` are there."""

    def __init__(self, path: Path, code: int, there: int, n: int) -> None:
        self.exit_code, self.there, self.n = code, there, n
        what = f"{there} of {n} outputs are there" if there else f"none of {n} outputs is there"
        super().__init__(f"{printable(str(path))}: {what}; run the same command again when the cause is removed")


@dataclass(slots=True)
class Row:
    """One output, or a source of which there could be none. Sizes in bytes; error: the line that told the failure."""

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
    seconds: float | None = None

    def fail(self, code: int, error: str) -> None:
        """The output is not made, and why."""
        self.status, self.exit_code, self.error = "failed", code, error


def exit_code(rows: Sequence[Row]) -> int:
    """0 where all is there (or planned), SOME where only some is, else the code of the first failure."""
    good = [row for row in rows if row.status in GOOD]
    if len(good) == len(rows):
        return 0
    return SOME if good else next((row.exit_code for row in rows if row.exit_code), 1)


def check(path: Path, rows: Sequence[Row]) -> None:
    """Raise Incomplete where some output of the jobs in the file at `path` is not there."""
    code = exit_code(rows)
    if code:
        raise Incomplete(path, code, sum(row.status in GOOD for row in rows), len(rows))


def to_json(rows: Sequence[Row], no_sources: Mapping[str, str]) -> str:
    """The summary as one object; `no_sources`: file -> why it was left out."""
    counts = {s: sum(row.status == s for row in rows) for s in get_args(Status)}
    head = {"schema": SCHEMA, "exit_code": exit_code(rows)}
    named = {key.replace(" ", "_"): n for key, n in counts.items()}
    return dump(head | named | {"no_sources": dict(no_sources), "jobs": [_plain(row) for row in rows]})


def _plain(row: Row) -> object:
    return {k: printable(v) if isinstance(v, str) else v for k, v in to_plain(row).items()}


def recorded_outputs(path: Path) -> list[Path]:
    """The records of the outputs that are there, where `path` is a batch's JOBS.toml or summary; else `path` itself."""
    if path.is_dir():
        return [path]
    if path.suffix.lower() == ".toml":
        path = path.with_name(f"{path.name}.requant") / "summary.json"
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
    return [
        record_path(next((f / name for f in folders if record_path(f / name).exists()), Path(name))) for name in outputs
    ]
