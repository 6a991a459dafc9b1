"""One decoder layer over one window of tokens, written forward only: the tape gives the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from requant.model.forward.ops import layer_norm, linear, rms_norm
from requant.model.forward.tape import Array, Node

if TYPE_CHECKING:
    from requant.model.forward.architecture import Architecture
    from requant.model.forward.rope import Rotation
    from requant.model.forward.side_inputs import WindowInputs


class Hook(Protocol):
    """An observer of every matrix product.

    name: of the tensor within its layer, or within the model for the output; expert: its index, or that of a head with
    a matrix of its own, None for other matrices.
    """

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Observe the inputs of a product, x: (n_tokens, n_per_row)."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Observe the gradient of the log-likelihood at the product, g: (n_tokens, n_rows), with the inputs x."""

    def selected(self, x: Array, tokens: Array) -> None:
        """Observe that x holds the inputs of an expert, a row for each of these tokens of the window."""

    def added(self, part: Array, stream: Array) -> None:
        """Observe that `part` is added to the residual stream, which becomes `stream`."""


class NullHook:
    """A hook that does nothing."""

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Ignore the product."""

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Ignore the gradient."""

    def selected(self, x: Array, tokens: Array) -> None:
        """Ignore the selection."""

    def added(self, part: Array, stream: Array) -> None:
        """Ignore the addition."""


NULL_HOOK: Hook = NullHook()

# keys and values (n_tokens, n_heads, size) -> the same as the cache holds them
CacheRounding = Callable[[Array, Array], tuple[Array, Array]]


def exact_cache(keys: Array, values: Array) -> tuple[Array, Array]:
    """Return the keys and values as they are: a cache that rounds nothing."""
    return keys, values


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with its weights, its rotation for windows of one length (None without), and what a window brings.

    hook: of the window; side: the arrays that its layers share beside the stream, None in models without them.
    """

    architecture: Architecture
    index: int
    weights: Mapping[str, Array]
    rotation: Rotation | None
    round_cache: CacheRounding
    hook: Hook = NULL_HOOK
    side: WindowInputs | None = None

    def has(self, part: str) -> bool:
        """Return whether the layer has the tensor `part`.weight, or `part` as some norms are called."""
        return f"{part}.weight" in self.weights or part in self.weights

    def norm(self, part: str, x: Node) -> Node:
        """Apply a norm, or return x itself where the layer does not have it."""
        weight = self.weights.get(f"{part}.weight", self.weights.get(part))
        if weight is None:
            return x
        eps = self.architecture.family.late_eps if part.startswith("post_") else 0.0
        return (layer_norm if self.architecture.layer_norm else rms_norm)(x, weight, eps or self.architecture.eps)

    def product(self, part: str, x: Node, expert: int | None = None) -> Node:
        """Multiply x (n_tokens, n_per_row) by the matrix `part`, or one of its matrices, and add its bias."""
        name = f"{part}.weight"
        weight, bias = self.weights[name], self.weights.get(f"{part}.bias")
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
        self.hook.inputs(name, expert, x.value)
        return linear(x, weight, bias, partial(self.hook.gradients, name, expert))

    def select(self, x: Node, tokens: Array) -> Node:
        """Return the rows of x of the tokens that an expert gets."""
        chosen = x[tokens]
        self.hook.selected(chosen.value, tokens)
        return chosen

    def add(self, x: Node, part: Node) -> Node:
        """Add a part's result to the residual stream x."""
        scale = self.architecture.residual_scale
        stream = x + (part if scale == 1.0 else part * scale)
        self.hook.added(part.value, stream.value)
        return stream

    def rotate(self, x: Node) -> Node:
        """Rotate queries or keys (n_tokens, n_head, d) by their positions, where the layer does."""
        return x if self.rotation is None else self.rotation.apply(x)
