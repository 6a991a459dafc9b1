"""What a model is made of and what it needs in VRAM, as data and as text; only the header is read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from requant import cards
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import FILE_NAME, BadInput, brief
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import device_bytes, memory_for, on_device
from requant.model.roles import is_tied, never_quantize, role_of
from requant.records import dump, plain
from requant.report.grid import GAP, WIDTH, fitting, grid, labelled
from requant.units import format_size
from requant.wishes import Wishes, engine_settings

SCHEMA = "requant.inspect/1"
_IN_TOKENS = ("context_length", "vocabulary", "window")
_UNROUNDED = ("F32", "F16", "BF16")
_USUAL = Wishes()


@dataclass(frozen=True, slots=True)
class Share:
    """Tensors of one type, or of one role: how many, their weights and bytes, the types among them."""

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
class Listed:
    """One tensor."""

    name: str
    role: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    reason: str | None  # why it would not be quantized


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes in VRAM with every layer offloaded, and how the engine is started for that."""

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
        """All of them."""
        return self.weights + self.kv_cache + self.compute + self.reserve


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that the header tells; `needs` is None, and a warning says why, where it cannot be told."""

    files: tuple[str, ...]
    version: int
    arch: str
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
    tensors: tuple[Listed, ...] = field(repr=False)
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        return cards.inspection(self)

    def to_json(self) -> str:
        """The object that --json prints."""
        return dump({"schema": SCHEMA} | plain(self))


def inspect(source: Source, wishes: Wishes = _USUAL) -> Inspection:
    """What `source` is, with its needs as `wishes` say (its own context, at most 4096 tokens, by default; no reserve).

    Raises BadInput for what is no model.
    """
    arch, warnings = require_model(source), list(source.warnings)
    hp, needs = None, None
    try:
        hp = read_hyperparameters(source.metadata, source.tensors)
        needs = _needs(source, hp, wishes)
    except BadInput as error:
        warnings.append(error.what)
    weights, n_bytes = sum(t.n_weights for t in source.tensors), sum(t.n_bytes for t in source.tensors)
    return Inspection(
        files=tuple(path.name for path in source.files),
        version=source.version,
        arch=arch,
        title=_title(source),
        file_bytes=sum(f.header.file_size for f in source.opened),
        weights=weights,
        n_bytes=n_bytes,
        bpw=8 * n_bytes / max(weights, 1),
        quantized=any(_matrix(arch, t) and t.format.name not in _UNROUNDED for t in source.tensors),
        hyperparameters=None if hp is None else _shape(hp),
        types=_shares((t.format.name, t) for t in source.tensors),
        roles=_shares((role_of(t.name), t) for t in source.tensors),
        needs=needs,
        tensors=tuple(_listed(arch, t) for t in source.tensors),
        warnings=tuple(warnings),
    )


def _needs(source: Source, hp: Hyperparameters, wishes: Wishes) -> Needs:
    settings = engine_settings(hp, wishes)
    memory = memory_for(hp, settings, reserve=wishes.reserve or 0)
    tied = is_tied({t.name for t in source.tensors})
    held = (t for t in source.tensors if on_device(hp, t.name, tied=tied) and t.shape)
    return Needs(
        n_ctx=settings.n_ctx,
        n_parallel=settings.n_parallel,
        n_ubatch=settings.n_ubatch,
        cache_type_k=settings.cache_type_k,
        cache_type_v=settings.cache_type_v,
        weights=sum(device_bytes(t.format, t.shape) for t in held),
        kv_cache=memory.kv_cache,
        compute=memory.compute,
        reserve=memory.reserve,
    )


def _title(source: Source) -> str | None:
    value = source.metadata.get("general.name")
    return value if isinstance(value, str) else None


def _shape(hp: Hyperparameters) -> dict[str, Any]:
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


def _matrix(arch: str, tensor: SourceTensor) -> bool:
    return never_quantize(arch, tensor.name, tensor.shape, tensor.type_id) is None


def _listed(arch: str, t: SourceTensor) -> Listed:
    reason = never_quantize(arch, t.name, t.shape, t.type_id)
    return Listed(t.name, role_of(t.name), t.shape, t.format.name, t.n_bytes, reason)


def _shares(named: Iterable[tuple[str, SourceTensor]]) -> tuple[Share, ...]:
    """One per name, most bytes first."""
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


def as_text(found: Inspection, *, tensors: bool = False) -> str:
    """The inspection for reading; with `tensors` a line for each. Names from the file are escaped."""
    return "\n\n".join((facts(found), *tables(found, tensors=tensors)))


def tables(found: Inspection, width: int = WIDTH, *, tensors: bool = False) -> list[str]:
    """All that is said beside the facts; what does not fit `width` is left out of the roles' table."""
    parts = [_table("type", found.types), _table("role", found.roles, width), _memory(found, width)]
    return [part for part in (*parts, _tensors(found) if tensors else "") if part]


