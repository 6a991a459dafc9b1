"""The `<architecture>.*` keys of a model as one typed record.

Source: load_hparams in llama.cpp's src/llama-model.cpp; the defaults are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from requant.container.metadata import Metadata
from requant.errors import BadInput, brief
from requant.model.caches import ATTENTION, RECURRENT, Caches, Shape, caches_of
from requant.model.windows import SlidingWindows, windows_of

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h
_MAX_COUNT = 2**31 - 1


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What the metadata says of the model's shape. Counts are per token; tuples have one item per layer.

    `n_layers` includes the `n_nextn` multi-token-prediction layers at the end; `windows` is None where the
    architecture requires a window and the file states none. `key_length_swa` and `value_length_swa` are the head
    sizes of layers with a window. `n_draft_vocab`: tokens that a draft head chooses from, 0 for other models;
    `time_step_rank`: of recurrent layers.
    """

    path: str
    arch: str
    n_layers: int
    n_nextn: int
    context_length: int
    n_embd: int
    n_vocab: int
    n_ff: tuple[int, ...]
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    key_length: int
    value_length: int
    key_length_swa: int
    value_length_swa: int
    windows: SlidingWindows | None
    n_expert: int
    n_expert_used: int
    n_ff_expert: int
    n_ff_shared: int
    n_draft_vocab: int
    time_step_rank: int
    caches: Caches

    @property
    def n_trunk(self) -> int:
        """Layers that every token passes: all but the multi-token-prediction ones."""
        return self.n_layers - self.n_nextn


@dataclass(frozen=True, slots=True)
class _Keys:
    """The metadata of one architecture."""

    metadata: Metadata
    arch: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.arch}.{key}")

    def array_length(self, key: str) -> int | None:
        return self.metadata.array_length(f"{self.arch}.{key}")

    def error(self, key: str, what: str, *, got: object = None, limit: object = None) -> BadInput:
        return BadInput(self.metadata.path, f"key '{brief(self.arch)}.{key}' {what}", got=got, limit=limit)


def read_hyperparameters(metadata: Metadata, tensors: Iterable[_Named] = ()) -> Hyperparameters:
    """The record for the model of `metadata`; `tensors` settle the vocabulary where no key does.

    Any architecture with the usual keys can be read. Raises BadInput, naming the file and the key, where a key
    that cannot be done without is missing, or one has the wrong type, length or range.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise BadInput(metadata.path, "key 'general.architecture' is missing or no string", hint="is it a model?")
    keys = _Keys(metadata, arch)
    n_layers = _count(keys, "block_count", low=1, high=MAX_LAYERS)
    n_nextn = _count(keys, "nextn_predict_layers", 0, high=n_layers - 1)
    n_embd = _count(keys, "embedding_length", low=1)
    least = 0 if arch in RECURRENT else 1
    n_head = _per_layer(keys, "attention.head_count", n_layers, 0 if least == 0 else None, low=least)
    per_head = n_embd // n_head[0] if n_head[0] else 0
    key_length = _count(keys, "attention.key_length", per_head)
    value_length = _count(keys, "attention.value_length", per_head)
    n_head_kv = _per_layer(keys, "attention.head_count_kv", n_layers, n_head, low=least)
    n_ff = _per_layer(keys, "feed_forward_length", n_layers, 0)
    n_ff_expert = max(_per_layer(keys, "expert_feed_forward_length", n_layers, 0))
    windows = _windows(keys, n_layers, n_layers - n_nextn)
    latent = all(_count(keys, f"attention.{part}_length_mla", 0) for part in ("key", "value"))
    shape = Shape(arch, n_layers, n_layers - n_nextn, n_embd, n_head, n_head_kv, n_ff, latent)
    windowed = arch.startswith("lfm2") and bool(keys.get("attention.sliding_window"))
    tensors = list(tensors)
    return Hyperparameters(
        path=metadata.path,
        arch=arch,
        n_layers=n_layers,
        n_nextn=n_nextn,
        context_length=_count(keys, "context_length", low=1),
        n_embd=n_embd,
        n_vocab=_n_vocab(keys, tensors),
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        key_length=key_length,
        value_length=value_length,
        key_length_swa=_count(keys, "attention.key_length_swa", key_length),
        value_length_swa=_count(keys, "attention.value_length_swa", value_length),
        windows=windows,
        n_expert=_count(keys, "expert_count", 0),
        n_expert_used=max(_per_layer(keys, "expert_used_count", n_layers, 0)),
        n_ff_expert=n_ff_expert,
        n_ff_shared=_n_ff_shared(keys, n_ff_expert),
        n_draft_vocab=next((t.shape[0] for t in tensors if t.name == "d2t"), 0),
        time_step_rank=_count(keys, "ssm.time_step_rank", 0),
        caches=caches_of(
            shape,
            lambda key, default: _largest(keys, key, default),
            _flags(keys, "attention.recurrent_layers", n_layers),
            windowed=windowed,
        ),
    )


def check_counts(metadata: Metadata) -> None:
    """Raise BadInput where the file states a number of layers or heads that no engine takes; it may state none."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        return
    keys = _Keys(metadata, arch)
    n_layers = _count(keys, "block_count", MAX_LAYERS, low=1, high=MAX_LAYERS)
    if arch in ATTENTION and keys.array_length("attention.head_count") in (None, n_layers):
        _per_layer(keys, "attention.head_count", n_layers, 1, low=1)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(keys: _Keys, key: str, value: Any, low: int, high: int) -> int:
    if not _is_integer(value):
        raise keys.error(key, "is no integer", got=type(value).__name__)
    if not low <= value <= high:
        raise keys.error(key, "is out of range", got=value, limit=f"{low} to {high}")
    return int(value)


