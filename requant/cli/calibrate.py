"""`requant calibrate`: run a model on a text and write statistics of its activations, as a GGUF importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from requant.api import measure as measuring
from requant.cli import messages, options
from requant.cli.command import Command
from requant.container.source import open_source
from requant.errors import UsageError
from requant.report.text.result import statistics_text
from requant.scoring.options import CalibrationOptions, StatisticsOptions, check_calibration


@click.command("calibrate", cls=Command)
@options.model
@options.text
@options.tokens
@options.windows(32)
@options.window
@options.result_file("statistics", is_text=False)
@click.option("--no-gradients", is_flag=True, help="Only inputs: what --imatrix needs, in a third of the time.")
@options.max_memory("more passes over the model")
@options.engine
@options.threads
@options.force
def command(*, model: Path, out: Path | None, text: Path | None, tokens: Path | None, force: bool, **how: Any) -> None:
    """Run a model on a text and keep statistics of it.

    The result is an importance matrix that llama-quantize reads too, with the squared gradients in tensors of its own.
    llama.cpp runs the architectures that requant does not know, and with --engine any; it has no gradients. A run that
    was stopped goes on where it was when the same command is given again.
    """
    if out is None:
        raise UsageError("nowhere to put the statistics; say -o STATS.gguf")
    asked = CalibrationOptions(text=text, tokens=tokens, n_windows=how.pop("n_windows"), window=how.pop("window"))
    check_calibration(asked)
    run = StatisticsOptions(gradients=not how.pop("no_gradients"), **how)
    with open_source(model) as source:
        messages.warn(*source.warnings)
        found = measuring.calibrate(source, asked, run, out, messages.MONITOR, force=force)
    messages.print_result(statistics_text(found, source, out))
