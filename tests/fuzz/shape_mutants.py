"""Mutants of shapes and of hyperparameters against each other, of small models that can be run as they are."""

import functools
import random
import struct

from gguf_files import ARR, BOOL, F32, STR, U32
from model.forward.architectures import MAKERS

from fuzz.gguf_mutants import Gguf, value_fields

WIDTH, HEADS, SHARED, INNER, TOKENS, LAYERS, EXPERTS = 64, 4, 2, 96, 32, 2, 4
KEYS = {
    "block_count": LAYERS,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": SHARED,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
EXPERT_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 32}
# keys that a sound model may have too, with values that disturb it
FURTHER = {
    "rope.dimension_count": (0, 2, 7, 8, 16, 17, 32, 2**31 - 1),
    "attention.key_length": (0, 1, 8, 16, 32, 2**31 - 1),
    "attention.value_length": (0, 1, 8, 16, 32, 2**31 - 1),
    "expert_count": (0, 1, 4, 5, 2**31),
    "expert_used_count": (0, 1, 4, 5, 2**31),
    "expert_feed_forward_length": (0, 16, 32, 96),
    "nextn_predict_layers": (0, 1, 2, 3),
    "attention.sliding_window": (0, 1, 8, 2**31 - 1),
    "rope.freq_base": (0.0, -1.0, 1.0, 1e-30, 3e38, float("nan")),
    "rope.scaling.factor": (0.0, -1.0, 1e-30, 3e38, float("inf")),
    "rope.scaling.original_context_length": (0, 1, 16),
    "attn_logit_softcapping": (0.0, -1.0, 1e-30),
    "vocab_size": (0, 1, TOKENS, 2**31),
}
SCALING = ("none", "linear", "yarn", "longrope", "dynamic")
COUNTS = (0, 1, 2, 3, 5, 8, 31, 63, 65, 128, 255, 512, 513, 2**31 - 1, 2**32 - 1)
SIZES = (0, 1, 2, 3, 16, 31, 33, 48, 63, 65, 96, 128, 256, 2**20, 2**31, 2**62, 2**63 - 1)
TYPES = (0, 1, 2, 8, 12, 14, 16, 24, 25, 26, 27, 28, 30, 39, 40)
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma", "gemma2", "gemma3", "exotic")
DATA = b"".join(struct.pack("<e", random.Random(i).gauss(0, 0.1)) for i in range(2**17))


def _layer(index, *, experts):
    keys = WIDTH // HEADS * SHARED
    tensors = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    tensors |= {"attn_k": (WIDTH, keys), "attn_v": (WIDTH, keys)}
    if experts:
        tensors |= {"ffn_gate_inp": (WIDTH, EXPERTS), "ffn_down_exps": (32, WIDTH, EXPERTS)}
        tensors |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (WIDTH, 32, EXPERTS))
    else:
        tensors |= {"ffn_gate": (WIDTH, INNER), "ffn_up": (WIDTH, INNER), "ffn_down": (INNER, WIDTH)}
    return [[f"blk.{index}.{part}.weight".encode(), shape, 1] for part, shape in tensors.items()]


def sound(*, experts=False):
    """A model of two layers that can be run, with or without experts."""
    arch = "qwen3moe" if experts else "llama"
    pairs = [(b"general.architecture", value_fields(STR, arch))]
    for key, value in (KEYS | (EXPERT_KEYS if experts else {})).items():
        pairs.append((f"{arch}.{key}".encode(), value_fields(F32 if isinstance(value, float) else U32, value)))
    tensors = [[b"token_embd.weight", (WIDTH, TOKENS), 1], [b"output_norm.weight", (WIDTH,), 1]]
    for index in range(LAYERS):
        tensors += _layer(index, experts=experts)
    return Gguf(pairs, [*tensors, [b"output.weight", (WIDTH, TOKENS), 1]], data=DATA)


# of architectures.py: a mixer or a feed-forward part of each kind
OTHERS = (
    *("qwen35moe", "qwen3next", "gemma4-experts", "gemma4-side", "gpt-oss", "glm4moe", "deepseek2", "deepseek32"),
    *("nemotron_h_moe-latent", "granitehybrid", "falcon-h1", "lfm2moe", "kimi-linear", "bailingmoe3", "laguna"),
)


