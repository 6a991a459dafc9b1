"""Stages of a layer: its matrices in the order in which they are used, those that share their inputs together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from requant.model.forward.decoder import run_layer
from requant.model.forward.layer import Hook, Layer, NullHook
from requant.model.forward.ops import linear
from requant.model.forward.side_inputs import LayerEmbedding, SideInputs
from requant.model.forward.tape import Array, Node


@dataclass(frozen=True, slots=True)
class Stage:
    """Matrices of a layer with the same inputs; `names` are within the layer.

    several: each is one matrix for each expert or head, with inputs of its own. writers: those whose result is added to
    the residual stream as it is, so that an error in the stream can be made up for.
    """

    names: tuple[str, ...]
    several: bool
    writers: frozenset[str]


@dataclass(slots=True)
class Stream:
    """The residual stream of all windows (n_windows, n_ctx, n_embd), and what its layers share beside it."""

    x: Array
    side: SideInputs | None

    def run(self, layer: Layer, window: int, hook: Hook, embedding: LayerEmbedding | None) -> Array:
        """Return the stream of a window behind the layer."""
        own = None if self.side is None else self.side.window(window, embedding)
        out: Array = run_layer(replace(layer, hook=hook, side=own), Node(self.x[window])).value
        if self.side is not None and own is not None:
            self.side.store(window, own)
        return out


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a stage in one window: by expert or head, or None, (n_tokens, n_per_row) and their tokens.

    stream: the residual stream (n_ctx, n_embd) to which the results of its writers are added.
    """

    by_matrix: Mapping[int | None, tuple[Array, Array | None]]
    stream: Array


def find_stages(layer: Layer, stream: Stream, embedding: LayerEmbedding | None) -> list[Stage]:
    """Return the stages of a layer, as its first window runs them."""
    seen = _Order(layer.weights)
    stream.run(layer, 0, seen, embedding)
    groups: list[tuple[Array, int | None, list[str]]] = []
    known: set[str] = set()
    for name, expert, x in seen.products:
        if name in known:
            continue
        known.add(name)
        group = next((g for g in groups if g[0] is x and g[1] == expert), None)
        if group is None:
            groups.append((x, expert, [name]))
        else:
            group[2].append(name)
    return [
        Stage(tuple(names), expert is not None, frozenset(seen.writers.intersection(names)))
        for _, expert, names in groups
    ]


def read_inputs(stage: Stage, layer: Layer, stream: Stream, window: int, embedding: LayerEmbedding | None) -> Inputs:
    """Run a layer over a window as far as the stage, and return its inputs."""
    watch = _Watch(stage, stream.x[window])
    with contextlib.suppress(_ReachedError):
        stream.run(layer, window, watch, embedding)
    return Inputs(watch.found, watch.stream)


class _ReachedError(Exception):
    """Raised to leave a layer where the inputs of a stage are known."""


@dataclass(slots=True)
class _Order(NullHook):
    """A hook that keeps the products of a layer in order, and finds those whose results are added to the stream."""

    weights: Mapping[str, Array]
    products: list[tuple[str, int | None, Array]] = field(default_factory=list)
    writers: set[str] = field(default_factory=set)

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Keep the product."""
        self.products.append((name, expert, x))

    def added(self, part: Array, stream: Array) -> None:
        """Compare what is added with the result of the last product."""
        name, expert, x = self.products[-1]
        weight, bias = self.weights[name], self.weights.get(f"{name.removesuffix('.weight')}.bias")
        if expert is None and weight.ndim == 2 and len(weight) == part.shape[1]:
            result = linear(x, weight, bias, lambda *_: None).value
            if np.array_equal(result, part):
                self.writers.add(name)


@dataclass(slots=True)
class _Watch(NullHook):
    """A hook that keeps the inputs of a stage, and the stream behind the last addition."""

    stage: Stage
    stream: Array
    found: dict[int | None, tuple[Array, Array | None]] = field(default_factory=dict)
    chosen: Array | None = None

    def selected(self, x: Array, tokens: Array) -> None:
        """Keep the tokens of the expert that is run next."""
        self.chosen = tokens

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Keep the inputs of the first of the stage's matrices."""
        if name not in self.stage.names:
            return
        self.found.setdefault(expert, (x, None if expert is None else self.chosen))
        if not self.stage.several:
            raise _ReachedError

    def added(self, part: Array, stream: Array) -> None:
        """Keep the stream."""
        self.stream = stream
