"""The stages that several commands run, with their progress on stderr.

What leaves nothing behind when it is stopped runs in a thread of its own (`messages.interruptible`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.cli import messages
from requant.container.files import Identity, identity
from requant.container.source import Source, open_source, require_model
from requant.errors import InputOutputError
from requant.formats import Effort, by_name
from requant.model.roles import never_quantize
from requant.pipeline import Wishes, check_feasible, make_plan, off_plan
from requant.plan import PLAN_SCHEMA, Losses, Plan, read_losses, read_plan
from requant.textfile import check_writable, has_schema, write_text

if TYPE_CHECKING:
    from requant.conversion import Conversion
    from requant.imatrix import Imatrix
    from requant.verify import Verification


def score(
    source: Source,
    types: tuple[str, ...],
    imatrix: Imatrix | None,
    *,
    threads: int | None,
    allow_requantize: bool,
    effort: Effort | None,
) -> Losses:
    """The losses of `types`, by default sensitivity.DEFAULT_TYPES."""
    from requant import sensitivity

    types = types or sensitivity.DEFAULT_TYPES
    messages.prepare_kernels({t.format for t in source.tensors} | {by_name(name) for name in types})
    with messages.progress("scoring", sum(t.n_bytes for t in source.tensors)) as advance:
        return messages.interruptible(
            sensitivity.score,
            source,
            types=types,
            imatrix=imatrix,
            threads=threads,
            allow_requantize=allow_requantize,
            effort=Effort.DEFAULT if effort is None else effort,
            progress=advance,
        )


def read_importance(path: Path | None, source: Source) -> Imatrix | None:
    """The importance matrix in the file at `path`, if one is given; raises BadInput where it is of another model."""
    if path is None:
        return None
    from requant.imatrix import coverage, read_imatrix

    arch, imatrix = require_model(source), read_imatrix(path)
    coverage(imatrix, [t for t in source.tensors if never_quantize(arch, t.name, t.shape, t.type_id) is None])
    return imatrix


@dataclass(frozen=True, slots=True)
class Job:
    """A model and all that was said of how to plan for it and to convert it."""

    source: Source
    wishes: Wishes
    imatrix: Imatrix | None
    losses: Losses | None
    inputs: frozenset[Identity]
    plan_file: Path | None
    type_name: str | None
    threads: int | None
    allow_requantize: bool
    effort: Effort | None

    def check_output(self, out: Path, force: bool) -> None:
        """Raise what would keep `out` and its record from being written, before any long work."""
        from requant.container.output import Output
        from requant.conversion import OUTPUT_SCHEMA, record_path

        with Output(out, 0, force=force, inputs=self.inputs):
            check_writable(record_path(out), force=force, inputs=self.inputs, own=OUTPUT_SCHEMA)

    def plan(self) -> Plan:
        """The plan of the file, for the one type, or for the budget, then scored if no losses are given.

        --effort, where it is given, replaces that of the plan or the losses.
        """
        plan = self._plan()
        return plan if self.effort is None else replace(plan, effort=self.effort)

    def _plan(self) -> Plan:
        if self.plan_file is not None:
            return read_plan(self.plan_file)
        if self.type_name is not None:
            from requant.recipe import uniform_plan

            request, again = self.wishes.request, self.allow_requantize
            return uniform_plan(
                self.source, self.type_name, imatrix=self.imatrix, request=request, allow_requantize=again
            )
        losses = self.losses
        if losses is None:
            from requant.sensitivity import DEFAULT_TYPES

            types = self.wishes.types_to_score(DEFAULT_TYPES)
            check_feasible(
                self.source, self.wishes, types, imatrix=self.imatrix, allow_requantize=self.allow_requantize
            )
            losses = score(
                self.source,
                types,
                self.imatrix,
                threads=self.threads,
                allow_requantize=self.allow_requantize,
                effort=self.effort,
            )
        return messages.interruptible(make_plan, self.source, losses, self.wishes, imatrix=self.imatrix)

    def convert(self, plan: Plan, out: Path, force: bool) -> Conversion:
        """The output and its record."""
        from requant.conversion import OUTPUT_SCHEMA, record_path
        from requant.convert import convert, formats_used

        messages.prepare_kernels(formats_used(plan))
        with messages.progress("converting", sum(t.n_bytes for t in self.source.tensors)) as advance:
            made = convert(
                self.source,
                plan,
                out,
                imatrix=self.imatrix,
                losses=self.losses,
                threads=self.threads,
                force=force,
                progress=advance,
            )
        write_text(record_path(out), made.to_json(), force=force, inputs=self.inputs, own=OUTPUT_SCHEMA)
        return made

    def verify(self, out: Path) -> Verification:
        """The output, read again and found sound; raises InputOutputError where it is not."""
        found = verify(out, self.source, None, self.threads)
        if not found.ok:
            what = f"does not read back as it was written: {found.findings[0]}"
            raise InputOutputError(out, what, hint="do not use it; check the disk, then convert again")
        return found


def prepared(
    source: Source,
    wishes: Wishes,
    *,
    imatrix: Path | None = None,
    losses: Path | None = None,
    plan_file: Path | None = None,
    type_name: str | None = None,
    threads: int | None = None,
    allow_requantize: bool = False,
    effort: Effort | None = None,
) -> Job:
    """The job with its small files read."""
    matrix = read_importance(imatrix, source)
    found = None if losses is None else read_losses(losses)
    inputs = source.identities | identities(imatrix, losses, plan_file)
    return Job(source, wishes, matrix, found, inputs, plan_file, type_name, threads, allow_requantize, effort)


def identities(*paths: Path | None) -> frozenset[Identity]:
    """Of the files that are there: no output may be one of them."""
    found = set()
    for path in paths:
        with suppress(OSError, ValueError):
            if path is not None:
                found.add(identity(path.stat()))
    return frozenset(found)


def verify(out: Path, source: Source | None, wanted: Path | None, threads: int | None) -> Verification:
    """What is wrong with `out`; `wanted` is a plan, or the record where it is not beside `out`."""
    from requant.verify import formats_read
    from requant.verify import verify as verify_

    plan = read_plan(wanted) if wanted is not None and has_schema(wanted, PLAN_SCHEMA) else None
    with open_source(out) as target:
        messages.prepare_kernels(formats_read(target, source), encode=False)
        total = sum(t.n_bytes for t in target.tensors)
        differences = () if plan is None else tuple(off_plan(target, plan))
    with messages.progress("verifying", total) as advance:
        record = wanted if plan is None else None
        found = messages.interruptible(verify_, out, source=source, record=record, threads=threads, progress=advance)
    if plan is None:
        return found
    return replace(found, against=(*found.against, "plan"), findings=(*found.findings, *differences))
