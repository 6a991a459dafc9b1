"""Runs of a model in llama.cpp, in a process of its own: sums for an importance matrix, figures on a text, tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from requant.common.threads import n_threads
from requant.errors import FILE_NAME, BadInput, InputOutputError, NumericFault, RequantError, UsageError, brief
from requant.model.llama_cpp import ENGINE, SPARE_MEMORY, check_installed
from requant.model.roles import has_own_inputs
from requant.scoring.calibration_data import Encoded
from requant.scoring.engine_process import ERROR, GIVEN, Arrays
from requant.scoring.evaluate import TokenFigures
from requant.scoring.statistics import SquareSums, Statistics

if TYPE_CHECKING:
    from requant.container.source import Source

Tokens = NDArray[np.int32]  # (n_windows, n_ctx)
Progress = Callable[[int], None]
_KINDS = {kind.__name__: kind for kind in (BadInput, InputOutputError)}
# the modules of this process, and none of the folder that it happens to be in
_PROGRAM = """
import os, sys
sys.path[:] = sys.argv.pop(1).split(os.pathsep)
from requant.scoring.engine_process import main
sys.exit(main(*sys.argv[1:]))
"""


def collect_sums(
    source: Source,
    tokens: Tokens,
    add: Callable[[Statistics], None],
    *,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Call `add` with the sums of squared inputs of every matrix, for a batch of windows at a time.

    `progress` is called with windows done. Raises UsageError without the engine, BadInput where it does not run the
    model, InputOutputError where memory runs out.
    """

    def take(found: Arrays) -> None:
        statistics = Statistics(int(found["n_windows"]) * tokens.shape[1], tokens.shape[1], engine=ENGINE)
        for tensor in source.tensors:
            if (sums := found.get(f"sums:{tensor.name}")) is None:
                continue
            counts, own = found[f"counts:{tensor.name}"], has_own_inputs(tensor.name, tensor.shape)
            parts = (
                zip(range(len(sums)), counts, sums, strict=True) if own else [(None, counts.sum(), sums.sum(axis=0))]
            )
            statistics.add("", {(tensor.name, m): SquareSums(int(count), x) for m, count, x in parts if count})
        add(statistics)

    _run("sums", [source.path], tokens, take, threads=threads, progress=progress)


def measure_figures(
    model: Path,
    base: Path | None,
    tokens: Tokens,
    *,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> TokenFigures:
    """Return the figures of the scored tokens in the engine. Raises as `collect_sums`, and NumericFault for NaN."""
    found: dict[str, NDArray[Any]] = {}
    models = [model] if base is None else [model, base]
    _run("figures", models, tokens, found.update, threads=threads, progress=progress)
    for path, name in zip(models, ("likelihood", "base_likelihood"), strict=False):
        if not np.isfinite(found[name]).all():
            hint = "the file is damaged, or its weights do not suit its architecture"
            raise NumericFault(path, "logits of llama.cpp are not finite", hint=hint)
    if base is None:
        return TokenFigures(found["likelihood"])
    same = found["same_top"].astype(bool)
    return TokenFigures(found["likelihood"], found["base_likelihood"], found["kld"], same)


def encode_in_engine(source: Source, text: str) -> Encoded:
    """Return the ids of a text by the tokenizer of the engine. Raises as `collect_sums`."""
    found: dict[str, NDArray[Any]] = {}
    given = np.frombuffer(text.encode(), np.uint8)
    _run("tokens", [source.path], given, found.update, threads=1, progress=lambda _: None)
    bos = int(found["bos"])
    return Encoded(found["ids"], None if bos < 0 else bos)


def _run(
    task: str,
    models: Sequence[Path],
    given: NDArray[Any],
    take: Callable[[Arrays], None],
    *,
    threads: int | None,
    progress: Progress,
) -> None:
    """Run a task of `engine_process`; call `take` with each archive that it writes, `progress` for each window."""
    check_installed()
    with tempfile.TemporaryDirectory(prefix="requant-") as name, tempfile.TemporaryFile() as errors:
        folder = Path(name)
        np.save(folder / GIVEN, given)
        words = [sys.executable, "-c", _PROGRAM, os.pathsep.join(sys.path), task, name, str(n_threads(threads))]
        with subprocess.Popen(
            [*words, *map(str, models)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            start_new_session=True,  # a terminal's signals reach this process alone, which ends the other
        ) as process:
            try:
                _follow(process.stdout, folder, take, progress)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise _describe_end(process.returncode, models[0], folder / ERROR, errors)


def _follow(lines: IO[bytes] | None, folder: Path, take: Callable[[Arrays], None], progress: Progress) -> None:
    for line in lines or ():
        if name := line.decode().strip():
            with np.load(folder / name) as found:
                take(dict(found))
            (folder / name).unlink()
        else:
            progress(1)


def _describe_end(code: int, model: Path, error: Path, errors: IO[bytes]) -> RequantError:
    """Return the error that the process left, or one that describes how it was ended. Raise RuntimeError for a bug."""
    if error.exists():
        found = json.loads(error.read_text())
        kind = found.pop("kind")
        return UsageError(found["what"]) if kind == UsageError.__name__ else _KINDS[kind](**found)
    errors.seek(0)
    text = errors.read().decode(errors="replace")
    if code == 1:
        raise RuntimeError(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code == -signal.SIGKILL or any("bad_alloc" in line or "failed to allocate" in line for line in lines):
        ended = "was killed, as a system out of memory does" if code == -signal.SIGKILL else "ran out of memory"
        return InputOutputError(model, f"the process of llama.cpp {ended}", hint=SPARE_MEMORY)
    reason = next((line for line in lines if "ASSERT" in line or "error" in line.lower()), "no reason given")
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = f"the file is damaged, or {ENGINE} cannot run it"
    return BadInput(
        model, f"ended the process of llama.cpp with {ended}: {brief(reason.rpartition('/')[2], FILE_NAME)}", hint=hint
    )
