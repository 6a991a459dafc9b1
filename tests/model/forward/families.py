"""Small random models of every family, with all the parts that a family can have; the engine loads them too."""

from dataclasses import dataclass, field

import numpy as np
from gguf_files import ARR, F32, I32, STR, U32, File, Tensor, pair
from numpy.random import default_rng

N_EMBD, HEAD, N_HEAD, N_KV, N_FF, N_LAYERS, N_EXPERT = 32, 16, 4, 2, 48, 3, 4
CONTEXT = 512


def byte_letters():
    """Return the letter that stands for each byte in a gpt2 vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


TOKENS = [*byte_letters(), "<|end|>"]


@dataclass(frozen=True)
class Family:
    arch: str
    keys: dict = field(default_factory=dict)
    biases: tuple = ()
    qk_norm: bool = False
    post_norms: bool = False
    fused: bool = False
    experts: bool = False
    tied: bool = True
    factors: tuple = ()  # names of tensors with factors per frequency


FAMILIES = {
    "unknown": Family("exotic"),
    "llama": Family("llama", tied=False, biases=("attn_q", "attn_output", "ffn_up", "ffn_down")),
    "llama3": Family("llama", factors=("rope_freqs",)),
    "llama-linear": Family("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-yarn": Family(
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ),
    "mixtral": Family("llama", experts=True, tied=False),
    "qwen2": Family("qwen2", biases=("attn_q", "attn_k", "attn_v"), tied=False),
    "qwen3": Family("qwen3", qk_norm=True),
    "qwen3moe": Family("qwen3moe", {"expert_feed_forward_length": 24}, qk_norm=True, experts=True, tied=False),
    "phi3": Family(
        "phi3",
        {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.2, "rope.dimension_count": 12},
        fused=True,
        tied=False,
        factors=("rope_factors_long", "rope_factors_short"),
    ),
    "gemma": Family("gemma"),
    "gemma2": Family(
        "gemma2",
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "attention.sliding_window": 8},
        post_norms=True,
    ),
    "gemma3": Family(
        "gemma3", {"attention.sliding_window": 8, "rope.scaling.factor": 8.0}, qk_norm=True, post_norms=True
    ),
}


VOCABULARY = (
    pair("tokenizer.ggml.model", STR, "gpt2"),
    pair("tokenizer.ggml.pre", STR, "gpt-2"),
    pair("tokenizer.ggml.tokens", ARR, (STR, TOKENS)),
    pair("tokenizer.ggml.token_type", ARR, (I32, [1] * 256 + [3])),
    pair("tokenizer.ggml.merges", ARR, (STR, ["H e"])),
    pair("tokenizer.ggml.bos_token_id", U32, 256),
    pair("tokenizer.ggml.eos_token_id", U32, 256),
)


def write(name, path, seed=0, *, vocabulary=VOCABULARY, n_tokens=257, more=(), n_layers=N_LAYERS, keys=()):
    """Write a model of family `name`; vocabulary: the tokenizer's pairs, of `n_tokens` tokens; more: tensors."""
    family, rng = FAMILIES[name], default_rng(seed)
    keys = dict(keys) | {
        "block_count": n_layers,
        "context_length": CONTEXT,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_KV,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100.0,
        "rope.dimension_count": HEAD,
        **({"expert_count": N_EXPERT, "expert_used_count": 2} if family.experts else {}),
        **family.keys,
    }
    if family.arch in ("llama", "qwen2", "phi3", "gemma"):  # whose heads share the width between them
        keys |= {"embedding_length": N_HEAD * HEAD}
    width = keys["embedding_length"]
    pairs = [pair("general.architecture", STR, family.arch)]
    kinds = {int: U32, float: F32, str: STR}
    pairs += [pair(f"{family.arch}.{key}", kinds[type(value)], value) for key, value in keys.items()]
    pairs += vocabulary
    tensors = [_matrix(rng, "token_embd.weight", width, n_tokens, 1.0)]
    if not family.tied:
        tensors.append(_matrix(rng, "output.weight", width, n_tokens))
    tensors.append(_vector(rng, "output_norm.weight", width))
    tensors += [_vector(rng, f"{name}.weight", keys["rope.dimension_count"] // 2, 2.0) for name in family.factors]
    for il in range(n_layers):
        tensors += _layer(rng, family, keys, width, f"blk.{il}.")
    return File(tuple(pairs), (*tensors, *more)).write(path)


def _layer(rng, family, keys, width, at):
    n_q, n_k, n_ff = N_HEAD * HEAD, N_KV * HEAD, keys["feed_forward_length"]
    yield _vector(rng, f"{at}attn_norm.weight", width)
    yield _vector(rng, f"{at}ffn_norm.weight", width)
    if family.post_norms:
        yield _vector(rng, f"{at}post_attention_norm.weight", width)
        yield _vector(rng, f"{at}post_ffw_norm.weight", width)
    if family.qk_norm:
        yield _vector(rng, f"{at}attn_q_norm.weight", HEAD)
        yield _vector(rng, f"{at}attn_k_norm.weight", HEAD)
    shapes = {"attn_q": (width, n_q), "attn_k": (width, n_k), "attn_v": (width, n_k), "attn_output": (n_q, width)}
    if family.fused:
        shapes = {"attn_qkv": (width, n_q + 2 * n_k), "attn_output": (n_q, width)}
    if family.experts:
        n_ff = keys.get("expert_feed_forward_length", n_ff)
        yield _matrix(rng, f"{at}ffn_gate_inp.weight", width, N_EXPERT, 2.0)
        for part, (n, rows) in {"gate": (width, n_ff), "up": (width, n_ff), "down": (n_ff, width)}.items():
            stack = [_normal(rng, rows, n) for _ in range(N_EXPERT)]
            yield Tensor(f"{at}ffn_{part}_exps.weight", (n, rows, N_EXPERT), data=np.concatenate(stack).tobytes())
    elif family.fused:
        shapes |= {"ffn_up": (width, 2 * n_ff), "ffn_down": (n_ff, width)}
    else:
        shapes |= {"ffn_gate": (width, n_ff), "ffn_up": (width, n_ff), "ffn_down": (n_ff, width)}
    for part, (n, rows) in shapes.items():
        yield _matrix(rng, f"{at}{part}.weight", n, rows)
    for part in family.biases:
        yield _vector(rng, f"{at}{part}.bias", shapes[part][1])


def _normal(rng, rows, n, scale=1.0):
    return (rng.standard_normal((rows, n)) * scale / np.sqrt(n)).astype("<f4")


def _matrix(rng, name, n, rows, scale=1.5):
    return Tensor(name, (n, rows), data=_normal(rng, rows, n, scale).tobytes())


def _vector(rng, name, n, largest=1.5):
    return Tensor(name, (n,), data=rng.uniform(0.5, largest, n).astype("<f4").tobytes())
