"""Sources of a batch: the files that a path, a folder or a pattern matches, and the identity of each model."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from requant.api.batch.names import template_fields
from requant.common.inputs import own_files
from requant.container.shards import first_name
from requant.container.source import Source, open_source, other_than_model
from requant.errors import BadInput, printable
from requant.model.kinds import PROJECTOR, kind_of

_MAX_ENTRIES = 100_000  # files and folders to look at for one pattern
OWN = "requant made it"  # why an output is not a source
_AUXILIARY = ("mmproj", "imatrix")  # in the names of files that accompany models


@dataclass(frozen=True, slots=True)
class BatchSource:
    """A model to convert; `path` is that of its first shard.

    identity: decides whether it is unchanged: the headers' hash, and name, bytes and time of every file.
    fields: field of a template -> its text for this model.
    """

    path: Path
    identity: Mapping[str, Any]
    newest: int  # modification time of its newest file, in ns since the epoch
    fields: Mapping[str, str]


def find_sources(jobs: Path, where: str, patterns: Sequence[str]) -> dict[Path, bool]:
    """Return the files that the `patterns` of a job match -> whether the file itself was named; sorted per pattern.

    Patterns are relative to the folder of `jobs`; a folder matches all `*.gguf` in it, and a split model is its first
    shard. Raises BadInput where a pattern matches nothing.
    """
    found: dict[Path, bool] = {}
    for pattern in patterns:
        path = jobs.parent / pattern
        named = path.exists() and not path.is_dir()
        paths = [path] if named else sorted(_match_pattern(jobs.parent, pattern, path))
        if not paths:
            shown = printable(pattern)
            what = f"{where}: no model in '{shown}'" if path.is_dir() else f"{where}: no file is called '{shown}'"
            raise BadInput(jobs, what, hint="paths are relative to the folder of this file")
        for each in dict.fromkeys(map(_first_shard, paths)):
            found[each] = found.get(each, False) or named
    return found


def _match_pattern(folder: Path, pattern: str, path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from path.glob("*.gguf")
    elif glob.has_magic(pattern):
        root = Path(pattern).anchor
        for found in _walk(Path(root or folder), Path(pattern).parts[bool(root) :], count(1)):
            yield from found.glob("*.gguf") if found.is_dir() else [found]


def _walk(folder: Path, parts: Sequence[str], seen: Iterator[int]) -> Iterator[Path]:
    """Yield what the parts of a pattern match in `folder`, each once; `**` is any folders, which follows no links.

    Hidden names match only a pattern that begins with a dot. Raises BadInput once `seen` has counted too many entries.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        while rest[:1] == ("**",):
            rest = rest[1:]
        yield from _walk(folder, rest, seen) if rest else [folder]
    elif not glob.has_magic(part):
        if os.path.exists(folder / part):  # noqa: PTH110, False where the folder cannot be read
            yield from _walk(folder / part, rest, seen)
        return
    for entry in _list(folder):
        if next(seen) > _MAX_ENTRIES:
            what = "is one of too many files and folders that the pattern of a source goes through"
            raise BadInput(folder / entry.name, what, limit=_MAX_ENTRIES)
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if part != "**":
            if fnmatch.fnmatchcase(entry.name, part):
                yield from _walk(folder / entry.name, rest, seen)
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, parts, seen)
        elif not rest:
            yield folder / entry.name


def _list(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, none of one that cannot be read or is no folder."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, _MAX_ENTRIES + 1))
    except OSError:
        return []


def _first_shard(path: Path) -> Path:
    first = path.with_name(first_name(path.name))
    return first if first.exists() else path


def read_source(path: Path, *, named: bool) -> BatchSource | str:
    """Read the model at `path`, or return the reason to leave it out; a file that was `named` itself is never left out.

    Raises BadInput, InputOutputError for a file that cannot be opened.
    """
    auxiliary = next((word for word in _AUXILIARY if word in path.name.lower()), None)
    if auxiliary is not None and not named:
        return f"its name says {auxiliary}"
    with own_files():  # it may be an output of this batch, which is no input
        source = open_source(path)
    with source:
        reason = None if named else _exclusion_reason(source)
        if reason is not None:
            return reason
        source.add_to_inputs()
        return _describe_source(source)


def _exclusion_reason(source: Source) -> str | None:
    kind = source.metadata.get("general.type", "model")
    if kind != "model":
        return f"general.type is {printable(str(kind))[:40]}"
    if (other := other_than_model(source)) is not None:
        return f"it is {other[0]}"
    file_kind = kind_of(source.metadata, {t.name for t in source.tensors})
    if file_kind is PROJECTOR or file_kind.is_draft:
        return f"it is {file_kind.words}"
    if not any(t.n_weights for t in source.tensors):
        return "it holds no weights"
    return OWN if "requant.plan_sha256" in source.metadata else None


def _describe_source(source: Source) -> BatchSource:
    files = [[f.path.name, f.status.st_size, f.status.st_mtime_ns] for f in source.opened]
    return BatchSource(
        path=source.path,
        identity={"header_sha256": source.header_sha256, "files": files},
        newest=max(f.status.st_mtime_ns for f in source.opened),
        fields=template_fields(source.path, source.metadata, sum(math.prod(t.shape) for t in source.tensors)),
    )