def _count(keys: _Keys, key: str, default: int | None = None, *, low: int = 0, high: int = _MAX_COUNT) -> int:
    """An integer key within [low, high]; `default` where it is absent, an error without one."""
    length = keys.array_length(key)
    value = keys.get(key) if length is None else []
    if value is None and default is None:
        raise keys.error(key, "is missing")
    return _check(keys, key, value, low, high) if value is not None else int(default or 0)


def _per_layer(
    keys: _Keys, key: str, n_layers: int, default: int | Sequence[int] | None, *, low: int = 0
) -> tuple[int, ...]:
    """One integer per layer, from a scalar or an array.

    `low` bounds a scalar and the largest item of an array, which may hold zeros for layers without such a part.
    """
    length = keys.array_length(key)
    if length is None:
        if not isinstance(default, int | None) and keys.get(key) is None:
            return tuple(default)
        return (_count(keys, key, default if isinstance(default, int) else None, low=low),) * n_layers
    if length != n_layers:
        raise keys.error(key, "has the wrong number of items", got=length, limit=f"{n_layers} layers")
    items = tuple(_check(keys, key, item, 0, _MAX_COUNT) for item in keys.get(key))
    _check(keys, key, max(items), low, _MAX_COUNT)
    return items


def _n_vocab(keys: _Keys, tensors: Iterable[_Named]) -> int:
    """Tokens in the vocabulary, which is the width of the logits: the list's length, the key, or the table's rows."""
    n_tokens = keys.metadata.array_length("tokenizer.ggml.tokens")
    if n_tokens:
        return n_tokens
    rows = next((t.shape[1] for t in tensors if t.name == "token_embd.weight" and len(t.shape) > 1), None)
    return _count(keys, "vocab_size", rows, low=1)


def _n_ff_shared(keys: _Keys, n_ff_expert: int) -> int:
    """Width of all shared experts together, which run for every token."""
    width = _count(keys, "expert_shared_feed_forward_length", 0)
    return (width or n_ff_expert) * _count(keys, "expert_shared_count", 1 if width else 0)


def _windows(keys: _Keys, n_layers: int, n_trunk: int) -> SlidingWindows | None:
    key = "attention.sliding_window_pattern"
    length, pattern = keys.array_length(key), keys.get(key) if keys.array_length(key) in (None, n_layers) else None
    if length is not None and length != n_layers:
        raise keys.error(key, "has the wrong number of items", got=length, limit=f"{n_layers} layers")
    if length is None and pattern is not None:
        pattern = _check(keys, key, pattern, 0, _MAX_COUNT)
    size = _count(keys, "attention.sliding_window", -1)
    return windows_of(keys.arch, n_layers, n_trunk, None if size < 0 else size, pattern)


def _largest(keys: _Keys, key: str, default: int) -> int:
    """An integer key, or the largest item of an array."""
    if keys.array_length(key) is None:
        return _count(keys, key, default)
    return max((_check(keys, key, item, 0, _MAX_COUNT) for item in keys.get(key)), default=default)


def _flags(keys: _Keys, key: str, n_layers: int) -> tuple[bool, ...] | None:
    """One flag per layer, None without the key."""
    length = keys.array_length(key)
    if length is None:
        value = keys.get(key)
        return None if value is None else (bool(value),) * n_layers
    if length != n_layers:
        raise keys.error(key, "has the wrong number of items", got=length, limit=f"{n_layers} layers")
    return tuple(bool(item) for item in keys.get(key))


def beyond_context(metadata: Metadata, n_ctx: int) -> list[str]:
    """A line where `n_ctx` tokens are more than the model was made for; none where that is not known."""
    try:
        own = read_hyperparameters(metadata).context_length
    except BadInput:
        return []
    return [] if n_ctx <= own else [f"a context of {n_ctx} tokens is above the {own} that the model was made for"]
