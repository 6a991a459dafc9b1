"""Second-level scales of a conversion: found from the source's peaks, one per matrix, and written as F32 tensors."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from requant.common.threads import in_order, n_threads
from requant.container.output import Output
from requant.container.source import Source
from requant.conversion.chunks import TensorJob, find_peaks, hash_leaves, split_into_pieces
from requant.conversion.options import ConversionOptions
from requant.conversion.record import Converted, SourceDigest
from requant.conversion.write_on_cluster import find_peaks_on_cluster
from requant.formats import codec
from requant.formats.codec import Bytes
from requant.model.weight_scales import read_weight_scales, weight_scale_shape


def add_scales(
    source: Source, jobs: Sequence[TensorJob], scaled: Mapping[str, str], options: ConversionOptions
) -> list[TensorJob]:
    """Return the jobs with the scales, one per matrix, of the tensors in `scaled`, which are read once more for it."""
    empty = {name: np.zeros(weight_scale_shape(name, source.tensor(name).shape)[0], np.float32) for name in scaled}
    jobs = [replace(job, scales=empty.get(job.tensor.name)) for job in jobs]
    pieces = [piece for job in jobs if job.scales is not None for piece in split_into_pieces(job)]

    digests: dict[str, list[str]] = {name: [] for name in scaled}
    if options.cluster is None:
        run = in_order(partial(find_peaks, source), pieces, n_threads(options.threads))
    else:
        run = find_peaks_on_cluster(options.cluster, source, pieces)
    with contextlib.closing(run) as results:
        for piece, (values, sha256) in zip(pieces, results, strict=True):
            peaks = empty[piece.name]
            digests[piece.name].append(sha256)
            for chunk, value in zip(piece.chunks, values, strict=True):
                matrix = chunk.first_row * len(peaks) // piece.job.tensor.n_rows
                peaks[matrix] = max(peaks[matrix], value)
    scales = {n: np.array([codec.second_scale(float(p)) for p in peaks], np.float32) for n, peaks in empty.items()}
    return [
        replace(job, scales=scales.get(job.tensor.name), source_sha256=tuple(digests.get(job.tensor.name, ())))
        for job in jobs
    ]


def write_scales(
    source: Source, output: Output, jobs: Sequence[TensorJob], scaled: Mapping[str, str]
) -> Iterator[Converted]:
    """Write the scales of `jobs`, each times the scale that the source already has for that matrix."""
    for job in jobs:
        if job.scales is not None:
            name, (data, digests) = scaled[job.tensor.name], combine_scales(source, job)
            ((file, placed),) = ((i, t) for i, x in enumerate(output.layouts) for t in x.tensors if t.name == name)
            if not output.is_published:
                output.write_at(file, placed.offset, data)
            sha256 = hashlib.sha256(data.data).hexdigest()
            yield Converted(name, "F32", "F32", data.size, 0.0, 0.0, sha256, source=digests, weighted=False)


def combine_scales(source: Source, job: TensorJob) -> tuple[Bytes, tuple[SourceDigest, ...]]:
    """Return the bytes (1, n) of the scales of `job` times those of the source, and the digest of the latter."""
    assert job.scales is not None
    before = read_weight_scales(source, job.tensor)
    scales = job.scales if before is None else job.scales * before
    digests: tuple[SourceDigest, ...] = ()
    if before is not None:
        leaf = hash_leaves(before.astype("<f4").view(np.uint8).reshape(1, -1), 1)
        digests = (SourceDigest(1, 1, hashlib.sha256(leaf).hexdigest()),)
    return scales.astype("<f4").view(np.uint8).reshape(1, -1), digests
