"""A batch at work: every plan first, from losses that are scored once, then every output, each in its own process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from requant.api.invocation import record_options
from requant.api.session import Session, open_session
from requant.cli import messages
from requant.cli.batch import state, summary, worker
from requant.cli.batch.items import BatchItem, Matrix, check_outputs
from requant.cli.batch.reports import Reports
from requant.cli.batch.summary import Row
from requant.cli.progress import mode
from requant.common.atomic_write import write_text
from requant.common.interrupt import run_interruptible
from requant.common.units import format_duration, format_size
from requant.container.imatrix import Imatrix, read_imatrix
from requant.container.source import Source, open_source
from requant.container.splitting import total_size
from requant.conversion.record import read_conversion, record_path
from requant.errors import BadInput, InputOutputError, RequantError
from requant.planning.best_plan import check_feasible
from requant.planning.output_layout import output_layouts
from requant.planning.output_metadata import imatrix_used
from requant.planning.plan import Plan, read_plan
from requant.planning.request import AUTO
from requant.scoring.candidates import DEFAULT_TYPES
from requant.scoring.fisher import cannot_run
from requant.scoring.losses import Losses, read_losses

_FAILURES = (RequantError, MemoryError, OSError)  # of one output, that say nothing of the others
_LOSSES, _IMPORTANCE, _PLAN = "losses.json", "importance", "plan.json"


class _Failed(RequantError):
    """A worker's failure, as it was told."""

    def __init__(self, code: int, line: str) -> None:
        self.exit_code = code
        super().__init__(line)


@dataclass(frozen=True, slots=True)
class _Scores:
    """The losses' file, and that of the importance measured with them, if any was."""

    losses: Path
    importance: Path | None


