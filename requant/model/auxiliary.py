"""Auxiliary models in the same VRAM: a draft model or head, a vision projector, multi-token prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.container.source import Source, open_source
from requant.errors import BadInput
from requant.model.engine_settings import EngineSettings
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import compute_bytes, device_bytes, kv_cache_bytes, layer_caches, on_device
from requant.model.roles import is_tied

PROJECTOR_SHARE = 1.3  # VRAM over file size, measured with image encoders (884 -> 1158 MiB)
_DRAFT_CACHES = {"cache_type_k": "F16", "cache_type_v": "F16"}  # llama.cpp's defaults for a draft


def draft_bytes(path: Path, target: Source, settings: EngineSettings) -> dict[str, int]:
    """Return the bytes in VRAM of the draft in the file at `path`, all of it on the GPU, with the target's context.

    An EAGLE-3 head takes the embedding and the output from the target where it has none. Raises BadInput for a file
    that cannot draft for `target`: another vocabulary, or a head for another hidden size.
    """
    hp = read_hyperparameters(target.metadata, target.tensors)
    with open_source(path) as draft:
        own = read_hyperparameters(draft.metadata, draft.tensors)
        _check_drafts_for(draft, own, target, hp)
        tied = is_tied({t.name for t in draft.tensors})
        held = (t for t in draft.tensors if t.shape and on_device(own, t.name, tied=tied))
        weights = sum(device_bytes(t.format, t.shape) for t in held)
    started = replace(settings, **_DRAFT_CACHES)  # type: ignore[arg-type]
    return {
        "draft weights": weights,
        "draft KV cache": kv_cache_bytes(own, started, padded=True),
        "draft compute": compute_bytes(own, started),
    }


def _check_drafts_for(draft: Source, own: Hyperparameters, target: Source, hp: Hyperparameters) -> None:
    hint = "a draft must share the model's vocabulary"
    if own.n_vocab != hp.n_vocab:
        raise BadInput(draft.path, "drafts tokens of another vocabulary", got=own.n_vocab, limit=hp.n_vocab, hint=hint)
    ours, theirs = (metadata.get_list("tokenizer.ggml.tokens", []) for metadata in (target.metadata, draft.metadata))
    if ours and theirs and ours != theirs:
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise BadInput(draft.path, f"drafts tokens of another vocabulary: token {first} is another one", hint=hint)
    if own.arch == "eagle3":
        hidden = draft.metadata.get("eagle3.target_hidden_size")
        layers = draft.metadata.get_list("eagle3.target_layers", []) or []
        if hidden != hp.n_embd:
            raise BadInput(draft.path, "is a head for a model of another width", got=hidden, limit=hp.n_embd)
        if len(layers) != 3 or not all(isinstance(n, int) and 0 <= n < hp.n_trunk for n in layers):
            what = "key 'eagle3.target_layers' must name three layers of the model"
            raise BadInput(draft.path, what, got=layers, limit=f"below {hp.n_trunk}")


def projector_bytes(path: Path) -> dict[str, int]:
    """Return the bytes in VRAM of the projector in the file at `path`; raise BadInput for another kind of file."""
    with open_source(path) as source:
        if source.metadata.get("general.architecture") != "clip":
            raise BadInput(path, "is no projector", got=source.metadata.get("general.architecture"), expected="clip")
        return {"mmproj": int(PROJECTOR_SHARE * sum(f.header.file_size for f in source.opened))}


def prediction_bytes(hp: Hyperparameters, settings: EngineSettings) -> dict[str, int]:
    """Return the bytes in VRAM of multi-token prediction without its weights: its own context, a cache per layer."""
    per_layer = max(layer_caches(hp, settings, padded=True))
    return {"MTP KV cache": hp.n_nextn * per_layer, "MTP compute": compute_bytes(hp, settings)}
