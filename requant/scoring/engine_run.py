"""Runs of the real llama.cpp in a process of its own: figures on a text, and the inputs of every matrix.

    python -m requant.scoring.engine_run TOKENS.npy OUT.npz statistics|figures MODEL [BASE]

works on windows of tokens (n_windows, n_ctx), prints a line for each that is done, and writes arrays. A model that the
engine cannot run may end that process, and not the caller's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from requant.errors import BadInput, RequantError, UsageError, brief
from requant.model.llama_cpp import GraphNode, LlamaCpp
from requant.scoring.evaluate import Evaluation, TokenFigures, summary
from requant.scoring.statistics import SquareSums, Statistics

Tokens = NDArray[np.int32]  # (n_windows, n_ctx)
Progress = Callable[[int], None]
_REFUSED = 3  # exit code of the process for a file or an installation that the engine refuses, said in one line


def evaluate_in_engine(
    model: Path, base: Path | None, tokens: Tokens, *, progress: Progress = lambda _: None
) -> Evaluation:
    """Return the figures of the model in the engine, and its divergence from `base` there.

    `progress` is called with windows done. Raises UsageError without the engine, BadInput where it cannot run a model.
    """
    found = _run("figures", tokens, [model] if base is None else [model, base], progress)
    if base is None:
        return summary(TokenFigures(found["likelihood"]), tokens)
    same = found["same_top"].astype(bool)
    return summary(TokenFigures(found["likelihood"], found["base_likelihood"], found["kld"], same), tokens)


def engine_statistics(model: Path, tokens: Tokens, *, progress: Progress = lambda _: None) -> Statistics:
    """Return the sums of squared inputs of every matrix of the model in the engine. Raises as `evaluate_in_engine`."""
    found = _run("statistics", tokens, [model], progress)
    statistics = Statistics(tokens.size, tokens.shape[1])
    for key, sums in found.items():
        if key.startswith("sums:"):
            name, counts = key.removeprefix("sums:"), found[f"counts:{key.removeprefix('sums:')}"]
            several = len(sums) > 1
            for m, (own, count) in enumerate(zip(sums, counts, strict=True)):
                if count:
                    statistics.matrices[name, m if several else None] = SquareSums(int(count), own)
    return statistics


def _run(kind: str, tokens: Tokens, models: Sequence[Path], progress: Progress) -> dict[str, NDArray[Any]]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        asked, out = Path(folder) / "tokens.npy", Path(folder) / "out.npz"
        np.save(asked, tokens)
        words = [sys.executable, "-m", "requant.scoring.engine_run", str(asked), str(out), kind, *map(str, models)]
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True) as process:
            try:
                assert process.stdout is not None
                for _ in process.stdout:
                    progress(1)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            raise _describe_end(models[0], process.returncode, errors.read().decode(errors="replace"))
        with np.load(out) as found:
            return dict(found)


def _describe_end(model: Path, code: int, text: str) -> RequantError:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code == _REFUSED and lines:
        kind, _, what = lines[-1].partition(": ")
        return UsageError(what) if kind == "usage" else BadInput(model, what.removeprefix(f"{model}: "))
    reason = next((line for line in lines if "ASSERT" in line or "error" in line.lower()), "no reason given")
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return BadInput(model, f"ended llama.cpp with {ended}: {brief(reason.rpartition('/')[2])}")


def _print_step() -> None:
    sys.stdout.write("done\n")
    sys.stdout.flush()


def _measure_figures(models: Sequence[Path], tokens: Tokens) -> dict[str, NDArray[Any]]:
    """Return the figures of the scored tokens, those of the second half of each window, as `evaluate.judge` does."""
    n_ctx = tokens.shape[1]
    first = n_ctx // 2
    columns: dict[str, list[NDArray[Any]]] = {}
    with contextlib.ExitStack() as opened:
        engines = [opened.enter_context(LlamaCpp(path, n_ctx, threads=os.cpu_count() or 1)) for path in models]
        if len({engine.n_vocab for engine in engines}) > 1:
            raise BadInput(models[1], "the base has another vocabulary", got=f"{engines[1].n_vocab} tokens")
        for window in tokens:
            likely = [_normalize(engine.logits(window, first=first)[:-1]) for engine in engines]
            rows, targets = np.arange(len(likely[0])), window[first + 1 :]
            found = {"likelihood": likely[0][rows, targets]}
            if len(likely) > 1:
                q, p = likely
                found["base_likelihood"] = p[rows, targets]
                found["same_top"] = p.argmax(axis=1) == q.argmax(axis=1)
                found["kld"] = np.einsum("ij,ij->i", np.exp(p), p - q)
            for name, values in found.items():
                columns.setdefault(name, []).append(values)
            _print_step()
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _normalize(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


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
        squares = x * x
        if operation == "MUL_MAT":
            by_matrix = (
                squares.reshape(n_matrices, -1, n_per_row) if n_matrices > 1 else squares.reshape(1, -1, n_per_row)
            )
            self.sums[name] += by_matrix.sum(axis=1)
            self.counts[name] += by_matrix.shape[1]
        else:
            ids = engine.values(node.sources[2].contents)[0, 0]  # (n_tokens, n_used)
            inputs = np.broadcast_to(squares[0], (*ids.shape, n_per_row))  # the same for all, or one for each
            np.add.at(self.sums[name], ids.reshape(-1), inputs.reshape(-1, n_per_row))
            np.add.at(self.counts[name], ids.reshape(-1), 1)
        return True


def _collect_statistics(model: Path, tokens: Tokens) -> dict[str, NDArray[Any]]:
    collector = _Collector()
    with LlamaCpp(model, tokens.shape[1], threads=os.cpu_count() or 1, on_node=collector) as engine:
        for window in tokens:
            engine.logits(window)  # of all tokens: the last layer is computed for those alone
            _print_step()
    return {f"sums:{k}": v for k, v in collector.sums.items()} | {f"counts:{k}": v for k, v in collector.counts.items()}


def main(asked: str, out: str, kind: str, *models: str) -> int:
    """Run as the process that the module's docstring describes."""
    tokens, paths = np.load(asked), [Path(model) for model in models]
    try:
        found = _collect_statistics(paths[0], tokens) if kind == "statistics" else _measure_figures(paths, tokens)
    except RequantError as error:
        kind = "usage" if isinstance(error, UsageError) else "input"
        sys.stderr.write(f"\n{kind}: {error}\n")
        return _REFUSED
    np.savez(out, **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
