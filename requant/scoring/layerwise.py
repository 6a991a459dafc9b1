"""Losses without gradients: the error that each type makes at a matrix's output, by the encoders themselves.

The loss of a matrix starts from the energy of the error at its output, relative to the energy of that output: sum_r
sum_c E[x_c^2] e_rc^2 over sum_r sum_c E[x_c^2] w_rc^2. E[x^2] comes from an imatrix (method `cfix`) or from the weights
alone (`dfix`). `residual_shares` scales these energies to losses that can be added up and compared between tensors:
they count what reaches the residual stream.

Errors are measured on rows evenly spread over the tensor; each loss has its standard error beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant.common.threads import in_order, n_threads
from requant.container.source import Source, SourceTensor
from requant.errors import quote
from requant.formats import Effort, codec
from requant.formats.codec import Floats
from requant.model.keys import ArchitectureKeys
from requant.model.nonfinite import nonfinite_fault
from requant.model.roles import is_experts, n_matrices, role_of
from requant.model.weight_scales import SCALED_TYPE, read_weight_scales, takes_weight_scale, weight_scale_for
from requant.scoring.candidates import add_errors, build_losses, encoded_format, survey_to_score
from requant.scoring.input_moments import InputMoments, read_moments, residual_energy
from requant.scoring.losses import Losses, TensorLosses
from requant.scoring.options import ScoringOptions
from requant.scoring.residual_shares import scale_by_residual, writes_residual

SAMPLE_WEIGHTS = 2**18  # weights of a tensor that are encoded for each candidate
SAMPLE_ROWS = 64  # at least, of a tensor that has them

_Part = tuple[int, int, Floats | None, Floats, float]


@dataclass(frozen=True, slots=True)
class _Trial:
    """Rows of a tensor to be encoded as every candidate, in two levels where the format has them.

    parts: for each matrix (expert) of which there are rows: start and stop of them in `x`, the importance for the
    encoder, E[x^2], and (share of tokens that use this expert) * weight_scale^2.
    """

    surveyed: TensorLosses
    x: Floats
    n_rows: int  # of the whole tensor
    parts: tuple[_Part, ...]
    origin: str  # of E[x^2]
    two_level: bool
    effort: Effort


ScoredTensor = tuple[TensorLosses, str, float]  # its losses, the origin of its moments, the energy of its output


def score(source: Source, options: ScoringOptions, progress: Callable[[int], None] = lambda _: None) -> Losses:
    """Return the loss of every candidate of every tensor of `source`; `progress` is called with source bytes done.

    Raises UsageError for a type that cannot be written, BadInput for a source below Q8_0 without
    `options.allow_requantize` or an imatrix of another model, NumericFault for weights that are not finite,
    SourceChanged.
    """
    surveyed, notes = survey_to_score(source, options)
    imatrix = options.imatrix
    free = [t for t in surveyed if t.reason is None]

    def prepare(tensor: TensorLosses) -> _Trial:
        inputs = read_moments(source, source.tensor(tensor.name), imatrix)
        return _sample_rows(source, tensor, inputs, options.effort)

    results = []
    with contextlib.closing(_measure_in_order(prepare, free, options)) as found:
        for tensor, result in zip(free, found, strict=True):
            results.append(result)
            progress(tensor.n_bytes)
    energies = {s.name: energy for s, _, energy in results}
    added = {name: residual_energy(source, name, e) for name, e in energies.items() if writes_residual(role_of(name))}
    scored = scale_by_residual({s.name: s for s, _, _ in results}, energies, added)
    origins = [origin for _, origin, _ in results]
    source.check_unchanged()
    if imatrix is not None and (missing := len(origins) - origins.count("imatrix")):
        what = f"the imatrix does not cover {missing} of {len(origins)} tensors"
        notes.append(f"{what}; theirs is worked out from the weights")
    method = "dfix" if imatrix is None else "cfix"
    tensors = (scored.get(t.name, t) for t in surveyed)
    return build_losses(source, tensors, method, imatrix, notes=notes, effort=options.effort)


def _measure_in_order(
    prepare: Callable[[TensorLosses], _Trial], free: Sequence[TensorLosses], options: ScoringOptions
) -> Generator[ScoredTensor, None, None]:
    """Yield each tensor scored, measured in threads or by the workers of a cluster."""
    n, cluster = n_threads(options.threads), options.cluster
    if cluster is None:
        with contextlib.closing(in_order(lambda tensor: _measure(prepare(tensor)), free, n)) as results:
            yield from results
        return
    with contextlib.closing(in_order(prepare, free, n)) as trials:
        described = cluster.in_order(_measure, trials, lambda trial: f"tensor {quote(trial.surveyed.name)}")
        with contextlib.closing(described) as results:
            yield from results


def _measure(trial: _Trial) -> ScoredTensor:
    energy, _ = _estimate(trial, trial.x * 0)  # energy of the output: the loss if all weights were 0
    measured = []
    for candidate in trial.surveyed.candidates[1:]:
        fmt = encoded_format(candidate.type)
        parts = []
        for start, stop, importance, _, _ in trial.parts:
            x = trial.x[start:stop]
            scale = weight_scale_for(x) if trial.two_level and fmt.name == SCALED_TYPE else 1
            parts.append(codec.reconstruct(x, fmt, importance, trial.effort, scale))
        y = np.concatenate(parts)
        measured.append((*_estimate(trial, y), codec.row_errors(trial.x, y)))
    return add_errors(trial.surveyed, measured, trial.x.size), trial.origin, energy


def _sample_rows(source: Source, surveyed: TensorLosses, inputs: InputMoments, effort: Effort) -> _Trial:
    """Return rows evenly spread over the tensor, all of them where it is small. Raise NumericFault."""
    tensor = source.tensor(surveyed.name)
    n_sampled = min(tensor.n_rows, max(SAMPLE_ROWS, SAMPLE_WEIGHTS // tensor.n_per_row))
    rows = (np.arange(n_sampled) * tensor.n_rows + tensor.n_rows // 2) // n_sampled
    if n_sampled == tensor.n_rows:
        data = source.read_rows(tensor)
    else:
        data = np.concatenate([source.read_rows(tensor, int(r), 1) for r in rows])
    x = codec.dequantize(data, tensor.format)
    if codec.first_nonfinite(x) is not None:
        raise nonfinite_fault(source, tensor)
    parts = _parts(tensor, rows, inputs, _output_shares(source, tensor))
    return _Trial(surveyed, x, tensor.n_rows, parts, inputs.origin, takes_weight_scale(source, tensor), effort)


def _parts(tensor: SourceTensor, rows: NDArray[np.intp], inputs: InputMoments, shares: Floats) -> tuple[_Part, ...]:
    """Return the parts of a trial, one for each matrix. The encoder gets an importance only from an imatrix."""
    matrices = n_matrices(tensor.shape)
    owner = rows // (tensor.n_rows // matrices)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        m = int(owner[start])
        moments = inputs.moments[m if len(inputs.moments) > 1 else 0]
        importance = moments if inputs.origin == "imatrix" else None
        parts.append((int(start), int(stop), importance, moments, float(shares[m])))
    return tuple(parts)


def _output_shares(source: Source, tensor: SourceTensor) -> Floats:
    """Return the weight of each matrix's output: the share of the experts used per token times its scale squared."""
    matrices = n_matrices(tensor.shape)
    share = 1.0
    if is_experts(tensor.name, tensor.shape):
        arch = source.metadata.get_str("general.architecture", "") or ""
        used = ArchitectureKeys(source.metadata, arch).largest("expert_used_count", matrices)
        share = min(1.0, used / matrices)
    scales = read_weight_scales(source, tensor)
    return np.full(matrices, share, np.float32) * (1 if scales is None else scales**2)


def _estimate(trial: _Trial, y: Floats) -> tuple[float, float]:
    """Return the loss of the whole tensor if its rows became `y`, and its standard error."""
    per_row = np.concatenate(
        [codec.row_errors(trial.x[a:b], y[a:b], moments)[:, 3] * share for a, b, _, moments, share in trial.parts]
    )
    n = len(per_row)
    if n < 2 or n == trial.n_rows:
        return float(per_row.sum()) * trial.n_rows / n, 0.0
    spread = float(per_row.std(ddof=1) / np.sqrt(n) * np.sqrt(1 - n / trial.n_rows))
    return float(per_row.mean()) * trial.n_rows, spread * trial.n_rows
