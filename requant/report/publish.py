"""Publication of reports: the records and plans that they are of, and pages, model cards and pictures as files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.common.atomic_write import check_writable, has_schema, write_bytes
from requant.common.interrupt import run_interruptible
from requant.common.monitor import SILENT, Monitor
from requant.container.source import open_source
from requant.conversion.record import Conversion, read_conversion, record_path
from requant.errors import BadInput, UsageError, brief, printable
from requant.planning.plan import PLAN_SCHEMA, Plan, read_plan
from requant.report.card.origin import CardOverrides, ModelOrigin, override_origin, read_origin
from requant.report.kinds import CARD, PAGE, PICTURES, check_kind, check_library

if TYPE_CHECKING:
    from requant.container.hashing import FileHash
    from requant.report.card.document import CardOutput
    from requant.scoring.evaluate import Evaluation

    Hashes = dict[Path, tuple[FileHash, ...]]

_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a report: a plan at `path`, or an output: its record at `path`, and its file if it is present."""

    plan: Plan
    path: Path
    made: Conversion | None = None
    output: Path | None = None
    evaluation: Evaluation | None = None


def check_output_reports(targets: Sequence[Path], out: Path, *, force: bool) -> None:
    """Do the same as `check_targets` for reports on an output that is not written yet."""
    own = {os.path.realpath(path) for path in (out, record_path(out))}
    for path in targets:
        if os.path.realpath(path) in own:
            raise UsageError(f"--report {printable(str(path))} is the output itself; give it another name")
    check_targets(targets, force=force)


def write_output_reports(targets: Sequence[Path], out: Path, model: Path, *, force: bool, monitor: Monitor) -> None:
    """Write the reports on an output that was just converted from `model`."""
    if targets:
        subjects = [read_subject(record_path(out))]
        write_reports(targets, subjects, CardOverrides(), [model], force=force, monitor=monitor)


def check_targets(targets: Sequence[Path], *, force: bool) -> None:
    """Raise UsageError or OutputRefused if a report cannot be written, before any long work."""
    for path in targets:
        check_kind(path)
        check_writable(path, force=force)
    if len({os.path.realpath(path) for path in targets}) < len(targets):
        raise UsageError("two reports would be one file; give each a name of its own")
    check_library(path.suffix.lower() for path in targets)


def read_subjects(paths: Iterable[Path]) -> list[Subject]:
    """Read the records, outputs, plans and folders of records at `paths`; each subject once, in their order."""
    found: dict[str, Subject] = {}
    for path in paths:
        for subject in _subjects_at(path):
            found.setdefault(os.path.realpath(subject.path), subject)
    return list(found.values())


def _subjects_at(path: Path) -> list[Subject]:
    if path.is_dir():
        records = sorted(path.glob("*.requant.json"))
        if not records:
            raise BadInput(path, "holds no record of an output", hint="records are called OUT.gguf.requant.json")
        return [read_subject(record) for record in records]
    if _is_gguf(path):
        with open_source(path) as source:
            record = record_path(source.path)
        if not record.exists():
            raise BadInput(path, f"has no record beside it: no {printable(record.name)}")
        return [read_subject(record)]
    if has_schema(path, PLAN_SCHEMA):
        return [Subject(read_plan(path), path)]
    return [read_subject(path)]


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


def read_subject(path: Path) -> Subject:
    """Read the record at `path`. Raises BadInput if the file beside it is not its output."""
    made = read_conversion(path)
    output = path.with_name(Path(made.output.name).name)
    if not output.exists():
        return Subject(made.plan, path, made)
    with open_source(output) as source:
        if source.header_sha256 != made.header_sha256:
            hint = "requant verify says how it differs"
            raise BadInput(output, f"is not the output that {printable(path.name)} is the record of", hint=hint)
    return Subject(made.plan, path, made, output)


def add_evaluations(subjects: Sequence[Subject], paths: Sequence[Path]) -> list[Subject]:
    """Return the subjects with the evaluations at `paths`. Raises BadInput for an evaluation of another file."""
    from requant.scoring.evaluate import read_evaluation

    measured: dict[int, Evaluation] = {}
    for path in paths:
        evaluation = read_evaluation(path)
        if evaluation.header_sha256 is None:
            hint = "run requant evaluate --json again"
            raise BadInput(path, "does not say which file was measured", hint=hint)
        own = [i for i, s in enumerate(subjects) if s.made and s.made.header_sha256 == evaluation.header_sha256]
        if not own:
            names = [s.plan.source if s.made is None else s.made.output.name for s in subjects]
            given = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            raise BadInput(path, "was measured on another file", got=evaluation.model, limit=given)
        if own[0] in measured:
            raise BadInput(path, "is a second evaluation of the same output", got=evaluation.model, hint="give one")
        measured |= dict.fromkeys(own, evaluation)
    return [replace(subject, evaluation=measured.get(i)) for i, subject in enumerate(subjects)]


