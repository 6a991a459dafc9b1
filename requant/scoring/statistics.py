"""Statistics of a model: sums of squared inputs and gradients of every matrix, with the tokens behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from requant.common.atomic_write import read_head, write_file
from requant.common.notebook import html
from requant.container.imatrix import COUNTS, GRADIENTS, LOOKUP, SUMS, Imatrix, entry_of
from requant.container.layout import Layout, lay_out
from requant.container.metadata import Metadata
from requant.container.source import Source, open_files
from requant.errors import NumericFault, printable, quote
from requant.formats.codec import Floats
from requant.model.roles import has_own_inputs, n_matrices

Sums = NDArray[np.float64]
SIDECAR_HEAD = 4096  # bytes of a sidecar that contain the name of its output
_SIDECAR_OF = "requant.sidecar_of"


@dataclass(slots=True)
class SquareSums:
    """Sums of one matrix over `count` tokens: squared inputs (n_per_row,) and gradients (n_rows,), 0.0 without."""

    count: int = 0
    inputs: Sums | float = 0.0
    gradients: Sums | float = 0.0

    def add(self, other: SquareSums) -> None:
        """Add the sums over other tokens."""
        self.count += other.count
        self.inputs = self.inputs + other.inputs
        self.gradients = self.gradients + other.gradients


@dataclass(slots=True)
class Statistics:
    """Sums over `n_tokens` tokens in windows of `n_ctx`, by matrix: (tensor name, expert or None).

    engine: what ran the model, None for requant itself.
    """

    n_tokens: int
    n_ctx: int
    matrices: dict[tuple[str, int | None], SquareSums] = field(default_factory=dict, repr=False)
    engine: str | None = None

    def _repr_html_(self) -> str:
        return html(self)

    def add(self, prefix: str, sums: Mapping[tuple[str, int | None], SquareSums]) -> None:
        """Add sums over some tokens; `prefix` goes before the tensors' names."""
        for (name, expert), found in sums.items():
            self.matrices.setdefault((prefix + name, expert), SquareSums()).add(found)

    def n_unseen(self, source: Source) -> int:
        """Return the number of experts of which some tensor saw no token."""
        names = {name for name, expert in self.matrices if expert is not None}
        return sum(
            self.matrices.get((t.name, m), SquareSums()).count == 0
            for t in source.tensors
            if t.name in names and t.name.endswith("_down_exps.weight")
            for m in range(n_matrices(t.shape))
        )

    def imatrix(self, source: Source, name: str) -> Imatrix:
        """Return the importance matrix of the file that `write_statistics` writes; name: of the text."""
        layout, arrays = _lay_out(self, source, name, name)
        lookup = self.matrices.get((LOOKUP, None))
        return Imatrix(
            path=name,
            sha256=_hash_file(layout, arrays),
            entries={
                tensor.name: entry_of(
                    arrays[tensor.name + SUMS], arrays[tensor.name + COUNTS][:, 0], arrays.get(tensor.name + GRADIENTS)
                )
                for tensor in source.tensors
                if tensor.name + SUMS in arrays
            },
            datasets=(name,),
            chunk_count=self.n_tokens // self.n_ctx,
            legacy=False,
            chunk_size=self.n_ctx,
            lookup=None if lookup is None else (np.asarray(lookup.gradients) / self.n_tokens).astype(np.float32),
        )

    def finite_arrays(self, source: Source) -> Iterator[tuple[str, tuple[Floats, Floats, Floats | None]]]:
        """Yield name and `arrays` of each tensor of `source` that was seen. Raise NumericFault for infinity."""
        for tensor in source.tensors:
            found = self.arrays(tensor.name, tensor.shape)
            if found is None:
                continue
            if not all(np.isfinite(x).all() for x in found if x is not None):
                what = f"the inputs or gradients of tensor {quote(tensor.name)} are too large to be squared"
                raise NumericFault(source.path, what, hint="the file is damaged")
            yield tensor.name, found

    def arrays(self, name: str, shape: Sequence[int]) -> tuple[Floats, Floats, Floats | None] | None:
        """Return sums of squared inputs (n_matrices, n_per_row), counts (n_matrices,), and sums of squared gradients.

        The last are (n_matrices, n_rows), or None where no gradients were seen. None for a tensor that was not seen.
        """
        own = has_own_inputs(name, shape)
        n = n_matrices(shape) if own else 1
        found = [self.matrices.get((name, m if own else None)) for m in range(n)]
        if not any(f is not None for f in found):
            return None
        with np.errstate(over="ignore"):  # infinity is the caller's to find
            counts = np.array([0 if f is None else f.count for f in found], np.float32)
            inputs = np.array([np.broadcast_to(0.0 if f is None else f.inputs, shape[0]) for f in found], np.float32)
            if all(f is None or np.ndim(f.gradients) == 0 for f in found):
                return inputs, counts, None
            width = max(np.size(f.gradients) for f in found if f is not None)
            gradients = [np.broadcast_to(0.0 if f is None else f.gradients, width) for f in found]
            return inputs, counts, np.array(gradients, np.float32)


