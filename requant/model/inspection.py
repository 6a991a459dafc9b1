"""Inspection: the facts and memory needs of a model, from its header alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from requant.common.notebook import html
from requant.common.serialization import dump, to_plain
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import BadInput
from requant.model.auxiliary import head_memory, tower_bytes
from requant.model.engine_settings import EngineSettings, engine_settings
from requant.model.hyperparameters import Hyperparameters, check_counts, read_hyperparameters
from requant.model.kept import projector_types
from requant.model.kinds import FileKind, describe_kind, kind_of
from requant.model.memory import device_bytes, memory_for, on_device
from requant.model.roles import is_tied, never_quantize, role_of
from requant.model.tensor_shapes import describe_misfits

SCHEMA = "requant.inspect/1"
_UNROUNDED = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors of one type, or of one role: their number, weights, bytes and types."""

    name: str
    tensors: int
    weights: int
    n_bytes: int
    types: tuple[str, ...]

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.n_bytes / max(self.weights, 1)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the file."""

    name: str
    role: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    reason: str | None  # why it is not quantized


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes in VRAM with every layer offloaded, and the engine's settings for that."""

    n_ctx: int
    n_parallel: int
    n_ubatch: int
    cache_type_k: str
    cache_type_v: str
    weights: int
    kv_cache: int
    compute: int
    reserve: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.kv_cache + self.compute + self.reserve


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts of a model from its header; `needs` is None, with a warning, where they are not known.

    kind: what the file holds, in words, with the type of a projector.
    """

    files: tuple[str, ...]
    version: int
    arch: str
    kind: str
    title: str | None  # general.name
    file_bytes: int
    weights: int
    n_bytes: int  # of all tensors
    bpw: float
    quantized: bool
    hyperparameters: dict[str, Any] | None
    types: tuple[Share, ...]
    roles: tuple[Share, ...]
    needs: Needs | None
    tensors: tuple[TensorEntry, ...] = field(repr=False)
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """Return the JSON object that --json prints."""
        return dump({"schema": SCHEMA} | to_plain(self))


def inspect(source: Source, settings: Mapping[str, Any] = MappingProxyType({}), reserve: int = 0) -> Inspection:
    """Return the facts of `source` and its memory needs.

    settings: fields of `EngineSettings`; by default the model's own context, at most 4096 tokens. reserve: bytes of
    VRAM to leave free. Raises BadInput for a file that is no model.
    """
    arch, warnings = require_model(source), list(source.warnings)
    warnings += describe_misfits(source)
    kind, hp, needs = kind_of(source.metadata, {t.name for t in source.tensors}), None, None
    try:
        if kind.has_hyperparameters:
            check_counts(source.metadata)
            hp = read_hyperparameters(source.metadata, source.tensors)
            needs = _needs(source, hp, kind, engine_settings(hp, settings), reserve)
    except BadInput as error:
        warnings.append(error.what)
    weights, n_bytes = sum(t.n_weights for t in source.tensors), sum(t.n_bytes for t in source.tensors)
    title = source.metadata.get("general.name")
    projectors = projector_types(source.metadata)
    tensors = tuple(_describe_tensor(arch, t, projectors) for t in source.tensors)
    return Inspection(
        files=tuple(path.name for path in source.files),
        version=source.version,
        arch=arch,
        kind=describe_kind(source.metadata, kind),
        title=title if isinstance(title, str) else None,
        file_bytes=sum(f.header.file_size for f in source.opened),
        weights=weights,
        n_bytes=n_bytes,
        bpw=8 * n_bytes / max(weights, 1),
        quantized=any(t.reason is None and t.type not in _UNROUNDED for t in tensors),
        hyperparameters=None if hp is None else _dimensions(hp),
        types=_shares((t.format.name, t) for t in source.tensors),
        roles=_shares((role_of(t.name), t) for t in source.tensors),
        needs=needs,
        tensors=tensors,
        warnings=tuple(warnings),
    )


def _needs(source: Source, hp: Hyperparameters, kind: FileKind, settings: EngineSettings, reserve: int) -> Needs:
    if kind.is_draft:
        found = head_memory(source, hp, kind, settings)
        weights, kv_cache, compute = found.weights, found.kv_cache, found.compute
    else:
        memory = memory_for(hp, settings, reserve=reserve)
        tied = is_tied({t.name for t in source.tensors})
        held = (t for t in source.tensors if on_device(hp, t.name, tied=tied) and t.shape)
        weights = sum(device_bytes(t.format, t.shape) for t in held)
        kv_cache, compute = memory.kv_cache, memory.compute + tower_bytes(source.tensors)
    return Needs(
        n_ctx=settings.n_ctx,
        n_parallel=settings.n_parallel,
        n_ubatch=settings.n_ubatch,
        cache_type_k=settings.cache_type_k,
        cache_type_v=settings.cache_type_v,
        weights=weights,
        kv_cache=kv_cache,
        compute=compute,
        reserve=reserve,
    )


def _dimensions(hp: Hyperparameters) -> dict[str, Any]:
    windowed = sum(hp.windows.layers) if hp.windows is not None else 0
    return {
        "layers": hp.n_layers,
        "context_length": hp.context_length,
        "embedding_length": hp.n_embd,
        "vocabulary": hp.n_vocab,
        "heads": max(hp.n_head),
        "kv_heads": max(hp.n_head_kv),
        "experts": hp.n_expert,
        "experts_used": hp.n_expert_used,
        "windowed_layers": windowed,
        "window": hp.windows.size if hp.windows is not None and windowed else 0,
    }


def _describe_tensor(arch: str, t: SourceTensor, projectors: Collection[str]) -> TensorEntry:
    reason = never_quantize(arch, t.name, t.shape, t.type_id, projectors=projectors)
    return TensorEntry(t.name, role_of(t.name), t.shape, t.format.name, t.n_bytes, reason)


def _shares(named: Iterable[tuple[str, SourceTensor]]) -> tuple[Share, ...]:
    """Return one share per name, most bytes first."""
    groups: dict[str, list[SourceTensor]] = {}
    for name, tensor in named:
        groups.setdefault(name, []).append(tensor)
    shares = (
        Share(
            name,
            len(tensors),
            sum(t.n_weights for t in tensors),
            sum(t.n_bytes for t in tensors),
            tuple(dict.fromkeys(t.format.name for t in tensors)),
        )
        for name, tensors in groups.items()
    )
    return tuple(sorted(shares, key=lambda share: -share.n_bytes))
