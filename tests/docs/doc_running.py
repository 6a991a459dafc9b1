"""Runs the commands of a page, in the sandbox that is the current folder, and compares what they print."""

import contextlib
import io
import re
import shlex
import subprocess
from dataclasses import dataclass

from requant.cli import messages
from requant.cli.main import main

# run by a shell: they touch nothing but the sandbox
SHELL = frozenset("cat cmp cp head ls mkdir mv rm tail wc".split())  # noqa: SIM905

# never run here: what a line begins with -> why
NOT_RUN = {
    r"sh scripts/": "installs",
    r"(\w+=\S+ )*python scripts/": "measures for minutes, or writes into the checkout",
    r"(pip|pipx|uv|pip-audit)\b": "asks the network",
    r"python -m zipfile -e|mv smollm2/": "what it unpacks comes from the network",
    r"python3 -m venv|\. ": "the environment of the reader",
    r"llama-\w+": "an engine, which is not part of requant",
    r"dask\b": "runs for ever; tests/common/test_cluster.py starts such a cluster",
    r"requant .*--cluster tcp": "no scheduler is there; tests/common/test_cluster.py starts one",
    r"python -m pytest": "the tests themselves",
}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def requant(words):
    """The command in this process, its output caught."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = messages.exit_code_of(lambda: main.main(words, prog_name="requant", standalone_mode=False))
    return Ran(code, out.getvalue(), err.getvalue())


def parsed(line):
    """The words of a line, and where its outputs go: {1 or 2: file}."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|;&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words, targets, tokens = [], {}, list(lexer)
    while tokens:
        token = tokens.pop(0)
        if set(token) <= set("<>|;&"):
            assert token == ">", f"{line}: {token} is not known here"
            stream = int(words.pop()) if words and words[-1] in "12" and f"{words[-1]}>" in line else 1
            targets[stream] = tokens.pop(0)
        else:
            words.append(token)
    return words, targets


def reason_not_to_run(line):
    return next((why for start, why in NOT_RUN.items() if re.match(start, line)), None)


def run_line(command):
    """Run one command of a page; Ran, or None for one that cannot run here."""
    if reason_not_to_run(command.line):
        return None
    words, targets = parsed(command.line)
    if words[0] == "requant":
        ran = requant(words[1:])
    elif words[0] in SHELL:
        made = subprocess.run(["sh", "-c", command.line], capture_output=True, text=True, check=False)
        ran, targets = Ran(made.returncode, made.stdout, made.stderr), {}
    else:
        raise AssertionError(f"{command.where}: no test runs this: {command.line}")
    for stream, name in targets.items():
        with open(name, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(ran.out if stream == 1 else ran.err)
    return ran


def check(command, ran, *, compared=True):
    """The command ended as the page shows it: well, unless an error is shown; with the output that is shown.

    Without `compared` the output may be any: the model is not the one that the page speaks of.
    """
    shown = command.output
    fails = shown is not None and any(line.startswith("requant: error:") for line in shown)
    assert (ran.code != 0) == fails, f"{command.where}: exit code {ran.code}\n{command.line}\n{ran.err}"
    if shown is not None and compared:
        printed = ran.err if fails else ran.out
        problem = difference(shown, printed.splitlines())
        assert problem is None, f"{command.where}: {command.line}\n{problem}\n--- printed:\n{printed}"


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
# what differs from run to run, and what does from one optimum to another as good: what is left over, a type
_ANY = re.compile(r"\d[\d.:]*(?= ?(?:s|ms|min|h)\b)|[\d.]+ [KMG]i?B/s|[\d.]+ \w+(?= free)|\b(?:I?Q|TQ)\d\w*")


def difference(shown, printed, tolerance=0.02):
    """Where the output of a page and that of the command part, or None. A line `...` stands for any lines.

    Spaces do not count, times may be any, other numbers differ by up to 2 %: float sums depend on the processor. So may
    quantized types, of two plans that are equally good.
    """
    at, skipping = 0, False
    for line in shown:
        if line.strip() == "...":
            skipping = True
            continue
        while skipping and at < len(printed) and not _same(line, printed[at], tolerance):
            at += 1
        if at >= len(printed):
            return f"shown, but not printed: {line!r}"
        if not _same(line, printed[at], tolerance):
            return f"shown:   {line!r}\nprinted: {printed[at]!r}"
        at, skipping = at + 1, False
    rest = [line for line in printed[at:] if line.strip()]
    return None if skipping or not rest else f"printed, but not shown: {rest[0]!r}"


def _same(shown, printed, tolerance):
    shown, printed = (_ANY.sub("<any>", line) for line in (shown, printed))
    a, b = _NUMBER.findall(shown), _NUMBER.findall(printed)
    words = [_NUMBER.sub("#", line).split() for line in (shown, printed)]
    return words[0] == words[1] and len(a) == len(b) and all(map(lambda x, y: _near(x, y, tolerance), a, b))


def _near(a, b, tolerance):
    x, y = (float(n.replace(",", "")) for n in (a, b))
    return abs(x - y) <= tolerance * max(abs(x), abs(y))
