"""`requant evaluate`: perplexity on a text, and the divergence from the source."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from requant.api import measure as measuring
from requant.cli import messages, options
from requant.cli.command import Command
from requant.container.source import open_source
from requant.errors import UsageError
from requant.model.hyperparameters import context_warnings
from requant.report.text.result import evaluation_text
from requant.scoring.options import CalibrationOptions


def _check_data(calibration: CalibrationOptions) -> None:
    if calibration.text is not None and calibration.tokens is not None:
        raise UsageError("--text and --tokens cannot be given together")


@click.command("evaluate", cls=Command)
@options.model
@options.file_option("--base", shell_complete=options.GGUF, help="The model to measure the divergence from.")
@options.own_text
@options.tokens
@options.windows(None)
@options.window
@options.engine
@options.threads
@options.json_output
@options.collected("calibration", CalibrationOptions, _check_data)
def command(*, model: Path, base: Path | None, calibration: CalibrationOptions, as_json: bool, **how: Any) -> None:
    """Measure perplexity, and the divergence from another model.

    As llama-perplexity does it: the second half of every window is scored. Activations are F32 here; llama.cpp rounds
    them to 8 bits, which adds about 0.0004 nats to a quantized model's divergence. With --engine, and for
    architectures that requant does not know, llama.cpp itself is measured.
    """
    from requant.api.engine import choose_engine

    with ExitStack() as opened:
        source = opened.enter_context(open_source(model))
        choose_engine([source], wanted=how["engine"])  # a model that nothing runs needs no text
        if calibration.text is None and calibration.tokens is None:
            raise UsageError("say what to evaluate on: --text FILE or --tokens FILE")
        reference = None if base is None else opened.enter_context(open_source(base))
        messages.warn(*source.warnings, *context_warnings(source.metadata, calibration.window))
        found = measuring.evaluate(*(source, reference, calibration, messages.MONITOR), **how)
    messages.print_result(found.to_json() if as_json else evaluation_text(found, model, base))