def write_reports(
    targets: Sequence[Path],
    subjects: Sequence[Subject],
    overrides: CardOverrides,
    sources: Sequence[Path] = (),
    *,
    force: bool,
    known: Hashes | None = None,
    monitor: Monitor = SILENT,
) -> None:
    """Write all reports; a card comes last and shows the pictures and pages that are written with it.

    known: hashes of files that were read already; those read now are added.
    """
    kinds = {path: path.suffix.lower() for path in targets}
    if len(subjects) > 1 and set(kinds.values()) != {CARD}:
        raise UsageError(f"a page and a picture are of one output; {len(subjects)} were given")
    plans = [subject.path for subject in subjects if subject.made is None]
    if plans and CARD in kinds.values():
        raise BadInput(plans[0], "is a plan; a model card is of an output, give its record")
    needs_files = not set(kinds.values()) <= set(PICTURES) and not plans
    outputs = _card_outputs(subjects, sources, {} if known is None else known, monitor) if needs_files else []
    for path, kind in sorted(kinds.items(), key=lambda item: item[1] == CARD):
        if kind == CARD:
            data = _render_card(path, targets, outputs, overrides, monitor).encode()
        elif kind == PAGE:
            data = _render_page(subjects[0], outputs).encode()
        else:
            from requant.report.picture.figure import render_picture

            data = render_picture(subjects[0].plan, kind)
        write_bytes(path, data, force=force)


def _render_page(subject: Subject, outputs: Sequence[CardOutput]) -> str:
    from requant.report.page.document import render_page

    if not outputs:
        return render_page(subject.plan)
    shown = outputs[0]
    evaluations = [] if shown.evaluation is None else [shown.evaluation]
    source, output = (files[0].sha256 if len(files) == 1 else None for files in (shown.source, shown.files))
    return render_page(shown.made, evaluations=evaluations, source_sha256=source, output_sha256=output)


def _render_card(
    path: Path, targets: Sequence[Path], outputs: Sequence[CardOutput], overrides: CardOverrides, monitor: Monitor
) -> str:
    from requant.report.card.document import render_card

    origins = [override_origin(overrides, output.origin) for output in outputs]
    if not all(origin.repositories for origin in origins):
        monitor.warn("the card names no base model: nothing says which repository it is from; --base-model OWNER/NAME")
    if not all(origin.license for origin in origins):
        monitor.warn("the card names no licence: nothing says under which the model is; --license ID")
    beside = {p: Path(os.path.relpath(p, path.parent)).as_posix() for p in targets if p != path}
    pictures = [name for p, name in beside.items() if p.suffix.lower() in PICTURES]
    pages = [name for p, name in beside.items() if p.suffix.lower() == PAGE]
    return render_card(outputs, overrides, pictures, pages)


def _card_outputs(
    subjects: Sequence[Subject], sources: Sequence[Path], known: Hashes, monitor: Monitor
) -> list[CardOutput]:
    """Return the outputs with origins from metadata and hashes of all files present, each read once."""
    from requant.container.hashing import hash_files
    from requant.report.card.document import CardOutput

    with ExitStack() as stack:
        given = [stack.enter_context(open_source(path)) for path in sources]
        for source in given:
            if all(s.plan.header_sha256 != source.header_sha256 for s in subjects):
                limit = f"{', '.join(dict.fromkeys(brief(s.plan.source) for s in subjects))} as it was"
                raise BadInput(source.path, "is not what the output was made from: its header differs", limit=limit)
        own = [None if s.output is None else stack.enter_context(open_source(s.output)) for s in subjects]
        unread = [s for s in (*given, *own) if s is not None and s.path not in known]
        total = sum(f.header.file_size for source in unread for f in source.opened)
        with monitor.progress("hashing", total) as advance:
            for source in unread:
                known[source.path] = run_interruptible(hash_files, source, advance)
        outputs = []
        for subject, output in zip(subjects, own, strict=True):
            assert subject.made is not None
            origin = next((x for x in given if x.header_sha256 == subject.plan.header_sha256), None)
            described = output or origin
            model = ModelOrigin() if described is None else read_origin(described.metadata)
            files = [() if x is None else known[x.path] for x in (output, origin)]
            outputs.append(CardOutput(subject.made, model, files[0], files[1], subject.evaluation))
    return outputs
