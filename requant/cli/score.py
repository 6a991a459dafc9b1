"""`requant score`: the loss of each tensor in each type, written to a file for plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api.score import score_to_files
from requant.cli import messages, options, terminal
from requant.cli.command import Command
from requant.cli.sessions import open_model_session, without_unkept
from requant.errors import UsageError
from requant.planning.request import build_request
from requant.report.text.table import losses_table


@click.command("score", cls=Command)
@options.model
@options.result_file("losses")
@options.file_option(
    "--emit-imatrix", "emit", help="Write the importance measured on the way to this file, not beside -o."
)
@options.imatrix
@options.calibration
@options.plan_option("--types")
@options.threads
@options.cluster
@options.effort
@options.allow_requantize
@options.force
@options.json_output
@options.session_options
def command(
    *, out: Path | None, emit: Path | None, types: tuple[str, ...] | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Measure what each type would cost each tensor.

    Every matrix is encoded in every type; what that changes is weighed by gradients of the model on a text, which
    gives a predicted KL divergence in nats per token. The model is run a layer at a time, on the CPU. The losses serve
    any number of plans. The importance measured on the way is written beside them, as LOSSES.imatrix.gguf; plan and
    convert find it there.
    """
    if out is None and not as_json:
        raise UsageError("nowhere to put the losses; say -o LOSSES.json or --json")
    with open_model_session(request=build_request({"types": types}), **given) as opened:
        session = without_unkept(opened, out or emit)
        losses = score_to_files(session, out=out, emitted=emit, folder=Path(), force=force)
    messages.print_result(losses.to_json() if as_json else losses_table(losses, terminal.width()))
