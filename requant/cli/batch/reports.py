"""What a batch tells of its outputs: one model card of all, and pages or pictures beside each.

What it wrote is remembered by its hash: the same outputs are not reported on again, and a file that somebody has
edited since is left as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from requant.cli import messages, report
from requant.cli.batch.items import COMMON, BatchItem, key_of, options_of
from requant.cli.batch.jobs import Report, read_report
from requant.cli.batch.state import digest
from requant.cli.batch.summary import GOOD
from requant.common.atomic_write import check_writable, write_text
from requant.common.serialization import dump, parse, parse_record, read_text, to_plain
from requant.container.hashing import FileHash
from requant.conversion.record import record_path
from requant.errors import BadInput, InputOutputError, OutputRefused, UsageError, printable
from requant.report import publish as reporting
from requant.report.card.origin import CardOverrides

_SCHEMA = "requant.reports/1"
_OWN = COMMON | {"targets", "evaluations", "sources", "force"}  # options of report that a batch decides by itself


@dataclass(frozen=True, slots=True)
class Written:
    """What was written for which request: absolute path -> SHA-256."""

    request: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reports:
    """What is to be told, and where that is remembered."""

    asked: Report
    said: CardOverrides
    memory: Path
    force: bool

    def check(self, cells: Iterable[BatchItem]) -> None:
        """Raise what would keep reports from being written, before the outputs are made."""
        remembered, cells = self._remembered(), list(cells)
        outputs = {os.path.realpath(p) for c in cells if c.out is not None for p in (c.out, record_path(c.out))}
        files = frozenset(identity for cell in cells for identity in cell.model.files)
        for path in self._targets(cells):
            if os.path.realpath(path) in outputs:
                raise OutputRefused(path, "is one of the outputs", hint="give the card another name")
            known = os.path.realpath(path) in remembered.files
            _make_folder(path)
            check_writable(path, force=self.force or known, inputs=files)
        if any(kind in reporting.PICTURES for kind in self._beside):
            from requant.report.picture.picture import check_library

            check_library()

    def write(self, cells: Iterable[BatchItem]) -> None:
        """Tell of all outputs that are there."""
        there = [cell for cell in cells if cell.row.status in GOOD and cell.out is not None and cell.row.output]
        records = [record_path(Path(str(cell.row.output))) for cell in there]
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in records]
        request = digest([to_plain(self.said), [str(p) for p in self._targets(there)], hashes])
        before = self._remembered()
        if not there or (request == before.request and all(map(_is_as, before.files, before.files.values()))):
            return
        subjects = list(map(reporting.read_subject, records))
        known: dict[Path, tuple[FileHash, ...]] = {}
        tasks = [
            (target, [subject], [cell.model.path])
            for cell, subject in zip(there, subjects, strict=True)
            for target in self._beside_of(cell)
        ]
        if self.asked.card is not None:
            tasks.append((self.asked.card, subjects, list(dict.fromkeys(cell.model.path for cell in there))))
        files: dict[str, str] = {}
        for target, found, sources in tasks:
            key = os.path.realpath(target)
            mine = before.files.get(key)
            if target.exists() and not self.force and mine is not None and not _is_as(key, mine):
                messages.warn(f"{target} was edited since it was written, and is left as it is; --force replaces it")
                files[key] = mine
                continue
            self._write(target, found, sources, known, mine=mine is not None)
            files[key] = hashlib.sha256(target.read_bytes()).hexdigest()
        text = dump({"schema": _SCHEMA} | to_plain(Written(request, files)))
        write_text(self.memory, text, force=True, inputs=frozenset())

    def _write(
        self,
        target: Path,
        found: Sequence[reporting.Subject],
        sources: Sequence[Path],
        known: dict[Path, tuple[FileHash, ...]],
        *,
        mine: bool,
    ) -> None:
        _make_folder(target)
        said = self.said if target == self.asked.card else CardOverrides()
        inputs = reporting.input_identities(found, *sources)
        reporting.write_reports(
            [target],
            found,
            said,
            sources,
            force=self.force or mine,
            inputs=inputs,
            known=known,
            monitor=messages.MONITOR,
        )

    @property
    def _beside(self) -> tuple[str, ...]:
        return tuple(f".{kind}" for kind in self.asked.beside)

    def _beside_of(self, cell: BatchItem) -> list[Path]:
        if cell.out is None:
            return []
        return [cell.out.with_name(cell.out.name.removesuffix(".gguf") + kind) for kind in self._beside]

    def _targets(self, cells: Iterable[BatchItem]) -> list[Path]:
        card = [] if self.asked.card is None else [self.asked.card]
        return card + [path for cell in cells for path in self._beside_of(cell)]

    def _remembered(self) -> Written:
        if not self.memory.exists():
            return Written()
        try:
            found: Written = parse_record(Written, parse(read_text(self.memory), _SCHEMA, self.memory), "", self.memory)
        except BadInput as error:
            messages.warn(f"{error}; files that are there are nobody's")
            return Written()
        return found


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputOutputError(path.parent, f"cannot be made: {error.strerror}") from error


def _is_as(path: str, sha256: str) -> bool:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def read_reports(jobs: Path, folder: Path, *, force: bool) -> Reports | None:
    """What the [report] of the file at `jobs` asks for; None without one. Raises BadInput naming the key."""
    options = options_of(report.command, _OWN | {"output"})
    asked = read_report(jobs, {key: key_of(key, option) for key, option in options.items()})
    if asked is None:
        return None
    try:
        with report.command.make_context("report", ["INPUT", "--output=README.md", *asked.words]) as context:
            said = reporting.parse_overrides(context.params)
    except (click.ClickException, UsageError) as error:
        what = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise BadInput(jobs, f"[report]: {printable(' '.join(what.split()))}") from error
    return Reports(asked, said, folder / "reports.json", force)
