"""Candidates: the types that each tensor of a source may have, before and after their losses are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from requant.container.imatrix import Imatrix, importance_for
from requant.container.source import Source, SourceTensor, require_model
from requant.errors import BadInput, UsageError
from requant.formats import FORMATS, BlockFormat, Effort, by_name
from requant.model.hyperparameters import Hyperparameters, check_counts, read_hyperparameters
from requant.model.memory import on_device
from requant.model.roles import candidates, is_below, is_lookup, is_tied, layer_of, never_quantize, role_of
from requant.scoring.losses import Candidate, Losses, TensorLosses
from requant.scoring.options import DEFAULT_TYPES, ScoringOptions

# as in llama-quantize: weights that were already rounded to fewer bits lose more than their size shows
_REQUANTIZABLE = ("F32", "F16", "BF16", "Q8_0")


def survey_to_score(
    source: Source, options: ScoringOptions, *, has_importance: bool = False
) -> tuple[tuple[TensorLosses, ...], list[str]]:
    """Return the survey of `source` for these options, and notes on the source.

    Raises what `survey` and `check_requantization` raise, UsageError for a type that cannot be written.
    """
    surveyed = survey(source, types=options.types, imatrix=options.imatrix, has_importance=has_importance)
    notes = check_requantization(source, surveyed, options.allow_requantize)
    for name in options.types:
        encoded_format(name)
    return surveyed, notes


def survey(
    source: Source,
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    imatrix: Imatrix | None = None,
    has_importance: bool = False,
) -> tuple[TensorLosses, ...]:
    """Return every tensor with its role and its candidates, or the reason why it keeps its type; all losses are 0.

    Types of more bits than the tensor has are no candidates: they would waste bytes and repair nothing. has_importance:
    all tensors will have measured importance, whether an imatrix covers them or not. Raises BadInput for a file that
    is no model.
    """
    arch = require_model(source)
    check_counts(source.metadata)
    names = {t.name for t in source.tensors}
    tied, hp = is_tied(names), _hyperparameters(source)
    weights = sum(t.n_weights for t in source.tensors)
    return tuple(
        _survey_tensor(
            arch,
            t,
            types,
            preserved=source.preserved.get(t.name),
            model_weights=weights,
            on_gpu=_is_on_gpu(hp, t.name, tied),
            has_importance=has_importance
            or (imatrix is not None and importance_for(imatrix, t.name, t.shape) is not None),
        )
        for t in source.tensors
    )


def _hyperparameters(source: Source) -> Hyperparameters | None:
    """Return None where the architecture's keys cannot be read: a budget in file size needs none of them."""
    try:
        return read_hyperparameters(source.metadata, source.tensors)
    except BadInput:
        return None


def _is_on_gpu(hp: Hyperparameters | None, name: str, tied: bool) -> bool:
    return not is_lookup(name, tied=tied) if hp is None else on_device(hp, name, tied=tied)


def _survey_tensor(
    arch: str,
    tensor: SourceTensor,
    types: Sequence[str],
    *,
    preserved: str | None,
    model_weights: int,
    on_gpu: bool,
    has_importance: bool,
) -> TensorLosses:
    own = tensor.format
    reason = preserved or never_quantize(arch, tensor.name, tensor.shape, tensor.type_id, model_weights=model_weights)
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    if reason is None:
        suitable, skipped = candidates(arch, tensor.name, tensor.shape, types, has_importance=has_importance)
        chosen = [t for t in suitable if is_below(t, own.name)]
        wasteful = [t for t in suitable if t != own.name and t not in chosen]
        skipped |= dict.fromkeys(wasteful, f"it is no smaller than the source's {own.name}")
    sizes = [(name, encoded_format(name).n_bytes(tensor.n_weights)) for name in chosen]
    return TensorLosses(
        name=tensor.name,
        role=role_of(tensor.name),
        layer=layer_of(tensor.name),
        shape=tensor.shape,
        source_type=own.name,
        n_bytes=tensor.n_bytes,
        on_gpu=on_gpu,
        reason=reason,
        candidates=(Candidate(own.name, tensor.n_bytes, 0.0), *(Candidate(n, size, 0.0) for n, size in sizes)),
        skipped=skipped,
    )


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
    """Return the losses of the tensors of `source`, under its name and header, whose encoders weighted by `imatrix`."""
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
    )


def encoded_format(name: str) -> BlockFormat:
    """Return the format called `name`. Raise UsageError where it cannot be written."""
    fmt = by_name(name)
    if fmt is None or not fmt.can_encode:
        written = ", ".join(f.name for f in FORMATS.values() if f.can_encode and f.block_weights > 1)
        raise UsageError(f"{name} cannot be written; choose among {written}")
    return fmt


def formats_involved(source: Source, types: Sequence[str]) -> list[BlockFormat]:
    """Return the formats whose kernels scoring will call, each once."""
    decoded = {t.format for t in source.tensors if t.format.can_decode}
    return sorted(decoded | {encoded_format(t) for t in types}, key=lambda f: f.type_id)


def check_requantization(source: Source, tensors: Sequence[TensorLosses], allowed: bool) -> list[str]:
    """Return notes on a source with matrices already rounded below Q8_0. Raise BadInput for it unless `allowed`."""
    rounded = [t for t in tensors if t.reason is None and t.source_type not in _REQUANTIZABLE]
    if not rounded:
        return []
    total = sum(t.n_weights for t in tensors)
    share = sum(t.n_weights for t in rounded) / total
    what = f"{len(rounded)} of its tensors ({share:.0%} of the weights) are already quantized below Q8_0"
    if not allowed:
        hint = "start from an F16, BF16 or Q8_0 file, or pass --allow-requantize to lose quality twice"
        raise BadInput(source.path, what, got=rounded[0].source_type, hint=hint)
    return [f"{what}: losses count from what is left of them, not from the original model"]
