"""Hyperparameters: the `<architecture>.*` keys of a model as one typed record.

Source: load_hparams in llama.cpp's src/llama-model.cpp; the defaults are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.errors import BadInput
from requant.model.cache_kinds import ATTENTION, RECURRENT, Caches, caches_of
from requant.model.keys import ArchitectureKeys
from requant.model.kinds import check_is_language_model
from requant.model.windows import SlidingWindows, windows_of

if TYPE_CHECKING:
    from requant.container.metadata import Metadata
    from requant.container.source import SourceTensor

_SECOND_EMBEDDING = frozenset(["gemma3n", "gemma4", "gemma4-assistant", "qwen4exp"])
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in llama-hparams.h


@dataclass(frozen=True, slots=True)
class Latent:
    """The sizes of latent attention: of the latent, of a key and a value per head, and a key's rotated dimensions.

    query_rank: of the latent of queries, 0 where they have none.
    """

    rank: int
    key_length: int
    value_length: int
    n_rotated: int
    query_rank: int


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The sizes of a recurrent mixer: of its state, groups of keys, heads, the inner stream, and a convolution."""

    n_state: int
    n_groups: int
    n_heads: int
    n_inner: int
    n_taps: int


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The dimensions of a model from its metadata. Counts are per token; tuples have one item per layer.

    `n_layers` includes the `n_nextn` multi-token-prediction layers at the end; `windows` is None where the
    architecture requires a window and the file states none. `key_length_swa` and `value_length_swa` are the head
    sizes of layers with a window. `n_draft_vocab`: tokens that a draft head chooses from, 0 for other models;
    `n_rotated`: dimensions of a key that turn with its position; `n_side`: width of a second embedding in each layer.
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
    n_rotated: int
    n_side: int
    latent: Latent | None
    recurrence: Recurrence
    caches: Caches

    @property
    def n_trunk(self) -> int:
        """Layers that every token passes: all but the multi-token-prediction ones."""
        return self.n_layers - self.n_nextn


def read_hyperparameters(metadata: Metadata, tensors: Iterable[SourceTensor] = ()) -> Hyperparameters:
    """Read the record from `metadata`, and the size of the vocabulary from `tensors` where no key has it.

    Any architecture with the usual keys can be read. Raises BadInput, naming the file and the key, where a required
    key is missing, or a key has the wrong type, length or range.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise BadInput(metadata.path, "key 'general.architecture' is missing or no string", hint="is it a model?")
    check_is_language_model(metadata)
    keys = ArchitectureKeys(metadata, arch)
    n_layers = keys.count("block_count", low=1, high=MAX_LAYERS)
    # a gemma4-assistant counts its own layers there, and has no trunk
    n_nextn = 0 if arch == "gemma4-assistant" else keys.count("nextn_predict_layers", 0, high=n_layers - 1)
    n_embd = keys.count("embedding_length", low=1)
    least = 0 if arch in RECURRENT else 1
    n_head = keys.per_layer("attention.head_count", n_layers, 0 if least == 0 else None, low=least)
    per_head = n_embd // n_head[0] if n_head[0] else 0
    key_length = keys.count("attention.key_length", per_head)
    value_length = keys.count("attention.value_length", per_head)
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head, low=least)
    n_ff = keys.per_layer("feed_forward_length", n_layers, 0)
    n_ff_expert = max(keys.per_layer("expert_feed_forward_length", n_layers, 0))
    n_trunk = n_layers - n_nextn
    windows = _windows(keys, n_layers, n_trunk)
    latent = all(keys.count(f"attention.{part}_length_mla", 0) for part in ("key", "value"))
    tensors = list(tensors)
    return Hyperparameters(
        path=metadata.path,
        arch=arch,
        n_layers=n_layers,
        n_nextn=n_nextn,
        context_length=keys.count("context_length", low=1),
        n_embd=n_embd,
        n_vocab=_n_vocab(keys, tensors),
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        key_length=key_length,
        value_length=value_length,
        key_length_swa=keys.count("attention.key_length_swa", key_length),
        value_length_swa=keys.count("attention.value_length_swa", value_length),
        windows=windows,
        n_expert=keys.count("expert_count", 0),
        n_expert_used=max(keys.per_layer("expert_used_count", n_layers, 0)),
        n_ff_expert=n_ff_expert,
        n_ff_shared=_n_ff_shared(keys, n_ff_expert),
        n_draft_vocab=next((t.shape[0] for t in tensors if t.name == "d2t"), 0),
        n_rotated=keys.count("rope.dimension_count", key_length),
        n_side=keys.count("embedding_length_per_layer_input", 0) if arch in _SECOND_EMBEDDING else 0,
        latent=_latent(keys),
        recurrence=_recurrence(keys),
        caches=caches_of(
            keys, n_layers, n_trunk, n_embd=n_embd, n_head=n_head, n_head_kv=n_head_kv, n_ff=n_ff, latent=latent
        ),
    )


def _latent(keys: ArchitectureKeys) -> Latent | None:
    rank = keys.count("attention.kv_lora_rank", 0)
    if not rank:
        return None
    key = keys.count("attention.key_length_mla", 0) or keys.count("attention.key_length", 0)
    value = keys.count("attention.value_length_mla", 0) or keys.count("attention.value_length", 0)
    return Latent(rank, key, value, keys.count("rope.dimension_count", 0), keys.count("attention.q_lora_rank", 0))


def _recurrence(keys: ArchitectureKeys) -> Recurrence:
    return Recurrence(
        n_state=keys.largest("kda.head_dim", 0) or keys.largest("ssm.state_size", 0),
        n_groups=keys.largest("ssm.group_count", 0),
        n_heads=keys.largest("ssm.time_step_rank", 0),
        n_inner=keys.largest("ssm.inner_size", 0),
        n_taps=keys.largest("ssm.conv_kernel", 0) or keys.largest("shortconv.l_cache", 0),
    )


def check_counts(metadata: Metadata) -> None:
    """Raise BadInput for a number of layers, heads or experts that no engine accepts; the keys may be missing."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        return
    keys = ArchitectureKeys(metadata, arch)
    n_layers = keys.count("block_count", MAX_LAYERS, low=1, high=MAX_LAYERS)
    if arch in ATTENTION and keys.array_length("attention.head_count") in (None, n_layers):
        _check_key_heads(keys, keys.per_layer("attention.head_count", n_layers, 1, low=1))
        n_expert, used = keys.count("expert_count", 0), keys.largest("expert_used_count", 1)
        if n_expert and not 1 <= used <= n_expert:
            raise keys.error("expert_used_count", "is out of range", got=used, limit=f"1 to {n_expert} experts")


