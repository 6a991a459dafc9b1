"""Sources of a batch: the files that a path, a folder or a pattern matches, and the identity of each model."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.api.batch.names import template_fields
from requant.common.inputs import own_files
from requant.container.shards import first_name
from requant.container.source import Source, open_source, other_than_model
from requant.errors import BadInput, printable
from requant.model.kinds import PROJECTOR, kind_of

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
        for name in glob.glob(str(Path(glob.escape(str(folder))) / pattern), recursive=True):  # noqa: PTH207
            yield from Path(name).glob("*.gguf") if Path(name).is_dir() else [Path(name)]


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
    return OWN if "requant.plan_sha256" in source.metadata else None


def _describe_source(source: Source) -> BatchSource:
    files = [[f.path.name, f.status.st_size, f.status.st_mtime_ns] for f in source.opened]
    return BatchSource(
        path=source.path,
        identity={"header_sha256": source.header_sha256, "files": files},
        newest=max(f.status.st_mtime_ns for f in source.opened),
        fields=template_fields(source.path, source.metadata, sum(math.prod(t.shape) for t in source.tensors)),
    )
