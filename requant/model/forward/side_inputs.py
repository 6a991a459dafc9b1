"""Arrays that layers share beside the residual stream: keys and values of earlier layers, and embeddings per layer.

Layers of Gemma 4's small models read keys and values that an earlier layer computed, and rows of a second embedding
with a projection of the first one. On the way back, their gradients are added up until the layer that made them runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from requant.model.forward.ops import rms_norm
from requant.model.forward.tape import Array, Node, Tape

if TYPE_CHECKING:
    from requant.model.forward.architecture import Architecture
    from requant.model.forward.weights import Weights

TABLE = "per_layer_token_embd.weight"
KeysValues = tuple[Array, Array]


@dataclass(slots=True)
class SideInputs:
    """The shared arrays of a run over windows of tokens, and the sums of their gradients.

    embedded: the stream that enters the first layer, (n_windows, n_ctx, n_embd), and its gradient; kept: layer ->
    window -> keys and values, and their gradients by (layer, window). squares: of the gradients of the second
    embedding's rows in use, summed over windows, (n_ids, n_layers * n_side).
    """

    architecture: Architecture
    weights: Weights
    tokens: Array
    embedded: Array
    embedded_gradient: Array
    kept: dict[int, dict[int, KeysValues]] = field(default_factory=dict)
    kept_gradients: dict[tuple[int, int], KeysValues] = field(default_factory=dict)
    squares: Array | None = None

    def layer_embedding(self, index: int) -> LayerEmbedding | None:
        """Read the second embedding's part for a layer; None where the model has none."""
        width = self.architecture.hp.n_side
        if not width:
            return None
        ids = np.unique(self.tokens)
        part = slice(index * width, (index + 1) * width)
        projection = self.weights.rows("per_layer_model_proj.weight", np.arange(part.start, part.stop))
        norm = self.weights.get("per_layer_proj_norm.weight")
        assert norm is not None
        return LayerEmbedding(index, ids, self.weights.rows(TABLE, ids)[:, part], projection, norm)

    def window(self, window: int, embedding: LayerEmbedding | None, tape: Tape | None = None) -> WindowInputs:
        """Return the shared arrays of one window for one layer, as leaves of `tape`."""
        kept = {layer: by_window[window] for layer, by_window in self.kept.items() if window in by_window}
        return WindowInputs(self.architecture, Node(self.embedded[window], tape), kept, embedding, self.tokens[window])

    def store(self, window: int, found: WindowInputs) -> None:
        """Keep the keys and values that a layer made, where later layers read them."""
        for layer, (keys, values) in found.made.items():
            self.kept.setdefault(layer, {})[window] = keys.value, values.value

    def ends(self, window: int, found: WindowInputs) -> list[tuple[Node, Array]]:
        """Return the keys and values that a layer made, with the gradients that later layers gave."""
        ends = []
        for layer, nodes in found.made.items():
            gradients = self.kept_gradients.pop((layer, window), None)
            ends += [] if gradients is None else list(zip(nodes, gradients, strict=True))
        return ends

    def collect(self, window: int, found: WindowInputs) -> None:
        """Add the gradients that one layer gave to the arrays that it read."""
        for layer, nodes in found.read.items():
            gradients = tuple(np.zeros_like(node.value) if node.grad is None else node.grad for node in nodes)
            before = self.kept_gradients.get((layer, window))
            sums = gradients if before is None else tuple(a + b for a, b in zip(before, gradients, strict=True))
            self.kept_gradients[layer, window] = sums[0], sums[1]
        if found.embedded.grad is not None:
            self.embedded_gradient[window] += found.embedded.grad

    def collect_rows(self, embedding: LayerEmbedding, by_window: Mapping[int, WindowInputs]) -> None:
        """Add the squared gradients of the second embedding's rows in one layer, of all windows in order."""
        width = self.architecture.hp.n_side
        if self.squares is None:
            shape = len(embedding.ids), width * self.architecture.n_layers
            self.squares = np.zeros(shape, self.embedded.dtype)
        part = self.squares[:, embedding.index * width : (embedding.index + 1) * width]
        for window in sorted(by_window):
            rows = by_window[window].rows
            if rows is None or rows.grad is None:
                continue
            sums = np.zeros_like(part)
            np.add.at(sums, np.searchsorted(embedding.ids, self.tokens[window]), rows.grad)
            part += sums * sums


@dataclass(frozen=True, slots=True)
class LayerEmbedding:
    """The second embedding of one layer: the rows (n_ids, n) of `ids`, and the projection (n, n_embd) with its norm."""

    index: int
    ids: Array
    table: Array
    projection: Array
    norm: Array


@dataclass(slots=True)
class WindowInputs:
    """The shared arrays of one window for one layer: leaves that it reads, and keys and values that it makes."""

    architecture: Architecture
    embedded: Node
    kept: Mapping[int, KeysValues]
    embedding: LayerEmbedding | None
    tokens: Array
    made: dict[int, tuple[Node, Node]] = field(default_factory=dict)
    read: dict[int, tuple[Node, Node]] = field(default_factory=dict)
    rows: Node | None = None

    def keep(self, layer: int, keys: Node, values: Node) -> None:
        """Keep keys and values where later layers read them."""
        if layer in self.architecture.kept_layers:
            self.made[layer] = keys, values

    def take(self, layer: int) -> tuple[Node, Node]:
        """Return the keys and values of an earlier layer."""
        keys, values = (Node(x, self.embedded.tape) for x in self.kept[layer])
        self.read[layer] = keys, values
        return keys, values

    def side_embedding(self) -> Node:
        """Return the second embedding of the tokens in this layer, (n_tokens, n)."""
        embedding, architecture = self.embedding, self.architecture
        assert embedding is not None
        own = embedding.table[np.searchsorted(embedding.ids, self.tokens)]
        self.rows = Node(own, self.embedded.tape)
        projected = self.embedded @ (embedding.projection.T * architecture.hp.n_embd**-0.5)
        projected = rms_norm(projected, embedding.norm, architecture.eps)
        joined: Node = (projected + self.rows * architecture.hp.n_side**0.5) * 2**-0.5
        return joined
