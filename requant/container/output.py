"""Output: the files of one conversion, filled with a journal beside them and published together when all are complete.

OUT.part.journal records the pieces that are on disk, so that the same command resumes where an earlier run stopped.
Data is flushed before its record. The headers come last, then the names; the first file, which loaders open, gets its
name last of all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from requant.common.files import open_regular, read_into
from requant.common.folders import check_space, sync_folder
from requant.common.inputs import own_files
from requant.common.open_files import OpenFile
from requant.common.sidecars import Sidecar
from requant.container.journal import Journal, Line
from requant.container.layout import Layout
from requant.container.part import PartFile, resolve_target
from requant.errors import BadInput, InputOutputError, NumericFault, OutputRefused, RequantError, SourceChanged

if TYPE_CHECKING:
    import numpy as np

COMMIT_BYTES, COMMIT_SECONDS = 2**30, 30.0  # at most this much is written again after a crash
_SEALED, _INVALID, _DROPPED, _HOPELESS = "sealed", "invalid", "dropped", "hopeless"


def claim_output(path: Path) -> Journal:
    """Open the journal of the output at `path`, new where there is none; no other run can have it at the same time.

    Raises as `Journal` does.
    """
    return Journal(journal_path(path), Path(path))


def journal_path(path: Path) -> Path:
    """Return the path of the journal of the output at `path`. Raises OutputRefused for what is no regular file."""
    target = resolve_target(path)
    return target.with_name(f"{target.name}.part.journal")


class Output:
    """The files of an output at `paths`, with their `layouts` and `journal`.

    head: source, plan and request; a run that resumes must have the same.

    Use as a context manager: leaving it unpublished keeps the recorded pieces, or removes everything where there are
    none; `keep` keeps the journal even then, because its plan took long to make. records: of earlier runs.
    is_published: only `finish` is left to do. extras: sidecars that are removed with the journal. warnings: guarantees
    that the file system cannot give.

    Opening raises what `PartFile` raises, and OutputRefused where the journal has another head.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        layouts: Sequence[Layout],
        head: Line,
        journal: Journal,
        *,
        force: bool,
        extras: Sequence[Sidecar] = (),
        keep: bool = False,
    ) -> None:
        self.paths, self.layouts, self.journal = tuple(map(Path, paths)), tuple(layouts), journal
        self.records: tuple[Line, ...] = ()
        self.notes: list[str] = []
        self._head = head | {"files": [[p.name, x.size, x.sha256] for p, x in zip(paths, layouts, strict=True)]}
        self._force, self._extras = force, extras
        self._parts: list[PartFile] = []
        self._published: list[PublishedFile] = []
        self._pending: list[Line] = []
        self._unflushed, self._last_flush, self._failed = 0, time.monotonic(), False
        self._keep, self._has_records = keep, bool(journal.past.records)
        try:
            self.is_published = can_resume(journal, self._head, self.paths[0]) and self._is_in_place()
            if self.is_published:
                self.records = journal.past.records
                self._published += [PublishedFile(resolve_target(path)) for path in self.paths]
            else:
                self._open()
        except BaseException:
            self._close()
            raise

    @property
    def warnings(self) -> list[str]:
        """The guarantees that the file system cannot give, a line each."""
        return list(
            dict.fromkeys(
                w for owned in (self.journal.warnings, *(part.warnings for part in self._parts)) for w in owned
            )
        )

    @property
    def part_files(self) -> list[Path]:
        """The files being filled."""
        return [part.file for part in self._parts]

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RequantError):
            if isinstance(error, SourceChanged):
                self.journal.append([{_INVALID: error.what}])
                for part in self._parts:
                    part.blank()  # with its header, the next run would not take it for an unfinished output
            elif not self.is_published:
                self.flush()
                if isinstance(error, NumericFault) and self._has_records:
                    self.journal.append([{_HOPELESS: error.what}])  # another command may have the place
        self._close()

    def write_at(self, file: int, offset: int, data: bytes | memoryview | np.ndarray) -> None:
        """Write `data` at `offset` of a file, as `PartFile.write_at` does."""
        if self._published:  # an earlier run has published it, and it was changed since
            hint = "--restart and --force make it again"
            raise InputOutputError(self.paths[file], "is not as it was written", hint=hint)
        self._parts[file].write_at(offset, data)

    def read_at(self, file: int, offset: int, target: memoryview) -> None:
        """Fill `target` with what is in a file from `offset` on, as `PartFile.read_at` does."""
        (self._published or self._parts)[file].read_at(offset, target)

    def record(self, line: Line, n_bytes: int) -> None:
        """Add `line` to the journal once its `n_bytes` are on disk: at the next flush."""
        self._pending.append(line)
        self._unflushed += n_bytes
        if self._unflushed >= COMMIT_BYTES or time.monotonic() - self._last_flush >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until all data is on disk, then until its records are; do nothing after a failure."""
        if not self._pending or self._failed:
            return
        self._failed = True
        for part in self._parts:
            part.sync()
        # set before the append: a signal during it may leave records on disk, so the files must be kept
        before, self._has_records = self._has_records, True
        try:
            self.journal.append(self._pending)
        except InputOutputError:
            self._has_records = before
            raise
        self._pending.clear()
        self._unflushed, self._last_flush, self._failed = 0, time.monotonic(), False

    def seal(self, layouts: Sequence[Layout]) -> None:
        """Write the headers, last of all, and read them back; layouts: with digests. Raises InputOutputError.

        Padding that the disk has changed since it was reserved becomes zero again first.
        """
        for part, layout in zip(self._parts, layouts, strict=True):
            for start, stop in layout.padding:
                found = bytearray(stop - start)
                part.read_at(start, memoryview(found))
                if any(found):
                    part.write_at(start, bytes(stop - start))
        self.flush()
        for part, layout in zip(self._parts, layouts, strict=True):
            part.seal(layout.header)

    def drop_records(self, tensors: Collection[str]) -> None:
        """Drop the records of `tensors`, which were found wrong, so that the next run makes them again."""
        self.journal.append([{_DROPPED: sorted(tensors)}])

    def publish(self) -> None:
        """Give the sealed files their names, the first one last. Raises OutputRefused, InputOutputError."""
        self.journal.append([{_SEALED: True}])
        self._has_records = True
        for part in (*self._parts[1:], *self._parts[:1]):
            part.put_in_place()
        self.is_published = True

    def finish(self) -> None:
        """Remove the journal; call it when all other files of the published output are written."""
        sync_folder(self.journal.path.parent)  # the final names must be on disk before the journal is removed
        with contextlib.suppress(InputOutputError):  # the output is complete, whatever fails here
            self.journal.clear()  # no run may resume once the extras are removed
        self._remove_extras()
        self.journal.remove()
        with contextlib.suppress(InputOutputError):  # the next run removes a journal that reappears
            sync_folder(self.journal.path.parent)

    def _is_in_place(self) -> bool:
        """Return whether an earlier run put every file in place. If only some are, turn them back into .part files."""
        if not any(_SEALED in record for record in self.journal.past.records):
            return False
        targets = [resolve_target(path) for path in self.paths]
        files = [target.with_name(target.name + ".part") for target in targets]
        placed = [self._is_published(i, target, files[i]) for i, target in enumerate(targets)]
        for target, file, there in zip(targets, files, placed, strict=True):
            if there and all(placed):
                file.unlink(missing_ok=True)  # stopped between the link to the new name and the removal of the old one
            elif there and file.exists():
                target.unlink()  # the same, but other files are not in place yet
            elif there:
                target.rename(file)
        if not all(placed):
            sync_folder(targets[0].parent)  # before the headers go: no name may be that of half a file
        return all(placed)

    def _is_published(self, i: int, target: Path, part: Path) -> bool:
        if not target.exists() or (part.exists() and not part.samefile(target)):
            return False
        try:
            with own_files():
                descriptor = open_regular(target)
        except BadInput:
            return False
        try:
            return self.layouts[i].begins(os.pread(descriptor, len(self.layouts[i].header), 0))
        finally:
            os.close(descriptor)

    def _open(self) -> None:
        sizes = [layout.size for layout in self.layouts]
        for path, size in zip(self.paths, sizes, strict=True):
            self._parts.append(PartFile(path, size, force=self._force, keep=True))
        if can_resume(self.journal, self._head, self.paths[0]):
            check_space(self._parts[0].target.parent, sum(sizes), self.part_files)
            self._resume()
            return
        past = self.journal.past
        if past.n_dropped and past.head is None:
            self.notes.append("the journal of an unfinished output was damaged; all of it is made again")
        if any(_INVALID in record for record in past.records):
            self.notes.append("the source changed while an unfinished output was made; all of it is made again")
        known = [self.journal.was_there and part.is_blank() for part in self._parts]
        for part, ours in zip(self._parts, known, strict=True):
            part.check_ours(known=ours)
        self.journal.begin(self._head)
        self._has_records = False
        sync_folder(self.journal.path.parent)
        check_space(self._parts[0].target.parent, sum(sizes), self.part_files)
        for part, ours in zip(self._parts, known, strict=True):
            part.begin(known=ours)

    def _resume(self) -> None:
        """Take over the records of earlier runs, except those of part files that are gone."""
        past = self.journal.past
        lost = {i for i, part in enumerate(self._parts) if not part.found}
        for i, part in enumerate(self._parts):
            known = part.is_blank() or part.has_part_of(self.layouts[i]) or _has_piece(part, i, past.records)
            part.begin(known=known) if i in lost else part.resume(known=known)
        self.records = tuple(r for r in _kept_records(past.records) if r.get("file") not in lost)
        n_begun = len({str(r["tensor"]) for r in self.records if "tensor" in r})
        self.notes.append(f"resuming {n_begun}/{sum(len(layout.tensors) for layout in self.layouts)} tensors")
        if past.n_dropped:
            self.notes.append(f"{past.n_dropped} damaged lines of the journal were dropped")

    def _close(self) -> None:
        """Close everything; remove it where nothing is worth keeping."""
        for part in self._parts:
            if self._has_records:
                part.close()
            else:
                part.abandon()
        for placed in self._published:
            placed.close()
        if not self._has_records and not (self._keep and self.journal.has_head):
            self._remove_extras()
            self.journal.remove()
        self.journal.close()

    def _remove_extras(self) -> None:
        for sidecar in self._extras:
            with contextlib.suppress(RequantError):  # it has been exchanged meanwhile, and is left alone
                sidecar.remove()


class PublishedFile:
    """A file that an earlier run has published at `path`, to be read as a PartFile is."""

    def __init__(self, path: Path) -> None:
        self.file, self.warnings = path, list[str]()

        def open_own() -> int:
            with own_files():
                return open_regular(path)

        self._opened = OpenFile(open_own, open_own)

    def read_at(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on. Raises as `read_into`."""
        with self._opened.use() as descriptor:
            read_into(self.file, descriptor, target, offset)

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def _kept_records(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the records that no later line drops."""
    dropped = ((i, line.get(_DROPPED)) for i, line in enumerate(lines))
    last = {str(name): i for i, names in dropped if isinstance(names, list) for name in names}
    for i, line in enumerate(lines):
        if i > last.get(str(line.get("tensor")), -1):
            yield line


def can_resume(journal: Journal, head: Line, path: Path) -> bool:
    """Return whether the journal can be resumed: it has a head with all values of `head`.

    Raises OutputRefused, naming `path`, where it has records of another head: another command's work would be lost,
    unless that command ended in a NumericFault, as it would again.
    """
    past = journal.past
    if past.head is None or any(_INVALID in record for record in past.records):
        return False
    difference = past.difference(head)
    if difference is not None and (not past.records or _HOPELESS in past.records[-1]):
        return False
    if difference is not None:
        what = f"is unfinished, begun by another command: {difference}"
        raise OutputRefused(path, what, hint="the same command resumes it, --restart discards it")
    return True


def discard_unfinished(journal: Journal, path: Path) -> None:
    """Remove the unfinished output at `path` and clear its journal.

    Raises OutputRefused, before anything is removed, where a file is not of an unfinished output; InputOutputError.
    """
    past = journal.past
    files = [(resolve_target(Path(path).with_name(name)), size) for name, size in past.files()]
    with contextlib.ExitStack() as stack:
        parts = list[PartFile]()
        for i, (target, size) in enumerate([*files, (resolve_target(path), 0)]):
            if target.with_name(f"{target.name}.part").exists() and target not in [part.target for part in parts]:
                parts.append(stack.enter_context(PartFile(target, size, force=True, keep=True)))
                is_begun = journal.was_there and parts[-1].is_blank()
                parts[-1].check_ours(known=is_begun or _has_piece(parts[-1], i, past.records))
        for part in parts:
            part.remove()
    journal.clear()


def _has_piece(part: PartFile, number: int, records: Sequence[Line]) -> bool:
    """Return whether the part file, of the file of that number, has one of the pieces that are recorded of it."""
    for line in records:
        offset, n_bytes = line.get("offset"), line.get("bytes")
        if line.get("file") != number or not isinstance(offset, int) or not isinstance(n_bytes, int):
            continue
        if part.has_bytes(offset, n_bytes, line.get("sha256")):
            return True
    return False
