"""The forward and backward pass of the whole model over windows of tokens, with one layer's weights in memory.

The windows of a layer run in parallel, with one BLAS thread each, so results do not depend on the number of threads.
Arrays of all windows are (n_windows, n_ctx, n_embd). Each window starts at position 0 and sees no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from requant.common.threads import for_each
from requant.errors import BadInput, NumericFault
from requant.model.forward.architecture import Architecture, read_architecture
from requant.model.forward.decoder import run_layer
from requant.model.forward.layer import NULL_HOOK, CacheRounding, Hook, Layer, exact_cache
from requant.model.forward.ops import layer_norm, rms_norm, soft_cap
from requant.model.forward.rope import rotation
from requant.model.forward.side_inputs import LayerEmbedding, SideInputs, WindowInputs
from requant.model.forward.tape import Array, Backward, Node, Tape
from requant.model.forward.weights import Weights

if TYPE_CHECKING:
    from requant.model.forward.checkpoints import Checkpoints

Tokens = NDArray[np.int32]  # (n_windows, n_ctx)
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
WindowHooks = Callable[[int], Hook]  # the hook of each window
LOGITS = 2**24  # logits that a thread holds at a time
SEED = 1  # of the draws of labels
_BLOCK = 512  # tokens in a block; a draw takes a block by its sum first, then a token in it


@dataclass(frozen=True, slots=True)
class RunnableModel:
    """A model that can be run: its architecture, its weights, and the rounding of its cache."""

    architecture: Architecture
    weights: Weights
    round_cache: CacheRounding = exact_cache

    @property
    def output_name(self) -> str:
        """The name of the matrix that gives the logits."""
        return OUTPUT if OUTPUT in self.weights.source else EMBEDDING

    @property
    def norm_name(self) -> str:
        """The name of the norm in front of the output matrix."""
        name = "output_norm.weight"
        return name if name in self.weights.source else "token_embd_norm.weight"

    def finish_logits(self, logits: Array) -> tuple[Array, Backward]:
        """Scale and cap the products with the output matrix, in place; return the logits and the derivative."""
        scale = logits.dtype.type(self.architecture.logit_scale)
        if scale != 1:
            logits *= scale
        logits, back = soft_cap(logits, self.architecture.logit_cap)
        return logits, back if scale == 1 else lambda g: back(g) * scale


def read_model(weights: Weights) -> RunnableModel:
    """Read the model of these weights; raise BadInput where it cannot be run."""
    return RunnableModel(read_architecture(weights.source), weights)


def check_tokens(model: RunnableModel, tokens: Tokens) -> None:
    """Raise BadInput for ids that are not in the vocabulary."""
    n_vocab = model.weights.source.tensor(EMBEDDING).n_rows
    reach = model.architecture.reach
    if reach and tokens.shape[1] > reach:
        what = "attends to tokens that an indexer picks, which is not run: windows may hold what it sees of all"
        raise BadInput(model.weights.source.path, what, got=tokens.shape[1], limit=reach, hint=f"--window {reach}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        bad = tokens[(tokens < 0) | (tokens >= n_vocab)][0]
        raise BadInput(model.weights.source.path, "has no such token", got=int(bad), limit=f"ids below {n_vocab}")


def embed(model: RunnableModel, tokens: Tokens, read_rows: Callable[[Array], Array] | None = None) -> Array:
    """Return the stream that enters the first layer.

    read_rows: returns rows of the embedding by their ids, by default those of the model.
    """
    ids, place = np.unique(tokens, return_inverse=True)
    raw = model.weights.rows(EMBEDDING, ids) if read_rows is None else read_rows(ids)
    rows = scale_rows(model, Node(raw)).value
    stream: Array = rows[place.reshape(tokens.shape)]
    return stream


def scale_rows(model: RunnableModel, rows: Node) -> Node:
    """Turn rows of the embedding into what enters the first layer."""
    architecture = model.architecture
    if architecture.family.normed_embedding:
        return rms_norm(rows, 1.0, architecture.eps)
    scaled: Node = rows * model.weights.dtype(architecture.embedding_scale)
    return scaled


def side_inputs(model: RunnableModel, tokens: Tokens, embedded: Array | None = None) -> SideInputs | None:
    """Return the arrays that layers share beside the stream; None for a model without them.

    embedded: the stream that enters the first layer, where it is not the model's own.
    """
    architecture = model.architecture
    if not architecture.hp.n_side and not architecture.n_shared:
        return None
    embedded = embed(model, tokens) if embedded is None else embedded
    return SideInputs(architecture, model.weights, tokens, embedded, np.zeros_like(embedded))


def layers(model: RunnableModel, n_ctx: int, order: Iterable[int]) -> Iterator[Layer]:
    """Yield the layers in `order`, ready to run windows of `n_ctx` tokens."""
    architecture, dtype = model.architecture, model.weights.dtype
    factors = _factors(model, n_ctx)
    full = swa = None
    if any(architecture.rotates):
        full = rotation(architecture.rope, n_ctx, factors, dtype)
        swa = rotation(architecture.rope_swa, n_ctx, None, dtype)
    for index in order:
        own = swa if architecture.windows[index] else full
        turn = own if architecture.rotates[index] else None
        yield Layer(architecture, index, model.weights.layer(index), turn, model.round_cache)


def forward(
    model: RunnableModel,
    tokens: Tokens,
    *,
    hook: WindowHooks = lambda _: NULL_HOOK,
    checkpoints: Checkpoints | None = None,
    on_layer: Callable[[Layer], None] = lambda _: None,
    threads: int | None = None,
    side: SideInputs | None = None,
) -> Array:
    """Return the stream behind the last layer.

    hook: returns the hook of a window; checkpoints: store every layer's input; on_layer: called with each layer after
    all windows passed it; side: of `side_inputs`, where the pass back needs it. Raises NumericFault, naming the layer,
    where the stream is no longer finite.
    """
    x = embed(model, tokens)
    side = side or side_inputs(model, tokens)
    for layer in layers(model, tokens.shape[1], range(model.architecture.n_layers)):
        if checkpoints is not None:
            checkpoints.put(layer.index, x)

        embedding = None if side is None else side.layer_embedding(layer.index)

        def run(window: int, layer: Layer = layer, embedding: LayerEmbedding | None = embedding) -> None:
            own = None if side is None else side.window(window, embedding)
            x[window] = run_layer(replace(layer, hook=hook(window), side=own), Node(x[window])).value
            if side is not None and own is not None:
                side.store(window, own)

        for_each(run, len(x), threads)
        _check_finite(model, x, f"activations behind layer {layer.index}")
        on_layer(layer)
    return x


def _check_finite(model: RunnableModel, x: Array, what: str) -> None:
    if not np.isfinite(x).all():
        hint = "the file is damaged, or its weights do not suit this architecture"
        raise NumericFault(model.weights.source.path, f"{what} are not finite", hint=hint)


def backward(
    model: RunnableModel,
    g: Array,
    checkpoints: Checkpoints,
    *,
    hook: WindowHooks,
    on_layer: Callable[[Layer], None] = lambda _: None,
    threads: int | None = None,
    side: SideInputs | None = None,
) -> None:
    """Replace `g`, the gradient behind the last layer, by the gradient at the embedding; see `forward`.

    Raises NumericFault, naming the layer, where the gradient is no longer finite.
    """
    x = np.empty_like(g)
    for layer in layers(model, g.shape[1], reversed(range(model.architecture.n_layers))):
        checkpoints.take(layer.index, x)

        embedding = None if side is None else side.layer_embedding(layer.index)
        shared: dict[int, WindowInputs] = {}

        def run(
            window: int,
            layer: Layer = layer,
            embedding: LayerEmbedding | None = embedding,
            shared: dict[int, WindowInputs] = shared,
        ) -> None:
            tape = Tape()
            stream = tape.leaf(x[window])
            own = None if side is None else side.window(window, embedding, tape)
            out = run_layer(replace(layer, hook=hook(window), side=own), stream)
            ends = [(out, g[window].copy())]  # a hook may keep it
            if side is None or own is None:
                tape.backward(ends)
            else:
                tape.backward([*ends, *side.ends(window, own)])
                side.collect(window, own)
                shared[window] = own
            g[window] = stream.grad

        for_each(run, len(x), threads)
        if side is not None and embedding is not None:
            side.collect_rows(embedding, shared)
        _check_finite(model, g, f"gradients at layer {layer.index}")
        on_layer(layer)
    if side is not None:
        g += side.embedded_gradient


@dataclass(frozen=True, slots=True)
class Head:
    """The output norm and matrix: from the stream to the logits."""

    model: RunnableModel
    norm: Array
    matrix: Array
    bias: Array | None

    def parts(self, n: int) -> list[slice]:
        """Split n tokens into parts whose logits fit in memory together."""
        rows = max(16, LOGITS // len(self.matrix))
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def normalize(self, x: Node) -> Node:
        """Apply the output norm: x (n, n_embd), the stream -> the inputs of the matrix."""
        return apply_output_norm(self.model, x, self.norm)

    def logits(self, normed: Array) -> tuple[Array, Backward]:
        """Return the logits (n, n_vocab); back: their gradient -> the gradient at the product with the matrix."""
        logits = normed @ self.matrix.T
        if self.bias is not None:
            logits += self.bias
        return self.model.finish_logits(logits)


def apply_output_norm(model: RunnableModel, x: Node, weight: Array) -> Node:
    """Apply the output norm with this weight: x (n, n_embd), the stream -> the inputs of the output matrix."""
    architecture = model.architecture
    return (layer_norm if architecture.layer_norm else rms_norm)(x, weight, architecture.eps)


def read_head(model: RunnableModel) -> Head:
    """Read the head and decode its matrix."""
    norm, matrix = model.weights.get(model.norm_name), model.weights.get(model.output_name)
    assert norm is not None
    assert matrix is not None
    return Head(model, norm, matrix, model.weights.get("output.bias"))


def log_probabilities(logits: Array) -> tuple[Array, Array]:
    """Replace the logits by the natural logarithms of their softmax; return them and log(sum(exp(logits))) (n, 1)."""
    largest = logits.max(axis=1, keepdims=True)
    logits -= largest
    log_sum = np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(logits.dtype)
    logits -= log_sum
    return logits, largest + log_sum


def output_gradient(
    model: RunnableModel,
    x: Array,
    *,
    first: int = 0,
    hook: WindowHooks = lambda _: NULL_HOOK,
    threads: int | None = None,
) -> tuple[Array, Array]:
    """Replace x, the stream behind the last layer, by the gradient of the log-likelihood of labels there.

    The labels are drawn from the model's own distribution p, so that squared gradients have the true Fisher information
    as their mean. At the logits that mean is known, p (1 - p): the hook gets its root as the gradient, without the
    noise of a draw. first: the index of the first window in the text, on which the draws depend. Returns the output
    matrix's inputs (n_windows, n_ctx, n_embd) and the logarithm of each token's sum of exp(logits) (n_windows, n_ctx).
    """
    head = read_head(model)
    normed, log_sum = np.empty_like(x), np.empty(x.shape[:2], x.dtype)

    def run(window: int) -> None:
        rng = np.random.default_rng((SEED, first + window))
        for part in head.parts(x.shape[1]):
            found = _window_gradient(head, x[window, part], rng, hook(window))
            normed[window, part], log_sum[window, part] = found

    for_each(run, len(x), threads)
    _check_finite(model, x, "gradients behind the last layer")
    return normed, log_sum


def _window_gradient(head: Head, x: Array, rng: np.random.Generator, hook: Hook) -> tuple[Array, Array]:
    tape = Tape()
    stream = tape.leaf(x)
    normed = head.normalize(stream)
    name = head.model.output_name
    hook.inputs(name, None, normed.value)
    logits, back_cap = head.logits(normed.value)
    logits, log_sum = log_probabilities(logits)
    p = np.exp(logits)
    labels = draw_tokens(p, rng)
    hook.gradients(name, None, normed.value, back_cap(np.sqrt(p * (1 - p))))
    np.negative(p, out=p)
    p[np.arange(len(p)), labels] += 1
    tape.backward([(normed, back_cap(p) @ head.matrix)])
    x[...] = stream.grad
    return normed.value, log_sum[:, 0]


def embedding_gradient(model: RunnableModel, tokens: Tokens, g: Array) -> tuple[Tokens, Array]:
    """Return the rows of the embedding that `tokens` use, and their gradients, squared and summed over windows.

    g: the gradient at the stream that enters the first layer.
    """
    ids = np.unique(tokens)
    raw = model.weights.rows(EMBEDDING, ids)
    squares = np.zeros((len(ids), g.shape[-1]), g.dtype)
    for window, gradients in zip(tokens, g, strict=True):
        place = np.searchsorted(ids, window)
        tape = Tape()
        rows = tape.leaf(raw[place])
        tape.backward([(scale_rows(model, rows), gradients)])
        sums = np.zeros_like(squares)
        assert rows.grad is not None
        np.add.at(sums, place, rows.grad)
        with np.errstate(over="ignore"):  # a loss that is not finite is left out
            squares += sums * sums
    return ids, squares


def draw_tokens(p: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw one index per row of p (n, n_vocab) with its probabilities."""
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


def _factors(model: RunnableModel, n_ctx: int) -> NDArray[np.float32] | None:
    """Return the divisors of the rotary frequencies: the model's own, or those for contexts of this length."""
    architecture, source = model.architecture, model.weights.source
    long = n_ctx > architecture.rope.n_ctx_orig
    for name in ("rope_freqs", "rope_factors_long" if long else "rope_factors_short"):
        if name in architecture.family.factors.split() and f"{name}.weight" in source:
            found = Weights(source).get(f"{name}.weight")
            assert found is not None
            return found.reshape(-1)[: architecture.rope.n_dims // 2]
    return None
