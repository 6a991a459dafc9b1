"""What lives in VRAM beside the weights: KV cache, compute buffer and reserve; and so, what is left for weights.

The figures are those of llama.cpp with every layer on one CUDA device. Cache: exact, from llama-kv-cache.cpp,
llama-kv-cache-iswa.cpp and llama-memory-recurrent.cpp. Compute buffer: the largest moment of
the graph, see `compute_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from requant.errors import BadInput, UsageError, brief, suggest
from requant.formats import format_of
from requant.formats.base import DEVICE_ALIGNMENT, BlockFormat
from requant.model.hyperparameters import Hyperparameters
from requant.model.roles import is_lookup, layer_of

MIB = 2**20
CELL_PADDING = 256  # cells; llama_context and the window cache round up to it
DEFAULT_CONTEXT = 4096
DEFAULT_UBATCH = 512
DEFAULT_RESERVE = 1024 * MIB  # bytes; llama.cpp's --fit-target
RESERVE_SHARE = 10  # the default reserve is at most one part in ten of the budget
N_BATCH = 2048  # llama.cpp's default, which bounds n_ubatch
ROW_PADDING = 512  # weights; MATRIX_ROW_PADDING of ggml-cuda
COMPUTE_MARGIN = 64  # one part added to as many, for shapes that were not measured

OWN_CONTEXT = 0  # --ctx 0, as llama.cpp has it: all that the model was made for
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the engine will be started; the names are llama.cpp's.

    `n_ctx`: tokens over all `n_parallel` sequences; `n_ubatch`: tokens computed at once; cache types are names of
    `CACHE_TYPES`; `unified`: one cache for all sequences; `n_outputs`: rows of logits computed at once, None for
    n_ubatch as llama-cli and llama-perplexity reserve (llama-server needs one per sequence). `assume`: an
    architecture that is not known gets an upper bound instead of an error.
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = DEFAULT_UBATCH
    cache_type_k: str = "F16"
    cache_type_v: str = "F16"
    unified: bool = False
    flash_attn: bool = True
    swa_full: bool = False
    n_outputs: int | None = None
    assume: bool = False

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_parallel", "n_ubatch"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UsageError(f"{name} must be from 1 to 2147483647 (got {getattr(self, name)})")
        if self.n_outputs is not None and self.n_outputs < 1:
            raise UsageError(f"n_outputs must be at least 1 (got {self.n_outputs})")
        for name in (self.cache_type_k, self.cache_type_v):
            if name.upper() not in CACHE_TYPES:
                raise UsageError(f"'{brief(name)}' is no cache type; {suggest(name, map(str.lower, CACHE_TYPES))}")
        if not self.flash_attn and format_of(self.cache_type_v).block_weights > 1:
            raise UsageError("a quantized V cache needs flash attention")

    @property
    def tokens(self) -> int:
        """Tokens in the largest batch the graph is built for."""
        return min(self.n_ctx, N_BATCH, self.n_ubatch)

    @property
    def cells(self) -> int:
        """Cells of one stream's cache."""
        total = _pad(self.n_ctx, CELL_PADDING)
        return total if self.unified else _pad(total // self.n_parallel, CELL_PADDING)

    @property
    def streams(self) -> int:
        """Caches kept side by side."""
        return 1 if self.unified else self.n_parallel


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of VRAM that are not weights.

    `reserve` is left free on purpose. It covers what nobody can compute beforehand: the CUDA context (about
    330 MiB), the display's share, fragmentation; so no overhead is counted beside it.
    """

    settings: Settings
    kv_cache: int
    compute: int
    reserve: int

    @property
    def total(self) -> int:
        """Everything that is not weights."""
        return self.kv_cache + self.compute + self.reserve

    def weights_limit(self, vram: int) -> int:
        """Bytes of `vram` left for the weights on the device; below 0 where not even the rest fits."""
        return vram - self.total


def default_settings(hp: Hyperparameters, n_ctx: int | None = None) -> Settings:
    """The engine's defaults, with a context of `n_ctx`, or of the model's own but at most 4096 tokens."""
    return Settings(min(hp.context_length, DEFAULT_CONTEXT) if n_ctx is None else n_ctx)


def default_reserve(vram: int | None) -> int:
    """1 GiB, but never more than a tenth of the budget."""
    return DEFAULT_RESERVE if vram is None else min(DEFAULT_RESERVE, vram // RESERVE_SHARE)


def memory_for(
    hp: Hyperparameters, settings: Settings, *, vram: int | None = None, reserve: int | None = None
) -> Memory:
    """What the model needs beside its weights under `settings`; `reserve` in bytes, by default of `vram`.

    Raises BadInput for an architecture whose cache is not known here: nothing is guessed.
    """
    reserve = default_reserve(vram) if reserve is None else reserve
    return Memory(settings, kv_cache_bytes(hp, settings, padded=True), compute_bytes(hp, settings), reserve)


def shrink_batch(hp: Hyperparameters, memory: Memory, vram: int, smallest: int) -> Memory:
    """`memory` with n_ubatch halved, down to 32, until `smallest` bytes of weights fit beside it, if they ever do.

    A smaller batch costs prompt speed, not quality; the plan must then say `-ub`. Where nothing helps, the
    original comes back.
    """
    settings, tried = memory.settings, memory
    while tried.weights_limit(vram) < smallest and settings.n_ubatch > 32:
        settings = replace(settings, n_ubatch=max(32, min(settings.n_ubatch, settings.tokens) // 2))
        tried = memory_for(hp, settings, reserve=memory.reserve)
    return tried if tried.weights_limit(vram) >= smallest else memory


def on_device(hp: Hyperparameters, name: str, *, tied: bool) -> bool:
    """Whether the tensor takes VRAM with every layer offloaded.

    Lookup tables stay in host memory, and multi-token-prediction layers are loaded only when asked for.
    """
    layer = layer_of(name)
    return not is_lookup(name, tied=tied) and (layer is None or layer < hp.n_trunk)


def device_bytes(fmt: BlockFormat, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a CUDA buffer: the last row of a quantized one is padded, each one aligned."""
    n_bytes = fmt.n_bytes(math.prod(shape))
    if fmt.block_weights > 1 and shape[0] % ROW_PADDING:
        n_bytes += fmt.n_bytes(ROW_PADDING - shape[0] % ROW_PADDING)
    return _pad(n_bytes, DEVICE_ALIGNMENT)


def kv_cache_bytes(hp: Hyperparameters, settings: Settings, *, padded: bool = False) -> int:
    """Bytes of all that is kept of the tokens seen; with `padded`, as a CUDA buffer holds it."""
    return sum(layer_caches(hp, settings, padded=padded))


def layer_caches(hp: Hyperparameters, settings: Settings, *, padded: bool = False) -> list[int]:
    """Bytes that each layer keeps, layers of multi-token prediction included with 0.

    Where it attends, cells x streams rows of K and of V, or of K alone with latent attention; layers with a window
    keep only pad256(min(cells, window x (unified ? n_parallel : 1) + batch)) cells. Where it is recurrent, a state of
    float32 per sequence, whatever the context and the cache types.
    """
    _check_known(hp, settings)
    _check_cache_types(hp, settings)
    k_format, v_format = format_of(settings.cache_type_k), format_of(settings.cache_type_v)
    sizes = []
    for il in range(hp.n_layers):
        total = 0
        if hp.caches.attends[il]:
            cells = layer_cells(hp, settings, il) * settings.streams
            for fmt, width in ((k_format, _k_width(hp, il)), (v_format, _v_width(hp, il, settings))):
                n_bytes = fmt.n_bytes(width) * cells
                total += device_bytes(fmt, (width, cells)) if padded and width else n_bytes
        if hp.caches.recurrent[il]:
            rows = [4 * n * settings.n_parallel for n in (hp.caches.n_conv, hp.caches.n_state)]
            total += sum(_pad(n, DEVICE_ALIGNMENT) if padded else n for n in rows)
        if il < hp.n_trunk and not _is_known(hp):
            total += _bound(hp, settings)
        sizes.append(total)
    return sizes


def _bound(hp: Hyperparameters, settings: Settings) -> int:
    """What a layer of an unknown kind is taken to keep: K and V of its widest layer, an indexer's keys, a state.

    All in the larger of the two types, for every cell, without windows.
    """
    heads = max(hp.n_head_kv) * (max(hp.key_length, hp.key_length_swa) + max(hp.value_length, hp.value_length_swa))
    types = [format_of(name) for name in (settings.cache_type_k, settings.cache_type_v)]
    width = _pad(heads + 2 * ROW_PADDING, ROW_PADDING)
    cells = settings.cells * settings.streams
    state = 4 * (hp.caches.n_conv + hp.caches.n_state) * settings.n_parallel
    return max(fmt.n_bytes(width) for fmt in types) * cells + state


def layer_cells(hp: Hyperparameters, settings: Settings, il: int) -> int:
    """Cells that layer `il` keeps per stream."""
    if hp.windows is None or not hp.windows.layers[il] or settings.swa_full:
        return settings.cells
    window = hp.windows.size * (settings.n_parallel if settings.unified else 1)
    return _pad(min(settings.cells, window + settings.tokens), CELL_PADDING)


def compute_bytes(hp: Hyperparameters, settings: Settings) -> int:
    """Bytes of the compute buffer on the device, from above.

    Measured against llama.cpp's own figures for eleven architectures: 1.6 to 5 % above; mixtures of experts whose
    logits are few up to 26 %, without flash attention up to 8 %.

    The buffer must hold the largest moment of the graph, of T = n_ubatch tokens in float32, beside the masks:

        logits     4 n_vocab n_outputs                    a draft head: 4 T (n_vocab + n_draft_vocab + 2 n_embd)
        feed       4 T (3 n_ff)                           gate, up, their product
        experts    4 T (n_used (3 n_ff_expert + n_embd) + 3 n_ff_shared + 2 n_expert)
        attention  4 T (2 n_head k + 4 n_kv k)            + cached K and V of a layer as F16 if not F16
                                                          + 4 n_head cells T without flash attention
        latent     4 T (4 n_head k)
        recurrent  4 T (3 conv + 2 inner + rank) + the state of every sequence

    each together with four activations of 4 T n_embd. A mask has cells x T values of F16, or F32 without flash
    attention; there is one for full and one for windowed layers. One part in 64 is added; twice all that is taken for
    an architecture that is not known.
    """
    _check_known(hp, settings)
    tokens = settings.tokens
    layers = range(hp.n_trunk)
    caches = {(_windowed(hp, il), layer_cells(hp, settings, il)) for il in layers if hp.caches.attends[il]}
    masks = sum(cells * tokens * (2 if settings.flash_attn else 4) for _, cells in caches)
    # without flash attention K, V and Q are still held where the logits are computed
    held = 0 if settings.flash_attn or hp.caches.latent else max(4 * tokens * _qkv_width(hp, il) for il in layers)
    logits = 4 * hp.n_vocab * min(tokens, settings.n_outputs or tokens)
    if hp.n_draft_vocab:  # its logits are spread over the target's vocabulary
        logits = 4 * tokens * (hp.n_vocab + hp.n_draft_vocab + 2 * hp.n_embd)
    moments = [
        logits + held,
        *(4 * tokens * _feed_width(hp, il) for il in layers),
        *(_attention_bytes(hp, settings, il) for il in layers if hp.caches.attends[il]),
        *([_recurrent_bytes(hp, settings)] if any(hp.caches.recurrent) else []),
    ]
    n_bytes = max(moments) + 4 * tokens * 4 * hp.n_embd + masks + _input_bytes(hp, settings)
    return (n_bytes + n_bytes // COMPUTE_MARGIN) * (1 if _is_known(hp) else 2)


def _recurrent_bytes(hp: Hyperparameters, settings: Settings) -> int:
    """What a recurrent layer computes with; measured for Mamba 2 and gated delta nets, generous for the others."""
    conv = max(hp.caches.n_conv // 3, hp.n_embd)  # channels of a convolution over four tokens
    tokens, sequences = settings.tokens, settings.n_parallel
    width = 3 * conv + 2 * max(hp.caches.n_state // max(*hp.n_head, 128), hp.n_embd) + hp.time_step_rank
    return 4 * tokens * width + 4 * sequences * (hp.caches.n_state + hp.caches.n_conv)


def _attention_bytes(hp: Hyperparameters, settings: Settings, il: int) -> int:
    tokens, cells = settings.tokens, layer_cells(hp, settings, il)
    n_bytes = 4 * tokens * _qkv_width(hp, il)
    if settings.flash_attn and {settings.cache_type_k.upper(), settings.cache_type_v.upper()} != {"F16"}:
        values = 0 if hp.caches.latent else hp.n_head_kv[il] * _v_head(hp, il)
        n_bytes += 2 * cells * settings.streams * (_k_width(hp, il) + values)
    if not settings.flash_attn:
        n_bytes += 4 * hp.n_head[il] * cells * tokens
    return n_bytes


def _input_bytes(hp: Hyperparameters, settings: Settings) -> int:
    """Token ids, positions, cache indices: at most 64 bytes a token; and two rotation matrices per quantized cache."""
    rotations = 4 * 2 * (max(hp.key_length, hp.key_length_swa) ** 2 + max(hp.value_length, hp.value_length_swa) ** 2)
    quantized = any(format_of(t).block_weights > 1 for t in (settings.cache_type_k, settings.cache_type_v))
    return 64 * settings.tokens + 64 * 1024 + (rotations if quantized else 0)


def _feed_width(hp: Hyperparameters, il: int) -> int:
    """Activations of the feed-forward per token: dense, or of the experts a token passes; whichever is more."""
    if not hp.n_expert:
        return 3 * hp.n_ff[il]
    n_ff_expert = hp.n_ff_expert or hp.n_ff[il]
    experts = hp.n_expert_used * (3 * n_ff_expert + hp.n_embd) + 3 * hp.n_ff_shared + 2 * hp.n_expert
    return max(3 * hp.n_ff[il], experts)


def _qkv_width(hp: Hyperparameters, il: int) -> int:
    if hp.caches.latent:
        return 4 * hp.n_head[il] * _k_head(hp, il)
    return 2 * hp.n_head[il] * max(_k_head(hp, il), _v_head(hp, il)) + 4 * max(
        _k_width(hp, il), hp.n_head_kv[il] * _v_head(hp, il)
    )


def _windowed(hp: Hyperparameters, il: int) -> bool:
    return hp.windows is not None and hp.windows.layers[il]


def _k_head(hp: Hyperparameters, il: int) -> int:
    return hp.key_length_swa if _windowed(hp, il) else hp.key_length


def _v_head(hp: Hyperparameters, il: int) -> int:
    return hp.value_length_swa if _windowed(hp, il) else hp.value_length


def _k_width(hp: Hyperparameters, il: int) -> int:
    return hp.n_head_kv[il] * _k_head(hp, il)


def _v_width(hp: Hyperparameters, il: int, settings: Settings) -> int:
    """Values of V per cell; without flash attention V is stored transposed, as wide as the widest layer's."""
    if hp.caches.latent:
        return 0
    if settings.flash_attn:
        return hp.n_head_kv[il] * _v_head(hp, il)
    return max(hp.n_head_kv[i] * _v_head(hp, i) for i in range(hp.n_layers))


def _is_known(hp: Hyperparameters) -> bool:
    sized = not any(hp.caches.attends) or (hp.key_length and hp.value_length)
    return bool(hp.caches.known and hp.windows is not None and sized)


def _check_known(hp: Hyperparameters, settings: Settings) -> None:
    if not settings.assume and not _is_known(hp):
        raise BadInput(
            hp.path,
            f"the memory that a '{brief(hp.arch)}' model with these keys needs beside its weights is not known",
            hint="--assume plans with an upper bound; --size and --bpw need no memory",
        )


def _check_cache_types(hp: Hyperparameters, settings: Settings) -> None:
    """llama.cpp refuses a quantized cache whose blocks do not divide a head."""
    attending = [il for il in range(hp.n_trunk) if hp.caches.attends[il]]
    if hp.caches.latent and settings.cache_type_k.upper() != settings.cache_type_v.upper():
        raise UsageError("a model with latent attention has one cache: --cache-type-k and --cache-type-v must be equal")
    heads = [(settings.cache_type_k, _k_head(hp, il)) for il in attending]
    heads += [(settings.cache_type_v, _v_head(hp, il)) for il in attending]
    for name, length in heads:
        fmt = format_of(name)
        if not fmt.divides(length):
            raise BadInput(
                hp.path,
                f"its heads cannot be cached as {fmt.name}",
                got=f"{length} values",
                limit=f"a multiple of {fmt.block_weights}",
                hint="use f16",
            )


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def engine_settings(hp: Hyperparameters, given: Mapping[str, Any]) -> Settings:
    """Settings with the fields in `given` that are not None, the engine's defaults for the rest."""
    asked: dict[str, Any] = {
        name: value.upper() if isinstance(value, str) else value for name, value in given.items() if value is not None
    }
    if asked.get("n_ctx") == OWN_CONTEXT:
        asked["n_ctx"] = hp.context_length
    return replace(default_settings(hp), **asked)
