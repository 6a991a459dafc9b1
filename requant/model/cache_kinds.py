"""The caches of each layer: keys and values, a latent of both, or a recurrent state of fixed size.

Source: create_memory in llama.cpp's src/llama-model.cpp, llm_arch_is_hybrid and llm_arch_is_recurrent in
llama-arch.cpp, n_embd_r and n_embd_s in llama-hparams.cpp, load_arch_hparams of each architecture in src/models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requant.model.keys import ArchitectureKeys

RECURRENT = frozenset("mamba mamba2 rwkv6 rwkv7 rwkv6qwen2 arwkv7".split())  # noqa: SIM905
# hybrid architectures: which layers keep a state
_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}  # every n-th attends, without a key
_NO_HEADS = frozenset("jamba granitehybrid plamo2 lfm2 lfm2moe kimi-linear bailingmoe3".split())  # noqa: SIM905
_NEMOTRON = frozenset(["nemotron_h", "nemotron_h_moe"])
_BOTH = frozenset(["falcon-h1"])
_HYBRID = frozenset(_INTERVAL) | _NO_HEADS | _NEMOTRON | _BOTH
# attention in every layer, through the default branch of create_memory
ATTENTION = frozenset(
    """
    afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chameleon chatglm codeshell cogvlm
    cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr dflash dots1 eagle3 ernie4_5 ernie4_5-moe
    exaone exaone-moe exaone4 falcon gemma gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm4 glm4moe gpt-oss gpt2
    gptj gptneox granite granite_swa granitemoe graniteswitch grok grovemoe hunyuan-dense hunyuan-moe hunyuan_vl hy_v3
    internlm2 jais jais2 laguna
    llama llama4 maincoder maple mellum minicpm minicpm3 minimax-m2 mistral3 mistral4 mpt muse-glimmer nanbeige
    nemotron olmo olmo2 olmoe
    openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo3 plm qwen qwen2 qwen2moe qwen2vl qwen3
    qwen3moe qwen3vl qwen3vlmoe refact seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 mimo2
    talkie xverse
    """.split()  # noqa: SIM905
)
_GEMMA3N_OWN_KV = 20  # layers with a cache, a constant of the engine
_SHARED_KV = frozenset(["gemma4", "gemma4-assistant"])
_RWKV_TOKEN_SHIFT = 2


@dataclass(frozen=True, slots=True)
class Caches:
    """The kind of cache per layer: whether it keeps keys and values (`attends`), and whether it keeps a state.

    `latent`: the cache holds one latent row per token and no values. `n_conv` and `n_state`: float32 numbers of the
    state per sequence. `known`: False for an architecture whose cache is not known here.
    """

    attends: tuple[bool, ...]
    recurrent: tuple[bool, ...]
    latent: bool
    n_conv: int
    n_state: int
    known: bool


def caches_of(
    keys: ArchitectureKeys,
    n_layers: int,
    n_trunk: int,
    *,
    n_embd: int,
    n_head: Sequence[int],
    n_head_kv: Sequence[int],
    n_ff: Sequence[int],
    latent: bool,
) -> Caches:
    """Return a model's caches; sequences have one item per layer, multi-token prediction last."""
    arch, count = keys.arch, keys.largest
    recurrent_layers = keys.flags("attention.recurrent_layers", n_layers)
    kept = [il < n_trunk for il in range(n_layers)]  # the layers that keep anything
    stateful: Sequence[bool] = [False] * n_layers
    known = arch in ATTENTION or arch in RECURRENT or arch in _HYBRID
    if arch in RECURRENT or arch in _BOTH:
        stateful = [True] * n_layers
    elif arch in _INTERVAL:
        every = count("full_attention_interval", _INTERVAL[arch]) or 1
        stateful = recurrent_layers or [(il + 1) % every != 0 for il in range(n_layers)]
    elif arch in _NO_HEADS:
        stateful = [n == 0 for n in n_head_kv]
        known = known and not (arch.startswith("lfm2") and keys.get("attention.sliding_window"))
    elif arch in _NEMOTRON:
        stateful = [n == 0 for n in n_head_kv]
        kept = [k and n == 0 for k, n in zip(kept, n_ff, strict=True)]
    elif arch == "gemma3n":
        kept = [k and il < _GEMMA3N_OWN_KV for il, k in enumerate(kept)]
    elif shared := count("attention.shared_kv_layers", 0):
        kept = [k and il < n_layers - shared for il, k in enumerate(kept)]
        known = known and arch in _SHARED_KV
    recurrent = [k and s for k, s in zip(kept, stateful, strict=True)]
    attends = kept if arch in _BOTH else [k and not s for k, s in zip(kept, stateful, strict=True)]
    n_conv, n_state = _state(keys, n_embd, n_head[0]) if any(recurrent) else (0, 0)
    if not any(recurrent) and any(count(key, 0) for key in ("ssm.state_size", "shortconv.l_cache", "kda.head_dim")):
        known = False
    if count("num_loops", 1) > 1:  # layers of nanbeige that run again, each time with a cache of their own
        known = False
    if count("hyper_connection.count", 0):  # a DSpark head with the layers of DeepSeek-V4
        known = False
    return Caches(tuple(attends), tuple(recurrent), latent, n_conv, n_state, known)


def _state(keys: ArchitectureKeys, n_embd: int, n_head: int) -> tuple[int, int]:
    """Return the float32 numbers of a layer's state per sequence: of the convolution, and of the recurrence."""
    count = keys.largest
    if head := count("wkv.head_size", 0):
        return count("token_shift_count", _RWKV_TOKEN_SHIFT) * n_embd, n_embd * head
    if length := count("shortconv.l_cache", 0):
        return n_embd * (length - 1), 0
    kernel = count("ssm.conv_kernel", 0)
    if head := count("kda.head_dim", 0):
        return 3 * (kernel - 1 if kernel else 3) * n_head * head, head * head * n_head
    inner, size = count("ssm.inner_size", 0), count("ssm.state_size", 0)
    conv = max(kernel - 1, 0) * (inner + 2 * count("ssm.group_count", 0) * size)
    if keys.arch == "minimax-01":
        head = count("attention.key_length", n_embd // max(n_head, 1))
        return conv, head * head * n_head
    return conv, size * inner
