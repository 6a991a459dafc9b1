"""Worker processes of a batch, as the caller provides them: each runs one command of requant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requant.api.batch.items import BatchItem


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """A command to run for `item`: the words after `requant`; `label` names the task in progress output."""

    item: BatchItem
    words: Sequence[str]
    label: str


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """End of a worker: its exit code (128 + n where signal n killed it), its error message and its seconds."""

    code: int
    error: str
    seconds: float


OnStart = Callable[[WorkerTask], None]
OnExit = Callable[[WorkerTask, WorkerExit], bool]  # returns whether further tasks may start


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """Functions that run workers.

    run_tasks: run the tasks in order, so many of them at a time, and call back as each starts and ends.
    draws_bar: return whether a worker that runs alone draws a progress bar of its own.
    """

    run_tasks: Callable[[Sequence[WorkerTask], int, OnStart, OnExit], None]
    draws_bar: Callable[[], bool]
