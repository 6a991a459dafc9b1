"""What a power cut leaves of a folder: the log of all that a run did to it, replayed minus what was not on disk yet.

The strict reading of POSIX: data is on disk after an fsync of the file, a name after an fsync of the folder; whatever
was done since the last one may be there or not, each write, and each sector of a write, for itself.
"""

import os
import pickle
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512


@dataclass
class Log:
    """What a run did. names: {name: file} and files: {file: bytes} before it; a file is a number of its own.

    operations: (kind, ...) in the order in which they were done:
    of a file's data ("write", file, offset, bytes), ("size", file, n), ("grow", file, n), ("sync", file);
    of the folder ("name", name, file), ("move", old, new, file), ("remove", name), ("sync folder",).
    """

    names: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    operations: list = field(default_factory=list)


class Recorder:
    """Logs what this process does to the files of `folder` by os calls, from `install` on, and saves it at its end.

    without: names of calls that are not logged, as if the program forgot them.
    """

    def __init__(self, folder, path, without=()):
        self._without = without
        self._folder, self._path = os.path.realpath(folder), Path(path)
        self._lock = threading.RLock()
        self._log = Log()
        self._files = {}  # inode -> number
        self._content = {}  # number -> what is known of a file that is written by other means than pwrite
        for entry in sorted(Path(folder).iterdir()):
            inode = entry.stat().st_ino
            number = self._files[inode] if inode in self._files else self._new(inode)  # one file may have two names
            self._log.names[entry.name], self._log.files[number] = number, entry.read_bytes()

    def _new(self, inode):
        self._files[inode] = len(self._content)
        self._content[len(self._content)] = b""
        return self._files[inode]

    def install(self):
        """Put the log between the program and `os`, for the rest of the process."""
        for name in ("open", "pwrite", "fdatasync", "fsync", "link", "unlink", "replace", "rename"):
            self._wrap(name, getattr(self, f"_{name}"))
        self._wrap("ftruncate", self._size("size"))
        self._wrap("posix_fallocate", self._size("grow"))
        from requant.cli import messages

        leave = messages.leave

        def save_and_leave(code):
            self._path.write_bytes(pickle.dumps(self._log))
            leave(code)

        messages.leave = save_and_leave

    def _wrap(self, name, logged):
        if name in self._without:
            return
        real = getattr(os, name)

        def call(*arguments, **named):
            with self._lock:
                return logged(real, *arguments, **named)

        setattr(os, name, call)

    def _add(self, *operation):
        self._log.operations.append(operation)

    def _own(self, path):
        """The name in the folder, or None."""
        if not isinstance(path, (str, os.PathLike)):
            return None
        head, name = os.path.split(os.fspath(path))
        return name if os.path.realpath(head) == self._folder else None

    def _number(self, descriptor):
        status = os.fstat(descriptor)
        return self._files.get(status.st_ino) if stat.S_ISREG(status.st_mode) else None

    def _open(self, real, path, flags, *mode, **named):
        name = self._own(path)
        is_new = name is not None and flags & os.O_CREAT and not os.path.lexists(path)
        descriptor = real(path, flags, *mode, **named)
        if flags & os.O_TMPFILE == os.O_TMPFILE and os.path.realpath(path) == self._folder:
            self._new(os.fstat(descriptor).st_ino)
        if is_new:
            self._add("name", name, self._new(os.fstat(descriptor).st_ino))
        return descriptor

    def _pwrite(self, real, descriptor, data, offset):
        n = real(descriptor, data, offset)
        number = self._number(descriptor)
        if number is not None:
            self._content[number] = None
            self._add("write", number, offset, bytes(data[:n]))
        return n

    def _size(self, kind):
        def call(real, descriptor, *numbers):
            real(descriptor, *numbers)
            number = self._number(descriptor)
            if number is not None:
                self._content[number] = None
                self._add(kind, number, sum(numbers))

        return call

    def _fdatasync(self, real, descriptor):
        number = self._number(descriptor)
        if number is not None and self._content[number] is not None:
            content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            if content != self._content[number]:
                self._content[number] = content
                self._add("write", number, 0, content)
        real(descriptor)
        if number is not None:
            self._add("sync", number)
        elif os.path.realpath(f"/proc/self/fd/{descriptor}") == self._folder:
            self._add("sync folder")

    _fsync = _fdatasync

    def _link(self, real, old, new, **named):
        number = self._files[Path(old).stat().st_ino] if self._own(new) else None
        real(old, new, **named)
        if number is not None:
            self._add("name", self._own(new), number)

    def _unlink(self, real, path, **named):
        real(path, **named)
        if self._own(path):
            self._add("remove", self._own(path))

    def _replace(self, real, old, new):
        number = self._files[Path(old).stat().st_ino] if self._own(new) else None
        real(old, new)
        if number is not None:
            self._add("move", self._own(old), self._own(new), number)

    _rename = _replace


def _synced(log, end):
    """For every operation before `end` whether it was on disk for sure then."""
    sure = [False] * end
    waiting = {}
    for i, (kind, *rest) in enumerate(log.operations[:end]):
        if kind in ("write", "size", "grow"):
            waiting.setdefault(rest[0], []).append(i)
        elif kind in ("name", "move", "remove"):
            waiting.setdefault("folder", []).append(i)
        else:
            for j in waiting.pop("folder" if kind == "sync folder" else rest[0], []):
                sure[j] = True
    return sure


def _written(content, offset, data, torn, rng):
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    if not torn:
        content[offset : offset + len(data)] = data
        return
    for start in range(0, len(data), SECTOR):
        if rng.random() < 0.5:
            own = data[start : start + SECTOR]
            content[offset + start : offset + start + len(own)] = own


def crashed(log, end, rng, ordered):
    """{name: (file, bytes)} after a power cut before operation `end`; how many operations were lost.

    What was not synced survives by chance. ordered: names appear and go in the order of the calls, as journalling
    file systems have it; otherwise each for itself.
    """
    sure = _synced(log, end)
    share = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    kept = [known or rng.random() < share for known in sure]
    if ordered:
        names = [i for i in range(end) if log.operations[i][0] in ("name", "move", "remove")]
        cut = rng.choice([i for i in range(len(names) + 1) if all(not sure[j] for j in names[i:])])
        for i, j in enumerate(names):
            kept[j] = i < cut
    names = dict(log.names)
    files = {number: bytearray(content) for number, content in log.files.items()}
    for i, (kind, *rest) in enumerate(log.operations[:end]):
        if not kept[i]:
            continue
        if kind == "name":
            names[rest[0]] = rest[1]
        elif kind == "move":
            names.pop(rest[0], None)
            names[rest[1]] = rest[2]
        elif kind == "remove":
            names.pop(rest[0], None)
        elif kind == "write":
            content = files.setdefault(rest[0], bytearray())
            _written(content, rest[1], rest[2], not sure[i] and rng.random() < 0.3, rng)
        elif kind in ("size", "grow"):
            content = files.setdefault(rest[0], bytearray())
            content.extend(bytes(max(0, rest[1] - len(content))))
            if kind == "size":
                del content[rest[1] :]
    lost = sum(not k and log.operations[i][0] not in ("sync", "sync folder") for i, k in enumerate(kept))
    return {name: (number, bytes(files.get(number, b""))) for name, number in names.items()}, lost


def placed(state, folder):
    """Write a state of `crashed` into the new `folder`, names of one file as links to it."""
    folder.mkdir()
    first = {}
    for name, (number, content) in state.items():
        if number in first:
            os.link(first[number], folder / name)
        else:
            first[number] = folder / name
            (folder / name).write_bytes(content)
    return folder
