"""Shards of a split model: their names, the files that belong together in one folder, and whether they agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from requant.container.metadata import Metadata
from requant.errors import BadInput, printable, quote

MAX_SHARDS = 65_535  # of a u16, as engines store the count; the largest model seen has 1,148
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def shard_name(stem: str, number: int, count: int) -> str:
    """The file name of shard `number`, from 1 on, of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def whole_name(name: str) -> str:
    """The file name of the whole model for that of a shard; any other name as it is."""
    match = _SHARD_NAME.fullmatch(name)
    return name if match is None else f"{match[1]}.gguf"


def first_name(name: str) -> str:
    """The file name of the first shard for that of any shard; any other name as it is."""
    match = _SHARD_NAME.fullmatch(name)
    return name if match is None else shard_name(match[1], 1, int(match[3]))


def n_files_of(name: str) -> int:
    """The number of files of a model, by the name of one of them."""
    match = _SHARD_NAME.fullmatch(name)
    return 1 if match is None else int(match[3])


def named_shards(path: Path) -> list[Path]:
    """The paths of all shards of which `path` is one by its name, whether they exist or not."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None or int(match[3]) > MAX_SHARDS:
        return []
    return [path.with_name(shard_name(match[1], i, int(match[3]))) for i in range(1, int(match[3]) + 1)]


def shard_paths(path: Path, metadata: Metadata) -> list[Path]:
    """Every file of the model that `path` belongs to, first shard first; just `path` where it is not split.

    Raises BadInput, listing the expected names, where the name does not fit the keys or a file is missing.
    """
    count = metadata.get_int("split.count", 0) or 0
    if count <= 1:
        return [path]
    if count > MAX_SHARDS:
        raise BadInput(path, "key 'split.count' is too large", got=count, limit=MAX_SHARDS)
    number = metadata.get_int("split.no")
    if number is None or not 0 <= number < count:
        raise BadInput(path, "key 'split.no' is out of range", got=number, limit=count - 1)
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
        hint = "give the file its original name back"
        raise BadInput(path, f"is shard {number + 1} of {count}, so its name must end in '{ending}'", hint=hint)
    paths = [path.with_name(shard_name(match[1], i, count)) for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.exists() and not p.is_symlink()]
    if missing:
        what = f"is part of a split model of which {len(missing)} of {count} files are missing: {_list_names(missing)}"
        raise BadInput(
            path, what, hint=f"expected in {printable(str(path.parent))}: {_list_names([p.name for p in paths])}"
        )
    return paths


def _list_names(names: list[str], most: int = 8) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_shard(path: Path, metadata: Metadata, given: Metadata) -> None:
    """Raise BadInput unless the keys of the sibling at `path` fit its name and the tensor count of `given`."""
    match = _SHARD_NAME.fullmatch(path.name)
    assert match is not None
    expected = {"split.no": int(match[2]) - 1, "split.count": int(match[3])}
    for key in ("split.no", "split.count"):
        if metadata.get_int(key) != expected[key]:
            raise BadInput(path, f"key '{key}' does not fit its name", got=metadata.get_int(key), limit=expected[key])
    for key in ("split.tensors.count",):
        ours, theirs = metadata.get_int(key), given.get_int(key)
        if None not in (ours, theirs) and ours != theirs:
            raise BadInput(path, f"key '{key}' differs from that of the shard given", got=ours, limit=theirs)


def check_shards(path: Path, shards: Sequence[Metadata], n_tensors: int) -> None:
    """Raise BadInput unless the shards together have the tensors that the first one counts, and are of one model.

    The first shard has all keys; another that repeats some of them must have the same values.
    """
    declared = shards[0].get_int("split.tensors.count")
    if declared is None:
        raise BadInput(path, "key 'split.tensors.count' is missing from the first shard")
    if declared != n_tensors:
        raise BadInput(path, "key 'split.tensors.count' does not fit the shards", got=n_tensors, limit=declared)
    for shard in shards[1:]:
        for key, value in shard.values.items():
            if not key.startswith("split.") and shards[0].values.get(key, value) != value:
                what = f"key {quote(key)} differs from that of the first shard; the files are of different models"
                raise BadInput(shard.path, what)
