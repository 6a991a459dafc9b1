"""E[x^2], the mean square of every input column of a matrix: measured (an imatrix), or worked out from the weights.

Without data, a matrix behind a normalisation sees inputs of mean square gamma^2. From there it is carried on: the
output matrix of attention sees values of variance W_v^2 gamma^2, the down projection silu(gate) * up of two normal
variables with the variances that their rows give. That keeps which columns are loud, which is what a loss needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant import codec
from requant.container.source import Source, SourceTensor
from requant.imatrix import Imatrix, importance_for
from requant.model.roles import layer_of, n_matrices, role_of

Moments = NDArray[np.float32]  # (n_matrices or 1, n_per_row)

# role -> the norms whose output it reads, the first that the layer has
_BEHIND = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_in"), ("attn_norm",)),
    **dict.fromkeys(
        ("ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_shexp", "ffn_up_shexp"),
        ("ffn_norm", "post_attention_norm", "attn_post_norm", "attn_norm"),
    ),
    "output": ("output_norm",),
    "token_embd": ("output_norm",),  # as the output matrix, where it is tied
}
# matrix -> (the gate, the up projection) of the same kind
_FEEDS = {"ffn_down": ("ffn_gate", "ffn_up")} | {
    f"ffn_down_{kind}": (f"ffn_gate_{kind}", f"ffn_up_{kind}") for kind in ("exps", "shexp")
}
# sandwich norms: what the block adds to the stream is normalised once more
_AFTER = {
    **dict.fromkeys(("attn_output", "attn_q", "attn_k", "attn_v"), "post_attention_norm"),
    **dict.fromkeys(("ffn_down", "ffn_gate", "ffn_up"), "post_ffw_norm"),
}
_CHUNK = 2**22  # weights decoded at once
# E[silu(g)^2] / E[g^2] of a normal g: 1/4 for small variances, 1/2 for large ones
_SILU_POINTS, _SILU_WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Mean squares of a tensor's inputs and where they come from: imatrix, norm, carried, flat."""

    moments: Moments
    origin: str


def inputs_of(source: Source, tensor: SourceTensor, imatrix: Imatrix | None) -> Inputs:
    """E[x^2] per column of `tensor`: the imatrix's where it has the tensor, else data-free."""
    if imatrix is not None:
        measured = importance_for(imatrix, tensor.name, tensor.shape)
        if measured is not None and measured.any():
            return Inputs(measured, "imatrix")
    role, layer = role_of(tensor.name), layer_of(tensor.name)
    gamma = _gamma(source, layer, _BEHIND.get(role, ()))
    if gamma is not None and gamma.size == tensor.n_per_row:
        return Inputs(gamma[None, :] ** 2, "norm")
    carried = _carried(source, layer, role, tensor.n_per_row)
    if carried is not None:
        return Inputs(carried, "carried")
    return Inputs(np.ones((1, tensor.n_per_row), np.float32), "flat")


def stream_gain(source: Source, name: str, energy: float) -> float:
    """What a sandwich norm makes of an error energy of 1 behind it, where the block's output has `energy`; else 1."""
    role, layer = role_of(name), layer_of(name)
    if layer is None or f"blk.{layer}.ffn_norm.weight" not in source:
        return 1.0  # post_attention_norm is the feed-forward's own norm there
    gamma = _gamma(source, layer, (_AFTER[role],)) if role in ("attn_output", "ffn_down") else None
    return 1.0 if gamma is None or energy <= 0 else float((gamma.astype(np.float64) ** 2).sum()) / energy


def _gamma(source: Source, layer: int | None, names: tuple[str, ...]) -> Moments | None:
    """The weights of the first of the norms that is there, (n,)."""
    prefix = "" if layer is None else f"blk.{layer}."
    for name in names:
        if f"{prefix}{name}.weight" in source:
            tensor = source.tensor(f"{prefix}{name}.weight")
            return codec.dequantize(source.read_rows(tensor), tensor.format).reshape(-1)
    return None


def _carried(source: Source, layer: int | None, role: str, n_per_row: int) -> Moments | None:
    """E[x^2] behind attention or the gated feed-forward, from the rows of the matrices before it."""
    if layer is None:
        return None
    if role == "attn_output":
        value = _row_variances(source, f"blk.{layer}.attn_v.weight")
        return None if value is None else _heads(source, value, n_per_row)
    if role not in _FEEDS:
        return None
    gate, up = (_row_variances(source, f"blk.{layer}.{name}.weight") for name in _FEEDS[role])
    if gate is None or up is None or gate.shape[1] != n_per_row or up.shape != gate.shape:
        return None
    return (_silu_square(gate) * up).astype(np.float32)


def _row_variances(source: Source, name: str) -> NDArray[np.float64] | None:
    """sum_c W[r, c]^2 gamma_c^2, (n_matrices, rows of one)."""
    if name not in source:
        return None
    tensor = source.tensor(name)
    gamma = _gamma(source, layer_of(name), _BEHIND[role_of(name)])
    if gamma is None or gamma.size != tensor.n_per_row or not tensor.format.can_decode:
        return None
    rows = np.concatenate([codec.row_errors(x, x, gamma**2)[:, 2] for x in _chunks(source, tensor)])
    return rows.reshape(n_matrices(tensor.shape), -1)


def _chunks(source: Source, tensor: SourceTensor) -> Iterator[Moments]:
    step = max(1, _CHUNK // tensor.n_per_row)
    for first in range(0, tensor.n_rows, step):
        data = source.read_rows(tensor, first, min(step, tensor.n_rows - first))
        yield codec.dequantize(data, tensor.format)


def _heads(source: Source, value: NDArray[np.float64], n_per_row: int) -> Moments | None:
    """Each KV head's variances, once for every head that shares it (grouped-query attention)."""
    arch = source.metadata.get_str("general.architecture", "")
    n_head = source.metadata.get(f"{arch}.attention.head_count")
    if not isinstance(n_head, int) or n_head < 1 or n_per_row % n_head or value.size % (n_per_row // n_head):
        return None
    kv_heads = value.reshape(-1, n_per_row // n_head)
    if n_head % len(kv_heads):
        return None
    return np.repeat(kv_heads, n_head // len(kv_heads), axis=0).reshape(1, -1).astype(np.float32)


def _silu_square(variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[silu(g)^2] for normal g of each variance, by Gauss-Hermite quadrature."""
    g = np.sqrt(variance)[..., None] * _SILU_POINTS
    silu = g / (1.0 + np.exp(-np.clip(g, -80.0, 80.0)))
    expected: NDArray[np.float64] = (silu**2 * _SILU_WEIGHTS).sum(axis=-1) / _SILU_WEIGHTS.sum()
    return expected
