"""What lives in VRAM beside the weights: KV cache, compute buffer and reserve; and so, what is left for weights.

The figures are those of llama.cpp with every layer on one CUDA device. Cache: exact, from llama-kv-cache.cpp and
llama-kv-cache-iswa.cpp. Compute buffer: the largest of three moments of the graph, see `compute_bytes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from requant.errors import BadInput, UsageError
from requant.formats import by_name
from requant.formats.base import BlockFormat
from requant.model.hyperparameters import Hyperparameters
from requant.model.roles import is_lookup, layer_of

MIB = 2**20
CELL_PADDING = 256  # cells; llama_context and the window cache round up to it
DEFAULT_CONTEXT = 4096
DEFAULT_RESERVE = 1024 * MIB  # bytes; llama.cpp's --fit-target
RESERVE_SHARE = 10  # the default reserve is at most one part in ten of the budget
N_BATCH = 2048  # llama.cpp's default, which bounds n_ubatch
ROW_PADDING = 512  # weights; MATRIX_ROW_PADDING of ggml-cuda
COMPUTE_MARGIN = 64  # one part added to as many, for shapes that were not measured
DEVICE_ALIGNMENT = 128  # bytes, of each tensor in a CUDA buffer

CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")

# Architectures whose cache is K and V per layer and nothing else (the default branch of create_memory in
# llama-model.cpp) and whose layers run attention and feed-forward one after the other.
_PLAIN_CACHE = frozenset(
    "llama llama4 mistral3 qwen2 qwen2moe qwen2vl qwen3 qwen3moe gemma gemma2 gemma3 gpt-oss phi3 phimoe olmo olmo2 "  # noqa: SIM905
    "olmoe granite granitemoe starcoder2 internlm2 exaone exaone4 smollm3 glm4 glm4moe seed_oss ernie4_5 "
    "ernie4_5-moe minicpm orion xverse nemotron dots1 hunyuan-dense hunyuan-moe arcee".split()
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the engine will be started; the names are llama.cpp's.

    `n_ctx`: tokens over all `n_parallel` sequences; `n_ubatch`: tokens computed at once; cache types are names of
    `CACHE_TYPES`; `unified`: one cache for all sequences; `n_outputs`: rows of logits computed at once, None for
    n_ubatch as llama-cli and llama-perplexity reserve (llama-server needs one per sequence).
    """

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = 512
    cache_type_k: str = "F16"
    cache_type_v: str = "F16"
    unified: bool = False
    flash_attn: bool = True
    swa_full: bool = False
    n_outputs: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_parallel", "n_ubatch"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UsageError(f"{name} must be from 1 to 2147483647 (got {getattr(self, name)})")
        if self.n_outputs is not None and self.n_outputs < 1:
            raise UsageError(f"n_outputs must be at least 1 (got {self.n_outputs})")
        for name in (self.cache_type_k, self.cache_type_v):
            if name.upper() not in CACHE_TYPES:
                raise UsageError(f"'{name}' is no cache type; use one of {', '.join(CACHE_TYPES).lower()}")
        if not self.flash_attn and _cache_format(self.cache_type_v).block_weights > 1:
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
    """Bytes of the KV cache; with `padded`, as a CUDA buffer holds it.

    Per layer cells x streams rows of K and of V; layers with a window keep only
    pad256(min(cells, window x (unified ? n_parallel : 1) + batch)) cells.
    """
    _check_known(hp)
    _check_cache_types(hp, settings)
    k_format, v_format = _cache_format(settings.cache_type_k), _cache_format(settings.cache_type_v)
    total = 0
    for il in range(hp.n_trunk):
        cells = layer_cells(hp, settings, il) * settings.streams
        for fmt, width in ((k_format, _k_width(hp, il)), (v_format, _v_width(hp, il, settings))):
            n_bytes = fmt.n_bytes(width) * cells
            total += device_bytes(fmt, (width, cells)) if padded and width else n_bytes
    return total


def layer_cells(hp: Hyperparameters, settings: Settings, il: int) -> int:
    """Cells that layer `il` keeps per stream."""
    if not _windowed(hp, il) or settings.swa_full:
        return settings.cells
    assert hp.windows is not None
    window = hp.windows.size * (settings.n_parallel if settings.unified else 1)
    return _pad(min(settings.cells, window + settings.tokens), CELL_PADDING)


