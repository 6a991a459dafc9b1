"""The memory that running a model takes: the largest layer's weights, and activations in proportion to the tokens."""

from __future__ import annotations

from collections import defaultdict

from requant.model.forward.passes import EMBEDDING, LOGITS, OUTPUT, RunnableModel

_BASE = 200 * 2**20  # the interpreter, NumPy, Numba and the kernels
_FLOAT = 4


def memory_needs(model: RunnableModel, n_ctx: int, threads: int, gradients: bool) -> tuple[int, int]:
    """Return the fixed bytes and the bytes that each window adds.

    Fixed: the weights of the largest layer, or of the output matrix, as float32 while their bytes are being decoded,
    and per thread one window's activations of a layer or one part of the logits. Neither grows with the layers.
    """
    hp = model.architecture.hp
    layers: dict[str, int] = defaultdict(int)
    largest: dict[str, int] = defaultdict(int)
    for tensor in model.weights.source.tensors:
        key = ".".join(tensor.name.split(".")[:2]) if tensor.name.startswith("blk.") else tensor.name
        layers[key] += tensor.n_weights * _FLOAT
        largest[key] = max(largest[key], tensor.n_bytes)
    if OUTPUT in layers:
        layers.pop(EMBEDDING)
    weights = max(layers[key] + largest[key] for key in layers)
    heads = max(hp.n_head) * hp.key_length
    feed = max((*hp.n_ff, hp.n_ff_expert * hp.n_expert_used))
    per_token = 12 * hp.n_embd + 8 * heads + 8 * feed + 2 * max(hp.n_head) * n_ctx
    logits = 4 * min(LOGITS, n_ctx * hp.n_vocab)
    active = threads * _FLOAT * max(n_ctx * per_token, logits)
    stream = n_ctx * hp.n_embd * _FLOAT
    return _BASE + weights + active, stream * (5 if gradients else 2)
