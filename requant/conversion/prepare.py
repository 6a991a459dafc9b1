"""Preparation of an output: the header of every file and a job for every tensor, before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from requant.container.imatrix import Imatrix, describe_shared_rows, importance_for
from requant.container.layout import Layout
from requant.container.source import Source
from requant.container.splitting import Splitting
from requant.conversion.chunks import TensorJob
from requant.errors import BadInput, quote
from requant.formats import BlockFormat, format_of
from requant.formats.codec import Floats
from requant.model.roles import needs_importance
from requant.planning.output_layout import output_layouts, weight_scale_names
from requant.planning.plan import Plan
from requant.scoring.losses import Losses


@dataclass(frozen=True, slots=True)
class PreparedOutput:
    """The files and tensors that a conversion will write.

    layouts: of every file. jobs: one for every tensor carried over from the source, in the order of the output, without
    second-level scales. scaled: matrix -> the F32 tensor of its second-level scales. notes: lines for the user.
    """

    layouts: tuple[Layout, ...]
    jobs: tuple[TensorJob, ...]
    scaled: Mapping[str, str]
    notes: tuple[str, ...]


def prepare_output(
    source: Source, plan: Plan, imatrix: Imatrix | None, losses: Losses | None, splitting: Splitting
) -> PreparedOutput:
    """Return what `plan` makes of `source`. Raises BadInput where plan, imatrix or losses do not fit the source."""
    layouts = output_layouts(source, plan, imatrix, splitting)
    importance = find_importance(source, plan, imatrix)
    notes = compatibility_notes(source, plan, imatrix, losses, importance)
    scaled = weight_scale_names(source, plan)
    written = set(scaled.values())
    choices = {c.name: c for c in plan.choices if c.name not in written}
    jobs = tuple(
        TensorJob(
            source.tensor(t.name), choice, format_of(choice.type), i, t.offset, importance.get(t.name), plan.effort
        )
        for i, layout in enumerate(layouts)
        for t in layout.tensors
        if (choice := choices.get(t.name)) is not None
    )
    return PreparedOutput(layouts, jobs, scaled, tuple(notes))


def formats_used(plan: Plan) -> list[BlockFormat]:
    """The formats whose kernels a conversion calls, once each, by type id."""
    used = {format_of(name) for choice in plan.choices for name in (choice.source_type, choice.type)}
    return sorted((fmt for fmt in used if fmt.can_decode), key=lambda fmt: fmt.type_id)


def find_importance(source: Source, plan: Plan, imatrix: Imatrix | None) -> dict[str, Floats]:
    """Importance (n_matrices, n_per_row) of each tensor to be encoded that the imatrix covers.

    Raises BadInput where a type needs importance and there is none.
    """
    found: dict[str, Floats] = {}
    missing: list[str] = []
    for choice in plan.choices:
        importance = None if imatrix is None or choice.copied else importance_for(imatrix, choice.name, choice.shape)
        if importance is not None:
            found[choice.name] = importance
        elif not choice.copied and needs_importance(choice.type, choice.role):
            missing.append(quote(choice.name))
    if missing:
        names = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        what = f"{len(missing)} tensors have a type that needs an importance matrix, and none covers them: {names}"
        if imatrix is None:
            raise BadInput(source.path, what, hint="pass one with --imatrix")
        hint = "plan again with this --imatrix, or give these tensors a type that needs none: --tensor-type REGEX=q4_k"
        raise BadInput(imatrix.path, what, hint=hint)
    return found


def compatibility_notes(
    source: Source, plan: Plan, imatrix: Imatrix | None, losses: Losses | None, importance: Mapping[str, Floats]
) -> list[str]:
    """Lines on what does not quite fit together. Raises BadInput for losses of another model."""
    notes = []
    if losses is not None:
        scored = sorted((t.name, t.shape) for t in losses.tensors)
        if scored != sorted((t.name, t.shape) for t in source.tensors):
            raise BadInput(source.path, "the losses were made for another model", hint="score this one again")
        if losses.header_sha256 != source.header_sha256:
            notes.append("the losses were made for another file with the same tensors")
        if losses.effort != plan.effort:
            notes.append(f"the losses were made with effort {losses.effort.name.lower()}")
    sha256 = None if imatrix is None else imatrix.sha256
    if losses is not None and losses.imatrix_sha256 != sha256:
        notes.append("the losses were made with another imatrix than the tensors")
    if plan.imatrix_sha256 not in (None, sha256):
        notes.append("the plan was made for another imatrix than that of the tensors")
    # no imatrix covers an embedding: it is looked up, and has no inputs
    encoded = [c for c in plan.choices if not c.copied and (c.role != "token_embd" or c.name in importance)]
    if imatrix is not None:
        if len(importance) < len(encoded):
            n = len(encoded) - len(importance)
            notes.append(f"the imatrix does not cover {n} of {len(encoded)} encoded tensors")
        notes += describe_shared_rows(imatrix, ((c.name, c.shape) for c in encoded))
    return [note for note in notes if note not in plan.notes]
