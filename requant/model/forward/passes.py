"""The whole model over windows of tokens, forward and backward; one layer's weights are in memory at a time.

Arrays of all windows are (n_windows, n_ctx, n_embd). Each window starts at position 0 and sees no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant.errors import BadInput, NumericFault
from requant.model.forward.architecture import Architecture, read_architecture
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import Blind, Layer, Watch
from requant.model.forward.ops import Array, causal_mask, rms_norm, soft_cap
from requant.model.forward.rope import rotation
from requant.model.forward.weights import Weights

Tokens = NDArray[np.int32]  # (n_windows, n_ctx)
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
BLIND: Watch = Blind()
LOGITS = 2**25  # values of logits held at a time
_BLOCK = 512  # logits of which one sum is drawn from first


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be run."""

    architecture: Architecture
    weights: Weights

    @property
    def embedding_scale(self) -> float:
        """What the rows of the embedding are multiplied by."""
        return float(self.architecture.hp.n_embd) ** 0.5 if self.architecture.family.scaled_embedding else 1.0

    @property
    def output_name(self) -> str:
        """The matrix that gives the logits."""
        return OUTPUT if OUTPUT in self.weights.source else EMBEDDING


def model_of(weights: Weights) -> Model:
    """The model of these weights; raises BadInput where it cannot be run."""
    return Model(read_architecture(weights.source), weights)


def check_tokens(model: Model, tokens: Tokens) -> None:
    """Raise BadInput for ids that are not in the vocabulary."""
    n_vocab = model.weights.source.tensor(EMBEDDING).n_rows
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        bad = tokens[(tokens < 0) | (tokens >= n_vocab)][0]
        raise BadInput(model.weights.source.path, "has no such token", got=int(bad), limit=f"ids below {n_vocab}")


def embedded(model: Model, tokens: Tokens) -> Array:
    """The stream that enters the first layer."""
    ids, place = np.unique(tokens, return_inverse=True)
    rows = model.weights.rows(EMBEDDING, ids) * model.weights.dtype(model.embedding_scale)
    stream: Array = rows[place.reshape(tokens.shape)]
    return stream


def layers(model: Model, n_ctx: int, watch: Watch, order: Iterator[int]) -> Iterator[Layer]:
    """The layers of `order` one after the other, ready to run windows of `n_ctx` tokens."""
    architecture, dtype = model.architecture, model.weights.dtype
    masks = {size: causal_mask(n_ctx, size, dtype) for size in set(architecture.windows)}
    factors = _factors(model, n_ctx)
    full = rotation(architecture.rope, n_ctx, factors, dtype)
    swa = rotation(architecture.rope_swa, n_ctx, None, dtype)
    for index in order:
        window = architecture.windows[index]
        weights = model.weights.layer(index)
        yield Layer(architecture, index, weights, swa if window else full, masks[window], watch)


