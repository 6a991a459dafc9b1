"""The sources of a batch: which files a path, a folder or a pattern stands for, and what must be known of each."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.cli.batch.names import fields_of
from requant.common.files import Identity
from requant.container.source import Source, open_source
from requant.errors import BadInput, printable

OWN = "requant made it"  # why an output is no source
_SHARD = re.compile(r"-(\d{5})(-of-\d{5}\.gguf)$")
_BESIDE = ("mmproj", "imatrix")  # in a name: what lies beside models, and is none


@dataclass(frozen=True, slots=True)
class Model:
    """A source as a batch knows it; `path` is that of its first shard.

    identity: what tells whether it is still the same: the headers' hash, and name, bytes and time of every file.
    fields: field of a template -> what it says for this model.
    """

    path: Path
    identity: Mapping[str, Any]
    files: frozenset[Identity]
    newest: int  # ns since the epoch at which the last of its files was changed
    fields: Mapping[str, str]


def find_sources(jobs: Path, where: str, patterns: Sequence[str]) -> dict[Path, bool]:
    """The files that the `patterns` of a job stand for -> whether the file was named itself, sorted per pattern.

    Relative to the folder of `jobs`; a folder is all `*.gguf` in it, and of a split model there is one shard, the
    first. Raises BadInput where a pattern stands for nothing.
    """
    found: dict[Path, bool] = {}
    for pattern in patterns:
        path = jobs.parent / pattern
        named = path.exists() and not path.is_dir()
        paths = [path] if named else sorted(_matching(jobs.parent, pattern, path))
        if not paths:
            shown = printable(pattern)
            what = f"{where}: no model in '{shown}'" if path.is_dir() else f"{where}: no file is called '{shown}'"
            raise BadInput(jobs, what, hint="paths are relative to the folder of this file")
        for each in dict.fromkeys(map(_first_shard, paths)):
            found[each] = found.get(each, False) or named
    return found


def _matching(folder: Path, pattern: str, path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from path.glob("*.gguf")
    elif glob.has_magic(pattern):
        for name in glob.glob(str(Path(glob.escape(str(folder))) / pattern), recursive=True):  # noqa: PTH207
            yield from Path(name).glob("*.gguf") if Path(name).is_dir() else [Path(name)]


def _first_shard(path: Path) -> Path:
    first = path.with_name(_SHARD.sub(r"-00001\2", path.name))
    return first if first.exists() else path


def examine(path: Path, *, named: bool) -> Model | str:
    """The model at `path`, or why it is none that was meant; a file that was `named` itself is always meant.

    Raises BadInput, InputOutputError for a file that cannot be opened.
    """
    beside = next((word for word in _BESIDE if word in path.name.lower()), None)
    if beside is not None and not named:
        return f"its name says {beside}"
    with open_source(path) as source:
        reason = None if named else _no_source(source)
        return _model_of(source) if reason is None else reason


def _no_source(source: Source) -> str | None:
    kind = source.metadata.get("general.type", "model")
    if kind != "model":
        return f"general.type is {printable(str(kind))[:40]}"
    if source.metadata.get("general.architecture") == "clip":
        return "it is a projector"
    return OWN if "requant.plan_sha256" in source.metadata else None


def _model_of(source: Source) -> Model:
    files = [[f.path.name, f.status.st_size, f.status.st_mtime_ns] for f in source.opened]
    return Model(
        path=source.path,
        identity={"header_sha256": source.header_sha256, "files": files},
        files=source.identities,
        newest=max(f.status.st_mtime_ns for f in source.opened),
        fields=fields_of(source.path, source.metadata, sum(math.prod(t.shape) for t in source.tensors)),
    )
