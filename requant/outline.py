"""Outline: what a conversion will write, known before a byte is: every file's header, and a job for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from requant.chunks import Job
from requant.codec import Floats
from requant.container.cursor import quoted
from requant.container.layout import Layout
from requant.container.source import Source, SourceTensor
from requant.container.splitting import WHOLE, Splitting, Tensor, lay_out_files
from requant.errors import BadInput
from requant.formats import BlockFormat, format_of
from requant.imatrix import Imatrix, importance_for
from requant.model.companions import SECOND_LEVEL, companion_of, companion_shape
from requant.model.roles import needs_importance
from requant.model.scales import takes_second_level
from requant.plan import Choice, Losses, Plan
from requant.provenance import output_metadata


def output_layouts(
    source: Source, plan: Plan, imatrix: Imatrix | None = None, splitting: Splitting = WHOLE
) -> tuple[Layout, ...]:
    """The header and every tensor's place in each file that `convert` will write.

    Raises BadInput where the plan was made for another source, or asks for what cannot be done.
    """
    scaled = second_level(source, plan)
    tensors: list[Tensor] = []
    origins: list[int] = []
    for tensor, choice in zip(source.tensors, _choices(source, plan), strict=True):
        tensors.append((tensor.name, tensor.shape, format_of(choice.type).type_id))
        companion = scaled.get(tensor.name)
        if companion is not None and companion not in source:
            tensors.append((companion, companion_shape(tensor.name, tensor.shape), format_of("F32").type_id))
        origins += [tensor.file] * (len(tensors) - len(origins))
    return lay_out_files(output_metadata(source, plan, imatrix), tensors, origins, source.path, splitting)


def jobs_of(source: Source, plan: Plan, layouts: Sequence[Layout], importance: Mapping[str, Floats]) -> list[Job]:
    """A job for every tensor that is carried over from `source`, in the order of the output."""
    written = set(second_level(source, plan).values())
    choices = {c.name: c for c in plan.choices if c.name not in written}
    return [
        Job(source.tensor(t.name), choice, format_of(choice.type), i, t.offset, importance.get(t.name), plan.effort)
        for i, layout in enumerate(layouts)
        for t in layout.tensors
        if (choice := choices.get(t.name)) is not None
    ]


def formats_used(plan: Plan) -> list[BlockFormat]:
    """The formats whose kernels a conversion calls, once each."""
    used = {format_of(name) for choice in plan.choices for name in (choice.source_type, choice.type)}
    return sorted((fmt for fmt in used if fmt.can_decode), key=lambda fmt: fmt.type_id)


def _choices(source: Source, plan: Plan) -> list[Choice]:
    """The plan's choices in the order of the source's tensors, each one feasible."""
    if plan.header_sha256 != source.header_sha256:
        what, hint = "the plan was made for another file", "plan again with this one"
        raise BadInput(source.path, what, got=plan.header_sha256[:16], expected=source.header_sha256[:16], hint=hint)
    planned = {c.name: c for c in plan.choices}
    for choice in plan.choices:
        source.tensor(choice.name)
    for tensor in source.tensors:
        wrong = _infeasible(tensor, planned.get(tensor.name))
        if wrong is not None:
            raise BadInput(source.path, f"tensor {quoted(tensor.name)} {wrong}")
    return [planned[t.name] for t in source.tensors]


def _infeasible(tensor: SourceTensor, choice: Choice | None) -> str | None:
    if choice is None:
        return "is not in the plan"
    if (choice.shape, choice.source_type) != (tensor.shape, tensor.format.name):
        return (
            f"is {choice.source_type} {list(choice.shape)} in the plan, not {tensor.format.name} {list(tensor.shape)}"
        )
    return None if choice.copied else _cannot_encode(tensor, format_of(choice.type))


def _cannot_encode(tensor: SourceTensor, fmt: BlockFormat) -> str | None:
    if not fmt.can_encode:
        return f"cannot be {fmt.name}, which requant does not write"
    if not tensor.format.can_decode:
        return f"cannot be {fmt.name}: its {tensor.format.name} values are no weights"
    if not fmt.divides(tensor.n_per_row) or not tensor.n_weights:
        return f"cannot be {fmt.name}: a row of {tensor.n_per_row} is not whole blocks of {fmt.block_weights}"
    return None


def importance_of(source: Source, plan: Plan, imatrix: Imatrix | None) -> dict[str, Floats]:
    """(n_matrices, n_per_row) for each tensor to be encoded that the imatrix covers."""
    found: dict[str, Floats] = {}
    missing: list[str] = []
    for choice in plan.choices:
        importance = None if imatrix is None or choice.copied else importance_for(imatrix, choice.name, choice.shape)
        if importance is not None:
            found[choice.name] = importance
        elif not choice.copied and needs_importance(choice.type, choice.role):
            missing.append(quoted(choice.name))
    if missing:
        names = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        what = f"{len(missing)} tensors have a type that needs an importance matrix, and none covers them: {names}"
        raise BadInput(source.path if imatrix is None else imatrix.path, what, hint="pass one with --imatrix")
    return found


def notes_on(
    source: Source, plan: Plan, imatrix: Imatrix | None, losses: Losses | None, importance: Mapping[str, Floats]
) -> list[str]:
    """What does not quite fit together, a line each; raises BadInput for losses of another model."""
    notes = []
    if losses is not None:
        scored = sorted((t.name, t.shape) for t in losses.tensors)
        if scored != sorted((t.name, t.shape) for t in source.tensors):
            raise BadInput(source.path, "the losses were made for another model", hint="score this one again")
        if losses.header_sha256 != source.header_sha256:
            notes.append("the losses were made for another file with the same tensors")
        if losses.imatrix_sha256 != (None if imatrix is None else imatrix.sha256):
            notes.append("the losses were made with another imatrix than the tensors")
        if losses.effort != plan.effort:
            notes.append(f"the losses were made with effort {losses.effort.name.lower()}")
    # no imatrix covers an embedding: it is looked up, and has no inputs
    encoded = [c for c in plan.choices if not c.copied and (c.role != "token_embd" or c.name in importance)]
    if imatrix is not None and len(importance) < len(encoded):
        notes.append(f"the imatrix does not cover {len(encoded) - len(importance)} of {len(encoded)} encoded tensors")
    return notes


def second_level(source: Source, plan: Plan) -> dict[str, str]:
    """Matrix -> its companion, of all that `plan` encodes as NVFP4 and the engine scales."""
    encoded = (c.name for c in plan.choices if c.type == SECOND_LEVEL and not c.copied)
    return {name: companion_of(name) for name in encoded if takes_second_level(source, source.tensor(name))}
