"""Verification of a finished output: every byte is read again and compared with what is known of it.

Always: the structure, zeros in the padding, no byte after it, and every weight decoded and finite. With the record
(OUT.requant.json): size, header, types and the SHA-256 of every tensor; copies may hold as many weights that are not
finite as it has recorded. Without it: the digests in the metadata, of the headers and of every tensor. With the source:
metadata key by key, names and shapes, copies byte by byte, and of every encoded tensor up to 64 rows evenly spread:
none may be lost, and their relative error, all columns alike, must be at most 1.5 times the recorded one plus 0.001;
without a record, 3 times the error of the type on normal weights. Compensated tensors are left out there: their weights
may be far off where their results are not. With source and record: all bytes of the source have the digests of those
that the output was made from. Only `encode_again` shows that each encoded byte follows from the source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from requant.common.cluster import Cluster, Step
from requant.common.threads import in_order, n_threads
from requant.container.digests import KEY, read_digests
from requant.container.remote import RemoteReader, RemoteSource, remote_sources
from requant.container.source import Source, SourceTensor
from requant.container.stray_bytes import find_stray_bytes
from requant.conversion.check_rows import (
    COMPENSATED,
    COPY,
    NOTHING,
    SAMPLE,
    SAMPLE_ROWS,
    CheckedRows,
    CheckedTensor,
    RowRange,
    check_rows,
    split_into_ranges,
    sum_up,
)
from requant.conversion.compare import (
    compare_metadata,
    compare_tensors,
    compare_with_digests,
    compare_with_record,
    describe_other_source,
)
from requant.conversion.record import Conversion, Converted, read_conversion, record_path
from requant.conversion.verification import DIGESTS, RECORD, SOURCE, Verification
from requant.errors import quote


@dataclass(frozen=True, slots=True)
class _TensorTask:
    """A tensor for another machine to check: its file, that of the source's tensor if it is compared, its rows."""

    target: RemoteSource
    origin: RemoteSource | None
    ranges: tuple[RowRange, ...]
    recorded: Converted | None


def find_record(out: Source, record: Path | None) -> Conversion | None:
    """Read the record of `out`: the file `record`, or the one beside it; None where there is none. Raises BadInput."""
    beside = record_path(out.files[0])  # that of a split output is beside its first file
    path = record if record is not None else beside if beside.exists() else None
    return None if path is None else read_conversion(path)


