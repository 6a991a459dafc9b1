"""Losses from gradients: the KL divergence that a type's error predicts, to second order.

loss = 1/2 sum_rc F_rc e_rc^2 with F_rc = E[(sum_t g_tr x_tc)^2] / n_ctx, the Fisher information of the weight between
input c and output r per token: x_t are the inputs at token t of a window, g_t the gradients at the outputs of the
log-likelihood of labels, drawn from the model itself, at all tokens. The sum over t is inside the square because the
error of a weight meets all tokens with the same sign: with E[g_tr^2 x_tc^2] in its place, a value projection's losses
were too small by up to five times (SmolLM2-135M).

F of a layer is only ever there in blocks of rows, in which all candidates are encoded and their errors weighed; nothing
of it is stored. For an output matrix, whose labels touch one token only, g^2 has a known mean, p (1 - p); an
embedding's rows have the gradients at their tokens. All rows are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from requant.common.cluster import Cluster
from requant.container.imatrix import Imatrix, entry_of, importance_for
from requant.container.remote import remote_sources
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import BadInput, brief
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import Floats
from requant.model.forward.architecture import read_architecture
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import Layer
from requant.model.forward.ops import Array, soft_cap
from requant.model.forward.passes import (
    EMBEDDING,
    RunnableModel,
    Tokens,
    backward,
    check_tokens,
    embedding_gradient,
    forward,
    output_gradient,
    read_model,
)
from requant.model.forward.weights import Weights
from requant.model.roles import n_matrices
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, takes_weight_scale
from requant.scoring.candidate_errors import Product, RowBlock, Rows, measure_errors
from requant.scoring.candidates import DEFAULT_TYPES, check_requantization, encoded_format, formats_involved, survey
from requant.scoring.losses import IN_NATS, Losses, TensorLosses
from requant.scoring.statistics import SquareSummer, Statistics

METHOD, KFAC = IN_NATS
BLOCK_WEIGHTS = 2**19  # of a matrix whose F is there at a time in a thread

# F of rows of a matrix: (matrix, which of its rows, where they are) -> (n_rows, n_per_row)
Information = Callable[[int, slice, Rows], Floats | Product]


@dataclass(frozen=True, slots=True)
class Scored:
    """Losses of all candidates, and the statistics of the model that were seen on the way."""

    losses: Losses
    statistics: Statistics


def score_by_gradients(
    source: Source,
    tokens: Tokens,
    *,
    text: str = "",
    types: Sequence[str] = DEFAULT_TYPES,
    imatrix: Imatrix | None = None,
    weigh: bool = False,
    threads: int | None = None,
    cluster: Cluster | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
    progress: Callable[[int], None] = lambda _: None,
) -> Scored:
    """The predicted KL divergence, in nats per token, of every candidate of every tensor of `source`.

    tokens: (n_windows, n_ctx) ids; text: what they are from. The encoders weigh columns by `imatrix`, or else, with
    `weigh`, by the mean squares of the inputs seen here. `progress` is called with layers done, `n_steps` of them.
    cluster: its workers encode; the model is run here. Raises what `survey` and `read_model` raise, NumericFault for
    weights or activations that are not finite.
    """
    surveyed = survey(source, types=types, imatrix=imatrix, has_importance=weigh)
    notes = check_requantization(source, surveyed, allow_requantize)
    codec.warm_up(formats_involved(source, types))
    model = read_model(Weights(source))
    check_tokens(model, tokens)
    statistics = Statistics(tokens.size, tokens.shape[1])
    work = _Work(source, _wanted(surveyed), imatrix, weigh, effort, threads, cluster, statistics)
    with Checkpoints() as checkpoints:
        x = forward(model, tokens, checkpoints=checkpoints, threads=threads, on_layer=lambda _: progress(1))
        samplers = [SquareSummer() for _ in tokens]
        normed, log_sum = output_gradient(model, x, hook=lambda window: samplers[window], threads=threads)
        output = _Output(model, normed.reshape(-1, x.shape[-1]), log_sum.reshape(-1, 1))
        for sampler in samplers:
            work.statistics.add("", sampler.sums)
        progress(1)

        def finish(layer: Layer) -> None:
            _score_layer(work, layer.index, samplers)
            progress(1)

        def watch(window: int) -> SquareSummer:
            samplers[window] = SquareSummer(keep=True)
            return samplers[window]

        backward(model, x, checkpoints, hook=watch, on_layer=finish, threads=threads)
    _score_ends(work, model, output, embedding_gradient(model, tokens, x))
    unseen = work.statistics.n_unseen(source)
    if unseen:
        notes.append(f"{unseen} experts saw no token and count as the others of their tensor; more --windows help")
    notes.append(f"gradients over {len(tokens)} windows of {tokens.shape[1]} tokens" + (f" of {text}" if text else ""))
    used = work.statistics.imatrix(source, text) if weigh and imatrix is None else imatrix
    return Scored(_losses(work, surveyed, METHOD, used, notes), work.statistics)


def score_by_statistics(
    source: Source,
    statistics: Imatrix,
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    imatrix: Imatrix | None = None,
    threads: int | None = None,
    cluster: Cluster | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
    progress: Callable[[int], None] = lambda _: None,
) -> Losses:
    """As `score_by_gradients`, with F_rc = E[g_r^2] E[x_c^2] from a file of `requant calibrate` (the K-FAC form).

    The encoders weigh columns by `imatrix`, or else by the statistics. `progress` is called with tensors done. Raises
    BadInput where the statistics hold no gradients for a tensor that may be quantized.
    """
    imatrix = imatrix or statistics
    surveyed = survey(source, types=types, imatrix=imatrix)
    notes = check_requantization(source, surveyed, allow_requantize)
    codec.warm_up(formats_involved(source, types))
    seen = Statistics(statistics.n_tokens, 1)
    work = _Work(source, _wanted(surveyed), imatrix, False, effort, threads, cluster, seen)
    for name in work.wanted:
        work.score(name, _product(statistics, source.tensor(name)))
        progress(1)
    return _losses(work, surveyed, KFAC, imatrix, notes)


def _product(statistics: Imatrix, tensor: SourceTensor) -> Information:
    """F of a tensor as a product, summed over the tokens of the statistics."""
    entry = statistics.entries.get(tensor.name)
    lookup = statistics.lookup if tensor.name == EMBEDDING else None
    gradients = lookup if tensor.name == EMBEDDING else None if entry is None else entry.gradients
    if not statistics.n_tokens or gradients is None:
        what = f"holds no gradients for tensor '{brief(tensor.name)}'"
        raise BadInput(statistics.path, what, hint="make it with `requant calibrate`, or pass it with --imatrix")

    def information(matrix: int, rows: slice, _: Rows) -> Product:
        fetched = None if lookup is None else lookup * np.float32(statistics.n_tokens / tensor.n_rows)  # any row may be
        if entry is None or entry.gradients is None:
            return Product(None, None, fetched)
        columns = entry.importance[matrix] * entry.counts[matrix]
        return Product(entry.gradients[matrix, rows], columns, fetched)

    return information


def cannot_run(source: Source) -> BadInput | None:
    """Why the model cannot be run, and so has no gradients, or None."""
    require_model(source)
    for name, why in source.preserved.items():
        return BadInput(source.path, f"tensor '{brief(name)}' is no good to compute with: {why}")
    try:
        read_architecture(source)
    except BadInput as error:
        return error
    return None


def n_steps(source: Source) -> int:
    """What `progress` of `score_by_gradients` is called with in all: every layer twice, and the head."""
    return 2 * read_architecture(source).n_layers + 1


def _wanted(surveyed: Sequence[TensorLosses]) -> dict[str, TensorLosses]:
    return {t.name: t for t in surveyed if t.reason is None}


def _losses(
    work: _Work, surveyed: Sequence[TensorLosses], method: str, imatrix: Imatrix | None, notes: Sequence[str]
) -> Losses:
    work.source.check_unchanged()
    return Losses(
        source=work.source.name,
        header_sha256=work.source.header_sha256,
        arch=require_model(work.source),
        method=method,
        imatrix=None if imatrix is None else imatrix.name,
        imatrix_sha256=None if imatrix is None else imatrix.sha256,
        tensors=tuple(work.scored.get(t.name) or _as_it_is(t) for t in surveyed),
        notes=tuple(notes),
        effort=work.effort,
    )


def _as_it_is(tensor: TensorLosses) -> TensorLosses:
    """A tensor of which the pass saw nothing (a layer that predicts several tokens ahead) without any other type."""
    own, *others = tensor.candidates
    skipped = dict.fromkeys((c.type for c in others), "the model was run without the tensor, its loss is not known")
    return replace(tensor, candidates=(own,), skipped={**tensor.skipped, **skipped})


@dataclass(frozen=True, slots=True)
class _Work:
    """What is scored and how, and what has been found so far."""

    source: Source
    wanted: Mapping[str, TensorLosses]
    imatrix: Imatrix | None
    weigh: bool
    effort: Effort
    threads: int | None
    cluster: Cluster | None
    statistics: Statistics
    scored: dict[str, TensorLosses] = field(default_factory=dict)

    def importance(self, tensor: SourceTensor) -> Floats | None:
        """(n_matrices, n_per_row) for the encoders, or None."""
        if self.imatrix is not None:
            return importance_for(self.imatrix, tensor.name, tensor.shape)
        found = self.statistics.arrays(tensor.name, tensor.shape) if self.weigh else None
        return None if found is None else entry_of(found[0], found[1]).importance

    def score(self, name: str, information: Information, n_seen: int | None = None) -> None:
        """Measure all candidates of the tensor; information: F, summed over tokens.

        n_seen: of its experts, those that saw tokens; the others are taken to lose as much on average.
        """
        if name in self.wanted:
            tensor = self.source.tensor(name)
            factor = 1 if n_seen is None else n_matrices(tensor.shape) / n_seen
            self.scored[name] = _scored(self, tensor, information, factor)


@dataclass(frozen=True, slots=True)
class _Output:
    """The output matrix's inputs (n_tokens, n_embd), and each token's logarithm of the sum of exp(logits), (.., 1)."""

    model: RunnableModel
    x: Array
    log_sum: Array

    def information(self, rows: slice, weights: Floats) -> Floats:
        """F of rows of the output matrix: p (1 - p) times x^2, summed over tokens."""
        bias = self.model.weights.get("output.bias")
        logits = self.x @ weights.T
        if bias is not None:
            logits += bias[rows]
        logits, back = soft_cap(logits, self.model.architecture.logit_cap)
        p = np.exp(logits - self.log_sum)
        slope = back(np.sqrt(p * (1 - p)))
        found: Floats = (slope * slope).T @ (self.x * self.x)
        return found


def _score_layer(work: _Work, index: int, samplers: Sequence[SquareSummer]) -> None:
    """Score the tensors of a layer whose windows have all been run."""
    prefix = f"blk.{index}."
    kept: dict[str, dict[int, list[tuple[Array, Array]]]] = {}
    for sampler in samplers:
        work.statistics.add(prefix, sampler.sums)
        for (name, expert), pair in sampler.kept.items():
            kept.setdefault(prefix + name, {}).setdefault(expert or 0, []).append(pair)
    for name, matrices in kept.items():
        work.score(name, _information(matrices), len(matrices))
    for sampler in samplers:
        sampler.kept.clear()


def _information(matrices: Mapping[int, Sequence[tuple[Array, Array]]]) -> Information:
    """F of matrices from the inputs and gradients of each window, by expert."""

    def information(matrix: int, rows: slice, at: Rows) -> Floats:
        found = np.zeros(at.shape, np.float32)
        for x, g in matrices.get(matrix, ()):
            gradient = g[:, rows].T @ x
            gradient *= gradient
            found += gradient
        return found

    return information


def _score_ends(work: _Work, model: RunnableModel, output: _Output, gradients: tuple[Array, Array]) -> None:
    """Score the embedding and the output, which may be one matrix."""
    ids, squares = gradients
    tied = model.output_name == EMBEDDING

    def information(matrix: int, rows: slice, at: Rows) -> Floats:
        found = output.information(rows, at.weights()) if tied else np.zeros(at.shape, np.float32)
        own = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
        found[ids[own] - rows.start] += squares[own]
        return found

    work.score(EMBEDDING, information)
    if not tied:
        work.score(model.output_name, lambda matrix, rows, at: output.information(rows, at.weights()))


def _scored(work: _Work, tensor: SourceTensor, information: Information, factor: float) -> TensorLosses:
    """The tensor with the loss, times `factor`, and relative error of each candidate that can represent its weights."""
    surveyed = work.wanted[tensor.name]
    formats = [encoded_format(candidate.type) for candidate in surveyed.candidates[1:]]
    matrices = n_matrices(tensor.shape)
    scales = read_weight_scales(work.source, tensor)
    factors = np.ones(matrices, np.float32) if scales is None else np.broadcast_to(scales, matrices)
    importance = work.importance(tensor)
    levels = _second_scales(work, tensor, matrices) if takes_weight_scale(work.source, tensor) else None
    n = tensor.n_rows // matrices
    step = max(1, BLOCK_WEIGHTS // tensor.n_per_row)
    blocks = [(m, slice(a, min(a + step, n))) for m in range(matrices) for a in range(0, n, step)]

    def make(index: int) -> RowBlock:
        m, rows = blocks[index]
        at = Rows(work.source, tensor, m * n + rows.start, rows.stop - rows.start, factors[m])
        own = None if importance is None else importance[m if len(importance) > 1 else 0]
        level = [levels[m] if levels is not None and fmt.name == SCALED_TYPE else 1.0 for fmt in formats]
        f, factor = information(m, rows, at), float(factors[m])
        return RowBlock(tensor, at.first, at.n, f, factor, own, tuple(formats), tuple(level), work.effort)

    there = None if work.cluster is None else (work.cluster, remote_sources(work.source)[tensor.file])
    found = measure_errors(work.source, make, len(blocks), work.threads, there)
    totals = np.array([losses for losses, _ in found]).sum(axis=0) * factor / (2 * work.statistics.n_tokens)
    errors = [np.concatenate(of_format) for of_format in zip(*(errors for _, errors in found), strict=True)]
    return _with_losses(surveyed, formats, totals, errors)


def _with_losses(
    surveyed: TensorLosses, formats: Sequence[BlockFormat], totals: Sequence[float], errors: Sequence[codec.Errors]
) -> TensorLosses:
    found, skipped = [surveyed.candidates[0]], dict(surveyed.skipped)
    for candidate, fmt, loss, error in zip(surveyed.candidates[1:], formats, totals, errors, strict=True):
        fault = codec.gate(error, fmt, surveyed.n_weights)
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
