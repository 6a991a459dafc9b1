"""Output layout: every file's header and the place of every tensor, known before a byte is written."""

from __future__ import annotations

from requant.container.imatrix import Imatrix
from requant.container.layout import Layout
from requant.container.source import Source, SourceTensor
from requant.container.splitting import WHOLE, Splitting, Tensor, lay_out_files
from requant.errors import BadInput, quote
from requant.formats import BlockFormat, format_of
from requant.model.weight_scales import SCALED_TYPE, takes_weight_scale, weight_scale_name, weight_scale_shape
from requant.planning.output_metadata import output_metadata
from requant.planning.plan import Choice, Plan


def output_layouts(
    source: Source, plan: Plan, imatrix: Imatrix | None = None, splitting: Splitting = WHOLE
) -> tuple[Layout, ...]:
    """Lay out each file that `convert` will write: its header and every tensor's place.

    Raises BadInput where the plan was made for another source, or a choice cannot be encoded.
    """
    scaled = weight_scale_names(source, plan)
    tensors: list[Tensor] = []
    origins: list[int] = []
    for tensor, choice in zip(source.tensors, _ordered_choices(source, plan), strict=True):
        tensors.append((tensor.name, tensor.shape, format_of(choice.type).type_id))
        scale = scaled.get(tensor.name)
        if scale is not None and scale not in source:
            tensors.append((scale, weight_scale_shape(tensor.name, tensor.shape), format_of("F32").type_id))
        origins += [tensor.file] * (len(tensors) - len(origins))
    metadata = output_metadata(source, plan, imatrix, len(tensors))
    return lay_out_files(metadata, tensors, origins, source.path, splitting)


def _ordered_choices(source: Source, plan: Plan) -> list[Choice]:
    """The plan's choices in the order of the source's tensors, each one feasible."""
    if plan.header_sha256 != source.header_sha256:
        what, hint = "the plan was made for another file", "plan again with this one"
        raise BadInput(source.path, what, got=plan.header_sha256[:16], expected=source.header_sha256[:16], hint=hint)
    planned = {c.name: c for c in plan.choices}
    for choice in plan.choices:
        source.tensor(choice.name)
    for tensor in source.tensors:
        wrong = _choice_fault(tensor, planned.get(tensor.name))
        if wrong is not None:
            raise BadInput(source.path, f"tensor {quote(tensor.name)} {wrong}")
    return [planned[t.name] for t in source.tensors]


def _choice_fault(tensor: SourceTensor, choice: Choice | None) -> str | None:
    """The reason, as part of a message, why the choice does not suit the tensor; None where it does."""
    if choice is None:
        return "is not in the plan"
    if (choice.shape, choice.source_type) != (tensor.shape, tensor.format.name):
        return (
            f"is {choice.source_type} {list(choice.shape)} in the plan, not {tensor.format.name} {list(tensor.shape)}"
        )
    return None if choice.copied else _encoding_fault(tensor, format_of(choice.type))


def _encoding_fault(tensor: SourceTensor, fmt: BlockFormat) -> str | None:
    if not fmt.can_encode:
        return f"cannot be {fmt.name}, which requant does not write"
    if not tensor.format.can_decode:
        return f"cannot be {fmt.name}: its {tensor.format.name} values are no weights"
    if not fmt.divides(tensor.n_per_row) or not tensor.n_weights:
        return f"cannot be {fmt.name}: a row of {tensor.n_per_row} is not whole blocks of {fmt.block_weights}"
    return None


def weight_scale_names(source: Source, plan: Plan) -> dict[str, str]:
    """Matrix -> name of its scale, for all that `plan` encodes as NVFP4 and the engine scales."""
    encoded = (c.name for c in plan.choices if c.type == SCALED_TYPE and not c.copied)
    return {name: weight_scale_name(name) for name in encoded if takes_weight_scale(source, source.tensor(name))}
