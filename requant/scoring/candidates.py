"""Candidates: the types that each tensor of a source may have, before and after their losses are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from requant.common.serialization import MAX_FLOAT
from requant.container.imatrix import Imatrix, describe_shared_rows, importance_for
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import BadInput, UsageError, quote
from requant.formats import FORMATS, BlockFormat, Effort, by_name, codec
from requant.model.hyperparameters import check_counts, read_hyperparameters
from requant.model.kept import projector_types
from requant.model.memory import on_device
from requant.model.roles import candidates, is_below, is_lookup, is_tied, layer_of, never_quantize, role_of
from requant.scoring.losses import ALREADY_QUANTIZED, TOO_SMALL, Candidate, Losses, TensorLosses
from requant.scoring.options import DEFAULT_TYPES, ScoringOptions

# as in llama-quantize: weights that were already rounded to fewer bits lose more than their size shows
_INFINITE = "its weights or gradients are so large that the loss is no finite number"
_NOTED = 5  # tensors to name in notes
_REQUANTIZABLE = ("F32", "F16", "BF16", "Q8_0")


def survey_to_score(
    source: Source, options: ScoringOptions, *, has_importance: bool = False
) -> tuple[tuple[TensorLosses, ...], list[str]]:
    """Return the survey of `source` for these options, and notes on the source.

    Raises what `survey_tensors` and `check_requantization` raise, UsageError for a type that cannot be written.
    """
    surveyed = survey_tensors(
        source,
        types=options.types,
        imatrix=options.imatrix,
        has_importance=has_importance,
        allow_requantize=options.allow_requantize,
    )
    notes = check_requantization(source, surveyed)
    for name in options.types:
        encoded_format(name)
    if options.imatrix is not None:
        notes += describe_shared_rows(options.imatrix, ((t.name, t.shape) for t in surveyed if t.reason is None))
    return surveyed, notes


def survey_tensors(
    source: Source,
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    imatrix: Imatrix | None = None,
    has_importance: bool = False,
    allow_requantize: bool = False,
) -> tuple[TensorLosses, ...]:
    """Return every tensor with its role and its candidates, or the reason why it keeps its type; all losses are 0.

    Types of more bits than the tensor has are no candidates: they would waste bytes and repair nothing; unless it is
    rounded again and its own type is none of `types`, and so perhaps none that the engine runs. has_importance:
    all tensors will have measured importance, whether an imatrix covers them or not. allow_requantize: tensors that are
    already quantized below Q8_0 have candidates, too. Raises BadInput for a file that is no model.
    """
    arch = require_model(source)
    check_counts(source.metadata)
    try:
        hp = read_hyperparameters(source.metadata, source.tensors)
    except BadInput:
        hp = None  # a budget in file size needs none of the keys
    tied = is_tied({t.name for t in source.tensors})
    weights, projectors = sum(t.n_weights for t in source.tensors), projector_types(source.metadata)
    found = []
    for t in source.tensors:
        is_measured = has_importance or (imatrix is not None and importance_for(imatrix, t.name, t.shape) is not None)
        args = arch, t.name, t.shape, t.type_id
        reason = source.preserved.get(t.name) or never_quantize(*args, projectors=projectors)
        if reason is None and never_quantize(*args, model_weights=weights, projectors=projectors) is not None:
            reason = TOO_SMALL
        if reason is None and not allow_requantize and t.format.name not in _REQUANTIZABLE:
            reason = ALREADY_QUANTIZED
        smaller, skipped = _smaller_types(arch, t, types, is_measured) if reason is None else ([], {})
        others = [Candidate(name, encoded_format(name).n_bytes(t.n_weights), 0.0) for name in smaller]
        found.append(
            TensorLosses(
                name=t.name,
                role=role_of(t.name),
                layer=layer_of(t.name),
                shape=t.shape,
                source_type=t.format.name,
                n_bytes=t.n_bytes,
                on_gpu=not is_lookup(t.name, tied=tied) if hp is None else on_device(hp, t.name, tied=tied),
                reason=reason,
                candidates=(Candidate(t.format.name, t.n_bytes, 0.0), *others),
                skipped=skipped,
            )
        )
    return tuple(found)


def _smaller_types(
    arch: str, tensor: SourceTensor, types: Sequence[str], has_importance: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the types that suit the tensor and have fewer bits than its own, and why the others are left out.

    Where its own is rounded below Q8_0 and none of `types`, the engine may not run it: then all that suit are returned.
    """
    own = tensor.format.name
    suitable, skipped = candidates(arch, tensor.name, tensor.shape, types, has_importance=has_importance)
    others = [t for t in suitable if t != own]
    if own not in (*types, *_REQUANTIZABLE):
        return others, skipped
    wasteful = [t for t in others if not is_below(t, own)]
    skipped |= dict.fromkeys(wasteful, f"no fewer bits than the source's {own}")
    return [t for t in others if is_below(t, own)], skipped


