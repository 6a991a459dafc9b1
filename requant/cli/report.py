"""`requant report`: a page, a model card or pictures of outputs and plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from requant.api.batch.summary import output_records
from requant.cli import completion, messages, options
from requant.cli.command import Command
from requant.common.units import format_size
from requant.container.source import add_model_inputs
from requant.errors import UsageError, printable
from requant.report import publish
from requant.report.card.origin import REPOSITORY, CardOverrides
from requant.report.kinds import CARD, PICTURES

Paths = tuple[Path, ...]
_FILES: dict[str, Any] = {"type": options.FILE, "multiple": True}


def _check_repositories(
    _: click.Context, param: click.Parameter, value: str | tuple[str, ...] | None
) -> str | tuple[str, ...]:
    """Return the names of repositories, '' for none. Raises UsageError unless each is OWNER/NAME."""
    for name in (value,) if isinstance(value, str) else value or ():
        if not REPOSITORY.fullmatch(name):
            raise UsageError(f"{param.opts[0]}: '{printable(name)}' is no OWNER/NAME of a repository on the Hub")
    return "" if value is None else value


@click.command("report", cls=Command)
@click.argument(
    "inputs",
    metavar="INPUT...",
    nargs=-1,
    required=True,
    type=options.FILE,
    shell_complete=completion.files(".gguf", ".json", ".toml"),
)
@click.option(
    "-o",
    "--output",
    "targets",
    **_FILES,
    required=True,
    callback=options.check_report_names,
    metavar="F",
    help="Write it here: .html a page, .md a model card, .png or .svg a picture. Several: the card shows the others.",
)
@click.option(
    "--evaluation", "evaluations", **_FILES, metavar="F", help="What `requant evaluate --json` measured on an output."
)
@click.option(
    "--source", "sources", **_FILES, metavar="MODEL", help="The model that it was made from, for its SHA-256."
)
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    callback=_check_repositories,
    metavar="OWNER/NAME",
    help="The model's repository on the Hub, where the file does not say it.",
)
@click.option("--license", default="", metavar="ID", help="The model's licence: apache-2.0; other for one of its own.")
@click.option("--license-name", default="", metavar="NAME", help="The name of a licence of its own.")
@click.option("--license-link", default="", metavar="URL", help="Where that licence is.")
@click.option("--language", "languages", multiple=True, metavar="CODE", help="A language of the model: en.")
@click.option("--tag", "tags", multiple=True, metavar="T", help="A tag more.")
@click.option("--quantized-by", default="", metavar="NAME", help="Who made the files.")
@click.option(
    "--repo",
    "repository",
    callback=_check_repositories,
    metavar="OWNER/NAME",
    help="Where the files will be: for links.",
)
@options.force
def command(*, inputs: Paths, targets: Paths, evaluations: Paths, sources: Paths, force: bool, **given: Any) -> None:
    """Show what was made: a page to look at, a model card to publish, a picture for it.

    INPUT is a record (OUT.gguf.requant.json) or the output beside it, a folder of records, the JOBS.toml of a batch,
    or a plan. A card may be of several outputs; a page and pictures are of one, or of a plan.
    """
    overrides = parse_overrides(given)
    _check_kinds(targets, overrides, (*sources, *evaluations))
    records = (path for source in inputs for path in output_records(source))
    subjects = publish.add_evaluations(publish.read_subjects(records), evaluations)
    add_model_inputs(*inputs, *sources)
    publish.check_targets(targets, force=force)
    publish.write_reports(targets, subjects, overrides, sources, force=force, monitor=messages.MONITOR)
    for path in targets:
        messages.print_result(f"{path}: {format_size(path.stat().st_size)}")


def parse_overrides(given: Mapping[str, Any]) -> CardOverrides:
    """Return the user's facts of the model from the options of the same names."""
    return CardOverrides(**{f.name: given[f.name] for f in fields(CardOverrides)})


def _check_kinds(targets: Paths, overrides: CardOverrides, read: Paths) -> None:
    """Raise UsageError for options that none of the reports can show."""
    kinds = {path.suffix.lower() for path in targets}
    if CARD not in kinds and overrides != CardOverrides():
        raise UsageError("what is said of the model is for a model card; give -o README.md with it")
    if kinds <= set(PICTURES) and read:
        raise UsageError("a picture is of a plan alone; --source and --evaluation are for a page or a model card")
