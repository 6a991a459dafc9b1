"""Comparison of an output's structure with its record, its source and a plan: one line for each difference."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from requant.container.digests import Digests, digest_tensor, hash_headers
from requant.container.shards import n_files_of
from requant.container.source import Source
from requant.conversion.record import Conversion
from requant.errors import brief, quote
from requant.model.weight_scales import SCALED_TYPE, weight_scale_name
from requant.planning.output_metadata import may_differ
from requant.planning.plan import Plan


def compare_with_record(target: Source, record: Conversion) -> list[str]:
    """Compare size, names and types with the record; where they agree, the hash of the header."""
    size, written = sum(f.status.st_size for f in target.opened), {t.name: t.type for t in record.tensors}
    lines = [] if size == record.size else [f"the file has {size} bytes, the record says {record.size}"]
    lines += _compare_names([t.name for t in target.tensors], list(written), "the record")
    for tensor in target.tensors:
        if written.get(tensor.name, tensor.format.name) != tensor.format.name:
            lines.append(f"tensor {quote(tensor.name)} is {tensor.format.name}, the record says {written[tensor.name]}")
    if not lines and target.header_sha256 != record.header_sha256:
        what = "the header is not the one that was written"
        return [f"{what}: sha256 {target.header_sha256:.12}, record {record.header_sha256:.12}"]
    return lines


def compare_with_digests(
    target: Source, digests: Digests, sha256: Mapping[str, str], known: Collection[str]
) -> tuple[list[str], list[str]]:
    """Compare headers and tensors with the digests in the metadata; sha256: of each tensor's bytes, by name, in hex.

    Return the tensors without a digest, and a line for each difference, but none for a tensor of those `known`.
    """
    found = {t.name: digest_tensor(t.name, t.type_id, t.shape, sha256[t.name]) for t in target.tensors}
    wrong = digests.without(found)
    lines = list(_describe_digests(target, digests, wrong, known))
    if not wrong and not lines and not digests.in_order(found.values()):
        lines.append("the digests in the metadata are not in the order in which they were written")
    return wrong, lines


def _describe_digests(target: Source, digests: Digests, wrong: Sequence[str], known: Collection[str]) -> Iterator[str]:
    tensors, new = target.tensors, [name for name in wrong if name not in known]
    whole = not wrong and len(tensors) == digests.n_tensors
    if hash_headers(target) == digests.headers:
        yield from (f"tensor {quote(name)} is not as it was written, by its digest in the metadata" for name in new)
    elif whole:
        what = f"all {len(tensors)} tensors are as they were written, but the header is not"
        yield f"{what}: another tool has edited or split the file since, or the header is damaged"
    else:
        shown = f"{len(wrong)} of {len(tensors)} tensors are not those that were written"
        shown += f", the first {quote(wrong[0])}" if wrong else ""
        shown += "" if len(tensors) == digests.n_tensors else f"; {digests.n_tensors} tensors were written"
        yield f"the header and {shown}: another tool has changed the file since, or it is damaged"


def _compare_names(found: list[str], wanted: list[str], where: str) -> Iterator[str]:
    for name in sorted(set(wanted) - set(found)):
        yield f"tensor {quote(name)} of {where} is missing"
    for name in sorted(set(found) - set(wanted)):
        yield f"tensor {quote(name)} is not in {where}"
    if found != wanted and set(found) == set(wanted):
        yield f"the tensors are in another order than in {where}"


def describe_other_source(target: Source, source: Source, record: Conversion | None) -> list[str]:
    """Return one line where the output was made from another source than `source`, by its record or its metadata.

    A source with the same tensors and keys in another number of files is the same: its headers differ in the keys of
    the split alone.
    """
    key = "requant.source.header_sha256"
    written = target.metadata.get(key) if record is None else record.plan.header_sha256
    if written in (None, source.header_sha256) or _is_split_otherwise(target, source, record):
        return []
    origin = "another source" if record is None else brief(record.plan.source)
    return [
        f"it was made from {origin} (sha256 of its header {written!s:.12}), "
        f"not from {brief(source.name)} ({source.header_sha256:.12}): the two are not compared"
    ]


def _is_split_otherwise(target: Source, source: Source, record: Conversion | None) -> bool:
    """Return whether `source` differs from the one that the output was made from in its number of files alone."""
    name = target.metadata.get("requant.source.name") if record is None else record.plan.source
    if not isinstance(name, str) or n_files_of(name) == len(source.files):
        return False
    types = {} if record is None else {choice.name: choice.source_type for choice in record.plan.choices}
    same_types = all(types.get(t.name, t.format.name) == t.format.name for t in source.tensors)
    return same_types and not any(compare_metadata(target, source)) and not any(compare_tensors(target, source))


def compare_metadata(target: Source, source: Source) -> Iterator[str]:
    """Compare, byte for byte and in order, the keys that a conversion must leave as they are in the source."""
    wanted = [key for key in source.metadata if not may_differ(key)]
    found = [key for key in target.metadata if not may_differ(key)]
    for key in wanted:
        if key not in target.metadata:
            yield f"key {quote(key)} of the source is missing"
        elif source.metadata.values[key] != target.metadata.values[key]:
            yield f"key {quote(key)} has another value than in the source"
    for key in found:
        if key not in source.metadata:
            yield f"key {quote(key)} is not in the source"
    if found != wanted and set(found) == set(wanted):
        yield "the keys are in another order than in the source"


def compare_tensors(target: Source, source: Source) -> Iterator[str]:
    """Compare names, order and shapes with the source's, except for the scales that a conversion adds."""
    added = {weight_scale_name(t.name) for t in target.tensors if t.format.name == SCALED_TYPE}
    found = [t.name for t in target.tensors if t.name in source or t.name not in added]
    yield from _compare_names(found, [t.name for t in source.tensors], "the source")
    for tensor in target.tensors:
        if tensor.name in source and source.tensor(tensor.name).shape != tensor.shape:
            shape = list(source.tensor(tensor.name).shape)
            yield f"tensor {quote(tensor.name)} has shape {list(tensor.shape)}, in the source {shape}"


def compare_with_plan(target: Source, plan: Plan) -> Iterator[str]:
    """Compare the types of the tensors with those of the plan."""
    for name, type_name in plan.types().items():
        if name not in target:
            yield f"tensor '{brief(name)}' of the plan is missing"
        elif (found := target.tensor(name).format.name) != type_name:
            yield f"tensor '{brief(name)}' is {found}, the plan says {type_name}"
