"""Differences of structure between an output, the record of its making, and its source: one line each."""

from __future__ import annotations

from collections.abc import Iterator

from requant.container.source import Source
from requant.conversion.record import Conversion
from requant.errors import brief, quoted
from requant.model.weight_scales import SCALED_TYPE, weight_scale_name
from requant.planning.output_metadata import may_differ
from requant.planning.plan import Plan


def compare_with_record(target: Source, made: Conversion) -> Iterator[str]:
    """Of the structure; where the header's hash shows one that nothing else names, that."""
    size = sum(f.status.st_size for f in target.opened)
    n_found = 0
    for n_found, line in enumerate(_structure(target, made, size), start=1):  # noqa: B007
        yield line
    if not n_found and target.header_sha256 != made.header_sha256:
        found, said = target.header_sha256, made.header_sha256
        yield f"the header is not the one that was written: sha256 {found:.12}, record {said:.12}"


def _structure(target: Source, made: Conversion, size: int) -> Iterator[str]:
    if size != made.size:
        yield f"the file has {size} bytes, the record says {made.size}"
    written = {t.name: t.type for t in made.tensors}
    yield from _names([t.name for t in target.tensors], list(written), "the record")
    for tensor in target.tensors:
        if written.get(tensor.name, tensor.format.name) != tensor.format.name:
            yield f"tensor {quoted(tensor.name)} is {tensor.format.name}, the record says {written[tensor.name]}"


def _names(found: list[str], wanted: list[str], where: str) -> Iterator[str]:
    for name in sorted(set(wanted) - set(found)):
        yield f"tensor {quoted(name)} of {where} is missing"
    for name in sorted(set(found) - set(wanted)):
        yield f"tensor {quoted(name)} is not in {where}"
    if found != wanted and set(found) == set(wanted):
        yield f"the tensors are in another order than in {where}"


def made_elsewhere(target: Source, source: Source, made: Conversion | None) -> list[str]:
    """One line where `source` is not what the output says it was made from."""
    said = target.metadata.get("requant.source.header_sha256") if made is None else made.plan.header_sha256
    if said in (None, source.header_sha256):
        return []
    origin = "another source" if made is None else brief(made.plan.source)
    return [
        f"it was made from {origin} (sha256 of its header {said!s:.12}), "
        f"not from {brief(source.name)} ({source.header_sha256:.12}): the two are not compared"
    ]


def compare_metadata(target: Source, source: Source) -> Iterator[str]:
    """Keys that are not, byte for byte and in order, as in the source, where a conversion must not touch them."""
    wanted = [key for key in source.metadata if not may_differ(key)]
    found = [key for key in target.metadata if not may_differ(key)]
    for key in wanted:
        if key not in target.metadata:
            yield f"key {quoted(key)} of the source is missing"
        elif source.metadata.values[key] != target.metadata.values[key]:
            yield f"key {quoted(key)} has another value than in the source"
    for key in found:
        if key not in source.metadata:
            yield f"key {quoted(key)} is not in the source"
    if found != wanted and set(found) == set(wanted):
        yield "the keys are in another order than in the source"


def compare_tensors(target: Source, source: Source) -> Iterator[str]:
    """Names, order and shapes that are not the source's, but for companions that matrices got."""
    added = {weight_scale_name(t.name) for t in target.tensors if t.format.name == SCALED_TYPE}
    found = [t.name for t in target.tensors if t.name in source or t.name not in added]
    yield from _names(found, [t.name for t in source.tensors], "the source")
    for tensor in target.tensors:
        if tensor.name in source and source.tensor(tensor.name).shape != tensor.shape:
            shape = list(source.tensor(tensor.name).shape)
            yield f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, in the source {shape}"


def compare_with_plan(target: Source, plan: Plan) -> Iterator[str]:
    """A line for each tensor of `target` that is missing, or not of the type that the plan gives it."""
    for name, type_name in plan.types().items():
        if name not in target:
            yield f"tensor '{brief(name)}' of the plan is missing"
        elif (found := target.tensor(name).format.name) != type_name:
            yield f"tensor '{brief(name)}' is {found}, the plan says {type_name}"
