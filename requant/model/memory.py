"""The VRAM that a model needs beside its weights: KV cache, compute buffer and reserve.

The figures are those of llama.cpp with every layer on one CUDA device. Cache: exact, from llama-kv-cache.cpp,
llama-kv-cache-iswa.cpp and llama-memory-recurrent.cpp. Compute buffer: an upper bound, see `compute_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from requant.container.infos import round_up
from requant.errors import BadInput, UsageError, brief
from requant.formats import format_of
from requant.formats.base import DEVICE_ALIGNMENT, BlockFormat
from requant.model.engine_settings import CELL_PADDING, EngineSettings
from requant.model.hyperparameters import Hyperparameters
from requant.model.roles import is_lookup, layer_of
from requant.model.windows import SlidingWindows

MIB = 2**20
DEFAULT_RESERVE = 1024 * MIB  # bytes; llama.cpp's --fit-target
RESERVE_SHARE = 10  # the default reserve is at most one part in ten of the budget
ROW_PADDING = 512  # weights; MATRIX_ROW_PADDING of ggml-cuda
_WITH_ENCODER = ("eagle3", "dflash")  # heads that first encode hidden states of the target
COMPUTE_MARGIN = 64  # one part in 64 is added, for shapes that were not measured


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of VRAM that are not weights.

    `reserve` is left free for memory that cannot be computed beforehand: the CUDA context (about 330 MiB), the
    display, fragmentation. No other overhead is counted.
    """

    settings: EngineSettings
    kv_cache: int
    compute: int
    reserve: int

    @property
    def total(self) -> int:
        """Bytes of all three parts."""
        return self.kv_cache + self.compute + self.reserve

    def weights_limit(self, vram: int) -> int:
        """Return the bytes of `vram` left for the weights, below 0 where not even the rest fits."""
        return vram - self.total