def is_sidecar_of(out: str, head: bytes) -> bool:
    """Return whether a file that begins with `head` was written as the sidecar of the output called `out`."""
    return head.startswith(b"GGUF") and Metadata("", {}).with_values(_sidecar_key(out)).encode() in head


def _sidecar_key(out: str) -> dict[str, tuple[str, str]]:
    return {_SIDECAR_OF: ("str", printable(out))}


def hash_sidecar(path: Path) -> str:
    """Return the SHA-256, in hex, that the statistics in the sidecar at `path` have in a file that is none.

    Raises BadInput, InputOutputError.
    """
    with open_files([path]) as source:
        tensors = [(t.name, t.shape, t.type_id) for t in source.tensors]
        layout = lay_out(source.metadata.with_values({_SIDECAR_OF: None}), tensors, path)
        return _hash_file(layout, {t.name: source.read_rows(t) for t in source.tensors})


def _lay_out(
    statistics: Statistics, source: Source, text: str, path: object, sidecar_of: str | None = None
) -> tuple[Layout, dict[str, Floats]]:
    """Lay out the file of the statistics of `source`; return it with the tensors' arrays by name."""
    arrays: dict[str, Floats] = {}
    for name, (sums, counts, gradients) in statistics.finite_arrays(source):
        arrays[name + SUMS] = sums
        arrays[name + COUNTS] = counts[:, None]
        if gradients is not None:
            arrays[name + GRADIENTS] = gradients
    if (LOOKUP, None) in statistics.matrices:
        arrays[LOOKUP + GRADIENTS] = np.array(statistics.matrices[LOOKUP, None].gradients, np.float32)
    metadata = Metadata(str(path), {}).with_values(
        {
            "general.type": ("str", "imatrix"),
            "imatrix.datasets": ("arr_str", [printable(text)]),
            "imatrix.chunk_count": ("u32", statistics.n_tokens // statistics.n_ctx),
            "imatrix.chunk_size": ("u32", statistics.n_ctx),
            **({} if statistics.engine is None else {"requant.engine": ("str", statistics.engine)}),
            **({} if sidecar_of is None else _sidecar_key(sidecar_of)),
        }
    )
    return lay_out(metadata, [(name, x.shape[::-1], 0) for name, x in arrays.items()], path), arrays


def _hash_file(layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of the file's bytes, in hex, without writing it."""
    digest, end = hashlib.sha256(layout.header), len(layout.header)
    for placed in layout.tensors:
        digest.update(bytes(placed.offset - end))
        digest.update(np.ascontiguousarray(arrays[placed.name]).data)
        end = placed.offset + placed.n_bytes
    digest.update(bytes(layout.size - end))
    return digest.hexdigest()


def write_statistics(
    path: Path, statistics: Statistics, source: Source, text: str, *, force: bool, sidecar_of: str | None = None
) -> None:
    """Write `statistics` to `path` as a GGUF importance matrix, gradients in tensors `W.g_sum2` that others ignore.

    text: name of the text that the tokens are from. sidecar_of: the name of the unfinished output whose sidecar this
    is, by which `is_sidecar_of` knows it; such a file is replaced. Raises OutputRefused, InputOutputError.
    """
    layout, arrays = _lay_out(statistics, source, text, path, sidecar_of)

    def is_own(path: Path) -> bool:
        return sidecar_of is not None and is_sidecar_of(sidecar_of, read_head(path, SIDECAR_HEAD))

    def fill(file: IO[bytes]) -> None:
        file.write(layout.header)
        for placed in layout.tensors:
            file.write(bytes(placed.offset - file.tell()))
            file.write(arrays[placed.name].reshape(-1).view(np.uint8).data)
        file.write(bytes(layout.size - file.tell()))

    write_file(path, fill, force=force, is_own=is_own)
