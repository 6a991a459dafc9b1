"""`requant report`: a page, a model card or pictures of what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api.batch.summary import output_records
from requant.cli import completion, messages, options
from requant.cli.command import Command
from requant.common.units import format_size
from requant.errors import UsageError, printable
from requant.report import publish as reporting
from requant.report.card.origin import REPOSITORY, CardOverrides


def _repositories(_: click.Context, param: click.Parameter, value: Any) -> Any:
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
    type=options.FILE,
    multiple=True,
    required=True,
    callback=options.report_files,
    metavar="F",
    help="Write it here: .html a page, .md a model card, .png or .svg a picture. Several: the card shows the others.",
)
@click.option(
    "--evaluation",
    "evaluations",
    type=options.FILE,
    multiple=True,
    metavar="F",
    help="What `requant evaluate --json` measured on an output.",
)
@click.option(
    "--source",
    "sources",
    type=options.FILE,
    multiple=True,
    metavar="MODEL",
    help="The model that it was made from, for its SHA-256.",
)
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    callback=_repositories,
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
    "--repo", "repository", callback=_repositories, metavar="OWNER/NAME", help="Where the files will be: for links."
)
@options.force
def command(
    *,
    inputs: tuple[Path, ...],
    targets: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    sources: tuple[Path, ...],
    force: bool,
    **given: Any,
) -> None:
    """Show what was made: a page to look at, a model card to publish, a picture for it.

    INPUT is a record (OUT.gguf.requant.json) or the output beside it, a folder of records, the JOBS.toml of a batch,
    or a plan. A card may be of several outputs; a page and pictures are of one, or of a plan.
    """
    said = reporting.parse_overrides(given)
    kinds = {path.suffix.lower() for path in targets}
    if reporting.CARD not in kinds and said != CardOverrides():
        raise UsageError("what is said of the model is for a model card; give -o README.md with it")
    if kinds <= set(reporting.PICTURES) and (sources or evaluations):
        raise UsageError("a picture is of a plan alone; --source and --evaluation are for a page or a model card")
    found = reporting.add_evaluations(
        reporting.read_subjects(path for given in inputs for path in output_records(given)), evaluations
    )
    files = reporting.input_identities(found, *inputs, *evaluations, *sources)
    reporting.check_targets(targets, force=force, inputs=files)
    reporting.write_reports(targets, found, said, sources, force=force, inputs=files, monitor=messages.MONITOR)
    for path in targets:
        messages.print_result(f"{path}: {format_size(path.stat().st_size)}")
