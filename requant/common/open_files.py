"""Files of which a process may use more than it may hold open at once: the least recently used are closed meanwhile."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from requant.errors import InputOutputError

_SPARE = 48  # descriptors for everything else: standard streams, the journal, sockets, libraries that are loaded late
_LEAST = 4  # files that are held open whatever the limit
_MOST = 2**18  # descriptors to ask for: a source and an output of 65,535 files each


class OpenFile:
    """A file that is open while it is used; between two uses it may be closed and opened again.

    make: opens it the first time, now. remake: opens it again, and raises where it has become another file. leave: is
    called with the descriptor before it is closed for the sake of another file.
    """

    def __init__(
        self, make: Callable[[], int], remake: Callable[[], int], leave: Callable[[int], None] = lambda _: None
    ) -> None:
        self.remake, self.leave = remake, leave
        self.descriptor, self.n_users, self.is_closed = -1, 0, False
        _POOL.open(self, make)

    @contextmanager
    def use(self) -> Iterator[int]:
        """Give the descriptor, which stays open meanwhile; safe from any thread. Raises what `remake` raises."""
        _POOL.borrow(self)
        try:
            yield self.descriptor
        finally:
            _POOL.give_back(self)

    def close(self) -> None:
        """Close it; may be called more than once."""
        _POOL.close(self)


class _Pool:
    """All files that are open, the least recently used first; their number stays below the limit of the process."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), OrderedDict[OpenFile, None]()

    def open(self, file: OpenFile, make: Callable[[], int]) -> None:
        with self._lock:
            self._open_file(file, make)

    def borrow(self, file: OpenFile) -> None:
        with self._lock:
            assert not file.is_closed
            if file.descriptor < 0:
                self._open_file(file, file.remake)
            self._open.move_to_end(file)
            file.n_users += 1

    def give_back(self, file: OpenFile) -> None:
        with self._lock:
            file.n_users -= 1

    def close(self, file: OpenFile) -> None:
        with self._lock:
            file.is_closed = True
            self._drop(file)

    def _open_file(self, file: OpenFile, make: Callable[[], int]) -> None:
        self._close_idle(_raise_limit(len(self._open) + 1) - 1)
        try:
            file.descriptor = make()
        except InputOutputError as error:
            if not is_exhausted(error.__cause__):
                raise
            self._close_idle(0)  # other parts of the process hold more files than usual
            file.descriptor = make()
        self._open[file] = None

    def _close_idle(self, most: int) -> None:
        """Close files that nobody uses until at most `most` are open."""
        idle = [file for file in self._open if not file.n_users] if len(self._open) > most else []
        for file in idle[: max(0, len(self._open) - most)]:
            file.leave(file.descriptor)
            self._drop(file)

    def _drop(self, file: OpenFile) -> None:
        if file.descriptor >= 0:
            descriptor, file.descriptor = file.descriptor, -1
            del self._open[file]
            os.close(descriptor)


_POOL = _Pool()


def is_exhausted(error: BaseException | None) -> bool:
    """Return whether the error says that no more files can be opened."""
    return isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}


def _raise_limit(n: int) -> int:
    """Return how many files may be held open; for `n` of them raise the soft limit to the hard one where needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if n + _SPARE > soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(_LEAST, soft - _SPARE)
