"""What the command line says: results on stdout; errors, warnings and progress on stderr, a line each; the exit code.

Exit codes are those of `requant.errors`, with 2 for click's own usage errors, 6 for the system's and 128 + n for
signal n. A failure that is none of them is a bug: Python's hook prints it, in one line, and the code is 1.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from requant.cli.console import QUIET, VERBOSE, log, settings
from requant.cli.progress import progress as _progress
from requant.common.monitor import Monitor
from requant.common.units import format_size
from requant.errors import InputOutputError, RequantError, UsageError, printable

if TYPE_CHECKING:
    import click

    from requant.report.text.bars import Drawing, Span

progress = _progress


_SPARE = "close other programs, or give fewer --threads"
_NO_THREAD = "can't start new thread"  # a RuntimeError of Python's, where the system has no more of them
_GRACE = 1.0  # seconds from a signal to the end of the process, whatever is still at work
_state: dict[str, Any] = {
    "signal": 0,
    "stopped": False,
    "said": False,
    "then": "run the same command again",
}


class Stopped(BaseException):
    """A signal asked the process to end; no Exception, so that nothing but cleaning up stands in its way."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def prepare() -> None:
    """Signals, warnings and bugs in one line each; a stdout that any name can be written to."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    _watch_signals()
    warnings.showwarning = _show_warning
    sys.excepthook = _report_bug
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command`; its failure becomes a line on stderr and the code."""
    import click

    try:
        command()
    except RequantError as error:
        return _failed(str(error), error.exit_code)
    except click.ClickException as error:
        return _failed(_usage(error), UsageError.exit_code)
    except Stopped as stop:
        _state["stopped"] = True
        return _stopped(stop.number)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and str(error) != _NO_THREAD:
            raise
        return _failed(_exhausted(error), InputOutputError.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _failed(f"{where}{error.strerror or error}", InputOutputError.exit_code)
    except SystemExit:  # click, when the reader of its help has gone
        _silence_stdout()
    return 0


def leave(code: int) -> NoReturn:
    """End the process. After a signal at once: threads that are still at work would be waited for."""
    if _state["stopped"]:
        os._exit(code)
    _state["stopped"] = True  # a signal that comes now changes nothing any more
    sys.exit(code)


def set_debug(_: click.Context, __: click.Parameter, value: bool) -> None:
    """Click's callback of --debug."""
    settings.debug = settings.debug or value


def print_result(*parts: str | Drawing) -> None:
    """The parts on stdout, a blank line between them, all of their text printable; colours are added after that.

    A reader that has gone is no failure; InputOutputError for a full disk.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write("\n\n".join(map(_shown, parts)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    except OSError as error:
        _silence_stdout()
        raise InputOutputError("stdout", f"cannot be written: {error.strerror}") from error


def _shown(part: str | Drawing) -> str:
    if isinstance(part, str):
        return "\n".join(map(printable, part.rstrip().split("\n")))
    return "\n".join("".join(map(_coloured, line)).rstrip() for line in part.lines)


def _coloured(span: Span) -> str:
    text = printable(span.text)
    return f"\x1b[{span.colour}m{text}\x1b[0m" if span.colour is not None else text


def info(text: str) -> None:
    """A line on stderr, unless quiet."""
    log(text)


def debug(text: str) -> None:
    """A line on stderr for those who want to know more."""
    log(text, VERBOSE)


def warn(*texts: str) -> None:
    """A line on stderr for each of `texts`, unless quiet."""
    for text in texts:
        log(f"warning: {text}")


def _failed(message: str, code: int) -> int:
    if settings.debug:
        import traceback

        traceback.print_exc()
    log(f"error: {message}", QUIET)
    return code


def _exhausted(error: MemoryError | RuntimeError) -> str:
    """What there is no more of: threads, or memory, with what was needed, where NumPy says it, and any limit."""
    import resource

    if not isinstance(error, MemoryError):
        return f"no more threads can be started; {_SPARE}"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    figures = [f"got {error}"] if str(error) else []
    figures += [] if limit == resource.RLIM_INFINITY else [f"limit {format_size(limit)}, ulimit -v"]
    return f"out of memory{' (' + ', '.join(figures) + ')' if figures else ''}; {_SPARE}"


def _usage(error: click.ClickException) -> str:
    """Click's message in the form of ours."""
    import click

    from requant.errors import find_similar

    message = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.NoSuchOption):
        near = find_similar(error.option_name, error.possibilities or (), 1)
        message = f"no option '{error.option_name}'{f'; did you mean {near[0]}?' if near else ''}"
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "requant"
    return f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else ';'} see {path} --help"


def _stop(number: int, _: object) -> None:
    if not _state["stopped"]:
        _state["stopped"], _state["signal"] = True, number
        raise Stopped(number)


def _watch_signals() -> None:
    """End the process soon after a signal even where the main thread does not hear it, or waits; at once at a second.

    What is on disk is as good as after a clean end: an unfinished output can be killed at any moment.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        number = os.read(reader, 1)[0]
        again, _, _ = select.select([reader], [], [], _GRACE)
        if not again:
            _stopped(number)
        os._exit(128 + number)

    with contextlib.suppress(RuntimeError):  # no thread to be had: the main thread alone hears signals
        threading.Thread(target=watch, daemon=True).start()


def _stopped(number: int) -> int:
    """Say once that a signal ends the process; its exit code."""
    if not _state["said"]:
        _state["said"] = True
        _failed(f"stopped by {signal.Signals(number).name}; {_state['then']}", 128 + number)
    return 128 + number


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """While what is done can be gone on with by another run, a signal's message says so."""
    before, _state["then"] = _state["then"], "run the same command again to resume"
    yield
    _state["then"] = before  # not after a failure: the message of a signal comes later


def _silence_stdout() -> None:
    """What is still buffered, and what follows, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    warn(" ".join(str(message).split()))


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _state["signal"]:  # it came before or after the command, or the import of C code made something else of Stopped
        os._exit(_stopped(_state["signal"]))
    if settings.debug:
        sys.__excepthook__(kind, error, trace)
    what = f"{kind.__name__}: {' '.join(str(error).split())}".rstrip(": ")
    log(f"error: internal error, please report it: {what}; --debug shows where", QUIET)


MONITOR = Monitor(progress, warn, info, resumable)  # what the stages say, on this terminal
