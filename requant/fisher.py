"""Losses from gradients: the KL divergence that a type's error predicts, to second order.

loss = 1/2 sum_rc F_rc e_rc^2 with F_rc = E[g_r^2 x_c^2] per token: the Fisher information of a weight between input x_c
and output r, whose gradient of the log-likelihood is g_r, with labels drawn from the model itself. F of a layer is only
ever there in blocks of rows, in which all candidates are encoded and their errors weighed; nothing of it is stored.

For an output matrix g^2 has a known mean, p (1 - p); an embedding's rows have the gradients at their tokens. All rows
are encoded, so these losses have no sampling error beyond that of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from requant import codec
from requant.codec import Floats
from requant.container.source import Source, SourceTensor, require_model
from requant.formats import BlockFormat, Effort
from requant.imatrix import Imatrix, importance_for
from requant.model.companions import SECOND_LEVEL, scales_of, takes_second_level
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import Layer
from requant.model.forward.ops import Array, soft_cap
from requant.model.forward.passes import (
    EMBEDDING,
    Head,
    Model,
    Tokens,
    backward,
    check_tokens,
    each,
    embedded_gradient,
    fisher_gradient,
    forward,
    head_of,
    model_of,
)
from requant.model.forward.weights import Weights
from requant.model.roles import is_tied, n_matrices
from requant.plan import Losses, TensorLosses
from requant.sensitivity import DEFAULT_TYPES, check_requantization, format_of, involved, survey
from requant.statistics import Sampler, Statistics

METHOD = "fisher"
BLOCK_WEIGHTS = 2**19  # of a matrix whose F is there at a time in a thread
SEED = 1

# F of rows of a matrix: (matrix, rows, their weights as the model sees them) -> (n_rows, n_per_row)
Information = Callable[[int, slice, Floats], Floats]


@dataclass(frozen=True, slots=True)
class Scored:
    """Losses of all candidates, and the statistics that were seen on the way."""

    losses: Losses
    statistics: Statistics


def score_by_gradients(
    source: Source,
    tokens: Tokens,
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    imatrix: Imatrix | None = None,
    weigh: bool = False,
    threads: int | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
    progress: Callable[[int], None] = lambda _: None,
) -> Scored:
    """The predicted KL divergence, in nats per token, of every candidate of every tensor of `source`.

    tokens: (n_windows, n_ctx) ids. The encoders weigh columns by `imatrix`, or else, with `weigh`, by the mean squares
    of the inputs seen here. `progress` is called with layers done, of twice their number and one. Raises what `survey`
    and `model_of` raise, NumericFault for weights or activations that are not finite.
    """
    surveyed = survey(source, types=types, imatrix=imatrix, has_importance=weigh)
    notes = check_requantization(source, surveyed, allow_requantize)
    codec.warm_up(involved(source, types))
    model = model_of(Weights(source))
    check_tokens(model, tokens)
    work = _Work(source, surveyed, imatrix, weigh, effort, threads, Statistics(tokens.size, tokens.shape[1]))
    with Checkpoints() as checkpoints:
        x = forward(model, tokens, checkpoints=checkpoints, threads=threads, done=lambda _: progress(1))
        output = _pass_head(model, x, work)
        progress(1)
        samplers = [Sampler() for _ in tokens]

        def finish(layer: Layer) -> None:
            _score_layer(work, layer.index, samplers)
            progress(1)

        def watch(window: int) -> Sampler:
            samplers[window] = Sampler(keep=True)
            return samplers[window]

        backward(model, x, checkpoints, watch=watch, done=finish, threads=threads)
    _score_ends(work, model, output, embedded_gradient(model, tokens, x))
    losses = Losses(
        source=source.name,
        header_sha256=source.header_sha256,
        arch=require_model(source),
        method=METHOD,
        imatrix=None if imatrix is None else imatrix.name,
        imatrix_sha256=None if imatrix is None else imatrix.sha256,
        tensors=tuple(work.scored.get(t.name, t) for t in surveyed),
        notes=tuple(notes),
        effort=effort,
    )
    return Scored(losses, work.statistics)


class _Work:
    """What is scored and how, and what has been found so far."""

    def __init__(
        self,
        source: Source,
        surveyed: Sequence[TensorLosses],
        imatrix: Imatrix | None,
        weigh: bool,
        effort: Effort,
        threads: int | None,
        statistics: Statistics,
    ) -> None:
        self.source, self.imatrix, self.weigh, self.effort, self.threads = source, imatrix, weigh, effort, threads
        self.wanted = {t.name: t for t in surveyed if t.reason is None}
        self.statistics = statistics
        self.scored: dict[str, TensorLosses] = {}

    def importance(self, tensor: SourceTensor) -> Floats | None:
        """(n_matrices, n_per_row) for the encoders, or None."""
        if self.imatrix is not None:
            return importance_for(self.imatrix, tensor.name, tensor.shape)
        return self.statistics.importance(tensor.name, tensor.shape) if self.weigh else None

    def score(self, name: str, information: Information) -> None:
        """Measure all candidates of the tensor; information: F, summed over tokens."""
        if name in self.wanted:
            tensor = self.source.tensor(name)
            self.scored[name] = _scored(self, tensor, self.wanted[name], information)


def _pass_head(model: Model, x: Array, work: _Work) -> _Output:
    """Turn x, the stream behind the last layer, into its gradient; what the losses of the output matrix need."""
    head = head_of(model)
    flat = x.reshape(-1, x.shape[-1])
    parts = head.parts(len(flat))
    normed, log_sum = np.empty_like(flat), np.empty(len(flat), flat.dtype)
    samplers = [Sampler() for _ in parts]

    def work_on(index: int) -> None:
        part = parts[index]
        normed[part], log_sum[part] = fisher_gradient(
            head, flat[part], np.random.default_rng((SEED, index)), samplers[index]
        )

    each(work_on, len(parts), work.threads)
    for sampler in samplers:
        work.statistics.add("", sampler.sums)
    return _Output(model.output_name, normed, log_sum, head.bias, model.architecture.logit_cap)


@dataclass(frozen=True, slots=True)
class _Output:
    """The output matrix's inputs (n_tokens, n_embd), and the logarithm of each token's sum of exp(logits)."""

    name: str
    x: Array
    log_sum: Array
    bias: Array | None
    cap: float

    def information(self, rows: slice, weights: Floats) -> Floats:
        """F of rows of the output matrix: p (1 - p) times x^2, summed over tokens."""
        logits = self.x @ weights.T
        if self.bias is not None:
            logits += self.bias[rows]
        logits, back = soft_cap(logits, self.cap)
        p = np.exp(logits - self.log_sum[:, None])
        slope = back(np.sqrt(p * (1 - p)))
        found: Floats = (slope * slope).T @ (self.x * self.x)
        return found


def _score_layer(work: _Work, index: int, samplers: Sequence[Sampler]) -> None:
    """Score the tensors of a layer whose windows have all been run."""
    prefix = f"blk.{index}."
    kept: dict[str, dict[int, tuple[Array, Array]]] = {}
    for sampler in samplers:
        work.statistics.add(prefix, sampler.sums)
    for name, expert in dict.fromkeys(key for sampler in samplers for key in sampler.kept):
        pairs = [sampler.kept[name, expert] for sampler in samplers if (name, expert) in sampler.kept]
        x, g = (np.concatenate(side) for side in zip(*pairs, strict=True))
        kept.setdefault(prefix + name, {})[expert or 0] = x * x, g * g
    for sampler in samplers:
        sampler.kept.clear()
    for name, matrices in kept.items():

        def information(matrix: int, rows: slice, weights: Floats, seen: Mapping[int, tuple[Array, Array]] = matrices) -> Floats:
            if matrix not in seen:  # an expert that no token was sent to
                return np.zeros_like(weights)
            x, g = seen[matrix]
            found: Floats = g[:, rows].T @ x
            return found

        work.score(name, information)


def _score_ends(work: _Work, model: Model, output: _Output, gradients: tuple[Array, Array]) -> None:
    """Score the embedding and the output, which may be one matrix."""
    ids, squares = gradients
    tied = output.name == EMBEDDING

    def information(matrix: int, rows: slice, weights: Floats) -> Floats:
        found = output.information(rows, weights) if tied else np.zeros_like(weights)
        own = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
        found[ids[own] - rows.start] += squares[own]
        return found

    work.score(EMBEDDING, information)
    if not tied:
        work.score(output.name, lambda matrix, rows, weights: output.information(rows, weights))


def _scored(work: _Work, tensor: SourceTensor, surveyed: TensorLosses, information: Information) -> TensorLosses:
    """The tensor with the loss and relative error of each candidate that can represent its weights."""
    formats = [format_of(candidate.type) for candidate in surveyed.candidates[1:]]
    matrices = n_matrices(tensor.shape)
    scales = scales_of(work.source, tensor)
    factors = np.ones(matrices, np.float32) if scales is None else np.broadcast_to(scales, matrices)
    importance = work.importance(tensor)
    levels = _second_scales(work, tensor, matrices) if takes_second_level(work.source, tensor) else None
    n = tensor.n_rows // matrices
    step = max(1, BLOCK_WEIGHTS // tensor.n_per_row)
    blocks = [(m, slice(a, min(a + step, n))) for m in range(matrices) for a in range(0, n, step)]
    losses = np.zeros((len(blocks), len(formats)))
    errors: list[list[codec.Errors]] = [[] for _ in blocks]

    def measure(index: int) -> None:
        m, rows = blocks[index]
        x = _rows(work.source, tensor, m * n + rows.start, rows.stop - rows.start)
        f = information(m, rows, x * factors[m])
        own = None if importance is None else importance[m if len(importance) > 1 else 0]
        for i, fmt in enumerate(formats):
            level = levels[m] if levels is not None and fmt.name == SECOND_LEVEL else 1.0
            y = codec.reconstruct(x, fmt, own, work.effort, level)
            errors[index].append(codec.row_errors(x, y, own))
            y -= x
            losses[index, i] = np.einsum("ij,ij,ij->", f, y, y) * float(factors[m]) ** 2

    each(measure, len(blocks), work.threads)
    totals = losses.sum(axis=0) / (2 * work.statistics.n_tokens)
    return _with_losses(surveyed, formats, totals, [np.concatenate(found) for found in zip(*errors, strict=True)])


def _with_losses(
    surveyed: TensorLosses, formats: Sequence[BlockFormat], totals: Sequence[float], errors: Sequence[codec.Errors]
) -> TensorLosses:
    found, skipped = [surveyed.candidates[0]], dict(surveyed.skipped)
    for candidate, fmt, loss, error in zip(surveyed.candidates[1:], formats, totals, errors, strict=True):
        fault = codec.gate(error, fmt)
        if fault is None:
            found.append(replace(candidate, loss=float(loss), rmse=codec.relative_error(error)))
        else:
            skipped[candidate.type] = f"it cannot represent the weights: {fault}"
    return replace(surveyed, candidates=tuple(found), skipped=skipped)


def _rows(source: Source, tensor: SourceTensor, first: int, n: int) -> Floats:
    return codec.dequantize(source.read_rows(tensor, first, n), tensor.format)


def _second_scales(work: _Work, tensor: SourceTensor, matrices: int) -> list[float]:
    n = tensor.n_rows // matrices
    peaks = [float(np.abs(_rows(work.source, tensor, m * n, n)).max(initial=0)) for m in range(matrices)]
    return [float(codec.second_scale(peak)) for peak in peaks]