def forward(
    model: Model,
    tokens: Tokens,
    *,
    watch: Watch = BLIND,
    checkpoints: Checkpoints | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> Array:
    """The stream behind the last layer; `checkpoints` get every layer's input, `done` its index when it is done.

    Raises NumericFault, naming the layer, where the stream is no longer finite.
    """
    x = embedded(model, tokens)
    for layer in layers(model, tokens.shape[1], watch, iter(range(model.architecture.n_layers))):
        if checkpoints is not None:
            checkpoints.put(layer.index, x)
        for window in x:
            window[...] = layer.run(window)[0]
        check_finite(model, x, layer.index)
        done(layer.index)
    return x


def backward(
    model: Model,
    g: Array,
    checkpoints: Checkpoints,
    *,
    watch: Watch,
    done: Callable[[Layer], None] = lambda _: None,
) -> None:
    """Turn `g`, the gradient behind the last layer, into that at the embedding; `done` gets each layer after it."""
    x = np.empty_like(g)
    for layer in layers(model, g.shape[1], watch, iter(reversed(range(model.architecture.n_layers)))):
        checkpoints.take(layer.index, x)
        for window, gradient in zip(x, g, strict=True):
            gradient[...] = layer.run(window)[1](gradient)
        done(layer)


def check_finite(model: Model, x: Array, layer: int) -> None:
    """Raise NumericFault where the stream behind `layer` holds a NaN or an infinity."""
    if not np.isfinite(x).all():
        hint = "the file is damaged, or its weights do not suit this architecture"
        raise NumericFault(model.weights.source.path, f"activations behind layer {layer} are not finite", hint=hint)


@dataclass(frozen=True, slots=True)
class Head:
    """From the stream to the logits."""

    model: Model
    norm: Array
    matrix: Array
    bias: Array | None

    def rows(self) -> int:
        """Tokens whose logits are worked out together."""
        return max(16, LOGITS // len(self.matrix))

    def run(self, x: Array, watch: Watch = BLIND) -> tuple[Array, Callable[..., Array]]:
        """x: (n, n_embd) -> logits (n, n_vocab); back: their gradient, and what `watch` is shown in its place."""
        architecture = self.model.architecture
        normed, back_norm = rms_norm(x, self.norm, architecture.eps)
        watch.inputs(self.model.output_name, None, normed)
        logits = normed @ self.matrix.T
        if self.bias is not None:
            logits += self.bias
        logits, back_cap = soft_cap(logits, architecture.logit_cap)

        def back(g: Array, shown: Array) -> Array:
            watch.gradients(self.model.output_name, None, normed, back_cap(shown))
            return back_norm(back_cap(g) @ self.matrix)

        return logits, back


def head_of(model: Model) -> Head:
    """The head with its matrix decoded."""
    norm, matrix = model.weights.get("output_norm.weight"), model.weights.get(model.output_name)
    assert norm is not None
    assert matrix is not None
    return Head(model, norm, matrix, model.weights.get("output.bias"))


def log_probabilities(logits: Array) -> Array:
    """Natural logarithms of the softmax; logits are overwritten with them."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(logits.dtype)
    return logits


def fisher_gradient(head: Head, x: Array, rng: np.random.Generator, watch: Watch) -> None:
    """Replace x (n, n_embd), the stream behind the last layer, by the gradient of the log-likelihood of labels there.

    The labels are drawn from the model's own distribution p, so that squared gradients have the true Fisher information
    as their mean. At the logits that mean is known, p (1 - p), and `watch` is shown its root, which no draw blurs.
    """
    for start in range(0, len(x), head.rows()):
        part = x[start : start + head.rows()]
        logits, back = head.run(part, watch)
        p = np.exp(log_probabilities(logits))
        labels = drawn(p, rng)
        spread = np.sqrt(p * (1 - p))
        np.negative(p, out=p)
        p[np.arange(len(p)), labels] += 1
        part[...] = back(p, spread)


def drawn(p: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """One index per row of p (n, n_vocab), drawn with its probabilities."""
    n, n_vocab = p.shape
    starts = np.arange(0, n_vocab, _BLOCK)
    ends = np.cumsum(np.add.reduceat(p, starts, axis=1, dtype=np.float64), axis=1)
    targets = rng.random(n) * ends[:, -1]
    blocks = np.minimum((ends <= targets[:, None]).sum(axis=1), len(starts) - 1)
    before = np.where(blocks > 0, ends[np.arange(n), blocks - 1], 0)
    labels = np.empty(n, np.intp)
    for row, block in enumerate(blocks):
        inner = np.cumsum(p[row, starts[block] : starts[block] + _BLOCK], dtype=np.float64)
        found = int(np.searchsorted(inner, targets[row] - before[row], side="right"))
        labels[row] = starts[block] + min(found, len(inner) - 1)
    return labels


def _factors(model: Model, n_ctx: int) -> NDArray[np.float32] | None:
    """What the angles' frequencies are divided by: the model's own, or those for contexts of this length."""
    architecture, source = model.architecture, model.weights.source
    long = n_ctx > architecture.rope.n_ctx_orig
    for name in ("rope_freqs", "rope_factors_long" if long else "rope_factors_short"):
        for prefix in ("", "blk.0."):
            if f"{prefix}{name}.weight" in source:
                found = Weights(source).get(f"{prefix}{name}.weight")
                assert found is not None
                return found.reshape(-1)[: architecture.rope.n_dims // 2]
    return None
