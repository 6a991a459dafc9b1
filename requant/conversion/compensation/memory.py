"""The memory of a compensated conversion, and the blocks of columns in which its moments stay below a limit.

Bytes depend on the blocks, so nothing here depends on the number of threads, but for the least limit that is accepted.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from requant.model.forward.memory import memory_needs
from requant.model.forward.passes import OUTPUT, RunnableModel

BATCH = 4  # windows whose inputs are in memory at a time
COLUMNS = 256  # a multiple of the block of every type: where blocks of columns may begin
_PROCESS = 600 * 2**20  # the interpreter, the kernels, and the activations of some windows
_MOMENTS = 16  # bytes for each pair of columns: sums of both halves, or sums and two factors
_FLOAT = 4


def moment_bytes(columns: tuple[slice, ...], n_written: int = 0) -> int:
    """Return the bytes for moments of these blocks; n_written: rows of matrices that write to the residual stream."""
    pairs: int = sum((at.stop - at.start) ** 2 for at in columns)
    stream: int = 2 * _FLOAT * n_written * columns[-1].stop if len(columns) == 1 else 0
    return _MOMENTS * pairs + stream


def split_columns(n: int, room: int | None, n_written: int = 0) -> tuple[slice, ...]:
    """Return blocks of `n` columns, as few and as equal as keep the moments below `room` bytes; None: one block.

    Where no blocks are small enough, they are as small as may be.
    """
    most = -(-n // COLUMNS)
    columns: tuple[slice, ...] = (slice(0, n),)
    for n_blocks in range(1, most + 1):
        ends = [min(i * most // n_blocks * COLUMNS, n) for i in range(n_blocks + 1)]
        columns = tuple(slice(*pair) for pair in pairwise(ends))
        if room is None or moment_bytes(columns, n_written) <= room:
            break
    return columns


def walk_bytes(model: RunnableModel, n_windows: int, n_ctx: int) -> int:
    """Return what the walk needs beside moments: the process, two copies of a layer, both streams, a stage's inputs."""
    hp, n_tokens = model.architecture.hp, n_windows * n_ctx
    layers: dict[str, int] = defaultdict(int)
    inputs = 0
    for tensor in model.weights.source.tensors:
        if tensor.name.startswith("blk."):
            layers[tensor.name.split(".")[1]] += tensor.n_weights
        if len(tensor.shape) > 2:
            inputs = max(inputs, n_tokens * max(1, hp.n_expert_used) * tensor.n_per_row)
        elif len(tensor.shape) == 2:
            n_held = n_tokens // 8 + 2 * min(BATCH, n_windows) * n_ctx  # for the check, and of a batch twice
            inputs = max(inputs, n_held * (2 * tensor.n_per_row + hp.n_embd))
    return _PROCESS + _FLOAT * (2 * max(layers.values()) + 2 * n_tokens * hp.n_embd + inputs)


def least_bytes(model: RunnableModel, n_windows: int, n_ctx: int, threads: int) -> int:
    """Return the least limit: of the walk with the smallest blocks, and of the pass back that weighs the tokens."""
    matrices = [t for t in model.weights.source.tensors if t.name.startswith("blk.") or t.name == OUTPUT]
    smallest = max(moment_bytes(split_columns(t.n_per_row, 0)) for t in matrices if len(t.shape) > 1)
    streams = 2 * _FLOAT * n_windows * n_ctx * model.architecture.hp.n_embd
    weighing = memory_needs(model, n_ctx, threads, True)[0] + streams
    return max(walk_bytes(model, n_windows, n_ctx) + smallest, weighing)
