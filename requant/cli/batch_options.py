"""Keys of a job file: the options of `requant convert` and `requant report`, parsed by click."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from requant.api.batch.items import Batch, ConvertOptions, read_batch
from requant.api.batch.jobs import KeyOption
from requant.api.batch.sources import OWN
from requant.cli import messages, options
from requant.cli.main import find_command
from requant.errors import UsageError
from requant.planning.request import choose_plan_from

COMMON = {"debug", "quiet", "verbose", "progress"}  # options that every command has
_OWN = COMMON | {"dry_run", "force", "restart", "as_json", "reports"}  # decided by the batch itself


def read_jobs(path: Path) -> Batch:
    """Read the batch in the job file at `path`, and warn of files left out. Raises BadInput, OutputRefused."""
    batch = read_batch(path, key_options(find_command("convert"), _OWN), parse_options)
    messages.warn(*(f"{name} is no source: {why}" for name, why in batch.summary.excluded.items() if why != OWN))
    return batch


def key_options(command: click.Command, left_out: Container[str]) -> dict[str, KeyOption]:
    """Return key -> the option of the command that it stands for."""
    found = {}
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden and param.name not in left_out:
            option = next(o for o in param.opts if o.startswith("--"))
            found[option.removeprefix("--")] = _key_option(option, param)
    return found


def _key_option(option: str, param: click.Option) -> KeyOption:
    kind = "flag" if param.is_flag else "several" if param.multiple else "one"
    if kind == "one" and (param.metavar or "").endswith(",..") and param.name != "vram":  # one output, one VRAM
        kind = "commas"
    return KeyOption(option, str(param.name), kind, isinstance(param.type, click.Path))  # type: ignore[arg-type]


@options.budget
@options.calibration
@options.splitting
@options.session_options
def collect_options(**how: Any) -> dict[str, Any]:
    """Return the parameters of `requant convert`; those of budget, data, splitting and session are one value each."""
    return how


def parse_options(words: Sequence[str]) -> ConvertOptions:
    """Parse the options of a conversion. Raises UsageError, and BadInput for a file of tensor types."""
    try:
        with find_command("convert").make_context("convert", ["MODEL", "OUT", *words]) as context:
            how = collect_options(**context.params)
    except click.ClickException as error:
        what = " ".join(error.format_message().split()).removesuffix(".")
        raise UsageError(f"{what[:1].lower()}{what[1:]}") from error
    how["plan_from"] = choose_plan_from(how["request"], how["plan"], how["type_name"], how["preset"], how["like"])
    if len(how["vrams"]) > 1:
        raise UsageError("vram is one size; write an entry of budgets for each")
    if how["measure"] is not None and not how["request"].has_budget:
        raise UsageError("measure chooses among plans for a budget; give vram, size or bpw with it")
    return ConvertOptions(**{f.name: how[f.name] for f in fields(ConvertOptions)})