def add_errors(
    surveyed: TensorLosses, measured: Iterable[tuple[float, float, codec.Errors]], n_weights: int
) -> TensorLosses:
    """Return the tensor without the candidates that cannot represent its weights, and with the losses of the others.

    measured: of each candidate but the source's own type the loss, its standard error, and codec.row_errors of
    `n_weights` weights.
    """
    found, skipped = [surveyed.candidates[0]], dict(surveyed.skipped)
    for candidate, (loss, loss_error, errors) in zip(surveyed.candidates[1:], measured, strict=True):
        fault = codec.gate(errors, encoded_format(candidate.type), n_weights)
        if fault is None:
            rmse = codec.relative_error(errors)
            found.append(replace(candidate, loss=loss, loss_error=loss_error, rmse=rmse))
        else:
            skipped[candidate.type] = f"it cannot represent the weights: {fault}"
    return replace(surveyed, candidates=tuple(found), skipped=skipped)


def build_losses(
    source: Source,
    tensors: Iterable[TensorLosses],
    method: str,
    imatrix: Imatrix | None = None,
    *,
    notes: Iterable[str] = (),
    effort: Effort = Effort.DEFAULT,
    calibration_text: str | None = None,
) -> Losses:
    """Return the losses of `source` from those of its tensors; imatrix: the one that weighted the encoders."""
    tensors, notes = [_without_infinite(tensor) for tensor in tensors], [*notes]
    lost = [t for t in tensors if len(t.candidates) == 1 and _INFINITE in t.skipped.values()]
    notes += [f"tensor {quote(t.name)} stays {t.source_type}: {_INFINITE}" for t in lost[:_NOTED]]
    if len(lost) > _NOTED:
        notes.append(f"{len(lost) - _NOTED} more tensors stay as they are for the same reason")
    return Losses(
        source=source.name,
        header_sha256=source.header_sha256,
        arch=require_model(source),
        method=method,
        imatrix=None if imatrix is None else imatrix.name,
        imatrix_sha256=None if imatrix is None else imatrix.sha256,
        tensors=tuple(tensors),
        notes=tuple(notes),
        effort=effort,
        calibration_text=calibration_text,
        importance=imatrix,
    )


def _without_infinite(tensor: TensorLosses) -> TensorLosses:
    """Return the tensor without the candidates whose losses are no numbers that can be added and compared."""
    own, *others = tensor.candidates
    kept = [c for c in others if all(0 <= x <= MAX_FLOAT for x in (c.loss, c.loss_error, c.rmse))]
    if len(kept) == len(others):
        return tensor
    lost = {c.type: _INFINITE for c in others if c not in kept}
    return replace(tensor, candidates=(own, *kept), skipped={**tensor.skipped, **lost})


def encoded_format(name: str) -> BlockFormat:
    """Return the format called `name`. Raise UsageError where it cannot be written."""
    fmt = by_name(name)
    if fmt is None or not fmt.can_encode:
        written = ", ".join(f.name for f in FORMATS.values() if f.can_encode and f.block_weights > 1)
        raise UsageError(f"{name} cannot be written; choose among {written}")
    return fmt


def check_requantization(source: Source, tensors: Sequence[TensorLosses]) -> list[str]:
    """Return notes on a source with matrices already rounded below Q8_0.

    Raises BadInput where they keep their types and nothing else is left to quantize.
    """
    copied = [t for t in tensors if t.reason == ALREADY_QUANTIZED]
    rounded = copied or [t for t in tensors if t.reason is None and t.source_type not in _REQUANTIZABLE]
    if not rounded:
        return []
    share = sum(t.n_weights for t in rounded) / sum(t.n_weights for t in tensors)
    what = f"{len(rounded)} of its tensors ({share:.0%} of the weights) are already quantized below Q8_0"
    if not copied:
        return [f"{what}: losses count from what is left of them, not from the original model"]
    if all(t.reason is not None for t in tensors):
        hint = "start from an F16, BF16 or Q8_0 file, or pass --allow-requantize to lose quality twice"
        raise BadInput(source.path, f"{what}, and nothing else can be quantized", got=copied[0].source_type, hint=hint)
    return [f"{what} and are copied; --allow-requantize would round them twice"]
