"""Auxiliary models in the same VRAM: a draft model or head, a projector or tower, multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from requant.container.source import Source, SourceTensor, open_source
from requant.errors import BadInput
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.kept import is_of_tower
from requant.model.kinds import LANGUAGE_MODEL, PROJECTOR, FileKind, kind_of
from requant.model.memory import compute_bytes, device_bytes, kv_cache_bytes, layer_caches, on_device
from requant.model.roles import is_lookup, is_tied

PROJECTOR_SHARE = 1.3  # VRAM over file size, measured with image encoders (884 -> 1158 MiB)
_DRAFT_CACHES = {"cache_type_k": "F16", "cache_type_v": "F16"}  # llama.cpp's defaults for a draft
ORDINARY_DRAFT = "draft-simple"  # the engine's type of a draft that is a model of its own
_N_EAGLE3_LAYERS = 3


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """Bytes in VRAM of a draft or head, all of it on the GPU."""

    weights: int
    kv_cache: int
    compute: int


def draft_bytes(path: Path, target: Source, settings: EngineSettings) -> dict[str, int]:
    """Return the bytes in VRAM of the draft in the file at `path`, all of it on the GPU, with the target's context.

    A head takes the embedding and the output from the target where it has none. Raises BadInput for a file that cannot
    draft for `target`: another vocabulary, a head for another hidden size, or no draft at all.
    """
    hp = read_hyperparameters(target.metadata, target.tensors)
    with open_source(path) as draft:
        kind = kind_of(draft.metadata, {t.name for t in draft.tensors})
        if kind is not LANGUAGE_MODEL and not kind.is_draft:
            raise BadInput(path, f"is {kind.words}, no draft", hint="--draft takes a small model or a draft head")
        own = read_hyperparameters(draft.metadata, draft.tensors)
        _check_drafts_for(draft, own, target, hp)
        started = replace(settings, **_DRAFT_CACHES)  # type: ignore[arg-type]
        memory = head_memory(draft, own, kind, started)
    return {"draft weights": memory.weights, "draft KV cache": memory.kv_cache, "draft compute": memory.compute}


def draft_type(path: Path) -> str:
    """Return the engine's type of the draft in the file at `path`: `draft-mtp`, `draft-eagle3`, `draft-simple`, ..."""
    with open_source(path) as draft:
        kind = kind_of(draft.metadata, {t.name for t in draft.tensors})
    return ORDINARY_DRAFT if kind is LANGUAGE_MODEL else kind.name


def head_memory(draft: Source, own: Hyperparameters, kind: FileKind, settings: EngineSettings) -> HeadMemory:
    """Return the memory of a draft model or head.

    A file of layers of multi-token prediction alone has all of them loaded, and each keeps a cache of its own; a head
    of Gemma 4 attends to the target's cache. A DFlash head also holds the hidden states of its target's layers.
    """
    tied = is_tied({t.name for t in draft.tensors})
    if kind.name == "draft-mtp" and own.n_nextn:
        held = (t for t in draft.tensors if t.shape and not is_lookup(t.name, tied=tied))
        parts = prediction_bytes(own, settings)
        cache, compute = parts["MTP KV cache"], parts["MTP compute"]
    else:
        held = (t for t in draft.tensors if t.shape and on_device(own, t.name, tied=tied))
        shared = own.arch == "gemma4-assistant"
        cache = 0 if shared else kv_cache_bytes(own, settings, padded=True)
        compute = compute_bytes(own, settings)
        if own.arch == "dflash":
            compute += 4 * settings.tokens * own.n_embd * len(_target_layers(draft))
    return HeadMemory(sum(device_bytes(t.format, t.shape) for t in held), cache, compute)


def _check_drafts_for(draft: Source, own: Hyperparameters, target: Source, hp: Hyperparameters) -> None:
    hint = "a draft must share the model's vocabulary"
    if own.n_vocab != hp.n_vocab:
        raise BadInput(draft.path, "drafts tokens of another vocabulary", got=own.n_vocab, limit=hp.n_vocab, hint=hint)
    ours, theirs = (metadata.get_list("tokenizer.ggml.tokens", []) for metadata in (target.metadata, draft.metadata))
    if ours and theirs and ours != theirs:
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise BadInput(draft.path, f"drafts tokens of another vocabulary: token {first} is another one", hint=hint)
    kind = kind_of(draft.metadata, {t.name for t in draft.tensors})
    if kind is LANGUAGE_MODEL:
        return
    key = {"eagle3": "eagle3.target_hidden_size", "gemma4-assistant": "gemma4-assistant.embedding_length_out"}
    hidden = draft.metadata.get_int(key[own.arch]) if own.arch in key else own.n_embd
    if hidden is None:
        raise BadInput(draft.path, f"key '{key[own.arch]}' is missing, the width of the model that it drafts for")
    if hidden != hp.n_embd:
        raise BadInput(draft.path, "is a head for a model of another width", got=hidden, limit=hp.n_embd)
    if own.arch in ("eagle3", "dflash"):
        layers = _target_layers(draft)
        n = _N_EAGLE3_LAYERS if own.arch == "eagle3" else len(layers)
        if not layers or len(layers) != n or not all(isinstance(i, int) and 0 <= i < hp.n_trunk for i in layers):
            which = "three layers" if own.arch == "eagle3" else "layers"
            what = f"key '{own.arch}.target_layers' must name {which} of the model"
            raise BadInput(draft.path, what, got=layers, limit=f"below {hp.n_trunk}")


def _target_layers(draft: Source) -> list[object]:
    return draft.metadata.get_list(f"{draft.metadata.get('general.architecture')}.target_layers", []) or []


def projector_bytes(path: Path) -> dict[str, int]:
    """Return the bytes in VRAM of the projector in the file at `path`; raise BadInput for another kind of file."""
    with open_source(path) as source:
        if kind_of(source.metadata, ()) is not PROJECTOR:
            raise BadInput(path, "is no projector", got=source.metadata.get("general.architecture"), expected="clip")
        return {"mmproj": int(PROJECTOR_SHARE * sum(f.header.file_size for f in source.opened))}


def tower_bytes(tensors: Iterable[SourceTensor]) -> int:
    """Return the bytes in VRAM that a tower in the model's own file needs beside its weights, as a projector does."""
    return int((PROJECTOR_SHARE - 1) * sum(t.n_bytes for t in tensors if is_of_tower(t.name)))


def prediction_bytes(hp: Hyperparameters, settings: EngineSettings) -> dict[str, int]:
    """Return the bytes in VRAM of multi-token prediction without its weights: its own context, a cache per layer."""
    per_layer = max(layer_caches(hp, settings, padded=True))
    return {"MTP KV cache": hp.n_nextn * per_layer, "MTP compute": compute_bytes(hp, settings)}
