"""Writes into pages what their commands print, in the sandbox of the tests.

    python scripts/docs/doc_outputs.py [--model SmolLM2-135M-Instruct.Q4_1.gguf] docs/tutorial.md ...

Only console blocks that show an output are changed. Where one is shortened by a line `...`, as many lines as stood
before and behind it are kept.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(p) for p in (TESTS.parent, TESTS / "helpers", TESTS / "docs")]

from doc_blocks import ROOT, blocks, commands
from doc_models import furnish
from doc_running import run_line


def shown(command, ran):
    """The lines that the page shows of what the command printed."""
    fails = any(line.startswith("requant: error:") for line in command.output)
    printed = (ran.err if fails else ran.out).rstrip("\n").split("\n")
    if "..." not in command.output:
        return printed
    first = command.output.index("...")
    last = len(command.output) - first - 1
    return [*printed[:first], "...", *(printed[-last:] if last else [])]


def updated(page, sandbox, left_out):
    """The page's text with new outputs; its commands, but those that match `left_out`, are run in `sandbox`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    edits = []
    for block in blocks(page):
        if block.title:
            path = sandbox / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(block.text, encoding="utf-8")
        for command in commands(block) if block.language in ("sh", "console") else ():
            if left_out and re.search(left_out, command.line):
                continue
            began = time.perf_counter()
            ran = run_line(command)
            if ran is not None:
                print(f"{time.perf_counter() - began:6.2f} s  exit {ran.code}  {command.line}", file=sys.stderr)
                if ran.code and command.output is None:
                    print(ran.err, file=sys.stderr)
            if ran is not None and command.output is not None:
                edits.append((command.end - len(command.output), command.end, shown(command, ran)))
    for start, end, new in reversed(edits):
        lines[start:end] = new
    return "\n".join(lines) + "\n"


def run():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, help="the real SmolLM2-135M-Instruct.Q4_1.gguf, for the tutorial")
    parser.add_argument("--leave-out", metavar="REGEX", help="commands to leave as they are")
    given = parser.parse_args()
    for page in [p.resolve() for p in given.pages]:
        with tempfile.TemporaryDirectory() as folder:
            sandbox = Path(folder) / "sandbox"
            sandbox.mkdir()
            furnish(sandbox, folder, given.model and given.model.resolve())
            os.chdir(sandbox)
            page.write_text(updated(page, sandbox, given.leave_out), encoding="utf-8")
            os.chdir(ROOT)


if __name__ == "__main__":
    run()
