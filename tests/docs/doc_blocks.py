"""The Markdown of the project, cut into its fenced blocks; and what of it is a command."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "reference"  # written from the code: scripts/docs/reference.py
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
WRITTEN = [page for page in PAGES if GENERATED not in page.parents]

_FENCE = re.compile(r"^( *)(`{3,})(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, what it says it is, the file that it is meant to be, its lines."""

    page: Path
    line: int
    language: str
    title: str
    lines: tuple

    @property
    def text(self):
        return "\n".join(self.lines) + "\n"

    @property
    def where(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """All blocks of a page, in order."""
    found, open_block = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if open_block is None and fence:
            open_block = (fence, number, [])
        elif open_block is not None and fence and fence[2] == open_block[0][2] and not fence[3].strip():
            opened, at, lines = open_block
            language, _, rest = opened[3].strip().partition(" ")
            title = _TITLE.search(rest)
            found.append(Block(page, at, language, title[1] if title else "", tuple(lines)))
            open_block = None
        elif open_block is not None:
            open_block[2].append(line[len(open_block[0][1]) :] if line.startswith(open_block[0][1]) else line)
    assert open_block is None, f"{page}: a block is not closed"
    return found


@dataclass(frozen=True)
class Command:
    """One command of a page, and what the page says that comes of it (None: nothing is said)."""

    where: str
    line: str
    output: tuple | None
    end: int  # lines of the page up to the end of the output


def commands(block):
    """The commands of a block: each line of `sh`, each line after `$ ` in `console`, joined where they end in \\."""
    found, lines = [], list(block.lines)
    at = block.line
    while lines:
        line = lines.pop(0)
        at += 1
        where = f"{block.page.relative_to(ROOT)}:{at}"
        if block.language == "console":
            assert line.startswith("$ "), f"{where}: a console block begins with $"
            line = line[2:]
        elif not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + lines.pop(0).strip()
            at += 1
        output = []
        while block.language == "console" and lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
            at += 1
        found.append(Command(where, line, tuple(output) if output else None, at))
    return found