def facts(found: Inspection, width: int = WIDTH) -> str:
    """File, model, weights and shape."""
    files = brief(found.files[0], FILE_NAME) + (f" and {len(found.files) - 1} more" if len(found.files) > 1 else "")
    title = "" if found.title is None else f"{brief(found.title)}, "
    state = "already quantized" if found.quantized else "not quantized"
    lines = [
        ("file", f"{files}, {format_size(found.file_bytes)}, GGUF version {found.version}"),
        ("model", f"{title}architecture {brief(found.arch)}, {state}"),
        ("weights", f"{found.weights:,} in {len(found.tensors)} tensors, {found.bpw:.3f} bits per weight"),
    ]
    if found.hyperparameters is not None:
        shown = (
            f"{key.replace('_', ' ')} {value}{' tokens' * (key in _IN_TOKENS)}"
            for key, value in found.hyperparameters.items()
            if value
        )
        lines.append(("shape", ", ".join(shown)))
    return "\n".join(labelled(lines, width, max(len(label) for label, _ in lines) + len(GAP)))


def _table(head: str, shares: tuple[Share, ...], width: int = WIDTH) -> str:
    rows = [[head, "tensors", "weights", "size", "bits/weight", "" if head == "type" else "types"]]
    for s in shares:
        types = "" if head == "type" else ", ".join(s.types)
        rows.append([brief(s.name), str(s.tensors), f"{s.weights:,}", format_size(s.n_bytes), f"{s.bpw:.2f}", types])
    return "\n".join(fitting(rows, width, right=(1, 2, 3, 4), spare=(5,)))


def _memory(found: Inspection, width: int) -> str:
    if found.needs is None:
        return ""
    n = found.needs
    parts = [("weights", n.weights), ("KV cache", n.kv_cache), ("compute buffer", n.compute)]
    parts += [("reserve", n.reserve)] if n.reserve else []
    parts += [("together", n.total)]
    caches = "/".join(dict.fromkeys((n.cache_type_k.lower(), n.cache_type_v.lower())))
    over = f" over {n.n_parallel} sequences" if n.n_parallel > 1 else ""
    kept = "" if n.reserve else ", nothing in reserve"
    context = f"a context of {n.n_ctx} tokens{over} in {caches}"
    title = f"in VRAM, all layers, {context}, batches of {n.n_ubatch} tokens{kept}"
    own = (found.hyperparameters or {}).get("context_length", n.n_ctx)
    beyond = [f"the model was made for a context of at most {own} tokens"] if n.n_ctx > own else []
    table = grid([[name, format_size(size)] for name, size in parts], right=(1,))
    return "\n".join([*textwrap.wrap(title, width), *table, *beyond])


def _tensors(found: Inspection) -> str:
    rows = [["tensor", "type", "shape", "size", "stays as it is because"]]
    for t in found.tensors:
        shape = " x ".join(map(str, t.shape))
        rows.append([brief(t.name), t.type, shape, format_size(t.n_bytes), t.reason or ""])
    return "\n".join(grid(rows, right=(3,)))
