"""What a batch remembers, in a folder of its own: scores, plans, outputs; used again only where all of it still fits.

An entry is a folder with `kept.json`, which holds the request that the entry answers and the hash of each file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from requant.common.atomic_write import write_text
from requant.common.serialization import dump, parse, parse_record, read_text, to_plain
from requant.container.source import open_source
from requant.conversion.record import read_conversion, record_path
from requant.errors import BadInput, InputOutputError, OutputRefused, RequantError
from requant.planning.plan import Plan

_ENTRY_SCHEMA = "requant.entry/1"
_MADE_SCHEMA = "requant.made/1"
_HASHED = 2**28  # bytes; of a larger file, a model, size and time stand for the content


def digest(value: Any) -> str:
    """The SHA-256, in hex, of what `value` is as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def content_of(path: Path) -> Any:
    """What tells whether the file at `path` says the same as before. Raises BadInput where it cannot be read."""
    try:
        status = path.stat()
        now = status.st_size, status.st_mtime_ns, status.st_ino
        return list(now[:2]) if status.st_size > _HASHED else _hash(path, now)
    except (OSError, ValueError) as error:
        raise BadInput(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


@functools.lru_cache
def _hash(path: Path, _: tuple[int, int, int]) -> str:
    """The SHA-256 of the file as it is now."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Keep `folder`, made if need be, for this run alone. Raises OutputRefused while another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputOutputError(folder, f"cannot keep the state of a batch: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputRefused(folder, "another run is at work on this batch") from error
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What `kept.json` says: the request that the files beside it answer, and their hashes by name."""

    request: str
    files: Mapping[str, str]


def seal_entry(folder: Path, request: str) -> None:
    """Seal the files in `folder`, and in its folders, as the answer to `request`."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "kept.json")
    read_entry = CacheEntry(request, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})
    write_text(
        folder / "kept.json", dump({"schema": _ENTRY_SCHEMA} | to_plain(read_entry)), force=True, inputs=frozenset()
    )


def read_entry(folder: Path, request: str) -> dict[str, Path] | None:
    """Name -> path of the files that answer `request`; None where there are none, or those of another request.

    Raises BadInput where any of them is not as it was left.
    """
    path = folder / "kept.json"
    if not path.exists():
        return None
    found: CacheEntry = parse_record(CacheEntry, parse(read_text(path), _ENTRY_SCHEMA, path), "", path)
    if found.request != request:
        return None
    for name, wanted in found.files.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or content_of(folder / name) != wanted:
            raise BadInput(folder / name, "is not as it was left")
    return {name: folder / name for name in found.files}


def empty_folder(folder: Path) -> Path:
    """`folder`, there and with no file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if not path.is_dir():
            path.unlink()
    return folder


@dataclass(frozen=True, slots=True)
class Made:
    """An output as it was when it was made: its request, its (first) file's name, all its bytes, its headers' hash."""

    request: str
    file: str
    size: int
    header_sha256: str


def written_file(out: Path) -> Path | None:
    """The output at `out`, or the first of the shards it was written as, whichever is newer; None without either."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in out.stem)
    found = [p for p in (out, *out.parent.glob(f"{escaped}-00001-of-[0-9][0-9][0-9][0-9][0-9].gguf")) if p.exists()]
    return max(found, key=lambda p: p.stat().st_mtime_ns) if found else None


def describe_made(file: Path, request: str) -> Made:
    """What is at `file` now, as the answer to `request`. Raises BadInput, InputOutputError."""
    with open_source(file) as output:
        return Made(request, file.name, sum(f.header.file_size for f in output.opened), output.header_sha256)


def write_made(folder: Path, out: Path, made: Made) -> None:
    """Remember that the output at `out` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_made_path(folder, out), dump({"schema": _MADE_SCHEMA} | asdict(made)), force=True, inputs=frozenset())


def is_made(folder: Path, out: Path, request: str) -> bool | None:
    """Whether the output at `out` was made for `request` and is still there, by its size and its headers.

    None where nothing is remembered of it. Raises BadInput where what was remembered of it is damaged.
    """
    path = _made_path(folder, out)
    if not path.exists():
        return None
    made: Made = parse_record(Made, parse(read_text(path), _MADE_SCHEMA, path), "", path)
    file = written_file(out)
    if made.request != request or file is None or not record_path(file).exists():
        return False
    try:
        return describe_made(file, request) == made
    except RequantError:  # no sound model any more: to be made again, if that is allowed
        return False


def is_recorded(file: Path, plan: Plan, imatrix_sha256: str | None, newest: int) -> bool:
    """Whether the record beside `file` says that it is what `plan` and imatrix give, and it is younger than `newest`.

    For an output of which nothing is remembered. newest: when the source was last changed, in ns since the epoch.
    """
    try:
        said, found = read_conversion(record_path(file)), describe_made(file, "")
        same = said.plan.to_json() == plan.to_json() and said.imatrix_sha256 == imatrix_sha256
        whole = (found.size, found.header_sha256) == (said.size, said.header_sha256)
        return same and whole and file.stat().st_mtime_ns > newest
    except (RequantError, OSError):
        return False


def _made_path(folder: Path, out: Path) -> Path:
    return folder / f"{digest(os.path.realpath(out))[:16]}.json"
