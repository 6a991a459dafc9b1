"""The `requant` group, which imports the module of a command when the command is used."""

from __future__ import annotations

import importlib
from typing import Any

import click

from requant.cli import console, messages
from requant.cli.command import common, options_by_name, write_options, write_page
from requant.cli.help_pages import HEADINGS, MAIN, Page
from requant.common.inputs import collect_inputs
from requant.errors import find_similar

# command -> first line of its help, here so that `requant --help` imports no command
COMMANDS = {
    "inspect": "Show what a model is made of and what it needs in VRAM.",
    "calibrate": "Run a model on a text and keep statistics of it.",
    "score": "Measure what each type would cost each tensor.",
    "plan": "Choose a type for each tensor within a budget.",
    "convert": "Quantize a model to fit a budget.",
    "report": "Show what was made: a page, a model card, pictures.",
    "batch": "Make the outputs that a file asks for.",
    "diff": "Compare two plans or two models: types, bytes, predicted loss.",
    "verify": "Check a converted model against its record, plan and source.",
    "evaluate": "Measure perplexity, and the divergence from another model.",
}


_SYNONYMS = {  # what other tools call it
    **dict.fromkeys(["quantize", "quantise", "quant", "compress", "llama-quantize"], "convert"),
    **dict.fromkeys(["imatrix", "llama-imatrix"], "calibrate"),
    **dict.fromkeys(["perplexity", "ppl", "llama-perplexity", "measure"], "evaluate"),
    **dict.fromkeys(["info", "show", "dump", "ls"], "inspect"),
    **dict.fromkeys(["compare"], "diff"),
    **dict.fromkeys(["check", "test"], "verify"),
}


def find_command(name: str) -> click.Command:
    """Import the command of that name."""
    command: click.Command = importlib.import_module(f"requant.cli.{name}").command
    return command


class LazyGroup(click.Group):
    """A group whose commands live in `requant.cli.<name>` as `command`; `help NAME` is `NAME --help`."""

    page: Page = MAIN

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of a workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        return find_command(cmd_name) if cmd_name in COMMANDS else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reset the settings of the console, and turn `help NAME` into `NAME --help`."""
        if not ctx.resilient_parsing:
            console.reset()
            if args and args[0].startswith("-") and args[0] != "--":
                from requant.cli.foreign_words import check_option

                check_option(args[0].partition("=")[0], options_by_name(self, ctx), "")
        return super().parse_args(ctx, [*args[1:2], "--help"] if args[:1] == ["help"] else args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and collect its inputs from here on."""
        with collect_inputs():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items(), ("help", "Show the help of a command: requant help plan.")])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options of all commands."""
        self.format_commands(ctx, formatter)
        write_options(self.get_params(ctx), ctx, formatter, HEADINGS)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples, exit codes and environment variables."""
        write_page(self.page, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Return the commands that begin with `incomplete`, without importing them, and the options."""
        from click.shell_completion import CompletionItem

        words = COMMANDS | {"help": "Show the help of a command."}
        found = [CompletionItem(name, help=what) for name, what in words.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command. Raises click.UsageError naming the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = [_SYNONYMS[args[0]]] if args[0] in _SYNONYMS else find_similar(args[0], [*COMMANDS, "help"], 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            if args[0].lower().endswith(".gguf"):
                hint = "the command comes first: requant convert MODEL OUT.gguf, or requant inspect MODEL"
            raise click.UsageError(f"no command '{args[0]}'; {hint}", ctx)
        return super().resolve_command(ctx, args)


def _clear_cache(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from requant.formats import kernel_cache

        for folder in kernel_cache.clear():
            messages.print_result(f"removed {folder}")
        ctx.exit()


def _versions(*, as_json: bool) -> str:
    from requant.formats.versions import versions
    from requant.report.text.versions import versions_json, versions_text

    return versions_json(versions()) if as_json else versions_text(versions())


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, help="Show the versions of all that matters, and where compiled kernels are.")
@click.option("--json", "as_json", is_flag=True, help="With --version: as one JSON object.")
@click.option(
    "--clear-cache",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_clear_cache,
    help="Remove the compiled kernels; the next run compiles them again.",
)
@click.pass_context
def main(ctx: click.Context, /, *, version: bool, as_json: bool) -> None:
    """Fit a GGUF language model to the memory you have."""
    if as_json and not version:
        raise click.UsageError("--json comes after a command, or goes with --version", ctx)
    if version:
        messages.print_result(_versions(as_json=as_json))
        ctx.exit()
    if ctx.invoked_subcommand is None:
        messages.print_result(ctx.get_help())


main.params += common()