@functools.cache
def other(name):
    """A model of architectures.py with F16 weights and no vocabulary but the rows of its embedding."""
    model = MAKERS[name](1)
    pairs = [(b"general.architecture", value_fields(STR, model.arch))]
    for key, value in model.keys.items():
        kinds = {bool: BOOL, int: U32, float: F32, str: STR}
        kind = kinds[type(value[0] if isinstance(value, list) else value)]
        fields = value_fields(ARR, (kind, value)) if isinstance(value, list) else value_fields(kind, value)
        pairs.append((f"{model.arch}.{key}".encode(), fields))
    tensors = []
    for tensor in model.tensors:
        tensors.append([tensor.name.encode(), tuple(TOKENS if n == 257 else n for n in tensor.shape), 1])
    return Gguf(pairs, tensors, data=DATA * 2)


def other_mutant(rng):
    """Bytes of a model of another architecture with up to three changes."""
    gguf = other(rng.choice(OTHERS)).copy()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice((_edit_key, _edit_key, _edit_key, _edit_shape, _edit_shape, _edit_size, _edit_tensor))(rng, gguf)
    return b"".join(gguf.fields())


def shape_mutant(rng):
    """Bytes of a model with up to three changes to its keys and shapes."""
    gguf = sound(experts=rng.random() < 0.3)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice((_edit_key, _edit_key, _add_key, _edit_shape, _edit_shape, _edit_size, _edit_tensor))(rng, gguf)
    return b"".join(gguf.fields())


def _edit_key(rng, gguf):
    """Replace the value of a key, by an item per layer now and then, or leave the key out."""
    i = rng.randrange(len(gguf.pairs))
    key = gguf.pairs[i][0]
    kind = rng.random()
    if i == 0:
        arch = rng.choice(FAMILIES)
        gguf.pairs = [(arch.encode() + key[key.index(b".") :], fields) for key, fields in gguf.pairs]
        gguf.pairs[0] = (b"general.architecture", value_fields(STR, arch))
    elif kind < 0.1:
        del gguf.pairs[i]
    elif kind < 0.25:
        items = [rng.choice(COUNTS[:8]) for _ in range(rng.choice((0, 1, LAYERS, LAYERS, LAYERS + 1)))]
        gguf.pairs[i] = (key, value_fields(ARR, (U32, items)))
    else:
        gguf.pairs[i] = (key, value_fields(U32, rng.choice(COUNTS)))


def _add_key(rng, gguf):
    arch = gguf.pairs[0][1][2]
    if rng.random() < 0.1:
        gguf.pairs.append((arch + b".rope.scaling.type", value_fields(STR, rng.choice(SCALING))))
        return
    key = rng.choice(tuple(FURTHER))
    value = rng.choice(FURTHER[key])
    pair = (arch + b"." + key.encode(), value_fields(F32 if isinstance(value, float) else U32, value))
    gguf.pairs = [p for p in gguf.pairs if p[0] != pair[0]] + [pair]


def _edit_shape(rng, gguf):
    """Change the shape of one tensor: a dimension, their order or their number."""
    tensor = rng.choice(gguf.tensors)
    shape, kind = list(tensor[1]), rng.random()
    at = rng.randrange(len(shape) + 1)
    if kind < 0.2:
        shape.reverse()
    elif kind < 0.35:
        shape.insert(at, rng.choice((0, 1, 2, 2**62)))
    elif kind < 0.5:
        del shape[at:]
    elif kind < 0.6:
        shape[:1] = [shape[0] // 4, 4] if shape else []
    elif shape:
        shape[at - 1] = rng.choice((*SIZES, shape[at - 1] - 1, shape[at - 1] + 1, 2 * shape[at - 1]))
    tensor[1] = tuple(shape)


def _edit_size(rng, gguf):
    """Give every dimension of one size another: shapes that fit each other, but not the keys."""
    old, new = rng.choice((WIDTH, INNER, TOKENS, EXPERTS, 32)), rng.choice((16, 32, 48, 64, 96, 128))
    for tensor in gguf.tensors:
        tensor[1] = tuple(new if n == old else n for n in tensor[1])


def _edit_tensor(rng, gguf):
    """Give a tensor another type, layer or name, take it out, or double it under another name."""
    i = rng.randrange(len(gguf.tensors))
    tensor, kind = gguf.tensors[i], rng.random()
    if kind < 0.4:
        tensor[2] = rng.choice(TYPES)
    elif kind < 0.6:
        del gguf.tensors[i]
    elif kind < 0.8:
        layer = b"blk.%d." % rng.choice((0, 1, 2, 7, 511, 2**31))
        tensor[0] = layer + tensor[0].split(b".", 2)[-1]
    else:
        suffix = rng.choice((b"bias", b"scale", b"weight"))
        gguf.tensors.append([tensor[0].rpartition(b".")[0] + b"." + suffix, tensor[1][1:], 0])
