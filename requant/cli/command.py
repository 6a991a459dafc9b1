"""The class of every command: options under headings, examples, exit codes, and the options -q, -v and --progress.

A command needs only `@click.command(cls=Command)`; the rest of its help is in `requant.cli.help_pages`.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from requant.cli.console import PROGRESS, QUIET, VERBOSE, log, set_level, set_progress, settings
from requant.cli.help_pages import ENVIRONMENT, EXIT_CODES, OTHER, PAGES, Page, full_headings
from requant.common.units import format_size
from requant.errors import UsageError, brief, suggest

WRITTEN = frozenset(["out", "recipe", "emit", "state", "targets", "reports"])  # parameters that are paths of outputs


def _take_level(_: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        set_level(QUIET if param.name == "quiet" else VERBOSE)


def _take_progress(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        set_progress(value)


def _take_debug(_: click.Context, __: click.Parameter, value: bool) -> None:
    settings.debug = settings.debug or value


class WordChoice(click.Choice):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """A choice among words; the error for another word names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word. Raises UsageError naming the option."""
        words = [str(word) for word in self.choices]
        if str(value).lower() not in words:
            name = param.opts[-1] if param else "value"
            raise UsageError(f"{name}: '{brief(str(value))}' is not known; {suggest(str(value), words)}")
        return super().convert(str(value).lower(), param, ctx)


class OptionalValue(click.Option):
    """An option whose value, one of `values`, may be left out; then it is the first of them."""

    def __init__(self, names: list[str], *, values: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(names, **({"type": WordChoice(values)} | kwargs))
        self.values, self.bare = values, values[0]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with the value in brackets."""
        record = super().get_help_record(ctx)
        return None if record is None else (record[0].replace(f" {self.metavar}", f"[={self.metavar}]"), record[1])


def common() -> list[click.Option]:
    """Return the options of every command, which may stand before and after its name."""
    flag = functools.partial(click.Option, is_flag=True, expose_value=False)
    verbose = "Say what is read, written and done, and how long it takes."
    return [
        click.Option(
            ["--progress"],
            type=WordChoice(PROGRESS),
            metavar="HOW",
            expose_value=False,
            callback=_take_progress,
            show_default="auto",
            help="How long work is shown on stderr: bar, plain lines, json lines, none; auto is a bar on a terminal "
            "and a line every 10 s elsewhere.",
        ),
        flag(["-q", "--quiet"], callback=_take_level, help="Say nothing but errors and the result."),
        flag(["-v", "--verbose"], callback=_take_level, help=verbose),
        flag(["--debug"], callback=_take_debug, help="Show where an error arose."),
    ]


class Command(click.Command):
    """A command with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += common()

    @property
    def page(self) -> Page:
        """The files, examples and exit codes of the help."""
        return PAGES.get(self.name or "", Page())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words. Raises UsageError for those of other tools."""
        args = _add_values(args, options_by_name(self, ctx))
        if not ctx.resilient_parsing:
            from requant.cli.foreign_words import check_words

            check_words(args, options_by_name(self, ctx), self.name or "")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; at the verbose level log its files and its time."""
        if settings.level < VERBOSE:
            return super().invoke(ctx)
        start = time.monotonic()
        for line in _describe_params(ctx.params):
            log(line, VERBOSE)
        result = super().invoke(ctx)
        log(f"{ctx.info_name} took {time.monotonic() - start:.2f} s", VERBOSE)
        return result

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the files, then the options under their headings."""
        if self.page.files:
            with formatter.section("Files"):
                formatter.write_dl(self.page.files)
        write_options(self.get_params(ctx), ctx, formatter, full_headings())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples, exit codes and related commands."""
        write_page(self.page, formatter)


def _add_values(args: list[str], named: Mapping[str, click.Option]) -> list[str]:
    """Return the words, with the value of each option that may stand without one.

    It takes the next word only where that is one of its values: others are files.
    """
    end = args.index("--") if "--" in args else len(args)
    words, left = list[str](), args[:end]
    while left:
        word = left.pop(0)
        option = named.get(word)
        if isinstance(option, OptionalValue):
            word = f"{word}={left.pop(0) if left and left[0] in option.values else option.bare}"
        words.append(word)
    return words + args[end:]


def options_by_name(command: click.Command, ctx: click.Context) -> dict[str, click.Option]:
    """Return the options of a command by each of their names."""
    return {name: p for p in command.get_params(ctx) if isinstance(p, click.Option) for name in p.opts}


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
    # without the brackets that click puts around a default in words
    return re.sub(r"\[default: \(([^()]*)\)", r"[default: \1", text)


def write_page(page: Page, formatter: click.HelpFormatter) -> None:
    """Write examples, exit codes, environment variables and related commands."""
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


def _describe_params(params: Mapping[str, Any]) -> Iterable[str]:
    """Return a line for each file among the parameters, and one for the threads."""
    for name, given in params.items():
        for value in given if isinstance(given, tuple) else [given]:
            if isinstance(value, Path) and name in WRITTEN:
                yield f"writes {value}"
            elif isinstance(value, Path) and value.is_file():
                yield f"reads {value}, {format_size(value.stat().st_size)}"
    if "threads" in params:
        n = params["threads"] or os.cpu_count() or 1
        yield f"threads: {n} of {os.cpu_count()} processors"
