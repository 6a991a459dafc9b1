"""`requant verify`: a comparison of a converted model with its record, plan and source."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from requant.api.verify import verify
from requant.cli import messages, options
from requant.cli.command import Command
from requant.container.source import open_source
from requant.errors import BadInput, printable
from requant.report.text.result import verification_text


@click.command("verify", cls=Command)
@click.argument("target", metavar="OUT", type=options.FILE, shell_complete=options.GGUF)
@options.file_option(
    *("--source", "model"), metavar="MODEL", shell_complete=options.GGUF, help="The model it was made from."
)
@options.file_option(
    *("--plan", "wanted"), shell_complete=options.JSON, help="A plan, or the record if not beside OUT."
)
@click.option("--full", is_flag=True, help="Encode the source again as the record or OUT's own header says.")
@options.file_option("--imatrix", shell_complete=options.GGUF, help="The importance OUT was made with, for --full.")
@options.threads
@options.json_output
def command(
    *,
    target: Path,
    model: Path | None,
    wanted: Path | None,
    full: bool,
    imatrix: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Read every byte of a converted model and compare it with what is known of it.

    The verdict is one of three. The same bytes as were written: by its record, or by the digests in its metadata.
    Plausible against the source: --source compares copies byte for byte, and 64 rows of every encoded tensor. Only
    readable: compared with nothing. Findings are exit code 3, with a line for each on stdout.
    """
    with ExitStack() as stack:
        source = None if model is None else stack.enter_context(open_source(model))
        found = verify(target, source, wanted, messages.MONITOR, full=full, imatrix=imatrix, threads=threads)
    messages.print_result(found.to_json() if as_json else verification_text(found))
    if found.ok:
        return
    if found.has_only_other_source:
        hint = "give --source the model that it was made from; in the file itself nothing is wrong"
        raise BadInput(model, f"is not the source of {printable(str(target))}", hint=hint)
    n = len(found.findings)
    raise BadInput(target, f"fails the verification: {n} finding{'s' * (n > 1)}", hint="do not use it")
