"""How a batch stands: a row for each output, what was no source, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from requant.errors import RequantError, printable
from requant.records import dump, plain

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
    return {k: printable(v) if isinstance(v, str) else v for k, v in plain(row).items()}
