"""A model's weights as float arrays, decoded at each request and not stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.container.source import Source, SourceTensor
from requant.errors import NumericFault, brief
from requant.formats import codec
from requant.formats.codec import Floats
from requant.model.nonfinite import nonfinite_fault
from requant.model.weight_scales import is_weight_scale, read_weight_scales

if TYPE_CHECKING:
    from requant.model.forward.tape import Array

Change = Callable[[SourceTensor, Floats], Floats]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of `source` as `dtype`, times their weight scales.

    change: replaces a tensor's rows (n_rows, n_per_row) before they are used, to try other weights.
    """

    source: Source
    change: Change | None = None
    dtype: Any = np.float32

    def get(self, name: str) -> Array | None:
        """Return a tensor with its last dimension first, (n_rows, n_per_row) for a matrix; None where it is missing."""
        if name not in self.source:
            return None
        tensor = self.source.tensor(name)
        x = self._decode(tensor, self.source.read_rows(tensor))
        scales = read_weight_scales(self.source, tensor)
        if scales is not None:
            x *= np.repeat(scales, tensor.n_rows // scales.size)[:, None]
        return x.astype(self.dtype, copy=False).reshape(tensor.shape[::-1])

    def rows(self, name: str, indices: Array) -> Array:
        """Return rows of a matrix, (n, n_per_row)."""
        tensor = self.source.tensor(name)
        data = np.concatenate([self.source.read_rows(tensor, int(i), 1) for i in indices])
        return self._decode(tensor, data).astype(self.dtype, copy=False)

    def layer(self, index: int) -> dict[str, Array]:
        """Return the tensors of layer `index` by their name within it, such as `attn_q.weight`."""
        prefix = f"blk.{index}."
        names = [t.name for t in self.source.tensors if t.name.startswith(prefix)]
        names = [name for name in names if not is_weight_scale(self.source, name)]
        found = {name.removeprefix(prefix): self.get(name) for name in names}
        return {name: x for name, x in found.items() if x is not None}

    def _decode(self, tensor: SourceTensor, data: codec.Bytes) -> Floats:
        x = codec.dequantize(data, tensor.format)
        if codec.first_nonfinite(x) is not None:
            raise nonfinite_fault(self.source, tensor)
        if self.change is None:
            return x
        x = self.change(tensor, x)
        bad = codec.first_nonfinite(x)
        if bad is not None:
            what = f"tensor '{brief(tensor.name)}' is not finite once it is encoded"
            raise NumericFault(self.source.path, what, got=float(x.flat[bad]))
        return x
