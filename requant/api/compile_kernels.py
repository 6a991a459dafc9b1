"""Compilation of kernels in processes of their own, which leave them in the cache for this process.

Each process takes one group of types after another. A group shares a search, which is compiled with its first type.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from requant.api.kernels import Purpose, load_kernels
from requant.common.threads import n_threads
from requant.formats import BlockFormat, format_of

_SEARCH = re.compile("^encode_|_fit$")  # the names that types import their searches by
Progress = Callable[[int], None]
Worker = subprocess.Popen[bytes]


class Wait(Protocol):
    """A wait for the processes."""

    def __call__(self, progress: Progress) -> None:
        """Wait for the processes; `progress` is called with the number of types that are done."""


@contextmanager
def compile_apart(formats: Sequence[BlockFormat], purpose: Purpose, *, threads: int | None = None) -> Iterator[Wait]:
    """Compile the kernels of `formats` in processes, as many as `threads`; yield a function that waits for them.

    What a process that ends early leaves undone, the
    caller compiles where it loads it. Those that still run when the block ends are killed.
    """
    groups, done = SimpleQueue[list[str]](), SimpleQueue[int | None]()
    found = _group_by_search(formats)
    for group in found:
        groups.put(group)

    def feed(worker: Worker) -> None:
        assert worker.stdin is not None
        try:
            while (group := _take(groups)) is not None and _compile_group(worker, group):
                done.put(len(group))
        finally:
            worker.stdin.close()  # the worker then ends
            done.put(None)

    with ExitStack() as stack:
        workers = []
        for _ in range(min(n_threads(threads), len(found))):
            with suppress(OSError):  # no further process can be started
                workers.append(stack.enter_context(_start_worker(purpose)))
        pool = stack.enter_context(ThreadPoolExecutor(max(len(workers), 1)))
        for worker in workers:
            stack.callback(worker.kill)
            pool.submit(feed, worker)

        def wait(progress: Progress) -> None:
            left = len(workers)
            while left:
                if (count := done.get()) is None:
                    left -= 1
                else:
                    progress(count)

        yield wait


def _take(groups: SimpleQueue[list[str]]) -> list[str] | None:
    with suppress(Empty):
        return groups.get_nowait()
    return None


def _start_worker(purpose: Purpose) -> Worker:
    root = str(Path(__file__).parents[2])  # in place of the current folder: this package and no other of its name
    code = f"import sys; sys.path[0] = {root!r}; from {__name__} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code, purpose],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what is wrong with the cache, this process says itself
        bufsize=0,
    )


def _compile_group(worker: Worker, group: Sequence[str]) -> bool:
    """Have the worker compile the kernels of the types; return whether it did."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(OSError):  # it was killed
        worker.stdin.write((" ".join(group) + "\n").encode())
        return bool(worker.stdout.readline())
    return False


def _group_by_search(formats: Sequence[BlockFormat]) -> list[list[str]]:
    """Return the names of the formats, those that encode with the same search together."""
    groups: dict[str, list[str]] = {}
    for fmt in formats:
        named = (value for name, value in vars(fmt.kernels).items() if _SEARCH.search(name))
        searches = (getattr(value, "__module__", "") for value in named)
        own = (name for name in searches if name.startswith("requant.formats.encoders."))
        groups.setdefault(next(own, ""), []).append(fmt.name)
    return list(groups.values())


def serve() -> None:
    """Compile the kernels of the types that each line of stdin names, and answer with a line."""
    for line in sys.stdin:
        load_kernels([format_of(name) for name in line.split()], Purpose(sys.argv[1]))
        sys.stdout.write("done\n")
        sys.stdout.flush()
