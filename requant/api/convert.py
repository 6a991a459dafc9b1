"""Conversion as one call: claim the output, make a plan or take that of an unfinished run, write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.api.compensation import check_compensation, read_compensation_text
from requant.api.importance import Importance
from requant.api.kernels import prepare_kernels
from requant.api.session import Planned, Session
from requant.common.atomic_write import check_writable, write_text
from requant.common.files import identify_content, open_regular
from requant.common.folders import check_space
from requant.common.inputs import own_files
from requant.common.serialization import to_plain
from requant.common.sidecars import Sidecar
from requant.container.imatrix import Imatrix, read_imatrix
from requant.container.output import can_resume, claim_output, discard_unfinished
from requant.container.part import check_place, resolve_target
from requant.container.splitting import output_paths, total_size
from requant.conversion.options import DEFAULTS, POLICIES, Claim, ConversionOptions
from requant.conversion.record import Conversion, is_record_of_output, record_path
from requant.errors import BadInput, InputOutputError, OutputRefused
from requant.planning.plan import Plan
from requant.planning.request import plan_from_option
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.container.layout import Layout
    from requant.container.splitting import Splitting
    from requant.conversion.prepare import PreparedOutput

_MAX_HASHED = 2**26  # bytes; a larger file is identified by size and time, not by its content


@dataclass(frozen=True, slots=True)
class Trial:
    """A conversion before its first byte: the plan with its importance, and the files and notes that it makes."""

    planned: Planned
    prepared: PreparedOutput


@dataclass(frozen=True, slots=True)
class ConversionRun:
    """A conversion to the file `out`, which this run has claimed."""

    out: Path
    claim: Claim
    options: ConversionOptions

    @property
    def importance(self) -> Sidecar:
        """The file in which importance that was measured while planning is kept until the output is finished."""
        return _importance_sidecar(self.out)

    def resume(self, session: Session) -> Planned | None:
        """Return the plan of an unfinished run of the same command, and the importance that it measured.

        Raises OutputRefused where the unfinished output is of another command.
        """
        from requant.conversion.convert import resume_key

        journal = self.claim.journal
        if not can_resume(journal, resume_key(session.source, self.claim.request), self.out):
            return None
        head = journal.past.head or {}
        plan = Plan.from_json(json.dumps(head.get("plan")), journal.path)
        if head.get("imatrix") is not None and session.imatrix is None:
            return Planned(plan, Importance(replace(self._read_importance(head["imatrix"]), known_as=plan.imatrix)))
        return Planned(plan, session.importance)

    def _read_importance(self, wanted: object) -> Imatrix:
        from requant.scoring.statistics import hash_sidecar

        path, hint = self.importance.path, "--restart begins again"
        try:
            self.importance.check()
            with own_files():
                found = read_imatrix(path)
                sha256 = hash_sidecar(path)
        except BadInput as error:
            what = f"what was measured for the unfinished output cannot be read: {error.what}"
            raise OutputRefused(path, what, hint=hint) from error
        if sha256 != wanted:
            raise OutputRefused(path, "is not as it was written", hint=hint)
        return replace(found, sha256=sha256, path=found.datasets[0] if found.datasets else "")

    def check_output(self, session: Session, *, discards: bool) -> None:
        """Raise, before any long work, what would keep the output and its record from being written."""
        force, has_journal = self.options.force, self.claim.journal.was_there
        check_place(self.out, 0, force=force, has_journal=has_journal, discards=discards)
        check_writable(record_path(self.out), force=force, is_own=is_record_of_output)
        if session.needs_scoring:  # the exact size is known only after hours of scoring
            parts = [self.out.with_name(f"{name}.part") for name in self.claim.journal.past.file_names()]
            check_space(resolve_target(self.out).parent, session.least_bytes(), parts)

    def prepare(self, session: Session, measure: int | None, *, restart: bool) -> Trial:
        """Return the plan, new or that of an unfinished run, and the files that it makes.

        Raises all that can be found before the first byte of the output is written.
        """
        from requant.conversion.prepare import prepare_output

        found = None if restart else self.resume(session)
        if found is None:
            self.check_output(session, discards=restart)
        planned = found or session.make_plan(measure=measure)
        prepared = prepare_output(
            session.source, planned.plan, planned.importance.imatrix, session.losses, self.options.splitting
        )
        if found is None:
            self._check_files(session, prepared.layouts, discards=restart)
        return Trial(planned, prepared)

    def _check_files(self, session: Session, layouts: Sequence[Layout], *, discards: bool) -> None:
        paths, has_journal = output_paths(self.out, layouts), self.claim.journal.was_there
        for path, layout in zip(paths, layouts, strict=True):
            check_place(path, layout.size, force=self.options.force, has_journal=has_journal, discards=discards)
        targets = [resolve_target(path) for path in paths]
        parts = [target.with_name(f"{target.name}.part") for target in targets]
        check_space(targets[0].parent, total_size(layouts), parts)

    def convert(self, session: Session, planned: Planned) -> Conversion:
        """Write the output and its record."""
        from requant.conversion.convert import convert
        from requant.conversion.prepare import formats_used

        plan, importance = planned.plan, planned.importance
        text = read_compensation_text(session, plan)
        importance.save(self.importance.path, session.source, force=False, sidecar_of=self.out.name)
        prepare_kernels(session.monitor, formats_used(plan), threads=session.options.threads)
        return convert(
            session.source,
            plan,
            self.out,
            imatrix=importance.imatrix,
            losses=session.losses,
            options=replace(self.options, compensation=text),
            claim=self.claim,
            monitor=session.monitor,
        )


def convert_to_file(
    session: Session,
    out: Path,
    *,
    options: ConversionOptions = DEFAULTS,
    measure: int | None = None,
    restart: bool = False,
    show: Callable[[Plan], None] = lambda _: None,
) -> Conversion:
    """Plan and convert to the file `out`, its record beside it; `show` is called with the plan before it is converted.

    Threads and cluster are those of the session. Raises what planning and converting raise, and OutputRefused for an
    output that exists or that another run writes.
    """
    with _claim(session, out, options, measure) as run:
        if restart:
            discard_unfinished(run.claim.journal, out)
        if run.claim.journal.past.head is None:
            run.importance.remove()  # of a run that was killed
        planned = run.prepare(session, measure, restart=restart).planned
        show(planned.plan)
        return run.convert(session, planned)


def try_conversion(
    session: Session,
    out: Path,
    *,
    options: ConversionOptions = DEFAULTS,
    measure: int | None = None,
    restart: bool = False,
) -> Trial:
    """Do what `convert_to_file` does before the first byte of the output, with all its checks; leave no file.

    Raises what `convert_to_file` raises before that.
    """
    with _claim(session, out, options, measure) as run:
        return run.prepare(session, measure, restart=restart)


@contextlib.contextmanager
def _claim(session: Session, out: Path, options: ConversionOptions, measure: int | None) -> Iterator[ConversionRun]:
    """Claim the output for this run alone."""
    session.check_measure(measure)
    session.check_importance()
    check_compensation(session)
    options = replace(options, threads=session.options.threads, cluster=session.cluster)

    def write_record(made: Conversion) -> None:
        path = record_path(made.output)
        write_text(path, made.to_json(), force=options.force, is_own=is_record_of_output)

    importance = _importance_sidecar(out)
    with claim_output(out) as journal:
        session.monitor.warn(*journal.warnings)
        importance.check()
        claim = Claim(
            journal,
            _describe_request(session, options.splitting, measure),
            extras=(importance,),
            keep=session.needs_scoring,
            record=write_record,
        )
        yield ConversionRun(out, claim, options)


def _importance_sidecar(out: Path) -> Sidecar:
    target = resolve_target(out)

    def is_ours(descriptor: int) -> bool:
        from requant.scoring.statistics import SIDECAR_HEAD, is_sidecar_of

        return is_sidecar_of(out.name, os.pread(descriptor, SIDECAR_HEAD, 0))

    return Sidecar(target.with_name(f"{target.name}.part.imatrix"), "the importance of this output", is_ours)


def _describe_request(session: Session, splitting: Splitting, measure: int | None) -> dict[str, Any]:
    """Return all options that decide what the output becomes, as JSON; files by their content."""
    own = {
        **plan_from_option(session.plan_from),
        "losses": session.options.losses,
        "imatrix": None if session.imatrix is None else session.imatrix.sha256,
        "no_imatrix": session.options.no_imatrix,
        "effort": session.options.effort,
        "compensate": session.options.compensate,
        "no_compensate": session.options.no_compensate,
        "max_memory": session.options.max_memory,
        "measure": measure,
        "allow_requantize": session.options.allow_requantize,
        "nonfinite": None if session.options.nonfinite == POLICIES[0] else session.options.nonfinite,
        "keep_split": splitting.keep,
        "max_shard_size": splitting.max_size,
    }
    groups = [
        {f.name: getattr(group, f.name) for f in fields(group)} for group in (session.request, session.calibration)
    ]
    given = {**groups[0], **groups[1], **own}
    return {
        name: _identify(value) for name, value in given.items() if not (value is None or value is False or value == ())
    }


def _identify(value: Any) -> Any:
    """Return `value` as JSON: data by its hash, a file by its content."""
    if isinstance(value, Plan | Losses):
        return hashlib.sha256(value.to_json().encode()).hexdigest()
    return _identify_file(value) if isinstance(value, Path) else to_plain(value)


def _identify_file(path: Path) -> dict[str, Any]:
    os.close(open_regular(path))  # raises for what is no readable file
    try:
        found = identify_content(path, _MAX_HASHED)
    except OSError as error:
        raise InputOutputError(path, f"cannot be read: {error.strerror}") from error
    if isinstance(found, str):
        return {"file": path.name, "sha256": found}
    return {"file": path.name, "size": found[0], "mtime_ns": found[1]}
