"""Worker process of a batch: how it is started and stopped, and the command of requant that it runs.

A worker writes the message of its failure to stdout, and everything else to the batch's stderr. It ends when its stdin
is closed, so that it never outlives the batch.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from requant.api.batch.workers import OnExit, OnStart, WorkerExit, WorkerPool, WorkerTask
from requant.cli import console, messages
from requant.cli.progress import mode

_TICK = 0.05  # seconds between two checks whether a worker has ended
_PATIENCE = 1.0  # seconds that a worker has to stop after a signal before it is killed, which does no harm


def _write_error(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, f"{message}\n".encode(errors="backslashreplace"))


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def run() -> None:
    """Run the command in sys.argv as a worker."""
    messages.prepare()
    console.settings.write_error = _write_error
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def command() -> None:
        from requant.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()):
            main.main(sys.argv[1:], prog_name="requant", standalone_mode=False)

    messages.leave(messages.exit_code_of(command))


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    task: WorkerTask
    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    begun: float

    def poll(self) -> WorkerExit | None:
        """Return how the worker ended, None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.stdout.seek(0)
        error = self.stdout.read().decode(errors="backslashreplace").strip()
        self.stdout.close()
        seconds = time.monotonic() - self.begun
        if code < 0:
            return WorkerExit(128 - code, f"was killed by {signal.Signals(-code).name}", seconds)
        return WorkerExit(code, error, seconds)


def _start_worker(task: WorkerTask, *, alone: bool) -> _Worker:
    stdout = tempfile.TemporaryFile()  # noqa: SIM115, closed when the worker has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "requant.cli.batch_worker", *_console_options(alone), *task.words],
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=os.environ | {console.JOB: task.label},
        start_new_session=True,  # a terminal's signals reach the batch alone, which passes them on
    )
    return _Worker(task, process, stdout, time.monotonic())


def _console_options(alone: bool) -> list[str]:
    """Return the options of this process's console; of several workers none draws a bar."""
    words = console.settings.words()
    return words if alone or mode() != "bar" else [*words, "--progress=none"]


def run_tasks(tasks: Sequence[WorkerTask], at_once: int, on_start: OnStart, on_exit: OnExit) -> None:
    """Run the tasks in order, `at_once` of them at a time; start no further ones once `on_exit` returns False.

    A signal is passed on to the workers, which then have a moment to stop.
    """
    waiting, running = deque(tasks), list[_Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.popleft()
                on_start(task)
                running.append(_start_worker(task, alone=at_once == 1))
            ended = [(worker, end) for worker in running if (end := worker.poll()) is not None]
            for worker, end in ended:
                running.remove(worker)
                if not on_exit(worker.task, end):
                    waiting.clear()
            if not ended:
                time.sleep(_TICK)
    except BaseException as error:
        number = error.number if isinstance(error, messages.Stopped) else signal.SIGTERM
        _stop_workers([worker.process for worker in running], number)
        raise


def _stop_workers(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    end = time.monotonic() + _PATIENCE
    for process in processes:
        process.send_signal(number)
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


WORKERS = WorkerPool(run_tasks, lambda: mode() == "bar")


if __name__ == "__main__":
    run()
