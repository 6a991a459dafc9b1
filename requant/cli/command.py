"""A command as `requant` has them: options under headings, examples, exit codes, and -q, -v and --progress for all.

`@click.command(cls=Command)` is all that a command needs; what its help says beside its docstring and its options is in
`requant.cli.help_pages`, and reachable as `command.page`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from requant.cli import console as speech
from requant.cli import messages
from requant.cli.console import PROGRESS, QUIET, VERBOSE, settings
from requant.cli.help_pages import ENVIRONMENT, EXIT_CODES, OTHER, PAGES, Page, full_headings
from requant.common.units import format_size
from requant.errors import UsageError, brief

_WRITTEN = frozenset(["out", "recipe", "emit", "state", "targets", "reports"])  # parameters that name what is written


def _level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(_: click.Context, __: click.Parameter, value: bool) -> None:
        if value:
            speech.set_level(level)

    return callback


def _progress(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        settings.progress = value


class Choice(click.Choice):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """One of some words; a wrong one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word, or a UsageError that names the option."""
        from requant.errors import suggest

        words = [str(word) for word in self.choices]
        if str(value).lower() not in words:
            name = param.opts[-1] if param else "value"
            raise UsageError(f"{name}: '{brief(str(value))}' is not known; {suggest(str(value), words)}")
        return super().convert(str(value).lower(), param, ctx)


def common() -> list[click.Option]:
    """The options that every command has, before its name and after it."""
    return [
        click.Option(
            ["--progress"],
            type=Choice(PROGRESS),
            metavar="HOW",
            expose_value=False,
            callback=_progress,
            show_default="auto",
            help="How long work is shown on stderr: bar, plain lines, json lines, none; auto is a bar on a terminal "
            "and a line every 10 s elsewhere.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_level(QUIET),
            help="Say nothing but errors and the result.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_level(VERBOSE),
            help="Say what is read, written and done, and how long it takes.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=messages.set_debug,
            help="Show where an error arose.",
        ),
    ]


class Command(click.Command):
    """A command with the common options; in a batch and in a group alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += common()

    @property
    def page(self) -> Page:
        """What the help says beside docstring and options."""
        return PAGES.get(self.name or "", Page())

    def invoke(self, ctx: click.Context) -> Any:
        """What the command returns; at the verbose level, with what it reads and how long it takes."""
        if settings.level < VERBOSE:
            return super().invoke(ctx)
        begun = time.monotonic()
        for line in _told(ctx.params):
            messages.debug(line)
        found = super().invoke(ctx)
        messages.debug(f"{ctx.info_name} took {time.monotonic() - begun:.2f} s")
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Files, then the options under their headings."""
        if self.page.files:
            with formatter.section("Files"):
                formatter.write_dl(self.page.files)
        write_options(self.get_params(ctx), ctx, formatter, full_headings())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, exit codes, where to read on."""
        write_page(self.page, formatter)


def write_options(
    params: Iterable[click.Parameter],
    ctx: click.Context,
    formatter: click.HelpFormatter,
    headings: Mapping[str, tuple[str, ...]],
) -> None:
    """Write the options, each under its heading, in the order of `headings`."""
    options = [p for p in params if isinstance(p, click.Option)]
    records = {o.opts[-1]: record for o in options if (record := o.get_help_record(ctx)) is not None}
    named = {option for options in headings.values() for option in options}
    sections = {**headings, OTHER: tuple(o for o in records if o not in named)}
    for heading, names in sections.items():
        rows = [(records[name][0], _plain(records[name][1])) for name in names if name in records]
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=28)


def _plain(text: str) -> str:
    """Without the brackets that click puts around a default that is said in words."""
    return re.sub(r"\[default: \(([^()]*)\)", r"[default: \1", text)


def write_page(page: Page, formatter: click.HelpFormatter) -> None:
    """Examples, exit codes and related commands."""
    if page.examples:
        with formatter.section("Examples"):
            for i, example in enumerate(page.examples):
                if i:
                    formatter.write_paragraph()
                formatter.write_text(f"{example.what}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{example.command}\n")
    if page.exit_codes:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), EXIT_CODES[code]) for code in page.exit_codes])
    if page.environment:
        with formatter.section("Environment"):
            formatter.write_dl(ENVIRONMENT)
    if page.see:
        with formatter.section("See also"):
            formatter.write_text(", ".join(f"requant {name}" for name in page.see))


def _told(params: Mapping[str, Any]) -> Iterable[str]:
    """The files and threads among the parameters."""
    paths = [
        (name, each) for name, value in params.items() for each in (value if isinstance(value, tuple) else [value])
    ]
    for name, value in paths:
        if not isinstance(value, Path):
            continue
        if name in _WRITTEN:
            yield f"writes {value}"
        elif value.is_file():
            yield f"reads {value}, {format_size(value.stat().st_size)}"
    if "threads" in params:
        n = params["threads"] or os.cpu_count() or 1
        yield f"threads: {n} of {os.cpu_count()} processors"