def verify_output(
    target: Source,
    *,
    source: Source | None,
    record: Conversion | None,
    threads: int | None = None,
    cluster: Cluster | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Verify an open output against `source` and its record, in threads or by the workers of `cluster`.

    `progress` is called with the bytes of the output after each range of rows. The decoders of both files are compiled
    in the threads that need them where the caller has not done so. Raises InputOutputError.
    """
    findings = [] if record is None else compare_with_record(target, record)
    strangers, origin = list[str](), None
    if source is not None:
        strangers = describe_other_source(target, source, record)
        findings += strangers or [*compare_metadata(target, source), *compare_tensors(target, source)]
        origin = None if strangers else source
    recorded = {} if record is None else {t.name: t for t in record.tensors}
    if cluster is None:
        results = _check_tensors(target, origin, recorded, n_threads(threads), progress)
    else:
        results = _check_on_cluster(cluster, target, origin, recorded, progress)
    with contextlib.closing(results):
        tensors = list(results)
    findings += [line for tensor in tensors for line in tensor.findings]
    digests, wrong = read_digests(target), [t.name for t in tensors if t.findings]
    # other tools may pad with anything, and append
    stray = [] if record is None and digests is None else list(find_stray_bytes(target))
    if digests is not None:
        others, lines = compare_with_digests(target, digests, {t.name: t.sha256 for t in tensors}, wrong)
        if record is None or len(findings) == len(strangers):
            findings += lines
            wrong = list(dict.fromkeys((*wrong, *others)))
        elif record.header_sha256 != target.header_sha256 and not (others or lines or stray):
            findings.append("by the digests in its own metadata it is as it was written: the record is of another file")
    findings += stray
    given = ((RECORD, record), (DIGESTS, digests), (SOURCE, origin))
    against = tuple(name for name, known in given if known is not None)
    return Verification(
        target.path,
        len(target.tensors),
        sum(t.n_bytes for t in target.tensors),
        against,
        tuple(findings),
        compared=tuple(_describe_comparisons(against, tensors, KEY in target.metadata)),
        wrong_tensors=tuple(wrong),
        misread_tensors=tuple(t.name for t in tensors if t.misread),
        other_source=bool(strangers),
    )


def _describe_comparisons(against: tuple[str, ...], tensors: list[CheckedTensor], has_digests: bool) -> Iterator[str]:
    """Yield a line for each thing that the output was compared with; has_digests: in its metadata, of any form."""
    if RECORD in against:
        yield "record: header and every byte of every tensor, by their SHA-256"
    elif DIGESTS in against:
        yield "digests in its metadata: header and every byte of every tensor"
    elif has_digests:
        yield "digests in its metadata: not compared, their form is not known"
    if SOURCE not in against:
        return
    n = {how: sum(t.how == how for t in tensors) for how in (COPY, SAMPLE, COMPENSATED, NOTHING)}
    parts = [
        f"{n[COPY]} copied tensors byte for byte" if n[COPY] else "",
        f"{n[SAMPLE]} encoded tensors by up to {SAMPLE_ROWS} rows each" if n[SAMPLE] else "",
        f"{n[COMPENSATED]} compensated tensors by names and shapes" if n[COMPENSATED] else "",
        f"{n[NOTHING]} tensors not compared" if n[NOTHING] else "",
    ]
    yield f"source: {', '.join(filter(None, parts))}"
    if any(t.has_digests for t in tensors):
        n_digests = sum(t.has_digests for t in tensors)
        yield f"record and source: every byte that {n_digests} tensors were made from, by SHA-256"


def _check_tensors(
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    threads: int,
    progress: Callable[[int], None],
) -> Generator[CheckedTensor, None, None]:
    """Check every tensor in threads, in file order."""
    ranges = (
        rows
        for tensor in target.tensors
        for rows in split_into_ranges(tensor, target, source, recorded.get(tensor.name))
    )
    with contextlib.closing(in_order(lambda rows: check_rows(target, source, rows), ranges, threads)) as results:
        for name, checked in groupby(_report_progress(results, progress), key=lambda c: c.rows.tensor.name):
            yield sum_up(checked, recorded.get(name))


def _check_on_cluster(
    cluster: Cluster,
    target: Source,
    source: Source | None,
    recorded: Mapping[str, Converted],
    progress: Callable[[int], None],
) -> Generator[CheckedTensor, None, None]:
    """Check every tensor by the workers of a cluster, one tensor per task."""
    targets, origins = remote_sources(target), () if source is None else remote_sources(source)

    def step(tensor: SourceTensor) -> Step:
        known = recorded.get(tensor.name)
        ranges = tuple(split_into_ranges(tensor, target, source, known))
        origin = None if ranges[0].origin is None else origins[ranges[0].origin.file]
        item = _TensorTask(targets[tensor.file], origin, ranges, known)
        return Step(_check_tensor, item, f"tensor {quote(tensor.name)}", about=tensor)

    with contextlib.closing(cluster.run(map(step, target.tensors))) as steps:
        for done in steps:
            progress(done.about.n_bytes)
            yield done.result


def _check_tensor(task: _TensorTask) -> CheckedTensor:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(RemoteReader(task.target))
        source = None if task.origin is None else stack.enter_context(RemoteReader(task.origin))
        return sum_up((check_rows(target, source, rows) for rows in task.ranges), task.recorded)


def _report_progress(results: Iterator[CheckedRows], progress: Callable[[int], None]) -> Iterator[CheckedRows]:
    for checked in results:
        progress(checked.data.size)
        yield checked
