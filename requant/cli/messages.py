"""Messages of the command line: results on stdout; errors, warnings and progress on stderr, a line each; exit codes.

Exit codes are those of `requant.errors`, with 2 for click's own usage errors, 6 for the system's and 128 + n for
signal n. Any other exception is a bug: Python's hook prints it in one line, and the code is 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from requant.cli.console import log, log_error, settings
from requant.cli.progress import progress
from requant.common.monitor import Monitor
from requant.common.units import format_size
from requant.errors import InputOutputError, RequantError, UsageError, printable

if TYPE_CHECKING:
    import click

    from requant.report.text.bars import Drawing, Span

_SPARE = "close other programs, or give fewer --threads"
_NO_THREAD = "can't start new thread"  # Python's RuntimeError where the system has no more threads
_NO_ROOM = ("Cannot allocate memory", "failed to map segment")  # the system's words for a library without memory
_NO_KERNELS = "libllvmlite"  # llvmlite's OSError has no number
_AMPLE = 2**30  # bytes of address space
_GRACE = 1.0  # seconds from a signal to the end of the process
_state: dict[str, Any] = {"signal": 0, "stopped": False, "said": False, "then": "run the same command again"}


class Stopped(BaseException):
    """A signal asked the process to end; a BaseException, so that only cleanup handles it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def prepare() -> None:
    """Make signals, warnings and bugs a line each, and stdout accept any name."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    _watch_signals()
    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < _AMPLE:
        # each thread of OpenBLAS takes 32 MiB, and OpenBLAS ends the process where there is no room for them
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    warnings.showwarning = _show_warning
    sys.excepthook = _report_bug
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command` and return its exit code; a failure is a line on stderr."""
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
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if _is_exhaustion(error):
            return _failed(_describe_exhaustion(error), InputOutputError.exit_code)
        if not isinstance(error, OSError):
            raise
        return _failed(_describe_failure(error), InputOutputError.exit_code)
    except SystemExit:  # click, where the reader of its help has closed the pipe
        _silence_stdout()
    return 0


def leave(code: int) -> NoReturn:
    """End the process; after a signal without waiting for threads."""
    if _state["stopped"]:
        os._exit(code)
    _state["stopped"] = True  # ignore signals from here on
    sys.exit(code)


def print_result(*parts: str | Drawing) -> None:
    """Write the parts to stdout, a blank line between them, with unprintable text escaped and colours added.

    A closed pipe is no failure. Raises InputOutputError for a full disk.
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
    return "\n".join("".join(map(_coloured, line)).rstrip() for line in part)


def _coloured(span: Span) -> str:
    text = printable(span.text)
    return f"\x1b[{span.colour}m{text}\x1b[0m" if span.colour is not None else text


def info(text: str) -> None:
    """Write a line to stderr, unless quiet."""
    log(text)


def warn(*texts: str) -> None:
    """Write a warning to stderr for each of `texts`, unless quiet."""
    for text in texts:
        log(f"warning: {text}")


def _failed(message: str, code: int) -> int:
    if settings.debug:
        import traceback

        traceback.print_exc()
    log_error(message)
    return code


def _is_exhaustion(error: BaseException) -> bool:
    """Return whether memory or threads are exhausted, also while a library is being loaded."""
    if isinstance(error, ImportError):
        causes = [error, error.__cause__, error.__context__]  # NumPy wraps the error of the library
        return any(word in str(cause) for cause in causes for word in _NO_ROOM)
    if isinstance(error, OSError):
        return _NO_KERNELS in str(error) and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and str(error) == _NO_THREAD)


def _describe_exhaustion(error: BaseException) -> str:
    """Describe which resource is exhausted: threads, or memory with the size asked for and any limit."""
    if isinstance(error, RuntimeError):
        return f"no more threads can be started; {_SPARE}"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    figures = [f"got {error}"] if isinstance(error, MemoryError) and str(error) else []
    figures += [] if limit == resource.RLIM_INFINITY else [f"limit {format_size(limit)}, ulimit -v"]
    return f"out of memory{' (' + ', '.join(figures) + ')' if figures else ''}; {_SPARE}"


def _describe_failure(error: OSError) -> str:
    """Return the system's message, with what to do where no more files can be opened."""
    where = f"{error.filename}: " if error.filename is not None else ""
    hint = "; raise the limit: ulimit -n" if error.errno == errno.EMFILE else ""
    return f"{where}{error.strerror or error}{hint}"


def _usage(error: click.ClickException) -> str:
    """Return a message of click in the form of requant's."""
    import click

    message = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None:
        return _describe_unknown_option(error.option_name, context)
    if isinstance(error, click.MissingParameter) and error.param is not None and error.param.name == "out":
        message += ": name the output after the model, as in requant convert MODEL OUT.gguf --vram 12GiB"
    if "unexpected extra argument" in message and context is not None:
        taken = [p.human_readable_name for p in context.command.params if isinstance(p, click.Argument)]
        message += f": {context.command.name} takes {' and '.join(taken) or 'options'} alone"
    path = context.command_path if context is not None else "requant"
    return f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else ';'} see {path} --help"


def _describe_unknown_option(option: str, context: click.Context) -> str:
    from requant.cli.command import options_by_name
    from requant.cli.foreign_words import describe_unknown_option

    name = (context.command.name or "") if context.parent is not None else ""
    return describe_unknown_option(option, options_by_name(context.command, context), name)


def _stop(number: int, _: object) -> None:
    if not _state["stopped"]:
        _state["stopped"], _state["signal"] = True, number
        raise Stopped(number)


def _watch_signals() -> None:
    """End the process soon after a signal even where the main thread is blocked; at once after a second signal.

    Files need no cleanup: an unfinished output can be killed at any moment.
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

    with contextlib.suppress(RuntimeError):  # no thread can be started: only the main thread handles signals
        threading.Thread(target=watch, daemon=True).start()


def _stopped(number: int) -> int:
    """Log once that a signal ends the process, and return its exit code."""
    if not _state["said"]:
        _state["said"] = True
        _failed(f"stopped by {signal.Signals(number).name}; {_state['then']}", 128 + number)
    return 128 + number


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Let the message of a signal state, in the meantime, that the same command resumes the work."""
    before, _state["then"] = _state["then"], "run the same command again to resume"
    yield
    _state["then"] = before  # not after a failure: the message of a signal comes later


def _silence_stdout() -> None:
    """Discard the buffered output of stdout and all that follows."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    warn(" ".join(str(message).split()))


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _state["signal"]:  # Stopped outside the command, or turned into another error by an import
        os._exit(_stopped(_state["signal"]))
    if isinstance(error, OSError):  # outside the command, as where the package itself cannot be read
        os._exit(_failed(_describe_failure(error), InputOutputError.exit_code))
    if settings.debug:
        sys.__excepthook__(kind, error, trace)
    what = f"{kind.__name__}: {' '.join(str(error).split())}".rstrip(": ")
    log_error(f"internal error, please report it: {what}; --debug shows where")


MONITOR = Monitor(progress, warn, info, resumable)  # of the library's work, on this terminal
