"""Cache of a batch's losses and importance: every source is scored once for all of its budgets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from requant.api.batch.context import BatchContext, WorkerFailure
from requant.api.batch.items import BatchItem
from requant.api.batch.state import make_folder, read_entry, remove_state, seal_entry, write_state
from requant.api.batch.workers import WorkerExit, WorkerTask
from requant.api.importance import importance_file
from requant.common.inputs import own_files
from requant.common.serialization import hash_json
from requant.container.source import Source
from requant.errors import RequantError
from requant.scoring.losses import Losses, read_losses

_LOSSES = "losses.json"


@dataclass(frozen=True, slots=True)
class CachedScores:
    """The file of the losses, and that of the importance measured with them, if any was."""

    losses: Path
    importance: Path | None


@dataclass(slots=True)
class ScoreCache:
    """Scores in the folder of state; missing ones are measured by workers."""

    context: BatchContext
    _failures: dict[str, RequantError] = field(default_factory=dict)  # request -> why it cannot be scored
    _last: tuple[Path, Losses] | None = None  # the last losses that were read

    def find_scores(self, item: BatchItem, source: Source) -> CachedScores | None:
        """Return the losses of the item's types, cached or measured now; None where a dry run would measure them."""
        request = item.score_request()
        if request in self._failures:
            raise self._failures[request]
        key = hash_json([os.path.realpath(item.source.path), item.score_arguments(), item.types])
        folder = self.context.folder / "scores" / key[:16]
        files = self.context.read_entry(folder, request)
        if files is None:
            if self.context.options.dry_run:
                return None
            try:
                files = self._score(item, folder)
            except RequantError as error:
                self._failures[request] = error
                raise
        return CachedScores(files[_LOSSES], files.get(importance_file(files[_LOSSES]).name))

    def read_losses(self, scores: CachedScores) -> Losses:
        """Read the losses, or return them where they were the last read."""
        if self._last is None or self._last[0] != scores.losses:
            with own_files():
                self._last = scores.losses, read_losses(scores.losses)
        return self._last[1]

    def replace_losses(self, item: BatchItem, scores: CachedScores, losses: Losses) -> None:
        """Replace the cached losses by `losses`, which also have those of the KV cache."""
        folder = scores.losses.parent
        write_state(scores.losses, losses.to_json())
        found = [scores.losses] if scores.importance is None else [scores.losses, scores.importance]
        seal_entry(folder, item.score_request(), [str(path.relative_to(folder)) for path in found])
        self._last = scores.losses, losses

    def find_importance(self, item: BatchItem, source: Source) -> Path | None:
        """Return the file of the importance to convert with; None without one, or where a dry run would measure it."""
        path = item.options.session_options.imatrix or item.options.calibration.statistics
        encodes = item.plan is None or any(not c.copied for c in item.plan.choices)
        if path is None and item.is_scored and encodes:
            scores = self.find_scores(item, source)
            path = None if scores is None else scores.importance
        return path

    def _score(self, item: BatchItem, folder: Path) -> dict[str, Path]:
        """Score in a worker, into `folder`. Raises WorkerFailure."""
        losses = folder / _LOSSES
        measured = importance_file(losses)
        make_folder(folder)
        for path in (losses, measured):
            remove_state(path)
        self._last = None
        words = ["score", str(item.source.path), f"--output={folder / _LOSSES}", f"--types={','.join(item.types)}"]
        words += item.score_arguments()
        if item.options.session_options.threads is not None:
            words.append(f"--threads={item.options.session_options.threads}")

        def on_exit(_: WorkerTask, end: WorkerExit) -> bool:
            if end.code:
                raise WorkerFailure(end)
            return True

        source, inform = item.source.path, self.context.monitor.info
        task = WorkerTask(item, words, str(source))
        self.context.workers.run_tasks([task], 1, lambda _: inform(f"scoring {source}"), on_exit)
        names = [path.name for path in (losses, measured) if path.exists()]
        seal_entry(folder, item.score_request(), names)
        files = read_entry(folder, item.score_request())
        assert files is not None
        return files
