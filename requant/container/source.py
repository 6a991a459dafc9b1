"""Source: a GGUF file, or all the shards of one, opened for reading rows and never for writing."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from requant.common.files import open_regular, read_into
from requant.common.inputs import add_input, add_inputs
from requant.common.open_files import OpenFile
from requant.container.header import Header, combine_sha256, read_header
from requant.container.shards import check_shard, check_shards, named_shards, shard_paths
from requant.errors import BadInput, InputOutputError, SourceChanged, printable, quote

if TYPE_CHECKING:
    import numpy as np

    from requant.container.infos import TensorInfo
    from requant.container.metadata import Metadata
    from requant.formats.base import BlockFormat

_WARNED = 20  # warnings to show of a file; it may have a million unusual tensors
_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_REMOVED = "was removed while it was being read"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source: its info in the header, and the index of the file that holds it."""

    info: TensorInfo
    file: int

    @property
    def name(self) -> str:
        """Its name, as the file spells it."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions in ggml's order, the row first."""
        return self.info.shape

    @property
    def type_id(self) -> int:
        """Its ggml type's id."""
        return self.info.type_id

    @property
    def format(self) -> BlockFormat:
        """Its ggml type."""
        return self.info.format

    @property
    def n_rows(self) -> int:
        """All dimensions but the first multiplied; 0 for a tensor without elements."""
        return self.info.n_rows

    @property
    def n_per_row(self) -> int:
        """Weights of a row."""
        return self.info.n_per_row

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return self.info.n_weights

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in the source."""
        return self.info.n_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the source."""
        return self.info.row_bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An open file: its path, header, and its `stat` result when it was opened."""

    path: Path
    file: OpenFile
    header: Header
    status: os.stat_result

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises SourceChanged where the file is shorter now or has become another one, InputOutputError.
        """
        with self.file.use() as descriptor:
            read_into(self.path, descriptor, target, offset)