@dataclass(slots=True)
class Run:
    """A batch with how it is to be run; `folder` is where its state is kept."""

    jobs: Path
    folder: Path
    matrix: Matrix
    at_once: int = 1
    keep_going: bool = False
    force: bool = False
    restart: bool = False
    dry: bool = False  # nothing is scored, nothing written
    reports: Reports | None = None
    _failed: dict[str, RequantError] = field(default_factory=dict)  # request of scores -> why there are none
    _losses: tuple[Path, Losses] | None = None  # the last that were read

    @property
    def rows(self) -> Sequence[Row]:
        """The rows as they stand."""
        return self.matrix.rows

    def go(self) -> None:
        """Plan everything, then make everything that is not there yet; the rows say what came of it."""
        if self.dry:
            self._plan_all()
            return
        with state.hold_lock(self.folder):
            try:
                self._report("check")
                if self._plan_all():
                    self._report("check")
                    self._convert_all()
                    self._report("write")
            finally:
                for row in self.rows:
                    row.status = "stopped" if row.status == "running" else row.status
                self._write_summary()

    def _report(self, step: Literal["check", "write"]) -> None:
        if self.reports is not None:
            getattr(self.reports, step)(self.matrix.cells)

    # plans

    def _plan_all(self) -> bool:
        """Whether the batch goes on: every cell has its plan and its path, or was allowed to fail."""
        on = self.keep_going or self.dry
        going = on or all(row.status != "failed" for row in self.rows)
        for step in (self._check, self._plan):  # what cannot be is told before hours of scoring
            for cell in self.matrix.cells:
                if not going or cell.row.status == "failed":
                    continue
                try:
                    step(cell)
                except _FAILURES as error:
                    self._fail(cell, *worker.describe(error))
                    going = on
        check_outputs(self.jobs, [cell for cell in self.matrix.cells if cell.row.status != "failed"])
        return going

    def _check(self, cell: BatchItem) -> None:
        """Take the plan that is kept; without one, raise all that can be wrong before scoring."""
        files = self._kept(self._plan_folder(cell), cell.plan_request())
        if files is not None:
            cell.plan = read_plan(files[_PLAN])
            return
        with open_source(cell.model.path) as source:
            job = self._job(cell, source)
            job.check_measure(cell.asked["measure"])
            if cell.is_scored:
                run_interruptible(
                    check_feasible,
                    *(source, cell.request, self._types(cell)),
                    imatrix=job.imatrix,
                    allow_requantize=bool(cell.asked["allow_requantize"]),
                    has_importance=self._is_measured(cell, source),
                )

    def _plan(self, cell: BatchItem) -> None:
        with open_source(cell.model.path) as source:
            if cell.plan is None:
                asked, n = self._job(cell, source), cell.asked["measure"]
                job = self._with_losses(cell, source, asked) if cell.is_scored else asked
                if job is not None:
                    cell.plan = record_options(job.planned(weigh=True, measure=n)[0], asked, n)
                if cell.plan is not None and not self.dry:
                    self._keep_plan(cell, cell.plan)
            cell.place(self.jobs)
            if cell.plan is not None:
                cell.row.bpw, cell.row.predicted_loss = cell.plan.bpw, cell.plan.predicted_loss
            if self.dry:
                cell.row.status = "planned"
            if self.dry and cell.plan is not None:
                imatrix = _read(self._imatrix(cell, source))
                cell.row.size = total_size(output_layouts(source, cell.plan, imatrix, cell.splitting))

    def _plan_folder(self, cell: BatchItem) -> Path:
        return self.folder / "plans" / cell.plan_request()[:16]

    def _keep_plan(self, cell: BatchItem, plan: Plan) -> None:
        folder = state.empty_folder(self._plan_folder(cell))
        write_text(folder / _PLAN, plan.to_json(), force=True, inputs=frozenset())
        state.seal_entry(folder, cell.plan_request())

    def _job(self, cell: BatchItem, source: Source) -> Session:
        """All that `requant convert` would plan from, but for what it would score."""
        names = ("imatrix", "losses", "plan", "type_name", "preset", "like", "threads")
        how = {name: cell.asked[name] for name in (*names, "allow_requantize", "effort")}
        return open_session(source, cell.request, cell.calibration, **how, monitor=messages.MONITOR)

    def _with_losses(self, cell: BatchItem, source: Source, job: Session) -> Session | None:
        """The job with the losses that it is to be planned from; None where a dry run would have to score."""
        if (whole := job.as_it_is()) is not None:
            return replace(job, losses=whole)
        scores = self._scores(cell, source)
        if scores is None:
            return None
        job = replace(job, losses=self._read_losses(scores), imatrix=job.imatrix or _read(scores.importance))
        return job if self.dry else self._with_caches(cell, job, scores)

    def _with_caches(self, cell: BatchItem, job: Session, scores: _Scores) -> Session:
        """The job; its losses with those of the caches, which are kept with the others, where caches are chosen too."""
        assert job.losses is not None
        if AUTO not in (cell.request.cache_type_k, cell.request.cache_type_v) or job.losses.caches:
            return job
        _, losses = replace(job, like=None).scored()
        write_text(scores.losses, losses.to_json(), force=True, inputs=job.inputs)
        state.seal_entry(scores.losses.parent, cell.score_request(self._types(cell)))
        self._losses = scores.losses, losses
        return replace(job, losses=losses)

    # scores

    def _types(self, cell: BatchItem) -> tuple[str, ...]:
        return cell.request.types_to_score(DEFAULT_TYPES)

    def _is_measured(self, cell: BatchItem, source: Source) -> bool:
        """Whether scoring measures importance that the encoders are to weigh by, as in `requant convert`."""
        given = cell.asked["imatrix"] is not None or cell.calibration.statistics is not None
        return not given and not cell.calibration.quick and cannot_run(source) is None

    def _scores(self, cell: BatchItem, source: Source) -> _Scores | None:
        """The losses of the cell's types, kept or scored now; None where a dry run would have to score."""
        request = cell.score_request(self._types(cell))
        if request in self._failed:
            raise self._failed[request]
        key = state.digest([os.path.realpath(cell.model.path), cell.score_words(), self._types(cell)])
        folder = self.folder / "scores" / key[:16]
        files = self._kept(folder, request)
        if files is None and self.dry:
            return None
        if files is None:
            try:
                files = self._score(cell, folder, request, self._is_measured(cell, source))
            except RequantError as error:
                self._failed[request] = error
                raise
        importance = [path for name, path in files.items() if name.startswith(f"{_IMPORTANCE}/")]
        return _Scores(files[_LOSSES], importance[0] if importance else None)

    def _score(self, cell: BatchItem, folder: Path, request: str, measured: bool) -> dict[str, Path]:
        state.empty_folder(folder)
        self._losses = None
        words = [
            "score",
            str(cell.model.path),
            f"--output={folder / _LOSSES}",
            f"--types={','.join(self._types(cell))}",
        ]
        words += cell.score_words()
        if cell.asked["threads"] is not None:
            words.append(f"--threads={cell.asked['threads']}")
        emitted = state.empty_folder(folder / _IMPORTANCE) / "measured"
        if measured:
            words.append(f"--emit-imatrix={emitted}")
        for ended in self._one("scoring", cell, words):
            if ended.code:
                raise _Failed(ended.code, ended.error)
        if measured:  # under the name that it has where scoring and converting are one command: outputs tell it
            found = read_imatrix(emitted)
            name = os.fsdecode(found.datasets[0].encode(errors="surrogateescape"))
            emitted.rename(emitted.with_name(Path(name).name))
        state.seal_entry(folder, request)
        files = state.read_entry(folder, request)
        assert files is not None
        return files

    def _one(self, what: str, cell: BatchItem, words: Sequence[str]) -> Iterator[worker.Ended]:
        found: list[worker.Ended] = []

        def finished(_: BatchItem, ended: worker.Ended) -> bool:
            found.append(ended)
            return True

        def started(c: BatchItem) -> None:
            messages.info(f"{what} {c.model.path}")

        worker.run_all([(cell, words)], 1, started, finished, lambda c: str(c.model.path))
        return iter(found)

    def _read_losses(self, scores: _Scores) -> Losses:
        if self._losses is None or self._losses[0] != scores.losses:
            self._losses = scores.losses, read_losses(scores.losses)
        return self._losses[1]

    def _kept(self, folder: Path, request: str) -> dict[str, Path] | None:
        """The kept files, None where there are none that can be used; damage is told."""
        try:
            return state.read_entry(folder, request)
        except (BadInput, OSError) as error:
            messages.warn(f"{error}; it is made again")
            return None

    # outputs

    def _convert_all(self) -> None:
        tasks: list[tuple[BatchItem, list[str]]] = []
        for cell in self.matrix.cells:
            if cell.row.status == "failed" or cell.plan is None:
                continue
            try:
                if not self._is_there(cell):
                    tasks.append((cell, self._convert_words(cell)))
            except _FAILURES as error:
                self._fail(cell, *worker.describe(error))
                if not self.keep_going:
                    return
        self._write_summary()
        done, begun = 0, time.monotonic()

        def started(cell: BatchItem) -> None:
            cell.row.status = "running"
            messages.info(f"converting {cell.model.path} to {cell.out}")

        def finished(cell: BatchItem, ended: worker.Ended) -> bool:
            nonlocal done
            done += 1
            advance(1)
            self._finish(cell, ended, f"{done} of {len(tasks)}", _left(begun, done, len(tasks)))
            self._write_summary()
            return self.keep_going or cell.row.status == "done"

        drawn_there = self.at_once == 1 and mode() == "bar"
        with nullcontext(int) if drawn_there else messages.progress("batch", len(tasks), "outputs") as advance:
            worker.run_all(tasks, self.at_once, started, finished, lambda cell: cell.row.output or "")

    def _convert_words(self, cell: BatchItem) -> list[str]:
        assert cell.out is not None
        plan = self._plan_folder(cell) / _PLAN
        words = ["convert", str(cell.model.path), str(cell.out), f"--plan={plan}", "--json", *cell.convert_words()]
        with open_source(cell.model.path) as source:
            imatrix = self._imatrix(cell, source)
        if imatrix is not None:
            words.append(f"--imatrix={imatrix}")
        if cell.asked["threads"] is None and self.at_once > 1:
            words.append(f"--threads={max(1, (os.cpu_count() or 1) // self.at_once)}")
        words += [f"--{name}" for name in ("force", "restart") if getattr(self, name)]
        try:
            cell.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputOutputError(cell.out.parent, f"cannot be made: {error.strerror}") from error
        return words

    def _is_there(self, cell: BatchItem) -> bool:
        """Whether the output is complete, made for the very request; then the row says so."""
        assert cell.out is not None and cell.plan is not None
        request, made = cell.output_request(), self.folder / "outputs"
        try:
            there = state.is_made(made, cell.out, request)
        except BadInput as error:
            there = None
            messages.warn(f"{error}; the output's own record counts")
        if there is None and (file := state.written_file(cell.out)) is not None:
            there = self._is_recorded(cell, file)
            if there:
                state.write_made(made, cell.out, state.describe_made(file, request))
        if there:
            cell.row.status = "skipped"
            self._describe(cell)
        return bool(there)

    def _is_recorded(self, cell: BatchItem, file: Path) -> bool:
        """Whether the output's own record shows what would be made."""
        assert cell.plan is not None
        with open_source(cell.model.path) as source:
            imatrix = _read(self._imatrix(cell, source))
        used = imatrix_used(cell.plan, imatrix)
        return state.is_recorded(file, cell.plan, None if used is None else used.sha256, cell.model.newest)

    def _finish(self, cell: BatchItem, ended: worker.Ended, count: str, left: str) -> None:
        cell.row.seconds = round(ended.seconds, 1)
        if ended.code:
            self._fail(cell, ended.code, ended.error or f"ended with exit code {ended.code}", count)
            return
        assert cell.out is not None
        try:
            file = self._describe(cell)
            state.write_made(self.folder / "outputs", cell.out, state.describe_made(file, cell.output_request()))
        except _FAILURES as error:
            self._fail(cell, *worker.describe(error), count)
            return
        cell.row.status, cell.row.exit_code = "done", 0
        messages.info(f"{count} done: {file}, {format_size(cell.row.size or 0)}, {ended.seconds:.0f} s{left}")

    def _describe(self, cell: BatchItem) -> Path:
        """What is at the output's path, its figures in the row."""
        assert cell.out is not None
        file = state.written_file(cell.out)
        if file is None:
            raise InputOutputError(cell.out, "was made, and is gone")
        made = read_conversion(record_path(file))
        cell.row.output, cell.row.size = str(file), state.describe_made(file, "").size
        cell.row.bpw, cell.row.predicted_loss = made.plan.bpw, made.plan.predicted_loss
        return file

    def _fail(self, cell: BatchItem, code: int, error: str, count: str = "") -> None:
        cell.row.fail(code, error)
        where = "" if cell.out is not None else f"{cell.model.path}, {cell.row.budget}: "
        messages.info(f"{count} failed ({code}): {where}{error}".strip())

    def _imatrix(self, cell: BatchItem, source: Source) -> Path | None:
        """The file of what converting weighs by; in a dry run, as far as it is there."""
        path = cell.asked["imatrix"] or cell.calibration.statistics
        encodes = cell.plan is None or any(not c.copied for c in cell.plan.choices)
        if path is None and cell.is_scored and encodes:
            scores = self._scores(cell, source)
            path = None if scores is None else scores.importance
        return path

    def _write_summary(self) -> None:
        text = summary.to_json(self.rows, self.matrix.no_sources)
        write_text(self.folder / "summary.json", text, force=True, inputs=frozenset())


def _left(begun: float, done: int, n: int) -> str:
    """The time that the rest will take if it is like what is done."""
    left = (time.monotonic() - begun) / done * (n - done)
    return f"; about {format_duration(left)} left" if done < n else ""


def _read(path: Path | None) -> Imatrix | None:
    return None if path is None else read_imatrix(path)
