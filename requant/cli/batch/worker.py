"""A command of requant in a process of its own, for a batch: how it is started, heard, and stopped.

What it says on stderr goes through, but for the line that tells its failure: that is its stdout. It ends when its
stdin does, so that no batch leaves one behind, however it ends itself.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from requant.cli import console as speech
from requant.cli import messages
from requant.cli.progress import JOB, mode
from requant.errors import InputOutputError, RequantError

T = TypeVar("T")

_ERROR = "requant: error: "
_TICK = 0.05  # seconds between two looks at whether a worker has ended
_PATIENCE = 1.0  # seconds that a worker has to stop after a signal, before it is killed, which does no harm


class _Heard(io.TextIOBase):
    """stderr, with lines of errors turned to stdout."""

    def __init__(self, stderr: IO[str]) -> None:
        self._stderr = stderr

    def write(self, text: str) -> int:
        if text.startswith(_ERROR):
            os.write(1, text.removeprefix(_ERROR).encode(errors="backslashreplace"))
            return len(text)
        return self._stderr.write(text)

    def flush(self) -> None:
        self._stderr.flush()

    def isatty(self) -> bool:
        return self._stderr.isatty()

    def fileno(self) -> int:
        return self._stderr.fileno()


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def run() -> None:
    """The worker: the command in sys.argv."""
    messages.prepare()
    sys.stderr = _Heard(sys.stderr)
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def command() -> None:
        from requant.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()):
            main.main(sys.argv[1:], prog_name="requant", standalone_mode=False)

    messages.leave(messages.exit_code_of(command))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker ended: its exit code (128 + n where signal n killed it), the line of its error, and its seconds."""

    code: int
    error: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    begun: float

    def ended(self) -> Ended | None:
        code = self.process.poll()
        if code is None:
            return None
        self._close()
        self.said.seek(0)
        error = self.said.read().decode(errors="backslashreplace").strip()
        self.said.close()
        if code < 0:
            return Ended(128 - code, f"was killed by {signal.Signals(-code).name}", time.monotonic() - self.begun)
        return Ended(code, error, time.monotonic() - self.begun)

    def _close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()


def _start(words: Sequence[str], job: str, alone: bool) -> _Worker:
    said = tempfile.TemporaryFile()  # noqa: SIM115, closed when the worker has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "requant.cli.batch.worker", *_settings(alone), *words],
        stdin=subprocess.PIPE,
        stdout=said,
        env=os.environ | {JOB: job},
        start_new_session=True,  # a terminal's signals reach the batch alone, which passes them on
    )
    return _Worker(process, said, time.monotonic())


def _settings(alone: bool) -> list[str]:
    """What was said of how much to say; of several workers none draws a bar."""
    words = speech.settings.words()
    return words if alone or mode() != "bar" else [*words, "--progress=none"]


def run_all(
    tasks: Iterable[tuple[T, Sequence[str]]],
    at_once: int,
    started: Callable[[T], Any],
    finished: Callable[[T, Ended], bool],
    called: Callable[[T], str],
) -> None:
    """Run every task's command, `at_once` of them at a time, in order; no further ones once `finished` says False.

    `called` is what progress calls a task. A signal is passed on to those that run, which are then waited for a little.
    """
    waiting, running = deque(tasks), list[tuple[T, _Worker]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task, words = waiting.popleft()
                started(task)
                running.append((task, _start(words, called(task), alone=at_once == 1)))
            found = [(task, worker, ended) for task, worker in running if (ended := worker.ended()) is not None]
            for task, worker, ended in found:
                running.remove((task, worker))
                if not finished(task, ended):
                    waiting.clear()
            if not found:
                time.sleep(_TICK)
    except BaseException as error:
        number = error.number if isinstance(error, messages.Stopped) else signal.SIGTERM
        _stop([worker.process for _, worker in running], number)
        raise


def _stop(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    end = time.monotonic() + _PATIENCE
    for process in processes:
        process.send_signal(number)
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run()


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of a failure."""
    if isinstance(error, RequantError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return InputOutputError.exit_code, "out of memory"
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename is not None else ""
    return InputOutputError.exit_code, f"{where}{error.strerror or error}"
