"""Rotary position embedding: the angles of every pair of dimensions, and the rotation by them.

Scaling: linear, yarn, and factors per frequency (llama3, longrope). Sources: ggml_rope_cache_init and rope_yarn in
ggml/src/ggml-cpu/ops.cpp, llama-context.cpp and llama-model.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.model.forward.tape import Array, Backward, Node, primitive


@dataclass(frozen=True, slots=True)
class Rope:
    """The parameters that turn positions into angles.

    halves: dimension i rotates with i + n_dims/2, else with its neighbour. scale: of the angles, 1 without scaling;
    yarn: whether low frequencies alone are scaled; n_ctx_orig: the context that the model was trained for.
    attn_factor: a factor on the length of the rotated vectors, beside that of yarn. still: pairs that do not rotate.
    """

    n_dims: int
    halves: bool
    base: float
    scale: float = 1.0
    yarn: bool = False
    n_ctx_orig: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    still: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rotation:
    """The cosines and sines, each (n_tokens, 1, n_dims/2), of a window's positions."""

    cos: Array
    sin: Array
    halves: bool

    def apply(self, x: Node) -> Node:
        """Rotate the first n_dims dimensions of x (n_tokens, n_head, d)."""
        return _rotate(x, self)


@primitive
def _rotate(x: Array, by: Rotation) -> tuple[Array, Backward]:
    n = by.cos.shape[-1]
    first = np.s_[..., :n] if by.halves else np.s_[..., 0 : 2 * n : 2]
    second = np.s_[..., n : 2 * n] if by.halves else np.s_[..., 1 : 2 * n : 2]

    def turn(x: Array, sin: Array) -> Array:
        out = x.copy()
        a, b = x[first], x[second]
        out[first] = a * by.cos - b * sin
        out[second] = a * sin + b * by.cos
        return out

    return turn(x, by.sin), lambda g: turn(g, -by.sin)


def rotation(rope: Rope, n_tokens: int, factors: NDArray[np.float32] | None, dtype: Any) -> Rotation:
    """Return the rotation of positions 0 to n_tokens - 1; factors: (n_dims/2,) divisors of the frequencies."""
    i = np.arange(0, rope.n_dims, 2)
    frequencies = rope.base ** (-i / rope.n_dims)
    frequencies[[*rope.still]] = 0
    if factors is not None:
        frequencies = frequencies / factors.astype(np.float64)
    length = rope.attn_factor
    scaled = frequencies * rope.scale
    if rope.yarn:
        unscaled = _unscaled_share(rope)
        scaled = scaled * (1 - unscaled) + frequencies * unscaled
        length *= 1 + 0.1 * math.log(1 / rope.scale)
    angles = np.arange(n_tokens)[:, None, None] * scaled
    return Rotation((np.cos(angles) * length).astype(dtype), (np.sin(angles) * length).astype(dtype), rope.halves)


def _unscaled_share(rope: Rope) -> NDArray[np.float64]:
    """Return 1 for pairs that turn often in the original context and stay unscaled, 0 for those that hardly turn."""
    if rope.base == 1:  # then all pairs turn alike
        return np.ones(rope.n_dims // 2)

    def pair_with(turns: float) -> float:
        return rope.n_dims * math.log(rope.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(0, math.floor(pair_with(rope.beta_fast)))
    high = min(rope.n_dims - 1, math.ceil(pair_with(rope.beta_slow)))
    ramp = (np.arange(rope.n_dims // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(ramp, 0, 1)
