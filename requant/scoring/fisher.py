"""Losses from gradients: the KL divergence that a type's error predicts, to second order.

loss = 1/2 sum_rc F_rc e_rc^2 with F_rc = E[(sum_t g_tr x_tc)^2] / n_ctx, the Fisher information of the weight between
input c and output r per token.
x_t: inputs of the matrix at token t of a window.
g_t: gradient of the log-likelihood with respect to the matrix's outputs at token t. The likelihood is that of labels at
all tokens of the window; the labels are sampled from the model itself.

The sum over t is inside the square because a weight has the same error at all tokens. With E[g_tr^2 x_tc^2] in its
place, the losses of a value projection were too small by up to five times (SmolLM2-135M).

F is never held for a whole layer. For each block of rows, F is computed, all candidates are encoded, their errors are
weighted by F, and F is dropped. All rows are encoded.

In the output matrix each label affects only its own token, so g^2 has a known mean, p (1 - p). A row of the embedding
has the gradients at the tokens that look it up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from requant.container.imatrix import Imatrix, entry_of, importance_for
from requant.container.remote import remote_sources
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import BadInput, brief
from requant.formats import codec
from requant.formats.codec import Floats
from requant.model.forward.architecture import NotRun, read_architecture
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.passes import (
    EMBEDDING,
    RunnableModel,
    check_tokens,
    embedding_gradient,
    read_model,
    side_inputs,
)
from requant.model.forward.side_inputs import TABLE
from requant.model.forward.tape import Array
from requant.model.forward.weights import Weights
from requant.model.kinds import check_predicts_tokens
from requant.model.roles import n_matrices
from requant.model.tensor_shapes import QUICK_WORKS, Misfit
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, takes_weight_scale, weight_scale_for
from requant.scoring import gradient_run
from requant.scoring.calibration_data import TokenWindows
from requant.scoring.candidate_errors import FisherFactors, RowBlock, WeightRows, measure_errors
from requant.scoring.candidates import add_errors, build_losses, encoded_format, survey_to_score
from requant.scoring.gradient_run import GradientRun, Products
from requant.scoring.losses import GRADIENTS, KFAC, Losses, ScoringResult, TensorLosses
from requant.scoring.options import ScoringOptions
from requant.scoring.statistics import Statistics

BLOCK_WEIGHTS = 2**19  # of a matrix whose F is in memory at a time in a thread

# F of rows of a matrix: (matrix, which of its rows, where they are) -> (n_rows, n_per_row)
Information = Callable[[int, slice, WeightRows], Floats | FisherFactors]


def score_by_gradients(
    source: Source,
    text: TokenWindows,
    options: ScoringOptions,
    progress: Callable[[int], None] = lambda _: None,
    before_encoding: Callable[[], None] = lambda: None,
) -> ScoringResult:
    """Return the predicted KL divergence, in nats per token, of every candidate of every tensor of `source`.

    The encoders weight columns by `options.imatrix`, or else, with `options.weigh`, by the mean squares of the inputs
    seen here. `progress` is called with layers done, `n_steps` of them, `before_encoding` when the model has been run
    forward: what compiles the encoders has that long. Raises what `survey_to_score` and `read_model`
    raise, NumericFault for weights or activations that are not finite.
    """
    surveyed, notes = survey_to_score(source, options, has_importance=options.weigh)
    model, tokens = read_model(Weights(source)), text.windows
    check_tokens(model, tokens)
    statistics = Statistics(tokens.size, tokens.shape[1])
    scorer = _Scorer(source, {t.name: t for t in surveyed}, options, statistics)
    side = side_inputs(model, tokens)
    run = GradientRun(model, tokens, statistics, options.threads, progress, side=side)
    with Checkpoints() as checkpoints:
        x = run.forward(checkpoints)
        before_encoding()
        normed, log_sum = run.output_gradient(x)
        output = _OutputMatrix(model, normed.reshape(-1, x.shape[-1]), log_sum.reshape(-1, 1))
        run.backward(x, checkpoints, scorer.score_layer)
    _score_ends(scorer, model, output, embedding_gradient(model, tokens, x))
    if side is not None and side.squares is not None:
        scorer.score(TABLE, _row_information(np.unique(tokens), side.squares))
    unseen = statistics.n_unseen(source)
    if unseen:
        notes.append(f"{unseen} experts saw no token and count as the others of their tensor; more --windows help")
    notes.append(f"gradients over {len(tokens)} windows of {tokens.shape[1]} tokens of {text.name}")
    measured = statistics.imatrix(source, text.name) if options.weigh and options.imatrix is None else options.imatrix
    return ScoringResult(scorer.losses(GRADIENTS, measured, notes, text.name), statistics)


def score_by_statistics(
    source: Source, statistics: Imatrix, options: ScoringOptions, progress: Callable[[int], None] = lambda _: None
) -> Losses:
    """Return losses as `score_by_gradients` does, with F_rc = E[g_r^2] E[x_c^2] from `statistics` (the K-FAC form).

    statistics: read from a file of `requant calibrate`. The encoders weight columns by `options.imatrix`, or else by
    the statistics. `progress` is called with tensors done. Raises BadInput where the statistics hold no gradients for a
    tensor that may be quantized.
    """
    imatrix = options.imatrix or statistics
    options = replace(options, imatrix=imatrix, weigh=False)
    surveyed, notes = survey_to_score(source, options)
    scorer = _Scorer(source, {t.name: t for t in surveyed}, options, Statistics(statistics.n_tokens, 1))
    for tensor in surveyed:
        if tensor.reason is None:
            scorer.score(tensor.name, _factored_information(statistics, source.tensor(tensor.name)))
            progress(1)
    return scorer.losses(KFAC, imatrix, notes)


def _factored_information(statistics: Imatrix, tensor: SourceTensor) -> Information:
    """Return F of a tensor in factors, summed over the tokens of the statistics."""
    entry = statistics.entries.get(tensor.name)
    lookup = statistics.lookup if tensor.name == EMBEDDING else None
    gradients = lookup if tensor.name == EMBEDDING else None if entry is None else entry.gradients
    if not statistics.n_tokens or gradients is None:
        what = f"holds no gradients for tensor '{brief(tensor.name)}'"
        raise BadInput(statistics.path, what, hint="make it with `requant calibrate`, or pass it with --imatrix")

    given = None if entry is None else entry.gradients
    for found, wanted in ((given, (n_matrices(tensor.shape), tensor.shape[1])), (lookup, (tensor.n_per_row,))):
        if found is not None and found.shape != wanted:
            what = f"was made for another model: the gradients of tensor '{brief(tensor.name)}' have another size"
            raise BadInput(statistics.path, what, got=list(found.shape), expected=list(wanted))

    def information(matrix: int, rows: slice, _: WeightRows) -> FisherFactors:
        # the statistics do not say which rows were looked up: every row gets an equal part
        fetched = None if lookup is None else lookup * np.float32(statistics.n_tokens / tensor.n_rows)
        if entry is None or given is None:
            return FisherFactors(None, None, fetched)
        columns = entry.importance[matrix] * entry.counts[matrix]
        return FisherFactors(given[matrix, rows], columns, fetched)

    return information


def find_run_obstacle(source: Source) -> BadInput | None:
    """Return why requant cannot run the model, which has no gradients then, or None.

    Raises BadInput where its keys or tensors are such that no model of its architecture has them.
    """
    require_model(source)
    for name, why in source.preserved.items():
        return BadInput(source.path, f"tensor '{brief(name)}' is no good to compute with: {why}")
    try:
        check_predicts_tokens(source.metadata, {t.name for t in source.tensors})
    except BadInput as reason:
        return reason
    try:
        read_architecture(source)
    except NotRun as reason:
        return reason
    except Misfit:
        raise
    except BadInput as error:
        raise error.with_hint(QUICK_WORKS) from error
    return None


def n_steps(source: Source) -> int:
    """Return the steps that `score_by_gradients` counts in all: every layer twice, and the head."""
    return gradient_run.n_steps(read_architecture(source))


@dataclass(frozen=True, slots=True)
class _Scorer:
    """The candidates of a source whose losses are measured tensor by tensor, and the losses so far.

    statistics: the number of tokens over which F is summed, and with `options.weigh` the importance for the encoders.
    """

    source: Source
    surveyed: Mapping[str, TensorLosses]  # by name, in file order
    options: ScoringOptions
    statistics: Statistics
    scored: dict[str, TensorLosses] = field(default_factory=dict)

    def score_layer(self, products: Products) -> None:
        """Score the tensors of a layer that every window has passed on its way back."""
        for name, matrices in products.items():
            self.score(name, _information(matrices), len(matrices))

    def score(self, name: str, information: Information, n_seen: int | None = None) -> None:
        """Measure all candidates of the tensor, if it may be quantized; information: F, summed over tokens.

        n_seen: how many of its experts saw tokens; the others are taken to lose as much on average.
        """
        surveyed = self.surveyed.get(name)
        if surveyed is not None and surveyed.reason is None:
            factor = 1 if n_seen is None else n_matrices(surveyed.shape) / n_seen
            self.scored[name] = _measure_tensor(self, surveyed, information, factor)

    def importance(self, tensor: SourceTensor) -> Floats | None:
        """Return the importance for the encoders, (n_matrices, n_per_row), or None."""
        if self.options.imatrix is not None:
            return importance_for(self.options.imatrix, tensor.name, tensor.shape)
        found = self.statistics.arrays(tensor.name, tensor.shape) if self.options.weigh else None
        return None if found is None else entry_of(found[0], found[1]).importance

    def losses(self, method: str, imatrix: Imatrix | None, notes: Sequence[str], text: str | None = None) -> Losses:
        """Return the losses of all tensors. Raise SourceChanged where the source is no longer what was read."""
        self.source.check_unchanged()
        tensors = (self.scored.get(name) or _without_candidates(t) for name, t in self.surveyed.items())
        effort = self.options.effort
        return build_losses(self.source, tensors, method, imatrix, notes=notes, effort=effort, calibration_text=text)


def _without_candidates(tensor: TensorLosses) -> TensorLosses:
    """Return a tensor that the run did not use (of a multi-token prediction layer) with its own type only."""
    own, *others = tensor.candidates
    skipped = dict.fromkeys((c.type for c in others), "the model was run without the tensor, its loss is not known")
    return replace(tensor, candidates=(own,), skipped={**tensor.skipped, **skipped})


@dataclass(frozen=True, slots=True)
class _OutputMatrix:
    """The output matrix's inputs (n_tokens, n_embd), and each token's logarithm of the sum of exp(logits), (.., 1)."""

    model: RunnableModel
    x: Array
    log_sum: Array

    def information(self, matrix: int, rows: slice, at: WeightRows) -> Floats:
        """Return F of rows of the output matrix: p (1 - p) times x^2, summed over tokens."""
        bias = self.model.weights.get("output.bias")
        logits = self.x @ (at.decode(self.model.weights.source) * at.factor).T
        if bias is not None:
            logits += bias[rows]
        logits, back = self.model.finish_logits(logits)
        p = np.exp(logits - self.log_sum)
        slope = back(np.sqrt(p * (1 - p)))
        found: Floats = (slope * slope).T @ (self.x * self.x)
        return found


def _information(matrices: Mapping[int, Sequence[tuple[Array, Array]]]) -> Information:
    """Return F of matrices from the inputs and gradients of each window, by expert."""

    def information(matrix: int, rows: slice, at: WeightRows) -> Floats:
        found = np.zeros(at.shape, np.float32)
        for x, g in matrices.get(matrix, ()):
            gradient = g[:, rows].T @ x
            gradient *= gradient
            found += gradient
        return found

    return information


def _score_ends(scorer: _Scorer, model: RunnableModel, output: _OutputMatrix, gradients: tuple[Array, Array]) -> None:
    """Score the embedding and the output, which may be one matrix."""
    tied = model.output_name == EMBEDDING

    looked_up = _row_information(*gradients)

    def information(matrix: int, rows: slice, at: WeightRows) -> Floats:
        return output.information(matrix, rows, at) + looked_up(matrix, rows, at)

    scorer.score(EMBEDDING, information if tied else looked_up)
    if not tied:
        scorer.score(model.output_name, output.information)


def _row_information(ids: Array, squares: Array) -> Callable[[int, slice, WeightRows], Floats]:
    """Return F of a table of which single rows are read: the squared gradients of the rows `ids`, 0 for others."""

    def information(matrix: int, rows: slice, at: WeightRows) -> Floats:
        found = np.zeros(at.shape, np.float32)
        own = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
        found[ids[own] - rows.start] = squares[own]
        return found

    return information


def _measure_tensor(scorer: _Scorer, surveyed: TensorLosses, information: Information, factor: float) -> TensorLosses:
    """Return the tensor with the loss, times `factor`, and the relative error of each candidate that can hold it."""
    source, options = scorer.source, scorer.options
    tensor = source.tensor(surveyed.name)
    formats = tuple(encoded_format(candidate.type) for candidate in surveyed.candidates[1:])
    matrices = n_matrices(tensor.shape)
    scales = read_weight_scales(source, tensor)
    factors = np.ones(matrices, np.float32) if scales is None else np.broadcast_to(scales, matrices)
    importance = scorer.importance(tensor)
    levels = _second_scales(source, tensor, matrices) if takes_weight_scale(source, tensor) else None
    n = tensor.n_rows // matrices
    step = max(1, BLOCK_WEIGHTS // tensor.n_per_row)
    blocks = [(m, slice(a, min(a + step, n))) for m in range(matrices) for a in range(0, n, step)]

    def make_block(index: int) -> RowBlock:
        m, rows = blocks[index]
        at = WeightRows(tensor, m * n + rows.start, rows.stop - rows.start, factors[m])
        own = None if importance is None else importance[m if len(importance) > 1 else 0]
        level = tuple(levels[m] if levels is not None and fmt.name == SCALED_TYPE else 1.0 for fmt in formats)
        return RowBlock(at, information(m, rows, at), own, formats, level, options.effort)

    remote = None if options.cluster is None else (options.cluster, remote_sources(source)[tensor.file])
    found = measure_errors(source, make_block, len(blocks), options.threads, remote)
    totals = np.array([losses for losses, _ in found]).sum(axis=0) * factor / (2 * scorer.statistics.n_tokens)
    errors = [np.concatenate(of_format) for of_format in zip(*(errors for _, errors in found), strict=True)]
    measured = [(float(loss), 0.0, error) for loss, error in zip(totals, errors, strict=True)]
    return add_errors(surveyed, measured, surveyed.n_weights)


def _second_scales(source: Source, tensor: SourceTensor, matrices: int) -> list[float]:
    n = tensor.n_rows // matrices
    rows = (source.read_rows(tensor, m * n, n) for m in range(matrices))
    return [weight_scale_for(codec.dequantize(data, tensor.format)) for data in rows]
