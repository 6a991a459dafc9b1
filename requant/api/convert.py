"""What converting does beside planning: the claim on the output, what an earlier run left, the work itself."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.api.kernels import prepare_kernels
from requant.api.session import Importance, Planned, Session
from requant.common.atomic_write import check_writable, write_text
from requant.common.files import open_regular, read_into
from requant.common.folders import check_space
from requant.common.interrupt import run_interruptible
from requant.common.monitor import Monitor
from requant.common.serialization import to_plain
from requant.container.journal import Journal
from requant.container.output import can_resume, claim, discard, final_names
from requant.container.part import Part, resolve_target
from requant.container.source import Source
from requant.container.splitting import WHOLE, Splitting
from requant.conversion.record import OUTPUT_SCHEMA, Conversion, record_path
from requant.errors import BadInput, OutputRefused
from requant.planning.plan import Plan
from requant.planning.request import plan_from_option
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix

_HASHED = 2**26  # bytes of a file that is told from another by its content, not by its time


@dataclass(frozen=True, slots=True)
class Work:
    """An output that this run has claimed, and how it is to be made."""

    out: Path
    journal: Journal
    asked: dict[str, Any]
    splitting: Splitting
    force: bool = False
    verified: bool = True

    @property
    def measured(self) -> Path:
        """Where the importance that was measured while planning is kept until the output is finished."""
        target = resolve_target(self.out)
        return target.with_name(f"{target.name}.part.imatrix")

    def earlier(self, job: Session) -> Planned | None:
        """The plan of an unfinished run of the same command, and the importance measured for it.

        Raises OutputRefused where what is unfinished is of another command.
        """
        from requant.conversion.convert import binding

        if not can_resume(self.journal, binding(job.source, self.asked), self.out):
            return None
        head = self.journal.past.head or {}
        plan = Plan.from_json(json.dumps(head.get("plan")), self.journal.path)
        if head.get("imatrix") is not None and job.imatrix is None:
            return Planned(plan, Importance(self._read_measured(head["imatrix"])))
        return Planned(plan, Importance(job.imatrix))

    def _read_measured(self, sha256: object) -> Imatrix:
        from requant.scoring.statistics import read_statistics

        hint = "--restart begins again"
        try:
            found = read_statistics(self.measured)
        except BadInput as error:
            what = f"what was measured for the unfinished output cannot be read: {error.what}"
            raise OutputRefused(self.measured, what, hint=hint) from error
        if found.sha256 != sha256:
            raise OutputRefused(self.measured, "is not as it was written", hint=hint)
        return found

    def sweep(self) -> None:
        """Remove what killed runs left and none goes on with; nobody else is writing it, as the claim is ours."""
        stale = [self.measured.with_name(f"{self.measured.name}.part")]
        if self.journal.past.head is None:
            stale.append(self.measured)
        for name in {self.out.name, *final_names(self.journal)[:1]}:  # the record of a split output is beside its first
            record = record_path(self.out.with_name(name))
            stale += record.parent.glob(f"{glob.escape(record.name)}.{'[0-9a-f]' * 8}.part")
        for path in stale:
            path.unlink(missing_ok=True)

    def check(self, job: Session) -> None:
        """Raise what would keep the output and its record from being written, before any long work."""
        with Part(self.out, 0, force=self.force, inputs=job.inputs):
            check_writable(record_path(self.out), force=self.force, inputs=job.inputs, own=OUTPUT_SCHEMA)
        if job.needs_scoring:  # the size is known only when hours of scoring are over
            parts = [self.out.with_name(f"{name}.part") for name in final_names(self.journal)]
            check_space(resolve_target(self.out).parent, job.least_bytes(), parts)

    def convert(self, job: Session, planned: Planned) -> Conversion:
        """The output and its record."""
        plan, importance = planned.plan, planned.importance
        from requant.conversion.convert import convert, formats_used, n_steps
        from requant.scoring.statistics import write_statistics

        def record(made: Conversion) -> None:
            path = record_path(made.output)
            write_text(path, made.to_json(), force=self.force, inputs=job.inputs, own=OUTPUT_SCHEMA)

        if importance.statistics is not None:
            statistics, text = importance.statistics
            write_statistics(self.measured, statistics, job.source, text, force=True, inputs=job.inputs)
        prepare_kernels(job.monitor, formats_used(plan))
        with (
            job.monitor.resumable(),
            job.monitor.progress("converting", n_steps(job.source, plan, verified=self.verified)) as advance,
        ):
            return convert(
                job.source,
                plan,
                self.out,
                imatrix=importance.imatrix,
                losses=job.losses,
                threads=job.options.threads,
                force=self.force,
                splitting=self.splitting,
                verified=self.verified,
                cluster=job.cluster,
                journal=self.journal,
                asked=self.asked,
                extras=(self.measured,),
                keep=job.needs_scoring,
                record=record,
                progress=advance,
                tell=job.monitor.tell,
            )


def make(
    job: Session,
    out: Path,
    *,
    splitting: Splitting = WHOLE,
    measure: int | None = None,
    force: bool = False,
    restart: bool = False,
    verified: bool = True,
    show: Callable[[Plan], None] = lambda _: None,
) -> Conversion:
    """All the stages to the file `out`, its record beside it; `show` is called with the plan before it is converted.

    Raises what the stages raise, and OutputRefused for an output that is there or that another run is at.
    """
    job.check_measure(measure)
    with _claimed(job, out, splitting=splitting, measure=measure, restart=restart) as claim:
        work = replace(claim, force=force, verified=verified)
        found = work.earlier(job)
        if found is None:
            work.check(job)
            found = job.make_plan(weigh=True, measure=measure)
        show(found.plan)
        return work.convert(job, found)


@contextlib.contextmanager
def _claimed(job: Session, out: Path, *, splitting: Splitting, measure: int | None, restart: bool) -> Iterator[Work]:
    """The output for this run alone; what an earlier run left is discarded with `restart`."""
    with claim(out) as journal:
        job.monitor.warn(*journal.warnings)
        if restart:
            discard(journal, out, job.inputs)
        work = Work(out, journal, _asked(job, splitting, measure), splitting)
        work.sweep()
        yield work


def _asked(job: Session, splitting: Splitting, measure: int | None) -> dict[str, Any]:
    """All that was asked for and decides what the output becomes, as JSON; files by their content."""
    how = {
        **plan_from_option(job.plan_from),
        "losses": job.options.losses,
        "imatrix": None if job.imatrix is None else job.imatrix.sha256,
        "effort": job.options.effort,
        "measure": measure,
        "allow_requantize": job.options.allow_requantize,
        "keep_split": splitting.keep,
        "max_shard_size": splitting.max_size,
    }
    groups = [{f.name: getattr(group, f.name) for f in fields(group)} for group in (job.request, job.calibration)]
    said = {**groups[0], **groups[1], **how}
    return {name: _told(value) for name, value in said.items() if not (value is None or value is False or value == ())}


def _told(value: Any) -> Any:
    if isinstance(value, Plan | Losses):  # given as data
        return hashlib.sha256(value.to_json().encode()).hexdigest()
    return _file(value) if isinstance(value, Path) else to_plain(value)


def _file(path: Path) -> dict[str, Any]:
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        if status.st_size > _HASHED:
            return {"file": path.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        data = bytearray(status.st_size)
        read_into(path, descriptor, memoryview(data), 0)
        return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
    finally:
        os.close(descriptor)


KEEP_TYPE = "keep-type"


POLICIES = ("error", KEEP_TYPE)


def apply_nonfinite_policy(source: Source, nonfinite: str, monitor: Monitor, *, threads: int | None) -> None:
    """With `keep-type`, read all of the model, and have the tensors that are not finite stay as they are."""
    from requant.model.nonfinite import preserve_nonfinite

    if nonfinite != KEEP_TYPE:
        return
    prepare_kernels(monitor, {t.format for t in source.tensors}, encode=False)
    with monitor.progress("scanning", sum(t.n_bytes for t in source.tensors)) as advance:
        found = run_interruptible(preserve_nonfinite, source, threads=threads, progress=advance)
    monitor.warn(*found)