@dataclass(slots=True)
class Source:
    """An open model. Use as a context manager: leaving it closes the files.

    path: the file, or its first shard. metadata: of that file, split.* keys included. tensors: in file order.
    header_sha256: identifies all headers. warnings: lines for the user. preserved: tensor -> reason, of the tensors
    that are copied although they are not finite (`preserve_nonfinite`).
    """

    path: Path
    metadata: Metadata
    tensors: tuple[SourceTensor, ...]
    header_sha256: str
    warnings: tuple[str, ...]
    opened: tuple[SourceFile, ...]
    _by_name: dict[str, SourceTensor] = field(repr=False)
    _closed: bool = False
    preserved: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file, in the order of the shards."""
        return tuple(f.path for f in self.opened)

    @property
    def version(self) -> int:
        """The GGUF version."""
        return self.opened[0].header.version

    @property
    def trailing_bytes(self) -> int:
        """Bytes that belong to no tensor, all files together."""
        return sum(f.header.trailing_bytes for f in self.opened)

    def add_to_inputs(self) -> None:
        """Add every file to the inputs of the command or call, which may have begun after they were opened."""
        for file in self.opened:
            add_input(file.path, file.status)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def tensor(self, name: str) -> SourceTensor:
        """The tensor called `name`. Raises BadInput where there is none."""
        if name not in self._by_name:
            raise BadInput(self.path, f"has no tensor {quote(name)}")
        return self._by_name[name]

    def read_rows(self, tensor: SourceTensor, first_row: int = 0, n_rows: int | None = None) -> np.ndarray:
        """Read rows from `first_row` on (by default all) as uint8 (n_rows, row_bytes); safe from any thread.

        Raises SourceChanged where the file has become shorter, InputOutputError where the system fails to read.
        """
        import numpy as np

        n = tensor.n_rows - first_row if n_rows is None else n_rows
        assert 0 <= first_row <= first_row + n <= tensor.n_rows, (tensor.name, first_row, n_rows)
        assert not self._closed
        # a row of a tensor without elements may have any number of bytes
        rows = np.empty((n, tensor.row_bytes if tensor.n_rows else 0), np.uint8)
        if rows.size:
            file = self.opened[tensor.file]
            offset = file.header.data_start + tensor.info.offset + first_row * tensor.row_bytes
            file.read_into(rows.reshape(-1).data, offset)
        return rows

    def check_unchanged(self) -> None:
        """Raise SourceChanged, with the old and new value, if any file has changed since it was opened."""
        for file in self.opened:
            try:
                now = file.path.stat()
            except FileNotFoundError as error:
                raise SourceChanged(file.path, _REMOVED) from error
            except OSError as error:
                raise InputOutputError(file.path, f"cannot be checked again: {error.strerror}") from error
            _check_same(file.path, file.status, now)

    def check_headers(self) -> None:
        """Raise SourceChanged if a header does not read as it did when its file was opened."""
        for file in self.opened:
            header = bytearray(file.header.data_start)
            file.read_into(memoryview(header), 0)
            if hashlib.sha256(header).hexdigest() != file.header.sha256:
                what = "its header reads otherwise than when it was opened"
                hint = "a read failed unnoticed, or the file was changed: check disk and memory, then run it again"
                raise SourceChanged(file.path, what, hint=hint)

    @property
    def is_closed(self) -> bool:
        """Return whether the files are closed."""
        return self._closed

    def close(self) -> None:
        """Close the files; may be called more than once."""
        if not self._closed:
            self._closed = True
            _close(self.opened)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: Path) -> Source:
    """Open the source at `path`, which may be any shard of a split model: its siblings are opened with it.

    Raises BadInput for a path, header or set of shards that is not valid, InputOutputError where the system fails.
    """
    opened: list[SourceFile] = []
    try:
        given = _open(Path(path))
        opened.append(given)
        for sibling in shard_paths(given.path, given.header.metadata):
            if sibling != given.path:
                opened.append(_open(sibling))
                check_shard(sibling, opened[-1].header.metadata, given.header.metadata)
        opened.sort(key=lambda f: f.header.metadata.get_int("split.no", 0) or 0)
        return _assemble(tuple(opened))
    except BaseException:
        _close(opened)
        raise


def add_model_inputs(*given: object) -> None:
    """Do the same as `add_inputs`, for the other shards of split models too."""
    paths = [path for path in given if isinstance(path, Path)]
    add_inputs(*paths, *(shard for path in paths for shard in named_shards(path)))


def open_files(paths: Sequence[Path]) -> Source:
    """Open the source whose files, in their order, are at `paths`, whatever their names. Raises as `open_source`."""
    opened: list[SourceFile] = []
    try:
        for path in paths:
            opened.append(_open(path))
        return _assemble(tuple(opened))
    except BaseException:
        _close(opened)
        raise


def _open(path: Path) -> SourceFile:
    status: os.stat_result

    def reopen() -> int:
        try:
            descriptor = open_regular(path)
        except BadInput as error:
            raise error if isinstance(error, InputOutputError) else SourceChanged(path, _REMOVED) from error
        try:
            _check_same(path, status, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    file = OpenFile(lambda: open_regular(path), reopen)
    try:
        with file.use() as descriptor:
            status = os.fstat(descriptor)
            return SourceFile(path, file, read_header(path, descriptor), status)
    except BaseException:
        file.close()
        raise


def _check_same(path: Path, before: os.stat_result, now: os.stat_result) -> None:
    """Raise SourceChanged, with the old and new value, where a file is not the one that was opened, or was written."""
    for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns"):
        was, has = getattr(before, name), getattr(now, name)
        if was != has:
            raise SourceChanged(path, f"changed while it was being read: {name[3:]} was {was}, now {has}")


def _close(files: Iterable[SourceFile]) -> None:
    for file in files:
        file.file.close()


def _assemble(opened: tuple[SourceFile, ...]) -> Source:
    by_name: dict[str, SourceTensor] = {}
    for i, file in enumerate(opened):
        for info in file.header.tensors:
            if info.name in by_name:
                other = opened[by_name[info.name].file].path.name
                what = f"tensor {quote(info.name)} is also in {quote(other)}"
                raise BadInput(file.path, what)
            by_name[info.name] = SourceTensor(info, i)
    first = opened[0]
    if len(opened) > 1:
        check_shards(first.path, [f.header.metadata for f in opened], len(by_name))
    digests = [f.header.sha256 for f in opened]
    digest = combine_sha256(digests)
    metadata = first.header.metadata
    return Source(
        first.path, metadata, tuple(by_name.values()), digest, tuple(_collect_warnings(opened)), opened, by_name
    )


def _collect_warnings(opened: tuple[SourceFile, ...]) -> list[str]:
    lines: list[str] = []
    for file in opened:
        odd = file.header.warnings
        lines += odd[:_WARNED]
        if len(odd) > _WARNED:
            lines.append(f"{printable(file.path.name)}: {len(odd) - _WARNED} more warnings like these")
        if file.header.trailing_bytes:
            lines.append(
                f"{printable(file.path.name)} ends in {file.header.trailing_bytes} bytes of no tensor; dropped"
            )
    metadata = opened[0].header.metadata
    for key, known in (("general.quantization_version", range(_QUANTIZATION_VERSION + 1)), ("general.file_type", None)):
        value = metadata.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or (known and value not in known)
        ):
            lines.append(f"key '{key}' has an unusual value ({printable(f'{value!r:.40}')}); it is not relied on")
    return lines


def other_than_model(source: Source) -> tuple[str, str] | None:
    """Return what a file holds that is no model, in words, and what to do with it; None for a model.

    It is told by `general.type`, by the architecture of a control vector, or by the names of its tensors.
    """
    kind, names = source.metadata.get("general.type"), [t.name for t in source.tensors]
    if kind == "imatrix":
        return "an importance matrix", "pass it with --imatrix"
    if kind == "adapter" or any(name.endswith(".lora_a") for name in names):
        return "a LoRA adapter", "merge it into its model first, or pass it to the engine with --lora"
    if source.metadata.get("general.architecture") == "controlvector" or (
        names and all(name.startswith("direction.") for name in names)
    ):
        return "a control vector", "it has no matrices; pass it to the engine with --control-vector"
    if not names and source.metadata.array_length("tokenizer.ggml.tokens"):
        return "a vocabulary without weights", "pass the model itself"
    return None


def require_model(source: Source) -> str:
    """Return the architecture's name. Raises BadInput for an adapter, an imatrix and anything else that is no model."""
    if (other := other_than_model(source)) is not None:
        words, hint = other
        kind = source.metadata.get_str("general.type")
        raise BadInput(source.path, f"is not a model but {words}", got=kind and f"general.type '{kind}'", hint=hint)
    architecture = source.metadata.get_str("general.architecture")
    if architecture is None:
        raise BadInput(source.path, "is not a model: key 'general.architecture' is missing")
    if len(architecture) > 64 or not _ARCHITECTURE.fullmatch(architecture):
        shown = f"'{printable(architecture[:64])}'"
        raise BadInput(source.path, "key 'general.architecture' is not a usable name", got=shown)
    if not source.tensors:
        raise BadInput(source.path, "has no tensors")
    return architecture
