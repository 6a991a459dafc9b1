"""The command line: one file per command, each a thin client of the library."""

from __future__ import annotations

from requant.cli import messages


def run() -> None:
    """Run the command in sys.argv and end the process with its exit code."""
    messages.prepare()

    def command() -> None:
        from requant.cli.main import main  # after prepare, which handles a signal during the import

        main.main(prog_name="requant", standalone_mode=False)

    messages.leave(messages.exit_code_of(command))