def _check_key_heads(keys: ArchitectureKeys, n_head: Sequence[int]) -> None:
    """Raise BadInput where the heads of a layer are no multiple of its KV heads, which several of them share."""
    key = "attention.head_count_kv"
    if keys.array_length(key) not in (None, len(n_head)):
        return
    for heads, shared in zip(n_head, keys.per_layer(key, len(n_head), n_head), strict=True):
        if shared and heads % shared:
            what = f"is no divisor of the heads: {heads} heads to {shared} KV heads; the engine refuses such a model"
            raise keys.error(key, what)


def _n_vocab(keys: ArchitectureKeys, tensors: Iterable[SourceTensor]) -> int:
    """Return the tokens in the vocabulary: the length of the list, the key, or the rows of the embedding."""
    n_tokens = keys.metadata.array_length("tokenizer.ggml.tokens")
    if n_tokens:
        return n_tokens
    rows = next((t.shape[1] for t in tensors if t.name == "token_embd.weight" and len(t.shape) > 1), None)
    return keys.count("vocab_size", rows, low=1)


def _n_ff_shared(keys: ArchitectureKeys, n_ff_expert: int) -> int:
    """Return the width of all shared experts together, which run for every token."""
    width = keys.count("expert_shared_feed_forward_length", 0)
    return (width or n_ff_expert) * keys.count("expert_shared_count", 1 if width else 0)


def _windows(keys: ArchitectureKeys, n_layers: int, n_trunk: int) -> SlidingWindows | None:
    key = "attention.sliding_window_pattern"
    pattern: int | tuple[bool, ...] | None = None
    if keys.is_per_layer(key, n_layers):
        pattern = keys.flags(key, n_layers)
    elif keys.get(key) is not None:
        pattern = keys.count(key)
    size = keys.count("attention.sliding_window", -1)
    return windows_of(keys.arch, n_layers, n_trunk, None if size < 0 else size, pattern)


def context_warnings(metadata: Metadata, n_ctx: int) -> list[str]:
    """Return a warning where `n_ctx` exceeds the context that the model was made for, if that is known."""
    try:
        own = read_hyperparameters(metadata).context_length
    except BadInput:
        return []
    return [] if n_ctx <= own else [f"a context of {n_ctx} tokens is above the {own} that the model was made for"]
