"""The memory that running a model takes: the largest layer's weights, and activations in proportion to the tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from requant.model.forward.passes import EMBEDDING, LOGITS, OUTPUT, RunnableModel
from requant.model.forward.recurrence import CHUNK, VECTOR_CHUNK
from requant.model.forward.side_inputs import TABLE

if TYPE_CHECKING:
    from requant.container.source import SourceTensor
    from requant.model.forward.architecture import Architecture

_BASE = 200 * 2**20  # the interpreter, NumPy, Numba and the kernels
_FLOAT, _SUM = 4, 8
# arrays of a layer and its gradients that are held at a time, measured: of the stream's width, of what products give,
# of scores; of pairs of tokens in a chunk with one decay or one per key dimension, of keys and values, of states
_STREAM, _PRODUCTS, _SCORES, _PAIRS, _VECTOR_PAIRS, _KEYS_VALUES, _STATES = 12, 5, 2, 16, 10, 8, 16


def memory_needs(model: RunnableModel, n_ctx: int, threads: int, gradients: bool) -> tuple[int, int]:
    """Return the fixed bytes and the bytes that each window adds.

    Fixed: the weights of the largest layer, or of the output matrix, as float32 while their bytes are being decoded;
    per thread one window's activations of a layer, the chunks of its recurrence included, or one part of the logits;
    and the sums of all matrices, which alone grow with the layers. A window adds its stream, its own sums of a layer,
    and the arrays that layers share beside the stream.
    """
    architecture = model.architecture
    layers: dict[str, list[SourceTensor]] = defaultdict(list)
    for tensor in model.weights.source.tensors:
        in_layer = tensor.name.startswith("blk.")
        layers[".".join(tensor.name.split(".")[:2]) if in_layer else tensor.name].append(tensor)
    layers.pop(TABLE, None)  # only rows are read
    if OUTPUT in layers:
        layers.pop(EMBEDDING)
    own = [layers[f"blk.{il}"] for il in range(architecture.n_layers)]
    weights = max(sum(t.n_weights for t in part) * _FLOAT + max(t.n_bytes for t in part) for part in layers.values())
    per_token = max(_activations(architecture, il, part, n_ctx) for il, part in enumerate(own))
    active = threads * _FLOAT * max(n_ctx * per_token, 4 * min(LOGITS, n_ctx * architecture.hp.n_vocab))
    sums = [_SUM * sum(_n_sums(tensor, gradients) for tensor in part) for part in layers.values()]
    stream = n_ctx * architecture.hp.n_embd * (5 if gradients else 2)
    per_window = _FLOAT * (stream + n_ctx * _shared_arrays(architecture, gradients)) + max(sums)
    return _BASE + weights + active + sum(sums), per_window


def _n_sums(tensor: SourceTensor, gradients: bool) -> int:
    """Return the sums of squared inputs, and of gradients, of a tensor's matrices."""
    if len(tensor.shape) < 2:
        return 0
    n_matrices = tensor.n_rows // tensor.shape[1]
    return n_matrices * tensor.shape[0] + (tensor.n_rows if gradients else 0)


def _activations(architecture: Architecture, index: int, tensors: Sequence[SourceTensor], n_ctx: int) -> int:
    """Return the floats per token of a layer forward and backward."""
    hp = architecture.hp
    parts = {tensor.name.split(".", 2)[2]: tensor for tensor in tensors}
    rows = (_rows_in_use(architecture, tensor) for name, tensor in parts.items() if name.endswith(".weight"))
    found = _STREAM * hp.n_embd + _PRODUCTS * sum(rows) + _recurrence(architecture, index, parts)
    return found + (_SCORES * hp.n_head[index] * n_ctx if "attn_output.weight" in parts else 0)


def _rows_in_use(architecture: Architecture, tensor: SourceTensor) -> int:
    """Return the numbers that a token gets from a matrix, or from those of the experts that it passes."""
    if len(tensor.shape) < 2:
        return 0
    hp = architecture.hp
    return tensor.n_rows * hp.n_expert_used // max(1, hp.n_expert) if "_exps." in tensor.name else tensor.n_rows


def _recurrence(architecture: Architecture, index: int, parts: Mapping[str, SourceTensor]) -> int:
    """Return the floats per token of a state: pairs of tokens in a chunk, keys and values, the state at its start."""
    sizes = architecture.hp.recurrence
    if "ssm_f_a.weight" in parts:
        heads, size, n_values, chunk = architecture.hp.n_head[index], sizes.n_state, sizes.n_state, VECTOR_CHUNK
        pairs = _VECTOR_PAIRS * chunk * size
    elif "ssm_dt.bias" in parts:
        heads, size, chunk = sizes.n_heads, sizes.n_state, CHUNK
        n_values, pairs = sizes.n_inner // heads, _PAIRS * chunk
    else:
        return 0
    return heads * (pairs + _KEYS_VALUES * (size + n_values) + _STATES * size * n_values // chunk)


def _shared_arrays(architecture: Architecture, gradients: bool) -> int:
    """Return the floats per token that layers share: the embedded stream, keys and values, rows of another embedding.

    A row of that embedding serves all layers, and with gradients has sums of the same length.
    """
    hp = architecture.hp
    if not architecture.hp.n_side and not architecture.n_shared:
        return 0
    kept = sum(hp.n_head_kv[il] * sum(architecture.head_sizes(il)) for il in architecture.kept_layers)
    times = 2 if gradients else 1
    return 2 * hp.n_embd + times * (kept + architecture.hp.n_side * hp.n_layers)
