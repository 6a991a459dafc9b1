"""The process that runs llama.cpp: reads an array, writes others, may be ended by a file that it cannot run.

    TASK FOLDER THREADS MODEL [BASE]

TASK is one of `TASKS`. FOLDER holds `given.npy`: windows of tokens (n_windows, n_ctx), or the bytes of a text. A line
on stdout is empty for each window that is done, or names an archive of arrays in FOLDER that is complete. The process
ends when its stdin is closed, as its caller's end closes it. An error is left in FOLDER as JSON, by its fields.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.errors import BadInput, InputOutputError, RequantError
from requant.model.llama_cpp import SPARE_MEMORY, GraphNode, LlamaCpp

ERROR = "error.json"
GIVEN = "given.npy"
BATCH = 8  # windows whose sums are written together
_ROWS = 64  # positions whose probabilities are computed together

Arrays = Mapping[str, NDArray[Any]]


class _Collector:
    """The sums of squared inputs of each matrix, from the nodes of the graph."""

    def __init__(self) -> None:
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}

    def __call__(self, engine: LlamaCpp, node: GraphNode, ask: bool) -> bool:
        operation = engine.operation(node)
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        weights = node.sources[0].contents
        name = weights.name.decode(errors="replace")
        if ask or not name.endswith(".weight"):
            return name.endswith(".weight") if ask else True
        x = engine.values(node.sources[1].contents).astype(np.float64)
        n_matrices, n_per_row = int(weights.shape[2] * weights.shape[3]), int(weights.shape[0])
        if name not in self.sums:
            self.sums[name], self.counts[name] = np.zeros((n_matrices, n_per_row)), np.zeros(n_matrices)
        squares = np.square(x, out=x)
        if operation == "MUL_MAT":
            by_matrix = squares.reshape(n_matrices, -1, n_per_row)
            self.sums[name] += by_matrix.sum(axis=1)
            self.counts[name] += by_matrix.shape[1]
        else:
            ids = engine.values(node.sources[2].contents)[0, 0]  # (n_tokens, n_used)
            inputs = np.broadcast_to(squares[0], (*ids.shape, n_per_row))  # the same for all, or one for each
            np.add.at(self.sums[name], ids.reshape(-1), inputs.reshape(-1, n_per_row))
            np.add.at(self.counts[name], ids.reshape(-1), 1)
        return True

    def take(self) -> Arrays:
        """Return `sums:NAME` (n_matrices, n_per_row) and `counts:NAME` (n_matrices,), and begin anew."""
        found = {f"sums:{name}": sums for name, sums in self.sums.items()}
        found |= {f"counts:{name}": counts for name, counts in self.counts.items()}
        self.sums, self.counts = {}, {}
        return found


def _collect_sums(paths: Sequence[Path], tokens: NDArray[np.int32], threads: int) -> Iterator[Arrays]:
    """Yield the sums of each batch of windows, and their number as `n_windows`."""
    collector = _Collector()
    with LlamaCpp(paths[0], tokens.shape[1], threads=threads, on_node=collector) as engine:
        for first in range(0, len(tokens), BATCH):
            batch = tokens[first : first + BATCH]
            for window in batch:
                for _ in engine.logits(window):  # of all tokens: the last layer is computed for those alone
                    pass
                _print_line()
            yield {**collector.take(), "n_windows": np.array(len(batch))}


def _measure_figures(paths: Sequence[Path], tokens: NDArray[np.int32], threads: int) -> Iterator[Arrays]:
    """Yield the figures of the scored tokens, those of the second half of each window, as `evaluate.judge` does."""
    n_ctx = tokens.shape[1]
    scored = range(n_ctx // 2, n_ctx - 1)
    columns: dict[str, list[NDArray[Any]]] = {}
    with ExitStack() as opened:
        engines = [opened.enter_context(LlamaCpp(path, n_ctx, threads=threads)) for path in paths]
        if len({engine.n_vocab for engine in engines}) > 1:
            sizes = [f"{engine.n_vocab} tokens" for engine in engines]
            raise BadInput(paths[1], "the base has another vocabulary", got=sizes[1], limit=sizes[0])
        for window in tokens:
            targets = window[scored.start + 1 :]
            for logits in zip(*(engine.logits(window, scored) for engine in engines), strict=True):
                n = len(logits[0])
                for rows in (slice(i, min(i + _ROWS, n)) for i in range(0, n, _ROWS)):
                    _add_figures(columns, [_normalize(x[rows]) for x in logits], targets[rows])
                targets = targets[n:]
            _print_line()
    yield {name: np.concatenate(parts) for name, parts in columns.items()}


def _add_figures(
    columns: dict[str, list[NDArray[Any]]], likely: Sequence[NDArray[np.float64]], targets: NDArray[np.int32]
) -> None:
    q, p = likely[0], likely[-1]
    rows = np.arange(len(q))
    found = {"likelihood": q[rows, targets]}
    if len(likely) > 1:
        found["base_likelihood"] = p[rows, targets]
        found["same_top"] = p.argmax(axis=1) == q.argmax(axis=1)
        found["kld"] = np.einsum("ij,ij->i", np.exp(p), p - q)
    for name, values in found.items():
        columns.setdefault(name, []).append(values)


def _normalize(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _tokenize(paths: Sequence[Path], text: NDArray[np.uint8], threads: int) -> Iterator[Arrays]:
    """Yield the ids of the text as `ids`, and as `bos` that of a BOS which every text gets, or -1."""
    with LlamaCpp(paths[0], threads=threads) as engine:
        ids, bos = engine.tokenize(text.tobytes())
    yield {"ids": ids, "bos": np.array(-1 if bos is None else bos)}


TASKS: dict[str, Callable[[Sequence[Path], NDArray[Any], int], Iterator[Arrays]]] = {
    "sums": _collect_sums,
    "figures": _measure_figures,
    "tokens": _tokenize,
}


def _print_line(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _end_with_stdin(folder: str) -> None:
    """Wait until the caller is gone, and end the process, without a trace."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _run(task: str, folder: Path, threads: int, paths: Sequence[Path]) -> None:
    for i, arrays in enumerate(TASKS[task](paths, np.load(folder / GIVEN), threads)):
        name = f"{i}.npz"
        np.savez(folder / name, **arrays)  # type: ignore[arg-type]
        _print_line(name)


def _describe_error(error: RequantError) -> dict[str, str | None]:
    names = ("path", "what", "got", "limit", "expected", "hint")
    given = {name: getattr(error, name) for name in names} if isinstance(error, BadInput) else {"what": str(error)}
    return {"kind": type(error).__name__} | {k: None if v is None else str(v) for k, v in given.items()}


def main(task: str, folder: str, threads: str, *models: str) -> int:
    """Run as the process that the module's docstring describes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    threading.Thread(target=_end_with_stdin, args=(folder,), daemon=True).start()
    paths, error = [Path(model) for model in models], None
    try:
        _run(task, Path(folder), int(threads), paths)
    except RequantError as found:
        error = found
    except MemoryError:
        error = InputOutputError(paths[0], "out of memory beside llama.cpp", hint=SPARE_MEMORY)
    except OSError as found:
        error = InputOutputError(found.filename or folder, f"llama.cpp's results: {found.strerror}")
    if error is not None:
        (Path(folder) / ERROR).write_text(json.dumps(_describe_error(error)))
    return 0 if error is None else error.exit_code
