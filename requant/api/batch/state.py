"""State of a batch in a folder of its own: cached scores and plans, and its outputs as they were written.

A cache entry is a folder with `kept.json`, which holds the request that the entry answers and the hash of each file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from requant.common.atomic_write import write_text
from requant.common.files import hash_file, identify_content, lock_file
from requant.common.inputs import own_files
from requant.common.serialization import dump, hash_json, parse, parse_record, read_text, to_plain
from requant.common.sidecars import Sidecar
from requant.container.source import open_source
from requant.conversion.record import read_conversion, record_path
from requant.errors import BadInput, InputOutputError, OutputRefused, RequantError
from requant.planning.plan import Plan

_ENTRY_SCHEMA = "requant.entry/1"
_MADE_SCHEMA = "requant.made/1"
_SEAL = "kept.json"
SUMMARY, REPORTS = "summary.json", "reports.json"
_HEAD = 4096  # bytes of a file that contain what kind it is
_SCHEMA_START = b'"schema": "requant.'
_MAX_HASHED = 2**28  # bytes; a larger file, a model, is identified by size and time


def state_folder(jobs: Path) -> Path:
    """Return the usual folder of state of the job file `jobs`."""
    return jobs.with_name(f"{jobs.name}.requant")


@functools.lru_cache
def _key_of_unchanged(path: Path, max_hashed: int, _: tuple[int, ...]) -> str | tuple[int, int]:
    return identify_content(path, max_hashed)


def content_key(path: Path, *, whole: bool = False) -> str | tuple[int, int]:
    """Return a key for the content of the file at `path`: its hash; if large and not `whole`, its size and time.

    Raises BadInput where it cannot be read.
    """
    try:
        status = path.stat()
        now = status.st_size, status.st_mtime_ns, status.st_ino
        return _key_of_unchanged(path, status.st_size if whole else _MAX_HASHED, now)
    except (OSError, ValueError) as error:
        raise BadInput(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be, for this run alone.

    Raises OutputRefused while another run holds it, and where it has files of these names that are not of a batch.
    """
    make_folder(folder)
    descriptor = Sidecar(folder / "lock", "the lock of a batch", lambda file: not os.fstat(file).st_size).open_or_make()
    try:
        for name in (SUMMARY, REPORTS):
            _state_file(folder / name).check()
        if not lock_file(folder, descriptor, warnings=[]):
            raise OutputRefused(folder, "another run is at work on this batch")
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder of state. Raises InputOutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputOutputError(folder, f"cannot keep the state of a batch: {error.strerror}") from error


def write_state(path: Path, text: str) -> None:
    """Write a file of state, in place of an older one. Raises OutputRefused for a file that is none."""
    _state_file(path).check()
    write_text(path, text, force=True)


def remove_state(path: Path) -> None:
    """Remove a file of state, if it is there. Raises OutputRefused for a file that is none."""
    _state_file(path).remove()


def _state_file(path: Path) -> Sidecar:
    # it is replaced and removed, never written into, so it may have other names
    return Sidecar(path, "a file of a batch", _is_state, names=sys.maxsize)


def _is_state(descriptor: int) -> bool:
    head = os.pread(descriptor, _HEAD, 0)
    return not head or _SCHEMA_START in head or (head.startswith(b"GGUF") and b"imatrix" in head)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The content of `kept.json`: the request that the files beside it answer, and their hashes by name."""

    request: str
    files: Mapping[str, str]


def seal_entry(folder: Path, request: str, names: Iterable[str]) -> None:
    """Seal the files of these names in `folder` as the answer to `request`."""
    entry = CacheEntry(request, {name: hash_file(folder / name) for name in names})
    write_state(folder / _SEAL, dump({"schema": _ENTRY_SCHEMA} | to_plain(entry)))


def read_entry(folder: Path, request: str) -> dict[str, Path] | None:
    """Return name -> path of the files that answer `request`; None without an entry, or with that of another request.

    Raises BadInput where a file has changed since it was sealed.
    """
    path = folder / _SEAL
    if not path.exists():
        return None
    with own_files():
        raw = parse(read_text(path), _ENTRY_SCHEMA, path)
    entry: CacheEntry = parse_record(CacheEntry, raw, "", path)
    if entry.request != request:
        return None
    for name, wanted in entry.files.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or content_key(folder / name, whole=True) != wanted:
            raise BadInput(folder / name, "is not as it was left")
    return {name: folder / name for name in entry.files}


@dataclass(frozen=True, slots=True)
class MadeOutput:
    """An output when it was finished: its request, its (first) file's name, its bytes in all, its headers' hash."""

    request: str
    file: str
    size: int
    header_sha256: str


def find_output(out: Path) -> Path | None:
    """Find the output at `out`, or the first of its shards, whichever is newer; None without either."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in out.stem)
    found = [p for p in (out, *out.parent.glob(f"{escaped}-00001-of-[0-9][0-9][0-9][0-9][0-9].gguf")) if p.exists()]
    return max(found, key=lambda p: p.stat().st_mtime_ns) if found else None


def read_output(file: Path, request: str = "") -> MadeOutput:
    """Read the headers of the output at `file`, the answer to `request`. Raises BadInput, InputOutputError."""
    with own_files(), open_source(file) as output:
        size = sum(f.header.file_size for f in output.opened)
        return MadeOutput(request, file.name, size, output.header_sha256)


def save_output(folder: Path, out: Path, made: MadeOutput) -> None:
    """Write to `folder` that the output at `out` is finished."""
    make_folder(folder)
    write_state(_output_file(folder, out), dump({"schema": _MADE_SCHEMA} | asdict(made)))


def is_made(folder: Path, out: Path, request: str) -> bool | None:
    """Return whether the output at `out` was made for `request` and is unchanged, by its size and its headers.

    None where `folder` has no entry for it. Raises BadInput where the entry is damaged.
    """
    path = _output_file(folder, out)
    if not path.exists():
        return None
    with own_files():
        raw = parse(read_text(path), _MADE_SCHEMA, path)
    made: MadeOutput = parse_record(MadeOutput, raw, "", path)
    file = find_output(out)
    if made.request != request or file is None or not record_path(file).exists():
        return False
    try:
        return read_output(file, request) == made
    except RequantError:  # no longer a valid model: to be made again, if that is allowed
        return False


def matches_record(file: Path, plan: Plan, imatrix_sha256: str | None, newest: int) -> bool:
    """Return whether the record beside `file` has this plan and imatrix, and the file is younger than `newest`.

    For an output without an entry. newest: the source's modification time, in ns since the epoch.
    """
    try:
        with own_files():
            record = read_conversion(record_path(file))
        found = read_output(file)
        same = record.plan.to_json() == plan.to_json() and record.imatrix_sha256 == imatrix_sha256
        whole = (found.size, found.header_sha256) == (record.size, record.header_sha256)
        return same and whole and file.stat().st_mtime_ns > newest
    except (RequantError, OSError):
        return False


def _output_file(folder: Path, out: Path) -> Path:
    return folder / f"{hash_json(os.path.realpath(out))[:16]}.json"
