"""Reranking: plans near the best, each measured on text without writing a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from requant.common.threads import in_order, n_threads
from requant.container.imatrix import Imatrix, importance_for
from requant.container.source import Source, SourceTensor
from requant.formats import BlockFormat, Effort, codec, format_of
from requant.formats.codec import CHUNK_WEIGHTS, Floats
from requant.model.forward.passes import Tokens, forward, read_head, read_model
from requant.model.forward.weights import Weights
from requant.model.roles import n_matrices
from requant.model.weight_scales import SCALED_TYPE, takes_weight_scale
from requant.planning.plan import Plan
from requant.scoring.evaluate import Evaluation, judge, summary
from requant.scoring.losses import Losses

SPREAD = 0.3  # standard deviation of the logarithm of the random factors of losses, which give other good plans
_SEED = 1


def planned_weights(source: Source, plan: Plan, imatrix: Imatrix | None = None, threads: int | None = None) -> Weights:
    """Return the weights that `convert` would write, as they decode; encoded again at each read."""
    types = plan.types()

    def change(tensor: SourceTensor, x: Floats) -> Floats:
        if types[tensor.name] == tensor.format.name:
            return x
        importance = None if imatrix is None else importance_for(imatrix, tensor.name, tensor.shape)
        fmt = format_of(types[tensor.name])
        two_level = fmt.name == SCALED_TYPE and takes_weight_scale(source, tensor)
        return _reconstruct(x, tensor, _Encoding(fmt, importance, plan.effort, two_level), n_threads(threads))

    return Weights(source, change)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """The encoding of a tensor; importance: (n_matrices or 1, n_per_row) or None."""

    format: BlockFormat
    importance: Floats | None
    effort: Effort
    two_level: bool

    def reconstruct(self, matrix: int, x: Floats, peak: float) -> Floats:
        """Encode and decode rows of a matrix whose largest weight is `peak`."""
        own = None if self.importance is None else self.importance[matrix if len(self.importance) > 1 else 0]
        scale = float(codec.second_scale(peak)) if self.two_level else 1.0
        return codec.reconstruct(x, self.format, own, self.effort, scale)


def _reconstruct(x: Floats, tensor: SourceTensor, encoding: _Encoding, threads: int) -> Floats:
    """Encode and decode rows of `tensor`: all of them, or some of a tensor that is one matrix."""
    matrices = n_matrices(tensor.shape) if len(x) == tensor.n_rows else 1
    n = len(x) // matrices
    step = max(1, CHUNK_WEIGHTS // tensor.n_per_row)
    out = np.empty_like(x)
    peaks = [float(np.abs(m).max(initial=0)) for m in x.reshape(matrices, n, -1)] if encoding.two_level else None

    def work(place: tuple[int, int, int]) -> None:
        matrix, start, stop = place
        out[start:stop] = encoding.reconstruct(matrix, x[start:stop], 0 if peaks is None else peaks[matrix])

    places = [(m, a, min(a + step, (m + 1) * n)) for m in range(matrices) for a in range(m * n, (m + 1) * n, step)]
    for _ in in_order(work, places, threads):
        pass
    return out


def perturbed_plans(losses: Losses, solve: Callable[[Losses], Plan], n: int) -> list[Plan]:
    """Return up to `n` different plans: the best for `losses`, and the best for randomly perturbed losses.

    Each draw multiplies the losses of every tensor by one factor; the plans carry the unperturbed losses.
    """
    plans = {tuple(plan.types().values()): plan for plan in [solve(losses)]}
    rng = np.random.default_rng(_SEED)
    for _ in range(4 * n):
        if len(plans) >= n:
            break
        plan = solve(_scale_losses(losses, np.exp(SPREAD * rng.standard_normal(len(losses.tensors)))))
        plans.setdefault(tuple(plan.types().values()), _restore_losses(plan, losses))
    return list(plans.values())


def _scale_losses(losses: Losses, factors: NDArray[np.float64]) -> Losses:
    tensors = tuple(
        replace(t, candidates=tuple(replace(c, loss=c.loss * f) for c in t.candidates))
        for t, f in zip(losses.tensors, factors, strict=True)
    )
    return replace(losses, tensors=tensors)


def _restore_losses(plan: Plan, losses: Losses) -> Plan:
    """Return the plan with the unperturbed losses; its gap is then not known."""
    known: Mapping[tuple[str, str], float] = {(t.name, c.type): c.loss for t in losses.tensors for c in t.candidates}
    choices = tuple(replace(c, loss=known[c.name, c.type]) for c in plan.choices)
    return replace(plan, choices=choices, predicted_loss=sum(c.loss for c in choices), gap=None)


def measure_plans(
    source: Source,
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    imatrix: Imatrix | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Evaluation]:
    """Measure the divergence of each plan from `source` on `tokens`; `progress` takes the number of models run."""
    base = read_model(Weights(source))
    reference = read_head(base), forward(base, tokens, threads=threads)
    progress(1)
    found = []
    for plan in plans:
        model = read_model(planned_weights(source, plan, imatrix, threads))
        stream = forward(model, tokens, threads=threads)
        found.append(summary(judge(read_head(model), stream, tokens, reference, threads), tokens))
        progress(1)
    return found
