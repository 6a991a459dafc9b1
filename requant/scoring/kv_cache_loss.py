"""Loss of a KV cache in a smaller type, measured by the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from requant.container.source import Source
from requant.formats import BlockFormat, Effort, codec, format_of
from requant.model.forward.passes import Tokens, forward, read_head, read_model
from requant.model.forward.tape import Array
from requant.model.forward.weights import Weights
from requant.scoring.evaluate import judge, summary

CACHES = (("Q8_0", "Q8_0"), ("Q8_0", "Q5_1"), ("Q5_1", "Q5_1"), ("Q4_0", "Q4_0"))  # types of K and V to measure


def cache_losses(
    source: Source, tokens: Tokens, *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """Return the divergence on `tokens` of `source` with each KV cache, by "K type/V type", from an exact one.

    Keys and values are rounded without the Hadamard transform that llama.cpp applies first, which can only help. Types
    whose blocks do not divide a head are left out. `progress` is called with models that were run.
    """
    base = read_model(Weights(source))
    sizes = [n for il in range(base.architecture.n_layers) for n in base.architecture.head_sizes(il)]
    reference = read_head(base), forward(base, tokens, threads=threads)
    progress(1)
    found: dict[str, float] = {}
    for k, v in CACHES:
        formats = format_of(k), format_of(v)
        if all(fmt.divides(n) for fmt in formats for n in sizes):
            model = replace(base, round_cache=partial(_round_cache, *formats))
            stream = forward(model, tokens, threads=threads)
            kld = summary(judge(read_head(model), stream, tokens, reference, threads), tokens).mean_kld
            found[f"{k}/{v}"] = max(0.0, kld or 0.0)
        progress(1)
    return found


def _round_cache(k_format: BlockFormat, v_format: BlockFormat, keys: Array, values: Array) -> tuple[Array, Array]:
    """Return keys and values (n_tokens, n_heads, size) as a cache of these types holds them; FAST, as in the engine."""

    def round_trip(x: Array, fmt: BlockFormat) -> Array:
        flat = np.ascontiguousarray(x.reshape(len(x), -1), np.float32)
        return codec.reconstruct(flat, fmt, None, Effort.FAST, 1.0).reshape(x.shape).astype(x.dtype, copy=False)

    return round_trip(keys, k_format), round_trip(values, v_format)