def compute_bytes(hp: Hyperparameters, settings: Settings) -> int:
    """Bytes of the compute buffer on the device, from above.

    Measured against llama.cpp's own figures for seven architectures: 1.6 to 4 % above; mixtures of experts whose
    logits are few up to 26 %, without flash attention up to 8 %.

    The buffer must hold the largest moment of the graph, of T = n_ubatch tokens in float32, beside the masks:

        logits     4 n_vocab n_outputs
        feed       4 T (3 n_ff)                           gate, up, their product
        experts    4 T (n_used (3 n_ff_expert + n_embd) + 3 n_ff_shared + 2 n_expert)
        attention  4 T (2 n_head k + 4 n_kv k)            + cached K and V of a layer as F16 if not F16
                                                          + 4 n_head cells T without flash attention

    each together with four activations of 4 T n_embd. A mask has cells x T values of F16, or F32 without flash
    attention; there is one for full and one for windowed layers. One part in 64 is added.
    """
    _check_known(hp)
    tokens = settings.tokens
    layers = range(hp.n_trunk)
    caches = {(_windowed(hp, il), layer_cells(hp, settings, il)) for il in layers}
    masks = sum(cells * tokens * (2 if settings.flash_attn else 4) for _, cells in caches)
    # without flash attention K, V and Q are still held where the logits are computed
    held = 0 if settings.flash_attn else max(4 * tokens * _qkv_width(hp, il) for il in layers)
    moments = [
        4 * hp.n_vocab * min(tokens, settings.n_outputs or tokens) + held,
        *(4 * tokens * _feed_width(hp, il) for il in layers),
        *(_attention_bytes(hp, settings, il) for il in layers),
    ]
    n_bytes = max(moments) + 4 * tokens * 4 * hp.n_embd + masks + _input_bytes(hp, settings)
    return n_bytes + n_bytes // COMPUTE_MARGIN


def _attention_bytes(hp: Hyperparameters, settings: Settings, il: int) -> int:
    tokens, cells = settings.tokens, layer_cells(hp, settings, il)
    n_bytes = 4 * tokens * _qkv_width(hp, il)
    if settings.flash_attn and {settings.cache_type_k.upper(), settings.cache_type_v.upper()} != {"F16"}:
        n_bytes += 2 * cells * settings.streams * (_k_width(hp, il) + hp.n_head_kv[il] * _v_head(hp, il))
    if not settings.flash_attn:
        n_bytes += 4 * hp.n_head[il] * cells * tokens
    return n_bytes


def _input_bytes(hp: Hyperparameters, settings: Settings) -> int:
    """Token ids, positions, cache indices: at most 64 bytes a token; and two rotation matrices per quantized cache."""
    rotations = 4 * 2 * (max(hp.key_length, hp.key_length_swa) ** 2 + max(hp.value_length, hp.value_length_swa) ** 2)
    quantized = any(_cache_format(t).block_weights > 1 for t in (settings.cache_type_k, settings.cache_type_v))
    return 64 * settings.tokens + 64 * 1024 + (rotations if quantized else 0)


def _feed_width(hp: Hyperparameters, il: int) -> int:
    """Activations of the feed-forward per token: dense, or of the experts a token passes; whichever is more."""
    if not hp.n_expert:
        return 3 * hp.n_ff[il]
    n_ff_expert = hp.n_ff_expert or hp.n_ff[il]
    experts = hp.n_expert_used * (3 * n_ff_expert + hp.n_embd) + 3 * hp.n_ff_shared + 2 * hp.n_expert
    return max(3 * hp.n_ff[il], experts)


def _qkv_width(hp: Hyperparameters, il: int) -> int:
    return 2 * hp.n_head[il] * max(_k_head(hp, il), _v_head(hp, il)) + 4 * max(
        _k_width(hp, il), hp.n_head_kv[il] * _v_head(hp, il)
    )


def _windowed(hp: Hyperparameters, il: int) -> bool:
    assert hp.windows is not None  # _check_known
    return hp.windows.layers[il]


def _k_head(hp: Hyperparameters, il: int) -> int:
    return hp.key_length_swa if _windowed(hp, il) else hp.key_length


def _v_head(hp: Hyperparameters, il: int) -> int:
    return hp.value_length_swa if _windowed(hp, il) else hp.value_length


def _k_width(hp: Hyperparameters, il: int) -> int:
    return hp.n_head_kv[il] * _k_head(hp, il)


def _v_width(hp: Hyperparameters, il: int, settings: Settings) -> int:
    """Values of V per cell; without flash attention V is stored transposed, as wide as the widest layer's."""
    if settings.flash_attn:
        return hp.n_head_kv[il] * _v_head(hp, il)
    return max(hp.n_head_kv[i] * _v_head(hp, i) for i in range(hp.n_layers))


def _check_known(hp: Hyperparameters) -> None:
    unusual = hp.recurrent or hp.latent_rank or hp.key_length_mla or hp.n_shared_kv or hp.windows is None
    if hp.arch not in _PLAIN_CACHE or unusual or not hp.key_length or not hp.value_length:
        raise BadInput(
            hp.path,
            f"the memory that a '{hp.arch}' model with these keys needs beside its weights is not known",
            hint="--vram cannot be used; --size and --bpw still work",
        )


def _check_cache_types(hp: Hyperparameters, settings: Settings) -> None:
    """llama.cpp refuses a quantized cache whose blocks do not divide a head."""
    heads = [(settings.cache_type_k, _k_head(hp, il)) for il in range(hp.n_trunk)]
    heads += [(settings.cache_type_v, _v_head(hp, il)) for il in range(hp.n_trunk)]
    for name, length in heads:
        fmt = _cache_format(name)
        if not fmt.divides(length):
            raise BadInput(
                hp.path,
                f"its heads cannot be cached as {fmt.name}",
                got=f"{length} values",
                limit=f"a multiple of {fmt.block_weights}",
                hint="use f16",
            )


def _cache_format(name: str) -> BlockFormat:
    fmt = by_name(name)
    assert fmt is not None, name
    return fmt


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
