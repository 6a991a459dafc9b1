"""Reports of a batch: one model card of all outputs, and pages or pictures beside each.

The hash of each file written is kept: the same outputs are not reported on again, and a file that was edited since is
left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from requant.api.batch.jobs import ReportTable, read_report_table
from requant.api.batch.state import REPORTS, write_state
from requant.api.batch.summary import GOOD
from requant.cli import messages, report
from requant.cli.batch_options import COMMON, key_options
from requant.common.atomic_write import check_writable
from requant.common.files import hash_file
from requant.common.folders import nearest_folder
from requant.common.inputs import collect_part, own_files
from requant.common.serialization import dump, hash_json, parse, parse_record, read_text, to_plain
from requant.conversion.record import record_path
from requant.errors import BadInput, InputOutputError, OutputRefused, UsageError, printable
from requant.report import publish
from requant.report.card.origin import CardOverrides
from requant.report.kinds import check_library

if TYPE_CHECKING:
    from requant.api.batch.items import BatchItem
    from requant.container.hashing import FileHash

_SCHEMA = "requant.reports/1"
_OWN = COMMON | {"targets", "output", "evaluations", "sources", "force"}  # decided by the batch itself


@dataclass(frozen=True, slots=True)
class WrittenReports:
    """The reports written for a request: absolute path -> SHA-256."""

    request: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchReports:
    """The reports asked for; `memory` is the file that keeps their hashes."""

    table: ReportTable
    overrides: CardOverrides
    memory: Path
    force: bool

    def check_targets(self, items: Sequence[BatchItem], *, make_folders: bool = True) -> None:
        """Raise every error that would keep the reports from being written; without `make_folders` make none."""
        written = self._read_memory()
        outputs = {os.path.realpath(p) for i in items if i.out is not None for p in (i.out, record_path(i.out))}
        for path in self._targets(items):
            if os.path.realpath(path) in outputs:
                raise OutputRefused(path, "is one of the outputs", hint="give the card another name")
            known = os.path.realpath(path) in written.files
            if make_folders:
                _make_folder(path)
            if nearest_folder(path.parent) == path.parent:
                check_writable(path, force=self.force or known)
        check_library(f".{kind}" for kind in self.table.beside)

    def write_reports(self, items: Sequence[BatchItem]) -> None:
        """Write the reports on all outputs that exist."""
        made = [item for item in items if item.row.status in GOOD and item.out is not None and item.row.output]
        records = [record_path(Path(str(item.row.output))) for item in made]
        hashes = list(map(hash_file, records))
        request = hash_json([to_plain(self.overrides), [str(p) for p in self._targets(made)], hashes])
        before = self._read_memory()
        if not made or (request == before.request and all(map(_is_unchanged, before.files, before.files.values()))):
            return
        files: dict[str, str] = {}
        known: dict[Path, tuple[FileHash, ...]] = {}
        for target, subjects, sources in self._tasks(made, list(map(publish.read_subject, records))):
            key = os.path.realpath(target)
            own = before.files.get(key)
            if target.exists() and not self.force and own is not None and not _is_unchanged(key, own):
                kept = "was edited since it was written, and is left as it is; --force replaces it"
                messages.warn(f"{target} {kept}")
                files[key] = own
                continue
            _make_folder(target)
            overrides = self.overrides if target == self.table.card else CardOverrides()
            with collect_part():
                publish.write_reports(
                    *([target], subjects, overrides, sources),
                    force=self.force or own is not None,
                    known=known,
                    monitor=messages.MONITOR,
                )
            files[key] = hash_file(target)
        text = dump({"schema": _SCHEMA} | to_plain(WrittenReports(request, files)))
        write_state(self.memory, text)

    def _tasks(
        self, items: Sequence[BatchItem], subjects: Sequence[publish.Subject]
    ) -> Iterator[tuple[Path, Sequence[publish.Subject], Sequence[Path]]]:
        """Yield the file, the subjects and their sources of each report, of the card last."""
        for item, subject in zip(items, subjects, strict=True):
            for target in self._beside(item):
                yield target, [subject], [item.source.path]
        if self.table.card is not None:
            yield self.table.card, subjects, list(dict.fromkeys(item.source.path for item in items))

    def _beside(self, item: BatchItem) -> list[Path]:
        if item.out is None:
            return []
        stem = item.out.name.removesuffix(".gguf")
        return [item.out.with_name(f"{stem}.{kind}") for kind in self.table.beside]

    def _targets(self, items: Iterable[BatchItem]) -> list[Path]:
        card = [] if self.table.card is None else [self.table.card]
        return card + [path for item in items for path in self._beside(item)]

    def _read_memory(self) -> WrittenReports:
        if not self.memory.exists():
            return WrittenReports()
        try:
            with own_files():
                raw = parse(read_text(self.memory), _SCHEMA, self.memory)
            written: WrittenReports = parse_record(WrittenReports, raw, "", self.memory)
        except BadInput as error:
            messages.warn(f"{error}; files that are there are nobody's")
            return WrittenReports()
        return written


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputOutputError(path.parent, f"cannot be made: {error.strerror}") from error


def _is_unchanged(path: str, sha256: str) -> bool:
    try:
        return hash_file(Path(path)) == sha256
    except OSError:
        return False


def read_reports(jobs: Path, folder: Path, *, force: bool) -> BatchReports | None:
    """Read the [report] of the file at `jobs`; None without one. Raises BadInput naming the key."""
    table = read_report_table(jobs, key_options(report.command, _OWN))
    if table is None:
        return None
    try:
        with report.command.make_context("report", ["INPUT", "--output=README.md", *table.words]) as context:
            overrides = report.parse_overrides(context.params)
    except (click.ClickException, UsageError) as error:
        what = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise BadInput(jobs, f"[report]: {printable(' '.join(what.split()))}") from error
    return BatchReports(table, overrides, folder / REPORTS, force)
