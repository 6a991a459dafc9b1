"""Running requant in this process and in one of its own, and the files that the commands are tried on."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from requant.cli import messages
from requant.cli.main import main

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY, IMATRIX = FIXTURES / "tiny-llama-f16.gguf", FIXTURES / "imatrix.gguf"


# a machine that is slow today gets no line of progress more than another
RARELY = "import requant.cli.progress; requant.cli.progress.EVERY['auto'] = 3600"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run(capsys, *words):
    """The command in this process, through the same code that the console entry point takes."""
    capsys.readouterr()
    code = messages.exit_code_of(lambda: main.main([str(w) for w in words], prog_name="requant", standalone_mode=False))
    return Ran(code, *capsys.readouterr())


def start(*words, before="", **options):
    """The command in a process of its own; `before` is Python that runs first."""
    code = f"import sys; sys.argv[0] = 'requant'\n{before}\nfrom requant.cli import run\n{RARELY}\nrun()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], **(pipes | options))


def spawn(*words, **options):
    process = start(*words, **options)
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err)


def assert_failed(ran, code, *said):
    """One line on stderr that says all of `said`, nothing on stdout, and the code."""
    lines = ran.err.splitlines()
    assert ran.code == code, ran
    assert ran.out == "" and len(lines) == 1, ran
    assert lines[0].startswith("requant: error: ") and all(words in lines[0] for words in said), ran


def names(folder):
    """What is in `folder`, sorted."""
    return sorted(path.name for path in Path(folder).iterdir())