def default_reserve(vram: int | None) -> int:
    """Return 1 GiB, but at most a tenth of the budget."""
    return DEFAULT_RESERVE if vram is None else min(DEFAULT_RESERVE, vram // RESERVE_SHARE)


def memory_for(
    hp: Hyperparameters, settings: EngineSettings, *, vram: int | None = None, reserve: int | None = None
) -> Memory:
    """Return the memory that the model needs beside its weights; `reserve` in bytes, by default derived from `vram`.

    Raises BadInput for an architecture whose cache is not known here, unless `settings.assume`.
    """
    reserve = default_reserve(vram) if reserve is None else reserve
    return Memory(settings, kv_cache_bytes(hp, settings, padded=True), compute_bytes(hp, settings), reserve)


def on_device(hp: Hyperparameters, name: str, *, tied: bool) -> bool:
    """Return whether the tensor takes VRAM with every layer offloaded.

    Lookup tables stay in host memory, and multi-token-prediction layers are loaded only on request. A tower of images
    or sound is on the GPU, as llama.cpp has it by default.
    """
    layer = layer_of(name)
    return not is_lookup(name, tied=tied) and (layer is None or layer < hp.n_trunk)


def device_bytes(fmt: BlockFormat, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in a CUDA buffer, which aligns it and pads the last row of a quantized one."""
    n_bytes = fmt.n_bytes(math.prod(shape))
    if fmt.block_weights > 1 and shape[0] % ROW_PADDING:
        n_bytes += fmt.n_bytes(ROW_PADDING - shape[0] % ROW_PADDING)
    return round_up(n_bytes, DEVICE_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The dimensions of one layer that decide what it keeps and computes with.

    `cells`: of one stream's cache; `n_ff`: width of its dense feed-forward part; `k_head`, `v_head`: values of one
    head; `k_width`, `v_width`: values of a row of K and of V over all heads, `v_width` 0 with `latent` attention.
    """

    attends: bool
    recurrent: bool
    windowed: bool
    latent: bool
    cells: int
    n_ff: int
    n_head: int
    k_head: int
    v_head: int
    k_width: int
    v_width: int

    @property
    def qkv_width(self) -> int:
        """Values per token while Q, K and V are computed."""
        if self.latent:
            return 4 * self.n_head * self.k_head
        return 2 * self.n_head * max(self.k_head, self.v_head) + 4 * max(self.k_width, self.v_width)


def layer_shapes(hp: Hyperparameters, settings: EngineSettings) -> list[LayerShape]:
    """Return the shape of every layer under `settings`, layers of multi-token prediction included."""
    windows = hp.windows or SlidingWindows(0, (False,) * hp.n_layers)
    in_window = windows.size * (settings.n_parallel if settings.unified else 1)
    window_cells = round_up(min(settings.cells, in_window + settings.tokens), CELL_PADDING)
    shapes = []
    for il, windowed in enumerate(windows.layers):
        k_head, v_head = (hp.key_length_swa, hp.value_length_swa) if windowed else (hp.key_length, hp.value_length)
        shapes.append(
            LayerShape(
                attends=hp.caches.attends[il],
                recurrent=hp.caches.recurrent[il],
                windowed=windowed,
                latent=hp.caches.latent,
                cells=window_cells if windowed and not settings.swa_full else settings.cells,
                n_ff=hp.n_ff[il],
                n_head=hp.n_head[il],
                k_head=k_head,
                v_head=v_head,
                k_width=hp.n_head_kv[il] * k_head,
                v_width=0 if hp.caches.latent else hp.n_head_kv[il] * v_head,
            )
        )
    return shapes


def kv_cache_bytes(hp: Hyperparameters, settings: EngineSettings, *, padded: bool = False) -> int:
    """Return the bytes that all layers keep of the tokens seen; with `padded`, as CUDA buffers hold them."""
    return sum(layer_caches(hp, settings, padded=padded))


def layer_caches(hp: Hyperparameters, settings: EngineSettings, *, padded: bool = False) -> list[int]:
    """Return the bytes that each layer keeps, 0 for layers of multi-token prediction.

    A layer that attends keeps cells x streams rows of K and of V, or of K alone with latent attention; with a window,
    cells are pad256(min(cells, window x (unified ? n_parallel : 1) + batch)). Without flash attention V is stored
    transposed, each row as wide as the widest layer's. A recurrent layer keeps a float32 state per sequence, whatever
    the context and the cache types.
    """
    shapes = layer_shapes(hp, settings)
    _check_known(hp, settings)
    _check_cache_types(hp, settings, shapes)
    k_format, v_format = format_of(settings.cache_type_k), format_of(settings.cache_type_v)
    widest = max(shape.v_width for shape in shapes)
    states = [4 * n * settings.n_parallel for n in (hp.caches.n_conv, hp.caches.n_state)]
    state = sum(round_up(n, DEVICE_ALIGNMENT) if padded else n for n in states)
    unknown = 0 if _is_known(hp) else _bound(hp, settings)
    sizes = []
    for il, shape in enumerate(shapes):
        total = unknown if il < hp.n_trunk else 0
        if shape.attends:
            cells = shape.cells * settings.streams
            v_width = shape.v_width if settings.flash_attn else widest
            for fmt, width in ((k_format, shape.k_width), (v_format, v_width)):
                n_bytes = fmt.n_bytes(width) * cells
                total += device_bytes(fmt, (width, cells)) if padded and width else n_bytes
        if shape.recurrent:
            total += state
        sizes.append(total)
    return sizes


def _bound(hp: Hyperparameters, settings: EngineSettings) -> int:
    """Return an upper bound of what a layer of unknown kind keeps: K and V, an indexer's keys, and a state.

    K and V are as wide as the widest layer's, in the larger of the two types, for every cell, without windows.
    """
    heads = max(hp.n_head_kv) * (max(hp.key_length, hp.key_length_swa) + max(hp.value_length, hp.value_length_swa))
    types = [format_of(name) for name in (settings.cache_type_k, settings.cache_type_v)]
    width = round_up(heads + 2 * ROW_PADDING, ROW_PADDING)
    cells = settings.cells * settings.streams
    state = 4 * (hp.caches.n_conv + hp.caches.n_state) * settings.n_parallel
    return max(fmt.n_bytes(width) for fmt in types) * cells + state


def compute_bytes(hp: Hyperparameters, settings: EngineSettings) -> int:
    """Return an upper bound of the bytes of the compute buffer on the device.

    Measured against llama.cpp's own figures for eleven architectures: 1.6 to 5 % above; mixtures of experts whose
    logits are few up to 26 %, without flash attention up to 8 %.

    The buffer must hold the largest moment of the graph, of T = n_ubatch tokens in float32, beside the masks:

        logits     4 n_vocab n_outputs                    eagle3, dflash: 4 T (n_vocab + n_draft_vocab + 2 n_embd)
                                                          + 4 T of Q, K and V without flash attention
        feed       4 T (3 n_ff)                           gate, up, their product
        experts    4 T (n_used (3 n_ff_expert + n_embd) + 3 n_ff_shared + 2 n_expert)
        attention  4 T (2 n_head k + 4 n_kv k)            + cached K and V of a layer as F16 if not F16
                                                          + 4 n_head cells T without flash attention
        latent     4 T (4 n_head k)
        recurrent  4 T (3 conv + 2 inner + rank) + the state of every sequence

    each together with four activations of 4 T n_embd. A mask has cells x T values of F16, or F32 without flash
    attention; there is one for full and one for windowed layers. One part in 64 is added. For an architecture that is
    not known, the sum is doubled.
    """
    _check_known(hp, settings)
    per_value = 4 * settings.tokens  # bytes of a float32 value of every token
    shapes = layer_shapes(hp, settings)[: hp.n_trunk]
    attending = [shape for shape in shapes if shape.attends]
    moments = {
        "logits": _logits_bytes(hp, settings, shapes),
        "feed": per_value * 3 * max(shape.n_ff for shape in shapes),
        "experts": per_value * max(_experts_width(hp, shape) for shape in shapes) if hp.n_expert else 0,
        "attention": max((_attention_bytes(shape, settings) for shape in attending), default=0),
        "recurrent": _recurrent_bytes(hp, settings) if any(hp.caches.recurrent) else 0,
    }
    activations = 4 * per_value * hp.n_embd
    mask_value = 2 if settings.flash_attn else 4
    masks = sum(cells * settings.tokens * mask_value for _, cells in {(s.windowed, s.cells) for s in attending})
    n_bytes = max(moments.values()) + activations + masks + _input_bytes(hp, settings)
    return (n_bytes + n_bytes // COMPUTE_MARGIN) * (1 if _is_known(hp) else 2)


def _logits_bytes(hp: Hyperparameters, settings: EngineSettings, shapes: Sequence[LayerShape]) -> int:
    per_value = 4 * settings.tokens
    if hp.arch in _WITH_ENCODER:  # every token has logits; a reduced vocabulary's are spread over the target's
        n_bytes = per_value * (hp.n_vocab + hp.n_draft_vocab + 2 * hp.n_embd)
    else:
        n_bytes = 4 * hp.n_vocab * min(settings.tokens, settings.n_outputs or settings.tokens)
    if settings.flash_attn or hp.caches.latent:
        return n_bytes
    # without flash attention K, V and Q are still held where the logits are computed
    return n_bytes + per_value * max(shape.qkv_width for shape in shapes)


def _experts_width(hp: Hyperparameters, shape: LayerShape) -> int:
    """Return the values per token in the experts of a layer that the token passes."""
    n_ff_expert = hp.n_ff_expert or shape.n_ff
    return hp.n_expert_used * (3 * n_ff_expert + hp.n_embd) + 3 * hp.n_ff_shared + 2 * hp.n_expert


def _attention_bytes(shape: LayerShape, settings: EngineSettings) -> int:
    n_bytes = 4 * settings.tokens * shape.qkv_width
    if not settings.flash_attn:
        return n_bytes + 4 * shape.n_head * shape.cells * settings.tokens
    if {settings.cache_type_k.upper(), settings.cache_type_v.upper()} != {"F16"}:
        n_bytes += 2 * shape.cells * settings.streams * (shape.k_width + shape.v_width)
    return n_bytes


def _recurrent_bytes(hp: Hyperparameters, settings: EngineSettings) -> int:
    """Return the bytes a recurrent layer computes with: measured for Mamba 2 and gated delta nets, else generous."""
    conv = max(hp.caches.n_conv // 3, hp.n_embd)  # channels of a convolution over four tokens
    tokens, sequences = settings.tokens, settings.n_parallel
    width = 3 * conv + 2 * max(hp.caches.n_state // max(*hp.n_head, 128), hp.n_embd) + hp.recurrence.n_heads
    return 4 * tokens * width + 4 * sequences * (hp.caches.n_state + hp.caches.n_conv)


def _input_bytes(hp: Hyperparameters, settings: EngineSettings) -> int:
    """Return an upper bound of the graph's inputs.

    Token ids, positions and cache indices take at most 64 bytes a token, a quantized cache two rotation matrices.
    """
    rotations = 4 * 2 * (max(hp.key_length, hp.key_length_swa) ** 2 + max(hp.value_length, hp.value_length_swa) ** 2)
    quantized = any(format_of(t).block_weights > 1 for t in (settings.cache_type_k, settings.cache_type_v))
    return 64 * settings.tokens + 64 * 1024 + (rotations if quantized else 0)


def _is_known(hp: Hyperparameters) -> bool:
    sized = not any(hp.caches.attends) or (hp.key_length and hp.value_length)
    return bool(hp.caches.known and hp.windows is not None and sized)


def _check_known(hp: Hyperparameters, settings: EngineSettings) -> None:
    if not settings.assume and not _is_known(hp):
        what = f"the memory that a '{brief(hp.arch)}' model with these keys needs beside its weights is not known"
        raise BadInput(
            hp.path,
            what,
            hint="--assume plans with an upper bound; --size and --bpw limit the file and need no such figure",
        )


def _check_cache_types(hp: Hyperparameters, settings: EngineSettings, shapes: Sequence[LayerShape]) -> None:
    """Raise BadInput for a quantized cache whose blocks do not divide a head, as llama.cpp refuses it."""
    if hp.caches.latent and settings.cache_type_k.upper() != settings.cache_type_v.upper():
        raise UsageError("a model with latent attention has one cache: --cache-type-k and --cache-type-v must be equal")
    attending = [shape for shape in shapes if shape.attends]
    heads = [(settings.cache_type_k, shape.k_head) for shape in attending]
    heads += [(settings.cache_type_v, shape.v_head) for shape in attending]
    for name, length in heads:
        fmt = format_of(name)
        if not fmt.divides(length):
            what, limit = f"its heads cannot be cached as {fmt.name}", f"a multiple of {fmt.block_weights}"
            raise BadInput(hp.path, what, got=f"{length} values", limit=limit, hint="use f16")
